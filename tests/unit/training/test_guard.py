"""The client's guard on gradients whose dependence on the labels is known."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from splitward.errors import HijackError
from splitward.training.guard import GradientGuard, GuardSettings, class_separation


def gradients(labels: np.ndarray, own: float, seed: int = 0, ways: int = 9) -> np.ndarray:
    """One common direction, `own` of a direction for each class, which `ways` draws, and noise: [B, 3, 4, 4]."""
    generator = np.random.default_rng(seed)
    common, classes = generator.normal(size=(1, 48)), np.random.default_rng(ways).normal(size=(10, 48))
    made = common + own * classes[labels] + 0.5 * generator.normal(size=(len(labels), 48))
    return made.reshape(-1, 3, 4, 4).astype(np.float32)


def labels_for(count: int = 40, classes: int = 10, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(classes, size=count)


def feed(guard: GradientGuard, batches: int, turns_at: int, own: float = 0.0) -> None:
    """So many batches of a server that serves the task until one of them, and from there on by `own` only."""
    for seed in range(batches):
        labels = labels_for(seed=seed)
        guard.observe(gradients(labels, 2.0 if seed < turns_at else own, seed), labels)


def test_separation_by_hand():
    """Cosines 1 (same label), 0 and 0 (different): every same pair is above every other; and the reverse."""
    rows = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert class_separation(rows, np.array([0, 0, 1])) == 1.0
    # Same pairs: (0, 2) with cosine 0; others: cosines 1 and 0, so one loss and one tie.
    assert class_separation(rows, np.array([0, 1, 0])) == 0.25


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [4]])
def test_a_batch_without_both_kinds_of_pairs_tells_nothing(labels):
    assert class_separation(np.ones((len(labels), 2)), np.array(labels)) is None
    guard = GradientGuard(GuardSettings(window=1))
    guard.observe(np.ones((len(labels), 2)), np.array(labels))
    assert guard.separation == 1.0


def test_equal_or_vanished_gradients_separate_nothing():
    labels = labels_for()
    assert class_separation(np.ones((40, 6)), labels) == 0.5
    assert class_separation(np.zeros((40, 6)), labels) == 0.5


def test_scale_does_not_matter():
    labels = labels_for()
    made = gradients(labels, 1.0)
    scales = np.random.default_rng(3).uniform(1e-6, 1e3, size=(40, 1, 1, 1))
    assert class_separation(made * scales, labels) == pytest.approx(class_separation(made, labels), abs=1e-6)


def test_gradients_of_the_task_give_no_alarm():
    guard = GradientGuard()
    feed(guard, 30, turns_at=30)
    assert guard.batches == 30
    assert guard.separation > 0.95


def test_gradients_blind_to_the_labels_give_the_alarm_when_the_window_is_full():
    guard = GradientGuard()
    with pytest.raises(HijackError, match=r"batch 8: .* do not serve the task"):
        feed(guard, 30, turns_at=0)
    assert guard.batches == guard.settings.window


def test_a_server_that_turns_later_is_caught_too():
    guard = GradientGuard()
    with pytest.raises(HijackError):
        feed(guard, 40, turns_at=20)
    assert 20 < guard.batches <= 20 + guard.settings.window


def test_a_dip_within_batches_gives_no_alarm_where_each_class_goes_on_one_way():
    """As where the task is learned, or sites hold different classes: what is left of a class's direction is weak."""
    guard = GradientGuard()
    feed(guard, 60, turns_at=16, own=0.4)
    assert guard.settings.threshold < guard.separation < 0.85


def test_a_server_that_pulls_each_class_another_way_in_each_batch_is_caught():
    """As a critic that is told the labels: within any batch the classes stand well apart."""
    guard, within = GradientGuard(), []

    def hijack() -> None:
        for seed in range(guard.settings.window):
            labels = labels_for(seed=seed)
            made = gradients(labels, 1.0, seed, ways=100 + seed)
            within.append(class_separation(made, labels) or 0.0)
            guard.observe(made, labels)

    with pytest.raises(HijackError, match="batch 8"):
        hijack()
    assert min(within) > 0.85


def test_the_last_batches_alone_count_and_the_first_frames_of_each():
    guard = GradientGuard(GuardSettings(window=2, frames=5))
    feed(guard, 3, turns_at=3)
    state = guard.state()
    assert state["rows"].shape == (10, 48)
    assert state["batch"].tolist() == [2] * 5 + [3] * 5
    assert state["labels"].tolist() == [*labels_for(seed=1)[:5], *labels_for(seed=2)[:5]]
    assert guard.separation == class_separation(state["rows"], state["labels"])


def test_a_guard_goes_on_where_another_was():
    first, second = GradientGuard(), GradientGuard()
    feed(first, 12, turns_at=8, own=0.5)
    second.resume(first.state())
    labels = labels_for(seed=40)
    for guard in (first, second):
        guard.observe(gradients(labels, 1.0, 40), labels)
    assert first.batches == second.batches == 13
    assert first.separation == second.separation


def test_the_guard_loads_without_torch():
    code = "import sys, splitward.training.guard; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
