"""Which spooled frames were not published yet, and which of them comes next.

Rows are numbered in the order of spooling. A `Backlog` keeps the unpublished rows of one priority as intervals, so
that a day without a connection costs a few integers and not a list of all its frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Order = Literal["oldest", "newest"]
Find = Callable[[int, int], int | None]
"""Row that exists in [low, high): the first or the last, by the order; or None."""


class Backlog:
    """Unpublished rows of one priority.

    Parameters
    ----------
    order : "oldest" or "newest"
        Which comes next.
    find : callable
        Looks a row up; see `Find`.
    """

    def __init__(self, order: Order, find: Find) -> None:
        self._order = order
        self._find = find
        self._intervals: list[tuple[int, int]] = []  # [low, high) each, ascending; no published row is inside
        self._highest_taken = -1

    def add(self, low: int, high: int) -> None:
        """Note that rows of [low, high) may be there now; all are above those noted before."""
        if self._intervals and self._intervals[-1][1] > self._highest_taken:
            low = self._intervals.pop()[0]
        self._intervals.append((low, high))

    def take(self) -> int | None:
        """The next row, which counts as published from now on; None when there is none."""
        while self._intervals:
            at = 0 if self._order == "oldest" else -1
            low, high = self._intervals[at]
            row = self._find(low, high)
            if row is None:
                del self._intervals[at]
                continue
            self._highest_taken = max(self._highest_taken, row)
            left = (row + 1, high) if self._order == "oldest" else (low, row)
            if left[0] < left[1]:
                self._intervals[at] = left
            else:
                del self._intervals[at]
            return row
        return None
