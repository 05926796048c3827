"""From a target and a data set to one case: who is attacked, and what the attacker has of its own.

The auxiliary images are the validation split and one half of the test split's patients; the targets come from
the other half. No training image is used, and no patient is on both sides. Our choice: the halves are dealt
with the classes in equal shares, because a folder's patients are often numbered class by class.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from splitward.audit.attack import Case
from splitward.audit.target import Target
from splitward.data import Dataset, split_by_patient
from splitward.errors import AuditError
from splitward.training.loop import to_unit

SMALLEST_SIDE = 11
"""Pixels a side that the window of SSIM needs."""


def make_case(
    target: Target,
    dataset: Dataset,
    *,
    auxiliary: int,
    targets: int,
    captures: int,
    seed: int,
    map_on: bool = True,
) -> tuple[Case, Tensor]:
    """The case, and the originals of its targets.

    Parameters
    ----------
    auxiliary, targets : int
        Most images; fewer where the data set has fewer.
    captures : int
        Releases of each target, with fresh noise each.
    seed : int
        Draws the images and the noise.
    map_on : bool
        False attacks the path with the intentional attack switched off.

    Returns
    -------
    case : Case
    originals : Tensor, [M, C, H, W] in 0..1

    Raises
    ------
    AuditError
        The data does not fit the target, or there is no map to switch off.
    """
    _check(target, dataset)
    attacked = target if map_on else target.unmapped
    if attacked is None:
        raise AuditError(f"{target.name}: has no map that could be switched off.")
    test = dataset.test
    near, far = split_by_patient(test.patients, test.labels, (0.5, 0.5), seed=0)
    frames = np.concatenate((dataset.validation.images, test.images[near]))
    labels = np.concatenate((dataset.validation.labels, test.labels[near]))
    generator = np.random.default_rng(seed)
    known = generator.permutation(len(labels))[:auxiliary]
    chosen = far[generator.permutation(len(far))[:targets]]
    originals = to_unit(torch.from_numpy(test.images[chosen]))
    noise = torch.Generator().manual_seed(seed)
    released = torch.stack([attacked.release(originals, noise) for _ in range(captures)])
    case = Case(
        released=released[0],
        captures=released,
        labels=torch.from_numpy(test.labels[chosen]),
        auxiliary=to_unit(torch.from_numpy(frames[known])),
        auxiliary_labels=torch.from_numpy(labels[known]),
        classes=len(dataset.classes),
        release=attacked.release,
        network=attacked.network,
    )
    return case, originals


def _check(target: Target, dataset: Dataset) -> None:
    shape = tuple(dataset.test.images.shape[1:])
    if shape != target.frame_shape:
        raise AuditError(
            f"{dataset.name}: frames of {shape}, but {target.name} takes {target.frame_shape}. Give --size "
            f"{target.frame_shape[-1]}, or other data."
        )
    if tuple(dataset.classes) != target.classes:
        raise AuditError(_differing(dataset, target))
    if min(shape[1:]) < SMALLEST_SIDE:
        raise AuditError(f"frames of {shape}: SSIM needs {SMALLEST_SIDE} pixels a side.")


def _differing(dataset: Dataset, target: Target) -> str:
    """What to say of classes that are not those of the target."""
    strange = [one for one in dataset.classes if one not in target.classes]
    lacking = [one for one in target.classes if one not in dataset.classes]
    found = [f"has {', '.join(strange)}, which {target.name} does not know"] if strange else []
    found += [f"lacks {', '.join(lacking)}, which {target.name} tells apart"] if lacking else []
    found = found or [f"has its classes in another order than {target.name}"]
    others = [one for one in dataset.tasks if one != dataset.task]
    remedy = f", or give the --task that it was trained for: {' or '.join(others)}" if others else ""
    return f"{dataset.name}: {', and '.join(found)}. Give data with the classes {', '.join(target.classes)}{remedy}."
