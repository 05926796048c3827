"""What the cloud is measured beside: the same pipeline on aiomqtt, and one activation for each POST.

`python -m benchmarks.peers KIND --config cloud.toml`: aiomqtt, fastapi_post or litserve.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fastapi import FastAPI, Request, Response

import cloud.__main__
import cloud.app
from cloud.config import BrokerConfig, CloudConfig, read_cloud_config
from cloud.server_half import load_half
from cloud.transport import Delivery, OnMessages, SteadyTransport
from splitward.wire.message import decode
from splitward.wire.server import read_server_card
from splitward.wire.tensor import dequantise

SENDERS = 64
"""Replies that aiomqtt sends at a time: it waits for each one's acknowledgement."""


class AiomqttConnection:
    """The seam over aiomqtt, which acknowledges by itself, on arrival: faster than it could be if it were safe."""

    def __init__(self, config: BrokerConfig, on_messages: OnMessages) -> None:
        import aiomqtt

        self.lost = asyncio.Event()
        self._on_messages = on_messages
        self._client = aiomqtt.Client(
            config.host,
            config.port,
            identifier=config.client_id,
            protocol=aiomqtt.ProtocolVersion.V5,
            max_inflight_messages=SENDERS,
            max_concurrent_outgoing_calls=SENDERS,
        )
        self._outbox: asyncio.Queue[tuple[str, bytes, bool]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        await self._client.__aenter__()
        senders = [asyncio.create_task(self._send()) for _ in range(SENDERS)]
        self._tasks = [asyncio.create_task(self._receive()), *senders]

    async def subscribe(self, filters: Sequence[str]) -> None:
        for name in filters:
            await self._client.subscribe(name, qos=1)

    def publish(self, topic: str, payload: bytes, retain: bool) -> None:
        self._outbox.put_nowait((topic, payload, retain))

    def acknowledge(self, delivery: Delivery) -> None:
        pass

    async def unsubscribe(self, name: str) -> None:
        await self._client.unsubscribe(name)

    async def close(self, *, end_session: bool) -> None:  # noqa: ARG002  # the seam's signature
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(Exception):
            await self._client.__aexit__(None, None, None)
        self.lost.set()

    async def _receive(self) -> None:
        async for message in self._client.messages:
            self._on_messages([Delivery(str(message.topic), bytes(message.payload), self)])

    async def _send(self) -> None:
        while True:
            topic, payload, retain = await self._outbox.get()
            await self._client.publish(topic, payload, qos=1, retain=retain)


class _Table:
    """A result is committed before it is answered, here as there."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS results (device TEXT, boot TEXT, sequence INTEGER, scores TEXT, "
            "PRIMARY KEY (device, boot, sequence))"
        )

    def add(self, rows: list[tuple[str, str, int, str]]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT INTO results VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING", rows)
        self._connection.execute("COMMIT")


class Answerer:
    """Decode, infer, commit, encode: for a list of messages."""

    def __init__(self, config: CloudConfig, batch: int) -> None:
        card, weights = read_server_card(Path(config.models[0]))
        self._law = card.release
        self._half = load_half(card, weights, backend="auto", device="cpu", threads=1, batch=batch)
        self._table = _Table(config.store.url.partition("///")[2])

    def answer(self, messages: Sequence[bytes]) -> list[bytes]:
        activations = [decode(message) for message in messages]
        values = dequantise(np.stack([one.values for one in activations]), self._law.scale)
        scores = self._half.run(values).decision.tolist()
        answers = [msgspec.json.encode(row) for row in scores]
        self._table.add(
            [
                (one.device, one.boot.hex(), one.sequence, text.decode())
                for one, text in zip(activations, answers, strict=True)
            ]
        )
        return answers


def serve_fastapi(config: CloudConfig) -> None:
    """One activation for each POST, answered in the event loop."""
    import uvicorn

    app, answerer = FastAPI(), Answerer(config, 1)

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        return Response(answerer.answer([await request.body()])[0], media_type="application/json")

    uvicorn.run(
        app,
        host=config.api.host,
        port=config.api.port,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=60,
    )


def main() -> Any:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("aiomqtt", "fastapi_post", "litserve"))
    parser.add_argument("--config", required=True)
    given = parser.parse_args()
    if given.kind == "aiomqtt":
        cloud.app.open_transport = lambda config: SteadyTransport(  # type: ignore[attr-defined]  # in the real one's place
            config, lambda on_messages: AiomqttConnection(config, on_messages)
        )
        return cloud.__main__.main(["--config", given.config])
    config = read_cloud_config(Path(given.config))
    if given.kind == "fastapi_post":
        return serve_fastapi(config)
    from benchmarks.litserve_peer import serve  # it comes with benchmarks of its own, and takes seconds

    return serve(config)


if __name__ == "__main__":
    main()
