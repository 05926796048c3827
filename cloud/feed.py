"""Live events for whoever reads `/v1/events`: a slow reader misses some, and holds up nobody."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

import msgspec
from prometheus_client import Counter

from cloud.admission import Arrival
from cloud.errors import StoreError
from cloud.picture import Picture, draw_released
from cloud.record import Key, Record
from splitward.wire.control import Result

QUEUE_SIZE = 256
MAX_READERS = 32
KEEP_ALIVE_S = 15.0
_encoder = msgspec.json.Encoder()


class Event(msgspec.Struct, frozen=True):
    """A record, and what its device released as a small picture."""

    site: str
    device: str
    received_at_ns: int
    result: Result
    checksum: int
    released: Picture | None


class _Reader:
    """One open stream: the events that it has not read yet, and how many it missed."""

    def __init__(self) -> None:
        self.events: deque[bytes] = deque()
        self.missed = 0
        self.wake = asyncio.Event()


class Feed:
    """Hands each new record to every reader as a server-sent event."""

    def __init__(self, dropped: Counter) -> None:
        self._dropped = dropped
        self._readers: set[_Reader] = set()
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether there are as many readers as there may be."""
        return len(self._readers) >= MAX_READERS

    def publish(self, records: Iterable[Record], arrivals: Mapping[Key, Arrival]) -> None:
        """Send `records` to every reader that has room for them; nothing is drawn where nobody looks."""
        if not self._readers:
            return
        for record in records:
            event = b"event: result\ndata: " + _encode(record, arrivals.get(record.key)) + b"\n\n"
            for reader in self._readers:
                if len(reader.events) < QUEUE_SIZE:
                    reader.events.append(event)
                else:
                    reader.missed += 1
                    self._dropped.inc()
                reader.wake.set()

    def close(self) -> None:
        """End every stream; an open one would hold up the shutdown of the server."""
        self._closed = True
        for reader in self._readers:
            reader.wake.set()

    async def stream(self, may_go_on: Callable[[], Awaitable[bool]]) -> AsyncIterator[bytes]:
        """Events of one reader, until it leaves, may not go on or the feed closes; a comment keeps an idle one open.

        Whether it may is asked every `KEEP_ALIVE_S`, as a token can be revoked meanwhile. While the store does not
        answer the stream goes on: without it there is no new result.
        """
        reader, asked_s = _Reader(), time.monotonic()
        self._readers.add(reader)
        try:
            yield b": open\n\n"
            while not self._closed:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        await reader.wake.wait()
                except TimeoutError:
                    yield b": idle\n\n"
                if time.monotonic() - asked_s >= KEEP_ALIVE_S:
                    asked_s = time.monotonic()
                    with contextlib.suppress(StoreError):
                        if not await may_go_on():
                            return
                reader.wake.clear()
                while reader.events:
                    yield reader.events.popleft()
                if reader.missed:
                    missed, reader.missed = reader.missed, 0
                    yield b"event: missed\ndata: %d\n\n" % missed
        finally:
            self._readers.discard(reader)


def _encode(record: Record, arrival: Arrival | None) -> bytes:
    released = None if arrival is None else draw_released(arrival.activation.values)
    place = (record.site, record.device, record.received_at_ns)
    return _encoder.encode(Event(*place, record.result, record.checksum, released))
