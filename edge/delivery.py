"""Nothing lost, nothing twice: between the releaser, the spool and the link.

Frames and results come in, and in each turn what they changed is committed and what is due is published. A frame is
committed before it is published (mode `disk`), and leaves the spool when its result arrives. One commit takes
everything that came during the one before, so that a flush of the disk delays frames but holds up nobody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge.config import EdgeConfig
from edge.errors import DiskFull
from edge.link import Acknowledged, Connected, Disconnected, Link, LinkEvent, Replied
from edge.spool import Entry, Spool
from edge.window import Window
from splitward.wire.control import Refusal, Result

SWEEP_S = 5.0
DISK_RETRY_S = 1.0
REMOVAL_S = 1.0
"""How long answered frames may wait for a commit of their own; mostly a new frame's takes them along."""
MAX_STAGED_BYTES = 4 << 20
"""Messages that may wait in memory for a disk that is full; then no more frames are taken."""
MAX_SKEW_LATENCY_NS = 2 * 10**9
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A frame's result or refusal, as the device knows it.

    Attributes
    ----------
    latency_ms : float
        From capture to result on the device's own clock: the monotonic one within a start of the agent.
    """

    name: str
    boot: bytes
    sequence: int
    reply: Result | Refusal
    latency_ms: float
    payload_bytes: int


class Delivery:
    """Hands frames to the cloud. One thread uses it; every `now_s` is of the monotonic clock.

    Parameters
    ----------
    config : EdgeConfig
    spool : Spool
    link : Link
    on_answer : callable
        Takes each `Answer` before the frame leaves the spool: after a crash one may come a second time.

    Attributes
    ----------
    captured, sent, results : int
        Frames taken, messages published (repeats included) and results, since the start.
    safe : int
        Frames of `captured` that a crash cannot take any more.
    disk_full : bool
        Whether the last commit failed for want of space.
    clock_skew_ms : float or None
        How far this device's clock is ahead of the cloud's, by the latest result that came quickly.
    """

    def __init__(
        self, config: EdgeConfig, spool: Spool, link: Link, on_answer: Callable[[Answer], None]
    ) -> None:
        self._config = config
        self._spool = spool
        self._link = link
        self._on_answer = on_answer
        self._window = Window(config.link)
        self._boots: set[bytes] = set()
        self._commit_due_s = self._committed_s = self._sweep_due_s = 0.0
        self._message_bytes = 0
        self.connected = self.disk_full = False
        self.captured = self.sent = self.results = self.safe = 0
        self.clock_skew_ms: float | None = None

    @property
    def unanswered(self) -> int:
        """Frames taken and neither answered nor dropped."""
        return self._spool.rows

    @property
    def stalled(self) -> bool:
        """Whether frames have to wait for the disk."""
        return self.disk_full and self._spool.staged_bytes >= MAX_STAGED_BYTES

    @property
    def room(self) -> int:
        """Frames that would fit now, for sources that can wait."""
        if self.disk_full:
            return 0
        limit = max(one.max_unanswered for one in self._config.every_source)
        free_bytes = self._config.spool.max_bytes - self._spool.stored_bytes
        fit = free_bytes // self._message_bytes if self._message_bytes else limit
        return max(0 if self.unanswered else 1, min(limit - self.unanswered, fit))

    def put(self, entry: Entry, digest: int | None) -> None:
        """Take a frame."""
        self._boots.add(entry.boot)
        self._message_bytes = len(entry.message)
        self._spool.add(entry, digest)
        self.captured += 1

    def follow(self, event: LinkEvent, now_s: float) -> None:
        """Note what happened on the link."""
        if isinstance(event, Replied):
            self._answer(event.reply, now_s)
        elif isinstance(event, Acknowledged):
            self._window.acknowledge(event.mid, event.kept, now_s)
        elif isinstance(event, Connected):
            self.connected = True
            if not event.resumed:  # a broker that forgot the session forgot the frames as well
                self._window.forget(now_s)
        elif isinstance(event, Disconnected):
            self.connected = False

    def turn(self, now_s: float) -> None:
        """Commit what is due, and publish what is due."""
        if now_s >= self._sweep_due_s:
            self._sweep_due_s = now_s + SWEEP_S
            self._spool.expire()
            self._spool.shrink()
        if self._spool.changed and now_s >= self._commit_due_s and self._must_commit(now_s):
            self._commit(now_s)
        self._window.give_up(now_s)
        if self.connected:
            self._feed(now_s)

    def finish(self) -> None:
        """Put what is in memory only on the disk, for the last time."""
        if self._spool.changed:
            self._commit(time.monotonic())

    def _must_commit(self, now_s: float) -> bool:
        if not self._spool.urgent:
            return now_s >= self._committed_s + REMOVAL_S
        if self._config.spool.mode == "disk" or not self.connected:
            return True
        oldest_ns = self._spool.oldest_staged_ns
        settle_ns = int(self._config.spool.settle_s * 1e9)
        return oldest_ns is None or self._spool.now_ns() - oldest_ns >= settle_ns

    def _commit(self, now_s: float) -> None:
        spool = self._config.spool
        self._commit_due_s = now_s + (spool.commit_s if spool.mode == "disk" else spool.settle_s)
        try:
            self._spool.commit()
        except DiskFull as error:
            if not self.disk_full:
                log.error("the disk is full; frames wait for it: %s", error)
            self.disk_full = True
            self._commit_due_s = now_s + DISK_RETRY_S
            return
        self._committed_s = now_s
        if self.disk_full:
            log.warning("the disk takes frames again")
        self.disk_full = False
        self.safe = self.captured

    def _answer(self, reply: Result | Refusal, now_s: float) -> None:
        entry = self._spool.remove(_boot_id(reply.boot), reply.sequence)
        if entry is None:
            return  # a frame that was sent twice is answered twice
        self._window.answer(entry.row, now_s)
        if isinstance(reply, Result):
            self.results += 1
        else:
            log.warning("the cloud refuses frame %d: %s: %s", reply.sequence, reply.reason, reply.message)
            self._spool.drop(f"refused:{reply.reason}")
        if entry.boot in self._boots:
            latency_ns = time.monotonic_ns() - entry.captured_tick_ns
            if isinstance(reply, Result) and latency_ns < MAX_SKEW_LATENCY_NS:  # it was stored about half-way
                self.clock_skew_ms = (time.time_ns() - latency_ns // 2 - reply.stored_at_ns) / 1e6
        else:
            latency_ns = time.time_ns() - entry.captured_at_ns
        self._on_answer(
            Answer(entry.name, entry.boot, entry.sequence, reply, latency_ns / 1e6, len(entry.message))
        )

    def _feed(self, now_s: float) -> None:
        """Publish what is due while the window has room."""
        while self._window.has_room(now_s):
            entry, tries = self._next(now_s)
            if entry is None:
                return
            self._window.publish(entry.row, tries, self._link.publish(entry.message), now_s)
            self.sent += 1

    def _next(self, now_s: float) -> tuple[Entry | None, int]:
        """The next frame to publish, and how often it was published before."""
        while (due := self._window.take_due(now_s)) is not None:
            row, tries = due
            entry = self._spool.get(row)
            if entry is not None:  # else answered or dropped meanwhile
                return entry, tries
        return self._spool.take_fresh(), 0


def _boot_id(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""  # no frame has it
