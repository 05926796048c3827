"""Which frames are under way: published, and not yet both acknowledged and answered. No I/O and no clock.

A frame without a result gives up its place and is due again after a pause that doubles, so that a frame which
never gets one does not hold up the others. When no result comes at all the cloud is away: then only the oldest
gives up its place, once in `retry_s`, so that a broker does not fill with what nobody reads.
"""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass

from edge.config import LinkConfig


@dataclass(slots=True)
class _Flight:
    row: int
    sent_s: float
    tries: int
    kept: bool = False
    answered: bool = False


class Window:
    """Bookkeeping of the frames under way. Every `now_s` is of one monotonic clock.

    Parameters
    ----------
    config : LinkConfig
        `window`, `retry_s` and `retry_max_s` are read.
    """

    def __init__(self, config: LinkConfig) -> None:
        self._config = config
        self._flights: dict[int, _Flight] = {}
        self._by_mid: dict[int, _Flight] = {}
        self._retries: list[tuple[float, int, int]] = []  # due_s, row, tries: a heap
        self._closed_until_s = 0.0
        self._probe_due_s = 0.0
        self._replied_s = -math.inf

    def has_room(self, now_s: float) -> bool:
        """Whether another frame may be published now."""
        return len(self._flights) < self._config.window and now_s >= self._closed_until_s

    def take_due(self, now_s: float) -> tuple[int, int] | None:
        """Row and number of tries of a frame to send again, if one is due."""
        if not self._retries or self._retries[0][0] > now_s:
            return None
        _, row, tries = heapq.heappop(self._retries)
        return row, tries

    def publish(self, row: int, tries: int, mid: int, now_s: float) -> None:
        """Note that the frame at `row` was published under the message id `mid`."""
        self._flights[row] = self._by_mid[mid] = _Flight(row, now_s, tries)

    def acknowledge(self, mid: int, kept: bool, now_s: float) -> None:
        """Note the broker's acknowledgement; where it kept nothing, everything pauses for `retry_s`."""
        flight = self._by_mid.pop(mid, None)
        if flight is None:
            return  # a status
        if kept or flight.answered:
            flight.kept = True
            self._land(flight)
        else:
            self._closed_until_s = now_s + self._config.retry_s
            self._postpone(flight, now_s)

    def answer(self, row: int, now_s: float) -> None:
        """Note the result or refusal of the frame at `row`."""
        self._replied_s = now_s
        flight = self._flights.get(row)
        if flight is not None:
            flight.answered = True
            self._land(flight)

    def give_up(self, now_s: float) -> None:
        """Take out the frames whose result is late: all of them, or the oldest if no result comes at all."""
        patience_s = self._config.retry_s
        late = [one for one in self._flights.values() if one.kept and now_s - one.sent_s >= patience_s]
        if late and self._replied_s < late[0].sent_s:
            late = late[:1] if now_s >= self._probe_due_s else []
            self._probe_due_s = now_s + patience_s if late else self._probe_due_s
        for flight in late:
            self._postpone(flight, now_s)

    def forget(self, now_s: float) -> None:
        """Make every acknowledged frame due at once: the broker that had kept them has lost its memory.

        What was not acknowledged paho sends again by itself.
        """
        for flight in [one for one in self._flights.values() if one.kept]:
            del self._flights[flight.row]
            heapq.heappush(self._retries, (now_s, flight.row, flight.tries + 1))

    def _land(self, flight: _Flight) -> None:
        if flight.kept and flight.answered:
            del self._flights[flight.row]

    def _postpone(self, flight: _Flight, now_s: float) -> None:
        longest_s = min(self._config.retry_s * 2.0 ** min(flight.tries, 32), self._config.retry_max_s)
        pause_s = longest_s * random.uniform(0.5, 1.0)  # noqa: S311  # spreads a fleet; no secret
        del self._flights[flight.row]
        heapq.heappush(self._retries, (now_s + pause_s, flight.row, flight.tries + 1))
