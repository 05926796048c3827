"""The spool keeps what it was given, in order and within its limits, whatever happens to process or file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.config import SpoolConfig
from edge.errors import SpoolError
from edge.spool import Entry, Spool

BOOT = bytes(range(16))
FAST = SpoolConfig(synchronous="normal")


def entry(
    sequence: int, message: bytes = b"message", boot: bytes = BOOT, captured_at_ns: int = 10**18
) -> Entry:
    return Entry(0, boot, sequence, f"frame-{sequence}", captured_at_ns, 5, message)


@contextmanager
def opened(path: Path, config: SpoolConfig = FAST) -> Iterator[Spool]:
    with closing(Spool(path, config)) as spool:
        yield spool


def add(spool: Spool, *entries: Entry, digest: int | None = None) -> None:
    with spool.transaction():
        for one in entries:
            spool.add(one, digest)


def listed(spool: Spool) -> list[int]:
    """Sequence numbers in the order in which they would be published."""
    found, row = [], 0
    while (one := spool.first_after(row)) is not None:
        found.append(one.sequence)
        row = one.row
    return found


def test_what_was_committed_survives_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, entry(0), entry(1), digest=7)
        with spool.transaction():
            spool.drop("unreadable")
    with opened(tmp_path / "spool") as spool:
        assert listed(spool) == [0, 1]
        assert (spool.rows, spool.stored_bytes) == (2, 14)
        assert spool.known == {7}
        assert spool.dropped == {"unreadable": 1}
        add(spool, entry(0, boot=bytes(16)))  # a new start of the agent counts from 0 again
        assert listed(spool) == [0, 1, 0]
        removed = spool.remove(BOOT, 0)
        assert removed is not None
        assert removed.message == b"message"
        assert spool.remove(BOOT, 0) is None


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    def fail(spool: Spool) -> None:
        with spool.transaction():
            spool.add(entry(0), 7)
            raise ZeroDivisionError

    with opened(tmp_path / "spool") as spool, pytest.raises(ZeroDivisionError):
        fail(spool)
    with opened(tmp_path / "spool") as spool:
        assert (listed(spool), spool.known) == ([], frozenset())


def test_a_row_is_never_used_again(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, entry(0))
        first = spool.first_after(0)
        assert first is not None
        with spool.transaction():
            spool.remove(BOOT, 0)
        add(spool, entry(1))
        assert spool.first_after(first.row) is not None


def test_old_frames_expire(tmp_path: Path) -> None:
    with opened(tmp_path / "spool", SpoolConfig(max_age_s=10.0)) as spool:
        add(spool, entry(0, captured_at_ns=1), entry(1, captured_at_ns=6 * 10**9))
        with spool.transaction():
            spool.expire(15 * 10**9)
        assert listed(spool) == [1]
        assert spool.dropped == {"expired": 1}


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


def test_damage_within_a_page_is_found(tmp_path: Path) -> None:
    with opened(tmp_path / "spool") as spool:
        add(spool, *(entry(sequence, os.urandom(500)) for sequence in range(200)))
    with (tmp_path / "spool").open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 4096)
    with opened(tmp_path / "spool") as spool:
        assert spool.dropped == {"spool_damaged": 1}


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


@settings(max_examples=40, deadline=None)
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
                    with spool.transaction():
                        found = spool.remove(BOOT, value)
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
