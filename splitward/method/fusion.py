"""Convolution-sum fusion (section IV-D) and adaptive weighted decision fusion (section IV-E)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

INITIAL_WEIGHTS = (0.5, 0.3, 0.2)
"""The paper's weights, from the most accurate stream to the least."""


class ConvolutionSum(nn.Module):
    """`out = conv(concat(u, v)) + u` (Eq. 7, 8): [B, K, h, w] twice to [B, K, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, attacked: Tensor, recovered: Tensor) -> Tensor:
        """Fusion of the attacked activation u and the recovered activation v."""
        fused: Tensor = self.convolution(torch.cat((attacked, recovered), dim=1)) + attacked
        return fused


def rank_weights(accuracies: Sequence[float]) -> tuple[float, ...]:
    """`INITIAL_WEIGHTS` dealt out by rank of the streams' accuracies, in the order of `accuracies`.

    The paper orders its weights as its streams' own accuracies, recovered before fused before attacked. On
    other data the order may differ, so we measure it (on validation data).
    """
    order = sorted(range(len(accuracies)), key=lambda stream: -accuracies[stream])
    weights = [0.0] * len(accuracies)
    for weight, stream in zip(INITIAL_WEIGHTS, order, strict=True):
        weights[stream] = weight
    return tuple(weights)


def decision_fusion(scores: Tensor, weights: Tensor) -> Tensor:
    """Adaptive weighted average of the streams' scores (Eq. 9 to 11).

    `S = sum_k share_k * S_k` with `share_k = W_k*max(S_k) / sum_j W_j*max(S_j)`: a stream that is sure of
    itself on this frame counts for more. Eq. 9 to 11 are this, written out for three streams, with the third
    share as what is left to 1.

    Parameters
    ----------
    scores : Tensor, [B, streams, classes]
        Each stream's probabilities.
    weights : Tensor, [streams]

    Returns
    -------
    Tensor, [B, classes]
        Scores that sum to 1.
    """
    confidence = weights.view(1, -1, 1) * scores.amax(dim=2, keepdim=True)
    return (confidence / confidence.sum(dim=1, keepdim=True) * scores).sum(dim=1)
