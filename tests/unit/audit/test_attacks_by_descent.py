"""Attacks that optimise, and attacks on gradients: each must succeed where nothing is hidden."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import interpolate

from splitward.audit.attack import Attack, Case
from splitward.audit.dense import DenseGradient
from splitward.audit.descent import activation_of, descend, total_variation
from splitward.audit.floors import mean_image
from splitward.audit.gradients import (
    ClientGradient,
    CutGradient,
    cut_gradients,
    infer_labels,
    weight_gradients,
)
from splitward.audit.metrics import mse, ssim
from splitward.audit.optimise import Optimise
from splitward.audit.prior import Prior
from splitward.audit.unsplit import UnSplit
from splitward.method.halves import NetworkSettings
from splitward.method.saliency import MapSettings
from splitward.method.split import DefenceSettings, SplitNetwork, SplitSettings

SMALL = {
    "optimise": Optimise(targets=4, steps=150, weights=(0.003, 0.3), trials=4),
    "prior": Prior(targets=4, training_steps=150, latent_steps=50, frame_steps=100),
    "unsplit": UnSplit(targets=12, rounds=8),
    "dlg-cut": CutGradient(targets=4, steps=150),
    "dlg": ClientGradient("dlg", targets=2, steps=200),
    "idlg": ClientGradient("idlg", targets=2, steps=200),
    "inverting": ClientGradient("inverting", targets=2, steps=200),
    "dense": DenseGradient(targets=4, steps=150),
}
TINY = {name: replace(attack, effort=0.03, targets=2) for name, attack in SMALL.items()}


def frames_for(count: int, side: int, seed: int) -> torch.Tensor:
    """Smooth random images in 0..1."""
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return interpolate(coarse, (side, side), mode="bicubic", align_corners=True).clamp(0, 1)


def case_for(profile: str, side: int = 16, targets: int = 16, auxiliary: int = 200) -> Case:
    """An untrained network under the profile."""
    mapped, sealed = profile != "none", profile == "sealed"
    defence = DefenceSettings(
        profile, MapSettings() if mapped else None, values=8 if sealed else 0, sigma=0.3 if sealed else 0.0
    )
    size = "small" if side <= 32 else "residual"
    network = NetworkSettings(size, 1, side, 3, mapped, values=defence.values, recovery="svt")
    torch.manual_seed(0)
    split = SplitNetwork(SplitSettings(network, defence, 1.0, 1.9 / 127)).eval()

    @torch.no_grad()
    def release(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        activation = split.client(split.attack(frames))
        return split.release(activation, torch.randn(activation.shape, generator=generator))

    frames, labels = frames_for(targets, side, 1), torch.arange(targets) % 3
    released = release(frames, torch.Generator().manual_seed(2))
    own = frames_for(auxiliary, side, 3)
    return Case(released, released[None], labels, own, torch.arange(auxiliary) % 3, 3, release, split, frames)


def similarity(attack: Attack, case: Case) -> float:
    guesses = attack.reconstruct(case, 0)
    assert case.frames is not None
    return float(ssim(guesses, case.frames[: len(guesses)]).mean())


LEAST = {"unsplit": 0.9, "dlg": 0.5, "idlg": 0.7, "inverting": 0.7}


@pytest.mark.parametrize("name", SMALL)
def test_succeeds_on_the_undefended_cut_and_more_effort_does_not_hurt(name):
    case = case_for("none")
    found = similarity(SMALL[name], case)
    floor = float(ssim(mean_image(case.auxiliary, 16), case.frames).mean())
    assert found > max(LEAST.get(name, 0.98), floor), (found, floor)
    assert found > similarity(replace(SMALL[name], effort=0.1), case) - 0.02


def test_a_dense_bottleneck_hides_nothing_from_who_sees_its_gradient():
    case = case_for("sealed")
    assert similarity(SMALL["dense"], case) > 0.9
    assert similarity(SMALL["optimise"], case) < 0.6


@pytest.mark.parametrize("profile", ["none", "psgl", "sealed"])
@pytest.mark.parametrize("name", TINY)
def test_same_seed_same_bits_in_every_profile(name, profile):
    case = case_for(profile, targets=4, auxiliary=40)
    guesses = TINY[name].reconstruct(case, 5)
    assert guesses.shape == (2, 1, 16, 16)
    assert (guesses >= 0).all()
    assert (guesses <= 1).all()
    assert torch.equal(TINY[name].reconstruct(case, 5), guesses)
    assert all(weight.grad is None for weight in case.network.parameters())


@pytest.mark.parametrize("name", TINY)
def test_larger_frames(name):
    case = case_for("sealed", side=64, targets=2, auxiliary=20)
    assert TINY[name].reconstruct(case, 0).shape == (2, 1, 64, 64)


@pytest.mark.parametrize("name", TINY)
def test_says_that_a_black_box_is_not_enough(name):
    case = replace(case_for("none", targets=2, auxiliary=4), network=None)
    with pytest.raises(ValueError, match=f"{TINY[name].card.name}: needs the network's weights"):
        TINY[name].reconstruct(case, 0)


def test_cards_are_distinct():
    cards = [attack.card for attack in SMALL.values()]
    assert len({card.name for card in cards}) == len(cards)
    assert [card.phase for card in cards] == ["inference"] * 3 + ["training"] * 5


def test_unsplit_reads_no_weights_and_no_images():
    case = case_for("none", targets=4)
    other = SplitNetwork(case.network.settings).eval()
    blind = replace(case, network=other, auxiliary=torch.zeros_like(case.auxiliary))
    assert torch.equal(TINY["unsplit"].reconstruct(blind, 0), TINY["unsplit"].reconstruct(case, 0))


@pytest.mark.parametrize("profile", ["none", "psgl", "sealed"])
def test_the_gradient_at_the_cut_tells_the_label(profile):
    case = case_for(profile)
    candidates = cut_gradients(case.network, case.released)
    for index in range(4):  # each frame alone, as in a batch of 1
        z = case.released[index : index + 1].clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(case.network.server(z).fused, case.labels[index : index + 1])
        (sent,) = torch.autograd.grad(loss, z)
        assert infer_labels(candidates[:, index : index + 1], sent) == case.labels[index]


def test_weight_gradients_are_those_of_a_training_step():
    case = case_for("psgl")
    network, frame, label = case.network, case.frames[:1], case.labels[:1]
    step = network(frame)
    loss = torch.nn.functional.cross_entropy(step.outputs.fused, label)
    expected = torch.autograd.grad(loss, list(network.client.parameters()))
    sent = cut_gradients(network, step.released)[label]
    found = weight_gradients(network, network.attack(frame), sent[0])
    torch.testing.assert_close(found[0], torch.cat([g.flatten() for g in expected]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("attack", [ClientGradient(), DenseGradient()])
def test_client_gradients_need_the_frames(attack):
    with pytest.raises(ValueError, match="needs the case's frames"):
        attack.reconstruct(replace(case_for("none", targets=2), frames=None), 0)


def test_a_case_keeps_its_first_frames():
    assert case_for("none").first(3).frames.shape == (3, 1, 16, 16)


def test_the_map_has_no_gradient_of_its_own_on_logits():
    network = case_for("psgl").network
    frames = frames_for(2, 16, 4).requires_grad_()
    (through,) = torch.autograd.grad(activation_of(network, frames).square().sum(), frames)
    attacked = network.attack(frames)
    constant = torch.cat((attacked[:, :1] + frames - frames.detach(), attacked[:, 1:]), dim=1)
    (straight,) = torch.autograd.grad(network.client(constant).square().sum(), frames)
    torch.testing.assert_close(through, straight)


def test_total_variation_by_hand():
    frames = torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]], [[[0.5, 0.5], [0.5, 0.5]]]])
    assert total_variation(frames).tolist() == [1.0, 0.0]


def test_descent_finds_the_least_of_each_row_within_the_box():
    wanted = torch.tensor([[0.3], [2.0]])
    (found,) = descend(lambda x: (x - wanted).square().sum(1), torch.zeros(2, 1), steps=200, rate=0.1)
    torch.testing.assert_close(found, torch.tensor([[0.3], [1.0]]), rtol=0, atol=1e-3)
    (free,) = descend(
        lambda x: (x - wanted).square().sum(1), torch.zeros(2, 1), steps=300, rate=0.1, boxed=False
    )
    assert float(mse(free, wanted).max()) < 1e-4
