"""The way of one message: decode, check, batch, infer, commit and deduplicate, reply, acknowledge.

Nothing is acknowledged before its result is committed, so what is interrupted comes again; and a frame that
comes again is answered with what the store has of it, so nothing is counted twice. The commit itself tells what
was there before: looking first would cost every frame a visit to the store, to save a rare one its inference. Two or
more batches are on their way at a time: one computes while the other commits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from cloud.admission import Arrival, check
from cloud.batcher import Batcher
from cloud.config import CloudConfig
from cloud.engine import Engine, Scores
from cloud.errors import CloudError, EngineError, TransportError
from cloud.feed import Feed
from cloud.ledger import Ledger
from cloud.metrics import Metrics
from cloud.record import Key, Record
from cloud.roster import Roster
from cloud.store import Store
from cloud.tracing import Tracing
from cloud.transport import Delivery, Transport
from splitward.errors import MessageError, WireError
from splitward.wire import topics
from splitward.wire.control import STREAMS, Outcome, Refusal, decode_outcome, decode_status, encode_control
from splitward.wire.control import Result as ResultMessage
from splitward.wire.message import Activation, decode
from splitward.wire.server import ServerCard
from splitward.wire.tensor import dequantise

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 30.0
TOPICS_KEPT = 1 << 16

Answers = dict[Key, Record | MessageError]
OnOutcome = Callable[[str, str, Outcome], None]

_parse = lru_cache(TOPICS_KEPT)(topics.parse)


@lru_cache(TOPICS_KEPT)
def _reply_topic(topic: str) -> str:
    site, device, _ = topics.parse(topic)
    return topics.result(site, device)


class Pipeline:
    """Consumes the transport's deliveries until it is drained; `on_outcome` is told what became of orders."""

    def __init__(
        self,
        config: CloudConfig,
        *,
        transport: Transport,
        engine: Engine,
        store: Store,
        metrics: Metrics,
        feed: Feed,
        tracing: Tracing | None = None,
        on_outcome: OnOutcome = lambda *_: None,
    ) -> None:
        self._transport = transport
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._feed = feed
        self._tracing = tracing or Tracing(config.trace, config.broker.client_id)
        self._limits = config.limits
        self._batches_at_once = config.engine.batches_at_once
        self._on_outcome = on_outcome
        self._ledger = Ledger(store, metrics, config.store.max_dead_letters)
        self._roster = Roster(store, metrics)
        self._batcher: Batcher[Arrival] = Batcher(config.batch.max_size, config.batch.max_wait_ms / 1000)
        self._draining = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._keepers: list[asyncio.Task[None]] = []
        self.failing: str | None = None
        """Why the batch in hand cannot be answered now; None while all is well."""
        metrics.held.set_function(lambda: self._batcher.held)
        metrics.connected.set_function(lambda: self._transport.connected)

    async def start(self) -> None:
        """Begin to consume; `StoreError`."""
        await self._roster.refresh()
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._batches_at_once)]
        self._keepers = [asyncio.create_task(one.keep()) for one in (self._ledger, self._roster)]
        await self._transport.start(self.take)

    async def drain(self) -> None:
        """Take nothing more, answer what is in hand, and disconnect."""
        await self._transport.unsubscribe()
        self._draining.set()
        self._batcher.close()
        await asyncio.gather(*self._workers)
        for keeper in self._keepers:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        await self._ledger.write()
        await self._transport.stop()

    def take(self, deliveries: Sequence[Delivery]) -> None:
        """Decode and check what came; activations go on to a batch, everything else ends here."""
        received_at_ns = time.time_ns()
        arrivals: dict[bytes, list[Arrival]] = {}
        with self._metrics.cpu.measure("decode"):
            for delivery in deliveries:
                arrival = self._admit(delivery, received_at_ns)
                if arrival is not None:
                    arrivals.setdefault(arrival.activation.model, []).append(arrival)
        for model, some in arrivals.items():
            self._batcher.put(model, some)

    def _admit(self, delivery: Delivery, received_at_ns: int) -> Arrival | None:
        """The arrival of an activation that may enter a batch."""
        activation: Activation | None = None
        try:
            site, device, kind = _parse(delivery.topic)
            if kind == "activation":
                activation = decode(delivery.payload)
            self._roster.check(site, device)
            if activation is not None:
                check(activation, device, self._engine.cards, received_at_ns, self._limits)
                self._ledger.note_seen(site, device, received_at_ns)
                key = (device, activation.boot.hex(), activation.sequence)
                return Arrival(delivery, site, activation, received_at_ns, key)
            if kind == "status":
                self._ledger.note_status(site, device, received_at_ns, decode_status(delivery.payload))
            elif kind == "outcome":
                self._on_outcome(site, device, decode_outcome(delivery.payload))
            else:
                raise MessageError("bad_topic", f"a device does not send on its {kind} topic.")
        except WireError as error:
            self._refuse(delivery, activation, error)
        else:
            self._finish([delivery], kind)
        return None

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
                with self._tracing.span("batch", model=card.name, frames=len(arrivals)):
                    await self._answer(card, arrivals)
                break
            except CloudError as error:
                self.failing = str(error)
                self._metrics.failures.labels("engine" if isinstance(error, EngineError) else "store").inc()
                log.warning("a batch of %d cannot be answered now: %s", len(arrivals), error)
            except Exception:  # a fault of ours must not stop the service
                log.exception("a batch of %d is refused", len(arrivals))
                self._give_up(arrivals)
                break
            if self._draining.is_set():
                break  # unacknowledged, so the broker keeps them
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _give_up(self, arrivals: list[Arrival]) -> None:
        """Refuse a batch: unacknowledged, it would hold up every later acknowledgement."""
        error = MessageError("internal_error", "the service failed on this frame; its log says how.")
        for arrival in arrivals:
            self._refuse(arrival.delivery, arrival.activation, error)

    async def _answer(self, card: ServerCard, arrivals: list[Arrival]) -> None:
        """Infer, commit, reply, acknowledge; `CloudError` when the engine or the store fails."""
        fresh: dict[Key, Arrival] = {}
        for arrival in arrivals:
            fresh.setdefault(arrival.key, arrival)
        answers = await self._decide(card, list(fresh.values()))
        records = [answer for answer in answers.values() if isinstance(answer, Record)]
        if records:
            with self._tracing.span("commit", frames=len(records)):
                earlier = await self._metrics.cpu.follow("store", self._store.add(records))
            if earlier:  # sent again, or another batch or worker was first
                answers |= earlier
                records = [record for record in records if record.key not in earlier]
        self.failing = None
        with self._tracing.span("reply"), self._metrics.cpu.measure("publish"):
            self._feed.publish(records, fresh)
            self._measure(records)
            self._reply(arrivals, answers, {record.key for record in records})

    async def _decide(self, card: ServerCard, arrivals: list[Arrival], *, again: bool = False) -> Answers:
        """Record of each arrival, or why it can never have one; `again` says that it failed alone before."""
        stacked = np.stack([arrival.activation.values for arrival in arrivals])
        values = dequantise(stacked, card.release.scale)
        self._metrics.batch_size.observe(len(arrivals))
        try:
            with self._tracing.span("infer", frames=len(arrivals)):
                scores = await self._engine.infer(bytes.fromhex(card.model), values)
        except EngineError:
            raise  # the engine knows that it is not the batch's fault
        except Exception as error:  # noqa: BLE001  # whatever a network raises, the service goes on
            await self._probe(card, error)
            if again:
                return {arrivals[0].key: MessageError("engine_failed", f"the server half failed: {error}.")}
            if len(arrivals) == 1:  # refused, it would be lost; a want of memory passes
                return await self._decide(card, arrivals, again=True)
            half = len(arrivals) // 2  # isolates the one that fails, in few steps
            return await self._decide(card, arrivals[:half]) | await self._decide(card, arrivals[half:])
        self._metrics.inferences.labels(card.name).inc(len(arrivals))
        return _records(card, arrivals, scores, time.time_ns())

    async def _probe(self, card: ServerCard, cause: Exception) -> None:
        """Tell a bad activation from a bad engine: `EngineError` if the engine fails on zeros, too."""
        try:
            await self._engine.infer(bytes.fromhex(card.model), np.zeros((1, *card.release.shape), np.float32))
        except Exception as error:  # noqa: BLE001  # likewise
            raise EngineError(f"the server half of {card.name} fails on any input: {error}.") from cause

    def _measure(self, records: list[Record]) -> None:
        metrics = self._metrics
        metrics.latency.observe(
            *[max(0, one.result.stored_at_ns - one.result.captured_at_ns) / 1e9 for one in records]
        )
        now_ns = time.time_ns()
        metrics.service.observe(*[(now_ns - one.received_at_ns) / 1e9 for one in records])

    def _reply(self, arrivals: list[Arrival], answers: Answers, stored: set[Key]) -> None:
        """Answer every arrival; the first of each stored key counts as stored, the others as duplicates."""
        done: list[Delivery] = []
        duplicates: list[Delivery] = []
        for arrival in arrivals:
            answer, delivery = answers[arrival.key], arrival.delivery
            if isinstance(answer, Record) and answer.checksum != arrival.checksum:
                answer = MessageError(
                    "replay", "another frame was sent under this boot id and sequence number."
                )
            if isinstance(answer, MessageError):
                self._refuse(delivery, arrival.activation, answer)
            elif self._send(delivery, encode_control(answer.result)):
                (done if arrival.key in stored else duplicates).append(delivery)
                stored.discard(arrival.key)
        self._finish(done, "stored")
        self._finish(duplicates, "duplicate")

    def _refuse(self, delivery: Delivery, activation: Activation | None, error: WireError) -> None:
        """Count and note a message that can never be answered, and tell the device if the frame is known."""
        self._metrics.refusals.labels(error.reason).inc()
        self._ledger.note_refusal(time.time_ns(), delivery.topic, error.reason, delivery.payload)
        if activation is not None:
            refusal = Refusal(activation.boot.hex(), activation.sequence, error.reason, str(error))
            if not self._send(delivery, encode_control(refusal)):
                return
        self._finish([delivery], "refused")

    def _send(self, delivery: Delivery, payload: bytes) -> bool:
        """Publish a reply to the delivery's device; False without a connection, when it comes again anyway."""
        try:
            self._transport.publish(_reply_topic(delivery.topic), payload)
        except TransportError as error:
            self._metrics.failures.labels("publish").inc()
            log.debug("%s", error)
            return False
        return True

    def _finish(self, deliveries: list[Delivery], outcome: str) -> None:
        if deliveries:
            acknowledge = self._transport.acknowledge
            for delivery in deliveries:
                acknowledge(delivery)
            self._metrics.messages.labels(outcome).inc(len(deliveries))


def _records(card: ServerCard, arrivals: Iterable[Arrival], scores: Scores, stored_at_ns: int) -> Answers:
    """Record of each arrival, or a refusal where its scores are no numbers."""
    finite = np.asarray(np.isfinite(scores.decision).all(axis=1)).tolist()
    chosen = scores.decision.argmax(axis=1).tolist()
    rows = zip(arrivals, finite, chosen, scores.decision.tolist(), scores.streams.tolist(), strict=True)
    answers: Answers = {}
    for arrival, numbers, index, decision, streams in rows:
        if not numbers:
            answers[arrival.key] = MessageError(
                "not_finite_scores", "the server half found no finite scores for this activation."
            )
            continue
        device, boot, sequence = arrival.key
        result = ResultMessage(
            boot,
            sequence,
            card.model,
            index,
            card.classes[index],
            tuple(decision),
            dict(zip(STREAMS, streams, strict=True)),
            arrival.activation.captured_at_ns,
            stored_at_ns,
        )
        answers[arrival.key] = Record(arrival.site, device, arrival.received_at_ns, result, arrival.checksum)
    return answers
