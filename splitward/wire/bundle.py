"""The bundle: a signed zip with everything that a device needs to run one model. See docs/wire.md, section 5.

`manifest.json` lists every file with its SHA-256 and size, and `manifest.sig` is an Ed25519 signature over its
bytes, so the SHA-256 of the manifest names the whole bundle: the model id is its first 16 bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import msgspec

from splitward.disk import write_whole
from splitward.errors import BundleError, ConfigError
from splitward.wire.law import ReleaseLaw
from splitward.wire.names import Backend as Backend
from splitward.wire.names import Precision as Precision

if TYPE_CHECKING:  # it is large: a device keeps it out of the processes that stay
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

FORMAT = 1
MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
MAX_FILE_BYTES = 256 << 20
MAX_FILES = 64
MAX_DIRECTORY_BYTES = 64 << 10
"""Of the zip's directory: a KiB for each file."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_DAMAGE = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What `zipfile` raises on bytes that are no whole zip."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""`zipfile` unpacks the others without minding the declared size: 500 bytes of bzip2 take 300 MiB."""
_END = struct.Struct("<4s8xL6x")
"""The record at a zip's end: its magic, and the size of the directory."""
_END_MAGIC, _LOCATOR_MAGIC = b"PK\5\6", b"PK\6\7"
_LOCATOR_BYTES = 20
"""Of what stands before the end record where a ZIP64 record has the true sizes."""


class InputSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """The frame that the model takes: float32 [channels, height, width], 0 black to 1 white.

    Attributes
    ----------
    region : tuple of float or None
        Part of the captured image that is used: top, left, bottom, right in parts of its sides, 0 to 1.
    fit : "stretch", "crop" or "pad"
        What becomes of another aspect than the model's.
    window : tuple of float or None
        Values, in parts of full scale (65535 of 16 bits, 255 of 8), that become 0 and 1; what lies beyond is cut off.
    """

    channels: int
    height: int
    width: int
    region: tuple[float, float, float, float] | None = None
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Refuse what no image could be fitted to; decoding turns this into a refused manifest."""
        if self.region is not None:
            top, left, bottom, right = self.region
            if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
                raise ValueError("region must be top, left, bottom, right with 0 <= top < bottom <= 1")
        if self.window is not None and not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError("window must be low, high with 0 <= low < high <= 1")


@runtime_checkable
class SignatureCheck(Protocol):
    """What can stand in for a public key: it says whether a signature is the trusted key's."""

    def accepts(self, signature: bytes, text: bytes) -> bool:
        """Whether `signature` is the trusted key's over `text`."""
        ...


class FileEntry(msgspec.Struct, frozen=True):
    """One file of the bundle."""

    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True):
    """What `manifest.json` holds.

    Attributes
    ----------
    client : dict
        File of the client half by `"{backend}-{precision}"`, such as `"onnx-int8"`.
    saliency : dict
        File of the saliency graph by backend, float32 only; empty when the profile has no map.
    golden : tuple of str
        Files of one input frame (.npy, float32 [C,H,W]) and of its activation by the float32 client half.
    defence : dict
        Profile name and its settings, for people and reports; the device obeys `release`.
    certificate : dict or None
        Lower bounds on an attacker's reconstruction error with their assumptions.
    """

    format: int
    name: str
    created_at: str
    task: str
    classes: tuple[str, ...]
    input: InputSpec
    release: ReleaseLaw
    client: dict[str, str]
    saliency: dict[str, str]
    golden: tuple[str, str]
    defence: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, Any]
    files: dict[str, FileEntry]
    certificate: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle in memory."""

    manifest: Manifest
    model: bytes
    """Model id, 16 bytes."""
    files: dict[str, bytes]


def model_id(manifest_bytes: bytes) -> bytes:
    """First 16 bytes of the SHA-256 of the manifest's bytes."""
    return hashlib.sha256(manifest_bytes).digest()[:16]


def write_bundle(path: Path, manifest: Manifest, files: dict[str, bytes], key: Ed25519PrivateKey) -> bytes:
    """Write the signed bundle atomically and return its model id. The same inputs give the same bytes.

    Raises
    ------
    BundleError
        `oversize`: a file is larger than any reader takes. Then nothing is written.
    """
    for name, data in files.items():
        if len(data) > MAX_FILE_BYTES:
            raise BundleError(
                "oversize",
                f"{path}: {name} has {len(data)} bytes, and a device takes {MAX_FILE_BYTES} of a file. Make the client "
                "half smaller.",
            )
    entries = {name: FileEntry(hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()}
    text = msgspec.json.encode(msgspec.structs.replace(manifest, files=entries), order="deterministic")
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [(MANIFEST, text), (SIGNATURE, key.sign(text)), *sorted(files.items())]:
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)
    partial.replace(path)
    return model_id(text)


def read_bundle(path: Path, trusted: Ed25519PublicKey | SignatureCheck) -> Bundle:
    """Read and verify the bundle at `path`.

    Raises
    ------
    BundleError
        With `.reason`: `unreadable`, `unsigned`, `bad_signature`, `bad_manifest`, `bad_format`, `missing_file`,
        `extra_file`, `oversize` or `bad_hash`.
    """
    try:
        with path.open("rb") as file:
            _check_directory(file, path)
            with zipfile.ZipFile(file) as archive:
                return _read(archive, path, trusted)
    except FileNotFoundError as error:
        raise BundleError(
            "unreadable", f"{path}: is not there. Put the bundle there, or correct the path."
        ) from error
    except _DAMAGE as error:
        raise BundleError("unreadable", f"{path}: is not a whole bundle: {error}. Fetch it again.") from error


def _check_directory(file: IO[bytes], path: Path) -> None:
    """Refuse a large directory before `zipfile` reads it, and makes an object of each entry: 65 MB of them take 600.

    How much it reads is what the end record says of the size, not of the count. The record is searched for as there.
    """
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _LOCATOR_BYTES - _END.size - (1 << 16)))
    tail = file.read()
    at = len(tail) - _END.size
    if tail[-_END.size :][:4] != _END_MAGIC or tail[-2:] != b"\0\0":  # a comment follows the record
        at = tail.rfind(_END_MAGIC)
    if not 0 <= at <= len(tail) - _END.size:
        raise BundleError("unreadable", f"{path}: is not a whole bundle: it has no end. Fetch it again.")
    if tail[at - _LOCATOR_BYTES : at][:4] == _LOCATOR_MAGIC:
        raise BundleError("unreadable", f"{path}: is a ZIP64; take a bundle made by `splitward export`.")
    _, size = _END.unpack_from(tail, at)
    if size > MAX_DIRECTORY_BYTES:
        raise BundleError(
            "extra_file",
            f"{path}: its directory has {size} bytes, too many for {MAX_FILES} files; "
            "take a bundle made by `splitward export`.",
        )


def _read(archive: zipfile.ZipFile, path: Path, trusted: Ed25519PublicKey | SignatureCheck) -> Bundle:
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    if len(sizes) != len(archive.infolist()) or len(sizes) > MAX_FILES:
        raise BundleError("extra_file", f"{path}: repeats a name or holds over {MAX_FILES} files.")
    if any(entry.compress_type not in _METHODS for entry in archive.infolist()):
        raise BundleError("unreadable", f"{path}: is packed otherwise than stored or deflated. Fetch it again.")
    for name in (MANIFEST, SIGNATURE):
        if name not in sizes:
            raise BundleError("unsigned", f"{path}: has no {name}; take a bundle made by `splitward export`.")
    if sizes[MANIFEST] > 1 << 20 or sizes[SIGNATURE] != 64:
        raise BundleError("bad_manifest", f"{path}: manifest or signature has an impossible size.")
    text = _unpack(archive, MANIFEST, sizes[MANIFEST])
    if not _is_signed(trusted, _unpack(archive, SIGNATURE, sizes[SIGNATURE]), text):
        raise BundleError(
            "bad_signature",
            f"{path}: the signature is not by the trusted key. Check `trusted_key`, or who made this bundle.",
        )
    try:
        manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BundleError("bad_manifest", f"{path}: manifest: {error}.") from error
    if manifest.format != FORMAT:
        raise BundleError("bad_format", f"{path}: format {manifest.format}; this version reads {FORMAT}.")
    extra = set(sizes) - set(manifest.files) - {MANIFEST, SIGNATURE}
    if extra:
        raise BundleError("extra_file", f"{path}: holds {sorted(extra)}, which the manifest does not list.")
    return Bundle(
        manifest,
        model_id(text),
        {name: _read_file(archive, path, name, sizes, manifest) for name in manifest.files},
    )


def _is_signed(trusted: Ed25519PublicKey | SignatureCheck, signature: bytes, text: bytes) -> bool:
    if isinstance(trusted, SignatureCheck):
        return trusted.accepts(signature, text)
    from cryptography.exceptions import InvalidSignature

    try:
        trusted.verify(signature, text)
    except InvalidSignature:
        return False
    return True


def _read_file(
    archive: zipfile.ZipFile, path: Path, name: str, sizes: dict[str, int], manifest: Manifest
) -> bytes:
    entry = manifest.files[name]
    if name not in sizes:
        raise BundleError("missing_file", f"{path}: {name} is listed but not there. Fetch the bundle again.")
    if sizes[name] != entry.size or entry.size > MAX_FILE_BYTES:
        raise BundleError(
            "oversize", f"{path}: {name} declares {sizes[name]} bytes, the manifest {entry.size}."
        )
    data = _unpack(archive, name, entry.size)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BundleError("bad_hash", f"{path}: {name} differs from what was signed. Fetch the bundle again.")
    return data


def _unpack(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    """The first `size` bytes of a file. `archive.read` would unpack the whole of a bomb, and then cut it."""
    with archive.open(name) as file:
        return file.read(size)


def create_signing_key(path: Path) -> Ed25519PrivateKey:
    """Create a signing key at `path` (PEM, mode 0600) and its public key at `path` + `.pub`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    write_whole(public_key_path(path), public, 0o644)
    write_whole(path, pem)  # the last: where it is, all is
    return key


def public_key_path(path: Path) -> Path:
    """Where the public half of the signing key at `path` lies."""
    return path.with_name(path.name + ".pub")


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Signing key at `path`; `ConfigError` when it is not an Ed25519 private key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: is not there. Correct the path, or make a key with `splitward keygen`."
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: is not a signing key: {error}. Make one with `splitward keygen`."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: is not an Ed25519 key. Make one with `splitward keygen`.")
    return key


def read_trusted_key(path: Path) -> Ed25519PublicKey:
    """Public key at `path`; `ConfigError` when it is not an Ed25519 public key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: is not there. Correct the path: `trusted_key` is the .pub file beside the signing key."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: is not a public key: {error}. `trusted_key` is the .pub file beside the signing key."
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path}: is not an Ed25519 public key.")
    return key
