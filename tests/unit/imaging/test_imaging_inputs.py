from __future__ import annotations

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitward.errors import DataError
from splitward.imaging.inputs import as_float, fit_pixels, resize_pixels, to_frame
from splitward.wire.bundle import InputSpec


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_black_and_white_are_zero_and_one(dtype, white):
    frame = to_frame(np.array([[0, white]], dtype), InputSpec(1, 1, 2))
    assert frame.dtype == np.float32
    assert frame.tolist() == [[[0.0, 1.0]]]


def test_colour_becomes_luma_of_bt_601():
    pixels = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    grey = fit_pixels(pixels, InputSpec(1, 1, 4))
    assert grey.tolist() == [[[76, 150, 29, 255]]]


def test_grey_is_repeated_for_a_colour_model():
    pixels = np.arange(6, dtype=np.uint16).reshape(2, 3)
    assert np.array_equal(fit_pixels(pixels, InputSpec(3, 2, 3)), np.stack([pixels] * 3))


def test_shrinking_averages_areas():
    pixels = np.array([[0, 100], [100, 200]], np.uint8)
    assert resize_pixels(pixels, 1, 1).tolist() == [[100]]


def test_growing_interpolates_between_the_old_values():
    grown = resize_pixels(np.array([[0, 200]], np.uint8), 1, 4)
    assert grown[0, 0] == 0
    assert grown[0, 3] == 200
    assert np.all(np.diff(grown[0].astype(int)) >= 0)


def test_the_same_size_is_the_same_array():
    pixels = np.zeros((4, 5), np.uint8)
    assert resize_pixels(pixels, 4, 5) is pixels


@given(
    st.sampled_from([np.uint8, np.uint16]),
    st.booleans(),
    st.tuples(*[st.integers(1, 24)] * 4),
    st.sampled_from([1, 3]),
    st.integers(0, 2**32 - 1),
)
def test_a_frame_is_the_scaled_training_image_for_every_size(dtype, colour, sides, channels, seed):
    height, width, new_height, new_width = sides
    shape = (height, width, 3) if colour else (height, width)
    pixels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    spec = InputSpec(channels, new_height, new_width)
    fitted = fit_pixels(pixels, spec)
    frame = to_frame(pixels, spec)
    assert fitted.dtype == dtype
    assert frame.shape == (channels, new_height, new_width)
    assert frame.flags.c_contiguous
    assert np.array_equal(frame, as_float(fitted))
    assert frame.min() >= 0
    assert frame.max() <= 1


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((2, 2), np.float32),
        np.zeros((2, 2), np.int16),
        np.zeros((2, 2, 4), np.uint8),
        np.zeros((2,), np.uint8),
        np.zeros((0, 2), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
    ],
    ids=lambda pixels: f"{pixels.dtype}{list(pixels.shape)}",
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(DataError, match="give uint8 or uint16"):
        to_frame(pixels, InputSpec(1, 2, 2))


def test_impossible_specifications_are_refused():
    pixels = np.zeros((2, 2), np.uint8)
    with pytest.raises(DataError, match="2 channels"):
        to_frame(pixels, InputSpec(2, 2, 2))
    with pytest.raises(DataError, match="0 x 2"):
        to_frame(pixels, InputSpec(1, 0, 2))
    with pytest.raises(DataError, match="float64"):
        as_float(np.zeros(2))


@pytest.mark.parametrize("module", ["splitward.imaging", "splitward.imaging.inputs", "splitward.imaging.dicom"])
def test_importing_is_cheap(module):
    code = (
        f"import sys, {module}; "
        "sys.exit(str(sorted({'cv2', 'pydicom', 'PIL', 'torch', 'matplotlib'} & set(sys.modules)) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_a_region_is_cut_out_before_anything_else():
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10)
    spec = InputSpec(1, 5, 2, region=(0.0, 0.5, 0.5, 0.7))
    assert np.array_equal(fit_pixels(pixels, spec)[0], pixels[:5, 5:7])
    tiny = InputSpec(1, 1, 1, region=(0.99, 0.99, 1.0, 1.0))
    assert fit_pixels(pixels, tiny).tolist() == [[[99]]]


@pytest.mark.parametrize(("shape", "crop", "pad"), [((4, 8), (2, 6), (2, 2)), ((8, 4), (2, 6), (2, 2))])
def test_another_aspect_is_cropped_or_padded_evenly(shape, crop, pad):
    pixels = np.full(shape, 200, np.uint8)
    along = 1 if shape[1] > shape[0] else 0
    position = np.arange(8, dtype=np.uint8)
    pixels = pixels - (position[None] if along else position[:, None])
    cropped = fit_pixels(pixels, InputSpec(1, 4, 4, fit="crop"))[0]
    assert np.array_equal(cropped, pixels[:, crop[0] : crop[1]] if along else pixels[crop[0] : crop[1]])
    padded = fit_pixels(pixels, InputSpec(1, 8, 8, fit="pad"))[0]
    middle = padded[pad[0] : 8 - pad[1]] if along else padded[:, pad[0] : 8 - pad[1]]
    assert np.array_equal(middle, pixels)
    assert padded.sum() == pixels.sum(), "the rest is black"


@pytest.mark.parametrize(("dtype", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_a_window_stretches_part_of_the_scale(dtype, full):
    pixels = np.array([[0, round(0.2 * full), round(0.4 * full), round(0.6 * full), full]], dtype)
    frame = to_frame(pixels, InputSpec(1, 1, 5, window=(0.2, 0.6)))
    np.testing.assert_allclose(frame[0, 0], [0, 0, 0.5, 1, 1], atol=0.01)


@given(
    st.tuples(*[st.integers(1, 30)] * 4),
    st.sampled_from(["stretch", "crop", "pad"]),
    st.tuples(*[st.floats(0, 0.45)] * 2),
    st.tuples(*[st.floats(0.55, 1)] * 2),
)
def test_every_specification_gives_its_own_size(sides, fit, start, end):
    height, width, new_height, new_width = sides
    spec = InputSpec(3, new_height, new_width, region=(*start, *end), fit=fit, window=(start[0], end[0]))
    frame = to_frame(np.full((height, width), 128, np.uint8), spec)
    assert frame.shape == (3, new_height, new_width)
    assert frame.min() >= 0
    assert frame.max() <= 1


def test_resizing_agrees_with_opencv_to_a_rounding():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed: pip install 'splitward[camera]'")
    pixels = np.random.default_rng(0).integers(0, 65536, (60, 44), dtype=np.uint16)
    by_area = cv2.resize(pixels, (11, 20), interpolation=cv2.INTER_AREA).astype(int)
    assert np.abs(resize_pixels(pixels, 20, 11).astype(int) - by_area).max() <= 1
    grown = cv2.resize(pixels, (88, 120), interpolation=cv2.INTER_LINEAR).astype(int)
    assert np.abs(resize_pixels(pixels, 120, 88).astype(int) - grown).max() <= 1


@pytest.mark.parametrize(
    "more",
    [
        {"region": [0.5, 0, 0.5, 1]},
        {"region": [0, 0, 1.5, 1]},
        {"region": [0, 0, 1]},
        {"window": [0.5, 0.5]},
        {"window": [-0.1, 1]},
        {"fit": "squeeze"},
    ],
)
def test_a_manifest_with_an_impossible_input_is_refused(more):
    values = {"channels": 1, "height": 2, "width": 2, **more}
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(values), type=InputSpec)


def test_what_is_not_said_is_not_in_the_manifest():
    assert msgspec.json.encode(InputSpec(1, 2, 3)) == b'{"channels":1,"height":2,"width":3}'
