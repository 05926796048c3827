"""What the released tensor tells without an image: the label, and attributes beyond the label.

The label is what the device is there to tell, so its inference is no breach; it says how much of a reconstruction is
the label's doing. An attribute is a breach as far as it is inferred better than from the label alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.audit.attack import ThreatModel
from splitward.training.loop import reproducible

LABEL_CARD = ThreatModel(
    name="label-inference",
    title="label inference",
    phase="inference",
    knows=("released tensor", "client runs as a black box", "auxiliary images", "auxiliary labels"),
    method="Releases auxiliary images and learns their labels from the released tensors, by a small dense network.",
    source="Shokri et al., IEEE S&P 2017 (shadow models); the network is ours",
)
ATTRIBUTE_CARD = ThreatModel(
    name="attribute-inference",
    title="attribute inference, given the label",
    phase="inference",
    knows=(*LABEL_CARD.knows, "label of the target"),
    method="Releases auxiliary images and learns an attribute that the task does not ask for from the releases "
    "and the label, by a small dense network.",
    source="Song and Shmatikov, ICLR 2020 (overlearning reveals sensitive attributes); the network is ours",
)

_STEPS, _BATCH, _WIDTH, _WEIGHT_DECAY = 600, 128, 64, 1e-2
_SIDE = 8
"""Larger releases are averaged to this side."""


@dataclass(frozen=True)
class Inference:
    """How often the targets' values were inferred: balanced accuracies, the mean over the values of the share found.

    Plain accuracy would depend on how frequent each value is among the targets: on MNIST the last test digits are
    thinner than the others, and a constant guess is right for three in four of them.

    Attributes
    ----------
    accuracy : float
        From the released tensor, and the label where it is given.
    majority : float
        By always naming one value.
    from_label : float or None
        By naming the most frequent value of the target's class; None where no label is given.
    targets : int
    """

    accuracy: float
    majority: float
    from_label: float | None
    targets: int


def infer(
    released: Tensor,
    values: Tensor,
    target_released: Tensor,
    target_values: Tensor,
    given: tuple[Tensor, Tensor] | None = None,
    *,
    seed: int = 0,
) -> Inference:
    """Learn `values` from the attacker's own releases and infer those of the targets.

    Parameters
    ----------
    released, values : Tensor, [N, *shape], int64 [N]
        The attacker's releases, and the labels or attributes 0, 1, ... of their frames.
    target_released, target_values : Tensor, [M, *shape], int64 [M]
    given : (Tensor, Tensor), optional
        Labels of both, int64 [N] and [M], for an attacker who knows them.
    """
    count = int(torch.cat((values, target_values)).max()) + 1
    rows, target_rows = _rows(released), _rows(target_released)
    mean, spread = rows.mean(0), rows.std(0).clamp_min(1e-6)
    rows, target_rows = (rows - mean) / spread, (target_rows - mean) / spread
    from_label = None
    if given is not None:
        labels, target_labels = given
        classes = int(torch.cat(given).max()) + 1
        tally = torch.zeros(classes, count).index_put_((labels, values), torch.ones(()), accumulate=True)
        from_label = _balanced(tally.argmax(1)[target_labels], target_values)
        rows = torch.cat((rows, F.one_hot(labels, classes)), dim=1)
        target_rows = torch.cat((target_rows, F.one_hot(target_labels, classes)), dim=1)
    guesses = _classify(rows, values, target_rows, count, seed)
    majority = 1 / len(target_values.unique())  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return Inference(_balanced(guesses, target_values), majority, from_label, len(target_values))


def bright(frames: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> Tensor:
    """An attribute that any data set has: 1 where a frame is brighter than the median of its class, int64 [B].

    On digits it is the amount of ink. The medians are those of `reference`, so that attacker and targets mean the same;
    the label alone tells nothing of it.
    """
    brightness, at = reference.flatten(1).mean(1), frames.flatten(1).mean(1)
    medians = torch.full((int(torch.cat((labels, reference_labels)).max()) + 1,), float(brightness.median()))
    for label in reference_labels.unique():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        medians[label] = brightness[reference_labels == label].median()
    return (at > medians[labels]).long()


def _rows(released: Tensor) -> Tensor:
    if released.dim() == 4 and released.shape[2] > _SIDE:
        released = F.adaptive_avg_pool2d(released, _SIDE)
    return released.flatten(1)


def _classify(rows: Tensor, values: Tensor, target_rows: Tensor, count: int, seed: int) -> Tensor:
    with reproducible(seed):
        classifier = nn.Sequential(
            nn.Linear(rows.shape[1], _WIDTH), nn.LeakyReLU(0.1), nn.Dropout(0.2), nn.Linear(_WIDTH, count)
        )
        optimiser = torch.optim.AdamW(classifier.parameters(), 3e-3, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
        for _ in range(_STEPS):
            chosen = torch.randint(len(rows), (_BATCH,))
            loss = F.cross_entropy(classifier(rows[chosen]), values[chosen])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            return classifier.eval()(target_rows).argmax(1)


def _balanced(guesses: Tensor, wanted: Tensor) -> float:
    shares = [(guesses[wanted == value] == value).double().mean() for value in wanted.unique()]  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return float(torch.stack(shares).mean())
