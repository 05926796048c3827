"""Convolution-sum fusion and the adaptive weighted decision."""

from __future__ import annotations

import pytest
import torch

from splitward.method.fusion import INITIAL_WEIGHTS, ConvolutionSum, decision_fusion, rank_weights
from splitward.method.halves import NetworkSettings, ServerHalf


def test_convolution_sum_is_eq_7_and_8():
    fusion = ConvolutionSum(2)
    with torch.no_grad():
        fusion.convolution.weight.zero_()
        fusion.convolution.bias.copy_(torch.tensor([0.5, 0.0]))
        fusion.convolution.weight[0, 2, 1, 1] = 3  # the recovered activation's first channel
    u, v = torch.randn(4, 2, 5, 5), torch.randn(4, 2, 5, 5)
    fused = fusion(u, v)
    torch.testing.assert_close(fused[:, 0], u[:, 0] + 3 * v[:, 0] + 0.5)
    torch.testing.assert_close(fused[:, 1], u[:, 1])


def test_decision_is_eq_9_to_11():
    """gamma*S_r + rho*S_f + (1 - gamma - rho)*S_a, written out for one frame."""
    recovered, fused, attacked = [0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.25, 0.25, 0.5]
    W_g, W_r, W_b = INITIAL_WEIGHTS
    total = W_g * 0.7 + W_r * 0.6 + W_b * 0.5
    gamma, rho = W_g * 0.7 / total, W_r * 0.6 / total
    expected = [
        gamma * r + rho * f + (1 - gamma - rho) * a for r, f, a in zip(recovered, fused, attacked, strict=True)
    ]
    decision = decision_fusion(torch.tensor([[recovered, fused, attacked]]), torch.tensor(INITIAL_WEIGHTS))
    assert decision[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_shares_follow_weights_and_confidence_frame_by_frame():
    scores = torch.randn(50, 4, 6, dtype=torch.float64).softmax(2)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    decision = decision_fusion(scores, weights)
    for frame in range(len(scores)):
        parts = [weights[k] * scores[frame, k].max() for k in range(4)]
        expected = sum(part / sum(parts) * scores[frame, k] for k, part in enumerate(parts))
        torch.testing.assert_close(decision[frame], expected)
    torch.testing.assert_close(decision.sum(1), torch.ones(50, dtype=torch.float64))
    assert (decision >= 0).all()


def test_agreeing_streams_decide_what_they_say():
    scores = torch.randn(5, 1, 4).softmax(2)
    decision = decision_fusion(scores.expand(-1, 3, -1), torch.tensor(INITIAL_WEIGHTS))
    torch.testing.assert_close(decision, scores[:, 0])


@pytest.mark.parametrize(
    ("accuracies", "weights"),
    [
        ((0.9, 0.8, 0.7), (0.5, 0.3, 0.2)),
        ((0.7, 0.8, 0.9), (0.2, 0.3, 0.5)),
        ((0.8, 0.9, 0.1), (0.3, 0.5, 0.2)),
    ],
)
def test_weights_are_dealt_out_by_rank(accuracies, weights):
    assert rank_weights(accuracies) == weights


def test_equal_accuracies_still_get_each_weight_once():
    assert sorted(rank_weights((0.5, 0.5, 0.5)), reverse=True) == list(INITIAL_WEIGHTS)


def test_an_untrained_server_has_the_papers_order():
    server = ServerHalf(NetworkSettings("small", 1, 8, 2, mapped=False))
    attacked, recovered, fused = server.get_buffer("weights").tolist()
    assert (recovered, fused, attacked) == pytest.approx(INITIAL_WEIGHTS)
