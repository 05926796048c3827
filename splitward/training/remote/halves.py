"""The two halves of a training step, apart: bit for bit what `splitward.training.loop` does in one process.

A step is one exchange. The client half makes the released tensor and sends it with its labels; the server half computes
its loss, takes its own step and sends the gradient at the cut back; the client half takes its step. AdamW treats each
parameter alone, so two optimisers give the bits of one.

While the gradient is on its way, the client trains its local classifier and attacks the next batch with it: neither
needs the gradient, so the order changes no bit.

Where the labels stay at the client (U-shaped), the last layer of each stream lives there too, and a step is two
exchanges: the server half answers with what enters these layers, the client computes the loss and sends the gradient of
that, and the server half answers with the gradient at the cut.

Pooled halves (FedSGD, McMahan et al. 2017) take no step until the round ends, and then one along the mean gradient of
its frames. The client's is stochastic gradient descent with momentum: it is linear in the gradient, so the mean of the
sites' halves, by their frames of the round, is the half that all these frames at one place would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.data import Split
from splitward.method.halves import ServerHalf
from splitward.method.split import SplitNetwork
from splitward.training.loop import client_loss, frames_of, one_cycle, server_loss, shifted, to_unit
from splitward.training.remote.state import Trained
from splitward.training.settings import RunSettings

STREAMS = ("attacked", "recovered", "fused")
SGD_RATE = 10.0
"""A pooled client half's learning rate, in AdamW's: our choice, on validation data. MNIST can collapse at 17 and 30."""
SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Exchange:
    """What the client sends for one step.

    Attributes
    ----------
    step : int
        Number of the step, from 0.
    at : float
        Fraction of the training that is done, on which the learning rate depends.
    released : Tensor, [B, *release_shape]
        float32, in real units.
    labels : Tensor, int64 [B]
        Empty where they stay at the client.
    """

    step: int
    at: float
    released: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Taken:
    """The server half's answer to a step: gradient at the released tensor, mean loss, frames decided right."""

    gradient: Tensor
    loss: float
    right: int


class Schedule:
    """Which fraction of a training each step of a client stands at, as the loop on one machine counts.

    Parameters
    ----------
    settings : RunSettings
    frames : int
        Training images of the client.
    """

    def __init__(self, settings: RunSettings, frames: int) -> None:
        self._epochs = settings.epochs
        self._batches = -(-frames // settings.batch)
        self.per_epoch = self._batches - (frames % settings.batch == 1)
        """Steps of an epoch. A last batch of one frame is left out: batch normalisation needs two."""
        self.steps = settings.epochs * self.per_epoch

    def at(self, step: int) -> float:
        """Fraction of the training before a step."""
        epoch, index = divmod(step, self.per_epoch)
        return (epoch * self._batches + index) / (self._epochs * self._batches)


class StepServer(Protocol):
    """Who answers the steps of a training: the honest server half, or one under trial."""

    def take(self, sent: Exchange) -> Taken:
        """Gradient of the server's loss at the released tensor, after one step of the server half."""


class ServerTrainer:
    """The server half and its optimiser; without the last layers where `tails` are at the client."""

    def __init__(self, settings: RunSettings, *, tails: bool = True, pooled: bool = False) -> None:
        self._settings, self.pooled, self.seen = settings, pooled, 0
        half = SplitNetwork(settings.split).server.train()
        assert isinstance(half, ServerHalf)  # noqa: S101  # a plan has no other
        self.half = half
        if not tails:
            for name in STREAMS:
                stream: nn.Sequential = getattr(half, name)
                stream[-1] = nn.Identity()
        self.modules: dict[str, nn.Module] = {"server": half}
        self.optimisers = {"server": make_optimiser(half, settings)}
        self._sent: tuple[Exchange, Tensor, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def awaiting(self) -> tuple[int, ...]:
        """Shape of the gradient that `back` has to be given."""
        if self._sent is None:
            return ()
        first = self._sent[2][0]
        return (len(first), len(STREAMS), *first.shape[1:])

    def take(self, sent: Exchange) -> Taken:
        """Gradient of the server's loss at the released tensor, after one step of the server half."""
        released = sent.released.detach().requires_grad_()
        outputs = self.half(released)
        loss = server_loss(outputs, sent.labels)
        gradient = self._step(sent, released, [loss], [torch.ones(())])
        return Taken(gradient, loss.item(), int((outputs.decision.argmax(1) == sent.labels).sum()))

    def features(self, sent: Exchange) -> Tensor:
        """What enters the last layers, [B, 3, F]; `back` must follow before another step."""
        released = sent.released.detach().requires_grad_()
        features = self.half.features(released)
        self._sent = sent, released, features
        return torch.stack(features, dim=1).detach()

    def back(self, gradient: Tensor) -> Tensor:
        """Gradient at the released tensor, from that of the features [B, 3, F], after one step of the server half."""
        assert self._sent is not None  # noqa: S101  # the protocol's order
        sent, released, features = self._sent
        self._sent = None
        return self._step(sent, released, list(features), list(gradient.unbind(1)))

    def _step(self, sent: Exchange, released: Tensor, roots: list[Tensor], gradients: list[Tensor]) -> Tensor:
        optimiser = self.optimisers["server"]
        set_rate(optimiser, self._settings, sent.at)
        weight = len(released) if self.pooled else 1
        if not self.pooled:
            optimiser.zero_grad()
        torch.autograd.backward(roots, [weight * gradient for gradient in gradients])
        if self.pooled:
            self.seen += weight
        else:
            optimiser.step()
        assert released.grad is not None  # noqa: S101  # the fused stream reads it
        return released.grad / weight


class ClientTrainer:
    """The client half with its local classifier, on its own images.

    `begin` and `end` alternate, with `meanwhile` between them. What is drawn at random comes from torch's own
    generator, whose state before the batch that is next stands in `random_state`.

    Parameters
    ----------
    settings : RunSettings
    split : Split
        The client's own training images.
    tails : bool
        Whether the last layers live here, and the labels stay.
    pooled : bool
        Whether a round is one step.
    order : callable, optional
        Which frames come when in an epoch, a permutation; by default the loop's own, which the plan's seed tells.

    Attributes
    ----------
    features : int
        That enter a last layer which lives here; 0 where none does.
    """

    def __init__(
        self,
        settings: RunSettings,
        split: Split,
        *,
        tails: bool = False,
        pooled: bool = False,
        order: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._order = lru_cache(1)(self._public_order if order is None else order)  # of the epoch under way
        self._settings, self.pooled, self.seen = settings, pooled, 0
        self.network = SplitNetwork(settings.split).train()
        server = self.network.server
        self.network.server = nn.Identity()
        local = self.network.saliency.classifier if self.network.saliency is not None else None
        self.modules: dict[str, nn.Module] = {"client": self.network.client}
        if self.network.adversary is not None:
            self.modules["adversary"] = self.network.adversary
        if local is not None:
            self.modules["local"] = local
        self.tails: dict[str, nn.Module] = {}
        self.features = 0
        if tails:
            self.tails = {name: getattr(server, name)[-1] for name in STREAMS}
            self.modules["tails"] = nn.ModuleDict(self.tails)
            self.features = next(self.tails[STREAMS[0]].parameters()).shape[1]
        make = make_linear_optimiser if pooled else make_optimiser
        self.optimisers = {name: make(module, settings) for name, module in self.modules.items()}
        self._images, self._labels = frames_of(split), torch.from_numpy(split.labels)
        self.schedule = Schedule(settings, len(split))
        self.steps_done = 0
        self.random_state = torch.get_rng_state()
        self._ready: tuple[int, tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def finished(self) -> bool:
        """Whether every step was taken."""
        return self.steps_done >= self.schedule.steps

    @property
    def wanted(self) -> Tensor:
        """Labels of the step that is under way."""
        return self._wanted

    def begin(self, draw: Callable[[Sequence[int]], Tensor] | None = None) -> Exchange:
        """The released tensor of the step that is next, with noise of `draw` or, without it, of torch's generator."""
        step = self.steps_done
        if self._ready is None or self._ready[0] != step:
            torch.set_rng_state(self.random_state)
            self._ready = step, self._prepare(step)
        frames, attacked, labels = self._ready[1]
        self._activation = self.network.client(attacked)
        noised = self._settings.split.defence.noise_of(training=True) > 0
        noise = draw(self._activation.shape) if draw is not None and noised else None
        self._released = self.network.release(self._activation, noise).contiguous()
        self._frames, self._wanted = frames, labels
        self._at = self.schedule.at(step)
        return Exchange(step, self._at, self._released.detach(), labels)

    def meanwhile(self) -> None:
        """What needs no gradient from the server: the local classifier's step, and the next batch's map."""
        if "local" in self.modules:
            with self._descending("local") as weight:
                loss = F.cross_entropy(self.modules["local"](self._frames), self._wanted)
                (weight * loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.random_state = torch.get_rng_state()
        following = self.steps_done + 1
        self._ready = (following, self._prepare(following)) if following < self.schedule.steps else None

    def tail_weights(self) -> dict[str, Tensor]:
        """Weights of the last layers that live here, by their names in the server half."""
        return {
            f"{name}.{len(getattr(SplitNetwork(self._settings.split).server, name)) - 1}.{key}": tensor
            for name, layer in self.tails.items()
            for key, tensor in layer.state_dict().items()
        }

    def answer(self, features: Tensor) -> tuple[Tensor, float]:
        """Gradient at the features [B, 3, F] and the mean loss, after one step of the last layers."""
        entering = features.detach().requires_grad_()
        logits = [self.tails[name](part) for name, part in zip(STREAMS, entering.unbind(1), strict=True)]
        loss = sum((F.cross_entropy(one, self._wanted) for one in logits), torch.zeros(()))
        with self._descending("tails") as weight:
            (weight * loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        assert entering.grad is not None  # noqa: S101  # the loss depends on it
        return entering.grad / weight, loss.item()

    def end(self, gradient: Tensor) -> None:
        """Take the step with the server's gradient at the released tensor."""
        own = client_loss(self.network, self._activation, self._released, None, self._frames, self._wanted)
        names = [name for name in self.optimisers if name not in ("local", "tails")]
        with self._descending(*names) as weight:
            roots = [(self._released, weight * gradient)]
            if own.requires_grad:
                roots.append((weight * own, torch.ones(())))
            torch.autograd.backward([root for root, _ in roots], [grad for _, grad in roots])
        self.steps_done += 1
        if self.pooled:
            self.seen += len(gradient)

    def forget_ready(self) -> None:
        """Prepare the next batch anew: other weights than those that attacked it are in place."""
        self._ready = None

    @contextmanager
    def _descending(self, *names: str) -> Iterator[int]:
        """Within, gradients of the batch's mean loss, times the weight given, are made; then a step, if one is due."""
        for name in names:
            set_rate(self.optimisers[name], self._settings, self._at)
            if not self.pooled:
                self.optimisers[name].zero_grad()
        yield len(self._wanted) if self.pooled else 1
        if not self.pooled:
            for name in names:
                self.optimisers[name].step()

    def _prepare(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frames, attacked frames and labels of a step."""
        epoch, index = divmod(step, self.schedule.per_epoch)
        rows = self._order(epoch)[index * self._settings.batch : (index + 1) * self._settings.batch]
        frames = shifted(to_unit(self._images[rows]), self._settings.shift)
        return frames, self.network.attack(frames), self._labels[rows]

    def _public_order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
        return torch.randperm(len(self._labels), generator=generator)


def end_round(side: Trained) -> int:
    """One step of a pooled side along the mean gradient of the round's frames; how many these were."""
    seen = side.seen
    if seen:
        for name, module in side.modules.items():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad /= seen
            side.optimisers[name].step()
    forget_gradients(side)
    return seen


def forget_gradients(side: Trained) -> None:
    """Leave out what a pooled side has gathered in this round."""
    for optimiser in side.optimisers.values():
        optimiser.zero_grad()
    side.seen = 0


def make_optimiser(module: nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    """AdamW as the loop has it."""
    return torch.optim.AdamW(module.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)


def make_linear_optimiser(module: nn.Module, settings: RunSettings) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum and AdamW's decay; `set_rate` gives it its rate."""
    decay = settings.weight_decay / SGD_RATE
    return torch.optim.SGD(
        module.parameters(), settings.learning_rate, momentum=SGD_MOMENTUM, weight_decay=decay
    )


def set_rate(optimiser: torch.optim.Optimizer, settings: RunSettings, at: float) -> None:
    """The one-cycle learning rate at the fraction `at` of the training."""
    scale = SGD_RATE if isinstance(optimiser, torch.optim.SGD) else 1.0
    for group in optimiser.param_groups:
        group["lr"] = scale * one_cycle(settings, at)
