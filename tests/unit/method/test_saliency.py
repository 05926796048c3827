"""The map on the device: Eq. 1, its two shortcuts, its budget, and that nothing in it has ties."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from splitward.method import saliency
from splitward.method.saliency import LocalClassifier, MapSettings, Saliency, saliency_map

SIZES = [(1, 8), (1, 28), (3, 28), (1, 64), (2, 100), (3, 33)]  # 100 has 25 and 13 on its way down


def classifier_for(channels: int, side: int, classes: int = 5) -> LocalClassifier:
    torch.manual_seed(side)
    return LocalClassifier(channels, side, classes).double()


def frames_for(channels: int, side: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, channels, side, side, dtype=torch.float64, generator=generator)


def gradient(classifier: LocalClassifier, frame: torch.Tensor, outputs: str, weights: torch.Tensor):
    """d(weights . f)/dx by torch's own reverse mode; `weights` [B, classes]."""
    frame = frame.clone().requires_grad_()
    logits = classifier(frame)
    f = logits.softmax(1) if outputs == "probabilities" else logits
    return torch.autograd.grad((weights * f).sum(), frame)[0]


@pytest.mark.parametrize(("channels", "side"), SIZES)
@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
@pytest.mark.parametrize("labelled", [False, True])
def test_alpha_and_beta_are_what_autograd_gives(channels, side, outputs, labelled):
    classifier, frame = classifier_for(channels, side), frames_for(channels, side)
    y = torch.tensor([0, 3, 4]) if labelled else classifier(frame).argmax(1)
    own = nn.functional.one_hot(y, 5).double()
    alpha, beta = classifier.products(frame, outputs, y if labelled else None)
    torch.testing.assert_close(alpha, gradient(classifier, frame, outputs, own), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(beta, gradient(classifier, frame, outputs, 1 - own), rtol=1e-9, atol=1e-12)


def test_on_probabilities_the_map_is_alpha_squared_and_far_too_weak():
    classifier, frame = classifier_for(1, 28).float(), frames_for(1, 28).float()
    alpha, beta = classifier.products(frame, "probabilities")
    assert torch.equal(beta, -alpha)
    raw = torch.where(alpha < 0, alpha.square(), 0)
    expected = raw / raw.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(saliency_map(alpha, beta), expected)
    psnr_db = -10 * torch.log10(raw.square().mean((1, 2, 3)))
    assert (psnr_db > 60).all()  # nobody sees a difference of 60 dB


@pytest.mark.parametrize(("outputs", "products"), [("logits", 2), ("probabilities", 1)])
@pytest.mark.parametrize("classes", [2, 50])
def test_products_do_not_grow_with_the_classes(outputs, products, classes, monkeypatch):
    calls = []
    original = LocalClassifier._pull_back

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(LocalClassifier, "_pull_back", counted)
    classifier_for(1, 16, classes).products(frames_for(1, 16), outputs)
    assert len(calls) == products


def test_eq_1_by_hand():
    classifier = LocalClassifier(1, 2, 3)  # frames up to 8 pixels have no convolution: f = W x
    weight = torch.tensor([[-2.0, 1.0, -1.0, -4.0], [3.0, 1.0, -1.0, 1.0], [1.0, 1.0, 0.5, 1.0]])
    with torch.no_grad():
        classifier.dense.weight.copy_(weight)
        classifier.dense.bias.zero_()
    alpha, beta = classifier.products(torch.zeros(1, 1, 2, 2), "logits", torch.tensor([0]))
    assert alpha.flatten().tolist() == [-2, 1, -1, -4]
    assert beta.flatten().tolist() == [4, 2, -0.5, 2]
    # -alpha*beta is 8 and 8 at both ends; alpha > 0 at the second pixel, beta < 0 at the third.
    assert saliency_map(alpha, beta).flatten().tolist() == [1, 0, 0, 1]
    assert saliency_map(alpha, 2 * beta).flatten().tolist() == [1, 0, 0, 1]
    attacked, unit_map = Saliency(classifier, MapSettings(eps=0.25))(
        torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    ).chunk(2, dim=1)
    assert unit_map.flatten().tolist() == [1, 0, 0, 1]
    assert attacked.flatten().tolist() == [0.75, 0.5, 0.5, 0.75]


@pytest.mark.parametrize("eps", [0.0, 0.03, 0.5])
@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_the_budget_is_used_and_never_exceeded(eps, outputs):
    frame = frames_for(3, 28, count=6)
    graph = Saliency(classifier_for(3, 28), MapSettings(outputs, eps=eps))
    attacked, unit_map = graph(frame).chunk(2, dim=1)
    assert (unit_map >= 0).all()
    assert (unit_map.amax((1, 2, 3)) == 1).all()
    largest = (attacked - frame).abs().amax((1, 2, 3))
    torch.testing.assert_close(largest, torch.full_like(largest, eps), rtol=0, atol=1e-12)


def test_a_frame_without_salient_pixels_is_left_as_it_is():
    alpha = torch.ones(2, 1, 4, 4)
    unit_map = saliency_map(alpha, alpha)
    assert torch.equal(unit_map, torch.zeros_like(alpha))


@pytest.mark.parametrize(("gamma", "kept"), [(1.0, 100), (0.25, 25), (0.1, 10), (0.001, 1)])
def test_gamma_keeps_the_largest_fraction(gamma, kept):
    values = torch.arange(1.0, 101).view(1, 1, 10, 10)
    unit_map = saliency_map(-values, torch.ones_like(values), gamma)
    expected = torch.where(values > 100 - kept, values / 100, 0)
    torch.testing.assert_close(unit_map, expected)


@pytest.mark.parametrize("gamma", [0.05, 0.3, 0.9])
def test_gamma_keeps_what_topk_keeps(gamma):
    alpha, beta = classifier_for(3, 28).products(frames_for(3, 28), "logits")
    whole, masked = (saliency_map(alpha, beta, fraction).flatten(1) for fraction in (1.0, gamma))
    kept = round(gamma * whole.shape[1])
    smallest = whole.topk(kept, dim=1).values[:, -1:]
    torch.testing.assert_close(masked, torch.where(whole >= smallest, whole, 0), rtol=0, atol=2e-6)


def test_the_classifier_has_no_pooling():
    kinds = {type(module) for module in LocalClassifier(1, 64, 3).modules()}
    assert kinds <= {LocalClassifier, nn.Sequential, nn.Conv2d, nn.Linear}


def test_rounding_of_the_weights_does_not_move_the_map():
    """A flat background ties every window of a max-pooling; here it must not matter."""
    classifier, frame = classifier_for(1, 28), torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    frame[..., 8:20, 8:20] = 1
    y = torch.tensor([0])
    before = saliency_map(*classifier.products(frame, "logits", y))
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.mul_(1 + 1e-9 * torch.randn_like(parameter))
    after = saliency_map(*classifier.products(frame, "logits", y))
    assert (after - before).abs().max() < 1e-6


def test_the_written_backward_is_that_of_the_convolution():
    gradient_out = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    expected = nn.grad.conv2d_input((2, 3, 10, 14), weight, gradient_out, stride=2, padding=1)
    torch.testing.assert_close(saliency._pull_back_stride_2(gradient_out, weight), expected)
