"""Adaptive micro-batches: collects what belongs together while the load promises that waiting pays."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

SMOOTHING = 0.1
"""Share of the newest observation in the mean time between two items."""


class _Lane(Generic[T]):
    """Items of one model, and how fast they come."""

    def __init__(self) -> None:
        self.items: deque[T] = deque()
        self.first_at = 0.0
        self.last_at = 0.0
        self.gap_s = 1.0
        self.due = False
        """Whether it stands in the queue of lanes that may leave."""
        self.timer: asyncio.TimerHandle | None = None


class Batcher(Generic[T]):
    """One lane per model, because a batch runs through one network.

    A full lane leaves at once. Another one waits while its rate of arrival promises at least one more item within
    `max_wait_s` of its first one's arrival, and no longer than filling it would take at that rate: at low load
    nothing waits in vain, at high load batches are full. An item costs no more than its place: takers sleep until a
    lane is due, and a lane has one timer. What a lane may hold is bounded by the transport, which stops reading.

    Parameters
    ----------
    max_size : int
        Items in a batch.
    max_wait_s : float
        Longest wait of a lane's first item.
    """

    def __init__(self, max_size: int, max_wait_s: float) -> None:
        self._max_size = max_size
        self._max_wait_s = max_wait_s
        self._lanes: dict[bytes, _Lane[T]] = {}
        self._due: asyncio.Queue[bytes | None] = asyncio.Queue()
        """Models whose lanes may leave, the longest due first; None once the batcher is closed."""
        self._closed = False

    @property
    def held(self) -> int:
        """Items that wait in the lanes."""
        return sum(len(lane.items) for lane in self._lanes.values())

    def put(self, model: bytes, items: Iterable[T]) -> bool:
        """Add `items`, in the event loop; False, and they were not added, once the batcher is closed."""
        if self._closed:
            return False
        now, lane = time.monotonic(), self._lanes.get(model)
        if lane is None:
            lane = self._lanes[model] = _Lane()
        if not lane.items:
            lane.first_at = now
        before = len(lane.items)
        lane.items.extend(items)
        count = len(lane.items) - before
        if count:
            gap_s = min(1.0, now - lane.last_at) / count
            lane.gap_s += min(1.0, SMOOTHING * count) * (gap_s - lane.gap_s)
            lane.last_at = now
            self._look(model, lane)
        return True

    async def take(self) -> tuple[bytes, list[T]] | None:
        """The next model and its batch; None when the batcher is closed and empty."""
        while (model := await self._due.get()) is None:
            self._due.put_nowait(None)  # behind what is due still, and for the other takers
            if not self.held:
                return None
        lane = self._lanes[model]
        batch = [lane.items.popleft() for _ in range(min(self._max_size, len(lane.items)))]
        lane.due = False
        if lane.items:
            lane.first_at = time.monotonic()  # of the rest, nearly
            self._look(model, lane)
        return model, batch

    def close(self) -> None:
        """Accept nothing more; what is held leaves without waiting."""
        self._closed = True
        for model, lane in self._lanes.items():
            if lane.items:
                self._look(model, lane)
        self._due.put_nowait(None)

    def _look(self, model: bytes, lane: _Lane[T]) -> None:
        """Let a lane that holds something leave now or when it will be due."""
        if lane.due:
            return
        rest_s = 0.0 if self._closed else self._due_at(lane) - time.monotonic()
        if rest_s <= 0:
            self._let_go(model, lane)
        elif lane.timer is None:
            lane.timer = asyncio.get_running_loop().call_later(rest_s, self._let_go, model, lane)

    def _let_go(self, model: bytes, lane: _Lane[T]) -> None:
        if lane.timer is not None:
            lane.timer.cancel()
            lane.timer = None
        lane.due = True
        self._due.put_nowait(model)

    def _due_at(self, lane: _Lane[T]) -> float:
        missing = self._max_size - len(lane.items)
        if missing <= 0 or lane.gap_s > self._max_wait_s:
            return lane.first_at
        return lane.first_at + min(self._max_wait_s, missing * lane.gap_s)
