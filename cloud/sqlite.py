"""The commit that every batch needs, straight to SQLite on a thread of its own.

SQLAlchemy and aiosqlite cost several times what SQLite itself does. Everything that is asked for rarely goes
through them; what is done with every batch goes here. The file and the tables are the same.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import msgspec

from cloud.metrics import CpuClock
from cloud.record import Key, Record
from splitward.wire.control import Result

BUSY_TIMEOUT_MS = 5000
MAX_LOG_PAGES = 8000
"""Of the write-ahead log, before a commit of results copies it into the tables. SQLite's own 1000 make
one batch in fifty wait for it; meanwhile the connections for all else, which commit every second, copy nearly all."""
_COLUMNS = (
    "device, boot, sequence, site, model, class_index, class_name, scores, streams, captured_at_ns, "
    "received_at_ns, stored_at_ns, checksum"
)
_PLACES = f"({', '.join('?' * len(_COLUMNS.split(',')))})"
_SELECT = f"SELECT {_COLUMNS} FROM results WHERE device = ? AND boot = ? AND sequence = ?"  # noqa: S608  # constants
_encode = msgspec.json.Encoder().encode
_scores = msgspec.json.Decoder(tuple[float, ...])
_streams = msgspec.json.Decoder(dict[str, int])


class SqliteResults:
    """Adds results; one connection, used by one thread."""

    def __init__(self, path: str, clock: CpuClock) -> None:
        self._path = path
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None

    async def add(self, records: Sequence[Record]) -> dict[Key, Record]:
        """Commit `records`; those that are there already keep their first record, and are returned.

        Raises
        ------
        sqlite3.Error
            The database fails.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed_add, records)

    async def close(self) -> None:
        """Close the connection."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self._close)
        self._pool.shutdown()

    def _timed_add(self, records: Sequence[Record]) -> dict[Key, Record]:
        started_s = time.thread_time()
        try:
            return self._add(self._connect(), records)
        finally:
            self._clock.charge("store", time.thread_time() - started_s)

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            make_durable(self._connection)
            self._connection.execute(f"PRAGMA wal_autocheckpoint = {MAX_LOG_PAGES}")
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @staticmethod
    def _find(connection: sqlite3.Connection, keys: Collection[Key]) -> dict[Key, Record]:
        execute = connection.execute
        return {key: _record(row) for key in keys if (row := execute(_SELECT, key).fetchone()) is not None}

    def _add(self, connection: sqlite3.Connection, records: Sequence[Record]) -> dict[Key, Record]:
        values = [value for record in records for value in _row(record)]
        before = connection.total_changes
        connection.execute(_insert(len(records)), values)
        added = connection.total_changes - before
        if added == len(records):
            return {}
        ours = {record.key: record for record in records}
        stored = self._find(connection, ours.keys())
        return {key: record for key, record in stored.items() if record != ours[key]}


@lru_cache(128)
def _insert(count: int) -> str:
    """One statement for `count` rows is a transaction by itself: Python's lock is given up once for all of it, and
    taken back once. With one statement for each row, each has to wait for the event loop to let go of the lock."""
    places = ", ".join([_PLACES] * count)
    return f"INSERT INTO results ({_COLUMNS}) VALUES {places} ON CONFLICT DO NOTHING"  # noqa: S608  # constants


def make_durable(connection: sqlite3.Connection) -> None:
    """WAL lets the API read while a batch commits; FULL makes a commit outlive a power cut."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _row(record: Record) -> tuple[object, ...]:
    result = record.result
    return (
        record.device, result.boot, result.sequence, record.site, result.model, result.class_index,
        result.class_name, _encode(result.scores).decode(), _encode(result.streams).decode(),
        result.captured_at_ns, record.received_at_ns, result.stored_at_ns, record.checksum,
    )  # fmt: skip


def _record(row: tuple[str, str, int, str, str, int, str, str, str, int, int, int, int]) -> Record:
    device, boot, sequence, site, model, index, name, scores, streams, captured, received, stored, checksum = (
        row
    )
    result = Result(
        boot, sequence, model, index, name, _scores.decode(scores), _streams.decode(streams), captured, stored
    )
    return Record(site, device, received, result, checksum)
