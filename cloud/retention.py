"""Deletes results that are older than the configuration keeps them, a few at a time."""

from __future__ import annotations

import asyncio
import logging
import time

from cloud.config import StoreConfig
from cloud.errors import StoreError
from cloud.metrics import Metrics
from cloud.store import Store

log = logging.getLogger(__name__)

PERIOD_S = 600.0
DAY_NS = 86_400_000_000_000


async def keep_retention(store: Store, config: StoreConfig, metrics: Metrics) -> None:
    """Delete what is too old every ten minutes, until cancelled."""
    while True:
        try:
            await delete_old(store, config.retention_days, time.time_ns())
        except StoreError as error:
            metrics.failures.labels("retention").inc()
            log.warning("retention: %s", error)
        await asyncio.sleep(PERIOD_S)


async def delete_old(store: Store, days: float, now_ns: int) -> int:
    """Delete the results stored more than `days` ago, in batches that leave room for commits; how many."""
    total = 0
    while days and (count := await store.forget(now_ns - int(days * DAY_NS))):
        total += count
        await asyncio.sleep(0)
    return total
