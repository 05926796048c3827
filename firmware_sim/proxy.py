"""A TCP proxy that spoils the connections through it, between an agent and its broker.

It speaks no MQTT: what it does to bytes, networks do as well. Loss is what TCP makes of it, a wait for the
retransmission, as no byte of a stream can go missing alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Coroutine
from typing import Any

from msgspec import Struct

CHUNK_BYTES = 16 << 10
RETRANSMISSION_S = 0.3


class Toxics(Struct, frozen=True, kw_only=True):
    """How a link is bad; the default is a good one.

    Attributes
    ----------
    latency_ms, jitter_ms : float
        Delay of each chunk, and its spread.
    loss : float
        Part of the chunks that wait for a retransmission.
    bytes_per_s : float
        Bandwidth, 0 for unlimited.
    half_open : bool
        Nothing passes, and no end hears of it.
    closed : bool
        New connections are closed at once.
    """

    latency_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0
    bytes_per_s: float = 0.0
    half_open: bool = False
    closed: bool = False


class FaultProxy:
    """Forwards `host:port` to the broker's port; a context manager with a thread of its own.

    Parameters
    ----------
    target_port : int
    host : str
    seed : int
        Of the jitter and the loss.
    """

    def __init__(self, target_port: int, host: str = "127.0.0.1", seed: int = 0) -> None:
        self.host = host
        self.port = 0
        self.toxics = Toxics()
        self.connections = 0
        self._target_port = target_port
        self._random = random.Random(seed)  # noqa: S311  # no secret
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._serve, self.host, 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Reset every connection."""

        async def abort() -> None:
            for writer in list(self._writers):
                writer.transport.abort()

        self._do(abort())

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            if self.toxics.closed:
                raise ConnectionRefusedError
            far_reader, far_writer = await asyncio.open_connection(self.host, self._target_port)
        except OSError:  # the broker is down
            self._writers.discard(writer)
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            for one in (writer, far_writer):
                self._writers.discard(one)
                one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward in order. Chunks that are late are late together, as on a long line; they do not wait in turn."""
        loop, due_s = asyncio.get_running_loop(), 0.0
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK_BYTES):
                delay_s = await self._suffer(len(chunk))
                if not delay_s and due_s <= loop.time():
                    writer.write(chunk)
                    await writer.drain()
                    continue
                due_s = max(due_s, loop.time() + delay_s)
                loop.call_at(due_s, _write, writer, chunk)
        await asyncio.sleep(due_s - loop.time())
        writer.close()

    async def _suffer(self, size: int) -> float:
        """Wait for what holds up every byte behind it; seconds that this chunk is late beyond that."""
        while self.toxics.half_open:
            await asyncio.sleep(0.05)
        bad, draw = self.toxics, self._random
        if bad.bytes_per_s:
            await asyncio.sleep(size / bad.bytes_per_s)
        late_s = max(0.0, bad.latency_ms + draw.uniform(-1, 1) * bad.jitter_ms) / 1e3
        return late_s + (RETRANSMISSION_S if draw.random() < bad.loss else 0.0)

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


def _write(writer: asyncio.StreamWriter, chunk: bytes) -> None:
    if not writer.is_closing():
        writer.write(chunk)
