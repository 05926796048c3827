"""The sealing stage of the `sealed` profile: bound, noise, quantise (method.md, section 4).

The bound comes before the noise, so training cannot scale the noise away. This is the training-time twin of
`splitward.wire.release`, which seals on the device; a test holds the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """k values, bounded by tanh: [B, K, h, w] to [B, k] in -1..1. The exported client half ends here."""

    def __init__(self, activation_shape: tuple[int, int, int], values: int) -> None:
        super().__init__()
        channels, height, width = activation_shape
        # Large activations are averaged to about 8x8 first: a dense layer on all of it would be heavier than
        # the server half.
        self.pool = max(1, height // 8)
        self.dense = nn.Linear(channels * (height // self.pool) * (width // self.pool), values)

    def forward(self, activation: Tensor) -> Tensor:
        """Bounded values [B, k]."""
        pooled = F.avg_pool2d(activation, self.pool) if self.pool > 1 else activation
        return torch.tanh(self.dense(pooled.flatten(1)))


class Seal(nn.Module):
    """Noise and quantisation of bounded values, as the device does them; gradients pass straight through.

    Parameters
    ----------
    sigma : float
        Standard deviation of the noise.
    bound : float
        Values are within [-bound, bound].
    scale : float
        Step of the released int8 values (`ReleaseLaw.scale`).
    """

    def __init__(self, sigma: float, bound: float, scale: float) -> None:
        super().__init__()
        self.sigma, self.bound, self.scale = sigma, bound, scale

    def forward(self, bounded: Tensor, noise: Tensor | None = None) -> Tensor:
        """Released values in real units, [B, k]; fresh noise unless standard normal `noise` [B, k] is given."""
        if noise is None:
            noise = torch.randn_like(bounded)
        grid = self.bound / 127
        # float64, so that a value half-way between two steps falls as it does on the device.
        clean = torch.round(bounded.detach().double() / grid).clamp(-127, 127) * grid
        noisy = clean + self.sigma * noise.double()
        released = torch.round(noisy / self.scale).clamp(-127, 127).to(bounded.dtype) * self.scale
        return bounded + (released - bounded).detach()


def conditional_entropy(bounded: Tensor, labels: Tensor, classes: int, sigma: float) -> Tensor:
    """Entropy term: mean log of (within-class variance + sigma^2) of the released values; a scalar to minimise.

    After CEM (Xia et al., CVPR 2025), with one Gaussian for each class: it bounds what the released values tell
    of the frame beyond its label.

    Parameters
    ----------
    bounded : Tensor, [B, k]
    labels : Tensor, int64 [B]
    """
    one_hot = F.one_hot(labels, classes).to(bounded.dtype)
    counts = one_hot.sum(0).clamp_min(1)
    means = (one_hot.T @ bounded) / counts[:, None]
    deviations = (bounded - means[labels]).square()
    variances = (one_hot.T @ deviations) / counts[:, None]
    shares = one_hot.sum(0) / len(labels)
    return (shares[:, None] * torch.log(variances + sigma * sigma)).sum(0).mean()
