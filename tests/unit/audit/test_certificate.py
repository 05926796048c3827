"""The certificate's bounds against estimators whose error is known."""

from __future__ import annotations

import math

import pytest
import torch

from splitward.audit.certificate import Movement, candidates_bound, certify, fisher_bounds, recaptures_bound
from splitward.data import phantom
from splitward.method.split import SplitNetwork
from splitward.training.loop import frames_of, to_unit
from splitward.training.settings import split_settings

ALIKE = torch.zeros(200, dtype=torch.int64)


@pytest.fixture(scope="module")
def sealed() -> tuple[SplitNetwork, torch.Tensor, torch.Tensor]:
    """An untrained sealed network and 60 frames of two classes."""
    dataset = phantom.load("mass", 28, seed=0, count=90)
    torch.manual_seed(0)
    network = SplitNetwork(split_settings(dataset, "sealed")).eval()
    split = dataset.train
    return network, to_unit(frames_of(split))[:60], torch.from_numpy(split.labels)[:60]


def test_without_noise_the_list_gives_every_frame_away():
    values, frames = torch.randn(50, 4), torch.rand(50, 1, 12, 12)
    bound, identified = candidates_bound(values, frames, ALIKE[:50], 1e-4)
    assert bound < 1e-12
    assert identified == pytest.approx(1)


def test_with_noise_alone_only_the_mean_of_the_list_is_left():
    frames = torch.rand(50, 1, 12, 12)
    bound, identified = candidates_bound(torch.randn(50, 4), frames, ALIKE[:50], 1e6)
    assert bound == pytest.approx(float((frames - frames.mean(0)).square().mean()), rel=1e-5)
    assert identified == pytest.approx(1 / 50, rel=1e-3)


SIGMA = 0.8


@pytest.fixture
def two() -> tuple[torch.Tensor, torch.Tensor, float]:
    """Black or white, released as -1 or 1: the posterior is a logistic function, its error one integral."""
    frames = torch.stack((torch.zeros(1, 2, 2), torch.ones(1, 2, 2)))
    at = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi)
    error = torch.trapezoid(density * (1 - torch.tanh((1 + SIGMA * at) / SIGMA**2)) ** 2 / 4, at)
    return torch.tensor([[-1.0], [1.0]]), frames, float(error)


def test_two_frames_have_the_error_of_the_textbook(two):
    """Few frames get as many draws as many do: of two frames, four draws would tell little."""
    values, frames, error = two
    bound, _ = candidates_bound(values, frames, ALIKE[:2], SIGMA)
    assert 0.93 * error < bound < error


def test_the_bound_is_below_the_error_and_not_about_it(two):
    """Two standard errors: about one seed in forty is above."""
    values, frames, error = two
    found = [candidates_bound(values, frames, ALIKE[:2], SIGMA, draws=50, seed=seed)[0] for seed in range(100)]
    assert sum(bound > error for bound in found) <= 8
    assert min(found) >= 0
    assert sum(found) / len(found) > 0.5 * error


def test_who_knows_the_label_has_only_its_class_to_choose_from():
    """Nothing but the class is released: what is left is the spread within it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    frames = 0.2 + 0.6 * labels.view(-1, 1, 1, 1) + 0.01 * torch.randn(100, 1, 8, 8, generator=generator)
    bound, _ = candidates_bound(torch.zeros(100, 4), frames, labels, 1.0)
    within = sum(float((own - own.mean(0)).square().mean()) for own in (frames[0::2], frames[1::2])) / 2
    assert bound == pytest.approx(within, rel=1e-4)
    assert candidates_bound(torch.zeros(100, 4), frames, ALIKE[:100], 1.0)[0] > 100 * bound


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_no_estimator_beats_the_candidates_bound(sigma):
    """Nearest candidate, linear regression fitted on the very list, and the mean: all at or above the bound."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(200, 1, 8, 8, generator=generator)
    flat = frames.flatten(1).double()
    clean = flat @ torch.randn(64, 6, generator=generator, dtype=torch.float64) / 8
    bound, _ = candidates_bound(clean, frames, ALIKE, sigma, draws=20)
    noisy = clean + sigma * torch.randn(200, 6, generator=generator, dtype=torch.float64)
    nearest = flat[torch.cdist(noisy, clean).argmin(1)]
    design = torch.cat((noisy, torch.ones(200, 1, dtype=torch.float64)), 1)
    # Fitted on fresh noise of the same list: the attacker has the list.
    fresh = clean + sigma * torch.randn(200, 6, generator=generator, dtype=torch.float64)
    fit = torch.linalg.lstsq(torch.cat((fresh, torch.ones(200, 1, dtype=torch.float64)), 1), flat).solution
    for guess in (nearest, design @ fit, flat.mean(0).expand_as(flat)):
        assert float((guess - flat).square().mean()) >= 0.98 * bound


def test_more_captures_and_less_noise_lower_the_bound(sealed):
    network, frames, labels = sealed
    certificate = certify(network, frames, labels)
    assert certificate is not None
    assert 0 <= certificate.captures_mse[8] <= certificate.captures_mse[1] == certificate.bound_mse
    assert certificate.bound_mse <= certificate.class_mean_mse * 1.5
    assert 0 <= certificate.recaptures_mse <= certificate.bound_mse
    assert 0 <= certificate.values_mse <= certificate.captures_mse[8]
    assert certificate.to_dict()["captures_mse"].keys() == {"1", "8"}
    assert certificate.to_dict()["movement"] == {"noise": 0.05, "pixels": 1}


def test_who_knows_the_values_has_the_mean_of_the_frames_that_share_them():
    """From all that a device releases: 90 black frames have one code, 10 white ones the next."""
    frames = torch.cat((torch.zeros(90, 1, 4, 4), torch.ones(5, 1, 4, 4), torch.full((5, 1, 4, 4), 0.5)))
    codes = torch.cat((torch.zeros(90, 1), torch.full((10, 1), 0.5)))
    bound, _ = candidates_bound(codes, frames, ALIKE[:100], 1e-9, draws=2)
    assert bound == pytest.approx(0.1 * 0.25**2)


def test_the_bound_for_who_knows_the_values_is_the_spread_within_a_class_and_code(sealed):
    """On a coarse grid, where many frames round alike; distances that are all but 0 must not choose among these."""
    _, frames, labels = sealed
    torch.manual_seed(0)
    dataset = phantom.load("mass", 28, seed=0, count=20)
    network = SplitNetwork(split_settings(dataset, "sealed", seal={"steps": 2})).eval()
    certificate = certify(network, frames, labels)
    assert certificate is not None
    with torch.no_grad():
        values = network.seal.round_clean(network.client(network.attack(frames)))
    _, codes = torch.cat((values.flatten(1), labels[:, None]), 1).unique(dim=0, return_inverse=True)
    spread = sum(
        float((frames[codes == code] - frames[codes == code].mean(0)).square().sum()) for code in codes.unique()
    )
    assert 1 < len(codes.unique()) < len(frames)
    assert certificate.values_mse == pytest.approx(spread / frames.numel(), rel=1e-4)
    assert certificate.values_mse <= certificate.bound_mse


@pytest.fixture
def scenes() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(60, 1, 8, 8, generator=generator), torch.arange(60) % 2


def first_values(frames: torch.Tensor) -> torch.Tensor:
    """Released as they are: the first row of each frame."""
    return frames[:, 0, 0]


STILL, UNSTEADY = Movement(0, 0), Movement(0.02, 0)


def test_captures_of_a_scene_that_nothing_moves_are_one(scenes):
    """The noise is a function of the values: the same values again say nothing new."""
    seen = (scenes[0] * 255).round() / 255  # as a camera has them
    bound = recaptures_bound(first_values, seen, scenes[1], 0.3, STILL)
    assert bound == pytest.approx(candidates_bound(first_values(seen), seen, scenes[1], 0.3)[0], rel=0.08)


def test_captures_that_all_round_apart_have_noise_of_their_own(scenes):
    """Where a camera's noise is small beside the release's, eight tell as much as one with the noise of their mean."""
    bound = recaptures_bound(first_values, *scenes, 1.0, UNSTEADY)
    alike, _ = candidates_bound(first_values(scenes[0]), *scenes, 1.0 / 8**0.5)
    assert bound == pytest.approx(alike, rel=0.08)
    assert bound < 0.9 * recaptures_bound(first_values, *scenes, 1.0, STILL)


def test_which_captures_coincide_gives_a_scene_away_whatever_the_noise(scenes):
    """One half of the scenes lies at an edge of the grid, where captures round apart; noise does not hide which."""
    frames, labels = torch.zeros(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    frames[10:] = 0.5

    def one_step(seen: torch.Tensor) -> torch.Tensor:
        return (seen.mean((1, 2, 3)) > 0.5).float()[:, None]

    still, unsteady = (
        recaptures_bound(one_step, frames, labels, 1e3, movement) for movement in (STILL, UNSTEADY)
    )
    assert still == pytest.approx(0.0625, rel=0.01)
    assert unsteady < 0.01 * still


def test_an_attacker_who_knows_the_movement_is_above_the_bound(scenes):
    """The posterior mean over the scenes from the mean of what was released, which is blind to coincidences."""
    frames, labels = scenes
    movement, sigma = Movement(0.1, 1), 0.5
    bound = recaptures_bound(first_values, frames, labels, sigma, movement, captures=4)
    generator, errors = torch.manual_seed(1), []
    for _ in range(20):
        values = [first_values(movement.capture(frames)) for _ in range(4)]
        seen = torch.stack([one + sigma * torch.randn(one.shape, generator=generator) for one in values]).mean(
            0
        )
        same = labels[:, None] == labels
        gaps = torch.cdist(seen, torch.stack(values).mean(0)).square().masked_fill(~same, torch.inf)
        weights = (-gaps * 4 / (2 * sigma**2)).softmax(1)
        errors.append(float((weights @ frames.flatten(1) - frames.flatten(1)).square().mean()))
    assert sum(errors) / len(errors) >= bound > 0


def test_the_trace_bound_is_exact_for_a_linear_gaussian_release():
    """With `z = w.x + noise` and Gaussian frames, the posterior covariance is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.linspace(0.5, 2, 144, dtype=torch.float64)
    frames = (torch.randn(4000, 144, generator=generator, dtype=torch.float64) * scales).view(-1, 1, 12, 12)
    weight = torch.randn(3, 144, generator=generator, dtype=torch.float64)
    sigma = 0.7
    network = _Linear(weight, sigma)
    trace, unbiased = fisher_bounds(network, frames, torch.zeros(4000, dtype=torch.int64))
    information = weight.T @ weight / sigma**2
    expected = torch.linalg.inv(information + torch.diag(1 / scales.square())).diagonal().mean()
    assert trace == pytest.approx(float(expected), rel=0.05)
    assert unbiased == pytest.approx(144 / float(information.diagonal().sum()), rel=1e-6)


class _Linear(torch.nn.Module):
    """What `fisher_bounds` reads of a network: a linear client half and sigma."""

    def __init__(self, weight: torch.Tensor, sigma: float) -> None:
        super().__init__()
        self.weight, self.saliency = weight, None
        self.settings = type("S", (), {"defence": type("D", (), {"sigma": sigma})})

    def client(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.flatten(1) @ self.weight.T


def test_a_release_without_noise_has_no_certificate(sealed):
    _, frames, labels = sealed
    dataset = phantom.load("mass", 28, seed=0, count=20)
    assert certify(SplitNetwork(split_settings(dataset, "none")).eval(), frames, labels) is None
