"""What an attacker has who sees nothing, or only the label: no attack below these is worth its name."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from splitward.audit.metrics import ssim
from splitward.training.loop import reproducible

_STEPS, _BATCH, _RATE = 600, 256, 5e-3


def mean_image(auxiliary: Tensor, count: int) -> Tensor:
    """The auxiliary images' mean as everyone's reconstruction: [count, C, H, W]."""
    return auxiliary.mean(0, keepdim=True).expand(count, -1, -1, -1)


def class_mean_image(auxiliary: Tensor, auxiliary_labels: Tensor, labels: Tensor) -> Tensor:
    """The mean auxiliary image of each target's class: [len(labels), C, H, W].

    Classes without an auxiliary image get the mean of all.
    """
    means = torch.stack(
        [
            auxiliary[auxiliary_labels == label].mean(0)
            if bool((auxiliary_labels == label).any())
            else auxiliary.mean(0)
            for label in range(int(labels.max()) + 1)
        ]
    )
    return means[labels]


def class_template(auxiliary: Tensor, auxiliary_labels: Tensor, labels: Tensor, *, seed: int = 0) -> Tensor:
    """One image for each class, drawn to have the highest mean SSIM with the auxiliary images of that class.

    The class mean is what the label allows in MSE, but not in SSIM, which a blurred mean does not maximise: an
    attacker who knows nothing but the label and cares for SSIM sends this. [len(labels), C, H, W].
    """
    classes = int(torch.cat((labels, auxiliary_labels)).max()) + 1
    with reproducible(seed):
        start = class_mean_image(auxiliary, auxiliary_labels, torch.arange(classes))
        templates = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([templates], _RATE)
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, _STEPS)
        for _ in range(_STEPS):
            rows = torch.randint(len(auxiliary), (min(_BATCH, len(auxiliary)),))
            drawn, wanted = templates[auxiliary_labels[rows]], auxiliary[rows]
            # A little of the squared error keeps pixels that SSIM hardly sees where they belong.
            loss = 1 - ssim(drawn, wanted).mean() + F.mse_loss(drawn, wanted)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()
        return templates.detach().clamp(0, 1)[labels]
