"""DICOM files to pixels as a reader would see them. Clauses are of DICOM PS3.3 (2024).

A grey frame goes through the modality transformation (C.11.1), then the VOI transformation (C.11.2), then is
inverted where its lowest value means white (MONOCHROME1, C.7.6.3.1.2). Enhanced multi-frame objects keep both
transformations per frame or shared (C.7.6.16.2.9 and C.7.6.16.2.10); those are looked for first.

Nothing here logs: pydicom's own warnings and errors about attributes quote values, which may be a patient's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitward.errors import DataError
from splitward.imaging.inputs import Pixels

MAX_SAMPLES = 1 << 28
"""Of all frames of one file, 512 MiB in 16 bits: a long tomosynthesis, not more."""
MAX_PIXELS = 32 << 20
"""Of one frame that is grey of up to 16 bits or RGB of 8: a mammogram at full resolution has 28 million at most."""
MAX_COSTLY_PIXELS = 8 << 20
"""Of any other frame: pydicom takes some 30 bytes for each pixel of YBR. 4K video has as many."""
SUFFIXES = frozenset({".dcm", ".dicom", ".dic"})
_DEFERRED_BYTES = 1 << 20
"""Attributes of this size are left in the file, most of which nobody asks for."""
_DEFLATED = "1.2.840.10008.1.2.1.99"
_BIG_ENDIAN = "1.2.840.10008.1.2.2"


@dataclass(frozen=True, slots=True)
class DicomFrame:
    """One frame of a DICOM file.

    Attributes
    ----------
    pixels : ndarray
        uint16 [H, W], 0 black to 65535 white, or uint8 RGB [H, W, 3].
    patient_id : str
        Patient ID (0010,0020), empty where the file has none; never shown by `repr`.
    index, count : int
        Position of the frame in its file from 0, and the number of frames there.
    """

    pixels: Pixels = field(repr=False)
    patient_id: str = field(repr=False)
    index: int
    count: int


def is_dicom(path: Path) -> bool:
    """Whether the file at `path` has the DICOM prefix (PS3.10, section 7.1) or a DICOM suffix."""
    return path.suffix.lower() in SUFFIXES or has_prefix(path)


def has_prefix(path: Path) -> bool:
    """Whether the file at `path` has the DICOM prefix (PS3.10, section 7.1)."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def readable_syntaxes() -> list[str]:
    """UIDs of the transfer syntaxes (PS3.5, section 10) that `read_dicom` takes with the decoders that are there."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import AllTransferSyntaxes

    readable = []
    for uid in AllTransferSyntaxes:
        with contextlib.suppress(NotImplementedError):  # not of pixels, or unknown to pydicom
            if uid != _DEFLATED and get_decoder(uid).is_available:
                readable.append(str(uid))
    return readable


def read_dicom(path: Path) -> list[DicomFrame]:
    """Every frame of the DICOM file at `path`.

    Raises
    ------
    DataError
        The file is missing, is no DICOM file, is truncated, holds no image, is deflated, has more than `MAX_SAMPLES`
        or frames that are over the limit of their kind, has a photometric interpretation or a compression that
        cannot be read, or pydicom is not installed.
    """
    return list(iter_dicom(path))


def iter_dicom(path: Path) -> Iterator[DicomFrame]:
    """As `read_dicom`, but each frame is read when it is asked for: a device has no room for all of a tomosynthesis.

    Raises
    ------
    DataError
        As `read_dicom`, at the first frame that cannot be read.
    """
    dataset = _read_attributes(path)
    patient_id = str(dataset.get("PatientID") or "").strip()
    count = int(dataset.get("NumberOfFrames") or 1)
    frames = _decode(path, dataset)
    for index in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote attributes of the patient
            try:
                pixels = _to_pixels(path, next(frames), dataset, index)
            except DataError:
                raise
            except Exception as error:  # decoders and plugins share no root; their text speaks of pixels only
                reason = " ".join(str(error).split()) or f"it has {index} of {count} frames"
                raise DataError(
                    f"{path}: its pixels cannot be decoded: {reason}. Export it uncompressed (`dcmconv`, `gdcmconv "
                    "--raw`), or install the decoder that is named here."
                ) from error
        yield DicomFrame(pixels, patient_id, index, count)


def _read_attributes(path: Path) -> Any:
    """All but the pixels."""
    try:
        import pydicom
    except ImportError as error:
        raise DataError(f"{path}: reading DICOM needs pydicom: pip install 'splitward[dicom]'.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=True, defer_size=_DEFERRED_BYTES)
            str(dataset.get("PatientID") or "")  # converted only now
            deflated = dataset.file_meta.get("TransferSyntaxUID") == _DEFLATED
        except FileNotFoundError:
            raise DataError(f"{path}: no such file. Check the path.") from None
        except Exception:  # noqa: BLE001 - hostile bytes raise anything in pydicom, and its text quotes attributes
            raise DataError(f"{path}: is no whole DICOM file. Export it again from its archive.") from None
        if deflated:  # zlib would be let unpack without a limit
            raise DataError(f"{path}: is deflated, which is not read. Convert it with `dcmconv +te`.")
        _check_size(path, dataset)
    return dataset


def _check_size(path: Path, dataset: Any) -> None:
    if not all(key in dataset for key in ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation")):
        raise DataError(f"{path}: holds no image (a report, waveform or directory). Leave it out.")
    try:
        shape = [int(dataset[key].value) for key in ("Rows", "Columns", "SamplesPerPixel")]
        samples = int(dataset.get("NumberOfFrames") or 1) * shape[0] * shape[1] * shape[2]
        limit = _frame_limit(dataset)
        pixel_bytes = _least_bytes(dataset, samples)
    except Exception:  # noqa: BLE001 - pydicom converts values only now, and raises what it likes
        raise DataError(f"{path}: its image size cannot be read. Export it again from its archive.") from None
    if not 0 < samples <= MAX_SAMPLES:
        raise DataError(f"{path}: declares {samples} samples; 1 to {MAX_SAMPLES} are read. Split it by frames.")
    if Path(path).stat().st_size < pixel_bytes:
        raise DataError(
            f"{path}: its pixels cannot be decoded: it is truncated, they are {pixel_bytes} bytes. Export it again."
        )
    if shape[0] * shape[1] > limit:
        raise DataError(
            f"{path}: declares {shape[1]} x {shape[0]} pixels a frame, over the limit of {limit} for its kind. Crop or "
            "shrink the image first."
        )


def _frame_limit(dataset: Any) -> int:
    bits, photometric = int(dataset.BitsAllocated), dataset.PhotometricInterpretation
    lean = bits <= 16 and str(photometric).startswith("MONOCHROME")
    packed = dataset.file_meta.TransferSyntaxUID.is_encapsulated
    return MAX_PIXELS if lean or (bits <= 8 and photometric == "RGB" and not packed) else MAX_COSTLY_PIXELS


def _least_bytes(dataset: Any, samples: int) -> int:
    """Bytes that the pixels take at least: known where they are not compressed."""
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return 0
    halved = str(dataset.PhotometricInterpretation) == "YBR_FULL_422"  # two of three samples (C.7.6.3.1.2)
    return samples * int(dataset.BitsAllocated) // 8 * (2 if halved else 3) // 3


def _decode(path: Path, dataset: Any) -> Iterator[NDArray[Any]]:
    """Each frame as it is stored, [H, W] or [H, W, 3] where YBR has become RGB (C.7.6.3.1.2)."""
    from PIL import Image
    from pydicom.pixels import iter_pixels

    frames = iter_pixels(path, view_only=True)
    declared = int(dataset.Rows) * int(dataset.Columns)
    while True:
        usual = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = (
            declared + 1
        ) // 2  # refused is what has twice as many, whatever the frame declares
        try:
            frame = next(frames, None)
        finally:
            Image.MAX_IMAGE_PIXELS = usual
        if frame is None:
            return
        yield frame


def _to_pixels(path: Path, stored: NDArray[Any], dataset: Any, index: int) -> Pixels:
    from pydicom.pixels import apply_color_lut

    photometric = str(dataset.PhotometricInterpretation)
    if dataset.SamplesPerPixel == 3:
        return _to_bytes(stored, int(dataset.BitsStored))
    if photometric == "PALETTE COLOR":
        coloured = apply_color_lut(stored, dataset)
        return _to_bytes(coloured, 8 * coloured.itemsize)
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError(
            f"{path}: photometric interpretation {photometric!r} is not read. Export it as grey or RGB."
        )
    return _show(path, stored, dataset, index)


def _to_bytes(colour: NDArray[Any], bits: int) -> Pixels:
    return (colour >> max(bits - 8, 0)).astype(np.uint8)


def _show(path: Path, stored: NDArray[Any], dataset: Any, index: int) -> Pixels:
    """Grey frame [H, W] as a reader would see it, in uint16 with 65535 white.

    Each value is shown by itself, so what 16 bits can hold is shown once for each value, not for each pixel: the
    floats of a mammogram at full resolution would not fit a device's memory.
    """
    if stored.dtype.itemsize > 2:
        return _show_values(path, stored, np.ones(stored.shape, np.bool_), dataset, index)
    first = int(stored.min())
    values = np.arange(first, int(stored.max()) + 1)
    present = np.zeros(values.shape, np.bool_)
    for row in stored:  # by rows, as numpy makes 64-bit positions of them
        present[row.astype(np.intp) - first] = True
    table = _show_values(path, values, present, dataset, index)
    shown = np.empty(stored.shape, table.dtype)
    for row, target in zip(stored, shown, strict=True):
        np.take(table, row.astype(np.intp) - first, out=target)
    return shown


def _show_values(
    path: Path, stored: NDArray[Any], present: NDArray[np.bool_], dataset: Any, index: int
) -> NDArray[np.uint16]:
    """Stored values through modality and VOI transformation; `present` are those that the frame holds."""
    big_endian = dataset.file_meta.TransferSyntaxUID == _BIG_ENDIAN
    values = _apply_modality(
        stored, _functional_group(dataset, index, "PixelValueTransformationSequence"), big_endian
    )
    if not np.isfinite(values).all():
        raise DataError(f"{path}: has values that are no finite numbers. Export it again from its archive.")
    voi = _functional_group(dataset, index, "FrameVOILUTSequence")
    shown = _apply_voi(values, voi, big_endian)
    if shown is None:
        shown = _stretch(values, present & ~_is_padding(stored, dataset))
    white = np.rint(np.clip(shown, 0.0, 1.0) * 65535).astype(np.uint16)
    return 65535 - white if dataset.PhotometricInterpretation == "MONOCHROME1" else white


def _functional_group(dataset: Any, index: int, name: str) -> Any:
    """Item of the functional group `name` for one frame: per frame, else shared, else the data set itself."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for group in [*per_frame[index : index + 1], *shared[:1]]:
        if group.get(name):
            return group[name].value[0]
    return dataset


def _apply_modality(stored: NDArray[Any], item: Any, big_endian: bool) -> NDArray[np.float64]:
    """C.11.1: a look-up table, else slope and intercept, else the stored values."""
    if item.get("ModalityLUTSequence"):
        return _look_up(stored.astype(np.float64), item.ModalityLUTSequence[0], big_endian)
    slope, intercept = item.get("RescaleSlope"), item.get("RescaleIntercept")
    if slope is None or intercept is None:
        return stored.astype(np.float64)
    return stored.astype(np.float64) * float(slope) + float(intercept)


def _apply_voi(values: NDArray[np.float64], item: Any, big_endian: bool) -> NDArray[np.float64] | None:
    """C.11.2: the first look-up table, else the first window, to 0..1; None where there is neither."""
    if item.get("VOILUTSequence"):
        table = item.VOILUTSequence[0]
        bits = int(table.LUTDescriptor[2])
        return np.asarray(_look_up(values, table, big_endian) / (2**bits - 1))
    centre, width = _first(item.get("WindowCenter")), _first(item.get("WindowWidth"))
    function = item.get("VOILUTFunction") or "LINEAR"
    if centre is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None  # widths that C.11.2.1.2 forbids say nothing
    if function == "SIGMOID":  # C.11.2.1.3.1
        slope = np.clip(-4 * (values - centre) / width, -700, 700)
        return np.asarray(1 / (1 + np.exp(slope)))
    if function == "LINEAR_EXACT":  # C.11.2.1.3.2
        return np.asarray((values - centre) / width + 0.5)
    if width == 1:  # C.11.2.1.2.1: a threshold
        return (values > centre - 0.5).astype(np.float64)
    return (values - (centre - 0.5)) / (width - 1) + 0.5


def _look_up(values: NDArray[np.float64], item: Any, big_endian: bool) -> NDArray[np.float64]:
    """C.11.1.1: values outside the table take its first or last entry."""
    first_mapped, bits = int(item.LUTDescriptor[1]), int(item.LUTDescriptor[2])
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, ">u2" if big_endian else "<u2")
    table = np.atleast_1d(np.asarray(data, np.float64)).clip(0, 2**bits - 1)
    position = np.clip(np.rint(values) - first_mapped, 0, len(table) - 1)
    return np.asarray(table[position.astype(np.int64)])


def _is_padding(stored: NDArray[Any], dataset: Any) -> NDArray[np.bool_]:
    """C.7.5.1.1.2: pixels that pad the image to a rectangle."""
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, np.bool_)
    last = dataset.get("PixelPaddingRangeLimit", first)
    return np.asarray((stored >= min(first, last)) & (stored <= max(first, last)))


def _stretch(values: NDArray[np.float64], kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Lowest to highest value of the pixels `kept`, to 0..1; one value alone becomes black."""
    if not kept.any():
        return np.zeros_like(values)
    low, high = float(values[kept].min()), float(values[kept].max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


def _first(value: Any) -> float | None:
    """First value of an attribute that may have several, or None where it has none."""
    if value is None or value == "":
        return None
    return float(value) if isinstance(value, (int, float, str)) else float(next(iter(value)))
