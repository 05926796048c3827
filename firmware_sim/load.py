"""Many light devices in one process, to load a cloud: the wire format and the delivery rules, without the network.

Each device has a connection of its own, publishes random values that fit its model's release law, keeps each message
until its result comes, sends it again when none does, and counts what came of it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from pathlib import Path
from typing import Annotated, cast

import mqtt5
import numpy as np
import uvloop
from msgspec import Meta, Struct

from edge.config import Count, Name, Seconds
from splitward.errors import SplitwardError
from splitward.wire import topics
from splitward.wire.control import Refusal, decode_reply
from splitward.wire.message import Activation, encode
from splitward.wire.server import ServerCard, read_server_card

CONNECTS_AT_ONCE = 50
TICK_S = 0.01
DRAWN = 64
"""Tensors that a device draws; it publishes them in turn."""


class LoadConfig(Struct, frozen=True, kw_only=True):
    """Flags of `python -m firmware_sim load`.

    Attributes
    ----------
    card : str
        Server card of the model: tells which values fit.
    frames : int
        Of all devices together.
    rate_hz : float
        Of all devices together; 0: each keeps `window` frames unanswered.
    retry_s : float
        A frame without a result is sent again after so long.
    """

    card: str = "demo/model.server.json"
    host: str = "127.0.0.1"
    port: int = 1883
    site: Name = "load"
    prefix: Name = "load"
    devices: Count = 10
    frames: Count = 10_000
    rate_hz: Annotated[float, Meta(ge=0)] = 0.0
    window: Count = 16
    retry_s: Seconds = 5.0
    timeout_s: Seconds = 300.0


class LoadReport(Struct, frozen=True):
    """What became of the frames.

    `sent` counts messages, repeats included; `repeated` the repeats; `duplicated` counts frames that got two
    different results; `lost` has neither result nor refusal. Latencies are from the first publish to the result.
    """

    devices: int
    frames: int
    sent: int
    repeated: int
    results: int
    refused: int
    lost: int
    duplicated: int
    reconnects: int
    wall_s: float
    results_per_s: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None

    @property
    def complete(self) -> bool:
        """Whether every frame has one result."""
        return self.results == self.frames and not self.duplicated


class _Device(asyncio.Protocol):
    """One device: its connection, its frames, and what it counts."""

    def __init__(self, config: LoadConfig, number: int, card: ServerCard) -> None:
        self.name = f"{config.prefix}-{number}"
        self.boot = os.urandom(16)
        self.open: dict[int, tuple[float, float, bytes]] = {}
        """Sequence -> first and last time of publishing, and the message."""
        self.answers: dict[int, bytes] = {}
        self.latencies_s: list[float] = []
        self.sent = self.repeated = self.refused = self.duplicated = self.reconnects = 0
        self.ready = asyncio.Event()
        self._config, self._card = config, card
        self._model = bytes.fromhex(card.model)
        steps = np.random.default_rng(number).integers(-127, 128, (DRAWN, *card.release.shape))
        self._values = steps.astype(np.int8 if card.release.dtype == "int8" else np.float32)
        self._topic = topics.activation(config.site, self.name)
        self._socket: asyncio.Transport | None = None
        self._unread = b""
        self._identifier = 0

    def publish(self) -> None:
        """Make a frame and publish it."""
        law, sequence = self._card.release, len(self.answers) + len(self.open)
        values = self._values[sequence % len(self._values)]
        message = encode(
            Activation(self.name, self.boot, sequence, time.time_ns(), self._model, values, law.scale)
        )
        now_s = time.perf_counter()
        self.open[sequence] = (now_s, now_s, message)
        self._send(message)

    def repeat(self, now_s: float) -> None:
        """Publish again what has waited too long."""
        for sequence, (first_s, last_s, message) in list(self.open.items()):
            if now_s - last_s > self._config.retry_s and self.ready.is_set():
                self.open[sequence] = (first_s, now_s, message)
                self.repeated += 1
                self._send(message)

    async def keep_connected(self, gate: asyncio.Semaphore) -> None:
        """Connect, and again whenever the connection is lost, until cancelled."""
        loop, config = asyncio.get_running_loop(), self._config
        while True:
            try:
                async with gate:
                    await loop.create_connection(lambda: self, config.host, config.port)
                    async with asyncio.timeout(10):
                        await self.ready.wait()
            except (OSError, TimeoutError):
                await asyncio.sleep(0.2)
                continue
            while self.ready.is_set():  # a lost connection is rare, and nothing waits on it
                await asyncio.sleep(0.1)
            self.reconnects += 1

    def close(self) -> None:
        """Disconnect."""
        if self._socket is not None:
            self._socket.write(mqtt5.DisconnectPacket().write())
            self._socket.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say who it is, and subscribe."""
        self._socket, self._unread = cast("asyncio.Transport", transport), b""
        client = f"{self._config.site}.{self.name}"
        wanted = mqtt5.TopicFilter(topics.result(self._config.site, self.name), max_qos=mqtt5.QoS.AT_LEAST_ONCE)
        self._socket.write(
            mqtt5.ConnectPacket(client, clean_start=True).write() + mqtt5.SubscribePacket(1, [wanted]).write()
        )

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        """Note it; `keep_connected` sees it."""
        self.ready.clear()

    def data_received(self, data: bytes) -> None:
        """Take results, and acknowledge them."""
        view, at, acknowledged = memoryview(self._unread + data), 0, list[bytes]()
        try:
            while True:
                packet, size = mqtt5.read(view[at:])
                at += size
                if isinstance(packet, mqtt5.PublishPacket):
                    if packet.packet_id is not None:
                        acknowledged.append(mqtt5.PubAckPacket(packet.packet_id).write())
                    self._take(packet.payload)
                elif isinstance(packet, mqtt5.SubAckPacket):
                    self.ready.set()
        except IndexError:
            self._unread = bytes(view[at:])
        if acknowledged and self._socket is not None:
            self._socket.write(b"".join(acknowledged))

    def _take(self, payload: bytes) -> None:
        reply = decode_reply(payload)
        waiting = self.open.pop(reply.sequence, None)
        if waiting is None:
            self.duplicated += self.answers.get(reply.sequence) != payload
            return
        self.answers[reply.sequence] = payload
        if isinstance(reply, Refusal):
            self.refused += 1
        else:
            self.latencies_s.append(time.perf_counter() - waiting[0])

    def _send(self, message: bytes) -> None:
        self.sent += 1
        if self._socket is None or not self.ready.is_set():
            return  # it is sent again
        self._identifier = self._identifier % 65_535 + 1
        packet = mqtt5.PublishPacket(
            self._topic, message, qos=mqtt5.QoS.AT_LEAST_ONCE, packet_id=self._identifier
        )
        self._socket.write(packet.write())


def run_load(config: LoadConfig) -> LoadReport:
    """Publish every frame and wait for its result, or until the time is up.

    Raises
    ------
    BundleError, SplitwardError
        The card cannot be read, or no broker answers.
    """
    card, _ = read_server_card(Path(config.card))
    return uvloop.run(_run(config, card))


async def _run(config: LoadConfig, card: ServerCard) -> LoadReport:
    await _try_broker(config)
    devices = [_Device(config, number, card) for number in range(config.devices)]
    gate = asyncio.Semaphore(CONNECTS_AT_ONCE)
    keepers = [asyncio.create_task(device.keep_connected(gate)) for device in devices]
    try:
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*(device.ready.wait() for device in devices))
        except TimeoutError:
            raise SplitwardError(
                f"{config.host}:{config.port}: not every device could connect within 60 s. Is the broker there?"
            ) from None
        started_s = time.perf_counter()
        await _publish(config, devices, started_s)
        wall_s = time.perf_counter() - started_s
    finally:
        for keeper in keepers:
            keeper.cancel()
        for device in devices:
            device.close()
    return _report(config, devices, wall_s)


async def _try_broker(config: LoadConfig) -> None:
    """Fail at once where nobody listens: devices would try for a minute."""
    try:
        _, writer = await asyncio.open_connection(config.host, config.port)
    except OSError as error:
        raise SplitwardError(
            f"{config.host}:{config.port}: {error.strerror or error}. Is the broker there?"
        ) from error
    writer.close()


async def _publish(config: LoadConfig, devices: list[_Device], started_s: float) -> None:
    """Keep the devices busy until every frame is answered."""
    left, turn, last_retry_s = config.frames, deque(devices), started_s
    while True:
        now_s = time.perf_counter()
        if config.rate_hz:
            due = min(left, int((now_s - started_s) * config.rate_hz) - (config.frames - left))
            for _ in range(max(0, due)):
                turn[0].publish()
                turn.rotate(-1)
                left -= 1
        else:
            for device in devices:
                while left and len(device.open) < config.window:
                    device.publish()
                    left -= 1
        if now_s - last_retry_s > 1:
            last_retry_s = now_s
            for device in devices:
                device.repeat(now_s)
        if (not left and not any(device.open for device in devices)) or now_s - started_s > config.timeout_s:
            return
        await asyncio.sleep(TICK_S / 5 if config.rate_hz else TICK_S / 10)


def _report(config: LoadConfig, devices: list[_Device], wall_s: float) -> LoadReport:
    latencies_ms = 1e3 * np.concatenate([device.latencies_s for device in devices])
    results = len(latencies_ms)
    p50, p95, p99, top = (
        (round(float(value), 3) for value in np.percentile(latencies_ms, (50, 95, 99, 100)))
        if results
        else (None,) * 4
    )
    refused = sum(device.refused for device in devices)
    return LoadReport(
        devices=len(devices),
        frames=config.frames,
        sent=sum(device.sent + device.repeated for device in devices),
        repeated=sum(device.repeated for device in devices),
        results=results,
        refused=refused,
        lost=config.frames - results - refused,
        duplicated=sum(device.duplicated for device in devices),
        reconnects=sum(device.reconnects for device in devices),
        wall_s=round(wall_s, 3),
        results_per_s=round(results / wall_s, 1),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=top,
    )
