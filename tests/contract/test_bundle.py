"""The bundle: the same bytes from the same inputs, and a stated reason for every bundle that is refused."""

from __future__ import annotations

import hashlib
import stat
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from splitward.errors import BundleError, ConfigError
from splitward.wire.bundle import (
    FORMAT,
    MANIFEST,
    MAX_DIRECTORY_BYTES,
    MAX_FILE_BYTES,
    MAX_FILES,
    SIGNATURE,
    Bundle,
    FileEntry,
    InputSpec,
    Manifest,
    create_signing_key,
    model_id,
    public_key_path,
    read_bundle,
    read_signing_key,
    read_trusted_key,
    write_bundle,
)
from splitward.wire.release import ReleaseLaw

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
GOLDEN_MANIFEST = Path(__file__).with_name("golden") / "manifest.json"
GOLDEN_MODEL = "d5bfdbe96c1f690d419fd70676e695a5"
GOLDEN_SIGNATURE = (
    "565ad172d9b59043e34e9e52c5edcb08161287b219a23b294e134974d2c52272"
    "a84bfc41ba062660bc901ece8a29229352249ce7249118ab0e6520d1cd5b4501"
)
FILES = {"client.onnx": b"client half " * 20, "frame.npy": bytes(range(64)), "activation.npy": b""}
DRAFT = Manifest(
    format=FORMAT,
    name="tiny",
    created_at="2026-01-01T00:00:00Z",
    task="classification",
    classes=("no", "yes"),
    input=InputSpec(1, 8, 8),
    release=ReleaseLaw((2, 4, 4), "int8", bound=1.0, sigma=0.3),
    client={"onnx-float32": "client.onnx"},
    saliency={},
    golden=("frame.npy", "activation.npy"),
    defence={"profile": "sealed"},
    data={"name": "phantom"},
    metrics={"accuracy": 0.5},
    files={},
)
REASONS = {
    "unreadable", "unsigned", "bad_signature", "bad_manifest", "bad_format", "missing_file", "extra_file",
    "oversize", "bad_hash",
}  # fmt: skip

Entry = tuple[str, bytes]


def listing(files: dict[str, bytes]) -> dict[str, FileEntry]:
    """What the manifest says of `files`."""
    return {name: FileEntry(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}


def signed(manifest: Manifest | bytes, key: Ed25519PrivateKey = KEY) -> list[Entry]:
    """Manifest and signature, whatever the manifest says."""
    text = manifest if isinstance(manifest, bytes) else msgspec.json.encode(manifest)
    return [(MANIFEST, text), (SIGNATURE, key.sign(text))]


def pack(path: Path, entries: list[Entry], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip of `entries`, in their order, repeats included."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def refusal(path: Path, key: Ed25519PrivateKey = KEY) -> str:
    """Reason for which the bundle at `path` is refused."""
    with pytest.raises(BundleError) as refused:
        read_bundle(path, key.public_key())
    assert str(path) in str(refused.value)
    return refused.value.reason


def verdict(path: Path, data: bytes, original: Bundle) -> str:
    """Reason for which `data` is refused, or "ok": then it holds exactly what was signed."""
    path.write_bytes(data)
    try:
        bundle = read_bundle(path, KEY.public_key())
    except BundleError as error:
        reason = error.reason
    else:
        assert bundle == original
        reason = "ok"
    assert reason in REASONS | {"ok"}
    return reason


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A sound bundle."""
    write_bundle(tmp_path / "tiny.bundle", DRAFT, FILES, KEY)
    return tmp_path / "tiny.bundle"


def test_golden_manifest(bundle: Path, specification) -> None:
    with zipfile.ZipFile(bundle) as archive:
        assert archive.read(MANIFEST) == GOLDEN_MANIFEST.read_bytes()
        assert archive.read(SIGNATURE).hex() == GOLDEN_SIGNATURE
        assert archive.namelist() == [MANIFEST, SIGNATURE, *sorted(FILES)]
    assert model_id(GOLDEN_MANIFEST.read_bytes()).hex() == GOLDEN_MODEL
    (shown,) = specification.blocks(5, "json")
    assert msgspec.json.decode(shown) == msgspec.json.decode(GOLDEN_MANIFEST.read_bytes())


def test_a_law_without_steps_has_the_grid_of_int8() -> None:
    older = GOLDEN_MANIFEST.read_bytes().replace(b',"steps":127', b"")
    read = msgspec.json.decode(older, type=Manifest)
    assert read.release == DRAFT.release
    for steps in (0, 128):
        with pytest.raises(msgspec.ValidationError, match="steps"):
            msgspec.json.decode(
                GOLDEN_MANIFEST.read_bytes().replace(b'"steps":127', f'"steps":{steps}'.encode()), type=Manifest
            )


def test_specification_lists_every_reason(specification) -> None:
    assert specification.reasons(5) == REASONS


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = write_bundle(tmp_path / "a", DRAFT, FILES, KEY)
    read = read_bundle(tmp_path / "a", KEY.public_key())
    assert read == Bundle(msgspec.structs.replace(DRAFT, files=listing(FILES)), model, FILES)
    assert model.hex() == GOLDEN_MODEL
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    backwards = dict(reversed(FILES.items()))
    assert write_bundle(tmp_path / "a", DRAFT, FILES, KEY) == write_bundle(
        tmp_path / "b", DRAFT, backwards, KEY
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_one_changed_byte_of_a_file_gives_another_model_id(tmp_path: Path) -> None:
    ids = {write_bundle(tmp_path / "a", DRAFT, FILES | {"frame.npy": bytes((n,))}, KEY) for n in range(10)}
    assert len(ids) == 10


def test_a_tampered_byte_anywhere(bundle: Path, tmp_path: Path) -> None:
    """It is refused, unless it says nothing, such as a time of change or the bits that pad a stream."""
    whole, original = bundle.read_bytes(), read_bundle(bundle, KEY.public_key())
    seen = set()
    for offset in range(len(whole)):
        mutated = bytearray(whole)
        mutated[offset] ^= (0x01, 0x80, 0xFF)[offset % 3]
        seen.add(verdict(tmp_path / "tampered", bytes(mutated), original))
    assert {"ok", "unreadable", "unsigned", "extra_file", "oversize"} <= seen


def test_every_truncation(bundle: Path, tmp_path: Path) -> None:
    whole = bundle.read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert refusal(tmp_path / "cut") == "unreadable"


def test_a_missing_path_or_a_folder_is_unreadable(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing") == "unreadable"
    assert refusal(tmp_path) == "unreadable"


def test_the_key_of_somebody_else(bundle: Path) -> None:
    assert refusal(bundle, STRANGER) == "bad_signature"


FILED = msgspec.structs.replace(DRAFT, files=listing(FILES))
WHOLE = [*signed(FILED), *FILES.items()]


def forged(name: str, data: bytes) -> list[Entry]:
    """A whole bundle, one entry of which holds something else."""
    return [(entry, data if entry == name else good) for entry, good in WHOLE]


@pytest.mark.parametrize(
    ("reason", "entries"),
    [
        ("unsigned", []),
        ("unsigned", WHOLE[1:]),
        ("unsigned", [WHOLE[0], *WHOLE[2:]]),
        ("unsigned", [("Manifest.json", WHOLE[0][1]), *WHOLE[1:]]),
        ("bad_signature", [*signed(FILED, STRANGER), *FILES.items()]),
        ("bad_signature", forged(MANIFEST, WHOLE[0][1] + b" ")),
        ("bad_signature", forged(SIGNATURE, bytes(64))),
        ("bad_manifest", forged(SIGNATURE, b"")),
        ("bad_manifest", forged(SIGNATURE, WHOLE[1][1] + b"\0")),
        ("bad_manifest", [*signed(WHOLE[0][1] + b" " * (1 << 20)), *FILES.items()]),
        ("bad_manifest", [*signed(b"{}"), *FILES.items()]),
        ("bad_manifest", [*signed(b"format: 1"), *FILES.items()]),
        ("bad_manifest", [*signed(WHOLE[0][1].replace(b'"int8"', b'"int4"')), *FILES.items()]),
        ("bad_format", [*signed(msgspec.structs.replace(FILED, format=2)), *FILES.items()]),
        ("missing_file", WHOLE[:-1]),
        ("extra_file", [*WHOLE, ("more.onnx", b"")]),
        ("extra_file", [*WHOLE, ("folder/", b"")]),
        ("extra_file", [*WHOLE, *((str(number), b"") for number in range(MAX_FILES))]),
        ("oversize", forged("frame.npy", b"longer than what was signed" * 9)),
        ("oversize", forged("frame.npy", b"")),
        ("bad_hash", forged("frame.npy", bytes(64))),
    ],
)
def test_every_rule_has_its_reason(reason: str, entries: list[Entry], tmp_path: Path) -> None:
    assert refusal(pack(tmp_path / "forged", entries)) == reason


def test_the_forged_bundles_differ_from_a_sound_one_only_in_what_they_forge(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        assert read_bundle(pack(tmp_path / "sound", WHOLE, method), KEY.public_key()).files == FILES


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's own warning while the test writes it
@pytest.mark.parametrize("name", [MANIFEST, SIGNATURE, "client.onnx"])
def test_a_repeated_name(name: str, tmp_path: Path) -> None:
    assert refusal(pack(tmp_path / "twice", [*WHOLE, (name, dict(WHOLE)[name])])) == "extra_file"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_only_stored_or_deflated_files(method: int, tmp_path: Path) -> None:
    assert refusal(pack(tmp_path / "packed", WHOLE, method)) == "unreadable"


def measured_refusal(path: Path) -> tuple[str, int]:
    """Why a bundle is refused, and the most bytes that this took."""
    tracemalloc.start()
    try:
        return refusal(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", [MANIFEST, "client.onnx"])
@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_bomb_is_not_unpacked_beyond_what_it_declares(name: str, method: int, tmp_path: Path) -> None:
    bomb = bytes(32 << 20)
    with zipfile.ZipFile(tmp_path / "bomb", "w", method) as archive:
        for entry, data in forged(name, bomb):
            archive.writestr(entry, data)
        lie = archive.getinfo(name)  # the directory, written last, repeats this lie
        lie.file_size = len(dict(WHOLE)[name])
        lie.CRC = zlib.crc32(bomb[: lie.file_size])
    reason, peak_bytes = measured_refusal(tmp_path / "bomb")
    deflated = {MANIFEST: "bad_signature", "client.onnx": "bad_hash"}[name]
    assert reason == (deflated if method == zipfile.ZIP_DEFLATED else "unreadable")
    assert peak_bytes < 4 << 20


def crowd(entries: int, comment: bytes = b"", *, counted: int = 1, zip64: bool = False) -> bytes:
    """A zip that is a directory of `entries` and the records at its end, which say that there are `counted`."""
    rest = (20, 0, 20, 0, 0, 0, 0, 33, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0)
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", *rest)
    made = b"".join(entry + f"{number:04x}".encode() for number in range(entries))
    size, start = len(made), 0
    if zip64:
        made += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, counted, counted, size, start)
        made += struct.pack("<4sLQL", b"PK\6\7", 0, size, 1)
        size = start = 0xFFFFFFFF
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, counted, counted, size, start, len(comment))
    return made + end + comment


@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("counted", [1, 60_000])
@pytest.mark.parametrize("comment", [b"", b"\0\0", b"c" * 20 + b"\0\0", b"c" * 0xFFFF], ids=len)
def test_a_large_directory_is_not_read(zip64: bool, counted: int, comment: bytes, tmp_path: Path) -> None:
    (tmp_path / "crowd").write_bytes(crowd(60_000, comment, counted=counted, zip64=zip64))
    reason, peak_bytes = measured_refusal(tmp_path / "crowd")
    assert reason == ("unreadable" if zip64 else "extra_file")
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize("spare", [0, 1])
def test_the_limit_of_the_directory(spare: int, tmp_path: Path) -> None:
    (tmp_path / "crowd").write_bytes(crowd(MAX_DIRECTORY_BYTES // 50 + spare))
    with pytest.raises(BundleError, match="its directory has" if spare else "holds over 64 files") as refused:
        read_bundle(tmp_path / "crowd", KEY.public_key())
    assert refused.value.reason == "extra_file"


@pytest.mark.parametrize("length", [1, 0xFFFF])
def test_a_comment_behind_the_directory_means_nothing(bundle: Path, length: int) -> None:
    with zipfile.ZipFile(bundle, "a") as archive:
        archive.comment = b"c" * length
    assert read_bundle(bundle, KEY.public_key()).files == FILES


def test_a_signed_size_beyond_the_limit(tmp_path: Path) -> None:
    huge = FileEntry("0" * 64, MAX_FILE_BYTES + 1)
    with zipfile.ZipFile(tmp_path / "huge", "w") as archive:
        manifest = msgspec.structs.replace(FILED, files={**FILED.files, "frame.npy": huge})
        for entry, data in [*signed(manifest), *FILES.items()]:
            archive.writestr(entry, data)
        archive.getinfo("frame.npy").file_size = huge.size
    assert refusal(tmp_path / "huge") == "oversize"


def test_what_no_reader_takes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(FILES, key=lambda name: len(FILES[name]))
    monkeypatch.setattr("splitward.wire.bundle.MAX_FILE_BYTES", len(FILES[largest]) - 1)
    with pytest.raises(BundleError, match=f"{largest} has {len(FILES[largest])} bytes") as refused:
        write_bundle(tmp_path / "large", FILED, FILES, KEY)
    assert refused.value.reason == "oversize"
    assert not list(tmp_path.iterdir())


def test_unknown_keys_of_a_manifest_are_for_later_versions(tmp_path: Path) -> None:
    later = WHOLE[0][1].replace(b'{"format":1', b'{"later":[1],"format":1')
    read = read_bundle(pack(tmp_path / "later", [*signed(later), *FILES.items()]), KEY.public_key())
    assert read.manifest == FILED
    assert read.model == model_id(later)


def test_a_new_signing_key(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "signing.key"
    key = create_signing_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_signing_key(path).private_bytes_raw() == key.private_bytes_raw()
    assert read_trusted_key(public_key_path(path)) == key.public_key()
    with pytest.raises(FileExistsError):
        create_signing_key(path)


def test_keys_that_are_none(tmp_path: Path) -> None:
    curve = generate_private_key(SECP256R1())
    (tmp_path / "curve").write_bytes(
        curve.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (tmp_path / "curve.pub").write_bytes(
        curve.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    (tmp_path / "text").write_text("not a key")
    for name in ("curve", "curve.pub", "text", "nothing"):
        for read in (read_signing_key, read_trusted_key):
            said = "is not there" if name == "nothing" else "is not a"
            with pytest.raises(ConfigError, match=f"{tmp_path / name}: {said}"):
                read(tmp_path / name)


def test_a_bundle_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"^{tmp_path / 'nothing'}: is not there") as refused:
        read_bundle(tmp_path / "nothing", KEY.public_key())
    assert refused.value.reason == "unreadable"
