"""What a decoder makes of each profile's released tensors: figures, and the picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from splitward.audit.attack import Case
from splitward.audit.decoder import SMALL
from splitward.audit.floors import class_mean_image, mean_image
from splitward.audit.metrics import mse, ssim
from splitward.data import Dataset
from splitward.method.split import SplitNetwork
from splitward.training.loop import frames_of, to_unit

TARGETS = 500
SHOWN = 10
NOISE_SEED = 7


@dataclass(frozen=True)
class Inversion:
    """Mean SSIM and MSE over the target images, and the first reconstructions for the picture."""

    ssim: float
    mse: float
    shown: Tensor


def attack_profiles(dataset: Dataset, networks: dict[str, SplitNetwork], steps: int) -> dict[str, Inversion]:
    """Invert each network, and add the floors `label` (class-mean image) and `nothing` (mean image).

    The auxiliary images are the validation split, on which no target network was trained; the targets are the
    first test images.
    """
    auxiliary, targets = to_unit(frames_of(dataset.validation)), to_unit(frames_of(dataset.test)[:TARGETS])
    known, labels = torch.from_numpy(dataset.validation.labels), torch.from_numpy(dataset.test.labels[:TARGETS])
    found = {}
    for name, network in networks.items():
        release = partial(_release, network)
        released = release(targets, torch.Generator().manual_seed(NOISE_SEED))
        classes = len(dataset.classes)
        case = Case(released, released[None], labels, auxiliary, known, classes, release, network)
        found[name] = _measure(replace(SMALL, steps=steps).reconstruct(case, seed=0), targets)
    by_label = class_mean_image(auxiliary, known, labels)
    found["label"] = _measure(by_label, targets)
    found["nothing"] = _measure(mean_image(auxiliary, len(targets)), targets)
    return found


@torch.no_grad()
def _release(network: SplitNetwork, frames: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(len(frames), *network.settings.network.release_shape, generator=generator)
    activation = torch.cat([network.client(network.attack(chunk)) for chunk in torch.split(frames, 500)])
    return network.release(activation, noise)


def _measure(reconstructions: Tensor, targets: Tensor) -> Inversion:
    return Inversion(
        float(ssim(reconstructions, targets).mean()),
        float(mse(reconstructions, targets).mean()),
        reconstructions[:SHOWN].clone(),
    )


def draw_reconstructions(originals: Tensor, found: dict[str, Inversion], path: Path) -> None:
    """Originals above each profile's reconstructions, as a PNG."""
    from matplotlib.figure import Figure  # here, so that only the demo loads matplotlib

    rows = [("original", originals, ""), *((n, i.shown, f"SSIM {i.ssim:.2f}") for n, i in found.items())]
    count = min(len(originals), *(len(inversion.shown) for inversion in found.values()))
    figure = Figure(figsize=(1.5 + count, len(rows) * 1.05), layout="constrained")
    for row, (name, images, note) in enumerate(rows):
        for column in range(count):
            axes = figure.add_subplot(len(rows), count, row * count + column + 1)
            image = images[column].permute(1, 2, 0).numpy()
            axes.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel(f"{name}\n{note}", rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=110)
