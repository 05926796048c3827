"""Posterior mean over the auxiliary images: which of them may have been released as the target was.

With the noise's own sigma as bandwidth this is the best estimate under the auxiliary images as prior (Nadaraya
1964, Watson 1964); a wider one also covers that a target is none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.practice import Practice
from splitward.training.loop import reproducible

_CHUNK = 250
CARD = ThreatModel(
    name="neighbour",
    title="posterior mean over auxiliary images",
    phase="inference",
    knows=("released tensor", "release law", "client runs as a black box", "auxiliary images"),
    method="Averages the auxiliary images, each weighted by the Gaussian likelihood of what was released given "
    "its own values; the bandwidth is the one that served held-out auxiliary images best.",
    source="Nadaraya 1964 and Watson 1964",
)


@dataclass(frozen=True)
class Neighbour:
    """`sum_i w_i x_i`, `w = softmax_i(-||z - a_i||^2 / (2 h^2))`.

    Attributes
    ----------
    draws : int
        Releases of each auxiliary image, whose mean is `a_i`: nearly its values before the noise.
    bandwidths : tuple of float
        `h^2` to choose from, as shares of the median squared distance to the nearest auxiliary image.
    """

    draws: int = 8
    bandwidths: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 1.0)

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return CARD

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[M, C, H, W]."""
        with reproducible(seed):
            practice = Practice(case)
            held = practice.release(practice.held_rows)
            own = practice.release(practice.rows)
            values = own.released
            for _ in range(self.draws - 1):
                values = values + practice.release(practice.rows).released
            values, pixels = (values / self.draws).flatten(1), own.frames.flatten(1)
            gaps = _gaps(held.released, values)
            nearest = gaps.amin(1).median().clamp_min(1e-12)
            wanted = held.frames.flatten(1)
            errors = [
                (_posterior(gaps, share * nearest) @ pixels - wanted).square().mean().item()
                for share in self.bandwidths
            ]
            share = self.bandwidths[errors.index(min(errors))]
            guesses = _posterior(_gaps(case.released, values), share * nearest) @ pixels
        return guesses.clamp(0, 1).reshape(-1, *case.frame_shape)


def _gaps(released: Tensor, values: Tensor) -> Tensor:
    """Squared distances, [M, N]."""
    return torch.cat(
        [torch.cdist(chunk, values).square() for chunk in torch.split(released.flatten(1), _CHUNK)]
    )


def _posterior(gaps: Tensor, variance: Tensor) -> Tensor:
    return (-gaps / (2 * variance)).softmax(1)
