"""Figures of reconstructions, and of the floors beside them."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from splitward.audit.attack import Case
from splitward.audit.floors import class_mean_image, class_template, mean_image
from splitward.audit.ledger import Ledger
from splitward.audit.metrics import mse, ssim
from splitward.training.run import save_tensors

PERCENTILES = (5, 50, 95)
Floors = dict[str, Tensor]
"""What needs nothing released, by name: an image for each class, [classes, C, H, W]."""


def measure(reconstructions: Tensor, originals: Tensor, labels: Tensor, floors: Floors) -> dict[str, Any]:
    """Figures of the first m targets, and the floors on the same m.

    Parameters
    ----------
    reconstructions : Tensor, [m, C, H, W]
    originals, labels : Tensor, [M, C, H, W], [M]

    Raises
    ------
    ValueError
        The reconstructions are of another shape, not in 0..1, or not finite.
    """
    count = len(reconstructions)
    if not 0 < count <= len(originals) or reconstructions.shape[1:] != originals.shape[1:]:
        raise ValueError(
            f"reconstructions of {tuple(reconstructions.shape)} for targets of {tuple(originals.shape)}"
        )
    if not bool(((reconstructions >= 0) & (reconstructions <= 1)).all()):  # so written, NaN fails too
        raise ValueError("reconstructions that are not finite or not within 0..1")
    return {
        **_figures(reconstructions, originals[:count]),
        "targets": count,
        "floors": measure_floors(floors, originals[:count], labels[:count]),
    }


def measure_floors(floors: Floors, originals: Tensor, labels: Tensor) -> dict[str, Any]:
    """Figures of each floor."""
    return {name: _figures(images[labels], originals) for name, images in floors.items()}


def label_floor(floors: dict[str, Any], what: str) -> float:
    """The best that anyone does without the release: highest mean SSIM or lowest mean MSE of the floors."""
    means = [floor[what]["mean"] for floor in floors.values()]
    return float(max(means) if what == "ssim" else min(means))


def _figures(reconstructions: Tensor, originals: Tensor) -> dict[str, Any]:
    return {
        "ssim": _spread(ssim(reconstructions, originals)),
        "mse": _spread(mse(reconstructions, originals)),
    }


def _spread(values: Tensor) -> dict[str, float]:
    found = values.double().numpy()
    percentiles = np.percentile(found, PERCENTILES)
    return {"mean": float(found.mean())} | {
        f"p{at}": float(value) for at, value in zip(PERCENTILES, percentiles, strict=True)
    }


def open_floors(case: Case, ledger: Ledger) -> Floors:
    """The floors of the case's auxiliary images, drawn once and kept beside the ledger."""
    digest = hashlib.sha256(case.auxiliary.numpy().tobytes() + case.auxiliary_labels.numpy().tobytes())
    path = ledger.path.with_name(f"floors-{digest.hexdigest()[:12]}.safetensors")
    if not path.exists():
        save_tensors(path, draw_floors(case))
    return load_file(path)


def draw_floors(case: Case) -> Floors:
    """Mean of all images, mean of each class, and each class's template of highest SSIM."""
    classes = torch.arange(case.classes)
    return {
        "mean_image": mean_image(case.auxiliary, case.classes),
        "class_mean": class_mean_image(case.auxiliary, case.auxiliary_labels, classes),
        "class_template": class_template(case.auxiliary, case.auxiliary_labels, classes),
    }


def to_pixels(images: Tensor) -> Tensor:
    """uint8 of images in 0..1."""
    return (images * 255).round().to(torch.uint8)
