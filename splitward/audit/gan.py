"""Conditional adversarial decoder: a critic makes its reconstructions look like frames.

The generator is a decoder of the released tensor, the critic judges patches of a frame beside the released
tensor (Isola et al., CVPR 2017), under the hinge loss (Lim and Ye 2017). The critic's weight is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.decoder import MEDIUM, DecoderAttack, decode, lowest_side
from splitward.audit.practice import Pairs, Practice
from splitward.training.loop import reproducible

CARD = ThreatModel(
    name="gan",
    title="conditional adversarial decoder",
    phase="inference",
    knows=("released tensor", "release law", "client runs as a black box", "auxiliary images"),
    method="Trains a decoder on auxiliary images, released afresh at every step, for squared error, SSIM and "
    "the judgement of a critic that learns to tell its patches from real ones given the released tensor.",
    source="Isola et al., CVPR 2017; hinge loss of Lim and Ye, 2017",
)


class Critic(nn.Module):
    """Scores for patches of frames [B, C, side, side], given what was released of them: [B, 1, h, w]."""

    def __init__(self, shape: tuple[int, ...], channels: int, side: int, width: int) -> None:
        super().__init__()
        start = lowest_side(shape, side)
        self.condition: nn.Module = nn.Conv2d(shape[0], width, 1)
        if len(shape) == 1:
            self.condition = nn.Sequential(
                nn.Linear(shape[0], width * start * start), nn.Unflatten(1, (width, start, start))
            )
        self.patches = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * channels, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.judge = nn.Sequential(
            nn.Conv2d(3 * width, 2 * width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(2 * width, 1, 1)
        )

    def forward(self, frames: Tensor, released: Tensor) -> Tensor:
        """High for real frames."""
        patches = self.patches(frames)
        condition = F.interpolate(self.condition(released), patches.shape[2:])
        return self.judge(torch.cat((patches, condition), dim=1))


@dataclass(frozen=True)
class Gan:
    """A decoder of the given budget with a critic.

    Attributes
    ----------
    decoder : DecoderAttack
    critic_width, critic_rate : int, float
    adversarial_weight : float
        Of the critic's judgement in the decoder's loss.
    effort : float
        Multiplies the decoder's steps.
    """

    decoder: DecoderAttack = MEDIUM
    critic_width: int = 16
    critic_rate: float = 4e-4
    adversarial_weight: float = 2e-3
    effort: float = 1.0

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return CARD

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[M, C, H, W]."""
        budget = replace(self.decoder, effort=self.decoder.effort * self.effort)
        with reproducible(seed):
            channels, side, _ = case.frame_shape
            critic = Critic(tuple(case.released.shape[1:]), channels, side, self.critic_width)
            optimiser = torch.optim.Adam(critic.parameters(), self.critic_rate, betas=(0.5, 0.9))

            def judge(pairs: Pairs, output: Tensor) -> Tensor:
                real = critic(pairs.frames, pairs.released)
                made = critic(output.detach(), pairs.released)
                optimiser.zero_grad()
                (F.relu(1 - real).mean() + F.relu(1 + made).mean()).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimiser.step()
                return -self.adversarial_weight * critic(output, pairs.released).mean()

            trained = budget.train(case, Practice(case), judge)
            return decode(trained, case.released, case.labels)
