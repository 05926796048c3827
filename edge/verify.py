"""A signature checked in a process of its own: `cryptography` takes 8 MB, for one check at each start.

Started as `python -m edge.verify KEY`, with signature and text on standard input.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from splitward.errors import ConfigError
from splitward.wire.bundle import SignatureCheck

SIGNATURE_BYTES = 64
ACCEPTED, REFUSED = 0, 10


class TrustedKey(SignatureCheck):
    """The public key at `path`, which only the other process reads."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def accepts(self, signature: bytes, text: bytes) -> bool:
        """Whether `signature` is the key's over `text`; `ConfigError` when the file holds no such key."""
        done = subprocess.run(
            [sys.executable, "-m", "edge.verify", str(self._path)],
            input=signature + text,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode not in (ACCEPTED, REFUSED):
            raise ConfigError(
                done.stderr.decode(errors="replace").strip() or "the signature cannot be checked."
            )
        return done.returncode == ACCEPTED


def main(arguments: list[str]) -> int:
    """Check; the exit code is `ACCEPTED` or `REFUSED`, or 2 when the key cannot be read."""
    from cryptography.exceptions import InvalidSignature

    from splitward.wire.bundle import read_trusted_key

    data = sys.stdin.buffer.read()
    try:
        read_trusted_key(Path(arguments[0])).verify(data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:])
    except InvalidSignature:
        return REFUSED
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return ACCEPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
