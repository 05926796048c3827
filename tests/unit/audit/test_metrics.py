"""Metrics, and floors by hand."""

from __future__ import annotations

import pytest
import torch

from splitward.audit.floors import class_mean_image, mean_image
from splitward.audit.metrics import mse, roc_auc, ssim


def frames_for(count: int, side: int = 28, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Smooth random images in 0..1."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=True).clamp(0, 1)


def test_equal_images():
    frames = frames_for(5, channels=3)
    torch.testing.assert_close(ssim(frames, frames), torch.ones(5), rtol=0, atol=1e-5)
    assert torch.equal(mse(frames, frames), torch.zeros(5))


@pytest.mark.parametrize(("a", "b"), [(0.2, 0.8), (0.0, 1.0), (0.5, 0.4)])
def test_constant_images_by_the_formula(a, b):
    """Without variance only the luminance term is left: (2ab + c1)/(a^2 + b^2 + c1)."""
    one, other = (torch.full((2, 1, 16, 16), value, dtype=torch.float64) for value in (a, b))
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert ssim(one, other).tolist() == pytest.approx([expected] * 2, abs=1e-9)
    assert mse(one, other).tolist() == pytest.approx([(a - b) ** 2] * 2)


def test_one_window_by_the_formula():
    one, other = torch.rand(2, 1, 1, 11, 11, dtype=torch.float64)
    at = torch.arange(-5.0, 6, dtype=torch.float64)
    weights = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    a, b = one[0, 0], other[0, 0]
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    expected = ((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)) / (
        (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    )
    assert ssim(one, other).item() == pytest.approx(expected.item(), abs=1e-9)


def test_ssim_is_symmetric_and_of_each_image_alone():
    one, other = frames_for(6, seed=1), frames_for(6, seed=2)
    torch.testing.assert_close(ssim(one, other), ssim(other, one))
    torch.testing.assert_close(ssim(one, other)[2:3], ssim(one[2:3], other[2:3]))


def test_noise_costs_similarity():
    frames = frames_for(8)
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))
    noisy = [frames + sigma * noise for sigma in (0.01, 0.05, 0.2, 0.8)]
    similar, far = [ssim(images, frames).mean() for images in noisy], [mse(i, frames).mean() for i in noisy]
    assert similar == sorted(similar, reverse=True)
    assert far == sorted(far)


def test_floors_by_hand():
    auxiliary = torch.tensor([0.0, 0.2, 1.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    assert mean_image(auxiliary, 4).shape == (4, 1, 2, 2)
    assert mean_image(auxiliary, 4)[3].flatten().tolist() == pytest.approx([0.4] * 4)
    guesses = class_mean_image(auxiliary, torch.tensor([0, 0, 2]), torch.tensor([2, 0, 1]))
    assert guesses[:, 0, 0, 0].tolist() == pytest.approx([1.0, 0.1, 0.4])  # class 1: the mean of all


def test_roc_auc_counts_pairs():
    scores = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    # Of 6 pairs, 5 are in order and one is a tie.
    assert roc_auc(scores, labels) == pytest.approx(5.5 / 6)
    assert roc_auc(scores.flip(1), labels) == pytest.approx(0.5 / 6)
