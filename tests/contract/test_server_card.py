"""The server card and its weights: read as written, refused with a reason otherwise."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest

from splitward.errors import BundleError
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import ServerCard, read_server_card, server_card_path, write_server_card

WEIGHTS = b"weights of the server half"
CARD = ServerCard(
    format=1,
    model="0f0e0d0c0b0a09080706050403020100",
    name="tiny",
    classes=("no", "yes"),
    release=ReleaseLaw((2, 4, 4), "int8", bound=1.0, sigma=0.3),
    network={"width": 8},
    weights="tiny.server.safetensors",
    sha256=hashlib.sha256(WEIGHTS).hexdigest(),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A card with its weights beside it."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / CARD.weights).write_bytes(WEIGHTS)
    write_server_card(folder / "tiny.server.json", CARD)
    return folder / "tiny.server.json"


def refusal(path: Path) -> str:
    """Reason for which the card at `path` is refused."""
    with pytest.raises(BundleError) as refused:
        read_server_card(path)
    assert str(path.parent) in str(refused.value)
    return refused.value.reason


def changed(**changes: object) -> bytes:
    """The card's JSON with other values."""
    return msgspec.json.encode(msgspec.to_builtins(CARD) | changes)


def test_what_is_written_is_read(path: Path) -> None:
    assert read_server_card(path) == (CARD, path.with_name(CARD.weights))
    assert sorted(file.name for file in path.parent.iterdir()) == ["tiny.server.json", CARD.weights]


def test_specification_shows_the_card(path: Path, specification) -> None:
    (shown,) = specification.blocks(6, "json")
    assert msgspec.json.decode(shown) == msgspec.json.decode(path.read_bytes())
    assert specification.reasons(6) == {"unreadable", "bad_manifest", "bad_format", "bad_hash"}


def test_the_card_lies_beside_its_bundle() -> None:
    assert server_card_path(Path("models/tiny.bundle")) == Path("models/tiny.server.json")


def test_a_missing_card_or_missing_weights_are_named(path: Path) -> None:
    (path.parent / CARD.weights).unlink()
    with pytest.raises(BundleError, match=CARD.weights) as refused:
        read_server_card(path)
    assert refused.value.reason == "unreadable"
    path.unlink()
    assert refusal(path) == "unreadable"


@pytest.mark.parametrize("data", [b"", WEIGHTS[:-1], WEIGHTS + b"\0", WEIGHTS[::-1]])
def test_other_weights(path: Path, data: bytes) -> None:
    (path.parent / CARD.weights).write_bytes(data)
    assert refusal(path) == "bad_hash"


def test_weights_are_looked_for_beside_the_card_only(path: Path) -> None:
    (path.parents[1] / "stray").write_bytes(WEIGHTS)
    path.write_bytes(changed(weights="../stray"))
    assert refusal(path) == "unreadable"
    path.write_bytes(changed(weights=f"/somewhere/{CARD.weights}"))
    assert read_server_card(path)[1] == path.with_name(CARD.weights)


@pytest.mark.parametrize(
    ("reason", "data"),
    [
        ("bad_manifest", b""),
        ("bad_manifest", b"[]"),
        ("bad_manifest", b"{}"),
        ("bad_manifest", changed()[:-1]),
        ("bad_manifest", changed().replace(b"tiny", b"\xff")),
        ("bad_manifest", b'{"later":' + b"[" * 100_000),
        ("bad_manifest", changed(model="0f0e")),
        ("bad_manifest", changed(model="0F" * 16)),
        ("bad_manifest", changed(model="0f" * 16 + "\n")),
        ("bad_manifest", changed(classes="no, yes")),
        ("bad_manifest", changed(release={"shape": [2, 4, 4], "dtype": "float64"})),
        ("bad_manifest", changed(weights="")),
        ("bad_manifest", changed(weights="/")),
        ("unreadable", changed(weights="..")),
        ("bad_format", changed(format=2)),
        ("bad_hash", changed(sha256="0" * 64)),
    ],
)
def test_every_rule_has_its_reason(path: Path, reason: str, data: bytes) -> None:
    path.write_bytes(data)
    assert refusal(path) == reason
