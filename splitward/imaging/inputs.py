"""Pixels to the frame that a model takes. The loaders and the device both come through here.

The region of interest is cut out first, then channels are converted, then the size, all on the integers as they were
captured; only then are the values scaled to 0..1, and the window is applied last. A data set can so keep integers and
still train on exactly the device's frames.

Whatever grows with the image is done in strips of rows: beside the pixels themselves, a device has no room for a copy
of them in larger numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitward.errors import DataError
from splitward.wire.bundle import InputSpec

Pixels = NDArray[np.uint8 | np.uint16]
MAX_PADDED = 64 << 20
"""Pixels of an image that is padded to the model's aspect."""
STRIP_PIXELS = 1 << 20

# ITU-R BT.601, section 2.5.1, in thousandths: integers give every machine the same grey.
_LUMA = np.array([299, 587, 114], np.uint32)
_FULL_SCALE = {np.dtype(np.uint8): np.float32(255), np.dtype(np.uint16): np.float32(65535)}


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
        Another shape or dtype, an empty image, a specification that is neither grey nor RGB, or an image that
        would be over `MAX_PADDED`.
    """
    frame = as_float(fit_pixels(pixels, spec))
    if spec.window is None:
        return frame
    low, high = spec.window
    windowed: NDArray[np.float32] = np.clip((frame - np.float32(low)) * np.float32(1 / (high - low)), 0.0, 1.0)
    return windowed


def fit_pixels(pixels: Pixels, spec: InputSpec) -> Pixels:
    """As `to_frame`, but [channels, height, width] in the integers of `pixels`, neither scaled nor windowed."""
    _check_pixels(pixels)
    if spec.region is not None:
        pixels = crop_pixels(pixels, spec.region)
    pixels = _to_grey_if_asked(pixels, spec.channels)
    if spec.fit != "stretch":
        pixels = _match_aspect(pixels, spec)
    fitted = resize_pixels(pixels, spec.height, spec.width)
    planes = (
        np.broadcast_to(fitted, (spec.channels, *fitted.shape))
        if fitted.ndim == 2
        else np.moveaxis(fitted, -1, 0)
    )
    return np.ascontiguousarray(planes)


def strips_of(height: int, width: int) -> Iterator[slice]:
    """Rows of an image, as many at a time as hold about `STRIP_PIXELS`."""
    rows = max(1, STRIP_PIXELS // width)
    return (slice(top, min(top + rows, height)) for top in range(0, height, rows))


def crop_pixels(pixels: Pixels, region: tuple[float, float, float, float]) -> Pixels:
    """Region (top, left, bottom, right) of [H, W] or [H, W, 3], in parts of the sides; at least one pixel."""
    height, width = pixels.shape[:2]
    top, left = min(round(region[0] * height), height - 1), min(round(region[1] * width), width - 1)
    bottom, right = max(round(region[2] * height), top + 1), max(round(region[3] * width), left + 1)
    return pixels[top:bottom, left:right]


def resize_pixels(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize [H, W] or [H, W, 3]: by area where no side grows, else bilinearly; the same size is left alone.

    By Pillow in floats, each channel alone: it keeps 16 bits, and a device need not load OpenCV for it. A plane of
    more than one strip is brought to its width strip by strip, and then to its height.
    """
    _check_pixels(pixels)
    if pixels.shape[:2] == (height, width):
        return pixels
    if height < 1 or width < 1:
        raise DataError(f"an image cannot be resized to {height} x {width}; give a size of 1 or more.")
    from PIL import Image

    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    planes = [pixels] if pixels.ndim == 2 else list(np.moveaxis(pixels, -1, 0))

    def resize(plane: NDArray[Any], rows: int) -> NDArray[np.float32]:
        return np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, rows), method))

    def narrow(plane: Pixels) -> NDArray[Any]:
        strips = list(strips_of(plane.shape[0], plane.shape[1]))
        return (
            plane
            if len(strips) == 1
            else np.concatenate([resize(plane[one], one.stop - one.start) for one in strips])
        )

    resized = [resize(narrow(plane), height) for plane in planes]
    whole = np.rint(resized[0] if pixels.ndim == 2 else np.stack(resized, axis=-1))
    fitted: Pixels = np.clip(whole, 0, np.iinfo(pixels.dtype).max).astype(pixels.dtype)
    return fitted


def _match_aspect(pixels: Pixels, spec: InputSpec) -> Pixels:
    """Cut the longer side (`crop`) or put black beside the shorter (`pad`), evenly, to the model's aspect."""
    height, width = pixels.shape[:2]
    if spec.fit == "crop":
        kept_h, kept_w = (
            min(height, max(1, round(width * spec.height / spec.width))),
            min(width, max(1, round(height * spec.width / spec.height))),
        )
        top, left = (height - kept_h) // 2, (width - kept_w) // 2
        return pixels[top : top + kept_h, left : left + kept_w]
    full_h, full_w = (
        max(height, round(width * spec.height / spec.width)),
        max(width, round(height * spec.width / spec.height)),
    )
    if full_h * full_w > MAX_PADDED:
        raise DataError(
            f"an image of {width} x {height} cannot be padded to the model's aspect: {full_w} x {full_h} is over the "
            f"limit of {MAX_PADDED} pixels. Crop it first."
        )
    above, before = (full_h - height) // 2, (full_w - width) // 2
    sides = [(above, full_h - height - above), (before, full_w - width - before)]
    return np.pad(pixels, [*sides, *[(0, 0)] * (pixels.ndim - 2)])


def as_float(images: NDArray[Any]) -> NDArray[np.float32]:
    """Scale uint8 (by 255) or uint16 (by 65535) values of any shape to float32 in 0..1."""
    full = _FULL_SCALE.get(images.dtype)
    if full is None:
        raise DataError(f"pixels are {images.dtype}; give uint8 or uint16 at full scale.")
    return images.astype(np.float32) / full


def _check_pixels(pixels: Pixels) -> None:
    known = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if not known or pixels.size == 0 or pixels.dtype not in _FULL_SCALE:
        raise DataError(
            f"pixels are {pixels.dtype} {list(pixels.shape)}; give uint8 or uint16, [H, W] or [H, W, 3]."
        )


def _to_grey_if_asked(pixels: Pixels, channels: int) -> Pixels:
    if channels not in (1, 3):
        raise DataError(f"a model of {channels} channels cannot take an image; it must be 1 (grey) or 3 (RGB).")
    if channels == 3 or pixels.ndim == 2:
        return pixels
    height, width = pixels.shape[:2]
    grey = np.empty((height, width), pixels.dtype)
    for rows in strips_of(height, width):
        grey[rows] = (pixels[rows] @ _LUMA + 500) // 1000
    return grey
