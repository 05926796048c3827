"""The sealing stage of the `sealed` profile: bound, noise, quantise (docs/method.md, section 4).

The bound comes before the noise, so training cannot scale the noise away. This is the training-time twin of
`splitward.wire.release`, which seals on the device; a test holds the two together.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Spread = Literal["class", "frame"]

FINEST = 127
"""Steps of the finest grid, that of int8."""

LEAK = 0.1
"""Share of the gradient that passes the bound in training (our choice, on validation data)."""


class Bottleneck(nn.Module):
    """k values, bounded by tanh: [B, K, h, w] to [B, k] in -1..1. The exported client half ends here.

    `bounded=False` leaves out the tanh, for defences that are compared with `sealed`.
    """

    def __init__(self, activation_shape: tuple[int, int, int], values: int, *, bounded: bool = True) -> None:
        super().__init__()
        self.bounded = bounded
        channels, height, width = activation_shape
        # Large activations are averaged to about 8x8 first: a dense layer on all of it would be heavier than
        # the server half.
        self.pool = max(1, height // 8)
        self.dense = nn.Linear(channels * (height // self.pool) * (width // self.pool), values)

    def forward(self, activation: Tensor) -> Tensor:
        """Values [B, k]."""
        pooled = F.avg_pool2d(activation, self.pool) if self.pool > 1 else activation
        values = self.dense(pooled.flatten(1))
        if not self.bounded:
            return values
        bounded = torch.tanh(values)
        # In training a part of the gradient passes the bound as if it were not there: where tanh is flat, nothing
        # else would ever bring back a frame that lies at the wrong end.
        return bounded + LEAK * (values - values.detach()) if self.training else bounded


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
    steps : int
        Of the grid of the values before the noise (`ReleaseLaw.steps`). In training mode it is 127: over coarse steps
        the gradient passes less truly, and values that training has drawn together lose nothing by them (measured).
    training_sigma : float, optional
        Standard deviation of the noise in training mode; default: `sigma`.
    """

    def __init__(
        self,
        sigma: float,
        bound: float,
        scale: float,
        steps: int = FINEST,
        training_sigma: float | None = None,
    ) -> None:
        super().__init__()
        self.sigma, self.bound, self.scale, self.steps = sigma, bound, scale, steps
        self.training_sigma = sigma if training_sigma is None else training_sigma

    def forward(self, bounded: Tensor, noise: Tensor | None = None) -> Tensor:
        """Released values in real units, [B, k]; fresh noise unless standard normal `noise` [B, k] is given."""
        if noise is None:
            noise = torch.randn_like(bounded)
        sigma = self.training_sigma if self.training else self.sigma
        noisy = self.round_clean(bounded) + sigma * noise.double()
        # The range of int8 is that of the device's noise: more of it in training is not cut off.
        reach = FINEST * max(1.0, sigma / self.sigma) if self.sigma else FINEST
        released = torch.round(noisy / self.scale).clamp(-reach, reach).to(bounded.dtype) * self.scale
        return bounded + (released - bounded).detach()

    def round_clean(self, bounded: Tensor) -> Tensor:
        """Values on the grid, which key the noise and carry it; float64.

        In float64 a value half-way between two steps falls as it does on the device.
        """
        grid = self.bound / (FINEST if self.training else self.steps)
        return torch.round(bounded.detach().double() / grid).clamp(-FINEST, FINEST) * grid


def conditional_entropy(
    bounded: Tensor, labels: Tensor, classes: int, sigma: float, spread: Spread = "class"
) -> Tensor:
    """Entropy term: mean log of (spread + sigma^2) of the released values; a scalar to minimise.

    The spread of a class is its variance, of each value: after CEM (Xia et al., CVPR 2025), with one Gaussian for each
    class, it bounds what the released values tell of the frame beyond its label. That of a frame is its mean squared
    distance from the mean of its class (our choice): a frame far from it, which is hard to tell, is pulled less.

    Parameters
    ----------
    bounded : Tensor, [B, ...]
    labels : Tensor, int64 [B]
    """
    bounded = bounded.flatten(1)
    one_hot = F.one_hot(labels, classes).to(bounded.dtype)
    counts = one_hot.sum(0).clamp_min(1)
    means = (one_hot.T @ bounded) / counts[:, None]
    deviations = (bounded - means[labels]).square()
    if spread == "frame":
        return torch.log(deviations.mean(1) + sigma * sigma).mean()
    variances = (one_hot.T @ deviations) / counts[:, None]
    shares = one_hot.sum(0) / len(labels)
    return (shares[:, None] * torch.log(variances + sigma * sigma)).sum(0).mean()
