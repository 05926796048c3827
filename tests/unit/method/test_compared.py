"""The defences that `sealed` is compared with do what their papers say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitward.method.compared import Adversary, _centred_distances, distance_correlation
from splitward.method.halves import CONTROLS, NetworkSettings
from splitward.method.split import COMPARED, SCORE_BOUND, SplitNetwork, SplitSettings
from splitward.training.settings import release_law


def network_for(name: str, classes: int = 4) -> SplitNetwork:
    defence = COMPARED[name]
    if name in CONTROLS:
        defence = replace(defence, values=classes)
    settings = NetworkSettings(
        "small", 1, 12, classes, mapped=defence.map is not None, values=defence.values,
        bottleneck=defence.bottleneck,
    )  # fmt: skip
    torch.manual_seed(0)
    law = release_law(settings, defence)
    return SplitNetwork(SplitSettings(settings, defence, law.bound, law.scale))


def test_distance_correlation_of_the_same_thing_is_one():
    rows = torch.randn(40, 3)
    turned = torch.linalg.qr(torch.randn(3, 3)).Q
    assert distance_correlation(rows, 5 * rows @ turned + 2) == pytest.approx(1, abs=1e-5)


def test_distances_are_those_of_each_pair_also_of_near_and_of_equal_rows():
    rows = torch.rand(6, 500, generator=torch.Generator().manual_seed(0))
    rows[1] = rows[0]
    rows[2] = rows[0] + 1e-4
    apart = (rows[:, None] - rows).square().sum(2).sqrt()
    expected = apart - apart.mean(0, keepdim=True) - apart.mean(1, keepdim=True) + apart.mean()
    torch.testing.assert_close(_centred_distances(rows), expected, atol=1e-5, rtol=0)


def test_distance_correlation_of_independent_rows_is_small_and_falls_with_their_number():
    generator = torch.Generator().manual_seed(0)
    small, large = (
        float(distance_correlation(*torch.randn(2, count, 2, generator=generator).unbind()))
        for count in (30, 600)
    )
    assert large < 0.02 < small


def test_distance_correlation_has_a_gradient_where_rows_repeat():
    rows = torch.zeros(6, 3)
    rows[3:] = 1
    rows.requires_grad_()
    distance_correlation(torch.randn(6, 2), rows).backward()
    assert bool(rows.grad.isfinite().all())


def test_the_adversary_learns_while_the_client_unlearns():
    settings = NetworkSettings("small", 1, 12, 4, mapped=False, values=4, bottleneck="channels")
    adversary, released, frames = Adversary(settings, 0.5), torch.randn(8, 4, 6, 6), torch.rand(8, 1, 12, 12)
    variance = (frames - frames.mean(0)).square().mean()
    plain = released.clone().requires_grad_()
    ((adversary.body(plain) - frames).square().mean() / variance).backward()
    expected = [parameter.grad.clone() for parameter in adversary.parameters()]
    adversary.zero_grad()
    turned = released.clone().requires_grad_()
    adversary(turned, frames).backward()
    torch.testing.assert_close(turned.grad, -0.5 * plain.grad)
    for parameter, gradient in zip(adversary.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_projection_is_orthonormal_and_never_trained():
    client = network_for("projection").client
    weight = client.bottleneck.dense.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-5, rtol=0)
    assert not weight.requires_grad
    assert client.bottleneck.dense.bias.abs().max() == 0


def test_the_control_sends_its_label_and_nothing_else():
    network, frames = network_for("label"), torch.rand(16, 1, 12, 12)
    trained = network(frames)
    assert trained.released.requires_grad  # logits, so that it can learn
    step = network.eval()(frames)
    assert step.released.unique().tolist() == [0, 1]
    assert step.released.sum(1).eq(1).all()
    for scores in step.outputs:
        torch.testing.assert_close(scores.argmax(1), step.activation.argmax(1))


def test_the_other_control_sends_a_byte_of_each_score():
    network, frames = network_for("scores"), torch.rand(16, 1, 12, 12)
    with torch.no_grad():
        network.client.bottleneck.dense.weight.mul_(100)
    trained = network(frames)
    assert trained.released is trained.activation  # as they are, so that it can learn
    step = network.eval()(frames)
    steps = step.released / (SCORE_BOUND / 127)
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert steps.abs().max() <= 127.001
    within = step.activation.abs() < SCORE_BOUND
    gap = (step.released - step.activation)[within].abs().max()
    assert 0 < gap <= SCORE_BOUND / 254 + 1e-4
    assert release_law(network.settings.network, network.settings.defence).dtype == "int8"


@pytest.mark.parametrize("name", ["gaussian", "cem"])
def test_noise_is_as_loud_as_said_and_fresh(name):
    network, frames = network_for(name).eval(), torch.rand(64, 1, 12, 12)
    one, other = network(frames), network(frames)
    noise = one.released - one.activation
    assert float(noise.std().detach()) == pytest.approx(COMPARED[name].sigma, rel=0.05)
    assert not torch.equal(one.released, other.released)
