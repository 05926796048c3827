"""The way of one message: decode, check, deduplicate, batch, infer, commit, reply, acknowledge.

Nothing is acknowledged before its result is committed, so what is interrupted comes again; and a frame that
comes again is answered from the store, so nothing is counted twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import numpy as np

from cloud.admission import Arrival, check
from cloud.batcher import Batcher
from cloud.config import CloudConfig
from cloud.engine import Engine, Scores
from cloud.errors import CloudError, EngineError, TransportError
from cloud.feed import Feed
from cloud.ledger import Ledger
from cloud.metrics import Metrics
from cloud.store import Key, Record, Store
from cloud.transport import Delivery, Transport
from splitward.errors import MessageError, WireError
from splitward.wire import topics
from splitward.wire.control import Refusal, Result, decode_status, encode_control
from splitward.wire.message import Activation, decode
from splitward.wire.server import ServerCard
from splitward.wire.tensor import dequantise

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 30.0


Answers = dict[Key, Record | MessageError]


class Pipeline:
    """Consumes the transport's deliveries until it is drained."""

    def __init__(
        self,
        config: CloudConfig,
        *,
        transport: Transport,
        engine: Engine,
        store: Store,
        metrics: Metrics,
        feed: Feed,
    ) -> None:
        self._transport = transport
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._feed = feed
        self._ledger = Ledger(store, metrics.failures, config.store.max_dead_letters)
        self._batcher: Batcher[Arrival] = Batcher(
            config.batch.max_size, config.batch.max_wait_ms / 1000, config.broker.max_in_flight
        )
        self._draining = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.failing: str | None = None
        """Why the batch in hand cannot be answered now; None while all is well."""
        metrics.held.set_function(lambda: self._batcher.held)
        metrics.connected.set_function(lambda: self._transport.connected)

    async def start(self) -> None:
        """Begin to consume."""
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._ledger.keep())]
        await self._transport.start(self.take)

    async def drain(self) -> None:
        """Take nothing more, answer what is in hand, and disconnect."""
        await self._transport.unsubscribe()
        self._draining.set()
        await self._batcher.close()
        worker, keeper = self._tasks
        await worker
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
        await self._ledger.write()
        await self._transport.stop()

    async def take(self, delivery: Delivery) -> None:
        """Decode and check one delivery; an activation goes on to a batch, everything else ends here."""
        received_at_ns = time.time_ns()
        activation: Activation | None = None
        try:
            with self._metrics.cpu.measure("decode"):
                site, device, kind = topics.parse(delivery.topic)
                if kind == "status":
                    self._ledger.note_device(site, device, received_at_ns, decode_status(delivery.payload))
                    self._finish(delivery, "status")
                    return
                activation = decode(delivery.payload)
                check(activation, device, self._engine.cards)
        except WireError as error:
            await self._refuse(delivery, activation, error)
            return
        self._ledger.note_device(site, device, received_at_ns)
        await self._batcher.put(activation.model, Arrival(delivery, site, activation, received_at_ns))

    async def _work(self) -> None:
        """Answer batch after batch."""
        while (batch := await self._batcher.take()) is not None:
            model, arrivals = batch
            await self._insist(self._engine.cards[model], arrivals)

    async def _insist(self, card: ServerCard, arrivals: list[Arrival]) -> None:
        """Answer one batch, trying again while engine or store fail: what is behind it would fare no better."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._answer(card, arrivals)
                break
            except CloudError as error:
                self.failing = str(error)
                self._metrics.failures.labels("engine" if isinstance(error, EngineError) else "store").inc()
                log.warning("a batch of %d cannot be answered now: %s", len(arrivals), error)
            except Exception:  # a fault of ours must not stop the service
                log.exception("a batch of %d is refused", len(arrivals))
                await self._give_up(arrivals)
                break
            if self._draining.is_set():
                break  # unacknowledged, so the broker keeps them
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _give_up(self, arrivals: list[Arrival]) -> None:
        """Refuse a batch: unacknowledged, it would hold up every later acknowledgement."""
        error = MessageError("internal_error", "the service failed on this frame; its log says how.")
        for arrival in arrivals:
            await self._refuse(arrival.delivery, arrival.activation, error)

    async def _answer(self, card: ServerCard, arrivals: list[Arrival]) -> None:
        """Deduplicate, infer, commit, reply, acknowledge; `CloudError` when the engine or the store fails."""
        cpu = self._metrics.cpu
        frames = {arrival.key: arrival for arrival in arrivals}
        answers: Answers = {}
        answers.update(await cpu.follow("store", self._store.find(frames.keys())))
        fresh = [arrival for key, arrival in frames.items() if key not in answers]
        if fresh:
            answers.update(await self._decide(card, fresh))
        records = [answer for arrival in fresh if isinstance(answer := answers[arrival.key], Record)]
        if records:
            await cpu.follow("store", self._store.add(records))
        self.failing = None
        self._feed.publish(records)
        for record in records:
            waited_ns = record.result.stored_at_ns - record.result.captured_at_ns
            self._metrics.latency.observe(max(0, waited_ns) / 1e9)
        first = set(fresh)
        for arrival in arrivals:
            outcome = "stored" if arrival in first else "duplicate"
            await self._reply(arrival, answers[arrival.key], outcome)

    async def _decide(self, card: ServerCard, arrivals: list[Arrival]) -> Answers:
        """Record of each arrival, or why it can never have one."""
        model = bytes.fromhex(card.model)
        stacked = np.stack([arrival.activation.values for arrival in arrivals])
        values = dequantise(stacked, card.release.scale)
        self._metrics.batch_size.observe(len(arrivals))
        try:
            scores = await self._engine.infer(model, values)
        except Exception as error:  # noqa: BLE001  # whatever a network raises, the service goes on
            await self._probe(card, error)
            if len(arrivals) == 1:
                return {arrivals[0].key: MessageError("engine_failed", f"the server half failed: {error}.")}
            half = len(arrivals) // 2  # isolates the one that fails, in few steps
            return await self._decide(card, arrivals[:half]) | await self._decide(card, arrivals[half:])
        self._metrics.inferences.labels(card.name).inc(len(arrivals))
        stored_at_ns = time.time_ns()
        return {
            arrival.key: _record(card, arrival, scores, row, stored_at_ns)
            for row, arrival in enumerate(arrivals)
        }

    async def _probe(self, card: ServerCard, cause: Exception) -> None:
        """Tell a bad activation from a bad engine: `EngineError` if the engine fails on zeros, too."""
        try:
            await self._engine.infer(bytes.fromhex(card.model), np.zeros((1, *card.release.shape), np.float32))
        except Exception as error:  # noqa: BLE001  # likewise
            raise EngineError(f"the server half of {card.name} fails on any input: {error}.") from cause

    async def _reply(self, arrival: Arrival, answer: Record | MessageError, outcome: str) -> None:
        if isinstance(answer, MessageError):
            await self._refuse(arrival.delivery, arrival.activation, answer)
        elif await self._send(arrival.delivery, answer.result):
            self._finish(arrival.delivery, outcome)

    async def _refuse(self, delivery: Delivery, activation: Activation | None, error: WireError) -> None:
        """Count and note a message that can never be answered, and tell the device if the frame is known."""
        self._metrics.refusals.labels(error.reason).inc()
        self._ledger.note_refusal(time.time_ns(), delivery.topic, error.reason, delivery.payload)
        if activation is not None:
            refusal = Refusal(activation.boot.hex(), activation.sequence, error.reason, str(error))
            if not await self._send(delivery, refusal):
                return
        self._finish(delivery, "refused")

    async def _send(self, delivery: Delivery, reply: Result | Refusal) -> bool:
        """Publish a reply to the delivery's device; False without a connection, when it comes again anyway."""
        site, device, _ = topics.parse(delivery.topic)
        topic, payload = topics.result(site, device), encode_control(reply)
        try:
            await self._metrics.cpu.follow("publish", self._transport.publish(topic, payload))
        except TransportError as error:
            self._metrics.failures.labels("publish").inc()
            log.debug("%s", error)
            return False
        return True

    def _finish(self, delivery: Delivery, outcome: str) -> None:
        self._transport.acknowledge(delivery)
        self._metrics.messages.labels(outcome).inc()


def _record(
    card: ServerCard, arrival: Arrival, scores: Scores, row: int, stored_at_ns: int
) -> Record | MessageError:
    """Record of the frame in `row`, or a refusal when its scores are no numbers."""
    decision = scores.decision[row]
    if not np.isfinite(decision).all():
        return MessageError("not_finite_scores", "the server half found no finite scores for this activation.")
    index = int(decision.argmax())
    device, boot, sequence = arrival.key
    result = Result(
        boot=boot,
        sequence=sequence,
        model=card.model,
        class_index=index,
        class_name=card.classes[index],
        scores=tuple(decision.tolist()),
        streams={name: int(indices[row]) for name, indices in scores.streams.items()},
        captured_at_ns=arrival.activation.captured_at_ns,
        stored_at_ns=stored_at_ns,
    )
    return Record(arrival.site, device, arrival.received_at_ns, result)
