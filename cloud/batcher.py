"""Micro-batches: collects what belongs together until there is enough of it or it has waited long enough."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Batcher(Generic[T]):
    """One lane per model, because a batch runs through one network.

    Parameters
    ----------
    max_size : int
        A lane with so many items leaves at once.
    max_wait_s : float
        A lane leaves when its first item has waited so long.
    max_held : int
        `put` waits while the lanes together hold so many.
    """

    def __init__(self, max_size: int, max_wait_s: float, max_held: int) -> None:
        self._max_size = max_size
        self._max_wait_s = max_wait_s
        self._max_held = max_held
        self._lanes: dict[bytes, deque[tuple[float, T]]] = {}
        self._changed = asyncio.Condition()
        self._closed = False

    @property
    def held(self) -> int:
        """Items that wait in the lanes."""
        return sum(map(len, self._lanes.values()))

    async def put(self, model: bytes, item: T) -> bool:
        """Add `item`, waiting for room; False, and it was not added, once the batcher is closed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or self.held < self._max_held)
            if self._closed:
                return False
            self._lanes.setdefault(model, deque()).append((time.monotonic(), item))
            self._changed.notify_all()
            return True

    async def take(self) -> tuple[bytes, list[T]] | None:
        """The next model and its batch; None when the batcher is closed and empty."""
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self._closed or self._lanes)
                if not self._lanes:
                    return None
                model, due_at = self._next_lane()
                if self._closed or due_at <= time.monotonic():
                    return model, self._leave(model)
                try:
                    async with asyncio.timeout(due_at - time.monotonic()):
                        await self._changed.wait()
                except TimeoutError:
                    continue  # the lane is due now

    async def close(self) -> None:
        """Accept nothing more; what is held leaves without waiting."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next_lane(self) -> tuple[bytes, float]:
        """The lane that is due first, and when; a full one has been due since its first item came."""

        def due_at(lane: deque[tuple[float, T]]) -> float:
            return lane[0][0] + (0.0 if len(lane) >= self._max_size else self._max_wait_s)

        model = min(self._lanes, key=lambda name: due_at(self._lanes[name]))
        return model, due_at(self._lanes[model])

    def _leave(self, model: bytes) -> list[T]:
        lane = self._lanes[model]
        batch = [lane.popleft()[1] for _ in range(min(self._max_size, len(lane)))]
        if not lane:
            del self._lanes[model]
        self._changed.notify_all()
        return batch
