"""The two halves of a training step, apart: bit for bit what `splitward.training.loop` does in one process.

A step is one exchange. The client half makes the released tensor and sends it with its labels; the server half computes
its loss, takes its own step and sends the gradient at the cut back; the client half takes its step. AdamW treats each
parameter alone, so two optimisers give the bits of one.

While the gradient is on its way, the client trains its local classifier and attacks the next batch with it: neither
needs the gradient, so the order changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.data import Split
from splitward.method.split import SplitNetwork
from splitward.training.loop import client_loss, frames_of, one_cycle, server_loss, shifted, to_unit
from splitward.training.settings import RunSettings


@dataclass(frozen=True)
class Exchange:
    """What the client sends for one step.

    Attributes
    ----------
    step : int
        Number of the step, from 0, without gaps.
    at : float
        Fraction of the training that is done, on which the learning rate depends.
    released : Tensor, [B, *release_shape]
        float32, in real units.
    labels : Tensor, int64 [B]
    """

    step: int
    at: float
    released: Tensor
    labels: Tensor


class ServerTrainer:
    """The server half, its optimiser, and the number of steps that it took: `steps_done`."""

    def __init__(self, settings: RunSettings) -> None:
        self._settings = settings
        self.modules: dict[str, nn.Module] = {"server": SplitNetwork(settings.split).server.train()}
        self.optimisers = {"server": make_optimiser(self.modules["server"], settings)}
        self.steps_done = 0

    def take(self, sent: Exchange) -> Tensor:
        """Gradient of the server's loss at the released tensor, after one step of the server half."""
        released = sent.released.detach().requires_grad_()
        loss = server_loss(self.modules["server"](released), sent.labels)
        optimiser = self.optimisers["server"]
        set_rate(optimiser, self._settings, sent.at)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimiser.step()
        self.steps_done = sent.step + 1
        assert released.grad is not None  # noqa: S101  # the fused stream reads it
        return released.grad


class ClientTrainer:
    """The client half with its local classifier, on its own images.

    `begin` and `end` alternate. What is drawn at random comes from torch's own generator, whose state before the batch
    that is next stands in `random_state`.
    """

    def __init__(self, settings: RunSettings, split: Split) -> None:
        self._settings = settings
        self._network = SplitNetwork(settings.split).train()
        self._network.server = nn.Identity()
        local = self._network.saliency.classifier if self._network.saliency is not None else None
        self.modules: dict[str, nn.Module] = {"client": self._network.client}
        if self._network.adversary is not None:
            self.modules["adversary"] = self._network.adversary
        if local is not None:
            self.modules["local"] = local
        self.optimisers = {name: make_optimiser(module, settings) for name, module in self.modules.items()}
        self._images, self._labels = frames_of(split), torch.from_numpy(split.labels)
        self._batches = -(-len(self._labels) // settings.batch)
        # A last batch of one frame is left out: batch normalisation needs two.
        self._whole = self._batches - (len(self._labels) % settings.batch == 1)
        self.steps = settings.epochs * self._whole
        self.steps_done = 0
        self.random_state = torch.get_rng_state()
        self._ready: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def finished(self) -> bool:
        """Whether every step was taken."""
        return self.steps_done >= self.steps

    def begin(self) -> Exchange:
        """The released tensor of the step that is next."""
        frames, attacked, labels = self._ready or self._prepare(self.steps_done)
        self._activation = self._network.client(attacked)
        self._released = self._network.release(self._activation).contiguous()
        self._frames, self._wanted = frames, labels
        epoch, index = divmod(self.steps_done, self._whole)
        self._at = (epoch * self._batches + index) / (self._settings.epochs * self._batches)
        return Exchange(self.steps_done, self._at, self._released.detach(), labels)

    def meanwhile(self) -> None:
        """What needs no gradient from the server: the local classifier's step, and the next batch's map."""
        if "local" in self.modules:
            optimiser = self.optimisers["local"]
            set_rate(optimiser, self._settings, self._at)
            optimiser.zero_grad()
            F.cross_entropy(self.modules["local"](self._frames), self._wanted).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
        self.random_state = torch.get_rng_state()
        following = self.steps_done + 1
        self._ready = self._prepare(following) if following < self.steps else None

    def end(self, gradient: Tensor) -> None:
        """Take the step with the server's gradient at the released tensor."""
        own = client_loss(self._network, self._activation, self._released, None, self._frames, self._wanted)
        names = [name for name in self.optimisers if name != "local"]
        for name in names:
            set_rate(self.optimisers[name], self._settings, self._at)
            self.optimisers[name].zero_grad()
        roots = [(self._released, gradient)] + ([(own, None)] if own.requires_grad else [])
        torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        for name in names:
            self.optimisers[name].step()
        self.steps_done += 1

    def _prepare(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frames, attacked frames and labels of a step, in the loop's order."""
        epoch, index = divmod(step, self._whole)
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._labels), generator=generator)
        rows = order[index * self._settings.batch : (index + 1) * self._settings.batch]
        frames = shifted(to_unit(self._images[rows]), self._settings.shift)
        return frames, self._network.attack(frames), self._labels[rows]


def make_optimiser(module: nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    """AdamW as the loop has it."""
    return torch.optim.AdamW(module.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)


def set_rate(optimiser: torch.optim.Optimizer, settings: RunSettings, at: float) -> None:
    """The one-cycle learning rate at the fraction `at` of the training."""
    for group in optimiser.param_groups:
        group["lr"] = one_cycle(settings, at)
