"""What the service counts and measures, in Prometheus's format."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Generator, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

T = TypeVar("T")

LATENCY_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 15, 60, 300, 3600)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
PARTS = ("client", "decode", "inference", "store", "publish", "other")


class Metrics:
    """Instruments of one service, on their own registry so that two services can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.messages = Counter(
            "splitward_messages", "Messages taken from the broker.", ["outcome"], registry=registry
        )
        self.refusals = Counter("splitward_refusals", "Messages refused.", ["reason"], registry=registry)
        self.inferences = Counter(
            "splitward_inferences", "Frames that the server half answered.", ["model"], registry=registry
        )
        self.failures = Counter(
            "splitward_failures", "Attempts that failed and are made again.", ["part"], registry=registry
        )
        self.events_dropped = Counter(
            "splitward_events_dropped", "Events that a slow reader of /events missed.", registry=registry
        )
        self.batch_size = Histogram(
            "splitward_batch_size", "Frames in a micro-batch.", buckets=BATCH_BUCKETS, registry=registry
        )
        self.latency = Histogram(
            "splitward_latency_seconds",
            "From the capture of a frame to the commit of its result.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.held = Gauge("splitward_messages_held", "Activations that wait for a batch.", registry=registry)
        self.connected = Gauge("splitward_broker_connected", "1 while connected.", registry=registry)
        self.cpu = CpuClock()
        registry.register(self.cpu)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def expose(self) -> bytes:
        """Everything in the text format. Call it in the event loop's thread: `CpuClock` measures that one."""
        return generate_latest(self.registry)


class CpuClock(Collector):
    """CPU time of the process by part: `splitward_cpu_seconds_total{part=...}`.

    `decode`, `publish` and `store` are measured in the event loop, `inference` in its own thread. `client` is
    what else the event loop's thread spent: the MQTT client, and the API while someone reads it. `other` is
    every other thread: the database driver's and, with more than one engine thread, torch's.
    """

    def __init__(self) -> None:
        self._spent_s = dict.fromkeys(PARTS, 0.0)
        self._loop_from_s = time.thread_time()
        self._process_from_s = time.process_time()

    def charge(self, part: str, seconds: float) -> None:
        """Add `seconds` of CPU time to `part`."""
        self._spent_s[part] += seconds

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Charge this thread's CPU time within the block, which must not await, to `part`."""
        started_s = time.thread_time()
        try:
            yield
        finally:
            self.charge(part, time.thread_time() - started_s)

    def follow(self, part: str, work: Awaitable[T]) -> Awaitable[T]:
        """`work`, with the CPU time of its own steps charged to `part`, and none of what ran between them."""
        return _Followed(self, part, work)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called by the registry."""
        spent_s = dict(self._spent_s)
        loop_s = time.thread_time() - self._loop_from_s
        spent_s["client"] = max(0.0, loop_s - spent_s["decode"] - spent_s["publish"] - spent_s["store"])
        threads_s = time.process_time() - self._process_from_s - loop_s
        spent_s["other"] = max(0.0, threads_s - spent_s["inference"])
        family = CounterMetricFamily(
            "splitward_cpu_seconds", "CPU time by part of the service.", labels=["part"]
        )
        for part, seconds in spent_s.items():
            family.add_metric([part], seconds)
        yield family


class _Followed(Generic[T]):
    """Drives an awaitable step by step, timing each step."""

    def __init__(self, clock: CpuClock, part: str, work: Awaitable[T]) -> None:
        self._clock = clock
        self._part = part
        self._work = work

    def __await__(self) -> Generator[object, object, T]:
        steps = self._work.__await__()
        sent: object = None
        thrown: BaseException | None = None
        while True:
            with self._clock.measure(self._part):
                try:
                    pending = steps.send(sent) if thrown is None else steps.throw(thrown)
                except StopIteration as done:
                    result: T = done.value
                    return result
            thrown = None
            try:
                sent = yield pending
            except BaseException as error:  # noqa: BLE001  # handed on to the awaitable, as `yield from` does
                thrown = error
