"""How near a reconstruction is to its original."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW, _SIGMA = 11, 1.5


def mse(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Mean squared error of each image: [B]; images [B, C, H, W] in 0..1."""
    return (reconstructions - originals).square().flatten(1).mean(1)


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity of each image: [B], 1 for equal images (Wang et al. 2004).

    Gaussian window of 11 pixels and sigma 1.5, data range 1, K1 = 0.01, K2 = 0.03, averaged over the positions
    at which the window lies inside the image; images [B, C, H, W] in 0..1, at least 11 pixels a side.
    """
    at = torch.arange(_WINDOW, dtype=originals.dtype, device=originals.device) - _WINDOW // 2
    line = torch.exp(-at.square() / (2 * _SIGMA**2))
    line = line / line.sum()
    channels = originals.shape[1]
    kernel = (line[:, None] * line[None, :]).expand(channels, 1, -1, -1)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, kernel, groups=channels)

    mean_a, mean_b = blur(reconstructions), blur(originals)
    variance_a = blur(reconstructions.square()) - mean_a.square()
    variance_b = blur(originals.square()) - mean_b.square()
    covariance = blur(reconstructions * originals) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (variance_a + variance_b + c2)
    )
    return similarity.flatten(1).mean(1)
