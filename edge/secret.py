"""The device's secret: 32 random bytes that key the noise of every release and never leave the device."""

from __future__ import annotations

import resource
import secrets
from pathlib import Path

from splitward.disk import make_folder, write_whole
from splitward.errors import ConfigError
from splitward.wire.law import SECRET_BYTES


def leave_no_core() -> None:
    """Keep this process and its children from writing their memory to the disk when they crash: it holds secrets."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))


def load_secret(path: Path) -> bytes:
    """Secret at `path`, created with mode 0600 when there is none.

    Raises
    ------
    ConfigError
        The file cannot be read or written, has another length, or others may read it.
    """
    try:
        if not path.exists():
            _create(path)
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others may read the device's secret. Run `chmod 600 {path}`.")
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. The agent keeps the device's secret there.") from error
    if len(secret) != SECRET_BYTES:
        raise ConfigError(f"{path}: holds {len(secret)} bytes, not {SECRET_BYTES}. Remove it for a new secret.")
    return secret


def _create(path: Path) -> None:
    make_folder(path.parent, 0o700)
    write_whole(
        path, secrets.token_bytes(SECRET_BYTES)
    )  # one that a power cut empties would stop the device for good
