"""The agent against real brokers, and a cloud that answers from memory as the real one does from its store."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge.agent import AgentReport, run_agent
from edge.capture import SimulatorSource
from edge.config import (
    BrokerConfig,
    CaptureConfig,
    DeviceConfig,
    EdgeConfig,
    LinkConfig,
    RuntimeConfig,
    SpoolConfig,
)
from edge.results import read_results
from firmware_sim.broker import Broker
from firmware_sim.fleet import FleetConfig, run_fleet, to_toml
from splitward.errors import BundleError
from splitward.wire import topics
from splitward.wire.control import Refusal, Result, Status, decode_status, encode_control
from splitward.wire.message import Activation, decode


class Live(SimulatorSource):
    """Frames of a world that does not wait."""

    real_time = True


LINK = LinkConfig(retry_s=1.0, reconnect_s=0.2, reconnect_max_s=0.5, status_s=0.5)
TIMEOUT_S = 60.0


class Cloud:
    """Answers every activation at `broker`; a frame that comes again gets the same answer again."""

    def __init__(self, broker: Broker) -> None:
        self.changed = threading.Condition()
        self.received: list[tuple[str, str, int]] = []
        self.answers: dict[tuple[str, str, int], Result | Refusal] = {}
        self.statuses: dict[str, list[Status]] = {}
        self.deaf = False
        self.judge: Callable[[Activation], str | None] = lambda activation: None
        self.ignore: Callable[[Activation, int], bool] = lambda activation, copies: False
        self._ready = threading.Event()
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id="cloud", protocol=MQTTProtocolVersion.MQTTv5
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._subscribe
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._take
        self._client.on_socket_open = self._send_at_once
        self._client.connect_async(broker.host, broker.port)

    @staticmethod
    def _send_at_once(_client: Client, _userdata: Any, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self) -> None:
        self._client.loop_start()
        assert self._ready.wait(TIMEOUT_S)

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def wait(self, ready: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(ready, TIMEOUT_S), "the condition did not come true"

    def _subscribe(self, client: Client, *_: Any) -> None:
        client.subscribe([("splitward/v1/+/+/activation", 1), (topics.every_status(), 1)])

    def _take(self, client: Client, _userdata: Any, message: MQTTMessage) -> None:
        site, device, kind = topics.parse(message.topic)
        with self.changed:
            if kind == "status":
                self.statuses.setdefault(device, []).append(decode_status(message.payload))
            else:
                activation = decode(message.payload)
                assert activation.device == device
                key = (device, activation.boot.hex(), activation.sequence)
                self.received.append(key)
                if not self.deaf and not self.ignore(activation, self.received.count(key)):
                    answer = self.answers.setdefault(key, self._answer(activation))
                    client.publish(topics.result(site, device), encode_control(answer), qos=1)
            self.changed.notify_all()

    def _answer(self, activation: Activation) -> Result | Refusal:
        boot, sequence = activation.boot.hex(), activation.sequence
        reason = self.judge(activation)
        if reason is not None:
            return Refusal(boot, sequence, reason, "as the test wants")
        streams = {"attacked": 0, "recovered": 1, "fused": 1}
        scores, captured_at_ns = (0.25, 0.75), activation.captured_at_ns
        return Result(
            *(boot, sequence, activation.model.hex(), 1, "yes", scores, streams, captured_at_ns, time.time_ns())
        )


@contextmanager
def cloud_at(broker: Broker) -> Iterator[Cloud]:
    cloud = Cloud(broker)
    cloud.start()
    try:
        yield cloud
    finally:
        cloud.stop()


@pytest.fixture(params=["mosquitto", "embedded_broker"])
def broker(request: pytest.FixtureRequest) -> Broker:
    found: Broker = request.getfixturevalue(request.param)
    return found


def write_frames(path: Path, count: int) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    np.savez(path, images=images)
    return path


def configure(folder: Path, broker: Broker, tiny: Any, frames: int, **tables: Any) -> EdgeConfig:
    capture = tables.pop("capture", CaptureConfig())
    return EdgeConfig(
        device=DeviceConfig(
            bundle=str(tiny.path),
            trusted_key=str(tiny.trusted_key),
            state_dir=str(folder / "state"),
            results_file=str(folder / "results.jsonl"),
        ),
        capture=msgspec.structs.replace(capture, path=str(write_frames(folder / "frames.npz", frames))),
        broker=BrokerConfig(host=broker.host, port=broker.port),
        **{"link": LINK, **tables},
    )


def read_answers(folder: Path) -> dict[str, set[tuple[str, int]]]:
    """Identities under which each frame was answered."""
    found: dict[str, set[tuple[str, int]]] = {}
    for line in read_results(folder / "results.jsonl"):
        found.setdefault(line["name"], set()).add((line["boot"], line["sequence"]))
    return found


def assert_each_once(folder: Path, frames: int) -> None:
    answers = read_answers(folder)
    assert len(answers) == frames, "a frame was lost"
    assert all(len(identities) == 1 for identities in answers.values()), "a frame was captured twice"


@contextmanager
def agent_thread(config: EdgeConfig) -> Iterator[list[AgentReport]]:
    """The agent in a thread until every frame is answered; it must have ended within the time limit."""
    reports: list[AgentReport] = []
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: reports.append(run_agent(config, stop=stop, until_answered=True)), daemon=True
    )
    thread.start()
    try:
        yield reports
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the agent still waits for results"
    finally:
        stop.set()
        thread.join(TIMEOUT_S)


def start_process(config: EdgeConfig, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    settings = folder / "edge.toml"
    settings.write_text(to_toml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "edge", "run", "--config", str(settings), *flags], stdout=subprocess.PIPE
    )


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_every_frame_is_answered(tmp_path: Path, broker: Broker, tiny_bundle: Any, backend: Any) -> None:
    config = configure(tmp_path, broker, tiny_bundle, 200, runtime=RuntimeConfig(backend=backend))
    with cloud_at(broker) as cloud:
        report = run_agent(config, until_answered=True)
        cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")
    assert (report.captured, report.sent, report.results, report.queued) == (200, 200, 200, 0)
    assert report.dropped == {}
    assert_each_once(tmp_path, 200)
    line = next(read_results(tmp_path / "results.jsonl"))
    assert line["class_name"] == "yes"
    assert 0 < line["latency_ms"] < 60_000
    assert line["payload_bytes"] > 128
    assert cloud.statuses["device-1"][-1].results == 200


def test_a_second_start_captures_nothing_again(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 20)
    with cloud_at(mosquitto):
        assert run_agent(config, until_answered=True).captured == 20
        assert run_agent(config, until_answered=True).captured == 0
    assert_each_once(tmp_path, 20)


def test_a_broker_that_restarts_loses_nothing(tmp_path: Path, broker: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, broker, tiny_bundle, 200, capture=CaptureConfig(rate_hz=200))
    with cloud_at(broker) as cloud, agent_thread(config) as reports:
        cloud.wait(lambda: len(cloud.answers) > 50)
        broker.stop()
        broker.start()
    assert reports[0].results == 200
    assert_each_once(tmp_path, 200)
    assert len(cloud.answers) == 200


@pytest.mark.parametrize("deaf", [False, True], ids=["answered", "unanswered"])
def test_a_killed_agent_goes_on_where_it_was(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, deaf: bool
) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 200, capture=CaptureConfig(rate_hz=300))
    with cloud_at(mosquitto) as cloud:
        cloud.deaf = deaf
        process = start_process(config, tmp_path)
        cloud.wait(lambda: len(cloud.received) >= (16 if deaf else 50))
        process.kill()
        process.communicate()
        cloud.deaf = False
        second = start_process(config, tmp_path, "--until-answered")
        output, _ = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 0
    assert json.loads(output)["queued"] == 0
    assert_each_once(tmp_path, 200)
    assert len(cloud.answers) == 200
    assert len({boot for _, boot, _ in cloud.answers}) == 2


def test_sigterm_stops_the_agent_and_says_farewell(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 10)
    with cloud_at(mosquitto) as cloud:
        process = start_process(config, tmp_path)
        cloud.wait(lambda: len(cloud.answers) == 10)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")
        assert cloud.statuses["device-1"][-1].captured == 10
    assert process.returncode == 0
    assert json.loads(output)["captured"] == 10


def test_the_last_will_says_offline(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 10)
    with cloud_at(mosquitto) as cloud:
        process = start_process(config, tmp_path)
        cloud.wait(lambda: len(cloud.answers) == 10)
        process.kill()
        process.communicate()
        cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")


def test_refused_frames_are_dropped_and_counted(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 40)
    with cloud_at(mosquitto) as cloud:
        cloud.judge = lambda activation: "wrong_model" if activation.sequence % 4 == 0 else None
        report = run_agent(config, until_answered=True)
    assert (report.results, report.queued) == (30, 0)
    assert report.dropped == {"refused:wrong_model": 10}
    kinds = [line["type"] for line in read_results(tmp_path / "results.jsonl")]
    assert (kinds.count("result"), kinds.count("refusal")) == (30, 10)


def test_a_frame_without_an_answer_is_sent_again_and_holds_up_nobody(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    link = msgspec.structs.replace(LINK, window=2, retry_s=0.3)
    config = configure(tmp_path, mosquitto, tiny_bundle, 30, link=link)
    with cloud_at(mosquitto) as cloud:
        cloud.ignore = lambda activation, copies: activation.sequence < 2 and copies < 3
        report = run_agent(config, until_answered=True)
    assert report.results == 30
    assert [cloud.received.count(("device-1", report.boot, sequence)) for sequence in range(3)] == [3, 3, 1]
    assert report.sent == 34


@pytest.mark.parametrize("drop", ["oldest", "newest"])
def test_a_full_spool_drops_by_its_policy(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, drop: Any
) -> None:
    spool = SpoolConfig(max_bytes=10 * 230, drop=drop)
    config = configure(tmp_path, mosquitto, tiny_bundle, 50, spool=spool)
    with cloud_at(mosquitto) as cloud:
        cloud.deaf = True
        stop = threading.Event()
        reports: list[AgentReport] = []
        thread = threading.Thread(
            target=lambda: reports.append(
                run_agent(config, lambda capture: Live(Path(config.capture.path), capture), stop=stop)
            )
        )
        thread.start()
        cloud.wait(lambda: sum(cloud.statuses.get("device-1", [Status("offline")])[-1].dropped.values()) >= 40)
        stop.set()
        thread.join(TIMEOUT_S)
        assert reports[0].dropped == {"spool_full": 40}
        assert reports[0].queued == 10
        cloud.deaf = False
        assert run_agent(config, until_answered=True).results == 10
    kept = sorted(read_answers(tmp_path))
    assert kept == [f"frame-{index:06d}" for index in (range(40, 50) if drop == "oldest" else range(10))]


def test_a_tampered_bundle_is_refused(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    tampered = tmp_path / "tampered.bundle"
    data = bytearray(tiny_bundle.path.read_bytes())
    data[len(data) // 2] ^= 1
    tampered.write_bytes(data)
    config = configure(tmp_path, mosquitto, tiny_bundle, 1)
    config = msgspec.structs.replace(
        config, device=msgspec.structs.replace(config.device, bundle=str(tampered))
    )
    with pytest.raises(BundleError):
        run_agent(config, until_answered=True)
    process = start_process(config, tmp_path)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2


def test_a_fleet_loses_nothing(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = FleetConfig(
        devices=3,
        frames=str(write_frames(tmp_path / "frames.npz", 31)),
        variants=("onnx-float32", "onnx-int8", "tflite-int8"),
        bundle=str(tiny_bundle.path),
        trusted_key=str(tiny_bundle.trusted_key),
        folder=str(tmp_path / "fleet"),
        broker=BrokerConfig(host=mosquitto.host, port=mosquitto.port),
        timeout_s=TIMEOUT_S,
    )
    with cloud_at(mosquitto):
        report = run_fleet(config)
    assert report.complete
    assert [one.frames for one in report.devices] == [11, 10, 10]
    assert [one.variant for one in report.devices] == list(config.variants)
    assert sum(one.results for one in report.devices) == 31
    assert (tmp_path / "fleet" / "device-1" / "state" / "secret").stat().st_mode & 0o777 == 0o600
