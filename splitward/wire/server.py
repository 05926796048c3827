"""The server half beside a bundle: `NAME.server.json` (this card) and `NAME.server.safetensors`; no pickle."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from splitward.errors import BundleError
from splitward.wire.names import Id
from splitward.wire.release import ReleaseLaw

FORMAT = 1


class ServerCard(msgspec.Struct, frozen=True):
    """What the cloud needs to serve one model.

    Attributes
    ----------
    model : str
        Model id of the bundle that it answers, as 32 hexadecimal digits.
    release : ReleaseLaw
        The shape, dtype and scale that a message of this model must have.
    network : dict
        Settings from which `splitward.method.halves.build_server` makes the network.
    weights, sha256 : str
        Safetensors file beside the card, and its hash.
    """

    format: int
    model: Id
    name: str
    classes: tuple[str, ...]
    release: ReleaseLaw
    network: dict[str, Any]
    weights: str
    sha256: str


def server_card_path(bundle: Path) -> Path:
    """Where the card of the server half of `bundle` lies."""
    return bundle.with_name(bundle.stem + ".server.json")


def write_server_card(path: Path, card: ServerCard) -> None:
    """Write `card` to `path` atomically."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2))
    partial.replace(path)


def read_server_card(path: Path) -> tuple[ServerCard, Path]:
    """Card at `path` and the path of its weights, whose hash was checked.

    Raises
    ------
    BundleError
        `unreadable`, `bad_manifest`, `bad_format` or `bad_hash`.
    """
    try:
        card = msgspec.json.decode(path.read_bytes(), type=ServerCard)
        weights = path.with_name(Path(card.weights).name)
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise BundleError(
            "unreadable",
            f"{error.filename}: {error.strerror}. `splitward export` writes it beside the bundle.",
        ) from error
    except (msgspec.DecodeError, RecursionError, ValueError) as error:  # the last: not UTF-8, or no file name
        raise BundleError("bad_manifest", f"{path}: is not a server card: {error}.") from error
    if card.format != FORMAT:
        raise BundleError("bad_format", f"{path}: format {card.format}; this version reads {FORMAT}.")
    if digest != card.sha256:
        raise BundleError("bad_hash", f"{weights}: differs from what was exported. Export the run again.")
    return card, weights
