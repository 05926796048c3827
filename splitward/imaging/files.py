"""Image files (PNG, JPEG, BMP, TIFF, PGM) to pixels."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from splitward.errors import DataError
from splitward.imaging.inputs import Pixels, strips_of

MAX_PIXELS = 32 << 20
"""Of grey and RGB; of four channels three quarters. A mammogram at full resolution has 28 million at most, and a
decoder takes up to 12 bytes for each (progressive JPEG): a device that has 512 MB for all has no room for more."""
MAX_SIDE = 65535
"""As JPEG and DICOM have it."""
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".tif", ".tiff"})
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF")
# What Pillow's decoders raise on bytes that are not what they promise.
_BROKEN = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError),
    *(struct.error, zlib.error),
)


def read_image(path: Path) -> Pixels:
    """Pixels of the first image in the file at `path`.

    Returns
    -------
    ndarray, [H, W] or [H, W, 3]
        Grey in uint8, or uint16 where the file has more than 8 bits; colour in uint8 RGB. Palettes and other
        colour spaces become RGB; transparent parts lie over black.

    Raises
    ------
    DataError
        The file is missing, empty, truncated, no image of a known format, over `MAX_PIXELS` or `MAX_SIDE`, or
        holds values whose white is not known (floats, signed numbers, 32 bits).
    """
    with warnings.catch_warnings():
        # Pillow warns of odd metadata, which says nothing of the pixels; the size limit is ours.
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=_FORMATS) as image:
                _check_size(path, image)
                image.load()
                return _to_pixels(path, image)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file. Check the path.") from None
        except UnidentifiedImageError:
            formats = ", ".join(_FORMATS)
            raise DataError(f"{path}: is no whole image. Convert or export it again as {formats}.") from None
        except Image.DecompressionBombError as error:
            raise DataError(f"{path}: {error} Crop or shrink the image first.") from error
        except _BROKEN as error:
            raise DataError(f"{path}: is truncated or damaged: {error}. Fetch or export it again.") from error


def _check_size(path: Path, image: Image.Image) -> None:
    if image.mode == "F":
        raise DataError(f"{path}: holds floats, whose white is not known. Convert it to 8- or 16-bit grey.")
    limit = MAX_PIXELS * 3 // max(3, len(image.getbands()))
    if image.width * image.height > limit or max(image.size) > MAX_SIDE:
        raise DataError(
            f"{path}: declares {image.width} x {image.height} pixels, over the limit of {limit}, or of {MAX_SIDE} "
            "a side. Crop or shrink the image first."
        )


def _to_pixels(path: Path, image: Image.Image) -> Pixels:
    """By strips, as each step makes a copy."""
    to_strip = _deep_grey_of(path, image) if image.mode.startswith("I") else _strip_to_pixels
    pixels: Pixels | None = None
    for rows in strips_of(image.height, image.width):
        strip = to_strip(image.crop((0, rows.start, image.width, rows.stop)))
        if pixels is None:
            pixels = np.empty((image.height, *strip.shape[1:]), strip.dtype)
        pixels[rows] = strip
    if pixels is None:
        raise DataError(f"{path}: holds no pixels. Fetch or export it again.")
    return pixels


def _strip_to_pixels(image: Image.Image) -> Pixels:
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La", "1")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        return np.array(image.convert("L" if grey else "RGB"))
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _deep_grey_of(path: Path, image: Image.Image) -> Callable[[Image.Image], Pixels]:
    """How grey of more than 8 bits becomes 65535 white; Pillow scales a PGM, and leaves a TIFF's values as they are."""
    transparent = image.info.get("transparency")
    bits, inverted = 16, False
    if isinstance(image, TiffImageFile):
        (bits,) = image.tag_v2[BITSPERSAMPLE]
        if image.mode == "I":  # what Pillow makes of signed values, and of 32 bits
            raise DataError(
                f"{path}: holds {bits}-bit numbers whose white is not known. Convert it to 8- or 16-bit grey."
            )
        # Pillow inverts WhiteIsZero up to 8 bits only.
        inverted = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION, 0) == 0
    white = (1 << bits) - 1

    def to_strip(strip: Image.Image) -> Pixels:
        values = np.asarray(strip)
        if transparent is not None:
            values = np.where(values == transparent, 0, values)
        if bits < 16:
            values = (values.astype(np.uint32) * 65535 + white // 2) // white
        return (65535 - values if inverted else values).astype(np.uint16)

    return to_strip
