"""Split trainings step by step, with an honest and with a hijacking server, under the client's guard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from splitward.audit.floors import class_mean_image
from splitward.audit.hijack import HijackingServer, HijackSettings, TrainingServer
from splitward.audit.metrics import mse, ssim
from splitward.data import Dataset
from splitward.errors import HijackError
from splitward.method.halves import NetworkSettings
from splitward.method.split import SplitNetwork
from splitward.training.guard import GradientGuard, GuardSettings
from splitward.training.loop import (
    NOISE_SEED,
    client_loss,
    frames_of,
    one_cycle,
    reproducible,
    server_loss,
    to_unit,
)
from splitward.training.settings import RunSettings, split_settings

BATCH = 64
TARGETS = 300
MARGIN = 0.05
"""SSIM above the class-mean floor from which a reconstruction tells more than its label."""
HONEST_SEEDS = tuple(range(20))
HIJACK_SEEDS = (0, 1, 2)
TURNS_AT = 40
TUNING_SEEDS = (100, 101, 102)
"""Seeds on which the guard's window and threshold were chosen; none of them is reported."""


class Optimiser:
    """AdamW under the one-cycle schedule of `splitward.training.loop`."""

    def __init__(self, parameters: Iterable[nn.Parameter], settings: RunSettings, steps: int) -> None:
        self._adam = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
        self._settings, self._steps, self._taken = settings, steps, 0

    def step(self, loss: Tensor) -> None:
        """One step down `loss`."""
        for group in self._adam.param_groups:
            group["lr"] = one_cycle(self._settings, self._taken / self._steps)
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._adam.step()
        self._taken += 1


class HonestServer:
    """Trains its half of the network for the task."""

    def __init__(self, network: SplitNetwork, settings: RunSettings, steps: int) -> None:
        self._server = network.server
        self._optimiser = Optimiser(network.server.parameters(), settings, steps)

    def answer(self, released: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the streams' cross entropies at the cut."""
        at_cut = released.clone().requires_grad_()
        loss = server_loss(self._server(at_cut), labels)
        (gradient,) = torch.autograd.grad(loss, at_cut, retain_graph=True)
        self._optimiser.step(loss)
        return gradient


class TurningServer:
    """Serves the task for `batches`, while it learns to hijack, and hijacks from there on."""

    def __init__(self, honest: HonestServer, hijacking: HijackingServer, batches: int) -> None:
        self._honest, self._hijacking, self._left = honest, hijacking, batches

    def answer(self, released: Tensor, labels: Tensor) -> Tensor:
        """Gradient at the cut, as the server is by now."""
        served, pulled = self._honest.answer(released, labels), self._hijacking.answer(released, labels)
        self._left -= 1
        return served if self._left >= 0 else pulled

    def reconstruct(self, released: Tensor) -> Tensor:
        """Frames [B, C, H, W], as the hijacking server makes them."""
        return self._hijacking.reconstruct(released)


class BlendingServer:
    """Serves the task and hijacks at once, the one gradient as long as the other: made against the guard."""

    def __init__(self, honest: HonestServer | FixedWays, hijacking: HijackingServer) -> None:
        self._honest, self._hijacking = honest, hijacking

    def answer(self, released: Tensor, labels: Tensor) -> Tensor:
        """Sum of both gradients at the cut."""
        served, pulled = self._honest.answer(released, labels), self._hijacking.answer(released, labels)
        return served * (_length(pulled) / _length(served)) + pulled

    def reconstruct(self, released: Tensor) -> Tensor:
        """Frames [B, C, H, W], as the hijacking server makes them."""
        return self._hijacking.reconstruct(released)


class FixedWays:
    """Pulls each class one way all along: to the guard that looks like the task, and it takes no server half."""

    def __init__(self, network: NetworkSettings) -> None:
        self._ways = torch.randn(network.classes, *network.release_shape)

    def answer(self, released: Tensor, labels: Tensor) -> Tensor:
        """Gradient at the cut."""
        return self._ways[labels].to(released)


class OneClassServer:
    """Hijacks by the frames of one class, and pulls each other class one way all along, ten times less: made against
    the guard, which cannot tell it from a server of the task."""

    SHARE = 0.1

    def __init__(self, hijacking: HijackingServer, network: NetworkSettings, label: int = 0) -> None:
        self._hijacking, self._fixed, self._label = hijacking, FixedWays(network), label

    def answer(self, released: Tensor, labels: Tensor) -> Tensor:
        """Gradient at the cut."""
        pulled = self._hijacking.answer(released, labels)
        others = labels != self._label
        ways = self._fixed.answer(released[others], labels[others])
        pulled[others] = ways * (self.SHARE * _length(pulled) / _length(ways))
        return pulled

    def reconstruct(self, released: Tensor) -> Tensor:
        """Frames [B, C, H, W], as the hijacking server makes them."""
        return self._hijacking.reconstruct(released)


class FewFramesServer:
    """Hijacks by one frame of each class in a batch, which has the whole class's length; the class's other frames are
    pulled one way all along, a thousand times less: made against a guard to which frames count alike."""

    SHARE = 1e-3

    def __init__(self, hijacking: HijackingServer, network: NetworkSettings) -> None:
        self._hijacking, self._fixed = hijacking, FixedWays(network)

    def answer(self, released: Tensor, labels: Tensor) -> Tensor:
        """Gradient at the cut."""
        pulled = self._hijacking.answer(released, labels)
        ways = self._fixed.answer(released, labels)
        sent = ways * (self.SHARE * _length(pulled) / _length(ways))
        for label in labels.unique():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            rows = (labels == label).nonzero().flatten()
            sent[rows[0]] = pulled[rows[0]] * len(rows)
        return sent

    def reconstruct(self, released: Tensor) -> Tensor:
        """Frames [B, C, H, W], as the hijacking server makes them."""
        return self._hijacking.reconstruct(released)


class TrainingClient:
    """Trains the client half by what the server answers, and by its own terms of the loss."""

    def __init__(self, network: SplitNetwork, settings: RunSettings, steps: int) -> None:
        self._network = network
        own = [weight for name, weight in network.named_parameters() if not name.startswith("server.")]
        self._optimiser = Optimiser(own, settings, steps)

    def train(self, frames: Tensor, labels: Tensor, server: TrainingServer, guard: GradientGuard) -> bool:
        """One step; returns whether the guard gave the alarm. The step is made all the same."""
        network = self._network
        activation = network.client(network.attack(frames))
        released = network.release(activation)
        gradient = server.answer(released.detach(), labels)
        try:
            guard.observe(gradient.numpy(), labels.numpy())
            alarm = False
        except HijackError:
            alarm = True
        local = network.saliency.classifier(frames) if network.saliency is not None else None
        own = client_loss(network, activation, released, local, frames, labels)
        # The sum's gradient by the released tensor is what the server answered.
        self._optimiser.step(own + (released * gradient).sum())
        return alarm


Evasion = Literal["blended", "fixed_ways", "by_one_class", "by_few_frames"]
Hijacker = HijackingServer | TurningServer | BlendingServer | OneClassServer | FewFramesServer


@dataclass
class Course:
    """One simulated training.

    Attributes
    ----------
    alarm_step : int or None
        Step of the guard's first alarm, from 1.
    separations : list of float
        What the guard saw, batch by batch, over the last batches.
    curve : list of dict
        SSIM and MSE of the malicious server's reconstructions of held-out targets; one point is the alarm's.
    """

    alarm_step: int | None = None
    separations: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def at(self, step: int) -> dict[str, float]:
        """The curve's point at `step`."""
        return next(point for point in self.curve if point["step"] == step)


def simulate(
    dataset: Dataset,
    settings: RunSettings,
    steps: int,
    *,
    hijack: HijackSettings | None = None,
    turns_at: int = 0,
    evasion: Evasion | None = None,
    guard: GuardSettings | None = None,
    every: int = 20,
) -> Course:
    """A training of `steps` batches with an honest server, or with a hijacking one.

    The guard watches from the first batch; the training goes on after its alarm, so that the curve shows what
    the alarm prevents. The server's shadow frames are the validation split, the targets come from the test
    split.

    Parameters
    ----------
    settings : RunSettings
        Network, batch, rate and seed of the client; `epochs` counts for nothing.
    turns_at : int
        Batches for which the hijacking server serves the task first.
    evasion : Evasion, optional
        How the hijacking server hides from the guard: it goes on serving the task meanwhile, it adds a fixed way of
        each class as long, or it pulls the frames of one class alone, or one frame of each class alone, its own way.
    every : int
        Steps between two points of the curve.
    """
    with reproducible(settings.seed):
        network = SplitNetwork(settings.split).train()
        client = TrainingClient(network, settings, steps)
        server = _server(network, dataset, settings, steps, hijack, turns_at, evasion)
        watch, course = GradientGuard(guard), Course()
        images, labels = frames_of(dataset.train), torch.from_numpy(dataset.train.labels)
        order = torch.randperm(len(labels))
        for step in range(1, steps + 1):
            rows = order[torch.arange((step - 1) * settings.batch, step * settings.batch) % len(order)]
            alarm = client.train(to_unit(images[rows]), labels[rows], server, watch)
            course.separations.append(watch.separation)
            first = alarm and course.alarm_step is None
            if first:
                course.alarm_step = step
            if not isinstance(server, HonestServer) and (first or step % every == 0 or step in (1, steps)):
                course.curve.append({"step": step, **_measure(server, network, dataset)})
    return course


def _server(
    network: SplitNetwork,
    dataset: Dataset,
    settings: RunSettings,
    steps: int,
    hijack: HijackSettings | None,
    turns_at: int,
    evasion: Evasion | None,
) -> HonestServer | Hijacker:
    if hijack is None:
        return HonestServer(network, settings, steps)
    shadow = to_unit(frames_of(dataset.validation))
    server = HijackingServer(settings.split, shadow, torch.from_numpy(dataset.validation.labels), hijack)
    if evasion == "fixed_ways":
        return BlendingServer(FixedWays(settings.split.network), server)
    if evasion == "blended":
        return BlendingServer(HonestServer(network, settings, steps), server)
    if evasion == "by_one_class":
        return OneClassServer(server, settings.split.network)
    if evasion == "by_few_frames":
        return FewFramesServer(server, settings.split.network)
    return TurningServer(HonestServer(network, settings, steps), server, turns_at) if turns_at else server


@torch.no_grad()
def _measure(server: Hijacker, network: SplitNetwork, dataset: Dataset) -> dict[str, float]:
    targets = to_unit(frames_of(dataset.test)[:TARGETS])
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(len(targets), *network.settings.network.release_shape, generator=generator)
    found = server.reconstruct(network.release(network.client(network.attack(targets)), noise))
    return {"ssim": float(ssim(found, targets).mean()), "mse": float(mse(found, targets).mean())}


def run_trial(
    dataset: Dataset,
    data: str,
    profile: str,
    *,
    honest_seeds: Sequence[int] = HONEST_SEEDS,
    hijack_seeds: Sequence[int] = HIJACK_SEEDS,
    honest_steps: int = 150,
    hijack_steps: int = 200,
    turns_at: int = TURNS_AT,
    hijack: HijackSettings | None = None,
) -> dict[str, Any]:
    """Honest and hijacked trainings of one profile under the guard, as plain values for JSON.

    The figures of the published attack stand at the top, those of the attacker whose critic is told the labels
    under `conditional`, those of both when they serve the task for `turns_at` batches first under `turning`, those of
    the one that is told the labels and serves the task all the while under `blended`, and those of the published attack
    with a fixed way of each class besides under `fixed_ways`, by the frames of one class under `by_one_class`, and by
    one frame of each class under `by_few_frames`.

    Parameters
    ----------
    data : str
        What `dataset` was opened from, for the run settings.
    """
    split = split_settings(dataset, profile)
    attack, floor = hijack or HijackSettings(), class_mean_ssim(dataset)

    def run(seed: int, steps: int, server: HijackSettings | None = None, **how: Any) -> Course:
        settings = RunSettings(data, dataset.task, None, split, epochs=1, batch=BATCH, seed=seed)
        return simulate(dataset, settings, steps, hijack=server, **how)

    def hijacked(told: bool, **how: Any) -> dict[str, Any]:
        server = replace(attack, conditional=told)
        return _summarise([run(seed, hijack_steps, server, **how) for seed in hijack_seeds], floor)

    def both(turns_at: int) -> dict[str, Any]:
        return {**hijacked(False, turns_at=turns_at), "conditional": hijacked(True, turns_at=turns_at)}

    honest = [run(seed, honest_steps) for seed in honest_seeds]
    lowest = min(min(course.separations[GuardSettings().first - 1 :]) for course in honest)
    return {
        "profile": profile,
        **both(0),
        "turning": {"turns_at": turns_at, **both(turns_at)},
        "blended": hijacked(True, evasion="blended"),
        "fixed_ways": hijacked(False, evasion="fixed_ways"),
        "by_one_class": hijacked(False, evasion="by_one_class"),
        "by_few_frames": hijacked(False, evasion="by_few_frames"),
        "floor_ssim": floor,
        "honest_trainings": len(honest),
        "false_alarms": sum(course.alarm_step is not None for course in honest),
        "lowest_honest_separation": lowest,
        "seeds": {"honest": list(honest_seeds), "hijacked": list(hijack_seeds), "tuning": list(TUNING_SEEDS)},
        "steps": {"honest": honest_steps, "hijacked": hijack_steps, "batch": BATCH},
        "guard": asdict(GuardSettings()),
        "hijack": asdict(attack),
    }


def _length(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).norm(dim=1).mean().clamp_min(torch.finfo(torch.float32).tiny)


def _summarise(courses: Sequence[Course], floor: float) -> dict[str, Any]:
    """Detection and reconstructions of one attacker over its seeds; the worst seed for the client counts."""
    steps = [course.alarm_step for course in courses]
    at_alarm = [course.at(step)["ssim"] for course, step in zip(courses, steps, strict=True) if step]
    detected = None not in steps
    return {
        "detected": detected,
        "detected_in_time": detected and max(at_alarm) < floor + MARGIN,
        "step_at_detection": steps,
        "ssim_at_detection": max(at_alarm) if detected else None,
        "ssim_final_without_guard": max(course.curve[-1]["ssim"] for course in courses),
        "curves": [course.curve for course in courses],
    }


def class_mean_ssim(dataset: Dataset) -> float:
    """SSIM of the class-mean image on the targets: what the label alone gives the server."""
    shadow, targets = to_unit(frames_of(dataset.validation)), to_unit(frames_of(dataset.test)[:TARGETS])
    labels = torch.from_numpy(dataset.test.labels[:TARGETS])
    guess = class_mean_image(shadow, torch.from_numpy(dataset.validation.labels), labels)
    return float(ssim(guess, targets).mean())
