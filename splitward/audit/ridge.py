"""Ridge regression from released values to pixels: the linear attack, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.practice import Practice
from splitward.training.loop import reproducible

CARD = ThreatModel(
    name="ridge",
    title="ridge regression",
    phase="inference",
    knows=("released tensor", "release law", "client runs as a black box", "auxiliary images"),
    method="Least squares with a quadratic penalty from released values to pixels, in closed form; the penalty "
    "is the one that served held-out auxiliary images best.",
    source="Hoerl and Kennard, Technometrics 1970",
)


@dataclass(frozen=True)
class Ridge:
    """`min ||Y - Z W||^2 + penalty ||W||^2` on centred auxiliary pairs, float64.

    Attributes
    ----------
    images : int
        Most auxiliary images; time and memory grow with the square of images or released values, whichever are
        fewer.
    penalties : tuple of float
        To choose from, as shares of the mean eigenvalue of the Gram matrix.
    """

    images: int = 10_000
    penalties: tuple[float, ...] = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return CARD

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[M, C, H, W]."""
        with reproducible(seed):
            practice = Practice(case)
            own = practice.release(practice.rows[: self.images])
            held = practice.release(practice.held_rows)
        values, pixels = own.released.flatten(1).double(), own.frames.flatten(1).double()
        centre, mean = values.mean(0), pixels.mean(0)
        values, pixels = values - centre, pixels - mean
        known, wanted = held.released.flatten(1).double() - centre, held.frames.flatten(1).double() - mean
        best, least = torch.zeros(values.shape[1], pixels.shape[1], dtype=torch.float64), float("inf")
        # With more values than images the same weights come from the images' smaller Gram matrix (dual form).
        dual = values.shape[1] > len(values)
        gram = values @ values.T if dual else values.T @ values
        right = pixels if dual else values.T @ pixels
        identity = torch.eye(len(gram), dtype=torch.float64)
        for penalty in self.penalties:
            scale = penalty * gram.diagonal().mean().clamp_min(1e-12)
            weights = torch.cholesky_solve(right, torch.linalg.cholesky(gram + scale * identity))
            weights = values.T @ weights if dual else weights
            error = (known @ weights - wanted).square().mean().item()
            if error < least:
                best, least = weights, error
        guesses = (case.released.flatten(1).double() - centre) @ best + mean
        return guesses.clamp(0, 1).float().reshape(-1, *case.frame_shape)
