"""The noise of a training; and gradients on their way down: each frame's clipped and, where ordered, noised.

torch's generators know 2^32 seeds, which who wants the noise away can try one after the other: so what must not be
guessed is drawn as a device draws its noise (`splitward.wire.release`), under a secret of 256 bits.

The gradient at the cut of one frame depends on its label. Clipping bounds how much of it whoever reads the gradient on
the way sees, and noise of that size blurs it. No figure of differential privacy comes with that: the label also moves
the server half, which learns from losses that are not clipped, and with it the gradients of every later batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from splitward.wire.release import normals


def draw_noise(secret: bytes, about: bytes, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers that only the holder of `secret` can predict: the same for the same `about` alone."""
    return torch.tensor(normals(blake2b(about, key=secret).digest(), math.prod(shape))).view(*shape)


def draw_order(secret: bytes, about: bytes, count: int) -> Tensor:
    """A permutation of `count` that only the holder of `secret` can predict: the same for the same `about` alone."""
    return draw_noise(secret, about, (count,)).argsort(stable=True)


def clip_rows(gradient: Tensor, clip: float) -> Tensor:
    """Gradient of a batch's mean loss, [B, ...], with each frame's own norm at most `clip`; not below it."""
    norms = gradient.flatten(1).norm(dim=1) * len(gradient)
    factor = (clip / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1)
    return gradient * factor.view(-1, *[1] * (gradient.dim() - 1))


def add_noise(gradient: Tensor, clip: float, noise: float, drawn: Tensor) -> Tensor:
    """Clipped gradient with noise of `noise * clip` on each frame's own, of the standard normal numbers `drawn`."""
    return gradient + drawn * (noise * clip / len(gradient))
