"""The noise of a training; and gradients on their way down: each frame's clipped and, where ordered, noised.

torch's generators know 2^32 seeds, which who wants the noise away can try one after the other: so what must not be
guessed is drawn as a device draws its noise (`splitward.wire.release`), under a secret of 256 bits.

The gradient at the cut of one frame depends on its label and on the server half. With its norm clipped to C and
Gaussian noise of standard deviation z*C on it, another label moves it by 2C at most: a Gaussian mechanism of multiplier
z/2, once an epoch. So epsilon bounds what all gradients of a training tell of one frame's label to whoever reads them
on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from splitward.wire.release import normals

ORDERS = tuple(1 + x / 10 for x in range(1, 100)) + tuple(range(11, 512))
"""Renyi orders over which the best bound is sought."""


def draw_noise(secret: bytes, about: bytes, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that only the holder of `secret` can predict: the same for the same `about` alone."""
    return torch.tensor(normals(blake2b(about, key=secret).digest(), math.prod(shape))).view(*shape)


def clip_rows(gradient: Tensor, clip: float) -> Tensor:
    """Gradient of a batch's mean loss, [B, ...], with each frame's own norm at most `clip`; not below it."""
    norms = gradient.flatten(1).norm(dim=1) * len(gradient)
    factor = (clip / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)
    return gradient * factor.view(-1, *[1] * (gradient.dim() - 1))


def add_noise(gradient: Tensor, clip: float, noise: float, drawn: Tensor) -> Tensor:
    """Clipped gradient with noise of `noise * clip` on each frame's own, of the standard normal numbers `drawn`."""
    return gradient + drawn * (noise * clip / len(gradient))


def epsilon(noise: float, releases: int, delta: float = 1e-5) -> float:
    """Epsilon at `delta` of `releases` clipped and noised gradients of one frame; infinite without noise.

    Renyi divergence of the Gaussian mechanism (Mironov 2017, Corollary 3), composed by addition, converted by Theorem
    21 of Balle et al. 2020. Every frame is released once an epoch and none is sampled, so there is no amplification and
    the closed form is all that an accountant would compute.
    """
    if noise <= 0:
        return math.inf
    multiplier = noise / 2
    found = (
        releases * order / (2 * multiplier**2)
        + math.log1p(-1 / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in ORDERS
    )
    return max(0.0, min(found))
