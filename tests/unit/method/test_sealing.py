"""The seal in training and the seal on the device are one law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from splitward.method.sealing import Bottleneck, Seal, conditional_entropy
from splitward.wire.release import ReleaseLaw, keyed_noise, release
from splitward.wire.tensor import dequantise, quantise

SECRET = bytes(range(32))


def test_the_bottleneck_bounds_whatever_enters():
    bottleneck = Bottleneck((4, 6, 6), 16)
    bounded = bottleneck(1e6 * torch.randn(32, 4, 6, 6))
    assert bounded.shape == (32, 16)
    assert bounded.abs().max() <= 1


@pytest.mark.parametrize(
    ("bound", "sigma", "steps"),
    [(1.0, 0.3, 127), (1.0, 0.0, 127), (2.5, 1.5, 127), (1.0, 0.2, 2), (2.5, 1.5, 7)],
)
def test_the_network_seals_exactly_as_the_device_does(bound, sigma, steps):
    law = ReleaseLaw((16,), "int8", bound, sigma, steps)
    seal = Seal(sigma, bound, law.scale, steps).eval()
    activations = np.random.default_rng(0).uniform(-bound, bound, (5_000, 16)).astype(np.float32)
    activations[0] = bound
    activations[1] = -bound
    activations[2] = (np.arange(16) + 0.5) * law.grid  # half-way between two steps
    clean = quantise(activations, law.grid)
    noise = np.stack([keyed_noise(SECRET, row, law) for row in clean])
    released = np.stack([dequantise(release(row, law, SECRET), law.scale) for row in activations])
    trained = seal(torch.from_numpy(activations), torch.from_numpy(noise))
    assert trained.dtype == torch.float32
    # The sum of the straight-through estimator rounds to the last bit of float32; the steps are equal.
    np.testing.assert_array_equal(np.rint(trained.numpy() / law.scale), np.rint(released / law.scale))
    np.testing.assert_allclose(trained.numpy(), released, rtol=0, atol=1e-6)


def test_released_values_lie_on_the_grid_and_within_its_reach():
    law = ReleaseLaw((1000,), "int8", 1.0, 0.5)
    released = Seal(0.5, 1.0, law.scale)(torch.zeros(4, 1000).fill_(0.9))
    steps = released / law.scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    assert steps.abs().max() <= 127 + 1e-3
    assert released.std() == pytest.approx(0.5, rel=0.1)


def test_noise_is_fresh_in_training():
    seal, bounded = Seal(0.3, 1.0, 0.015), torch.zeros(2, 16)
    assert not torch.equal(seal(bounded), seal(bounded))


def test_training_may_carry_more_noise_than_a_device_releases():
    law = ReleaseLaw((100,), "int8", 1.0, 0.1)
    seal, bounded = Seal(0.1, 1.0, law.scale, training_sigma=0.5), torch.ones(100, 100)
    noise = seal(bounded) - 1
    assert noise.std() == pytest.approx(0.5, rel=0.05)
    assert noise.max() > 1.2  # not cut off where the device's range ends, at 1.3
    released = seal.eval()(bounded)
    assert released.std() == pytest.approx(0.1, rel=0.05)
    assert released.max() <= 127.01 * law.scale


def test_coarse_steps_are_of_the_release_and_not_of_the_training():
    seal, bounded = Seal(0.0, 1.0, 1 / 127, steps=2), torch.tensor([[0.8, 0.3, -0.2]])
    assert seal(bounded) == pytest.approx(bounded, abs=0.01)
    assert seal.eval()(bounded) == pytest.approx(torch.tensor([[1.0, 0.5, 0.0]]), abs=0.01)


def test_gradients_pass_straight_through():
    bounded = torch.rand(3, 16, requires_grad=True)
    weights = torch.randn(3, 16)
    (Seal(0.3, 1.0, 0.015)(bounded) * weights).sum().backward()
    assert torch.equal(bounded.grad, weights)


def test_conditional_entropy_by_hand():
    bounded = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, -1.0], [5.0, -3.0]])
    labels = torch.tensor([0, 0, 2, 2])
    sigma = 0.5
    # Variances: class 0 (1, 0), class 2 (0, 1), each half of the frames; class 1 has none.
    expected = (math.log(1.25) + math.log(0.25)) / 2
    found = conditional_entropy(bounded, labels, 3, sigma)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    uneven = conditional_entropy(bounded, torch.tensor([0, 0, 0, 1]), 3, sigma)
    first = np.log(np.var([0, 2, 5]) + 0.25) + np.log(np.var([1, 1, -1]) + 0.25)
    assert uneven.item() == pytest.approx((0.75 * first + 0.25 * 2 * math.log(0.25)) / 2, rel=1e-6)


def test_the_entropy_of_frames_by_hand_and_their_outlier_pulls_less():
    bounded = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, -1.0], [5.0, -3.0]])
    found = conditional_entropy(bounded, torch.tensor([0, 0, 2, 2]), 3, 0.5, "frame")
    expected = math.log(0.5 + 0.25)  # each frame is 1 from its mean in one of two values
    assert found.item() == pytest.approx(expected, rel=1e-6)
    near_and_far = torch.tensor([[0.1], [-0.1]] * 10 + [[1.0]])
    pulls = {}
    for spread in ("class", "frame"):
        bounded = near_and_far.clone().requires_grad_()
        conditional_entropy(bounded, torch.zeros(21, dtype=torch.int64), 1, 0.1, spread).backward()
        pulls[spread] = (bounded.grad[-1] / bounded.grad[:-1].abs().max()).item()
    assert pulls["frame"] < pulls["class"] / 2


@pytest.mark.parametrize("spread", ["class", "frame"])
def test_conditional_entropy_falls_as_a_class_draws_together(spread):
    labels = torch.arange(40) % 4
    bounded = torch.rand(40, 8, requires_grad=True)
    before = conditional_entropy(bounded, labels, 4, 0.3, spread)
    before.backward()
    after = conditional_entropy(bounded - 0.1 * bounded.grad, labels, 4, 0.3, spread)
    assert after < before
    assert after >= 2 * math.log(0.3)  # the noise is its floor
