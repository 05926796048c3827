"""The way of a message: answered once, refused with a reason, or left to the broker."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from cloud.config import LimitsConfig
from cloud.errors import StoreError
from splitward.wire import topics
from splitward.wire.control import Outcome, Refusal, Result, Status, encode_control
from splitward.wire.message import encode

pytestmark = pytest.mark.anyio


async def test_an_activation_is_committed_answered_and_then_acknowledged(cloud):
    await cloud.send(cloud.activation(7, (0, 0, 9)))
    topic, result = cloud.transport.published[0]
    assert topic == "splitward/v1/ward/pi-1/result"
    assert isinstance(result, Result)
    assert (result.sequence, result.class_index, result.class_name) == (7, 2, "two")
    assert sum(result.scores) == pytest.approx(1, abs=1e-6)
    assert result.streams == {"attacked": 2, "recovered": 2, "fused": 2}
    assert cloud.transport.steps == ["reply", "acknowledge"]
    stored = (await cloud.parts.store.page()).results[0]
    assert stored.result == result
    assert (stored.site, stored.device) == ("ward", "pi-1")
    assert cloud.metric("splitward_messages_total", outcome="stored") == 1


async def test_nothing_is_acknowledged_before_the_commit(cloud, monkeypatch):
    add, entered, gate = cloud.parts.store.add, asyncio.Event(), asyncio.Event()

    async def slow_add(records):
        entered.set()
        await gate.wait()
        return await add(records)

    monkeypatch.setattr(cloud.parts.store, "add", slow_add)
    delivery = await cloud.send(cloud.activation(), answered=False)
    await asyncio.wait_for(entered.wait(), 5)
    assert cloud.transport.steps == []
    gate.set()
    await asyncio.wait_for(delivery.done.wait(), 5)


async def test_a_frame_sent_again_is_answered_from_the_store(cloud):
    await cloud.send(cloud.activation(1))
    await cloud.send(cloud.activation(1))
    first, second = (reply for _, reply in cloud.transport.published)
    assert first == second
    assert cloud.metric("splitward_messages_total", outcome="stored") == 1
    assert cloud.metric("splitward_messages_total", outcome="duplicate") == 1


async def test_another_frame_under_the_same_name_is_refused_as_a_replay(cloud):
    await cloud.send(cloud.activation(1))
    await cloud.send(cloud.activation(1, (9, 0, 0)))
    first, second = (reply for _, reply in cloud.transport.published)
    assert isinstance(first, Result)
    assert second.reason == "replay"
    assert [one.result for one in (await cloud.parts.store.page()).results] == [first]


async def test_another_frame_under_the_same_name_in_one_batch_is_refused_too(cloud):
    deliveries = [await cloud.send(cloud.activation(1, (n, 0, 0)), answered=False) for n in (1, 2)]
    await asyncio.wait_for(asyncio.gather(*(one.done.wait() for one in deliveries)), 5)
    assert [getattr(reply, "reason", "result") for _, reply in cloud.transport.published] == [
        "result",
        "replay",
    ]


async def test_a_wrong_clock_costs_no_frame_unless_the_operator_says_so(run_cloud):
    ahead_ns = time.time_ns() + 600_000_000_000
    async with run_cloud() as cloud:
        await cloud.send(cloud.activation(1, captured_at_ns=ahead_ns))
        assert isinstance(cloud.transport.published[0][1], Result)
    async with run_cloud(limits=LimitsConfig(max_ahead_s=300.0)) as cloud:
        await cloud.send(cloud.activation(2, captured_at_ns=ahead_ns))
        assert cloud.transport.published[0][1].reason == "clock_skew"


async def test_an_outcome_is_noted_and_a_message_on_a_topic_of_ours_is_refused(cloud):
    await cloud.transport.send(
        topics.outcome("ward", "pi-1"), encode_control(Outcome("0" * 32, "bundle", "done"))
    )
    await cloud.transport.send(topics.result("ward", "pi-1"), b"{}")
    assert cloud.metric("splitward_messages_total", outcome="outcome") == 1
    assert cloud.metric("splitward_refusals_total", reason="bad_topic") == 1


async def test_a_frame_is_answered_from_the_store_after_a_restart(run_cloud):
    async with run_cloud() as cloud:
        await cloud.send(cloud.activation(1))
    async with run_cloud() as again:
        await again.send(again.activation(1))
        assert again.transport.published == cloud.transport.published


async def test_frames_share_a_batch_and_a_frame_twice_in_it_counts_once(cloud):
    cloud.engine.gate.clear()
    first = await cloud.send(cloud.activation(0), answered=False)
    rest = [await cloud.send(cloud.activation(n), answered=False) for n in (1, 2, 2, 3)]
    cloud.engine.gate.set()
    await asyncio.wait_for(asyncio.gather(*(d.done.wait() for d in [first, *rest])), 5)
    assert sum(cloud.engine.batches) == 4
    assert len((await cloud.parts.store.page()).results) == 4
    assert len(cloud.transport.published) == 5


BAD = [
    ("wrong_device", {"device": "pi-2"}),
    ("unknown_model", {"model": b"?" * 16}),
    ("wrong_shape", {"values": np.zeros((3, 1), np.int8)}),
    ("wrong_dtype", {"values": np.zeros(3, np.float32)}),
    ("wrong_scale", {"scale": 0.5}),
    ("wrong_scale", {"zero_point": 1}),
]


@pytest.mark.parametrize(("reason", "changes"), BAD)
async def test_an_unfit_activation_is_refused_and_the_service_goes_on(cloud, reason, changes):
    bad = cloud.activation(**({"sequence": 4} | changes))
    await cloud.send(bad)
    topic, refusal = cloud.transport.published[0]
    assert topic == "splitward/v1/ward/pi-1/result"
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.sequence, refusal.boot) == (reason, bad.sequence, bad.boot.hex())
    assert cloud.metric("splitward_refusals_total", reason=reason) == 1
    await cloud.send(cloud.activation(5))
    assert isinstance(cloud.transport.published[1][1], Result)


@pytest.mark.parametrize(
    ("topic", "payload", "reason"),
    [
        (topics.activation("ward", "pi-1"), b"", "truncated"),
        (topics.activation("ward", "pi-1"), b"x" * 300, "bad_magic"),
        ("splitward/v1/ward/pi-1", b"x", "bad_topic"),
        ("splitward/v1/../pi-1/activation", b"x", "bad_topic"),
        (topics.status("ward", "pi-1"), b"{", "bad_json"),
        (topics.status("ward", "pi-1"), b"x" * 70_000, "oversize"),
    ],
)
async def test_a_broken_message_is_counted_buried_and_acknowledged(run_cloud, topic, payload, reason):
    async with run_cloud() as cloud:
        delivery = await cloud.transport.send(topic, payload)
        assert cloud.transport.acknowledged == [delivery]
        assert cloud.transport.published == []
        assert cloud.metric("splitward_refusals_total", reason=reason) == 1
    async with run_cloud() as again:
        letter = (await again.parts.store.dead_letters())[0]
    assert (letter.reason, letter.topic, letter.head) == (reason, topic, payload[:256].hex())


async def test_the_dead_letters_are_bounded(run_cloud):
    for _ in range(2):
        async with run_cloud() as cloud:
            for size in range(4):
                await cloud.transport.send(topics.activation("ward", "pi-1"), bytes(size))
    async with run_cloud() as again:
        assert [len(x.head) // 2 for x in await again.parts.store.dead_letters()] == [3, 2, 1, 0, 3]


async def test_a_failing_engine_leaves_messages_unacknowledged_until_it_recovers(cloud):
    cloud.engine.broken = True
    delivery = await cloud.send(cloud.activation(), answered=False)
    await asyncio.wait_for(cloud.engine.failed.wait(), 5)
    assert cloud.transport.steps == []
    cloud.engine.broken = False
    await asyncio.wait_for(delivery.done.wait(), 5)
    assert isinstance(cloud.transport.published[0][1], Result)
    assert cloud.parts.pipeline.failing is None


async def test_a_failing_store_leaves_messages_unacknowledged_until_it_recovers(cloud, monkeypatch):
    failed = asyncio.Event()

    async def fail(records):
        failed.set()
        raise StoreError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(cloud.parts.store, "add", fail)
        delivery = await cloud.send(cloud.activation(), answered=False)
        await asyncio.wait_for(failed.wait(), 5)
        assert cloud.transport.steps == []
    await asyncio.wait_for(delivery.done.wait(), 5)
    assert cloud.metric("splitward_failures_total", part="store") == 1


async def test_an_activation_that_breaks_the_engine_is_refused_and_its_company_is_answered(cloud):
    cloud.engine.gate.clear()
    waits = [await cloud.send(cloud.activation(n), answered=False) for n in (0, 1)]
    waits.append(await cloud.send(cloud.activation(2, (99, 0, 0)), answered=False))
    waits.append(await cloud.send(cloud.activation(3), answered=False))
    cloud.engine.gate.set()
    await asyncio.wait_for(asyncio.gather(*(d.done.wait() for d in waits)), 5)
    replies = {reply.sequence: reply for _, reply in cloud.transport.published}
    assert replies[2].reason == "engine_failed"
    assert all(isinstance(replies[n], Result) for n in (0, 1, 3))


@pytest.mark.parametrize("frames", [1, 2])
async def test_a_failure_that_passes_costs_no_frame(cloud, monkeypatch, frames):
    infer, failures = cloud.engine.infer, iter(range(frames))

    async def fails_at_first(model, activations):
        if activations.any() and next(failures, None) is not None:  # never on the probe
            raise RuntimeError("CUDA out of memory")
        return await infer(model, activations)

    monkeypatch.setattr(cloud.engine, "infer", fails_at_first)
    cloud.engine.gate.clear()
    waits = [await cloud.send(cloud.activation(n), answered=False) for n in range(frames)]
    cloud.engine.gate.set()
    await asyncio.wait_for(asyncio.gather(*(d.done.wait() for d in waits)), 5)
    assert [type(reply) for _, reply in cloud.transport.published] == [Result] * frames


async def test_an_engine_that_is_gone_when_a_frame_is_tried_again_costs_no_frame(cloud, monkeypatch):
    infer, calls = cloud.engine.infer, []

    async def dies_after_the_probe(model, activations):
        calls.append(activations)
        if len(calls) in (1, 3, 4):  # the frame, the frame again, and the probe after it
            raise RuntimeError("CUDA error")
        return await infer(model, activations)

    monkeypatch.setattr(cloud.engine, "infer", dies_after_the_probe)
    await cloud.send(cloud.activation())
    assert isinstance(cloud.transport.published[0][1], Result)
    assert cloud.metric("splitward_failures_total", part="engine") == 1


async def test_scores_that_are_no_numbers_are_refused(cloud, monkeypatch):
    infer = cloud.engine.infer

    async def without_numbers(model, activations):
        scores = await infer(model, activations)
        scores.decision[:] = np.nan
        return scores

    monkeypatch.setattr(cloud.engine, "infer", without_numbers)
    await cloud.send(cloud.activation())
    assert cloud.transport.published[0][1].reason == "not_finite_scores"
    assert (await cloud.parts.store.page()).results == []


async def test_without_a_connection_the_result_is_kept_and_the_message_comes_again(cloud):
    cloud.transport.connected = False
    written = asyncio.Event()
    add = cloud.parts.store.add

    async def noted_add(records):
        earlier = await add(records)
        written.set()
        return earlier

    cloud.parts.store.add = noted_add
    delivery = await cloud.send(cloud.activation(), answered=False)
    await asyncio.wait_for(written.wait(), 5)
    cloud.transport.connected = True
    await cloud.send(cloud.activation())
    assert not delivery.done.is_set()
    assert cloud.metric("splitward_messages_total", outcome="duplicate") == 1


async def test_draining_answers_what_is_in_hand_and_takes_nothing_more(run_cloud):
    async with run_cloud(max_wait_ms=60_000) as cloud:
        delivery = await cloud.send(cloud.activation(), answered=False)
    late = await cloud.send(cloud.activation(1), answered=False)
    assert delivery.done.is_set()
    assert not late.done.is_set()
    assert cloud.transport.steps == ["unsubscribe", "reply", "acknowledge", "stop"]


async def test_draining_gives_up_on_a_failing_engine(run_cloud):
    async with run_cloud() as cloud:
        cloud.engine.broken = True
        delivery = await cloud.send(cloud.activation(), answered=False)
        await asyncio.wait_for(cloud.engine.failed.wait(), 5)
    assert not delivery.done.is_set()


async def test_a_status_is_kept_and_a_later_activation_does_not_erase_it(run_cloud):
    status = Status("online", version="0.1.0", model_name="digits", queued=3, dropped={"expired": 2})
    async with run_cloud() as cloud:
        await cloud.transport.send(topics.status("ward", "pi-1"), encode_control(status))
    async with run_cloud() as cloud:
        await cloud.send(cloud.activation())
    async with run_cloud() as again:
        device = (await again.parts.store.devices())[0]
    assert (device.site, device.device, device.status) == ("ward", "pi-1", status)


async def test_a_fault_of_ours_refuses_one_batch_and_does_not_stop_the_service(cloud, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("cloud.pipeline.dequantise", None)
        await cloud.send(cloud.activation())
    await cloud.send(cloud.activation(1))
    refusal, result = (reply for _, reply in cloud.transport.published)
    assert refusal.reason == "internal_error"
    assert isinstance(result, Result)


async def test_cpu_time_is_accounted_by_part(cloud):
    await cloud.send(cloud.activation())
    text = cloud.parts.metrics.expose().decode()
    for part in ("client", "decode", "inference", "store", "publish", "other"):
        assert f'splitward_cpu_seconds_total{{part="{part}"}}' in text
    assert cloud.metric("splitward_cpu_seconds_total", part="store") > 0
    assert encode(cloud.activation())  # the message is of the real wire format
