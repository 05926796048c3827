"""The cloud's CPU time for an inference, by part, under a steady window of messages."""

from __future__ import annotations

import threading
import time
import urllib.request
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from prometheus_client.parser import text_string_to_metric_families

from splitward.wire import topics
from splitward.wire.bundle import Bundle
from splitward.wire.message import Activation, encode

WINDOW = 128
SITE, DEVICE = "bench", "load"


def measure_service(address: str, port: int, bundle: Bundle, messages: int) -> dict[str, Any]:
    """CPU microseconds by part, for each of `messages` distinct frames of random sealed values."""
    law = bundle.manifest.release
    generator = np.random.default_rng(0)
    payloads = [
        encode(
            Activation(
                DEVICE,
                bytes(16),
                sequence,
                time.time_ns(),
                bundle.model,
                generator.integers(-100, 100, law.shape, np.int8),
                law.scale,
            )
        )
        for sequence in range(messages)
    ]
    _exchange(port, payloads[:1000])
    before = _read(address)
    started_s = time.perf_counter()
    _exchange(port, payloads[1000:])
    wall_s = time.perf_counter() - started_s
    after = _read(address)
    done = after["inferences"] - before["inferences"]
    batches = after["batches"] - before["batches"]
    parts = {part: round(1e6 * (after["cpu"][part] - before["cpu"][part]) / done, 2) for part in after["cpu"]}
    return {
        "parts_us": parts | {"total": round(sum(parts.values()), 2)},
        "inferences": int(done),
        "mean_batch": round(done / batches, 1),
        "inferences_per_s": round(done / wall_s, 1),
    }


def _exchange(port: int, payloads: list[bytes]) -> None:
    """Publish all, at most `WINDOW` unanswered, and wait for every answer."""
    free = threading.Semaphore(WINDOW)
    subscribed = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, "bench-load", protocol=mqtt.MQTTv5)
    client.max_inflight_messages_set(WINDOW)
    client.on_connect = lambda one, *_: one.subscribe(topics.result(SITE, DEVICE), 1)
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_message = lambda *_: free.release()
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        if not subscribed.wait(10):
            raise RuntimeError("the broker did not accept the subscription.")
        for payload in payloads:
            _acquire(free)
            client.publish(topics.activation(SITE, DEVICE), payload, 1)
        for _ in range(WINDOW):
            _acquire(free)
    finally:
        client.disconnect()
        client.loop_stop()


def _acquire(free: threading.Semaphore) -> None:
    if not free.acquire(timeout=30):
        raise RuntimeError("no answer for 30 s.")


def _read(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as response:  # noqa: S310 -- our own http address
        text = response.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        "cpu": {s.labels["part"]: s.value for s in samples if s.name == "splitward_cpu_seconds_total"},
        "inferences": sum(s.value for s in samples if s.name == "splitward_inferences_total"),
        "batches": sum(s.value for s in samples if s.name == "splitward_batch_size_count"),
    }
