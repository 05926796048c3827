"""Is an image what was built? Its checksum, and the signature of the checksum."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature

from splitward.errors import ImageError
from splitward.wire.bundle import read_signing_key, read_trusted_key


def sign_checksum(path: Path, key: Path) -> None:
    """Write `path`.sha256, as `sha256sum --check` reads it, and its Ed25519 signature `path`.sha256.sig."""
    text = f"{_digest(path)}  {path.name}\n".encode()
    path.with_name(path.name + ".sha256").write_bytes(text)
    path.with_name(path.name + ".sha256.sig").write_bytes(read_signing_key(key).sign(text))


def verify_image(path: Path, public_key: Path) -> None:
    """Pass over an image that is whole and signed; `ImageError` says what is wrong with any other."""
    checksum = path.with_name(path.name + ".sha256")
    try:
        text = checksum.read_bytes()
        signature = checksum.with_name(checksum.name + ".sig").read_bytes()
        digest = _digest(path)
    except OSError as error:
        raise ImageError(f"{error.filename}: {error.strerror}. Keep the three files together.") from error
    try:
        read_trusted_key(public_key).verify(signature, text)
    except InvalidSignature:
        raise ImageError(f"{checksum}: is not signed by {public_key}. Do not flash {path.name}.") from None
    if text.decode(errors="replace").split() != [digest, path.name]:
        raise ImageError(f"{path}: differs from its checksum. Fetch it again.")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
