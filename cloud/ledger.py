"""What may be a second late on disk: the last word of each device, and refused messages.

A commit costs a disk flush. Results pay for theirs by the batch; these are gathered and written once a second,
so that a burst of statuses (every retained one, at each connection) or of broken messages costs one commit.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from prometheus_client import Counter

from cloud.errors import StoreError
from cloud.store import DeadLetter, Device, Store
from splitward.wire.control import Status

log = logging.getLogger(__name__)

PERIOD_S = 1.0
HEAD_BYTES = 256
MAX_TOPIC = 256


class Ledger:
    """Gathers notes and writes them to the store."""

    def __init__(self, store: Store, failures: Counter, max_dead_letters: int) -> None:
        self._store = store
        self._failures = failures
        self._devices: dict[tuple[str, str], Device] = {}
        self._letters: deque[DeadLetter] = deque(maxlen=max_dead_letters)

    def note_device(self, site: str, device: str, at_ns: int, status: Status | None = None) -> None:
        """The device was heard of at `at_ns`, perhaps with a new status."""
        noted = self._devices.get((site, device))
        if status is None and noted is not None:
            status = noted.status
        self._devices[site, device] = Device(site, device, at_ns, status)

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
        devices, letters = dict(self._devices), list(self._letters)
        self._devices.clear()
        self._letters.clear()
        try:
            if devices:
                await self._store.save_devices(devices.values())
                devices.clear()
            if letters:
                await self._store.bury(letters)
        except StoreError as error:
            self._failures.labels("ledger").inc()
            log.warning("%s", error)
            self._devices = devices | self._devices
            self._letters.extendleft(reversed(letters))
