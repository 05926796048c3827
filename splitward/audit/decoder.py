"""Model inversion by convolutional decoders trained on defended releases (docs/method.md, section 5, rule 1).

Threat model: the attacker knows code, profile and noise law, has a device of its own and auxiliary images that
are disjoint from the target's training data, releases them as that device does, and learns the way back. It
asks nothing of the network but `Case.release`. Architectures and budgets are our choice. The losses differ,
because no one reconstruction has both the least squared error and the greatest SSIM.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.metrics import ssim
from splitward.audit.practice import Pairs, Practice
from splitward.training.loop import reproducible

_CHECKS = 12
_WARM_UP = 0.1
"""Share of the steps in which the rate rises: a decoder that begins at full rate under SSIM can die at once."""
_CHECKED = 500
_GENTLER = (1.0, 0.1, 0.0)
"""Shares of the weight of SSIM at each start of a decoder that dies: it gives near to one image for every release, and
no better one than the mean image. The gradient of SSIM is what kills it."""
_SPREAD = 0.1
"""Spread of what it gives, of that of the frames, under which images are near to one (the dead ones seen had 0.05)."""
_CHUNK = 250
Extra = Callable[[Pairs, Tensor], Tensor]


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016), without normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, width, h, w] to the same shape."""
        return hidden + self.body(hidden)


class Decoder(nn.Module):
    """Released tensor [B, *shape] to frames [B, C, side, side]; most work is done at the lower resolutions.

    Parameters
    ----------
    shape : tuple of int
        [k], or [K, h, h] with `side` a power of two times h.
    channels, side : int
    width : int
        Channels at the lowest resolution; each doubling of the resolution halves them, but not below 8.
    depth : int
        3x3 convolutions at the lowest resolution, besides those that double it.
    residual : bool
        Residual blocks in their place, and one at every higher resolution.
    classes : int
        Of the label that the decoder is told; 0 for none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: int,
        side: int,
        width: int = 32,
        depth: int = 1,
        *,
        residual: bool = False,
        classes: int = 0,
    ) -> None:
        super().__init__()
        start = lowest_side(shape, side)
        grid, cells = (width, start, start), width * start * start
        self.entry: nn.Module = nn.Conv2d(shape[0], width, 3, padding=1)
        if len(shape) == 1:
            self.entry = nn.Sequential(
                nn.Linear(shape[0], 8 * width),
                nn.LeakyReLU(0.1),
                nn.Linear(8 * width, cells),
                nn.Unflatten(1, grid),
            )
        self.label: nn.Module | None = None
        if classes:
            offsets = nn.Embedding(classes, cells)
            nn.init.zeros_(offsets.weight)
            self.label = nn.Sequential(offsets, nn.Unflatten(1, grid))
        self.register_buffer("centre", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += (
                [_Block(width)] if residual else [nn.LeakyReLU(0.1), nn.Conv2d(width, width, 3, padding=1)]
            )
        while 2 * start < side:
            finer = max(8, width // 2)
            layers += [nn.LeakyReLU(0.1), nn.Conv2d(width, 4 * finer, 3, padding=1), nn.PixelShuffle(2)]
            width, start = finer, 2 * start
            layers += [_Block(width)] if residual else []
        layers += [nn.LeakyReLU(0.1), nn.Conv2d(width, 4 * channels, 3, padding=1), nn.PixelShuffle(2)]
        self.body = nn.Sequential(*layers)

    def forward(self, released: Tensor, labels: Tensor | None = None) -> Tensor:
        """Reconstructions, not yet clamped to 0..1; `labels` [B] for a decoder that is told them."""
        hidden = self.entry((released - self.get_buffer("centre")) / self.get_buffer("spread"))
        return self.body(hidden if self.label is None else hidden + self.label(labels))

    def scale_to(self, released: Tensor) -> None:
        """Scale all that is decoded from now on by what brings `released` [N, *shape] to mean 0, variance 1."""
        self.get_buffer("centre").copy_(released.mean())
        self.get_buffer("spread").copy_(released.std().clamp_min(1e-6))


def lowest_side(shape: tuple[int, ...], side: int) -> int:
    """Side of a decoder's lowest resolution: the release's own, or `side` halved down to about 8."""
    if len(shape) > 1:
        return shape[1]
    while side % 2 == 0 and side > 8:
        side //= 2
    return side


@dataclass(frozen=True)
class DecoderAttack:
    """One decoder and its training.

    Attributes
    ----------
    size : str
        Its name in the report.
    width, depth, residual : int, int, bool
        As `Decoder` takes them.
    labelled : bool
        Whether the attacker knows each target's label and tells it to the decoder.
    steps, batch, rate : int, int, float
        Of Adam, its rate rising at first, then falling to 0 along a cosine; gradients are clipped to norm 1.
    ssim_weight : float
        Of `1 - SSIM` in the loss, beside the mean squared error.
    effort : float
        Multiplies `steps`.
    """

    size: str = "medium"
    width: int = 48
    depth: int = 1
    residual: bool = False
    labelled: bool = False
    steps: int = 800
    batch: int = 64
    rate: float = 2e-3
    ssim_weight: float = 0.1
    effort: float = 1.0

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        shaped = "convolutional decoder" + (", mostly for SSIM" if self.residual else "")
        return ThreatModel(
            name=f"decoder-{self.size}",
            title=f"{self.size} {shaped}",
            phase="inference",
            knows=(
                "released tensor",
                "release law",
                "client runs as a black box",
                "auxiliary images",
                *(("auxiliary labels", "label of the target") if self.labelled else ()),
            ),
            method="Trains a decoder on auxiliary images, released afresh at every step, and keeps it where it "
            "did best on auxiliary images held out."
            + (" The decoder is told the label of each image." if self.labelled else ""),
            source="Dosovitskiy and Brox, CVPR 2016; He, Zhang and Lee, ACSAC 2019",
        )

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[M, C, H, W]."""
        with reproducible(seed):
            return decode(self.train(case, Practice(case)), case.released, case.labels)

    def train(self, case: Case, practice: Practice, extra: Extra | None = None) -> Decoder:
        """A decoder of this budget, in the state that served held-out images best; begun anew, with less of SSIM in its
        loss, if it dies.

        Parameters
        ----------
        extra : callable, optional
            Pairs and the decoder's output to a further term of the loss.
        """
        held = practice.release(practice.held_rows[:_CHECKED])
        mean = held.frames.mean(0, keepdim=True).expand_as(held.frames)
        for share in _GENTLER:
            attempt = replace(self, ssim_weight=share * self.ssim_weight)
            decoder, distance = attempt._fit(case, practice, held, extra)
            spread = decode(decoder, held.released, held.labels).std(0).mean() / held.frames.std(0).mean()
            if spread > _SPREAD or distance < attempt._distance(mean, held.frames).item():
                break
        return decoder

    def _fit(self, case: Case, practice: Practice, held: Pairs, extra: Extra | None) -> tuple[Decoder, float]:
        """A decoder from a fresh start, and its distance on held-out images."""
        channels, side, _ = case.frame_shape
        decoder = Decoder(
            tuple(case.released.shape[1:]),
            channels,
            side,
            self.width,
            self.depth,
            residual=self.residual,
            classes=case.classes if self.labelled else 0,
        )
        steps = max(1, round(self.steps * self.effort))
        optimiser = torch.optim.Adam(decoder.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate_at(step / steps))
        decoder.scale_to(held.released)
        best, least = decoder.state_dict(), float("inf")
        for step in range(1, steps + 1):
            pairs = practice.draw(self.batch)
            output = decoder(pairs.released, pairs.labels)
            loss = self._distance(output, pairs.frames)
            if extra is not None:
                loss = loss + extra(pairs, output)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            if step % max(1, steps // _CHECKS) == 0 or step == steps:
                distance = self._distance(decode(decoder, held.released, held.labels), held.frames).item()
                if distance < least:
                    best, least = copy.deepcopy(decoder.state_dict()), distance
        decoder.load_state_dict(best)
        return decoder, least

    def _distance(self, output: Tensor, frames: Tensor) -> Tensor:
        return F.mse_loss(output, frames) + self.ssim_weight * (1 - ssim(output, frames).mean())


def _rate_at(done: float) -> float:
    """Share of the full rate after the share `done` of the steps."""
    return min((done + 0.01) / _WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))


SMALL = DecoderAttack("small", width=24, depth=0, steps=600)
MEDIUM = DecoderAttack()
LARGE = DecoderAttack("large", width=64, depth=2, steps=600, rate=1e-3, ssim_weight=0.0)
RESIDUAL = DecoderAttack("residual", width=32, depth=2, residual=True, ssim_weight=1.0)
LABELLED = DecoderAttack("label-conditioned", labelled=True, ssim_weight=0.0)


@torch.no_grad()
def decode(decoder: Decoder, released: Tensor, labels: Tensor) -> Tensor:
    """Reconstructions in 0..1 of all of `released` [M, *shape]: [M, C, H, W]."""
    chunks = zip(torch.split(released, _CHUNK), torch.split(labels, _CHUNK), strict=True)
    return torch.cat([decoder(chunk, own) for chunk, own in chunks]).clamp(0, 1)
