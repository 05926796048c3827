"""What the service counts and measures, in Prometheus's format."""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Awaitable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

T = TypeVar("T")

RECENT_NS = 3600 * 10**9
"""How long a roll-out or a training that has ended is counted."""
LATENCY_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 15, 60, 300, 3600)
SERVICE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
PARTS = ("client", "decode", "inference", "store", "publish", "other")
_IN_THREADS = ("inference", "store")


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
        self.requests = Counter("splitward_requests", "HTTP requests.", ["method", "status"], registry=registry)
        self.events_dropped = Counter(
            "splitward_events_dropped", "Events that a slow reader of the stream missed.", registry=registry
        )
        self.batch_size = BatchHistogram(
            "splitward_batch_size", "Frames in a micro-batch.", BATCH_BUCKETS, registry
        )
        self.latency = BatchHistogram(
            "splitward_latency_seconds",
            "From the capture of a frame to the commit of its result.",
            LATENCY_BUCKETS_S,
            registry,
        )
        self.service = BatchHistogram(
            "splitward_service_seconds",
            "From the arrival of a message to the commit of its result.",
            SERVICE_BUCKETS_S,
            registry,
        )
        self.held = Gauge("splitward_messages_held", "Activations that wait for a batch.", registry=registry)
        self.connected = Gauge("splitward_broker_connected", "1 while connected.", registry=registry)
        self.devices_queued = Gauge(
            "splitward_devices_queued",
            "Frames in the spools of the devices that this worker heard of, by their last status.",
            registry=registry,
        )
        self.rollouts = Gauge(
            "splitward_rollouts",
            "Roll-outs of bundles that run, or ended within the hour, by state.",
            ["state"],
            registry=registry,
        )
        self.trainings = Gauge(
            "splitward_trainings", "Trainings across sites, by state.", ["state"], registry=registry
        )
        self.revocations_fetched = Gauge(
            "splitward_revocations_fetched_timestamp_seconds",
            "When the list of revoked certificates was last asked for; at first, when this worker started.",
            registry=registry,
        )
        self.revocations_fetched.set_to_current_time()
        self.certificate_expires = Gauge(
            "splitward_certificate_expires_timestamp_seconds",
            "When this worker's certificate ends, by whom it is shown to.",
            ["to"],
            registry=registry,
        )
        self.cpu = CpuClock()
        registry.register(self.cpu)
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def expose(self) -> bytes:
        """Everything in the text format. Call it in the event loop's thread: `CpuClock` measures that one."""
        return generate_latest(self.registry)


class BatchHistogram(Collector):
    """A histogram that takes a whole batch of values at once, for a fraction of the client library's cost."""

    def __init__(self, name: str, text: str, limits: Iterable[float], registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._limits = tuple(map(float, limits))
        self._counts = [0] * (len(self._limits) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, *values: float) -> None:
        """Count `values`."""
        limits, counts = self._limits, self._counts
        for value in values:
            counts[bisect.bisect_left(limits, value)] += 1
        self._sum += sum(values)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """Called by the registry."""
        total, buckets = 0, list[tuple[str, float]]()
        for limit, count in zip((*map(str, self._limits), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((limit, total))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)


class CpuClock(Collector):
    """CPU time of the process by part: `splitward_cpu_seconds_total{part=...}`.

    `decode` and `publish` are measured in the event loop; `inference` and, on SQLite, `store` in their own threads.
    `client` is what else the event loop's thread spent: the MQTT client, batching, and the API while someone reads
    it. `other` is every other thread: other databases' drivers and, with more than one engine thread, its workers.
    """

    def __init__(self) -> None:
        self._loop_s = dict.fromkeys(PARTS, 0.0)
        self._threads_s = dict.fromkeys(_IN_THREADS, 0.0)
        self._lock = threading.Lock()
        self._loop_from_s = time.thread_time()
        self._process_from_s = time.process_time()

    def charge(self, part: str, seconds: float) -> None:
        """Add CPU time that a thread beside the event loop's spent on `part`."""
        with self._lock:
            self._threads_s[part] += seconds

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Charge the event loop's CPU time within the block, which must not await, to `part`."""
        started_s = time.thread_time()
        try:
            yield
        finally:
            self._loop_s[part] += time.thread_time() - started_s

    def follow(self, part: str, work: Awaitable[T]) -> Awaitable[T]:
        """`work`, with the CPU time of its own steps charged to `part`, and none of what ran between them."""
        return _Followed(self, part, work)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Called by the registry."""
        loop_s = time.thread_time() - self._loop_from_s
        threads_s = time.process_time() - self._process_from_s - loop_s
        with self._lock:
            spent_s = {part: self._loop_s[part] + self._threads_s.get(part, 0.0) for part in PARTS}
            spent_s["client"] = max(0.0, loop_s - sum(self._loop_s.values()))
            spent_s["other"] = max(0.0, threads_s - sum(self._threads_s.values()))
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
