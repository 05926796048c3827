"""The device agent: the releaser's messages -> spool -> publish; drop on result.

The releaser (releaser.py), a process of its own, captures, perturbs, runs the client half and seals. The agent keeps
what it releases until the cloud has answered, starts it again when it dies, and carries out signed orders.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

from msgspec import Struct

from edge import health
from edge.config import EdgeConfig
from edge.delivery import Answer, Delivery
from edge.errors import EdgeError, ReleaserError
from edge.link import Acknowledged, Connected, Disconnected, Link, LinkEvent, Ordered
from edge.metrics import Metric, MetricsServer, render
from edge.models import ModelStore
from edge.orders import OrderBook
from edge.pipe import Ready, Released
from edge.results import ResultsFile
from edge.secret import load_secret
from edge.spool import Entry, Spool
from edge.supervisor import FromRun, Launched, Supervisor, launch
from edge.updates import Done, Updates
from edge.upkeep import Upkeep
from splitward import __version__
from splitward.wire.control import Result, Status

TICK_S = 0.2
DRAIN_S = 2.0
log = logging.getLogger(__name__)
_Event = FromRun | LinkEvent | Done


class AgentReport(Struct, frozen=True):
    """What one start of the agent did.

    `sent` counts messages, repeats included; `queued` frames still wait in the spool for their result;
    `dropped` counts the frames lost by reason, since the spool was made. `restart`: an order wants it started anew.
    """

    boot: str
    captured: int
    sent: int
    results: int
    queued: int
    dropped: dict[str, int]
    restart: bool = False


def run_agent(
    config: EdgeConfig,
    on_answer: Callable[[Answer], None] | None = None,
    stop: threading.Event | None = None,
    until_answered: bool = False,
    releaser: Launched | None = None,
) -> AgentReport:
    """Run the agent until `stop` is set.

    Parameters
    ----------
    config : EdgeConfig
    on_answer : callable, optional
        Takes every `Answer`.
    stop : Event, optional
        Ends the agent; what is in the spool waits there for the next start.
    until_answered : bool
        End as well when every source has ended and every frame is answered.
    releaser : Launched, optional
        Launched before this module was imported, as its imports take longest.

    Raises
    ------
    BundleError
        The bundle is refused, and none ran before it; `.reason` says why.
    ReleaserError
        The releaser died too often: the agent is to be started anew.
    ConfigError, EdgeError
        The agent cannot start, or its spool cannot be written any more.
    """
    with ExitStack() as stack:
        agent = Agent(config, on_answer, stop or threading.Event(), stack, releaser or launch())
        return agent.run(until_answered)


class Agent:
    """One start of the agent; `stack` closes what it opens."""

    def __init__(
        self,
        config: EdgeConfig,
        on_answer: Callable[[Answer], None] | None,
        stop: threading.Event,
        stack: ExitStack,
        releaser: Launched,
    ) -> None:
        self._config = config
        self._stop = stop
        # Without a limit, as the link's thread must never wait; the window and the releaser's permits bound it.
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        post = self._inbox.put
        self._releaser = Supervisor(
            releaser, config, post, self._known, lambda: self._spool.strikes, self._strike, self._lose
        )
        stack.callback(self._releaser.stop)
        load_secret(config.device.secret_path)  # made here, where its folder is
        state = Path(config.device.state_dir)
        self._spool = stack.enter_context(closing(Spool(state / "spool.sqlite", config.spool)))
        self._upkeep = Upkeep(config, time.monotonic())
        self._link = Link(config, post)
        self._takers = _takers_of(config, on_answer, stack)
        self._delivery = Delivery(config, self._spool, self._link, self._answer)
        self._models = ModelStore(config)
        self._book = OrderBook(config, self._link.publish_outcome)
        self._book.model = self._model_id
        self._updates = Updates(config, self._models, self._book, post, self._releaser.retire)
        self._notifier = health.Notifier()
        self._started_s = time.monotonic()
        self._status_due_s = 0.0
        self._boot = ""
        self._figures = ""
        self._metrics_down: int | None = None
        if config.health.metrics is not None:
            try:
                stack.enter_context(closing(MetricsServer(config.health.metrics, lambda: self._figures)))
            except EdgeError as error:
                self._metrics_down = 1
                log.warning("there are no metrics: %s", error)

    def run(self, until_answered: bool) -> AgentReport:
        """Take what comes, and do what is due, until the end."""
        self._updates.resume()
        self._start_releaser(time.monotonic())
        self._link.start()
        self._notifier.say("READY=1", f"MAINPID={os.getpid()}")
        try:
            while not self._is_over(until_answered):
                events = self._take()
                now_s = time.monotonic()
                for event in events:
                    self._follow(event, now_s)  # releaser's messages, results, orders
                self._delivery.turn(now_s)  # spool, publish, drop on result
                self._supervise(now_s)
                self._tell(now_s)
        finally:
            self._notifier.say("STOPPING=1")
            self._updates.stop()
            self._drain_releaser()
            self._delivery.finish()
            self._link.stop(self._status("offline"))
        done = self._delivery
        return AgentReport(
            *(self._boot, done.captured, done.sent, done.results, done.unanswered, self._spool.dropped),
            restart=self._updates.restart,
        )

    @property
    def runtime_us_p50(self) -> float | None:
        """Median of the latest frames' microseconds within the runtime."""
        return _median(self._releaser.runtime_us)

    @property
    def releaser_us_p50(self) -> float | None:
        """Likewise, of the releaser's own time."""
        return _median(self._releaser.other_us)

    def _is_over(self, until_answered: bool) -> bool:
        if self._stop.is_set() or self._updates.restart:
            return True
        return until_answered and self._releaser.ended and not self._delivery.unanswered

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
        if isinstance(event, FromRun):
            if not self._releaser.is_current(event):
                return
            if event.message is None:
                self._bury_releaser(now_s)
                return
            released = self._releaser.follow(event.message, now_s)
            if isinstance(event.message, Ready):
                self._status_due_s = now_s
            if released is not None:
                self._spool_frame(released)
        elif isinstance(event, Done):
            self._updates.follow(event)
        elif isinstance(event, Ordered):
            order = self._book.take(event.payload)
            if order is not None:
                self._updates.take(order)
        else:
            self._delivery.follow(event, now_s)
            if isinstance(event, Connected):
                self._status_due_s = now_s
                self._book.connect(event.resumed)
            elif isinstance(event, Disconnected):
                self._book.disconnect()
            elif isinstance(event, Acknowledged):
                self._book.acknowledge(event.mid, event.kept)

    def _spool_frame(self, frame: Released) -> None:
        self._boot = frame.boot.hex()
        entry = Entry(
            *(0, frame.boot, frame.sequence, frame.name, frame.captured_at_ns, frame.captured_tick_ns),
            *(frame.priority, 0, frame.message),
        )
        self._delivery.put(entry, frame.digest)

    def _supervise(self, now_s: float) -> None:
        done = self._delivery
        if self._releaser.turn(now_s, done.safe, done.room, done.stalled):
            self._start_releaser(now_s)
        self._updates.turn(now_s, healthy=self._releaser.ready is not None)
        if self._upkeep.turn(now_s):
            self._link.reload()
        self._notifier.live(now_s)

    def _start_releaser(self, now_s: float) -> None:
        self._updates.note_start(now_s)
        bundle = str(self._models.path())
        self._releaser.start(self._config, bundle, self._delivery.captured)
        log.info("device %s starts its releaser with %s", self._config.device.id, bundle)

    def _bury_releaser(self, now_s: float) -> None:
        """The releaser has ended: by order, as its sources did, or as it should not."""
        try:
            self._releaser.bury(now_s)
        except ReleaserError as error:
            if not self._updates.fail_trial("crashed", str(error)):
                raise
            self._start_releaser(now_s)
            return
        unfit = self._releaser.unfit
        if unfit is not None:
            if not self._updates.fail_trial(getattr(unfit, "reason", "") or "unfit", str(unfit)):
                raise unfit
            self._start_releaser(now_s)

    def _drain_releaser(self) -> None:
        """Let the releaser end, and take what it had released."""
        self._releaser.retire()
        ends_s = time.monotonic() + DRAIN_S
        while self._releaser.is_running and time.monotonic() < ends_s:
            for event in self._take():
                if isinstance(event, FromRun) and self._releaser.is_current(event):
                    self._follow(event, time.monotonic())
        self._releaser.stop()

    def _known(self) -> bytes:
        return self._spool.digests()

    def _answer(self, answer: Answer) -> None:
        for taker in self._takers:
            taker(answer)
        ready = self._releaser.ready  # a bundle on trial is not judged by the frames of the one before it
        if ready is not None and answer.boot == ready.boot:
            self._updates.judge(good=isinstance(answer.reply, Result))

    def _strike(self, name: str) -> None:
        self._spool.strike(name)

    def _lose(self, reason: str, digest: int | None, name: str) -> None:
        self._spool.drop(reason)
        self._spool.forgive(name)
        if reason == "not_released":
            self._updates.judge(good=False)
        if digest is not None:
            self._spool.remember(digest)

    def _model_id(self) -> str:
        return self._models.active.model or ("" if self._releaser.ready is None else self._releaser.ready.model)

    def _tell(self, now_s: float) -> None:
        """Status and metrics, when they are due."""
        if now_s < self._status_due_s:
            return
        self._status_due_s = now_s + self._config.link.status_s
        if self._delivery.connected:
            self._link.publish_status(self._status("online"))
        if self._config.health.metrics is not None:
            self._figures = render(self._metrics())

    def _status(self, state: Literal["online", "offline"]) -> Status:
        """What the device says of itself now."""
        ready, done = self._releaser.ready, self._delivery
        return Status(
            state,
            version=__version__,
            model="" if ready is None else ready.model,
            model_name="" if ready is None else ready.model_name,
            runtime="" if ready is None else ready.runtime,
            at_ns=time.time_ns(),
            queued=done.unanswered,
            captured=done.captured,
            sent=done.sent,
            results=done.results,
            dropped=dict(self._spool.dropped),
            spooled_bytes=self._spool.stored_bytes,
            disk_free_bytes=health.disk_free_bytes(Path(self._config.device.state_dir)),
            temperature_c=health.temperature_c(),
            clock_skew_ms=done.clock_skew_ms,
            certificate_expires_at_ns=self._upkeep.certificate_expires_at_ns,
            health=self._health(),
        )

    def _health(self) -> dict[str, float]:
        releaser = self._releaser
        figures: dict[str, float | None] = {
            "restarts": releaser.restarts,
            "superseded": releaser.superseded,
            "disk_full": int(self._delivery.disk_full),
            "metrics_down": self._metrics_down,
            "uptime_s": round(health.uptime_s(self._started_s), 1),
            "agent_mb": health.memory_mb(),
            "releaser_mb": None if releaser.pid is None else health.memory_mb(releaser.pid),
            "runtime_us_p50": self.runtime_us_p50,
            "releaser_us_p50": self.releaser_us_p50,
            **{f"orders_refused:{reason}": count for reason, count in self._book.refused.items()},
        }
        return {key: value for key, value in figures.items() if value is not None}

    def _metrics(self) -> list[Metric]:
        status = self._status("online")
        counters = {"captured": status.captured, "sent": status.sent, "results": status.results}
        gauges = {
            "queued_frames": status.queued,
            "spooled_bytes": status.spooled_bytes,
            "connected": int(self._delivery.connected),
            "disk_free_bytes": status.disk_free_bytes,
            "temperature_celsius": status.temperature_c,
            "clock_skew_milliseconds": status.clock_skew_ms,
        }
        return [
            *(
                Metric(f"{name}_total", "counter", f"Frames: {name}.", {"": count})
                for name, count in counters.items()
            ),
            Metric("dropped_total", "counter", "Frames lost, by reason.", status.dropped, "reason"),
            *(
                Metric(name, "gauge", name.replace("_", " "), {"": value})
                for name, value in gauges.items()
                if value is not None
            ),
            Metric("health", "gauge", "Further figures by name.", status.health, "figure"),
        ]


def _median(values: Iterable[int]) -> float | None:
    ordered = sorted(values)
    return float(ordered[len(ordered) // 2]) if ordered else None


def _takers_of(
    config: EdgeConfig, on_answer: Callable[[Answer], None] | None, stack: ExitStack
) -> list[Callable[[Answer], None]]:
    """Everyone who wants to know of an answer."""
    takers = [] if on_answer is None else [on_answer]
    if config.device.results_file is not None:
        takers.append(stack.enter_context(closing(ResultsFile(Path(config.device.results_file)))).write)
    return takers
