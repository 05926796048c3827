"""Feature-space hijacking and the trial of the guard, on tiny data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from splitward.audit.hijack import HijackingServer, HijackSettings
from splitward.audit.hijack_trial import (
    BlendingServer,
    FewFramesServer,
    HonestServer,
    OneClassServer,
    TrainingClient,
    run_trial,
    simulate,
)
from splitward.data import Dataset, phantom
from splitward.method.split import SplitNetwork
from splitward.training.guard import GradientGuard
from splitward.training.loop import frames_of, losses, one_cycle, reproducible, to_unit
from splitward.training.settings import RunSettings, split_settings

QUICK = HijackSettings(pilot_steps=3, critic_steps=1, batch=16)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return phantom.load("mass", 28, seed=0, count=120)


def settings_for(dataset: Dataset, profile: str) -> RunSettings:
    return RunSettings("phantom", None, 28, split_settings(dataset, profile), epochs=1, batch=16)


@pytest.mark.parametrize("profile", ["none", "psgl", "sealed"])
def test_client_and_server_take_the_steps_of_the_training_in_one_process(dataset, profile):
    settings, steps = settings_for(dataset, profile), 4
    frames, labels = to_unit(frames_of(dataset.train)[:16]), torch.from_numpy(dataset.train.labels[:16])
    with reproducible(0):
        apart = SplitNetwork(settings.split).train()
        client, server = TrainingClient(apart, settings, steps), HonestServer(apart, settings, steps)
        for _ in range(steps):
            client.train(frames, labels, server, GradientGuard())
    with reproducible(0):
        whole = SplitNetwork(settings.split).train()
        optimiser = torch.optim.AdamW(whole.parameters(), weight_decay=settings.weight_decay)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = one_cycle(settings, step / steps)
            optimiser.zero_grad()
            losses(whole, whole(frames), frames, labels).backward()
            optimiser.step()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(apart.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("profile", ["none", "sealed"])
def test_the_malicious_server_answers_without_the_task(dataset, profile, conditional):
    split = split_settings(dataset, profile)
    shadow, shadow_labels = to_unit(frames_of(dataset.validation)), torch.from_numpy(dataset.validation.labels)
    with reproducible(0):
        server = HijackingServer(split, shadow, shadow_labels, replace(QUICK, conditional=conditional))
        released = torch.rand(8, *split.network.release_shape)
        labels = torch.arange(8) % 2
        weights = [tensor.clone() for tensor in server.critic.state_dict().values()]
        gradient = server.answer(released, labels)
    assert gradient.shape == released.shape
    assert gradient.abs().amax() > 0
    assert not released.requires_grad
    assert any(not torch.equal(a, b) for a, b in zip(weights, server.critic.state_dict().values(), strict=True))
    guesses = server.reconstruct(released)
    assert guesses.shape == (8, 1, 28, 28)
    assert 0 <= float(guesses.min()) <= float(guesses.max()) <= 1


def test_the_critic_of_the_published_attack_does_not_see_the_labels(dataset):
    split = split_settings(dataset, "sealed")
    shadow, shadow_labels = to_unit(frames_of(dataset.validation)), torch.from_numpy(dataset.validation.labels)
    answers = []
    for labels in (torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.int64)):
        with reproducible(0):
            server = HijackingServer(split, shadow, shadow_labels, QUICK)
            answers.append(server.answer(torch.rand(8, 16), labels))
    assert torch.equal(*answers)


def test_a_server_that_serves_the_task_as_well_sends_both_gradients_alike_long(dataset):
    split = split_settings(dataset, "sealed")
    shadow, shadow_labels = to_unit(frames_of(dataset.validation)), torch.from_numpy(dataset.validation.labels)
    released, labels = torch.rand(8, 16, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 2

    def servers() -> tuple[HonestServer, HijackingServer]:
        honest = HonestServer(SplitNetwork(split).train(), settings_for(dataset, "sealed"), 5)
        return honest, HijackingServer(split, shadow, shadow_labels, replace(QUICK, conditional=True))

    with reproducible(0):
        served, pulled = (server.answer(released, labels) for server in servers())
    with reproducible(0):
        both = BlendingServer(*servers()).answer(released, labels)
    ratio = pulled.norm(dim=1).mean() / served.norm(dim=1).mean()
    assert ratio > 10, "the task's gradient alone would not be felt"
    torch.testing.assert_close(both, served * ratio + pulled)


def test_a_server_that_hijacks_by_one_class_pulls_the_others_one_way_and_less(dataset):
    split = split_settings(dataset, "sealed")
    shadow, shadow_labels = to_unit(frames_of(dataset.validation)), torch.from_numpy(dataset.validation.labels)
    labels = torch.arange(8) % 2
    with reproducible(0):
        server = OneClassServer(HijackingServer(split, shadow, shadow_labels, QUICK), split.network)
        answers = [server.answer(torch.rand(8, 16), labels) for _ in range(2)]
    others = torch.cat([answer[labels == 1] for answer in answers])
    ways = others / others.norm(dim=1, keepdim=True)
    torch.testing.assert_close(ways, ways[:1].expand_as(ways))
    for answer in answers:
        lengths = answer.norm(dim=1)
        assert 0.05 < lengths[labels == 1].mean() / lengths[labels == 0].mean() < 0.2


def test_a_server_that_hijacks_by_few_frames_gives_them_their_classes_whole_length(dataset):
    split = split_settings(dataset, "sealed")
    shadow, shadow_labels = to_unit(frames_of(dataset.validation)), torch.from_numpy(dataset.validation.labels)
    released, labels = torch.rand(8, 16, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 2

    def servers() -> tuple[HijackingServer, FewFramesServer]:
        hijacking = HijackingServer(split, shadow, shadow_labels, QUICK)
        return hijacking, FewFramesServer(hijacking, split.network)

    with reproducible(0):
        pulled = servers()[0].answer(released, labels)
    with reproducible(0):
        sent = servers()[1].answer(released, labels)
    torch.testing.assert_close(sent[:2], 4 * pulled[:2])
    assert 0 < sent[2:].norm(dim=1).max() < 0.01 * pulled.norm(dim=1).mean()
    for label in (0, 1):
        ways = sent[2:][labels[2:] == label] / sent[2:][labels[2:] == label].norm(dim=1, keepdim=True)
        torch.testing.assert_close(ways, ways[:1].expand_as(ways))


def test_one_seed_gives_the_same_course(dataset):
    settings = settings_for(dataset, "sealed")
    first, again = (simulate(dataset, settings, 4, hijack=QUICK) for _ in range(2))
    assert first == again
    assert simulate(dataset, replace(settings, seed=1), 4, hijack=QUICK) != first


def test_the_trial_is_plain_values_and_the_guard_tells_the_two_servers_apart(dataset):
    found = run_trial(
        dataset,
        "phantom",
        "none",
        honest_seeds=(5,),
        hijack_seeds=(6,),
        honest_steps=12,
        hijack_steps=30,
        turns_at=9,
        hijack=QUICK,
    )
    assert json.loads(json.dumps(found)) == found
    assert found["honest_trainings"] == 1
    assert found["false_alarms"] == 0
    assert found["lowest_honest_separation"] > 0.95
    assert found["step_at_detection"] == [8]
    assert found["detected"]
    assert [point["step"] for point in found["curves"][0]] == [1, 8, 20, 30]
    assert found["turning"]["detected"]
    assert 9 < found["turning"]["step_at_detection"][0] <= 24
    assert found["blended"].keys() == found["conditional"].keys()
    assert found["by_few_frames"]["step_at_detection"] == [8]
    assert found["fixed_ways"]["step_at_detection"] == [None], "the guard's limit, as docs/method.md tells it"
