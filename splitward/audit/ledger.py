"""The ledger of finished cells, which makes an audit resumable: JSON lines, only ever appended to.

The first line holds the settings that all cells share; each further one a cell's key and its result. A process
killed while it writes leaves a last line without its end: that cell is dropped and done again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from splitward.errors import AuditError


class Ledger:
    """Finished cells in the file `path`, made where it is missing.

    Parameters
    ----------
    settings : dict
        What every cell depends on and no key names (fingerprints of weights and data, sizes, versions).

    Raises
    ------
    AuditError
        The file was written under other settings, or is damaged other than in its last line.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self._results: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._whole_lines()
        if not lines:
            self._write({"settings": settings})
            return
        self._check(lines[0]["settings"], json.loads(json.dumps(settings)))
        for line in lines[1:]:
            self._results[_text(line["key"])] = line["result"]

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """Result of the cell, the last one where it was done twice; None where it is not done."""
        return self._results.get(_text(key))

    def append(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        """Record a finished cell; it is on the disk when this returns."""
        self._write({"key": key, "result": result})
        self._results[_text(key)] = result

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole_lines(self) -> list[dict[str, Any]]:
        """All lines; what follows the last end of a line is cut off the file."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return [self._read(number, text) for number, text in enumerate(whole.splitlines(), 1)]

    def _read(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            line: dict[str, Any] = json.loads(text)
            needed = {"settings"} if number == 1 else {"key", "result"}
            if not needed <= set(line):
                raise ValueError(f"lacks {', '.join(sorted(needed - set(line)))}")
        except (ValueError, TypeError) as error:
            raise AuditError(
                f"{self.path}, line {number}: is damaged ({error}). Delete the line to do that cell again, or "
                "the file to do all."
            ) from error
        return line

    def _check(self, known: dict[str, Any], settings: dict[str, Any]) -> None:
        if known == settings:
            return
        other = [
            f"{name} {known.get(name)!r} there, {settings.get(name)!r} now"
            for name in sorted(known.keys() | settings.keys())
            if known.get(name) != settings.get(name)
        ]
        raise AuditError(
            f"{self.path}: holds cells of another audit ({'; '.join(other)}). Give another --out, or delete "
            "the file."
        )


def _text(key: dict[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
