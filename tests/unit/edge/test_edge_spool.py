"""The spool keeps what it was given, in order and within its limits, whatever happens to process or file."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.config import SpoolConfig
from edge.errors import DiskFull, SpoolError
from edge.spool import Entry, Spool
from splitward.wire.message import Activation, encode

BOOT = bytes(range(16))
FAST = SpoolConfig(synchronous="normal")


def entry(sequence: int, message: bytes = b"message", boot: bytes = BOOT, priority: int = 0) -> Entry:
    return Entry(0, boot, sequence, f"frame-{sequence}", 10**18, 5, priority, 0, message)


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@contextmanager
def opened(path: Path, config: SpoolConfig = FAST, clock: Clock | None = None) -> Iterator[Spool]:
    with closing(Spool(path, config, clock or Clock())) as spool:
        yield spool


def add(spool: Spool, *entries: Entry, digest: int | None = None) -> None:
    for one in entries:
        spool.add(one, digest)
    spool.commit()


def digests(spool: Spool) -> set[int]:
    return set(array("q", spool.digests()))


def listed(spool: Spool) -> list[int]:
    """Sequence numbers of what is stored, in the order of spooling."""
    query = "SELECT sequence FROM frame ORDER BY id"
    return [sequence for (sequence,) in spool._database.execute(query)]


def published(spool: Spool) -> list[int]:
    """Sequence numbers in the order in which they would be published."""
    found = []
    while (one := spool.take_fresh()) is not None:
        found.append(one.sequence)
    return found


def fill(disk: Path) -> Path:
    """Take every byte that is left; the file that holds them."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


def message(sequence: int, size: int = 16) -> bytes:
    """A real message, checksum and all."""
    values = np.random.default_rng(sequence).integers(-127, 128, size).astype(np.int8)
    return encode(Activation("pi", BOOT, sequence, 10**18, BOOT, values, 0.5))


def test_what_was_committed_survives_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, entry(0), entry(1), digest=7)
        spool.drop("unreadable")
        spool.commit()
    with opened(tmp_path / "spool") as spool:
        assert listed(spool) == published(spool) == [0, 1]
        assert (spool.rows, spool.stored_bytes) == (2, 14)
        assert digests(spool) == {7}
        assert spool.dropped == {"unreadable": 1}
        add(spool, entry(0, boot=bytes(16)))  # a new start of the agent counts from 0 again
        assert published(spool) == [0]
        removed = spool.remove(BOOT, 0)
        assert removed is not None
        assert removed.message == b"message"
        assert spool.remove(BOOT, 0) is None
        spool.commit()
        assert listed(spool) == [1, 0]


def test_what_was_not_committed_is_not_there(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, entry(0))
        spool.add(entry(1), 7)
        spool.remove(BOOT, 0)
        spool.drop("unreadable")
        assert (spool.rows, spool.changed) == (1, True)
    with opened(tmp_path / "spool") as spool:
        assert (listed(spool), digests(spool), spool.dropped) == ([0], set(), {})


def test_nothing_is_published_before_it_is_committed_unless_memory_is_asked_for(tmp_path: Path) -> None:
    for mode, expected in (("disk", []), ("memory", [0])):
        with opened(tmp_path / mode, SpoolConfig(mode=mode)) as spool:  # type: ignore[arg-type]  # one of its two
            spool.add(entry(0), 1)
            assert published(spool) == expected
            spool.commit()
            assert published(spool) == [0][len(expected) :]


def test_the_oldest_digests_are_forgotten_while_the_agent_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("edge.spool.REMEMBERED", 5)
    with opened(tmp_path / "spool") as spool:
        for digest in range(20):
            add(spool, entry(digest), digest=digest)
        assert digests(spool) == set(range(15, 20))


def test_strikes_survive_a_restart_until_the_frame_is_taken_or_given_up(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        for name in ("a", "a", "b#1", "frame-0"):
            spool.strike(name)
        assert spool.urgent
        spool.commit()
    with opened(tmp_path / "spool") as spool:
        assert spool.strikes == {"a": 2, "b#1": 1, "frame-0": 1}
        add(spool, entry(0))
        spool.forgive("b")  # the file of that frame
        spool.commit()
    with opened(tmp_path / "spool") as spool:
        assert spool.strikes == {"a": 2}
        for number in range(1000):
            spool.strike(f"c{number}")
        assert len(spool.strikes) == 256, "those that were struck last"
        spool.commit()


def test_a_frame_that_is_answered_in_memory_never_touches_the_disk(tmp_path: Path) -> None:
    with opened(tmp_path / "spool", SpoolConfig(mode="memory")) as spool:
        spool.add(entry(0), 1)
        assert spool.remove(BOOT, 0) is not None
        spool.commit()
        assert (listed(spool), spool.rows, spool.stored_bytes, spool.staged_bytes) == ([], 0, 0, 0)
        assert digests(spool) == {1}


def test_a_row_is_never_used_again(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, entry(0))
        assert published(spool) == [0]
        spool.remove(BOOT, 0)
        add(spool, entry(1))
        assert published(spool) == [1]


@pytest.mark.parametrize("order", ["oldest", "newest"])
@settings(max_examples=60)
@given(steps=st.lists(st.one_of(st.integers(0, 2), st.none()), max_size=60), restart_at=st.integers(0, 60))
def test_it_publishes_by_priority_and_then_by_age(order: Any, steps: list[int | None], restart_at: int) -> None:
    """Against a list: an integer spools a frame of that priority, None publishes one."""
    config = SpoolConfig(order=order, synchronous="normal")
    waiting: list[tuple[int, int]] = []  # priority, sequence
    taken: list[tuple[int, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "spool", config)
        try:
            for number, step in enumerate(steps):
                if number == restart_at:  # what was published is due again, as nobody knows whether it arrived
                    spool.close()
                    spool = Spool(Path(folder) / "spool", config)
                    waiting, taken = sorted([*waiting, *taken], key=lambda one: one[1]), []
                if step is not None:
                    add(spool, entry(number, priority=step))
                    waiting.append((step, number))
                    continue
                one = spool.take_fresh()
                if not waiting:
                    assert one is None
                    continue
                best = max(waiting, key=lambda w: (w[0], -w[1] if order == "oldest" else w[1]))
                assert one is not None
                assert (one.priority, one.sequence) == best
                waiting.remove(best)
                taken.append(best)
        finally:
            spool.close()


def test_old_frames_expire_by_the_time_that_the_agent_ran(tmp_path: Path) -> None:
    config, clock = SpoolConfig(max_age_s=30.0), Clock()
    with opened(tmp_path / "spool", config, clock) as spool:
        add(spool, entry(0))
        clock.now_ns = 20 * 10**9
        add(spool, entry(1))
    later = Clock()
    later.now_ns = 10**18  # another boot: its monotonic clock says nothing about the last one's
    with opened(tmp_path / "spool", config, later) as spool:
        spool.expire()
        assert spool.rows == 2
        later.now_ns += 15 * 10**9
        spool.expire()
        spool.commit()
        assert listed(spool) == [1]
        assert spool.dropped == {"expired": 1}


def test_a_full_disk_loses_nothing_and_can_be_tried_again(tmp_path: Path, small_disk: Path) -> None:
    with opened(small_disk / "spool") as spool:
        add(spool, *(entry(sequence, bytes(500)) for sequence in range(20)), digest=1)
        ballast = fill(small_disk)
        for sequence in range(20, 2000):
            spool.add(entry(sequence, bytes(500)), sequence)
        spool.remove(BOOT, 3)
        with pytest.raises(DiskFull, match="Free space"):
            spool.commit()
        with pytest.raises(DiskFull):
            spool.commit()
        assert spool.rows == 1999
        assert spool.remove(BOOT, 3) is None
        assert spool.remove(BOOT, 30) is not None
        ballast.unlink()
        spool.commit()
        assert listed(spool) == [sequence for sequence in range(2000) if sequence not in (3, 30)]
    with opened(small_disk / "spool") as spool:
        assert spool.rows == 1998


def test_a_spool_that_has_emptied_gives_its_space_back(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, *(entry(sequence, bytes(2000)) for sequence in range(2000)))
        spool.shrink()
        full = sum(path.stat().st_size for path in tmp_path.iterdir())
        for sequence in range(2000):
            spool.remove(BOOT, sequence)
        spool.commit()
        for _ in range(20):
            spool.shrink()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < full / 10


def test_a_version_1_spool_is_taken_over(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "spool")) as old:
        old.executescript(
            """
            CREATE TABLE frame (id INTEGER PRIMARY KEY, boot BLOB NOT NULL, sequence INTEGER NOT NULL,
                name TEXT NOT NULL, captured_at_ns INTEGER NOT NULL, captured_tick_ns INTEGER NOT NULL,
                message BLOB NOT NULL, UNIQUE (boot, sequence));
            CREATE TABLE captured (id INTEGER PRIMARY KEY, digest INTEGER NOT NULL);
            CREATE TABLE dropped (reason TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
            INSERT INTO frame VALUES (5, x'00', 3, 'a', 1, 2, x'0102');
            INSERT INTO captured VALUES (1, 77);
            PRAGMA user_version = 1;
            """
        )
    with opened(tmp_path / "spool") as spool:
        one = spool.take_fresh()
        assert one is not None
        assert (one.sequence, one.message, one.priority) == (3, b"\x01\x02", 0)
        assert digests(spool) == {77}


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + bytes(4000)])
def test_a_damaged_file_is_moved_aside_and_counted(tmp_path: Path, content: bytes, caplog: Any) -> None:
    (tmp_path / "spool").write_bytes(content)
    with opened(tmp_path / "spool") as spool:
        assert spool.dropped == {"spool_damaged": 1}
        add(spool, entry(0))
        assert listed(spool) == [0]
    (aside,) = tmp_path.glob("spool.damaged-*")
    assert aside.read_bytes() == content
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("page", range(1, 30, 4))
def test_damage_within_a_page_costs_the_frames_of_that_page_at_most(tmp_path: Path, page: int) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, *(entry(sequence, message(sequence, 500)) for sequence in range(200)), digest=5)
    with (tmp_path / "spool").open("r+b") as file:
        pages = file.seek(0, os.SEEK_END) // 4096
        assert page < pages
        file.seek(4096 * page)
        file.write(b"\xff" * 4096)
    with opened(tmp_path / "spool") as spool:
        saved = listed(spool)
        assert len(saved) >= 200 - 12
        assert published(spool) == saved
        assert spool.dropped.pop("spool_damaged", 1) == 1
        for sequence in saved:
            one = spool.remove(BOOT, sequence)
            assert one is not None
            assert one.message == message(sequence, 500)


def test_frames_are_found_in_a_file_that_sqlite_cannot_open(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, *(entry(sequence, message(sequence)) for sequence in range(50)))
    with (tmp_path / "spool").open("r+b") as file:
        file.write(bytes(4096))  # header and schema
    with opened(tmp_path / "spool") as spool:
        assert sorted(listed(spool)) == list(range(50))
        assert spool.dropped == {"spool_damaged": 1}


def test_a_cut_at_each_step_of_a_salvage_loses_none_of_what_is_saved(tmp_path: Path) -> None:
    with opened(tmp_path / "sound" / "spool") as spool:
        add(spool, *(entry(sequence, message(sequence, 500)) for sequence in range(100)), digest=5)
    with opened(tmp_path / "sound" / "spool") as spool:
        spool.drop("unreadable")
        add(spool, *(entry(sequence, message(sequence, 500)) for sequence in range(100, 200)))
        # With its write-ahead log, as a power cut leaves it.
        shutil.copytree(tmp_path / "sound", tmp_path / "cut")
    with (tmp_path / "cut" / "spool").open("r+b") as file:
        file.seek(8 * 4096)
        file.write(b"\xff" * 4096)
    shutil.copytree(tmp_path / "cut", tmp_path / "whole")
    with opened(tmp_path / "whole" / "spool") as spool:
        saved, counted = listed(spool), spool.dropped
        assert len(saved) > 150
        assert counted["spool_damaged"] == 1
    for step in range(100):
        folder = tmp_path / f"step-{step}"
        shutil.copytree(tmp_path / "cut", folder)
        whole = not open_until(step, folder / "spool")
        with opened(folder / "spool") as spool:
            assert (listed(spool), spool.dropped) == (saved, counted), step
            assert digests(spool) == {5}
        if whole:
            break
    assert whole
    assert step > 5


CUT = """
import os, sys
from pathlib import Path
from edge.config import SpoolConfig
from edge.spool import Spool

left = int(sys.argv[2])

def counted(real):
    def wrapped(*arguments, **named):
        global left
        if not left:
            os._exit(9)
        left -= 1
        return real(*arguments, **named)
    return wrapped

for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "fsync"), (Spool, "commit")):
    setattr(owner, name, counted(getattr(owner, name)))
Spool(Path(sys.argv[1]), SpoolConfig())
"""


def open_until(step: int, path: Path) -> bool:
    """Open a spool in a process that ends before it changes the folder, or begins a commit, for the `step`th time;
    whether it ended so."""
    done = subprocess.run(
        [sys.executable, "-c", CUT, path, str(step)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 9


def test_a_second_agent_is_kept_out(tmp_path: Path) -> None:
    with opened(tmp_path / "spool"), pytest.raises(SpoolError, match="no other agent"):
        Spool(tmp_path / "spool", FAST)


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        spool._database.execute("PRAGMA user_version = 99")
    with pytest.raises(SpoolError, match="version 99"):
        Spool(tmp_path / "spool", FAST)


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    with opened(tmp_path / "state" / "spool") as spool:
        add(spool, entry(0))
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()}
    assert modes == {0o600}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 60)),
        st.tuples(st.just("remove"), st.integers(0, 30)),
        st.tuples(st.just("restart"), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=40)
@given(steps=STEPS, drop=st.sampled_from(["oldest", "newest"]))
def test_it_behaves_as_a_bounded_queue(steps: list[tuple[str, int]], drop: Any) -> None:
    """Against a list of (sequence, size): the same frames, the same order, and every frame accounted for."""
    config = SpoolConfig(max_bytes=100, drop=drop, synchronous="normal")
    model: list[tuple[int, int]] = []
    added = answered = 0
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "spool", config)
        try:
            for step, value in steps:
                if step == "add":
                    add(spool, entry(added, bytes(value)))
                    fits = sum(size for _, size in model) + value <= 100
                    if fits or drop == "oldest":
                        model.append((added, value))
                    while sum(size for _, size in model) > 100:
                        model.pop(0)
                    added += 1
                elif step == "remove":
                    found = spool.remove(BOOT, value)
                    spool.commit()
                    assert (found is not None) == any(sequence == value for sequence, _ in model)
                    answered += found is not None
                    model = [one for one in model if one[0] != value]
                else:
                    spool.close()
                    spool = Spool(Path(folder) / "spool", config)
                assert listed(spool) == [sequence for sequence, _ in model]
                assert spool.stored_bytes == sum(size for _, size in model) <= 100
                assert added == answered + spool.rows + spool.dropped.get("spool_full", 0)
        finally:
            spool.close()
