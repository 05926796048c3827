"""Fakes at the two seams, the transport and the engine, around the real pipeline and the real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from cloud.app import create_app
from cloud.config import (
    ApiConfig,
    BatchConfig,
    CloudConfig,
    FleetConfig,
    LimitsConfig,
    StoreConfig,
    TraceConfig,
)
from cloud.engine import Scores
from cloud.errors import TransportError
from cloud.transport import Delivery
from splitward.wire import topics
from splitward.wire.control import STREAMS, Refusal, Result, decode_reply
from splitward.wire.message import Activation, encode
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import ServerCard

MODEL = bytes(range(16))
CARD = ServerCard(
    format=1,
    model=MODEL.hex(),
    name="digits",
    classes=("zero", "one", "two"),
    release=ReleaseLaw((3,), "int8", bound=1.0, sigma=0.1),
    network={},
    weights="digits.server.safetensors",
    sha256="",
)
POISON = 99


class FakeDelivery(Delivery):
    """A delivery whose acknowledgement a test can wait for."""

    __slots__ = ("done",)

    def __init__(self, topic: str, payload: bytes) -> None:
        super().__init__(topic, payload)
        self.done = asyncio.Event()


class FakeTransport:
    """Deliveries come from the test; what the service does with them is kept."""

    def __init__(self) -> None:
        self.connected = False
        self.published: list[tuple[str, Result | Refusal]] = []
        self.acknowledged: list[Delivery] = []
        self.steps: list[str] = []
        self.orders: list[tuple[str, bytes, bool]] = []

    async def start(self, on_messages) -> None:
        self.connected = True
        self.on_messages = on_messages

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if not self.connected:
            raise TransportError("no connection")
        if topic.endswith("/result"):
            self.published.append((topic, decode_reply(payload)))
            self.steps.append("reply")
        else:
            self.orders.append((topic, payload, retain))

    def acknowledge(self, delivery: FakeDelivery) -> None:
        self.acknowledged.append(delivery)
        self.steps.append("acknowledge")
        delivery.acknowledged = True
        delivery.done.set()

    async def unsubscribe(self) -> None:
        self.steps.append("unsubscribe")

    async def stop(self) -> None:
        self.connected = False
        self.steps.append("stop")

    async def send(self, topic: str, payload: bytes) -> FakeDelivery:
        """Deliver, without waiting for the acknowledgement."""
        delivery = FakeDelivery(topic, payload)
        self.on_messages([delivery])
        await asyncio.sleep(0)  # lets the pipeline look at it, as a socket would
        return delivery


class FakeEngine:
    """Decides for the class of the largest value; `POISON` breaks it, and so does `broken`."""

    def __init__(self) -> None:
        self.cards = {MODEL: CARD}
        self.batches: list[int] = []
        self.broken = False
        self.failed = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def infer(self, model: bytes, activations: np.ndarray) -> Scores:  # noqa: ARG002  # one model here
        await self.gate.wait()
        self.batches.append(len(activations))
        if self.broken or (np.rint(activations / CARD.release.scale) == POISON).any():
            self.failed.set()
            raise RuntimeError("no such kernel")
        decision = np.exp(activations) / np.exp(activations).sum(1, keepdims=True)
        return Scores(decision, np.stack([decision.argmax(1)] * len(STREAMS), axis=1))


class Cloud:
    """A running service, and how a test talks to it."""

    def __init__(self, app: FastAPI, transport: FakeTransport, engine: FakeEngine) -> None:
        self.app = app
        self.transport = transport
        self.engine = engine
        self.parts = app.state.service
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")

    @staticmethod
    def activation(sequence: int = 0, values: tuple[int, ...] = (0, 5, 0), **changes) -> Activation:
        fields = {
            "device": "pi-1",
            "boot": b"b" * 16,
            "sequence": sequence,
            "captured_at_ns": 1_000,
            "model": MODEL,
            "values": np.asarray(values, getattr(values, "dtype", np.int8)),
            "scale": CARD.release.scale,
        }
        return Activation(**(fields | changes))

    async def send(
        self, activation: Activation, *, device: str = "pi-1", answered: bool = True
    ) -> FakeDelivery:
        """Deliver an activation and, if `answered`, wait until it is acknowledged."""
        delivery = await self.transport.send(topics.activation("ward", device), encode(activation))
        if answered:
            await asyncio.wait_for(delivery.done.wait(), 5)
        return delivery

    def metric(self, name: str, **labels: str) -> float:
        return self.parts.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def run_cloud(tmp_path: Path) -> Callable:
    """Context manager that runs a service on the fakes; the store survives from one to the next."""

    @asynccontextmanager
    async def run(**changes) -> AsyncIterator[Cloud]:
        config = CloudConfig(
            models=(),
            store=StoreConfig(
                changes.get("url", f"sqlite+aiosqlite:///{tmp_path}/cloud.db"), max_dead_letters=5
            ),
            fleet=FleetConfig(state_dir=str(tmp_path / "fleet"), **changes.get("fleet", {})),
            api=changes.get("api", ApiConfig(require_token=False)),
            limits=changes.get("limits", LimitsConfig()),
            trace=changes.get("trace", TraceConfig()),
            batch=BatchConfig(max_size=4, max_wait_ms=changes.get("max_wait_ms", 1)),
        )
        transport, engine = FakeTransport(), FakeEngine()
        app = create_app(config, transport=transport, engine=engine)
        async with app.router.lifespan_context(app):
            cloud = Cloud(app, transport, engine)
            yield cloud
        await cloud.http.aclose()

    return run


@pytest.fixture
async def cloud(run_cloud: Callable) -> AsyncIterator[Cloud]:
    async with run_cloud() as running:
        yield running
