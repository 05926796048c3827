"""Pixels to the frame that a model takes. The loaders and the device both come through here.

Channels are converted first, then the size, both on the integers as they were captured, and only then are
the values scaled to 0..1: a data set can so keep integers and still train on exactly the device's frames.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitward.errors import DataError
from splitward.wire.bundle import InputSpec

Pixels = NDArray[np.uint8 | np.uint16]

# ITU-R BT.601, section 2.5.1, in thousandths: integers give every machine the same grey.
_LUMA = np.array([299, 587, 114], np.uint32)


def to_frame(pixels: Pixels, spec: InputSpec) -> NDArray[np.float32]:
    """Frame of one captured image.

    Parameters
    ----------
    pixels : ndarray of uint8 or uint16, [H, W] or [H, W, 3]
        Grey or RGB, full scale (255 or 65535 is white).
    spec : InputSpec
        What the model takes; 1 or 3 channels.

    Returns
    -------
    ndarray of float32, [channels, height, width]
        0 black to 1 white.

    Raises
    ------
    DataError
        Another shape or dtype, an empty image, or a specification that is neither grey nor RGB.
    """
    return as_float(fit_pixels(pixels, spec))


def fit_pixels(pixels: Pixels, spec: InputSpec) -> Pixels:
    """As `to_frame`, but [channels, height, width] in the integers of `pixels`, not yet scaled."""
    _check_pixels(pixels)
    fitted = resize_pixels(_convert_channels(pixels, spec.channels), spec.height, spec.width)
    planes = fitted[None] if fitted.ndim == 2 else np.moveaxis(fitted, -1, 0)
    return np.ascontiguousarray(planes)


def resize_pixels(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize [H, W] or [H, W, 3]: by area where no side grows, else bilinearly; the same size is left alone."""
    _check_pixels(pixels)
    if pixels.shape[:2] == (height, width):
        return pixels
    if height < 1 or width < 1:
        raise DataError(f"an image cannot be resized to {height} x {width}; give a size of 1 or more.")
    import cv2

    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: Pixels = cv2.resize(pixels, (width, height), interpolation=method)
    return resized


def as_float(images: NDArray[Any]) -> NDArray[np.float32]:
    """Scale uint8 (by 255) or uint16 (by 65535) values of any shape to float32 in 0..1."""
    if images.dtype not in (np.uint8, np.uint16):
        raise DataError(f"pixels are {images.dtype}; give uint8 or uint16 at full scale.")
    return images.astype(np.float32) / np.float32(np.iinfo(images.dtype).max)


def _check_pixels(pixels: Pixels) -> None:
    known = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if not known or pixels.size == 0 or pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}; give uint8 or uint16, [H, W] or [H, W, 3]."
        )


def _convert_channels(pixels: Pixels, channels: int) -> Pixels:
    if channels not in (1, 3):
        raise DataError(f"a model of {channels} channels cannot take an image; it must be 1 (grey) or 3 (RGB).")
    if channels == 3 and pixels.ndim == 2:
        return np.repeat(pixels[:, :, None], 3, axis=2)
    if channels == 1 and pixels.ndim == 3:
        return ((pixels @ _LUMA + 500) // 1000).astype(pixels.dtype)
    return pixels
