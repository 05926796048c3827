"""The client's guard on gradients whose dependence on the labels is known."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from splitward.errors import HijackError
from splitward.training.guard import GradientGuard, GuardSettings, class_directions, class_separation


def gradients(
    labels: np.ndarray, own: float, seed: int = 0, ways: int = 9, noise: float = 0.5, draw: int | None = None
) -> np.ndarray:
    """One common direction, by `seed`, `own` of a direction for each class, by `ways`, and noise: [B, 3, 4, 4]."""
    generator = np.random.default_rng(seed)
    common, classes = generator.normal(size=(1, 48)), np.random.default_rng(ways).normal(size=(10, 48))
    if draw is not None:
        generator = np.random.default_rng(draw)
    made = common + own * classes[labels] + noise * generator.normal(size=(len(labels), 48))
    return made.reshape(-1, 3, 4, 4).astype(np.float32)


def labels_for(count: int = 40, classes: int = 10, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(classes, size=count)


def feed(guard: GradientGuard, batches: int, turns_at: int, own: float = 0.0) -> None:
    """So many batches of a server that serves the task until one of them, and from there on by `own` only."""
    for seed in range(batches):
        labels = labels_for(seed=seed)
        guard.observe(gradients(labels, 2.0 if seed < turns_at else own, seed), labels)


def separation_of(batches: list[tuple[np.ndarray, np.ndarray]], reach: int = 3) -> float | None:
    made = [class_directions(rows, labels)[::2] for rows, labels in batches]
    batch = np.concatenate([np.full(len(classes), number) for number, (_, classes) in enumerate(made)])
    means, classes = (np.concatenate(part) for part in zip(*made, strict=True))
    return class_separation(means, classes, batch, reach)


def test_directions_by_hand():
    """To the mean direction frames count alike whatever their length; a class without a direction is left out."""
    rows = np.array([[3.0, 0.0], [0.0, 4.0], [0.0, -2.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    means, pulls, classes = class_directions(rows, np.array([4, 4, 1, 2, 3, 3]))
    assert classes.tolist() == [1, 4]
    np.testing.assert_allclose(means, [[0, -1], [0.5**0.5, 0.5**0.5]], atol=1e-7)
    np.testing.assert_allclose(pulls, [[0, -1], [0.6, 0.8]], atol=1e-7)


def test_separation_by_hand():
    right, up = [1.0, 0.0], [0.0, 1.0]
    zero, one = np.array([0, 1]), np.array([1, 0])
    # One class's cosine is 1 from batch to batch, two classes' 0: each pair of one class is above; and the reverse.
    assert separation_of([(np.array([right, up]), zero), (np.array([right, up]), zero)]) == 1.0
    assert separation_of([(np.array([right, up]), zero), (np.array([right, up]), one)]) == 0.0
    # Same pairs 1 and 0; others 0 and 1: a win, a loss and two ties.
    assert separation_of([(np.array([right, up]), zero), (np.array([right, right]), zero)]) == 0.5


def test_batches_beyond_reach_and_pairs_within_a_batch_do_not_count():
    right, up = [1.0, 0.0], [0.0, 1.0]
    labels = np.array([0, 1])
    assert separation_of([(np.array([right, up]), labels)]) is None
    turned = [(np.array([right, up]), labels), (np.array([right, up]), labels), (np.array([up, right]), labels)]
    assert separation_of(turned, reach=1) == 0.5
    assert separation_of(turned, reach=2) == pytest.approx(3 / 9)


@pytest.mark.parametrize("labels", [[0, 0, 0], [4]])
def test_batches_of_one_class_tell_nothing(labels):
    guard = GradientGuard(GuardSettings(first=1))
    for seed in range(40):
        guard.observe(gradients(np.array(labels), 0.0, seed), np.array(labels))
    assert guard.separation == 1.0


def test_equal_gradients_separate_nothing_and_vanished_ones_move_nothing():
    labels = labels_for()
    assert separation_of([(np.ones((40, 6)), labels)] * 2) == 0.5
    assert separation_of([(np.zeros((40, 6)), labels)] * 2) is None


def test_scale_does_not_matter_nor_a_frames_own_to_the_mean_direction():
    labels = labels_for()
    made = gradients(labels, 1.0)
    scales = np.random.default_rng(3).uniform(1e-6, 1e3, size=(40, 1, 1, 1))
    scaled, plain = class_directions(made * scales, labels), class_directions(made, labels)
    np.testing.assert_allclose(scaled[0], plain[0], atol=1e-5)
    np.testing.assert_allclose(class_directions(1e-3 * made, labels)[1], plain[1], atol=1e-5)


def test_gradients_of_the_task_give_no_alarm():
    guard = GradientGuard()
    feed(guard, 30, turns_at=30)
    assert guard.batches == 30
    assert guard.separation > 0.95


def test_gradients_blind_to_the_labels_give_the_alarm_with_the_eighth_batch():
    guard = GradientGuard()
    with pytest.raises(HijackError, match=r"batch 8: .* do not serve the task"):
        feed(guard, 30, turns_at=0)
    assert guard.batches == guard.settings.first


def test_a_server_that_turns_later_is_caught_too():
    guard = GradientGuard()
    with pytest.raises(HijackError):
        feed(guard, 40, turns_at=20)
    assert 20 < guard.batches <= 20 + guard.settings.window


def test_no_alarm_where_each_frame_goes_its_own_way_and_each_class_one_way_in_the_mean():
    """As where a task is learned: within a batch, frames of one class are hardly more alike than others."""
    guard, within = GradientGuard(), []
    for seed in range(40):
        labels = labels_for(64, classes=2, seed=seed)
        made = gradients(labels, 1.0, 9, noise=4.0, draw=seed)
        rows = made.reshape(64, -1) / np.linalg.norm(made.reshape(64, -1), axis=1, keepdims=True)
        pairs = np.triu_indices(64, 1)
        alike, same = (rows @ rows.T)[pairs], (labels[:, None] == labels)[pairs]
        within.append(np.mean(alike[same][:, None] > alike[~same]))
        guard.observe(made, labels)
    assert np.mean(within) < 0.75
    assert guard.separation > 0.98


def test_no_alarm_where_what_serves_the_task_turns_in_time():
    """Half a turn in twenty batches: at its end each class is pulled where the other was."""
    guard = GradientGuard()
    for seed in range(40):
        labels = labels_for(classes=2, seed=seed)
        angle = np.pi * seed / 20 + np.pi * labels
        plane = np.stack([np.cos(angle), np.sin(angle)], 1) @ np.random.default_rng(9).normal(size=(2, 48))
        guard.observe(plane + np.random.default_rng(seed).normal(size=plane.shape), labels)
    assert guard.separation > 0.98


def test_a_server_that_pulls_each_class_another_way_in_each_batch_is_caught():
    """As a critic that is told the labels: within any batch the classes stand well apart."""
    guard = GradientGuard()

    def hijack() -> None:
        for seed in range(30):
            labels = labels_for(seed=seed)
            guard.observe(gradients(labels, 3.0, seed, ways=100 + seed), labels)

    with pytest.raises(HijackError, match="batch 8"):
        hijack()


@pytest.mark.parametrize("frames", [1, 2])
def test_a_server_that_hijacks_by_a_few_frames_of_every_class_is_caught(frames):
    """The others are pulled one way of their class, far less: in number they outweigh the few, which move the half."""
    guard, by_number = GradientGuard(), []

    def hijack() -> None:
        for seed in range(30):
            labels = np.arange(60) % 10
            made = 1e-3 * gradients(labels, 10.0, 0, noise=0.1)
            made[: 10 * frames] = gradients(labels[: 10 * frames], 0.0, seed)
            by_number.append((made, labels))
            guard.observe(made, labels)

    with pytest.raises(HijackError, match="batch 8"):
        hijack()
    assert separation_of(by_number) > 0.99


def test_no_alarm_where_a_few_frames_have_long_gradients():
    """As where nearly all is learned: the network has one frame in ten wrong."""
    guard = GradientGuard()
    for seed in range(40):
        labels = labels_for(64, classes=2, seed=seed)
        wrong = np.random.default_rng(seed).random(64) < 0.1
        made = gradients(labels, 2.0, 0, noise=2.0, draw=seed)
        guard.observe(made * np.where(wrong, 1.0, 1e-3)[:, None, None, None], labels)
    assert guard.separation > 0.98


def test_a_server_that_pulls_one_class_alone_gives_the_alarm():
    """Nothing can be compared then; nor by batches that move nothing in between."""
    guard, pulled = GradientGuard(), 0

    def hijack() -> None:
        nonlocal pulled
        for seed in range(60):
            labels = labels_for(seed=seed)
            made = gradients(labels, 0.0, seed)
            made[(labels != 3) | (seed % 2 == 1)] = 0
            pulled += bool(made.any())
            guard.observe(made, labels)

    with pytest.raises(HijackError, match="one class alone"):
        hijack()
    assert pulled == guard.settings.window


def test_no_alarm_where_one_class_has_learned_all_now_and_then():
    guard = GradientGuard()
    for seed in range(60):
        labels = labels_for(classes=2, seed=seed)
        made = gradients(labels, 2.0, seed)
        made[labels == 1] *= seed % 8 == 0
        guard.observe(made, labels)
    assert guard.separation > 0.95


def test_the_last_batches_alone_count():
    guard = GradientGuard(GuardSettings(window=2))
    feed(guard, 3, turns_at=3)
    state = guard.state()
    last = [np.unique(labels_for(seed=seed)) for seed in (1, 2)]
    assert state["classes"].tolist() == np.concatenate(last).tolist()
    assert state["batch"].tolist() == [2] * len(last[0]) + [3] * len(last[1])
    assert guard.separation == min(
        class_separation(state[name], state["classes"], state["batch"], 3) for name in ("means", "pulls")
    )


def test_a_guard_goes_on_where_another_was():
    first, second = GradientGuard(), GradientGuard()
    feed(first, 12, turns_at=8, own=0.5)
    second.resume(first.state())
    labels = labels_for(seed=40)
    for guard in (first, second):
        guard.observe(gradients(labels, 1.0, 40), labels)
    assert first.batches == second.batches == 13
    assert first.separation == second.separation


def test_a_guard_goes_on_from_the_state_of_one_that_knew_no_pulls():
    first, second = GradientGuard(), GradientGuard()
    feed(first, 12, turns_at=12)
    state = first.state()
    del state["pulls"]
    second.resume(state)
    feed(second, 12, turns_at=12)
    assert second.separation > 0.95


def test_the_guard_loads_without_torch():
    code = "import sys, splitward.training.guard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
