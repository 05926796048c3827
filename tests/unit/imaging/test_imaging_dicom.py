from __future__ import annotations

import io
import logging
import math
import tracemalloc

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
from pydicom.data import get_testdata_file  # noqa: E402 - after the skip
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402 - after the skip
from pydicom.encaps import encapsulate  # noqa: E402 - after the skip
from pydicom.uid import (  # noqa: E402 - ditto
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from splitward.errors import DataError  # noqa: E402 - after the skip
from splitward.imaging.dicom import is_dicom, iter_dicom, read_dicom  # noqa: E402 - after the skip

WHITE = 65535


def write_dicom(path, stored, **attributes):
    """Write `stored` (uint8, uint16 or int16; [H, W], [F, H, W] with NumberOfFrames, or [H, W, 3]) as DICOM."""
    colour = stored.ndim == 3 and "NumberOfFrames" not in attributes
    rows, columns = stored.shape[:2] if colour else stored.shape[-2:]
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.PatientID = "P-17"
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    dataset.PixelData = stored.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


def shown(path) -> list:
    (frame,) = read_dicom(path)
    return frame.pixels.tolist()


def test_without_a_window_the_values_are_stretched(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.array([[10, 20, 30]], np.uint16))
    (frame,) = read_dicom(path)
    assert frame.pixels.dtype == np.uint16
    assert frame.pixels.tolist() == [[0, 32768, WHITE]]
    assert (frame.patient_id, frame.index, frame.count) == ("P-17", 0, 1)


def test_monochrome1_is_inverted_after_the_window(tmp_path):
    stored = np.array([[0, 100, 200]], np.uint8)
    path = write_dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="MONOCHROME1")
    assert shown(path) == [[WHITE, 32767, 0]]
    windowed = write_dicom(
        tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1", WindowCenter=50.5, WindowWidth=101
    )
    assert shown(windowed) == [[WHITE, 0, 0]]


def test_the_window_is_in_rescaled_units(tmp_path):
    # C.11.2.1.2.1 with centre 40, width 401: -160.5 is black and 239.5 white, in Hounsfield units.
    stored = np.array([[0, 863, 1063, 1264, 4000]], np.int16)
    path = write_dicom(
        tmp_path / "ct.dcm", stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40, 600],
        WindowWidth=[401, 1500],
    )  # fmt: skip
    black, low, middle, high, white = shown(path)[0]
    assert (black, low, high, white) == (0, 0, WHITE, WHITE)
    assert middle == round(((1063 - 1024 - 39.5) / 400 + 0.5) * WHITE)


@pytest.mark.parametrize(
    ("function", "expected"),
    [("LINEAR", [0, 0.5, 1]), ("LINEAR_EXACT", [0, 0.495, 0.99]), ("SIGMOID", [0.1206, 0.495, 0.8766])],
)
def test_each_voi_function(tmp_path, function, expected):
    stored = np.array([[0, 99, 198]], np.uint16)
    centre, width = (99.5, 199) if function == "LINEAR" else (100, 200)
    path = write_dicom(
        tmp_path / "a.dcm", stored, VOILUTFunction=function, WindowCenter=centre, WindowWidth=width
    )
    assert np.asarray(shown(path)[0]) / WHITE == pytest.approx(expected, abs=2e-3)


def test_a_width_of_one_is_a_threshold_and_of_zero_no_window(tmp_path):
    stored = np.array([[4, 5, 8]], np.uint16)
    threshold = write_dicom(tmp_path / "a.dcm", stored, WindowCenter=5, WindowWidth=1)
    assert shown(threshold) == [[0, WHITE, WHITE]]
    none = write_dicom(tmp_path / "b.dcm", stored, WindowCenter=5, WindowWidth=0)
    assert shown(none) == [[0, 16384, WHITE]]


def lut(entries, first, bits):
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, bits]
    item.LUTData = np.array(entries, "<u2").tobytes()
    item["LUTData"].VR = "OW"
    return item


def test_look_up_tables_clamp_at_both_ends_even_of_8_bits(tmp_path):
    stored = np.array([[0, 1000, 1001, 1002, 4000]], np.uint16)
    path = write_dicom(tmp_path / "voi.dcm", stored, VOILUTSequence=[lut([0, 51, 255], 1000, 8)])
    assert shown(path) == [[0, 0, 13107, WHITE, WHITE]]


def test_a_modality_table_comes_before_the_window(tmp_path):
    item = lut([500, 100, 300], 0, 16)
    item.ModalityLUTType = "US"
    path = write_dicom(tmp_path / "modality.dcm", np.array([[0, 1, 2]], np.uint16), ModalityLUTSequence=[item])
    assert shown(path) == [[WHITE, 0, 32768]]


def test_padding_does_not_count_for_the_stretch(tmp_path):
    stored = np.array([[-2000, 0, 100, -1999]], np.int16)
    path = write_dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1999)
    assert shown(path) == [[0, 0, WHITE, 0]]
    only = write_dicom(tmp_path / "b.dcm", np.full((1, 2), -2000, np.int16), PixelPaddingValue=-2000)
    assert shown(only) == [[0, 0]]


SHOWN = {
    "stretch": {},
    "rescaled": {"RescaleSlope": 0.37, "RescaleIntercept": -1024.5},
    "linear": {"WindowCenter": 40, "WindowWidth": 401, "RescaleSlope": 1.5, "RescaleIntercept": -10},
    "exact": {"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 100, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
    "threshold": {"WindowCenter": 100, "WindowWidth": 1},
    "modality_lut": {"ModalityLUTSequence": [[900, 17, 4095, 33]]},
    "modality_lut_window": {"ModalityLUTSequence": [[9, 17, 4, 3]], "WindowCenter": 9, "WindowWidth": 12},
    "voi_lut": {"VOILUTSequence": [[5, 900, 40000, 3, 65535]]},
    "padding": {"PixelPaddingValue": 3, "PixelPaddingRangeLimit": 90},
    "padding_rescaled": {"PixelPaddingValue": 120, "RescaleSlope": -2, "RescaleIntercept": 7},
}


def shown_by_hand(stored, attributes, inverted) -> list:
    """Pixel by pixel, in plain floats, as PS3.3 says."""

    def look_up(value, table):
        return float(table[min(max(round(value) - 1, 0), len(table) - 1)])

    def rescale(value):
        if "ModalityLUTSequence" in attributes:
            return look_up(value, attributes["ModalityLUTSequence"][0])
        return value * float(attributes.get("RescaleSlope", 1)) + float(attributes.get("RescaleIntercept", 0))

    pixels = [int(value) for value in stored.ravel()]
    first = attributes.get("PixelPaddingValue")
    last = attributes.get("PixelPaddingRangeLimit", first)
    kept = [rescale(value) for value in pixels if first is None or not first <= value <= last]
    centre, width = attributes.get("WindowCenter"), attributes.get("WindowWidth")
    function = attributes.get("VOILUTFunction", "LINEAR")

    def show(value):
        if "VOILUTSequence" in attributes:
            return look_up(value, attributes["VOILUTSequence"][0]) / 65535
        if centre is None:
            return (value - min(kept)) / (max(kept) - min(kept))
        if function == "SIGMOID":
            return 1 / (1 + math.exp(-4 * (value - centre) / width))
        if function == "LINEAR_EXACT":
            return (value - centre) / width + 0.5
        if width == 1:
            return float(value > centre - 0.5)
        return (value - (centre - 0.5)) / (width - 1) + 0.5

    white = [round(min(max(show(rescale(value)), 0.0), 1.0) * WHITE) for value in pixels]
    return np.reshape([WHITE - value if inverted else value for value in white], stored.shape).tolist()


@pytest.mark.parametrize("inverted", [False, True], ids=["monochrome2", "monochrome1"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
@pytest.mark.parametrize("name", SHOWN)
def test_every_pixel_is_shown_as_if_it_were_alone(tmp_path, name, dtype, inverted):
    limits = np.iinfo(dtype)
    low, high = (limits.min, limits.max) if limits.bits == 8 else (max(limits.min, -1000), 4095)
    stored = np.random.default_rng(0).integers(low, high, (24, 40), dtype, endpoint=True)
    attributes = {
        key: [lut(entries, 1, 16) for entries in value] if key.endswith("Sequence") else value
        for key, value in SHOWN[name].items()
    }
    for item in attributes.get("ModalityLUTSequence", []):
        item.ModalityLUTType = "US"
    path = write_dicom(
        tmp_path / "a.dcm", stored, PhotometricInterpretation=f"MONOCHROME{1 if inverted else 2}", **attributes
    )
    assert shown(path) == shown_by_hand(stored, SHOWN[name], inverted)


def test_values_of_more_than_16_bits_are_shown_alike(tmp_path):
    stored = np.array([[0, 1 << 20, 2 << 20, 3 << 20]], np.uint32)
    path = write_dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=0, PhotometricInterpretation="MONOCHROME1")
    assert shown(path) == [[WHITE, WHITE, 32767, 0]]


def peak_bytes(path) -> int:
    """Most memory at one time that reading the file takes."""
    read_dicom(path)  # what is imported and cached
    tracemalloc.start()
    try:
        read_dicom(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "attributes", [{}, {"WindowCenter": 2047, "WindowWidth": 4095}], ids=["stretch", "window"]
)
def test_a_mammogram_takes_the_file_and_the_picture_of_memory_and_little_more(tmp_path, attributes):
    stored = np.random.default_rng(0).integers(0, 4096, (2048, 2048), np.uint16)
    path = write_dicom(tmp_path / "a.dcm", stored, **attributes)
    assert peak_bytes(path) < 2.2 * stored.nbytes


def test_compressed_frames_are_unpacked_one_at_a_time(tmp_path):
    row = np.arange(256, dtype=np.uint16) // 64
    stored = np.broadcast_to(row, (16, 256, 256)) + np.arange(16, dtype=np.uint16)[:, None, None]
    path = write_dicom(tmp_path / "a.dcm", stored, NumberOfFrames=16)
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless, generate_instance_uid=False)
    packed = tmp_path / "packed.dcm"
    dataset.save_as(packed)
    assert all(
        np.array_equal(one.pixels, other.pixels)
        for one, other in zip(read_dicom(path), read_dicom(packed), strict=True)
    )
    assert peak_bytes(packed) < 1.5 * stored.nbytes


def test_a_compressed_frame_is_no_larger_than_its_file_says(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((8, 8), np.uint8))
    bomb = io.BytesIO()
    Image.new("L", (5000, 5000)).save(bomb, "JPEG")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([bomb.getvalue()])
    dataset.save_as(path)
    usual = Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match="exceeds limit"):
        read_dicom(path)
    assert usual == Image.MAX_IMAGE_PIXELS


def test_an_attribute_that_nobody_asks_for_is_left_in_the_file(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((8, 8), np.uint8), EncapsulatedDocument=bytes(20 << 20))
    assert peak_bytes(path) < 8 << 20


def test_frames_before_one_that_cannot_be_read_are_given(tmp_path):
    path = write_dicom(tmp_path / "a.dcm", np.zeros((2, 8, 8), np.uint8), NumberOfFrames=2)
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless, generate_instance_uid=False)
    dataset.NumberOfFrames = 3
    dataset.save_as(path)
    frames = iter_dicom(path)
    assert next(frames).count == 3
    assert next(frames).index == 1
    with pytest.raises(DataError, match="cannot be decoded"):
        next(frames)


def test_every_frame_is_stretched_on_its_own(tmp_path):
    stored = np.array([[[0, 10]], [[5, 5]], [[100, 50]]], np.uint8)
    frames = read_dicom(write_dicom(tmp_path / "a.dcm", stored, NumberOfFrames=3))
    assert [(frame.index, frame.count) for frame in frames] == [(0, 3), (1, 3), (2, 3)]
    assert [frame.pixels.tolist() for frame in frames] == [[[0, WHITE]], [[0, 0]], [[WHITE, 0]]]


def test_functional_groups_give_each_frame_its_transformation(tmp_path):
    def window(centre, width):
        group, item = Dataset(), Dataset()
        item.WindowCenter, item.WindowWidth = centre, width
        group.FrameVOILUTSequence = [item]
        return group

    shared, rescale = window(0.5, 1), Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = 2, 0
    shared.PixelValueTransformationSequence = [rescale]
    path = write_dicom(
        tmp_path / "a.dcm",
        np.array([[[0, 10]], [[0, 10]]], np.uint8),
        NumberOfFrames=2,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[window(10.5, 21), window(20.5, 41)],
    )
    assert [frame.pixels.tolist() for frame in read_dicom(path)] == [[[0, WHITE]], [[0, 32768]]]


def test_colour_is_rgb_of_8_bits(tmp_path):
    stored = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    (frame,) = read_dicom(write_dicom(tmp_path / "a.dcm", stored))
    assert frame.pixels.dtype == np.uint8
    assert np.array_equal(frame.pixels, stored)


def test_patient_identifiers_are_never_shown(tmp_path, caplog):
    path = write_dicom(tmp_path / "a.dcm", np.array([[1, 2]], np.uint8))
    with caplog.at_level(logging.DEBUG):
        frames = read_dicom(path)
    assert "P-17" not in repr(frames) + caplog.text
    assert frames[0].patient_id == "P-17"


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("CT_small.dcm", (128, 128), 1),
        ("MR_small.dcm", (64, 64), 1),
        ("MR_small_RLE.dcm", (64, 64), 1),
        ("MR_small_bigendian.dcm", (64, 64), 1),
        ("MR_small_implicit.dcm", (64, 64), 1),
        ("rtdose.dcm", (10, 10), 15),
        ("SC_rgb_rle_2frame.dcm", (100, 100, 3), 2),
        ("SC_rgb_rle_16bit.dcm", (100, 100, 3), 1),
        ("SC_rgb_rle_32bit.dcm", (100, 100, 3), 1),
        ("SC_ybr_full_422_uncompressed.dcm", (100, 100, 3), 1),
        ("examples_palette.dcm", (350, 800, 3), 1),
        ("examples_overlay.dcm", (300, 484), 1),
    ],
)
def test_files_of_real_devices(name, shape, count):
    frames = read_dicom(get_testdata_file(name, download=False))
    assert len(frames) == count
    assert all(frame.pixels.shape == shape for frame in frames)
    assert all(frame.pixels.std() > 0 for frame in frames[:1])
    assert {frame.pixels.dtype for frame in frames} == {np.dtype(np.uint8 if len(shape) == 3 else np.uint16)}


def test_byte_order_and_compression_do_not_change_the_picture():
    plain, *others = (
        read_dicom(get_testdata_file(name, download=False))[0].pixels
        for name in ("MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "MR_small_implicit.dcm")
    )
    assert all(np.array_equal(plain, other) for other in others)


def test_a_ybr_file_shows_red_as_red():
    (frame,) = read_dicom(get_testdata_file("SC_ybr_full_422_uncompressed.dcm", download=False))
    assert frame.pixels[5, 50] == pytest.approx([254, 0, 0], abs=2)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("test-SR.dcm", "holds no image"),
        ("waveform_ecg.dcm", "holds no image"),
        ("rtplan.dcm", "holds no image"),
        ("no_meta.dcm", "no whole DICOM file"),
        ("image_dfl.dcm", "is deflated"),
        ("MR_truncated.dcm", "cannot be decoded"),
    ],
)
def test_bundled_files_that_are_refused(name, fault):
    path = get_testdata_file(name, download=False)
    with pytest.raises(DataError, match=fault) as caught:
        read_dicom(path)
    assert str(caught.value).startswith(path)


SMALL = np.array([[1, 2], [3, 4]], np.uint16)
HOSTILE = {
    "impossible_rows": ({"Rows": 60000, "Columns": 60000}, "declares 3600000000 samples"),
    "no_rows": ({"Rows": 0}, "declares 0 samples"),
    "rows_promise_more": ({"Rows": 9}, "cannot be decoded"),
    "frames_bomb": ({"NumberOfFrames": 2_000_000_000}, "declares 8000000000 samples"),
    "frames_negative": ({"NumberOfFrames": -1}, "declares -4 samples"),
    "frames_promise_more": ({"NumberOfFrames": 5}, "cannot be decoded"),
    "unknown_photometric": ({"PhotometricInterpretation": "ARGB"}, "cannot be decoded|is not read"),
    "bits_of_seven": ({"BitsAllocated": 7}, "cannot be decoded"),
    "slope_is_infinite": ({"RescaleSlope": "1e400", "RescaleIntercept": "0"}, "no finite numbers"),
    "table_of_nothing": ({"VOILUTSequence": [Dataset()]}, "cannot be decoded"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns while these are written
def test_hostile_attributes_are_refused(tmp_path, name):
    attributes, fault = HOSTILE[name]
    path = write_dicom(tmp_path / f"{name}.dcm", SMALL, **attributes)
    with pytest.raises(DataError, match=fault) as caught:
        read_dicom(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "data",
    [b"", bytes(128), bytes(128) + b"DICM", bytes(132) + b"x" * 300, b"P5 2 2 255\n1234",
     bytes(128) + b"DICM" + b"\xff" * 200],
    ids=["empty", "preamble", "prefix_only", "zeros", "pgm", "noise"],
)  # fmt: skip
def test_hostile_bytes_are_refused(tmp_path, data):
    path = tmp_path / "bad.dcm"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"no whole DICOM file|holds no image"):
        read_dicom(path)


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_cut_files_are_refused(tmp_path, kept):
    whole = write_dicom(tmp_path / "a.dcm", np.arange(4096, dtype=np.uint16).reshape(64, 64)).read_bytes()
    path = tmp_path / "cut.dcm"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DataError):
        read_dicom(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_dicom(tmp_path / "none.dcm")


def test_is_dicom_looks_at_the_prefix_then_the_suffix(tmp_path):
    named = tmp_path / "empty.dcm"
    named.write_bytes(b"")
    text = tmp_path / "notes.txt"
    text.write_bytes(b"notes")
    unnamed = write_dicom(tmp_path / "IM0001", SMALL)
    assert [is_dicom(path) for path in (named, text, unnamed)] == [True, False, True]
