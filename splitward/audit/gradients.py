"""Deep leakage from gradients, on what a split-learning server holds (Zhu, Liu and Han, NeurIPS 2019).

For one frame, so a batch of 1, whose released tensor is z, with label y and loss L:

- *Gradient at the cut*, `g = dL/dz`. The server computes it itself, from z and y, and sends it back. It is a function
  of z and y alone, so beyond z it tells the label and nothing else of the frame. DLG's joint match of z and g over
  frames and labels therefore falls apart: g gives the label, exactly, and z the frame (`CutGradient`).
- *Gradients of the client half*, `J(x)^T g` with J the derivative of the activation by the half's weights. No server
  of plain split learning sees them; one that also averages the client halves of several clients does (SplitFed, Thapa
  et al. 2022). They are the setting of the original attacks, and no noise on z hides the frame in them
  (`ClientGradient`).

The step is simulated from `Case.frames`, with the statistics of batch normalisation as they are after training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from splitward.audit.attack import Case, Knowledge, ThreatModel
from splitward.audit.descent import descend, release_gap, total_variation
from splitward.audit.floors import class_mean_image
from splitward.audit.optimise import weights_of
from splitward.method.split import SplitNetwork
from splitward.training.loop import reproducible

Method = Literal["dlg", "idlg", "inverting"]

_CUT: tuple[Knowledge, ...] = ("gradient at the cut",)
_TITLES = {"dlg": "DLG", "idlg": "iDLG", "inverting": "inverting gradients"}
_SOURCES = {
    "dlg": "Zhu, Liu and Han, NeurIPS 2019",
    "idlg": "Zhao, Mopuri and Bilen 2020 (arXiv:2001.02610)",
    "inverting": "Geiping et al., NeurIPS 2020",
}
_METHODS = {
    "dlg": "descends on frame and soft label together until the squared distance of the gradients is least.",
    "idlg": "takes the label from the gradient at the cut first, then descends on the frame until the squared distance "
    "of the gradients is least.",
    "inverting": "takes the label from the gradient at the cut first, then descends along the signs of the cosine "
    "distance of the gradients plus total variation.",
}


def cut_gradients(network: SplitNetwork, released: Tensor) -> Tensor:
    """What each label would send back: [classes, B, *shape].

    `dL/dz = (dlogits/dz)^T (softmax(logits) - onehot(y))`: linear in the label, so a soft label's gradient is the
    mixture of these.
    """
    classes = network.settings.network.classes
    released = released.detach().requires_grad_()
    logits = network.server(released).fused
    slopes = []
    for label in range(classes):
        wanted = torch.full((len(released),), label)
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        slopes.append(torch.autograd.grad(loss, released, retain_graph=True)[0])
    return torch.stack(slopes)


def infer_labels(candidates: Tensor, observed: Tensor) -> Tensor:
    """Labels [B] whose gradients at the cut are nearest to the observed ones [B, *shape]; exact for a batch of 1.

    iDLG reads the label from the one negative entry of `dL/dlogits`. Of that only its image at the cut is seen here,
    so it is compared with what every label would have sent back.
    """
    return (candidates - observed).square().flatten(2).sum(2).argmin(0)


def weight_gradients(network: SplitNetwork, attacked: Tensor, slopes: Tensor) -> Tensor:
    """Gradients of the client half's weights of each frame alone, `J(x)^T g`: [B, weights].

    Parameters
    ----------
    attacked : Tensor
        What enters the client half.
    slopes : Tensor, [B, *shape]
        Gradients at the cut; they pass straight through the seal.
    """
    weights = {name: weight.detach() for name, weight in network.client.named_parameters()}

    def pulled(weights: dict[str, Tensor], one: Tensor, slope: Tensor) -> Tensor:
        return (functional_call(network.client, weights, (one.unsqueeze(0),)) * slope).sum()

    gradients = vmap(grad(pulled), in_dims=(None, 0, 0))(weights, attacked, slopes)
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


@dataclass(frozen=True)
class CutGradient:
    """DLG at the cut: the label from the gradient, then the frame from the released tensor, from its class's mean.

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

    targets: int = 64
    effort: float = 1.0
    steps: int = 300
    rate: float = 0.05
    weight: float = 0.003

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return ThreatModel(
            name="dlg-cut",
            title="DLG and iDLG on the gradient at the cut",
            phase="training",
            knows=(
                "released tensor",
                "release law",
                "gradient at the cut",
                "server weights",
                "client weights",
                "auxiliary images",
                "auxiliary labels",
            ),
            method="Takes the label from the gradient at the cut, then descends on the frame, from the mean of that "
            "class, until its release is nearest to the target's. The gradient adds the label and nothing else.",
            source=f"{_SOURCES['dlg']}; {_SOURCES['idlg']}",
        )

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[m, C, H, W] for the first m = `targets`; `ValueError` when the case has no weights."""
        network, case = weights_of(case, self.card), case.first(self.targets)
        with reproducible(seed):
            candidates = cut_gradients(network, case.released)
            labels = infer_labels(candidates, candidates[case.labels, torch.arange(len(case.labels))])
            objective = release_gap(network, case.released, self.weight)
            start = class_mean_image(case.auxiliary, case.auxiliary_labels, labels)
            return descend(objective, start, steps=round(self.steps * self.effort), rate=self.rate)[0]


@dataclass(frozen=True)
class ClientGradient:
    """The classical attacks, on the gradients of the client half's weights.

    The attacker holds the server half and z, and so computes g for any label; it need not simulate the noise. It
    starts from the auxiliary mean image, our choice: with ReLU the distance has many local minima, and from noise it
    ends in worse ones. DLG's soft label rarely gets near enough to the true one to help on a network that is sure.

    Attributes
    ----------
    method : "dlg", "idlg" or "inverting"
    targets : int
        It works on the first so many targets.
    effort : float
        Multiplies `steps`.
    steps, rate : int, float
        Of the descent.
    weight : float
        Of the total variation ("inverting" only).
    """

    method: Method = "inverting"
    targets: int = 16
    effort: float = 1.0
    steps: int = 300
    rate: float = 0.05
    weight: float = 0.01

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return ThreatModel(
            name=f"{self.method}-client",
            title=f"{_TITLES[self.method]} on the gradients of the client half",
            phase="training",
            knows=(
                "released tensor",
                "server weights",
                "client weights",
                "gradients of the client half",
                "auxiliary images",
                *(() if self.method == "dlg" else _CUT),
            ),
            method=f"A server that also averages client halves {_METHODS[self.method]}",
            source=_SOURCES[self.method],
        )

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[m, C, H, W] for the first m = `targets`; `ValueError` when the case has no weights or no frames."""
        network, case = weights_of(case, self.card), case.first(self.targets)
        if case.frames is None:
            raise ValueError(
                f"{self.card.name}: needs the case's frames, from which it computes the gradients."
            )
        with reproducible(seed):
            candidates = cut_gradients(network, case.released)
            sent = candidates[case.labels, torch.arange(len(case.labels))]
            observed = weight_gradients(network, network.attack(case.frames), sent)
            known = candidates[infer_labels(candidates, sent), torch.arange(len(sent))]
            size = observed.square().sum(1).clamp_min(1e-30)

            def distance(frames: Tensor, slopes: Tensor) -> Tensor:
                through = frames if network.saliency is None else network.saliency(frames)
                made = weight_gradients(network, through, slopes)
                if self.method == "inverting":
                    return (
                        1
                        - F.cosine_similarity(made, observed, eps=1e-30)
                        + self.weight * total_variation(frames)
                    )
                return (made - observed).square().sum(1) / size

            def with_soft_label(frames: Tensor, labels: Tensor) -> Tensor:
                # cut_gradients is linear in the label
                return distance(frames, torch.einsum("bc,cb...->b...", labels.softmax(1), candidates))

            starts = [case.auxiliary.mean(0).expand(len(sent), -1, -1, -1)]
            if self.method == "dlg":
                starts.append(torch.zeros(len(sent), len(candidates)))
            return descend(
                with_soft_label if self.method == "dlg" else lambda frames: distance(frames, known),
                *starts,
                steps=round(self.steps * self.effort),
                rate=self.rate,
                signed=self.method == "inverting",
            )[0]
