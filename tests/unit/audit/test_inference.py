"""Label and attribute inference: as good as a classifier where nothing is hidden, chance on noise."""

from __future__ import annotations

import pytest
import torch

from splitward.audit.inference import ATTRIBUTE_CARD, LABEL_CARD, bright, infer


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return torch.randint(4, (900,), generator=torch.Generator().manual_seed(0))


def halves(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows[:600], rows[600:]


def test_a_release_that_shows_the_label(labels):
    released = torch.randn(900, 6, 12, 12, generator=torch.Generator().manual_seed(1))
    released[torch.arange(900), labels] += 1
    (own, target), (known, hidden) = halves(released), halves(labels)
    found = infer(own, known, target, hidden)
    assert found.accuracy > 0.95
    assert (found.majority, found.from_label, found.targets) == (0.25, None, 300)
    assert infer(own, known, target, hidden) == found


def test_noise_tells_nothing(labels):
    released = torch.randn(900, 16, generator=torch.Generator().manual_seed(2))
    (own, target), (known, hidden) = halves(released), halves(labels)
    assert abs(infer(own, known, target, hidden).accuracy - 0.25) < 0.08


def test_an_attribute_that_the_label_tells_is_no_news(labels):
    released = torch.randn(900, 8, generator=torch.Generator().manual_seed(3))
    (own, target), (known, hidden) = halves(released), halves(labels)
    found = infer(own, known % 2, target, hidden % 2, (known, hidden))
    assert found.from_label == 1
    assert found.accuracy > 0.95


def test_brightness_within_a_class_is_beyond_the_label(labels):
    generator = torch.Generator().manual_seed(4)
    frames = 0.2 * labels.view(-1, 1, 1, 1) + 0.2 * torch.rand(900, 1, 1, 1, generator=generator)
    frames = frames + 0.05 * torch.rand(900, 1, 8, 8, generator=generator)
    (own, target), (known, hidden) = halves(frames), halves(labels)
    values, wanted = bright(own, known, own, known), bright(target, hidden, own, known)
    assert values.float().mean().item() == pytest.approx(0.5, abs=0.01)
    found = infer(own, values, target, wanted, (known, hidden))
    assert abs(found.from_label - 0.5) < 0.02
    assert found.accuracy > 0.8


def test_rare_values_do_not_move_the_baseline():
    released, values = torch.zeros(100, 3), (torch.arange(100) < 5).long()
    found = infer(released, values, released, values)
    assert (found.accuracy, found.majority) == (0.5, 0.5)


def test_cards():
    assert LABEL_CARD.name == "label-inference"
    assert ATTRIBUTE_CARD.name == "attribute-inference"
