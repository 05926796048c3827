"""Maximum a posteriori with a learned prior: the likeliest frame under what was released and what frames look like.

The prior is a variational autoencoder (Kingma and Welling 2014) of auxiliary frames whose decoder variance is the
optimal one (Rybkin, Daniilidis and Levine 2021): `u ~ N(0, I)`, `x ~ N(G(u), s I)`. The law of the release is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.descent import activation_of, descend
from splitward.audit.optimise import weights_of
from splitward.method.split import SplitNetwork
from splitward.training.loop import reproducible

CARD = ThreatModel(
    name="prior",
    title="MAP with a learned prior",
    phase="inference",
    knows=("released tensor", "release law", "client weights", "auxiliary images"),
    method="Trains a variational autoencoder on auxiliary images and finds the latent, then the frame around what it "
    "decodes to, that is likeliest given the released tensor; noise is drawn afresh at every step.",
    source="Bora et al., ICML 2017 (generative priors for inverse problems); the release's likelihood is ours",
)


_TRIALS = 256


class Autoencoder(nn.Module):
    """Frames [B, C, H, W] to a Gaussian over latents [B, latents] and back, by way of their principal components.

    The components are ours: two dense layers on them learn in seconds what convolutions at full size take minutes for.
    """

    def __init__(self, frames: Tensor, latents: int, components: int = 256, width: int = 256) -> None:
        super().__init__()
        rows = frames.flatten(1)
        kept = min(components, *rows.shape)
        _, spread, basis = torch.pca_lowrank(rows, kept)
        self.shape = frames.shape[1:]
        self.mean, self.basis = rows.mean(0), basis
        self.unit = (spread.square().mean() / len(rows)).sqrt().clamp_min(1e-6)
        self.encoder = nn.Sequential(nn.Linear(kept, width), nn.LeakyReLU(0.1), nn.Linear(width, 2 * latents))
        self.decoder = nn.Sequential(nn.Linear(latents, width), nn.LeakyReLU(0.1), nn.Linear(width, kept))

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents."""
        mean, log_variance = self.encoder((frames.flatten(1) - self.mean) @ self.basis / self.unit).chunk(
            2, dim=1
        )
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """Frames, not clamped to 0..1."""
        return (self.mean + self.unit * self.decoder(latents) @ self.basis.T).view(-1, *self.shape)

    def loss(self, frames: Tensor) -> Tensor:
        """Negative evidence bound, per frame, with the decoder's variance at its optimum."""
        mean, log_variance = self.encode(frames)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        error = (self.decode(latents) - frames).square().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return 0.5 * frames[0].numel() * error.clamp_min(1e-6).log() + divergence


@dataclass(frozen=True)
class Prior:
    """Latent first, then frame and latent together.

    Attributes
    ----------
    targets : int
        It works on the first so many targets.
    effort : float
        Multiplies all steps.
    latents : int
    training_steps, batch : int
        Of the autoencoder.
    latent_steps, frame_steps : int
        Of the two descents.
    starts : int
        Latents to start from; the likeliest end is kept.
    """

    targets: int = 64
    effort: float = 1.0
    latents: int = 48
    training_steps: int = 1500
    batch: int = 128
    latent_steps: int = 200
    frame_steps: int = 200
    starts: int = 3

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return CARD

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[m, C, H, W] for the first m = `targets`; `ValueError` when the case has no weights."""
        network, case = weights_of(case, CARD), case.first(self.targets)
        with reproducible(seed):
            prior = self._train(case.auxiliary)
            latents = self._find_latents(network, prior, case, seed)
            return self._find_frames(network, prior, case, latents)

    def _train(self, auxiliary: Tensor) -> Autoencoder:
        prior = Autoencoder(auxiliary, self.latents)
        optimiser = torch.optim.Adam(prior.parameters(), 3e-3)
        steps = max(1, round(self.training_steps * self.effort))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            loss = prior.loss(auxiliary[torch.randint(len(auxiliary), (self.batch,))])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()
        return prior.requires_grad_(False)

    def _find_latents(self, network: SplitNetwork, prior: Autoencoder, case: Case, seed: int) -> Tensor:
        """Likeliest latents [m, latents], among several starts.

        A decoded frame is not the frame itself, so its release misses the target's by more than the noise. By how
        much, for each value, is measured on auxiliary frames.
        """
        trial = case.auxiliary[torch.randperm(len(case.auxiliary))[:_TRIALS]]
        with torch.no_grad():
            clean = activation_of(network, prior.decode(prior.encode(trial)[0]).clamp(0, 1))
            missed = (case.release(trial, torch.Generator().manual_seed(seed)) - clean).square().mean(0)
        variance = missed.clamp_min(1e-3 * missed.mean().clamp_min(1e-12))
        released = torch.cat([case.released] * self.starts)

        def objective(latents: Tensor) -> Tensor:
            frames = prior.decode(latents).clamp(0, 1)
            gap = network.release(activation_of(network, frames)) - released
            return 0.5 * (gap.square() / variance).flatten(1).sum(1) + 0.5 * latents.square().sum(1)

        # The prior's mean first, then draws from the prior.
        starts = torch.randn(len(released), self.latents)
        starts[: len(case.released)] = 0
        steps = round(self.latent_steps * self.effort)
        (ends,) = descend(objective, starts, steps=steps, rate=0.1, boxed=False)
        with torch.no_grad():
            values = objective(ends).view(self.starts, -1)
        return ends.view(self.starts, -1, self.latents)[values.argmin(0), torch.arange(values.shape[1])]

    def _find_frames(self, network: SplitNetwork, prior: Autoencoder, case: Case, latents: Tensor) -> Tensor:
        """Likeliest frames [m, C, H, W] around what the latents decode to."""
        with torch.no_grad():
            trial = case.auxiliary[torch.randperm(len(case.auxiliary))[:_TRIALS]]
            spread = (prior.decode(prior.encode(trial)[0]) - trial).square().mean()
            decoded = prior.decode(latents).clamp(0, 1)
        noise = max(network.settings.defence.sigma**2, 1e-4 * float(case.released.var(0).mean()))

        def objective(frames: Tensor) -> Tensor:
            gap = network.release(activation_of(network, frames)) - case.released
            far = (frames - decoded).square() / spread
            return 0.5 * gap.square().flatten(1).sum(1) / noise + 0.5 * far.flatten(1).sum(1)

        steps = round(self.frame_steps * self.effort)
        return descend(objective, decoded, steps=steps, rate=0.02)[0]
