from __future__ import annotations

import subprocess
import sys

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
