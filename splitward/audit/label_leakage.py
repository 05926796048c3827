"""What the gradient of a U-shaped training tells the cloud of the labels that it was not to get.

Where labels stay at the client, the cloud sends features and gets their gradient back (`Phase.BACK`). For a cross
entropy over one linear layer that gradient is `W^T (p - y)`: its direction is the label's, its length how wrong the
network is about the frame. The norm and the cosine attack are those of Li et al., ICLR 2022 ("Label Leakage and
Protection in Two-party Split Learning"); clusters and few-shot are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from splitward.audit.metrics import roc_auc

SHOTS = 5
ROUNDS = 20


@dataclass(frozen=True)
class LabelLeakage:
    """How well labels were inferred from gradients.

    Attributes
    ----------
    norm_auc, cosine_auc : float or None
        Area under the receiver operating characteristic of the gradient's length, and of its cosine to one known
        frame's, for two classes; 0.5 is chance. None for more classes.
    clustered : float
        Share of frames whose cluster of directions is their class's, the two paired greedily; nothing is known.
    few_shot : float
        Share of the other frames that have the class of the nearest mean direction of `SHOTS` known ones.
    majority : float
        Share of the most frequent class: what a constant guess has.
    frames : int
    """

    norm_auc: float | None
    cosine_auc: float | None
    clustered: float
    few_shot: float
    majority: float
    frames: int


def infer_labels(gradients: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> LabelLeakage:
    """Attack the gradients of some frames.

    Parameters
    ----------
    gradients : Tensor, [N, ...]
        One for each frame.
    labels : Tensor, int64 [N]
        Which the attacker is to find; at least `SHOTS + 1` frames of each class.

    Raises
    ------
    ValueError
        A class has fewer frames.
    """
    counts = torch.bincount(labels, minlength=classes)
    if int(counts.min()) <= SHOTS:
        raise ValueError(f"frames of each class: {counts.tolist()}; label leakage needs over {SHOTS} of each.")
    flat = gradients.flatten(1).double()
    directions = F.normalize(flat, dim=1)
    draw = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=draw)
    known = torch.cat([shuffled[labels[shuffled] == label][:SHOTS] for label in range(classes)])
    unknown = torch.ones(len(labels), dtype=torch.bool)
    unknown[known] = False
    means = torch.stack([directions[known[labels[known] == label]].mean(0) for label in range(classes)])
    nearest = (directions @ F.normalize(means, dim=1).T).argmax(1)
    norm_auc = cosine_auc = None
    if classes == 2:
        norm_auc = _auc(flat.norm(dim=1), labels)
        cosine_auc = _auc(directions @ directions[known[labels[known] == 1][0]], labels)
    return LabelLeakage(
        norm_auc,
        cosine_auc,
        _clustered(directions, labels, classes, draw),
        float((nearest == labels)[unknown].double().mean()),
        float(counts.max() / len(labels)),
        len(labels),
    )


def _auc(scores: Tensor, labels: Tensor) -> float:
    """Of the better of the two orders: the attacker need not know which class is which."""
    auc = roc_auc(torch.stack([-scores, scores], dim=1), labels)
    return max(auc, 1 - auc)


def _clustered(directions: Tensor, labels: Tensor, classes: int, draw: torch.Generator) -> float:
    """Spherical k-means from far apart beginnings, each cluster paired with the class that fills it most."""
    centres = directions[torch.randint(len(directions), (1,), generator=draw)]
    for _ in range(classes - 1):
        far = (directions @ centres.T).amax(1).argmin()
        centres = torch.cat([centres, directions[far][None]])
    for _ in range(ROUNDS):
        member = (directions @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, member, directions)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    member = (directions @ centres.T).argmax(1)
    table = torch.bincount(member * classes + labels, minlength=classes * classes).view(classes, classes)
    right = 0
    for _ in range(classes):  # the fullest pair of a cluster and a class first
        fullest = int(table.argmax())
        right += int(table.flatten()[fullest])
        table[fullest // classes] = table[:, fullest % classes] = -1
    return right / len(labels)
