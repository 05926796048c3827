"""Nothing lost, nothing twice: the thread between the agent, the spool and the link.

In turn it commits what came in (new frames, results) and publishes what is due. A frame is committed before it
is published, and removed when its result arrives. One commit takes everything that came during the one before,
so that a flush of the disk delays frames but not the agent.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from edge.config import EdgeConfig
from edge.link import Acknowledged, Connected, Disconnected, Link, LinkEvent, Replied
from edge.spool import Entry, Spool
from edge.window import Window
from splitward.wire.control import Refusal, Result, Status

TICK_S = 0.1
SWEEP_S = 5.0
MAX_PENDING = 64
"""Frames that may wait to be committed; then the agent waits for the disk."""
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


@dataclass(frozen=True, slots=True)
class _Put:
    entry: Entry
    digest: int | None


@dataclass(frozen=True, slots=True)
class _Drop:
    reason: str


class _Stop:
    """The last event."""


_Event = _Put | _Drop | _Stop | LinkEvent


class Delivery:
    """Hands frames to the cloud; a context manager that runs the thread and the link.

    Parameters
    ----------
    config : EdgeConfig
    boot : bytes
        Boot id of this start.
    spool : Spool
        Used by this thread alone from now on.
    identity : dict
        The constant fields of the status.
    on_answer : callable
        Takes each `Answer` before the frame leaves the spool: after a crash one may come a second time.
    stop : Event
        Set by the caller to end; also set here when the thread fails, and `__exit__` raises its error.
    """

    def __init__(
        self,
        config: EdgeConfig,
        boot: bytes,
        spool: Spool,
        identity: dict[str, Any],
        on_answer: Callable[[Answer], None],
        stop: threading.Event,
    ) -> None:
        self._config = config
        self._boot = boot
        self._spool = spool
        self._identity = identity
        self._on_answer = on_answer
        self._stop = stop
        # Without a limit, as paho's thread must never wait; MAX_PENDING and the window bound what it holds.
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._link = Link(config, self._inbox.put)
        self._window = Window(config.link)
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._failure: BaseException | None = None
        self._room = threading.Condition()
        self._pending = self._pending_bytes = 0
        self._last_fresh = 0
        self._connected = False
        self._status_due_s = self._sweep_due_s = 0.0
        self.captured = self.sent = self.results = 0

    def __enter__(self) -> Delivery:
        self._link.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(_Stop())
        self._thread.join()
        self._link.stop(self.status("offline"))
        if self._failure is not None:
            raise self._failure

    @property
    def unanswered(self) -> int:
        """Frames taken and neither answered nor dropped."""
        return self._spool.rows + self._pending

    def put(self, entry: Entry, digest: int | None) -> None:
        """Take a frame; waits only while the disk is behind."""
        with self._room:
            self._wait(lambda: self._pending < MAX_PENDING)
            self._pending += 1
            self._pending_bytes += len(entry.message)
            self.captured += 1
        self._inbox.put(_Put(entry, digest))

    def drop(self, reason: str) -> None:
        """Count a frame that was lost before it became a message."""
        self._inbox.put(_Drop(reason))

    def wait_for_room(self, message_bytes: int) -> None:
        """Wait until another frame of `message_bytes` would push none out, or until stopped."""
        limit, max_bytes = self._config.capture.max_unanswered, self._config.spool.max_bytes

        def has_room() -> bool:
            stored_bytes = self._spool.stored_bytes + self._pending_bytes
            fits = self.unanswered < limit and stored_bytes + message_bytes <= max_bytes
            return fits or self.unanswered == 0

        with self._room:
            self._wait(has_room)

    def wait_until_answered(self) -> None:
        """Wait until every frame is answered, or until stopped."""
        with self._room:
            self._wait(lambda: self.unanswered == 0)

    def status(self, state: Literal["online", "offline"]) -> Status:
        """What the device says of itself now."""
        return Status(
            state,
            **self._identity,
            at_ns=time.time_ns(),
            queued=self.unanswered,
            captured=self.captured,
            sent=self.sent,
            results=self.results,
            dropped=dict(self._spool.dropped),
        )

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not ready() and not self._stop.is_set():
            self._room.wait(TICK_S)  # `stop` is set without a notice

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001  # __exit__ raises it: a dead thread must not go unnoticed
            self._failure = error
            self._stop.set()

    def _turn(self) -> bool:
        """Commit what came in, publish what is due; False after the last event."""
        events = self._take()
        now_s = time.monotonic()
        for event in events:
            self._follow(event, now_s)
        self._write(events, now_s)
        self._window.give_up(now_s)
        if self._connected:
            self._feed(now_s)
        return not any(isinstance(event, _Stop) for event in events)

    def _take(self) -> list[_Event]:
        """Everything in the inbox, waiting up to a tick for the first."""
        events: list[_Event] = []
        try:
            events.append(self._inbox.get(timeout=TICK_S))
            while True:
                events.append(self._inbox.get_nowait())
        except queue.Empty:
            return events

    def _follow(self, event: _Event, now_s: float) -> None:
        if isinstance(event, Acknowledged):
            self._window.acknowledge(event.mid, event.kept, now_s)
        elif isinstance(event, Connected):
            self._connected = True
            self._status_due_s = now_s
            if not event.resumed:  # a broker that forgot the session forgot the frames as well
                self._window.forget(now_s)
        elif isinstance(event, Disconnected):
            self._connected = False

    def _write(self, events: list[_Event], now_s: float) -> None:
        sweep = now_s >= self._sweep_due_s
        if not sweep and not any(isinstance(event, (_Put, _Drop, Replied)) for event in events):
            return
        with self._spool.transaction():
            for event in events:
                if isinstance(event, _Put):
                    self._spool.add(event.entry, event.digest)
                elif isinstance(event, _Drop):
                    self._spool.drop(event.reason)
                elif isinstance(event, Replied):
                    self._answer(event.reply, now_s)
            if sweep:
                self._sweep_due_s = now_s + SWEEP_S
                self._spool.expire(time.time_ns())
        # Until here such frames counted twice, which makes nobody believe that everything is answered.
        put = [event for event in events if isinstance(event, _Put)]
        with self._room:
            self._pending -= len(put)
            self._pending_bytes -= sum(len(event.entry.message) for event in put)
            self._room.notify_all()

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
        if entry.boot == self._boot:
            latency_ns = time.monotonic_ns() - entry.captured_tick_ns
        else:
            latency_ns = time.time_ns() - entry.captured_at_ns
        self._on_answer(
            Answer(entry.name, entry.boot, entry.sequence, reply, latency_ns / 1e6, len(entry.message))
        )

    def _feed(self, now_s: float) -> None:
        """Publish what is due while the window has room."""
        if now_s >= self._status_due_s:
            self._status_due_s = now_s + self._config.link.status_s
            self._link.publish_status(self.status("online"))
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
        entry = self._spool.first_after(self._last_fresh)
        if entry is not None:
            self._last_fresh = entry.row
        return entry, 0


def _boot_id(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""  # no frame has it
