"""The training loop on one machine (section IV): three cross entropies, and only the fused stream's gradient
passes the cut to the client half.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from splitward.data import Dataset, Split
from splitward.errors import TrainingError
from splitward.method.compared import distance_correlation
from splitward.method.fusion import rank_weights
from splitward.method.halves import StreamOutputs
from splitward.method.sealing import conditional_entropy
from splitward.method.split import Pass, SplitNetwork
from splitward.training.curve import plot_curve
from splitward.training.run import (
    Run,
    create_run,
    load_checkpoint,
    save_checkpoint,
    save_tensors,
    write_atomically,
)
from splitward.training.settings import RunSettings
from splitward.versions import versions

EVALUATION_BATCH = 500
NOISE_SEED = 20260101
"""Seed of the release noise in every evaluation, so that two evaluations of one network agree."""


def train(dataset: Dataset, settings: RunSettings, folder: Path, *, progress: bool = True) -> Run:
    """Train, or go on with, the run in `folder`.

    On one machine, and with as many threads, the same settings give the same bits.

    An interrupted run goes on after its last finished epoch and ends with the very weights that it would have
    had; a finished run is returned as it is.

    Raises
    ------
    TrainingError
        Fewer than two images or classes to train on; `folder` holds another run, one on other data, or a damaged
        checkpoint; or the loss stopped being finite.
    """
    if len(dataset.train) < 2 or len(np.unique(dataset.train.labels)) < 2:
        raise TrainingError(
            f"{dataset.name}: {len(dataset.train)} training image(s) of one class: there is "
            "nothing to tell apart. Give images of two classes or more."
        )
    run = create_run(folder, settings, describe(dataset))
    if run.finished:
        return run
    with reproducible(settings.seed):
        network = SplitNetwork(settings.split)
        optimiser = torch.optim.AdamW(
            network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
        )
        finished = 0
        if run.checkpoint.exists():
            finished, random_state = load_checkpoint(run, network, optimiser)
            torch.set_rng_state(random_state)
        _keep_metrics_of(run, finished)
        for epoch in range(finished, settings.epochs):
            line = _train_epoch(network, optimiser, dataset, settings, epoch, progress)
            line |= {"validation": evaluate(network, dataset.validation)}
            _append(run, line)
            save_checkpoint(run, network, optimiser, epoch + 1, torch.get_rng_state())
            plot_curve(run.read_metrics(), folder / "curve.png", settings.split.defence.profile)
        finish_run(run, network, dataset)
    return run


def describe(dataset: Dataset) -> dict[str, Any]:
    """What a reader of the run must know of its data, and of the versions that made it."""
    return {
        "name": dataset.name,
        "task": dataset.task,
        "classes": list(dataset.classes),
        "synthetic": dataset.synthetic,
        "licence": dataset.licence,
        "source": dataset.source,
        "images": {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")},
        "digest": dataset.digest(),
        "versions": versions(),
    }


def frames_of(split: Split) -> Tensor:
    """All images of a split, in their own integers: [N, C, H, W]."""
    return torch.from_numpy(split.images)


def to_unit(images: Tensor) -> Tensor:
    """float32 frames in 0..1 of uint8 or uint16 images."""
    return images.to(torch.float32) / (255 if images.dtype == torch.uint8 else 65535)


def shifted(frames: Tensor, pixels: int) -> Tensor:
    """Each frame moved by up to `pixels` in each direction, at random; its edge is repeated: [B, C, H, W]."""
    if pixels == 0:
        return frames
    count, _, height, width = frames.shape
    padded = F.pad(frames, (pixels,) * 4, mode="replicate").permute(0, 2, 3, 1)
    top, left = torch.randint(2 * pixels + 1, (2, count, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    moved = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def predict(network: SplitNetwork, split: Split) -> StreamOutputs:
    """What the server half makes of a split, with release noise from a fixed seed: [N, classes] each."""
    was_training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(NOISE_SEED)
    found = []
    for images in frames_of(split).split(EVALUATION_BATCH):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        noise = torch.randn(len(images), *network.settings.network.release_shape, generator=generator)
        found.append(network(to_unit(images), noise).outputs)
    network.train(was_training)
    return StreamOutputs(*(torch.cat(streams) for streams in zip(*found, strict=True)))


def evaluate(network: SplitNetwork, split: Split) -> dict[str, float]:
    """Accuracy of each stream and of the decision."""
    labels = torch.from_numpy(split.labels)
    return {
        name: int((scores.argmax(1) == labels).sum()) / len(labels)
        for name, scores in predict(network, split)._asdict().items()
    }


def losses(network: SplitNetwork, step: Pass, frames: Tensor, labels: Tensor) -> Tensor:
    """Everything that a training minimises: the server's loss and the client's own."""
    return server_loss(step.outputs, labels) + client_loss(
        network, step.activation, step.released, step.local_logits, frames, labels
    )


def server_loss(outputs: StreamOutputs, labels: Tensor) -> Tensor:
    """Sum of the streams' cross entropies."""
    streams = (outputs.attacked, outputs.recovered, outputs.fused)
    return sum((F.cross_entropy(logits, labels) for logits in streams), torch.zeros(()))


def client_loss(
    network: SplitNetwork,
    activation: Tensor,
    released: Tensor,
    local_logits: Tensor | None,
    frames: Tensor,
    labels: Tensor,
) -> Tensor:
    """The local classifier's cross entropy and the defence's own terms: what needs no server."""
    defence, total = network.settings.defence, torch.zeros(())
    if local_logits is not None:
        total = total + F.cross_entropy(local_logits, labels)
    if defence.entropy_weight:
        classes = network.settings.network.classes
        term = conditional_entropy(
            activation, labels, classes, defence.sigma / defence.captures**0.5, defence.spread
        )
        total = total + defence.entropy_weight * term
    if defence.correlation_weight:
        total = total + defence.correlation_weight * distance_correlation(frames, activation)
    if network.adversary is not None:
        total = total + network.adversary(released, frames)
    return total


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seeded, deterministic torch within the block; the previous state after it."""
    before, random_state = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    memory: Any = torch.utils.deterministic  # torch does not type this module
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory costs a tenth of an epoch and nothing here reads it.
    memory.fill_uninitialized_memory = False
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
        torch.set_rng_state(random_state)


def _train_epoch(
    network: SplitNetwork,
    optimiser: torch.optim.Optimizer,
    dataset: Dataset,
    settings: RunSettings,
    epoch: int,
    progress: bool,
) -> dict[str, Any]:
    """One epoch; returns its line of metrics."""
    network.train()
    images, labels = frames_of(dataset.train), torch.from_numpy(dataset.train.labels)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    batches = torch.randperm(len(labels), generator=generator).split(settings.batch)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    total_loss, right, seen, began = 0.0, 0, 0, time.monotonic()
    title = f"{settings.split.defence.profile} epoch {epoch + 1}/{settings.epochs}"
    pause_s = 0.5 if sys.stderr.isatty() else 30.0  # a log keeps every state of the bar
    with tqdm(batches, title, unit="batch", disable=not progress, mininterval=pause_s) as bar:
        for index, rows in enumerate(bar):
            if len(rows) < 2:  # batch normalisation needs two
                continue
            for group in optimiser.param_groups:
                group["lr"] = one_cycle(
                    settings, (epoch * len(batches) + index) / (settings.epochs * len(batches))
                )
            frames, wanted = shifted(to_unit(images[rows]), settings.shift), labels[rows]
            try:
                step = network(frames)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch does not type it
                # The recovery of an activation that overflowed.
                raise _diverged(epoch) from error
            loss = losses(network, step, frames, wanted)
            if not loss.isfinite():
                raise _diverged(epoch)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            total_loss += loss.item() * len(rows)
            right += int((step.outputs.decision.argmax(1) == wanted).sum())
            seen += len(rows)
            bar.set_postfix(loss=f"{total_loss / seen:.3f}", accuracy=f"{right / seen:.4f}", refresh=False)
    return {
        "epoch": epoch + 1,
        "loss": total_loss / seen,
        "accuracy": right / seen,
        "seconds": round(time.monotonic() - began, 3),
    }


def _diverged(epoch: int) -> TrainingError:
    return TrainingError(f"the loss is not finite in epoch {epoch + 1}; give a smaller --learning-rate.")


def one_cycle(settings: RunSettings, at: float) -> float:
    """Learning rate at the fraction `at` of the training: up for a fifth of it, then down to 0, both linear."""
    return settings.learning_rate * min((at + 0.01) / 0.21, (1 - at) / 0.8)


def finish_run(run: Run, network: SplitNetwork, dataset: Dataset) -> None:
    """Rank the streams on validation data, write the weights, and measure once on test data."""
    accuracies = evaluate(network, dataset.validation)
    ranked = rank_weights([accuracies[name] for name in ("attacked", "recovered", "fused")])
    network.server.get_buffer("weights").copy_(torch.tensor(ranked))
    _append(run, {"final": True, "weights": list(ranked), "test": evaluate(network, dataset.test)})
    save_tensors(run.weights, dict(network.state_dict()))
    run.checkpoint.unlink(missing_ok=True)


def _append(run: Run, line: dict[str, Any]) -> None:
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _keep_metrics_of(run: Run, epochs: int) -> None:
    """Drop the lines of epochs that will be done again, and what is no whole line."""
    lines = [line for line in run.read_metrics() if line.get("epoch", epochs + 1) <= epochs]
    write_atomically(run.metrics, "".join(json.dumps(line) + "\n" for line in lines))
