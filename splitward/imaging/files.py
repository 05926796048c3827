"""Image files (PNG, JPEG, BMP, TIFF, PGM) to pixels."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from splitward.errors import DataError
from splitward.imaging.inputs import Pixels

# A mammogram at full resolution has 25 million; what declares much more is an attack or a mistake.
MAX_PIXELS = 64 << 20
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
        The file is missing, empty, truncated, no image of a known format, over `MAX_PIXELS`, or holds values
        whose white is not known (floats, signed numbers, 32 bits).
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
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"{path}: declares {image.width} x {image.height} pixels, over the limit of {MAX_PIXELS}. "
            "Crop or shrink the image first."
        )


def _to_pixels(path: Path, image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return _to_deep_grey(path, image)
    if image.mode == "F":
        raise DataError(f"{path}: holds floats, whose white is not known. Convert it to 8- or 16-bit grey.")
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La", "1")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        return np.array(image.convert("L" if grey else "RGB"))
    return np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))


def _to_deep_grey(path: Path, image: Image.Image) -> Pixels:
    """Grey of more than 8 bits, to 65535 white; Pillow scales a PGM, and leaves a TIFF's values as they are."""
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    if transparent is not None:
        values = np.where(values == transparent, 0, values)
    if isinstance(image, TiffImageFile):
        (bits,) = image.tag_v2[BITSPERSAMPLE]
        if image.mode == "I":  # what Pillow makes of signed values, and of 32 bits
            raise DataError(
                f"{path}: holds {bits}-bit numbers whose white is not known. Convert it to 8- or 16-bit grey."
            )
        if bits < 16:
            white = (1 << bits) - 1
            values = (values.astype(np.uint32) * 65535 + white // 2) // white
        # Pillow inverts WhiteIsZero up to 8 bits only.
        if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION, 0) == 0:
            values = 65535 - values
    return values.astype(np.uint16)
