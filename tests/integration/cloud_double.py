"""A cloud that answers from memory as the real one does from its store, and what tests of the agent share."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge.agent import AgentReport, run_agent
from edge.config import BrokerConfig, CaptureConfig, DeviceConfig, EdgeConfig, LinkConfig, TlsConfig
from edge.link import tls_context
from edge.results import read_results
from firmware_sim.broker import Broker
from firmware_sim.fleet import to_toml
from splitward.wire import topics
from splitward.wire.control import (
    Outcome,
    Refusal,
    Result,
    Status,
    decode_outcome,
    decode_status,
    encode_control,
)
from splitward.wire.message import Activation, decode
from splitward.wire.orders import Announcement, Command, encode_order

LINK = LinkConfig(retry_s=1.0, reconnect_s=0.2, reconnect_max_s=0.5, status_s=0.5)
TIMEOUT_S = 60.0


class Cloud:
    """Answers every activation at `broker`; a frame that comes again gets the same answer again."""

    def __init__(self, broker: Broker, tls: TlsConfig | None = None) -> None:
        self.changed = threading.Condition()
        self.received: list[tuple[str, str, int]] = []
        self._copies: Counter[tuple[str, str, int]] = Counter()
        self.answers: dict[tuple[str, str, int], Result | Refusal] = {}
        self.statuses: dict[str, list[Status]] = {}
        self.outcomes: list[Outcome] = []
        self.deaf = False
        self.judge: Callable[[Activation], str | None] = lambda activation: None
        self.ignore: Callable[[Activation, int], bool] = lambda activation, copies: False
        self._ready = threading.Event()
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id="cloud", protocol=MQTTProtocolVersion.MQTTv5
        )
        if tls is not None:
            self._client.tls_set_context(tls_context(tls))
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
        if (left := self._client.socket()) is not None:  # where the loop ended before its last look
            left.close()

    def order(self, order: Announcement | Command, key: Ed25519PrivateKey) -> str:
        """Send an order as the cloud does; its id."""
        announced = isinstance(order, Announcement)
        topic = topics.bundle if announced else topics.command
        self._client.publish(topic(order.site, order.device), encode_order(order, key), qos=1, retain=announced)
        return order.id

    def outcome_of(self, order_id: str) -> Outcome:
        """The final outcome of an order, waited for."""

        def final() -> list[Outcome]:
            return [one for one in self.outcomes if one.of == order_id and one.state != "accepted"]

        self.wait(final)
        return final()[-1]

    def wait(self, ready: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(ready, TIMEOUT_S), "the condition did not come true"

    def _subscribe(self, client: Client, *_: Any) -> None:
        client.subscribe(
            [("splitward/v1/+/+/activation", 1), (topics.every_status(), 1), (topics.every_outcome(), 1)]
        )

    def _take(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        site, device, kind = topics.parse(message.topic)
        with self.changed:
            if kind == "status":
                self.statuses.setdefault(device, []).append(decode_status(message.payload))
            elif kind == "outcome":
                self.outcomes.append(decode_outcome(message.payload))
            else:
                activation = decode(message.payload)
                assert activation.device == device
                key = (device, activation.boot.hex(), activation.sequence)
                self.received.append(key)
                self._copies[key] += 1
                if not self.deaf and not self.ignore(activation, self._copies[key]):
                    self.answer(activation, site)
            self.changed.notify_all()

    def answer(self, activation: Activation, site: str = "demo") -> None:
        """Answer an activation, now: the same as before if it was answered."""
        key = (activation.device, activation.boot.hex(), activation.sequence)
        answer = self.answers.setdefault(key, self._answer(activation))
        self._client.publish(topics.result(site, activation.device), encode_control(answer), qos=1)

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
def cloud_at(broker: Broker, tls: TlsConfig | None = None) -> Iterator[Cloud]:
    cloud = Cloud(broker, tls)
    cloud.start()
    try:
        yield cloud
    finally:
        cloud.stop()


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


def assert_none_twice(folder: Path) -> None:
    """Of a device whose agent was never killed: after a crash a frame may have two lines."""
    lines = Counter((line["boot"], line["sequence"]) for line in read_results(folder / "results.jsonl"))
    assert set(lines.values()) == {1}, "a frame has two results, or no frame has any"
    assert_each_once(folder, len(read_answers(folder)))


@contextmanager
def running(config: EdgeConfig, *, until_answered: bool = False) -> Iterator[list[AgentReport]]:
    """The agent in a thread until the block ends, or after it until every frame is answered."""
    reports: list[AgentReport] = []
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: reports.append(run_agent(config, stop=stop, until_answered=until_answered)), daemon=True
    )
    thread.start()
    try:
        yield reports
        if until_answered:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "the agent still waits for results"
    finally:
        stop.set()
        thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "the agent does not stop"


def start_process(config: EdgeConfig, folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    settings = folder / "edge.toml"
    settings.write_text(to_toml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "edge", "run", "--config", str(settings), *flags], stdout=subprocess.PIPE
    )
