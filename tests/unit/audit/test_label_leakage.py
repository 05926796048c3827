"""Labels from gradients: near perfect where the gradient is the label's, chance where it is noise."""

from __future__ import annotations

import pytest
import torch

from splitward.audit.label_leakage import SHOTS, infer_labels


def gradients_of(labels: torch.Tensor, classes: int, sure: float) -> torch.Tensor:
    """Of a cross entropy over one linear layer: `W^T (p - y)`, with `sure` the share of the true class."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(classes, 32, generator=draw)
    shares = torch.full((len(labels), classes), (1 - sure) / (classes - 1))
    shares[torch.arange(len(labels)), labels] = sure
    return (shares - torch.nn.functional.one_hot(labels, classes)) @ weight


@pytest.mark.parametrize("classes", [2, 10])
def test_an_undefended_gradient_tells_the_label(classes):
    labels = torch.arange(400) % classes
    found = infer_labels(gradients_of(labels, classes, 0.6), labels, classes)
    assert found.few_shot == 1.0
    assert found.clustered == 1.0
    assert found.majority == pytest.approx(1 / classes)
    assert (found.cosine_auc == 1.0) if classes == 2 else (found.cosine_auc is None)


def test_the_length_tells_the_rarer_class_of_which_the_network_is_less_sure():
    labels = (torch.arange(400) % 4 == 0).long()
    gradients = gradients_of(labels, 2, 0.6)
    gradients[labels == 1] *= 1.5
    found = infer_labels(gradients, labels, 2)
    assert found.norm_auc == 1.0


def test_noise_tells_nothing():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (2000,), generator=draw)
    found = infer_labels(torch.randn(2000, 3, 16, generator=draw), labels, 2)
    assert found.norm_auc is not None
    assert found.cosine_auc is not None
    assert max(found.norm_auc, found.cosine_auc) < 0.55
    assert max(found.clustered, found.few_shot) < 0.56


def test_too_few_frames_of_a_class_are_refused():
    labels = torch.tensor([0] * 20 + [1] * SHOTS)
    with pytest.raises(ValueError, match="label leakage needs"):
        infer_labels(torch.zeros(len(labels), 4), labels, 2)
