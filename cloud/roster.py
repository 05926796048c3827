"""Which site each device is enrolled for, as the store had it a second ago: every message asks, and none may wait."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from sqlalchemy import func, select

from cloud import tables
from cloud.errors import StoreError
from cloud.metrics import Metrics
from cloud.store import Store
from splitward.errors import MessageError

log = logging.getLogger(__name__)

PERIOD_S = 1.0


class Roster:
    """The sites of the enrolled devices. Of devices that never enrolled it knows nothing, and lets them pass."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._failures = metrics.failures
        self._sites: dict[str, str] = {}
        self._form: tuple[int, int | None] = (0, None)

    def check(self, site: str, device: str) -> None:
        """Refuse (`MessageError`, `wrong_site`) a device that speaks for another site than its own.

        The broker knows a device by its certificate, which names no site.
        """
        home = self._sites.get(device)
        if home is not None and home != site:
            raise MessageError("wrong_site", f"device {device} of {home} sent on a topic of {site}.")

    async def keep(self) -> None:
        """Look once a second, until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.refresh()
            except StoreError as error:
                self._failures.labels("roster").inc()
                log.warning("%s", error)

    async def refresh(self) -> None:
        """Read all where one was enrolled or revoked since; `StoreError`."""
        enrolled = tables.enrolled
        query: Any = select(func.count().label("count"), func.max(enrolled.c.at_ns).label("last"))
        (row,) = await self._store.read(query.select_from(enrolled))
        form = (row["count"], row["last"])
        if form != self._form:
            rows = await self._store.read(select(enrolled.c.device, enrolled.c.site))
            self._sites = {one["device"]: one["site"] for one in rows}
            self._form = form
