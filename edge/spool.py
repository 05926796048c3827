"""What waits for a result, in SQLite: one row for each frame, kept until its result arrives.

Messages are stored as they are published, boot id and sequence number inside, so that what an earlier start of
the agent left behind is sent again under its own name. One thread uses a spool.

Changes are staged in memory and `commit` puts all of them on the disk at once, or none: a commit that fails for want
of space can be tried again, and nothing is lost or told twice. A frame that is answered before it was committed never
touches the disk. Who calls `commit`, and when, is delivery.py's to say.

The default is a write-ahead log with `synchronous = FULL`: what is committed survives a power cut, which a
device at a bedside meets more often than a crash. `EXCLUSIVE` locking keeps a second agent out.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from array import array
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from edge.backlog import Backlog
from edge.config import SpoolConfig
from edge.errors import DiskFull, SpoolError
from edge.salvage import Salvage, salvage
from splitward.disk import move_whole

SCHEMA_VERSION = 2
REMEMBERED = 200_000
"""Frames whose digests are kept, so that a restart does not capture them again."""
STRUCK = 256
"""Files whose strikes are kept: those that were struck last."""
CLOCK_PERIOD_NS = 10 * 10**9
"""How often the spool's clock is written, at most, and so what a crash makes a frame younger."""
_SCHEMA = """
CREATE TABLE frame (
    id INTEGER PRIMARY KEY,
    boot BLOB NOT NULL,
    sequence INTEGER NOT NULL,
    name TEXT NOT NULL,
    captured_at_ns INTEGER NOT NULL,
    captured_tick_ns INTEGER NOT NULL,
    priority INTEGER NOT NULL DEFAULT 0,
    spooled_ns INTEGER NOT NULL DEFAULT 0,
    message BLOB NOT NULL,
    UNIQUE (boot, sequence)
);
CREATE INDEX frame_by_priority ON frame (priority);
CREATE TABLE captured (id INTEGER PRIMARY KEY, digest INTEGER NOT NULL);
CREATE TABLE dropped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE clock (spool_ns INTEGER NOT NULL);
INSERT INTO clock VALUES (0);
"""
_FROM_VERSION_1 = """
ALTER TABLE frame ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE frame ADD COLUMN spooled_ns INTEGER NOT NULL DEFAULT 0;
CREATE INDEX frame_by_priority ON frame (priority);
CREATE TABLE clock (spool_ns INTEGER NOT NULL);
INSERT INTO clock VALUES (0);
"""
# By itself: an agent that knows no strikes passes over the table, so that a version can be taken back.
_STRIKES = "CREATE TABLE IF NOT EXISTS strike (name TEXT PRIMARY KEY, count INTEGER NOT NULL)"
_COLUMNS = "id, boot, sequence, name, captured_at_ns, captured_tick_ns, priority, spooled_ns, message"
_INSERT = f"INSERT INTO frame ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # constants
_OUT_OF_SPACE = ("disk is full", "disk i/o error", "unable to open database file")
"""What SQLite says when a write fails; a sick disk may say the second as well, and then goes on saying it."""
log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One spooled frame, as the table has it; `row` is its place in the queue, 0 until it has one.

    `captured_tick_ns` is the moment of capture on the monotonic clock, `spooled_ns` that of spooling on the
    spool's own clock, which runs while an agent does.
    """

    row: int
    boot: bytes
    sequence: int
    name: str
    captured_at_ns: int
    captured_tick_ns: int
    priority: int
    spooled_ns: int
    message: bytes

    def __repr__(self) -> str:
        return f"Entry({self.row}, {self.boot.hex()}, {self.sequence}, {len(self.message)} bytes)"


class Spool:
    """The spool at `path`.

    Attributes
    ----------
    rows, stored_bytes : int
        Frames that wait, and the bytes of their messages, committed or not.
    staged_bytes : int
        Bytes of the messages that are in memory only.
    dropped : dict
        Frames lost by reason, over all starts.
    strikes : dict
        How often each file has ended the releaser, over all starts, until its frame is taken or given up.

    Parameters
    ----------
    path : Path
    config : SpoolConfig
    monotonic_ns : callable
        A clock that nobody sets.

    Raises
    ------
    SpoolError
        The file cannot be opened or written, another agent holds it, or a newer version wrote it. A damaged
        file is none of these: it is moved aside, what can be read of it is taken over, and it is counted
        (`spool_damaged`).
    """

    def __init__(
        self, path: Path, config: SpoolConfig, monotonic_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._path = path
        self._config = config
        self._monotonic_ns = monotonic_ns
        self._staged: dict[int, Entry] = {}
        self._staged_rows: dict[tuple[bytes, int], int] = {}
        self._removed: set[int] = set()
        self._digests: list[int] = []
        self._counts_changed = self._strikes_changed = False
        self.staged_bytes = self._clock_written_ns = 0
        aside = self._beside(f".damaged-{time.time_ns()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._put_in(aside)
            try:
                self._database = self._open()
            except sqlite3.OperationalError:
                raise  # locked, full, or not permitted: the file itself may be sound
            except sqlite3.DatabaseError as error:
                self._replace(error, aside)
                self._database = self._open()
            self._load()
        except (sqlite3.Error, OSError) as error:
            raise SpoolError(
                f"{path}: {error}. The agent must be able to write there, and no other agent may use it."
            ) from error

    @property
    def changed(self) -> bool:
        """Whether something waits for a commit."""
        return bool(self.urgent or self._removed or self._counts_changed)

    @property
    def urgent(self) -> bool:
        """Whether a frame waits for a commit, the digest of one, or a strike. What is removed can wait: a frame whose
        removal was lost is sent once more, and answered from the cloud's store."""
        return bool(self._staged or self._digests or self._strikes_changed)

    @property
    def oldest_staged_ns(self) -> int | None:
        """When the oldest frame that is in memory only was added, on the spool's clock."""
        return next((entry.spooled_ns for entry in self._staged.values()), None)

    def commit(self) -> None:
        """Put everything since the last commit on the disk.

        Raises
        ------
        DiskFull, SpoolError
            Nothing was written; what waited still waits.
        """
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._write()
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # a full disk may have ended it already
                    self._database.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            kind = DiskFull if any(sign in str(error).lower() for sign in _OUT_OF_SPACE) else SpoolError
            raise kind(f"{self._path}: {error}. Free space on the disk, or replace it.") from error
        if self._config.mode == "disk":  # only what is safe may be published
            for entry in self._staged.values():
                self._backlog(entry.priority).add(entry.row, entry.row + 1)
        self._staged.clear()
        self._staged_rows.clear()
        self.staged_bytes = 0
        self._removed.clear()
        self._digests.clear()
        self._counts_changed = self._strikes_changed = False

    def add(self, entry: Entry, digest: int | None) -> None:
        """Append a frame; what no longer fits is dropped by the policy and counted, be it this frame."""
        if digest is not None:
            self.remember(digest)
        self.forgive(entry.name)
        self._last_row += 1  # ours, as SQLite gives a removed row's number again
        row = self._last_row
        self._staged[row] = entry._replace(row=row, spooled_ns=self.now_ns())
        self._staged_rows[entry.boot, entry.sequence] = row
        if self._config.mode == "memory":
            self._backlog(entry.priority).add(row, row + 1)
        self.rows += 1
        self.staged_bytes += len(entry.message)
        self.stored_bytes += len(entry.message)
        while self.stored_bytes > self._config.max_bytes:
            self._drop_one()

    def remove(self, boot: bytes, sequence: int) -> Entry | None:
        """Remove an answered frame and return it; None when it is not, or no longer, there."""
        row = self._staged_rows.get((boot, sequence))
        if row is not None:
            return self._take_out(self._staged[row])
        entry = self._first("boot = ? AND sequence = ?", (boot, sequence))
        return None if entry is None or entry.row in self._removed else self._take_out(entry)

    def expire(self) -> None:
        """Remove and count the frames that are over the age limit."""
        oldest_ns = self.now_ns() - int(self._config.max_age_s * 1e9)
        expired = [entry for entry in self._staged.values() if entry.spooled_ns < oldest_ns]
        for found in self._database.execute(f"SELECT {_COLUMNS} FROM frame ORDER BY id"):  # noqa: S608  # constants
            entry = Entry(*found)
            if entry.spooled_ns >= oldest_ns:
                break  # spooled in the order of their rows
            if entry.row not in self._removed:
                expired.append(entry)
        for entry in expired:
            self._take_out(entry)
        if expired:
            self.drop("expired", len(expired))

    def drop(self, reason: str, count: int = 1) -> None:
        """Count `count` frames as lost for `reason`."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        self._counts_changed = True

    def remember(self, digest: int) -> None:
        """Note that the frame of `digest` is not to be captured again."""
        self._digests.append(digest)

    def strike(self, name: str) -> None:
        """Note that the file or frame `name` has ended the releaser."""
        self.strikes[name] = self.strikes.pop(name, 0) + 1
        for oldest in list(self.strikes)[:-STRUCK]:
            del self.strikes[oldest]
        self._strikes_changed = True

    def forgive(self, name: str) -> None:
        """Forget the strikes of the file or frame `name`, of its frames and of its file."""
        file = name.rpartition("#")[0]
        for one in [one for one in self.strikes if one in (name, file) or one.startswith(f"{name}#")]:
            del self.strikes[one]
            self._strikes_changed = True

    def get(self, row: int) -> Entry | None:
        """Frame at `row`, or None."""
        if row in self._staged:
            return self._staged[row]
        return None if row in self._removed else self._first("id = ?", (row,))

    def take_fresh(self) -> Entry | None:
        """The next frame that was not taken since this start; None when there is none."""
        for priority in sorted(self._backlogs, reverse=True):
            row = self._backlogs[priority].take()
            if row is not None:
                return self.get(row)
        return None

    def digests(self) -> bytes:
        """Digests of the captured frames, 8 bytes each in the machine's order; old ones are forgotten."""
        found = array("q", (digest for (digest,) in self._database.execute("SELECT digest FROM captured")))
        found.extend(self._digests)
        return found.tobytes()

    def now_ns(self) -> int:
        """The spool's clock: nanoseconds for which an agent has run on it."""
        return self._clock_ns + self._monotonic_ns() - self._started_ns

    def shrink(self) -> None:
        """Give pages that are free, and stayed so, back to the file system, some at a time."""
        (free,) = self._database.execute("PRAGMA freelist_count").fetchone()
        if free > 64:
            try:
                self._database.executescript("PRAGMA incremental_vacuum(1024)")  # `execute` would free one page
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            except sqlite3.Error as error:  # the disk is full, and stays as it is
                log.warning("%s: does not shrink: %s", self._path, error)

    def close(self) -> None:
        """Close the file; everything that was committed is in it."""
        self._database.close()

    def _write(self) -> None:
        run = self._database
        run.executemany(_INSERT, self._staged.values())
        run.executemany("DELETE FROM frame WHERE id = ?", ((row,) for row in self._removed))
        run.executemany("INSERT INTO captured (digest) VALUES (?)", ((digest,) for digest in self._digests))
        if self._digests:
            run.execute("DELETE FROM captured WHERE id <= (SELECT max(id) FROM captured) - ?", (REMEMBERED,))
        if self._counts_changed:
            run.executemany("INSERT OR REPLACE INTO dropped VALUES (?, ?)", self.dropped.items())
        if self._strikes_changed:
            run.execute("DELETE FROM strike")
            run.executemany("INSERT INTO strike VALUES (?, ?)", self.strikes.items())
        now_ns = self.now_ns()
        if now_ns - self._clock_written_ns > CLOCK_PERIOD_NS:
            run.execute("UPDATE clock SET spool_ns = ?", (now_ns,))
            self._clock_written_ns = now_ns

    def _drop_one(self) -> None:
        """Drop the frame that the policy names, of the lowest priority that is there."""
        newest = self._config.drop == "newest"
        order = "ORDER BY priority, id" + (" DESC" if newest else "")
        found = self._database.execute(f"SELECT {_COLUMNS} FROM frame {order}")  # noqa: S608  # constants
        stored = next((one for one in (Entry(*row) for row in found) if one.row not in self._removed), None)
        choice = [*self._staged.values(), *([] if stored is None else [stored])]
        victim = min(choice, key=lambda one: (one.priority, -one.row if newest else one.row))
        self._take_out(victim)
        self.drop("spool_full")

    def _take_out(self, entry: Entry) -> Entry:
        if self._staged.pop(entry.row, None) is None:
            self._removed.add(entry.row)
        else:
            del self._staged_rows[entry.boot, entry.sequence]
            self.staged_bytes -= len(entry.message)
        self.rows -= 1
        self.stored_bytes -= len(entry.message)
        return entry

    def _backlog(self, priority: int) -> Backlog:
        if priority not in self._backlogs:
            self._backlogs[priority] = Backlog(self._config.order, partial(self._find, priority))
        return self._backlogs[priority]

    def _find(self, priority: int, low: int, high: int) -> int | None:
        newest = self._config.order == "newest"
        staged = [row for row, one in self._staged.items() if low <= row < high and one.priority == priority]
        if newest and staged:  # every staged row is above every stored one
            return staged[-1]
        direction = "DESC" if newest else "ASC"
        stored = self._database.execute(
            f"SELECT id FROM frame WHERE priority = ? AND id >= ? AND id < ? ORDER BY id {direction}",  # noqa: S608  # constants
            (priority, low, high),
        )
        row = next((row for (row,) in stored if row not in self._removed), None)
        return staged[0] if row is None and staged else row

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))  # SQLite would let others read it
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=1.0)
        try:
            for setting in (
                "auto_vacuum = INCREMENTAL",
                "locking_mode = EXCLUSIVE",
                "journal_mode = WAL",
                f"synchronous = {self._config.synchronous.upper()}",
                "cache_size = -1024",
                "wal_autocheckpoint = 256",
                "journal_size_limit = 1048576",
            ):
                database.execute(f"PRAGMA {setting}").fetchall()
            (verdict,) = database.execute("PRAGMA integrity_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise SpoolError(
                    f"{self._path}: has version {version}, not {SCHEMA_VERSION}. Use the agent that wrote it."
                )
            if version < SCHEMA_VERSION:
                steps = _SCHEMA if version == 0 else _FROM_VERSION_1
                database.executescript(f"BEGIN;{steps}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
            database.execute(_STRIKES)
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
        self.dropped: dict[str, int] = dict(one("SELECT reason, count FROM dropped").fetchall())
        self.strikes: dict[str, int] = dict(one("SELECT name, count FROM strike ORDER BY rowid").fetchall())
        self._backlogs: dict[int, Backlog] = {}
        for priority, low, high in one("SELECT priority, min(id), max(id) FROM frame GROUP BY priority"):
            self._backlog(priority).add(low, high + 1)
        self._clock_ns: int = one("SELECT spool_ns FROM clock").fetchone()[0]
        self._clock_written_ns = self._clock_ns
        self._started_ns = self._monotonic_ns()

    def _replace(self, error: sqlite3.DatabaseError, aside: Path) -> None:
        """Write what can be saved of a damaged file to a new one, and only then let them change places."""
        saved = salvage(self._path)
        log.error(
            "%s: is damaged (%s); kept as %s, %d frames of it are taken over",
            *(self._path, error, aside.name, len(saved.rows)),
        )
        for suffix in ("", "-wal", "-shm"):  # of a start that was cut short
            self._beside(".new" + suffix).unlink(missing_ok=True)
        with closing(Spool(self._beside(".new"), self._config, self._monotonic_ns)) as new:
            new._take_over(saved)
        move_whole(self._path, aside)
        self._put_in(aside)

    def _put_in(self, aside: Path) -> None:
        """Let the new file take the place of a damaged one that is out of the way, be it since an earlier start."""
        if self._path.exists() or not self._beside(".new").exists():
            return
        if self._beside("-wal").exists():  # the damaged file's; SQLite would take it for the new one's
            move_whole(self._beside("-wal"), aside.with_name(aside.name + "-wal"))
        self._beside("-shm").unlink(missing_ok=True)
        move_whole(self._beside(".new"), self._path)

    def _beside(self, suffix: str) -> Path:
        return self._path.with_name(self._path.name + suffix)

    def _take_over(self, saved: Salvage) -> None:
        for row in saved.rows:
            self.add(Entry(*row), None)
        self._digests.extend(saved.digests)
        self.dropped |= saved.dropped
        self.strikes |= saved.strikes
        self._strikes_changed = bool(saved.strikes)
        self.drop("spool_damaged")
        self.commit()
        # Into the file that will be renamed.
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _first(self, condition: str, values: tuple[bytes | int, ...]) -> Entry | None:
        query = f"SELECT {_COLUMNS} FROM frame WHERE {condition}"  # noqa: S608  # constants of this module
        found = self._database.execute(query, values).fetchone()
        return None if found is None else Entry(*found)
