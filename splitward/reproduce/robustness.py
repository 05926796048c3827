"""Accuracy on clean, reconstructed and adversarially attacked images, plain split learning beside PSGL.

Each set of images is made from one network and classified by both, so that an attack on the other's weights
(transfer) is not taken for robustness.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from splitward.audit.attack import Attack
from splitward.audit.case import make_case
from splitward.audit.decoder import MEDIUM
from splitward.audit.descent import activation_of
from splitward.audit.gradients import ClientGradient, CutGradient
from splitward.audit.target import open_target
from splitward.data import Dataset
from splitward.method.split import SplitNetwork
from splitward.training.loop import frames_of, to_unit
from splitward.training.run import Run

EPS = (0.1, 0.3)
"""L-infinity budgets of the adversarial attacks; 0.1 is also the map's."""
_CHUNK, _PGD_STEPS = 250, 20
_AUXILIARY, _TARGETS = 5000, 300
Images = dict[str, tuple[Tensor, Tensor]]
"""Frames [N, C, H, W] and labels [N] by the name of their set."""


def measure_robustness(
    dataset: Dataset, runs: dict[str, Run], *, effort: float, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each set of images: its name, its size, and each network's accuracy on it.

    Parameters
    ----------
    runs : dict of str to Run
        Finished trainings, among them "psgl", by the name of their profile.
    effort : float
        Multiplies the steps and the images of the attacks.
    """
    networks = {profile: run.load_network() for profile, run in runs.items()}
    count = max(20, round(1000 * effort))
    frames = to_unit(frames_of(dataset.test))
    labels = torch.from_numpy(dataset.test.labels)
    sets: Images = {"clean": (frames, labels)}
    for profile, run in runs.items():
        for name, images in _reconstructions(dataset, run, effort, seed).items():
            sets[f"{name}, from {profile}"] = images
    first, known = frames[:count], labels[:count]
    for eps in EPS:
        sets[f"reversed JSMA map {eps}"] = (_mapped(networks["psgl"], first, eps), known)
        for profile, network in networks.items():
            sets[f"FGSM {eps}, on {profile}"] = (perturb(network, first, known, eps, 1), known)
            sets[f"PGD {eps}, on {profile}"] = (perturb(network, first, known, eps, _PGD_STEPS), known)
    return [
        {
            "images": name,
            "count": len(known),
            **{profile: accuracy(network, images, known) for profile, network in networks.items()},
        }
        for name, (images, known) in sets.items()
    ]


@torch.no_grad()
def accuracy(network: SplitNetwork, frames: Tensor, labels: Tensor) -> float:
    """Share of the frames on which the network's decision is right."""
    chunks = torch.split(frames, _CHUNK)
    decided = torch.cat([network(chunk).outputs.decision.argmax(1) for chunk in chunks])
    return float((decided == labels).double().mean())


def perturb(network: SplitNetwork, frames: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    """FGSM (Goodfellow et al. 2015) with one step, PGD (Madry et al. 2018) with more.

    Both climb the cross entropy of the fused stream: the other two pass no gradient to the cut. The map is
    gone through, not taken for a constant.
    """
    rate = eps if steps == 1 else 2.5 * eps / steps
    made = []
    for clean, known in zip(torch.split(frames, _CHUNK), torch.split(labels, _CHUNK), strict=True):
        moved = clean.clone()
        for _ in range(steps):
            moved.requires_grad_()
            logits = network.server(network.release(activation_of(network, moved))).fused
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, known), moved)
            moved = moved.detach() + rate * slope.sign()
            moved = torch.minimum(torch.maximum(moved, clean - eps), clean + eps).clamp(0, 1)
        made.append(moved)
    return torch.cat(made)


@torch.no_grad()
def _mapped(network: SplitNetwork, frames: Tensor, eps: float) -> Tensor:
    """Frames under the intentional attack of PSGL (Eq. 1), with another budget."""
    entered = network.attack(frames)
    channels = frames.shape[1]
    return (frames + eps * entered[:, channels:]).clamp(0, 1)


def _reconstructions(dataset: Dataset, run: Run, effort: float, seed: int) -> Images:
    """What a decoder and two gradient attacks make of a network's training traffic and released tensors."""
    case, originals = make_case(
        open_target(run.folder),
        dataset,
        auxiliary=max(100, round(_AUXILIARY * min(1.0, effort))),
        targets=max(20, round(_TARGETS * min(1.0, effort))),
        captures=1,
        seed=seed,
    )
    attacks: dict[str, Attack] = {
        "decoder": replace(MEDIUM, effort=effort),
        "DLG at the cut": CutGradient(effort=effort),
        "inverting gradients": ClientGradient(effort=effort),
    }
    case = replace(case, frames=originals)  # the gradient attacks simulate the client's step on them
    made = {name: attack.reconstruct(case, seed) for name, attack in attacks.items()}
    return {name: (images, case.labels[: len(images)]) for name, images in made.items()}
