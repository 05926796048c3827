"""Which site each device is enrolled for and who was revoked, as the store had it a second ago: every message asks, and
none may wait."""

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
    """The sites of the enrolled devices, and who was revoked and has not enrolled again.

    Of devices that never enrolled it knows nothing, and lets them pass.
    """

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._failures = metrics.failures
        self._sites: dict[str, str | None] = {}
        """None of a revoked device."""
        self._form: tuple[int, int | None] | None = None

    def check(self, site: str, device: str) -> None:
        """Refuse (`MessageError`) a device that speaks for another site than its own (`wrong_site`), or was `revoked`.

        The broker knows a device by its certificate, which names no site, and a revoked one goes on on the connection
        that it has.
        """
        home = self._sites.get(device, site)
        if home is None:
            raise MessageError("revoked", f"device {device} was revoked: enrol it again.")
        if home != site:
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
            known = tables.certificates
            everybody = known.outerjoin(enrolled, enrolled.c.device == known.c.device)
            rows = await self._store.read(
                select(known.c.device, enrolled.c.site).select_from(everybody).distinct()
            )
            self._sites = {one["device"]: one["site"] for one in rows}
            self._form = form
