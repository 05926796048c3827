"""What may be a second late on disk: the last word of each device, and refused messages.

A commit costs a disk flush. Results pay for theirs by the batch; these are gathered and written once a second,
so that a burst of statuses (every retained one, at each connection) or of broken messages costs one commit.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from cloud.errors import StoreError
from cloud.metrics import Metrics
from cloud.record import DeadLetter, Device
from cloud.store import Store
from splitward.wire.control import Status

log = logging.getLogger(__name__)

PERIOD_S = 1.0
HEAD_BYTES = 256
MAX_TOPIC = 256
MAX_QUEUED = 1_000_000
"""The most that one device's word adds to the frames that wait, by which workers are added."""


class Ledger:
    """Gathers notes and writes them to the store."""

    def __init__(self, store: Store, metrics: Metrics, max_dead_letters: int) -> None:
        self._store = store
        self._failures = metrics.failures
        self._seen: dict[tuple[str, str], int] = {}
        self._statuses: dict[tuple[str, str], Status] = {}
        self._queued: dict[tuple[str, str], int] = {}
        self._letters: deque[DeadLetter] = deque(maxlen=max_dead_letters)
        metrics.devices_queued.set_function(lambda: sum(self._queued.values()))

    def note_seen(self, site: str, device: str, at_ns: int) -> None:
        """The device was heard of at `at_ns`."""
        self._seen[site, device] = at_ns

    def note_status(self, site: str, device: str, at_ns: int, status: Status) -> None:
        """The device sent a status."""
        self._seen[site, device] = at_ns
        self._statuses[site, device] = status
        self._queued[site, device] = min(status.queued, MAX_QUEUED)

    def note_refusal(self, at_ns: int, topic: str, reason: str, payload: bytes) -> None:
        """A message was refused for `reason`."""
        self._letters.append(DeadLetter(at_ns, topic[:MAX_TOPIC], reason, payload[:HEAD_BYTES].hex()))

    async def keep(self) -> None:
        """Write once a second, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.write()

    async def write(self) -> None:
        """Write what was noted; when the store fails it stays noted, and newer notes replace it."""
        seen, statuses, letters = self._seen, self._statuses, list(self._letters)
        self._seen, self._statuses = {}, {}
        self._letters.clear()
        try:
            if seen:
                await self._store.save_devices(
                    Device(*place, at_ns, statuses.get(place)) for place, at_ns in sorted(seen.items())
                )
                seen = {}
            if letters:
                await self._store.bury(letters)
        except StoreError as error:
            self._failures.labels("ledger").inc()
            log.warning("%s", error)
            if seen:
                self._seen, self._statuses = seen | self._seen, statuses | self._statuses
            self._letters.extendleft(reversed(letters))
