"""The released tensor as a small grey picture: what the cloud was given in place of the image."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_SIDE = 64


class Picture(msgspec.Struct, frozen=True):
    """`width * height` bytes of grey, row by row, from the least released value to the greatest."""

    width: int
    height: int
    grey: bytes


def draw_released(values: NDArray[np.generic]) -> Picture:
    """Picture of a released tensor: its channels side by side in a near-square grid, thinned to `MAX_SIDE`."""
    tiles = np.asarray(values, np.float32)
    if tiles.ndim == 1:  # a vector has no place in a frame: each value is a pixel
        tiles = tiles.reshape(-1, 1, 1)
    tiles = tiles.reshape(-1, *tiles.shape[-2:])
    count, height, width = tiles.shape
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    grid = np.full((down * across, height, width), tiles.min(), np.float32)
    grid[:count] = tiles
    sheet = grid.reshape(down, across, height, width).swapaxes(1, 2).reshape(down * height, across * width)
    step = max(1, -(-max(sheet.shape) // MAX_SIDE))
    sheet = sheet[::step, ::step]
    low, high = float(sheet.min()), float(sheet.max())
    grey = (
        np.zeros(sheet.shape, np.uint8)
        if high == low
        else ((sheet - low) * (255 / (high - low))).astype(np.uint8)
    )
    return Picture(grey.shape[1], grey.shape[0], grey.tobytes())
