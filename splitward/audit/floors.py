"""What an attacker has who sees nothing, or only the label: no attack below these is worth its name."""

from __future__ import annotations

import torch
from torch import Tensor


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
