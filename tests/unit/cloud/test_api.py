from __future__ import annotations

import asyncio
import re

import pytest

from cloud import feed
from cloud.config import ApiConfig
from cloud.errors import StoreError
from cloud.feed import MAX_READERS, QUEUE_SIZE
from splitward.wire import topics
from splitward.wire.control import Status, encode_control

pytestmark = pytest.mark.anyio


async def test_health_and_readiness(cloud):
    assert (await cloud.http.get("/healthz")).status_code == 200
    answer = await cloud.http.get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "reasons": []})


async def test_unready_says_why(cloud, monkeypatch):
    async def fail():
        raise StoreError("the disk is gone")

    monkeypatch.setattr(cloud.parts.store, "check", fail)
    cloud.transport.connected = False
    cloud.engine.cards = {}
    cloud.parts.pipeline.failing = "no such kernel"
    answer = await cloud.http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["reasons"] == [
        "the broker is not connected", "no model is loaded", "no such kernel", "the disk is gone",
    ]  # fmt: skip


async def test_results_by_page(cloud):
    for sequence in range(5):
        await cloud.send(cloud.activation(sequence))
    page = (await cloud.http.get("/v1/results?after=0&limit=3&device=pi-1")).json()
    rest = (await cloud.http.get("/v1/results", params={"after": page["next"]})).json()
    assert [item["result"]["sequence"] for item in page["results"] + rest["results"]] == [0, 1, 2, 3, 4]
    end = (await cloud.http.get("/v1/results", params={"after": rest["next"]})).json()
    assert end == {"results": [], "next": rest["next"]}


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "after=yesterday"])
async def test_a_query_of_no_sense_is_refused(cloud, query):
    assert (await cloud.http.get(f"/v1/results?{query}")).status_code == 422


async def test_a_failing_store_is_503(cloud, monkeypatch):
    async def fail(**query):
        raise StoreError("the disk is gone")

    monkeypatch.setattr(cloud.parts.store, "page", fail)
    assert (await cloud.http.get("/v1/results")).status_code == 503


async def test_devices_and_models(run_cloud):
    async with run_cloud() as cloud:
        payload = encode_control(Status("online", runtime="onnx-int8", queued=2))
        await cloud.transport.send(topics.status("ward", "pi-1"), payload)
    async with run_cloud() as again:
        page = (await again.http.get("/v1/devices")).json()
        models = (await again.http.get("/v1/models")).json()
    assert page["next"] == "ward/pi-1"
    assert page["devices"][0]["status"]["runtime"] == "onnx-int8"
    assert models["models"][0]["classes"] == ["zero", "one", "two"]


async def test_metrics_are_exposed(cloud):
    await cloud.send(cloud.activation())
    text = (await cloud.http.get("/metrics")).text
    assert 'splitward_inferences_total{model="digits"} 1.0' in text
    assert "splitward_latency_seconds_bucket" in text
    assert "splitward_broker_connected 1.0" in text


async def test_the_dashboard_runs_under_a_strict_policy(cloud):
    page = await cloud.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "not a medical device" in page.text.lower()
    assert not re.search(r"<script(?![^>]*src=)|\sstyle=|\son\w+=|https?://", page.text)
    for path in re.findall(r'(?:href|src)="(dashboard/[^"]+)"', page.text):
        part = await cloud.http.get(f"/{path}")
        assert part.status_code == 200
        assert part.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write", part.text)


async def test_another_host_name_is_refused(cloud):
    answer = await cloud.http.get("/v1/results", headers={"Host": "attacker.example"})
    assert answer.status_code == 400


async def anybody() -> bool:
    return True


async def test_a_new_result_is_an_event(cloud):
    stream = cloud.parts.feed.stream(anybody)
    assert await anext(stream) == b": open\n\n"
    await cloud.send(cloud.activation(3))
    event = await asyncio.wait_for(anext(stream), 5)
    assert event.startswith(b'event: result\ndata: {"site":"ward","device":"pi-1"')
    cloud.parts.feed.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(stream), 5)


async def test_a_stream_ends_soon_after_its_token_is_revoked(run_cloud, monkeypatch):
    monkeypatch.setattr(feed, "KEEP_ALIVE_S", 0.02)
    async with run_cloud(api=ApiConfig()) as cloud:
        access, found = cloud.parts.access, asyncio.Queue()
        secret = await access.create("viewer", ("read",), "test")
        is_good, outages = access.is_good, iter([True])

        async def noted(request) -> bool:
            if next(outages, False):
                raise StoreError("the database is away")
            good = await is_good(request)
            found.put_nowait(good)
            return good

        monkeypatch.setattr(access, "is_good", noted)
        stream = asyncio.create_task(
            cloud.http.get("/v1/events", headers={"Authorization": f"Bearer {secret}"})
        )
        async with asyncio.timeout(10):
            assert [await found.get() for _ in range(3)] == [True] * 3
            assert not stream.done()
            await access.revoke("viewer", "test")
            answer = await stream
        assert answer.status_code == 200
        assert answer.text.startswith(": open\n\n: idle\n\n")


async def test_a_slow_reader_misses_events_and_is_told(cloud):
    stream = cloud.parts.feed.stream(anybody)
    await anext(stream)
    await cloud.send(cloud.activation())
    records = (await cloud.parts.store.page()).results
    cloud.parts.feed.publish(records * (QUEUE_SIZE + 6), {})
    for _ in range(QUEUE_SIZE):
        assert (await anext(stream)).startswith(b"event: result")
    assert await anext(stream) == b"event: missed\ndata: 7\n\n"
    assert cloud.metric("splitward_events_dropped_total") == 7
    await stream.aclose()


async def test_readers_are_limited(cloud):
    streams = [cloud.parts.feed.stream(anybody) for _ in range(MAX_READERS)]
    for stream in streams:
        await anext(stream)
    assert (await cloud.http.get("/v1/events")).status_code == 503
    for stream in streams:
        await stream.aclose()
