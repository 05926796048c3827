"""The release: quantisation, and the noise that only the device's secret can predict."""

from __future__ import annotations

import hashlib
import math
import struct
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from splitward.wire.message import Activation, decode, encode
from splitward.wire.release import NOISE_REACH, ReleaseLaw, keyed_noise, release
from splitward.wire.tensor import dequantise, quantise

SECRET = bytes(range(32))
LAW = ReleaseLaw((16,), "int8", bound=1.0, sigma=0.3)
ACTIVATION = np.linspace(-1, 1, 16, dtype=np.float32)
RELEASED = [-79, -63, -42, -54, -30, -32, -15, -47, -31, 34, 7, 39, 26, 27, 69, 95]
ODD_NOISE = [-0.7159696601774882, 0.052113680058352325, -2.1626314721962756]
DRAWS, SIZE = 400, 64


def specified_noise(secret: bytes, clean: list[int], law: ReleaseLaw) -> list[float]:
    """docs/wire.md, section 2, in plain Python: a second reading of the text."""
    count = len(clean) + len(clean) % 2
    person = struct.pack("<d", law.bound) + struct.pack("<d", law.sigma)
    salt = bytes([127 - law.steps])
    key = hashlib.blake2b(bytes(value & 0xFF for value in clean), key=secret, salt=salt, person=person).digest()
    stream = b"".join(
        hashlib.blake2b(number.to_bytes(8, "little"), key=key).digest() for number in range((count + 7) // 8)
    )
    words = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, 8 * count, 8)]
    uniform = [((word >> 11) + 0.5) * 2.0**-53 for word in words]
    pairs = list(zip(uniform[: count // 2], uniform[count // 2 :], strict=True))
    cosines = [math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in pairs]
    sines = [math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v) for u, v in pairs]
    return (cosines + sines)[: len(clean)]


def test_golden_release() -> None:
    assert release(ACTIVATION, LAW, SECRET).tolist() == RELEASED


def test_golden_noise_of_an_odd_count() -> None:
    assert keyed_noise(SECRET, np.array([-127, 0, 127], np.int8), LAW) == pytest.approx(ODD_NOISE, rel=1e-12)


@settings(max_examples=50)
@given(
    st.binary(min_size=32, max_size=32),
    st.lists(st.integers(-127, 127), min_size=1, max_size=40),
    st.integers(1, 127),
)
def test_noise_is_what_the_specification_says(secret: bytes, clean: list[int], steps: int) -> None:
    law = ReleaseLaw((len(clean),), "int8", bound=1.0, sigma=0.3, steps=steps)
    noise = keyed_noise(secret, np.array(clean, np.int8), law)
    assert noise == pytest.approx(specified_noise(secret, clean, law), rel=1e-9, abs=1e-9)


def test_noise_depends_on_values_in_c_order_and_takes_their_shape() -> None:
    clean = np.arange(24, dtype=np.int8).reshape(2, 3, 4)
    noise = keyed_noise(SECRET, clean, LAW)
    assert noise.shape == clean.shape
    assert noise.ravel().tolist() == keyed_noise(SECRET, clean.ravel(), LAW).tolist()
    assert noise.tolist() == keyed_noise(SECRET, np.asfortranarray(clean), LAW).tolist()


def test_the_same_frame_carries_the_same_noise() -> None:
    first = release(ACTIVATION, LAW, SECRET)
    assert all((release(ACTIVATION.copy(), LAW, SECRET) == first).all() for _ in range(5))


def test_another_secret_gives_other_noise() -> None:
    clean = quantise(ACTIVATION, LAW.grid)
    for bit in (0, 100, 255):
        other = (int.from_bytes(SECRET, "big") ^ 1 << bit).to_bytes(32, "big")
        assert (keyed_noise(other, clean, LAW) != keyed_noise(SECRET, clean, LAW)).all()


@pytest.mark.parametrize(("bound", "sigma", "steps"), [(1.0, 0.5, 127), (1.5, 0.3, 127), (1.0, 0.3, 2)])
def test_another_law_gives_other_noise(bound: float, sigma: float, steps: int) -> None:
    """From two sigmas over one noise, the activation could be solved for."""
    clean, other = quantise(ACTIVATION, LAW.grid), ReleaseLaw((16,), "int8", bound, sigma, steps)
    assert (keyed_noise(SECRET, clean, other) != keyed_noise(SECRET, clean, LAW)).all()


@pytest.mark.parametrize("place", [0, 7, 15])
def test_one_changed_grid_step_gives_other_noise_everywhere(place: int) -> None:
    clean = quantise(ACTIVATION, LAW.grid)
    changed = clean.copy()
    changed[place] += 1 if changed[place] < 127 else -1
    assert (keyed_noise(SECRET, changed, LAW) != keyed_noise(SECRET, clean, LAW)).all()


def test_the_last_bits_of_a_float_do_not_change_the_noise() -> None:
    source = np.random.default_rng(1)
    steps = source.integers(-126, 127, (200, 16)) + source.uniform(-0.49, 0.49, (200, 16))
    for real in (steps * LAW.grid).astype(np.float32):
        nudged = real + source.choice(np.array([-1e-7, 1e-7], np.float32), 16)
        assert (nudged != real).any()
        assert (release(nudged, LAW, SECRET) == release(real, LAW, SECRET)).all()


@pytest.fixture(scope="module")
def noise() -> NDArray[np.float64]:
    """Noise of `DRAWS` activations that differ in one grid step each, [DRAWS, SIZE]."""
    clean = np.zeros((DRAWS, SIZE), np.int8)
    clean[:, :2] = [divmod(number, 100) for number in range(DRAWS)]
    return np.stack([keyed_noise(SECRET, row, LAW) for row in clean])


def test_noise_has_mean_0_and_deviation_1(noise: NDArray[np.float64]) -> None:
    count = noise.size
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.std() - 1) < 4 / math.sqrt(2 * count)
    assert np.abs(noise.mean(axis=0)).max() < 4.5 / math.sqrt(DRAWS)
    assert np.abs(noise.mean(axis=1)).max() < 4.5 / math.sqrt(SIZE)


def test_noise_is_normal(noise: NDArray[np.float64]) -> None:
    for probability in (0.001, 0.02, 0.16, 0.5, 0.84, 0.98, 0.999):
        below = float((noise < NormalDist().inv_cdf(probability)).mean())
        assert abs(below - probability) < 4 * math.sqrt(probability * (1 - probability) / noise.size)


def test_noise_is_independent(noise: NDArray[np.float64]) -> None:
    """Places, their squares (Box and Muller's pairs share a radius) and activations are not correlated."""
    places = np.corrcoef(noise.T)[np.triu_indices(SIZE, 1)]
    assert np.abs(places).max() < 5 / math.sqrt(DRAWS)
    assert abs(places.mean()) < 4 / math.sqrt(DRAWS * places.size)
    squares = np.corrcoef(noise.T**2)[np.triu_indices(SIZE, 1)]
    assert abs(squares.mean()) < 4 / math.sqrt(DRAWS * squares.size)
    neighbours = (noise[1:] * noise[:-1]).mean()
    assert abs(neighbours) < 4 / math.sqrt(noise.size)


def test_sigma_scales_the_noise() -> None:
    law = ReleaseLaw((4096,), "int8", bound=1.0, sigma=0.3)
    released = dequantise(release(np.zeros(4096, np.float32), law, SECRET), law.scale)
    # Clipping at 3 + 1 / 0.3 standard deviations and rounding to scale change the deviation by less than 1 %.
    assert released.std() == pytest.approx(0.3, rel=0.05)
    assert abs(released.mean()) < 4 * 0.3 / 64


def test_without_noise_the_activation_is_only_rounded() -> None:
    law = ReleaseLaw((16,), "int8", bound=2.0)
    released = release(ACTIVATION, law, SECRET)
    assert np.abs(dequantise(released, law.scale) - ACTIVATION).max() <= law.grid / 2 + 1e-6


def test_on_a_coarse_grid_near_activations_are_one_release() -> None:
    """Captures of one scene that round alike carry the same noise: there is nothing to average."""
    law = ReleaseLaw((16,), "int8", bound=1.0, sigma=0.3, steps=2)
    source = np.random.default_rng(2)
    scene = source.choice([-1.0, -0.5, 0.0, 0.5, 1.0], 16)
    captures = np.clip(scene + source.uniform(-0.24, 0.24, (50, 16)), -1, 1).astype(np.float32)
    assert len({release(one, law, SECRET).tobytes() for one in captures}) == 1
    assert len({release(one, LAW, SECRET).tobytes() for one in captures}) == 50
    exact = ReleaseLaw((16,), "int8", bound=1.0, steps=2)
    assert dequantise(release(captures[0], exact, SECRET), exact.scale) == pytest.approx(scene, abs=0.01)


def test_a_float32_law_releases_the_activation_as_it_is() -> None:
    law = ReleaseLaw((16,), "float32", sigma=0.3)
    assert release(ACTIVATION, law, SECRET) is ACTIVATION
    assert law.scale == 1.0


@settings(max_examples=100)
@given(st.floats(1e-3, 1e3), st.floats(0, 1e3))
def test_the_scale_survives_the_wire(bound: float, sigma: float) -> None:
    law = ReleaseLaw((16,), "int8", bound, sigma)
    assert law.scale == pytest.approx((bound + NOISE_REACH * sigma) / 127, rel=1e-7)
    released = release(ACTIVATION, law, SECRET)
    message = encode(Activation("pi-4", bytes(16), 0, 0, bytes(16), released, law.scale))
    assert decode(message).scale == law.scale


def test_quantisation_rounds_ties_to_even_and_saturates() -> None:
    real = np.array([-1e9, -127.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e9], np.float32)
    assert quantise(real, 1.0).tolist() == [-127, -127, -2, 0, 0, 2, 2, 126, 127, 127]
    assert quantise(real, 1.0, zero_point=10).tolist() == [-127, -118, 8, 10, 10, 12, 12, 127, 127, 127]


def test_quantisation_divides_in_float64() -> None:
    # 1.49999999 steps: 1 in float64, as in training; the quotient in float32 is 1.5, and rounds to 2.
    real = np.array([0.0118110236], np.float32)
    assert quantise(real, LAW.grid).tolist() == [round(float(real[0]) / LAW.grid)]
    assert np.rint(real / np.float32(LAW.grid)) != quantise(real, LAW.grid)


@settings(max_examples=100)
@given(st.integers(-127, 127), st.floats(2.0**-60, 2.0**60, width=32), st.integers(-50, 50))
def test_dequantisation_is_undone_by_quantisation(stored: int, scale: float, zero_point: int) -> None:
    values = np.array([stored], np.int8)
    real = dequantise(values, scale, zero_point)
    assert real.dtype == np.float32
    assert quantise(real, scale, zero_point).tolist() == [stored]


def test_dequantisation_leaves_float32_alone() -> None:
    assert dequantise(ACTIVATION, 0.5, 3) is ACTIVATION
