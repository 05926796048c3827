"""Feature-space hijacking: a malicious server that trains the client half to its own ends.

FSHA (Pasquini, Ateniese and Bernaschi, CCS 2021). Instead of the task's gradient the server sends one that
makes the client half imitate an encoder of the server's own, the pilot, for which it holds the decoder. It
sees released tensors only; it knows the shape and the law of the release, but not the weights of the client
half. Ours: the pilot releases under the client's own law, so that noise does not tell the two apart, and
pilot and decoder are trained before the client comes, which the paper's server does not do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.audit.decoder import Decoder
from splitward.method.split import SplitNetwork, SplitSettings


class TrainingServer(Protocol):
    """The server of a split training, as a client meets it."""

    def answer(self, released: Tensor, labels: Tensor) -> Tensor:
        """Gradient at the cut for a batch, [B, *shape] as `released`; the server learns from the batch."""


@dataclass(frozen=True)
class HijackSettings:
    """The malicious server's budget.

    Attributes
    ----------
    pilot_steps : int
        Steps of pilot and decoder before the client's training begins.
    critic_steps : int
        Steps of the critic for each batch of the client.
    batch : int
        Shadow frames a step.
    learning_rate : float
        Of pilot, decoder and critic.
    penalty : float
        Weight of the gradient penalty.
    gain : float
        Factor on the gradients sent, against the client's own loss terms.
    conditional : bool
        Whether the critic is told the labels, which the client sends and the server's own frames have. Ours,
        and harder to detect: the gradients then depend on the labels, as an honest server's do.
    """

    pilot_steps: int = 200
    critic_steps: int = 2
    batch: int = 64
    learning_rate: float = 1e-3
    penalty: float = 10.0
    gain: float = 10.0
    conditional: bool = False


class HijackingServer:
    """FSHA's server.

    Parameters
    ----------
    split : SplitSettings
        Of the client; used are the shape and the law of the release. The pilot is a client half without a map.
    shadow, shadow_labels : Tensor, [N, C, H, W] in 0..1, int64 [N]
        The server's own frames of the same kind.
    settings : HijackSettings
    """

    def __init__(
        self, split: SplitSettings, shadow: Tensor, shadow_labels: Tensor, settings: HijackSettings
    ) -> None:
        self.shadow, self.shadow_labels, self.settings = shadow, shadow_labels, settings
        unmapped = replace(
            split, network=replace(split.network, mapped=False), defence=replace(split.defence, map=None)
        )
        self.pilot = SplitNetwork(unmapped)
        shape = split.network.release_shape
        self.decoder = Decoder(shape, split.network.channels, split.network.side)
        self.critic = Critic(shape, split.network.classes if settings.conditional else 1)
        own = [*self.pilot.client.parameters(), *self.decoder.parameters()]
        self.pilot_optimiser = torch.optim.Adam(own, settings.learning_rate)
        self.critic_optimiser = torch.optim.Adam(
            self.critic.parameters(), settings.learning_rate, betas=(0.5, 0.9)
        )
        for _ in range(settings.pilot_steps):
            self._train_pilot()

    def answer(self, released: Tensor, labels: Tensor) -> Tensor:
        """Gradient that moves the client's released tensors to where the critic sees the pilot's."""
        self._train_pilot()
        for _ in range(self.settings.critic_steps):
            self._train_critic(released.detach(), labels)
        at_cut = released.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(-self.critic(at_cut, self._seen(labels)).mean(), at_cut)
        return self.settings.gain * gradient

    @torch.no_grad()
    def reconstruct(self, released: Tensor) -> Tensor:
        """Frames of the client by the pilot's decoder, [M, C, H, W] in 0..1."""
        return self.decoder(released).clamp(0, 1)

    def _train_pilot(self) -> None:
        """One step of pilot and decoder as an autoencoder."""
        frames = self.shadow[torch.randint(len(self.shadow), (self.settings.batch,))]
        released = self.pilot.release(self.pilot.client(frames))
        _step(self.pilot_optimiser, F.mse_loss(self.decoder(released), frames))

    def _train_critic(self, client: Tensor, labels: Tensor) -> None:
        """One step of the Wasserstein critic with gradient penalty (Gulrajani et al. 2017)."""
        rows = torch.randint(len(self.shadow), (len(client),))
        with torch.no_grad():
            pilot = self.pilot.release(self.pilot.client(self.shadow[rows]))
        distance = self.critic(client, self._seen(labels)).mean()
        distance = distance - self.critic(pilot, self._seen(self.shadow_labels[rows])).mean()
        share = torch.rand(len(client), *[1] * (client.dim() - 1))
        between = (share * client + (1 - share) * pilot).requires_grad_()
        score = self.critic(between, self._seen(labels)).sum()
        (slope,) = torch.autograd.grad(score, between, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        _step(self.critic_optimiser, distance + self.settings.penalty * penalty)

    def _seen(self, labels: Tensor) -> Tensor:
        """The labels as the critic is given them: all one class unless it is conditional."""
        return labels if self.settings.conditional else torch.zeros_like(labels)


class Critic(nn.Module):
    """Released tensor [B, *shape] and class [B] to a score, high for the pilot's: [B].

    The class enters as an inner product with the features (Miyato and Koyama 2018).
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 64) -> None:
        super().__init__()
        if len(shape) == 1:
            layers: list[nn.Module] = [nn.Linear(shape[0], 4 * width), nn.LeakyReLU(0.2)]
            flat = 4 * width
        else:
            layers, channels, side = [], shape[0], shape[1]
            while side > 4:
                layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.LeakyReLU(0.2)]
                channels, side = width, (side + 1) // 2
            flat = channels * side * side
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 4 * width), nn.LeakyReLU(0.2))
        self.direction = nn.Embedding(classes, 4 * width)

    def forward(self, released: Tensor, classes: Tensor) -> Tensor:
        """Scores [B]."""
        return (self.body(released) * self.direction(classes)).sum(1)


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimiser.step()
