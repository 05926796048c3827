"""`python -m cloud` as an operator runs it: ready, answering, observable, and drained at SIGTERM."""

from __future__ import annotations

import hashlib
import json
import queue
import urllib.request
from dataclasses import asdict
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from safetensors.torch import save_file

from splitward.demo.services import start_cloud
from splitward.method.halves import NetworkSettings, ServerHalf
from splitward.wire import topics
from splitward.wire.control import Result, decode_reply
from splitward.wire.message import Activation, encode
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import ServerCard, server_card_path, write_server_card

MODEL = bytes(range(16))
LAW = ReleaseLaw((16,), "int8", 1.0, 0.3)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Where a bundle would lie; only its server half, with random weights, is there."""
    settings = NetworkSettings("small", 1, 28, 10, mapped=True, sealed_values=16)
    weights = tmp_path / "m.server.safetensors"
    save_file(ServerHalf(settings).state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    path = tmp_path / "m.bundle"
    card = ServerCard(1, MODEL.hex(), "m", tuple("0123456789"), LAW, asdict(settings), weights.name, digest)
    write_server_card(server_card_path(path), card)
    return path


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as response:
        return response.read().decode()


def test_the_service_from_start_to_sigterm(mosquitto, bundle: Path, tmp_path: Path) -> None:
    replies: queue.Queue[Result] = queue.Queue()
    device = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, "d", protocol=mqtt.MQTTv5)
    subscribed: queue.Queue[int] = queue.Queue()
    device.on_connect = lambda one, *_: one.subscribe(topics.result("s", "d"), 1)
    device.on_subscribe = lambda *_: subscribed.put(1)
    device.on_message = lambda _one, _data, message: replies.put(decode_reply(message.payload))
    device.connect(mosquitto.host, mosquitto.port)
    device.loop_start()
    try:
        subscribed.get(timeout=10)
        values = np.arange(-8, 8, dtype=np.int8)
        message = encode(Activation("d", bytes(16), 0, 1, MODEL, values, LAW.scale))
        with start_cloud(tmp_path, bundle, mosquitto.port) as address:
            for _ in range(2):  # the second is a duplicate
                device.publish(topics.activation("s", "d"), message, 1)
            first, second = replies.get(timeout=20), replies.get(timeout=20)
            assert first == second
            assert first.sequence == 0
            assert abs(sum(first.scores) - 1) < 1e-5
            results = json.loads(get(f"{address}/results"))
            assert len(results["results"]) == 1
            assert 'splitward_messages_total{outcome="duplicate"} 1.0' in get(f"{address}/metrics")
            assert "<html" in get(f"{address}/")
            assert json.loads(get(f"{address}/devices"))
        # start_cloud raises when SIGTERM does not end it with 0
        assert "Traceback" not in (tmp_path / "cloud.log").read_text()
    finally:
        device.disconnect()
        device.loop_stop()
