"""Parts of the defences that `sealed` is compared with; a device ships none of them.

NoPeek (Vepakomma et al. 2020) lowers the distance correlation of frame and activation, ResSFL (Li et al., CVPR 2022)
trains against a decoder of its own, and the controls send nothing but the label or the scores
of a classifier of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.method.fusion import decision_fusion
from splitward.method.halves import NetworkSettings, StreamOutputs

_ADVERSARY_WIDTH = 16


def distance_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Squared sample distance correlation of two batches, a scalar in 0..1 (Szekely et al. 2007, Eq. 2.8 to 2.10).

    Parameters
    ----------
    a, b : Tensor, [B, ...]
    """
    A, B = _centred_distances(a.flatten(1)), _centred_distances(b.flatten(1))
    floor = torch.finfo(A.dtype).tiny
    return (A * B).mean() / (A.square().mean() * B.square().mean()).clamp_min(floor).sqrt()


def _centred_distances(rows: Tensor) -> Tensor:
    wide = rows.double()  # |a|^2 + |b|^2 - 2 ab loses digits where two rows are near one another
    norms = wide.square().sum(1)
    squares = (norms[:, None] + norms[None, :] - 2 * wide @ wide.mT).to(rows.dtype)
    # The root has no gradient at 0, where a row meets itself.
    other = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    distances = torch.where(other, squares.clamp_min(1e-12).sqrt(), 0.0)
    return distances - distances.mean(0, keepdim=True) - distances.mean(1, keepdim=True) + distances.mean()


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is turned round and weighted (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grad_outputs[0], None


class Adversary(nn.Module):
    """A decoder that learns to reconstruct while the client half learns to prevent it, both in one step.

    Our choice: gradient reversal instead of alternating steps, so that one optimiser and one checkpoint hold both.
    """

    def __init__(self, settings: NetworkSettings, weight: float) -> None:
        super().__init__()
        self.weight = weight
        side, width = settings.side // 4, _ADVERSARY_WIDTH
        flat = 1
        for extent in settings.release_shape:
            flat *= extent
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(flat, width * side * side),
            nn.Unflatten(1, (width, side, side)),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 4 * width, 3, padding=1),
            nn.PixelShuffle(2),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, 4 * settings.channels, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, released: Tensor, frames: Tensor) -> Tensor:
        """Its squared error as a share of the frames' variance; a scalar."""
        reversed_: Tensor = _Reverse.apply(released, self.weight)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        variance = (frames - frames.mean(0)).square().mean().clamp_min(1e-6)
        return F.mse_loss(self.body(reversed_), frames) / variance


class LabelServer(nn.Module):
    """Server half of the controls: what the device found is the answer of every stream."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((3,), 1 / 3))

    def forward(self, released: Tensor) -> StreamOutputs:
        """Logits, or a label as one-hot, [B, classes]."""
        scores = torch.stack([released.softmax(1)] * 3, dim=1)
        return StreamOutputs(released, released, released, decision_fusion(scores, self.get_buffer("weights")))
