"""What an attack that learns has to learn from: the attacker's own frames, released on a device of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from splitward.audit.attack import Case

HELD_OUT = 5
"""One auxiliary image in so many is kept for the attacker's own choices (our choice)."""


class Pairs(NamedTuple):
    """Released tensors [B, *shape], their frames [B, C, H, W] and labels [B]."""

    released: Tensor
    frames: Tensor
    labels: Tensor


class Practice:
    """The auxiliary images of a case, a fifth of them held out; every draw of them is released afresh.

    Its randomness is torch's, so it belongs within `reproducible`.

    Parameters
    ----------
    case : Case
    captures : int
        Each frame is released so many times and the mean is taken, as an attacker does who has as many captures
        of each target.
    """

    def __init__(self, case: Case, captures: int = 1) -> None:
        if len(case.auxiliary) < HELD_OUT:
            raise ValueError(
                f"{len(case.auxiliary)} auxiliary images: an attack that learns needs {HELD_OUT} or more."
            )
        self._case, self._captures = case, captures
        order = torch.randperm(len(case.auxiliary))
        held = len(order) // HELD_OUT
        self.held_rows, self.rows = order[:held], order[held:]
        # A stream of its own: the targets' noise may have been drawn from a generator with this very seed.
        self._noise = torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def draw(self, count: int) -> Pairs:
        """Random pairs to learn from."""
        return self.release(self.rows[torch.randint(len(self.rows), (count,))])

    def release(self, rows: Tensor) -> Pairs:
        """Pairs of these auxiliary images, with noise that was never drawn before."""
        frames = self._case.auxiliary[rows]
        released = self._case.release(frames, self._noise)
        for _ in range(self._captures - 1):
            released = released + self._case.release(frames, self._noise)
        return Pairs(released / self._captures, frames, self._case.auxiliary_labels[rows])
