"""Model inversion by a convolutional decoder that was trained on defended activations.

Threat model: the attacker knows code, weights, profile and noise law, runs the client half on auxiliary images
that are disjoint from the target's training data, releases them as a device would, and learns the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.audit.metrics import ssim
from splitward.training.loop import reproducible

_SSIM_WEIGHT = 0.1


class Decoder(nn.Module):
    """Released tensor [B, *shape] to frames [B, C, H, W]; most work is done at the lower resolutions."""

    def __init__(self, shape: tuple[int, ...], channels: int, side: int, width: int = 32) -> None:
        super().__init__()
        self.entry: nn.Module
        if len(shape) == 1:
            start = side // 4
            self.entry = nn.Sequential(
                nn.Linear(shape[0], width * start * start), nn.Unflatten(1, (width, start, start))
            )
        else:
            start = shape[1]
            self.entry = nn.Conv2d(shape[0], width, 3, padding=1)
        layers: list[nn.Module] = []
        while 2 * start < side:
            layers += [nn.LeakyReLU(0.1), nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)]
            start *= 2
        layers += [nn.LeakyReLU(0.1), nn.Conv2d(width, width, 3, padding=1)]
        layers += [nn.LeakyReLU(0.1), nn.Conv2d(width, 4 * channels, 3, padding=1), nn.PixelShuffle(2)]
        self.body = nn.Sequential(*layers)

    def forward(self, released: Tensor) -> Tensor:
        """Reconstructions, not yet clamped to 0..1."""
        return self.body(self.entry(released))


def invert(
    released: Tensor, frames: Tensor, targets: Tensor, *, steps: int = 400, batch: int = 64, seed: int = 0
) -> Tensor:
    """Reconstructions of `targets` [M, *shape] by a decoder trained on auxiliary (`released`, `frames`) pairs.

    Parameters
    ----------
    released, frames : Tensor, [N, *shape], [N, C, H, W]
        What the attacker released from its own auxiliary frames, and those frames.
    steps, batch, seed : int
        The attacker's budget.

    Returns
    -------
    Tensor, [M, C, H, W]
    """
    with reproducible(seed):
        decoder = Decoder(tuple(released.shape[1:]), frames.shape[1], frames.shape[2])
        optimiser = torch.optim.Adam(decoder.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            rows = torch.randint(len(frames), (batch,))
            output, wanted = decoder(released[rows]), frames[rows]
            loss = F.mse_loss(output, wanted) + _SSIM_WEIGHT * (1 - ssim(output, wanted).mean())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()
        with torch.no_grad():
            return decoder(targets).clamp(0, 1)
