"""What waits for a result, in SQLite: one row per frame, kept until its result arrives.

Messages are stored as they are published, boot id and sequence number inside, so that what an earlier start of
the agent left behind is sent again under its own name. One thread uses a spool.

The default is a write-ahead log with `synchronous = FULL`: what is committed survives a power cut, which a
device at a bedside meets more often than a crash. The cost is one flush per commit, and so one commit takes
all frames and results that came meanwhile (delivery.py). `EXCLUSIVE` locking keeps a second agent out.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge.config import SpoolConfig
from edge.errors import SpoolError

SCHEMA_VERSION = 1
REMEMBERED = 200_000
"""Frames whose digests are kept, so that a restart does not capture them again."""
_SCHEMA = """
CREATE TABLE frame (
    id INTEGER PRIMARY KEY,
    boot BLOB NOT NULL,
    sequence INTEGER NOT NULL,
    name TEXT NOT NULL,
    captured_at_ns INTEGER NOT NULL,
    captured_tick_ns INTEGER NOT NULL,
    message BLOB NOT NULL,
    UNIQUE (boot, sequence)
);
CREATE TABLE captured (id INTEGER PRIMARY KEY, digest INTEGER NOT NULL);
CREATE TABLE dropped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
"""
_COLUMNS = "id, boot, sequence, name, captured_at_ns, captured_tick_ns, message"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One spooled frame; `row` is its place in the queue, 0 until it has one."""

    row: int
    boot: bytes
    sequence: int
    name: str
    captured_at_ns: int
    captured_tick_ns: int
    message: bytes = field(repr=False)


class Spool:
    """The spool at `path`.

    Attributes
    ----------
    rows, stored_bytes : int
        Frames that wait, and the bytes of their messages.
    known : frozenset of int
        Digests of the frames captured before this start.
    dropped : dict
        Frames lost by reason, over all starts.

    Raises
    ------
    SpoolError
        The file cannot be opened or written, another agent holds it, or a newer version wrote it. A damaged
        file is none of these: it is moved aside, counted (`spool_damaged`) and replaced.
    """

    def __init__(self, path: Path, config: SpoolConfig) -> None:
        self._path = path
        self._config = config
        damaged = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                self._database = self._open()
            except sqlite3.OperationalError:
                raise  # locked, full, or not permitted: the file itself may be sound
            except sqlite3.DatabaseError as error:
                self._move_aside(error)
                damaged = True
                self._database = self._open()
            self._load()
        except (sqlite3.Error, OSError) as error:
            raise SpoolError(
                f"{path}: {error}. The agent must be able to write there, and no other agent may use it."
            ) from error
        if damaged:
            with self.transaction():
                self.drop("spool_damaged")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything within is on the disk when it ends, or nothing is (`SpoolError`)."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise SpoolError(f"{self._path}: {error}. Free space on the disk, or replace it.") from error

    def add(self, entry: Entry, digest: int | None) -> None:
        """Append a frame, or count it when the spool is full and drops the newest."""
        if digest is not None:
            self._database.execute("INSERT INTO captured (digest) VALUES (?)", (digest,))
        if self._config.drop == "newest" and self.stored_bytes + len(entry.message) > self._config.max_bytes:
            self.drop("spool_full")
            return
        self._last_row += 1  # ours, as SQLite gives a removed row's number again
        self._database.execute(
            f"INSERT INTO frame ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608  # a constant
            (
                *(self._last_row, entry.boot, entry.sequence, entry.name),
                *(entry.captured_at_ns, entry.captured_tick_ns, entry.message),
            ),
        )
        self.rows += 1
        self.stored_bytes += len(entry.message)
        while self.stored_bytes > self._config.max_bytes:
            self._remove("id = (SELECT min(id) FROM frame)", ())
            self.drop("spool_full")

    def remove(self, boot: bytes, sequence: int) -> Entry | None:
        """Remove an answered frame and return it; None when it is not, or no longer, there."""
        removed = self._remove("boot = ? AND sequence = ?", (boot, sequence))
        return removed[0] if removed else None

    def expire(self, now_ns: int) -> None:
        """Remove and count the frames that are older than the limit at `now_ns`, UTC."""
        oldest_ns = now_ns - int(self._config.max_age_s * 1e9)
        expired = self._remove("captured_at_ns < ?", (oldest_ns,))
        if expired:
            self.drop("expired", len(expired))

    def drop(self, reason: str, count: int = 1) -> None:
        """Count `count` frames as lost for `reason`."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        self._database.execute(
            "INSERT INTO dropped VALUES (?, ?) ON CONFLICT (reason) DO UPDATE SET count = excluded.count",
            (reason, self.dropped[reason]),
        )

    def get(self, row: int) -> Entry | None:
        """Frame at `row`, or None."""
        return self._first("id = ?", row)

    def first_after(self, row: int) -> Entry | None:
        """First frame behind `row`, or None."""
        return self._first("id > ? ORDER BY id LIMIT 1", row)

    def close(self) -> None:
        """Close the file; everything that was committed is in it."""
        self._database.close()

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite would let others read it
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"PRAGMA synchronous = {self._config.synchronous.upper()}")
            (verdict,) = database.execute("PRAGMA integrity_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                database.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
            elif version != SCHEMA_VERSION:
                raise SpoolError(
                    f"{self._path}: has version {version}, not {SCHEMA_VERSION}. Use the agent that wrote it."
                )
        except BaseException:
            database.close()
            raise
        return database

    def _load(self) -> None:
        one = self._database.execute
        totals: tuple[int, int, int] = one(
            "SELECT coalesce(max(id), 0), count(*), coalesce(sum(length(message)), 0) FROM frame"
        ).fetchone()
        self._last_row, self.rows, self.stored_bytes = totals
        one("DELETE FROM captured WHERE id <= (SELECT max(id) FROM captured) - ?", (REMEMBERED,))
        self.known = frozenset(digest for (digest,) in one("SELECT digest FROM captured"))
        self.dropped: dict[str, int] = dict(one("SELECT reason, count FROM dropped").fetchall())

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self._path.with_name(f"{self._path.name}.damaged-{time.time_ns()}")
        log.error("%s: is damaged (%s); kept as %s, its frames are not sent", self._path, error, aside.name)
        self._path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)

    def _first(self, condition: str, row: int) -> Entry | None:
        query = f"SELECT {_COLUMNS} FROM frame WHERE {condition}"  # noqa: S608  # constants of this module
        found = self._database.execute(query, (row,)).fetchone()
        return None if found is None else Entry(*found)

    def _remove(self, condition: str, values: tuple[bytes | int, ...]) -> list[Entry]:
        query = f"DELETE FROM frame WHERE {condition} RETURNING {_COLUMNS}"  # noqa: S608  # constants of this module
        removed = [Entry(*row) for row in self._database.execute(query, values).fetchall()]
        self.rows -= len(removed)
        self.stored_bytes -= sum(len(entry.message) for entry in removed)
        return removed
