"""Answered frames as JSON lines. The log of a device, for people, fleets and tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from edge.delivery import Answer

log = logging.getLogger(__name__)


class ResultsFile:
    """Appends to the file at `path`; what is there stays.

    A line holds `name`, the fields of the reply (`type` is `result` or `refusal`), `latency_ms` and
    `payload_bytes`. After a crash a frame may have two lines, alike but for the latency. What a full disk does not
    take is missing: the file is for reading, and no frame's fate hangs on it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)  # one write for a line: a killed agent leaves whole lines
        self._cut = False

    def write(self, answer: Answer) -> None:
        """Append one line."""
        line = {
            "name": answer.name,
            **msgspec.to_builtins(answer.reply),
            "latency_ms": round(answer.latency_ms, 3),
            "payload_bytes": answer.payload_bytes,
        }
        data = (b"\n" if self._cut else b"") + msgspec.json.encode(line) + b"\n"
        try:
            self._cut = self._file.write(data) != len(data)
        except OSError as error:
            if not self._cut:
                log.error("the results file takes no more lines: %s", error.strerror)
            self._cut = True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a results file, as dictionaries; none when there is no file."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"}\n"):  # else its writer is still at it, or lost power or space
                with suppress(msgspec.DecodeError):
                    yield msgspec.json.decode(line)
