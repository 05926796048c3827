"""What a dense layer's gradient gives away exactly (Phong et al. 2018, IEEE TIFS 13(5), section III).

For `v = W h + b` and a batch of 1, `dL/dW = (dL/db) h^T`: any row divided by its entry of `dL/db` is the layer's input,
without a search and without the noise that is put on v. A bottleneck is such a layer, so whoever sees the gradients of
the client half has the undefended activation.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.descent import descend, total_variation
from splitward.audit.gradients import cut_gradients, weight_gradients
from splitward.audit.optimise import weights_of
from splitward.method.sealing import Bottleneck
from splitward.method.split import SplitNetwork
from splitward.training.loop import reproducible


@dataclass(frozen=True)
class DenseGradient:
    """The bottleneck's input from its gradient, then the frame from that input by descent.

    Where no dense layer is trained in the client half, it is the descent on the released tensor.

    Attributes
    ----------
    targets : int
        It works on the first so many targets.
    effort : float
        Multiplies `steps`.
    steps, rate : int, float
        Of the descent.
    weight : float
        Of the total variation.
    """

    targets: int = 16
    effort: float = 1.0
    steps: int = 300
    rate: float = 0.05
    weight: float = 0.003

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return ThreatModel(
            name="dense-client",
            title="dense layer's leak from the gradients of the client half",
            phase="training",
            knows=("released tensor", "client weights", "gradients of the client half", "auxiliary images"),
            method="A server that also averages client halves divides the gradient of the bottleneck's weights by that "
            "of its bias, which is its input exactly, and descends on the frame until it makes that input.",
            source="Phong et al., IEEE TIFS 2018",
        )

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[m, C, H, W] for the first m = `targets`; `ValueError` when the case has no weights or no frames."""
        network, case = weights_of(case, self.card), case.first(self.targets)
        if case.frames is None:
            raise ValueError(
                f"{self.card.name}: needs the case's frames, from which it computes the gradients."
            )
        with reproducible(seed):
            bottleneck = network.client.bottleneck
            if isinstance(bottleneck, Bottleneck) and bottleneck.dense.weight.requires_grad:
                # The client half up to its bottleneck.
                half, pool = copy.deepcopy(network.client), bottleneck.pool
                half.bottleneck = None
                wanted = _dense_input(network, case.frames, case.released, case.labels)
            else:
                half, pool, wanted = network.client, 1, case.released.flatten(1)
            scale = wanted.square().mean(1).clamp_min(1e-12)

            def objective(frames: Tensor) -> Tensor:
                made = half(frames if network.saliency is None else network.saliency(frames))
                made = F.avg_pool2d(made, pool) if pool > 1 else made
                return (made.flatten(1) - wanted).square().mean(1) / scale + self.weight * total_variation(
                    frames
                )

            start = case.auxiliary.mean(0).expand(len(wanted), -1, -1, -1)
            return descend(objective, start, steps=round(self.steps * self.effort), rate=self.rate)[0]


def _dense_input(network: SplitNetwork, frames: Tensor, released: Tensor, labels: Tensor) -> Tensor:
    """Input of the bottleneck's dense layer, [B, inputs], from the simulated gradients of its weights and bias."""
    rows = torch.arange(len(frames))
    sent = cut_gradients(network, released)[labels, rows]
    # Only the ratio counts: a network that is sure sends gradients near the smallest floats.
    sent = sent / sent.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-30)
    sizes = {name: weight.numel() for name, weight in network.client.named_parameters()}
    gradients = weight_gradients(network, network.attack(frames), sent)
    parts = torch.split(gradients, list(sizes.values()), dim=1)
    by_name = dict(zip(sizes, parts, strict=True))
    bias = by_name["bottleneck.dense.bias"]
    weight = by_name["bottleneck.dense.weight"].view(*bias.shape, -1)
    value = bias.abs().argmax(1)
    return weight[rows, value] / bias[rows, value].unsqueeze(1)
