"""Medians of callables that take turns, so that a noisy neighbour disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def alternate(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call, after one warm-up each."""
    for call in calls:
        call()
    spent_s: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, spent_s, strict=True):
            started_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - started_s)
    return [statistics.median(times) for times in spent_s]
