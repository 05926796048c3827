"""Reversible downsampling and its folded convolution (section IV-B; docs/method.md, section 3, property 7)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FACTOR = 2
"""Downsampling in each direction; the paper's choice."""


def space_to_depth(frame: Tensor) -> Tensor:
    """[B, C, H, W] to [B, 4C, H/2, W/2]: a bijection, so it hides nothing. H and W must be even."""
    return F.pixel_unshuffle(frame, FACTOR)


def with_map(attacked: Tensor, saliency_map: Tensor) -> Tensor:
    """What enters the client half: [B, 4C + 1, H/2, W/2].

    The paper appends the map as one channel at the lower resolution. How it gets there is our choice: the
    mean over channels and over each 2x2 cell.
    """
    cell_mean = F.avg_pool2d(saliency_map.mean(dim=1, keepdim=True), FACTOR)
    return torch.cat((space_to_depth(attacked), cell_mean), dim=1)


def fold_stem(stem: nn.Conv2d, channels: int, mapped: bool) -> nn.Conv2d:
    """One strided convolution equal to `space_to_depth` (and `with_map`) followed by `stem`.

    A 3x3 convolution over 2x2 cells sees a 6x6 window of pixels and moves by 2: kernel 3r, stride r, padding r.
    The exported graph uses it because it is faster and every converter takes it.

    Parameters
    ----------
    stem : Conv2d
        3x3, stride 1, padding 1, with 4C (or 4C + 1 when `mapped`) input channels.
    channels : int
        C, channels of the frame.
    mapped : bool
        Whether the map is appended. The folded convolution then takes [B, 2C, H, W]: frame, then map.
    """
    if stem.kernel_size != (3, 3) or stem.stride != (1, 1) or stem.padding != (1, 1) or stem.groups != 1:
        raise ValueError("fold_stem takes a 3x3 convolution with stride 1, padding 1 and one group.")
    cells = FACTOR * FACTOR * channels
    weight = stem.weight.detach()
    frame_weight = torch.empty(weight.shape[0], channels, 3 * FACTOR, 3 * FACTOR, dtype=weight.dtype)
    for row in range(FACTOR):
        for column in range(FACTOR):
            # pixel_unshuffle orders its channels as (c, row, column)
            taps = weight[:, row * FACTOR + column : cells : FACTOR * FACTOR]
            frame_weight[:, :, row::FACTOR, column::FACTOR] = taps
    if mapped:
        each = weight[:, cells:].repeat_interleave(FACTOR, dim=2).repeat_interleave(FACTOR, dim=3)
        map_weight = (each / cells).expand(-1, channels, -1, -1)
        frame_weight = torch.cat((frame_weight, map_weight), dim=1)
    folded = nn.Conv2d(frame_weight.shape[1], weight.shape[0], 3 * FACTOR, FACTOR, FACTOR)
    folded.weight = nn.Parameter(frame_weight)
    folded.bias = None if stem.bias is None else nn.Parameter(stem.bias.detach().clone())
    return folded
