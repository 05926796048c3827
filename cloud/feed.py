"""Live events for whoever reads `/events`: a slow reader misses some, and holds up nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import msgspec
from prometheus_client import Counter

from cloud.store import Record

QUEUE_SIZE = 256
MAX_READERS = 32
KEEP_ALIVE_S = 15.0
_encoder = msgspec.json.Encoder()


class Reader:
    """One open stream: the events that it has not read yet, and how many it missed."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue(QUEUE_SIZE)
        self.missed = 0


class Feed:
    """Hands each new record to every reader as a server-sent event."""

    def __init__(self, dropped: Counter) -> None:
        self._dropped = dropped
        self._readers: set[Reader] = set()
        self._closed = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether there are as many readers as there may be."""
        return len(self._readers) >= MAX_READERS

    def publish(self, records: Iterable[Record]) -> None:
        """Send `records` to every reader that has room for them."""
        if not self._readers:
            return
        for record in records:
            event = b"event: result\ndata: " + _encoder.encode(record) + b"\n\n"
            for reader in self._readers:
                if reader.queue.full():
                    reader.missed += 1
                    self._dropped.inc()
                else:
                    reader.queue.put_nowait(event)

    def close(self) -> None:
        """End every stream; an open one would hold up the shutdown of the server."""
        self._closed.set()

    async def stream(self) -> AsyncIterator[bytes]:
        """Events of one reader, until it leaves or the feed closes; a comment keeps an idle one open."""
        reader = Reader()
        self._readers.add(reader)
        closed = asyncio.create_task(self._closed.wait())
        try:
            yield b": open\n\n"
            while not closed.done():
                arrival = asyncio.create_task(reader.queue.get())
                await asyncio.wait((arrival, closed), timeout=KEEP_ALIVE_S, return_when=asyncio.FIRST_COMPLETED)
                if arrival.done():
                    yield arrival.result()
                else:
                    arrival.cancel()
                    yield b": idle\n\n"
                if reader.missed:
                    missed, reader.missed = reader.missed, 0
                    yield b"event: missed\ndata: %d\n\n" % missed
        finally:
            closed.cancel()
            self._readers.discard(reader)
