"""What can be saved of a damaged spool.

First row by row through SQLite, going round the pages that it cannot read. Where SQLite cannot even open the file,
the raw bytes are searched: a message starts with a magic, says how long it is and ends with a checksum. Frames that
had been answered already may come back that way; the cloud answers them once more, from its store.
"""

from __future__ import annotations

import sqlite3
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

MAGIC = b"SWRD"
MAX_MISSES = 20_000
"""Rows in a row that are not there, or on a page that cannot be read, before the search ends."""
_HEADER = struct.Struct("<4sBBHBBBB16sQQ16sfiI")  # docs/wire.md, section 1
_COLUMNS = "id, boot, sequence, name, captured_at_ns, captured_tick_ns, priority, spooled_ns, message"
SavedRow = tuple[int, bytes, int, str, int, int, int, int, bytes]


@dataclass
class Salvage:
    """What was saved: rows as the table has them, digests of captured frames, counts of dropped ones, and strikes."""

    rows: list[SavedRow] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)


def salvage(path: Path) -> Salvage:
    """Save what can be saved of the spool at `path`, its write-ahead log included; the files stay as they are."""
    saved = Salvage()
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        saved.rows = [row for row in _readable_rows(database) if is_whole(row[-1])]
        for table, into in (("captured", saved.digests), ("dropped", saved.dropped), ("strike", saved.strikes)):
            with suppress(sqlite3.Error):
                for key, value in database.execute(f"SELECT * FROM {table}"):  # noqa: S608  # constants
                    if isinstance(into, dict):
                        into[key] = value
                    else:
                        into.append(value)
    if not saved.rows:
        found = {
            message[12:36]: message for message in _carve(path)
        }  # once for each boot id and sequence number
        saved.rows = [_row_of(number, message) for number, message in enumerate(found.values(), 1)]
    return saved


def is_whole(message: bytes) -> bool:
    """Whether `message` carries its own checksum."""
    return (
        isinstance(message, bytes)
        and message[:4] == MAGIC
        and zlib.crc32(message[:-4]) == int.from_bytes(message[-4:], "little")
    )


def _readable_rows(database: sqlite3.Connection) -> Iterator[SavedRow]:
    """Rows up to the first damage, down to the last, and one by one in between."""
    query = f"SELECT {_COLUMNS} FROM frame WHERE id "  # noqa: S608  # constants of this module
    low, high = 0, 0
    try:
        for row in database.execute(query + "> 0 ORDER BY id"):
            low = row[0]
            yield row
        return
    except sqlite3.DatabaseError:
        pass  # the damage; what lies behind it is read from the end
    with suppress(sqlite3.DatabaseError):
        for row in database.execute(query + "> ? ORDER BY id DESC", (low,)):
            high = row[0]
            yield row
    if not low and not high:
        return  # the schema is gone, or both ends are: the bytes tell more
    misses = 0
    for number in range(low + 1, high or sys.maxsize):
        found = []
        with suppress(sqlite3.DatabaseError):
            found = database.execute(query + "= ?", (number,)).fetchall()
        yield from found
        misses = 0 if found else misses + 1
        if misses > MAX_MISSES:
            return


def _carve(path: Path) -> Iterator[bytes]:
    for file in (path, path.with_name(path.name + "-wal")):
        data = file.read_bytes() if file.exists() else b""
        at = data.find(MAGIC)
        while at >= 0:
            if at + _HEADER.size <= len(data):
                fields = _HEADER.unpack_from(data, at)
                message = data[at : at + fields[3] + fields[-1] + 4]
                if len(message) > _HEADER.size and is_whole(message):
                    yield message
            at = data.find(MAGIC, at + 1)


def _row_of(number: int, message: bytes) -> SavedRow:
    fields = _HEADER.unpack_from(message)
    boot, sequence, captured_at_ns = fields[8:11]
    return (number, boot, sequence, f"salvaged-{number}", captured_at_ns, 0, 0, 0, message)
