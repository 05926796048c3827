"""The whole service as its own process: real broker, real engine, real database, real HTTP."""

from __future__ import annotations

import hashlib
import json
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import paho.mqtt.client as paho
import pytest
import torch
from safetensors.torch import save_file

from firmware_sim.broker import free_port
from splitward.method.halves import build_server
from splitward.wire import topics
from splitward.wire.control import Refusal, Result, Status, decode_reply, encode_control
from splitward.wire.message import Activation, encode
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import ServerCard, write_server_card

NETWORK = {"size": "small", "channels": 1, "side": 8, "classes": 3, "mapped": False, "values": 16}
LAW = ReleaseLaw((16,), "int8")
MODEL = b"m" * 16
BOOT = b"b" * 16
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def card(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    weights = folder / "digits.server.safetensors"
    save_file(build_server(NETWORK).state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    path = folder / "digits.server.json"
    names = ("zero", "one", "two")
    write_server_card(path, ServerCard(1, MODEL.hex(), "digits", names, LAW, NETWORK, weights.name, digest))
    return path


class Device:
    """A device that publishes, and publishes again until it is answered."""

    def __init__(self, broker) -> None:
        self.replies: queue.Queue[Result | Refusal] = queue.Queue()
        self._spool: dict[tuple[int, bytes], bytes] = {}
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, "pi-1", protocol=paho.MQTTv5)
        self._client.on_message = lambda _client, _data, message: self.replies.put(
            decode_reply(message.payload)
        )
        self._client.on_connect = lambda client, *_: client.subscribe(topics.result("ward", "pi-1"), qos=1)
        self._client.reconnect_delay_set(1, 1)
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        self._client.publish(topics.status("ward", "pi-1"), encode_control(Status("online")), 1, retain=True)

    def publish(self, sequence: int, model: bytes = MODEL) -> None:
        if (sequence, model) not in self._spool:  # what is sent again is sent byte for byte
            values = np.random.default_rng(sequence).integers(-127, 128, 16).astype(np.int8)
            activation = Activation("pi-1", BOOT, sequence, time.time_ns(), model, values, LAW.scale)
            self._spool[sequence, model] = encode(activation)
        self._client.publish(topics.activation("ward", "pi-1"), self._spool[sequence, model], qos=1)

    def ask(self, sequence: int, **changes) -> Result | Refusal:
        """Publish until the reply to `sequence` comes."""
        for _ in range(TIMEOUT_S):
            self.publish(sequence, **changes)
            try:
                while (reply := self.replies.get(timeout=1)).sequence != sequence:
                    continue
            except queue.Empty:
                continue
            return reply
        raise TimeoutError(f"no reply to frame {sequence}")

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def start(tmp_path: Path, card: Path) -> Callable:
    """Context manager that runs the service against a broker, and yields its process and an HTTP client."""

    @contextmanager
    def run(broker) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        expiry_s = 3600 if broker.kind == "mosquitto" else 0
        config = tmp_path / "cloud.toml"
        config.write_text(
            f'models = ["{card}"]\n'
            f'[broker]\nhost = "{broker.host}"\nport = {broker.port}\nsession_expiry_s = {expiry_s}\n'
            f"[api]\nport = {port}\nrequire_token = false\n"
            f'[store]\nurl = "sqlite+aiosqlite:///{tmp_path}/cloud.db"\n[fleet]\nstate_dir = "{tmp_path}/fleet"\n'
        )
        process = subprocess.Popen([sys.executable, "-m", "cloud", "--config", str(config)])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
                wait_until_ready(process, http)
                yield process, http
        finally:
            process.kill()
            process.wait()

    return run


def wait_until_ready(process: subprocess.Popen, http: httpx.Client) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        assert process.poll() is None, "the service ended"
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.05)
    raise TimeoutError("the service is not ready")


@pytest.mark.parametrize("fixture", ["mosquitto", "embedded_broker"])
def test_from_activation_to_result(fixture, request, start):
    broker = request.getfixturevalue(fixture)
    with start(broker) as (process, http):
        device = Device(broker)
        with http.stream("GET", "/v1/events", timeout=TIMEOUT_S) as events:
            result = device.ask(0)
            lines = events.iter_lines()
            data = next(line for line in lines if line.startswith("data: "))
        assert isinstance(result, Result)
        assert sum(result.scores) == pytest.approx(1, abs=1e-5)
        event = json.loads(data.removeprefix("data: "))
        assert event.pop("released")["width"] == 4  # 16 values, drawn 4 by 4
        assert (event["device"], event["result"]["stored_at_ns"]) == ("pi-1", result.stored_at_ns)
        assert http.get("/v1/results").json()["results"] == [event]
        refusal = device.ask(1, model=b"?" * 16)
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "unknown_model"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        device.stop()


def test_a_killed_service_and_a_killed_broker_lose_nothing_and_count_nothing_twice(mosquitto, start):
    device = Device(mosquitto)
    with start(mosquitto) as (process, _):
        first = device.ask(0)
        for sequence in range(1, 40):
            device.publish(sequence)
        process.kill()
        process.wait()
    with start(mosquitto) as (_, http):
        answers = [device.ask(sequence) for sequence in range(20)]
        mosquitto.stop()
        mosquitto.start()
        answers += [device.ask(sequence) for sequence in range(20, 40)]
        assert answers[0] == first
        stored = http.get("/v1/results", params={"after": "0", "limit": 1000}).json()["results"]
        assert sorted(item["result"]["sequence"] for item in stored) == list(range(40))
    device.stop()


def test_sigterm_with_an_open_event_stream_drains_at_once(mosquitto, start):
    with start(mosquitto) as (process, http), http.stream("GET", "/v1/events", timeout=TIMEOUT_S) as events:
        assert next(events.iter_lines()) == ": open"
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0


LARGE = """
import sys, types
from fastapi import FastAPI, Response
from cloud import __main__ as cloud
from cloud.config import ApiConfig

app = FastAPI()
app.state.service = types.SimpleNamespace(feed=types.SimpleNamespace(close=lambda: None))
app.get("/")(lambda: Response(bytes(16 << 20)))
cloud.LINGER_S = 1
cloud._serve(app, types.SimpleNamespace(api=ApiConfig(port=int(sys.argv[1]))))
"""


def connect(port: int) -> socket.socket:
    """A connection to a server that is starting."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        except ConnectionRefusedError:  # noqa: PERF203  # it is not there yet
            assert time.monotonic() < deadline_s
            time.sleep(0.05)


def test_sigterm_ends_the_server_though_a_caller_does_not_read():
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", LARGE, str(port)])
    try:
        with connect(port) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\nHost: cloud\r\n\r\n")
            assert caller.recv(4) == b"HTTP"  # it is being answered; more follows than buffers hold
            process.send_signal(signal.SIGTERM)
            assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()


SLOW = """
import asyncio, sys, types
from fastapi import FastAPI, Request
from cloud import __main__ as cloud
from cloud.config import ApiConfig

app = FastAPI()
app.state.service = types.SimpleNamespace(feed=types.SimpleNamespace(close=lambda: None))

@app.get("/slow")
async def slow():
    await asyncio.sleep(3)

@app.post("/other")
@app.post("/v1/bundles")
async def take(request: Request):
    return len(await request.body())

cloud.REQUEST_S = 1.0
cloud._serve(app, types.SimpleNamespace(api=ApiConfig(port=int(sys.argv[1]))))
"""


def post(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: cloud\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_caller_that_sends_no_whole_request_is_ended_and_a_slow_answer_is_not():
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(port)])
    get = b"GET /other HTTP/1.1\r\nHost: cloud\r\n"
    begun = {"silent": b"", "head": get, "body": post("/other", 10_000), "second": get + b"\r\n" + get}
    try:
        good, upload = connect(port), connect(port)
        good.sendall(b"GET /slow HTTP/1.1\r\nHost: cloud\r\n\r\n")
        upload.sendall(post("/v1/bundles", 30))
        slow = {name: connect(port) for name in begun}
        for name, caller in slow.items():
            caller.sendall(begun[name])
            caller.setblocking(False)
        uploaded, deadline_s = 0, time.monotonic() + 20
        while slow or uploaded < 30:
            assert time.monotonic() < deadline_s, list(slow)
            time.sleep(0.1)  # each sends a byte, so that it is never idle
            if uploaded < 30:
                uploaded += upload.send(b"x")
            for name, caller in list(slow.items()):
                if is_ended(caller, b"" if name == "silent" else b"x"):
                    slow.pop(name).close()
        assert good.recv(15) == b"HTTP/1.1 200 OK"
        assert upload.recv(15) == b"HTTP/1.1 200 OK"
        for caller in (good, upload):
            caller.close()
    finally:
        process.kill()
        process.wait()


def is_ended(caller: socket.socket, data: bytes) -> bool:
    """Whether the server has closed; otherwise it gets `data`."""
    try:
        caller.send(data)
        while caller.recv(4096):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass  # ended with a reset, where what it sent was not read
    return True
