"""Hundreds of light devices in one process: they speak the wire and keep its promises, and have no runtime.

For load on brokers and clouds. Each has its own connection, its own name and a small window, and sends a frame again
until it is answered; what it sends is random values under the release law of the bundle.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from gmqtt import Client
from gmqtt.mqtt.constants import MQTTv50
from msgspec import Meta, Struct

from edge.config import BrokerConfig, Count, Name, Seconds, Span
from splitward.errors import MessageError
from splitward.wire import topics
from splitward.wire.bundle import read_bundle, read_trusted_key
from splitward.wire.control import Result, Status, decode_reply, encode_control
from splitward.wire.law import ReleaseLaw
from splitward.wire.message import Activation, encode

CONNECTS_AT_ONCE = 20


class LoadConfig(Struct, frozen=True, kw_only=True):
    """What `python -m firmware_sim light` sends.

    Attributes
    ----------
    frames : int
        Of each device.
    rate_hz : float
        Frames a second of each device; 0 for as fast as the window allows.
    window : int
        Frames under way of each device.
    """

    devices: Annotated[int, Meta(ge=1, le=5000)] = 200
    frames: Count = 50
    rate_hz: Span = 1.0
    window: Count = 4
    retry_s: Seconds = 10.0
    timeout_s: Seconds = 300.0
    site: Name = "load"
    bundle: str = "demo/model.bundle"
    trusted_key: str = "demo/signing.key.pub"
    broker: BrokerConfig = BrokerConfig()


class LoadReport(Struct, frozen=True):
    """What came of it; `lost` frames had no answer in time, `sent` counts repeats."""

    devices: int
    frames: int
    sent: int
    results: int
    refused: int
    lost: int
    wall_s: float
    frames_per_s: float
    latency_p50_ms: float | None
    latency_p99_ms: float | None

    @property
    def complete(self) -> bool:
        """Whether every frame got a result."""
        return not self.lost and not self.refused


class LightDevice:
    """One device: connection, window and repeats."""

    def __init__(self, number: int, config: LoadConfig, law: ReleaseLaw, model: bytes) -> None:
        self.name = f"light-{number:04d}"
        self.sent = self.results = self.refused = 0
        self.latencies_ms: list[float] = []
        self._config = config
        self._law = law
        self._model = model
        self._boot = secrets.token_bytes(16)
        self._draw = np.random.default_rng(number)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._client = Client(f"{config.site}.{self.name}", clean_session=True)
        self._client.on_message = self._take
        self._activation = topics.activation(config.site, self.name)

    async def connect(self) -> None:
        """Connect, and say that the device is online."""
        broker = self._config.broker
        if broker.username is not None:
            self._client.set_auth_credentials(broker.username, broker.password)
        await self._client.connect(broker.host, broker.port, keepalive=broker.keepalive_s, version=MQTTv50)
        self._client.subscribe(topics.result(self._config.site, self.name), qos=1)
        status = topics.status(self._config.site, self.name)
        self._client.publish(status, encode_control(Status("online", at_ns=time.time_ns())), qos=1, retain=True)

    async def run(self) -> None:
        """Send every frame, and wait for every answer."""
        room = asyncio.Semaphore(self._config.window)
        period_s = 1.0 / self._config.rate_hz if self._config.rate_hz else 0.0
        due_s = time.monotonic() + self._draw.random() * period_s  # not all at once
        async with asyncio.TaskGroup() as group:
            for sequence in range(self._config.frames):
                await room.acquire()
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                due_s += period_s
                group.create_task(self._send(sequence, room))

    async def disconnect(self) -> None:
        """End the connection."""
        await self._client.disconnect()

    async def _send(self, sequence: int, room: asyncio.Semaphore) -> None:
        message, started_s = self._message(sequence), time.monotonic()
        answered = self._waiting[sequence] = asyncio.get_running_loop().create_future()
        while not answered.done():
            self._client.publish(self._activation, message, qos=1)
            self.sent += 1
            await asyncio.wait([answered], timeout=self._config.retry_s)
        del self._waiting[sequence]
        self.latencies_ms.append(1e3 * (time.monotonic() - started_s))
        room.release()

    def _message(self, sequence: int) -> bytes:
        if self._law.dtype == "int8":
            values = self._draw.integers(-127, 128, self._law.shape).astype(np.int8)
        else:
            values = self._draw.standard_normal(self._law.shape, dtype=np.float32)  # type: ignore[assignment]  # either will do
        return encode(
            Activation(self.name, self._boot, sequence, time.time_ns(), self._model, values, self._law.scale)
        )

    def _take(self, _client: Client, _topic: str, payload: bytes, _qos: int, _properties: object) -> int:
        try:
            reply = decode_reply(bytes(payload))
        except MessageError:
            return 0
        future = self._waiting.get(reply.sequence)
        if reply.boot == self._boot.hex() and future is not None and not future.done():
            self.results += isinstance(reply, Result)
            self.refused += not isinstance(reply, Result)
            future.set_result(None)
        return 0


def run_load(config: LoadConfig) -> LoadReport:
    """Run the devices until every frame is answered or the time is up.

    Raises
    ------
    BundleError, ConfigError
        The bundle, whose release law is followed, cannot be read.
    """
    bundle = read_bundle(Path(config.bundle), read_trusted_key(Path(config.trusted_key)))
    return asyncio.run(_run(config, bundle.manifest.release, bundle.model))


async def _run(config: LoadConfig, law: ReleaseLaw, model: bytes) -> LoadReport:
    devices = [LightDevice(number, config, law, model) for number in range(config.devices)]
    for first in range(0, len(devices), CONNECTS_AT_ONCE):
        await asyncio.gather(*(one.connect() for one in devices[first : first + CONNECTS_AT_ONCE]))
    started_s = time.monotonic()
    try:
        async with asyncio.timeout(config.timeout_s):
            await asyncio.gather(*(one.run() for one in devices))
    except TimeoutError:
        pass  # the report says what is lost
    wall_s = time.monotonic() - started_s
    await asyncio.gather(*(one.disconnect() for one in devices), return_exceptions=True)
    latencies_ms = [value for one in devices for value in one.latencies_ms]
    results, refused = sum(one.results for one in devices), sum(one.refused for one in devices)
    frames = config.devices * config.frames
    percentiles = np.percentile(latencies_ms, [50, 99]).round(2).tolist() if latencies_ms else [None, None]
    return LoadReport(
        *(config.devices, frames, sum(one.sent for one in devices), results, refused),
        *(frames - results - refused, round(wall_s, 2), round(results / wall_s, 1), *percentiles),
    )
