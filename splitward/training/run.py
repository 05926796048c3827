"""A run folder: settings, weights, checkpoint and metrics of one training run. Never a pickle.

```
RUN/run.json                what was trained, on what, with which versions
RUN/checkpoint.safetensors  weights, optimiser and random state after the last finished epoch
RUN/weights.safetensors     the trained network; its presence says that training finished
RUN/metrics.jsonl           one line an epoch, and a last one with the test metrics
RUN/curve.png               learning curve
```
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from splitward.disk import write_whole
from splitward.errors import TrainingError
from splitward.method.split import SplitNetwork
from splitward.training.settings import RunSettings


@dataclass(frozen=True)
class Run:
    """A run folder and what it is about; `card` holds the data set's description, its digest and the versions."""

    folder: Path
    settings: RunSettings
    card: dict[str, Any]

    @property
    def weights(self) -> Path:
        """The trained network."""
        return self.folder / "weights.safetensors"

    @property
    def checkpoint(self) -> Path:
        """Where an interrupted training goes on."""
        return self.folder / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """Metrics as JSON lines."""
        return self.folder / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether the training ran to its end."""
        return self.weights.exists()

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of the metrics; `TrainingError` where one of them is damaged.

        A last line without its end is no line: the training was killed while it was written.
        """
        if not self.metrics.exists():
            return []
        try:
            whole, _, _ = self.metrics.read_text(encoding="utf-8").rpartition("\n")
            lines = [json.loads(line) for line in whole.splitlines()]
            if self.finished and not (lines and "test" in lines[-1]):
                raise ValueError("the test metrics of a finished run are missing")
        except ValueError as error:
            raise TrainingError(
                f"{self.metrics}: is damaged ({error}). Train again, with another --out."
            ) from error
        return lines

    def check_data(self, digest: str) -> None:
        """Refuse data with another `Dataset.digest` than the run's: `TrainingError`.

        The runs of earlier versions have none in their card, and take any data.
        """
        if self.card.get("digest", digest) != digest:
            raise TrainingError(
                f"{self.folder}: {self.settings.data} is not what this run was trained on: it has changed since, or "
                "other versions read it otherwise. Put the data back, or train again with another --out."
            )

    def load_network(self) -> SplitNetwork:
        """The trained network, ready for inference; `TrainingError` when training has not finished or it is damaged."""
        if not self.finished:
            raise TrainingError(
                f"{self.folder}: its training has not finished. Run the same train command again."
            )
        network = SplitNetwork(self.settings.split)
        try:
            network.load_state_dict(load_file(self.weights))
        except (SafetensorError, RuntimeError) as error:
            raise TrainingError(
                f"{self.weights}: is damaged, or another network's. Train again, with another --out."
            ) from error
        return network.eval()


def create_run(folder: Path, settings: RunSettings, card: dict[str, Any]) -> Run:
    """Make the run folder, or find in it the same run to go on with.

    Raises
    ------
    TrainingError
        The folder holds a run with other settings or on other data: nothing is overwritten.
    """
    if (folder / "run.json").exists():
        run = open_run(folder)
        if run.settings != settings:
            raise TrainingError(
                f"{folder}: holds a run with other settings. Give another --out, or delete the folder."
            )
        run.check_data(card["digest"])
        return run
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": settings.to_dict(), "card": card}, indent=2) + "\n"
    write_atomically(folder / "run.json", text)
    return Run(folder, settings, card)


def open_run(folder: Path) -> Run:
    """The run in `folder`; `TrainingError` when there is none or it cannot be read."""
    try:
        values = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return Run(folder, RunSettings.from_dict(values["settings"]), values["card"])
    except FileNotFoundError:
        raise TrainingError(
            f"{folder}: is not a run folder (it has no run.json). `splitward train` makes one."
        ) from None
    except TrainingError as error:
        raise TrainingError(f"{folder / 'run.json'}: {error} Train again.") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{folder / 'run.json'}: cannot be used: {error!r}. Train again.") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` as a whole or not at all; others may read it."""
    write_whole(path, text.encode(), 0o644)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors atomically; `TrainingError` where they cannot be written, as on a full disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except SafetensorError as error:
        raise TrainingError(f"{path}: cannot be written: {error}. The same command again goes on.") from error
    partial.replace(path)


def save_checkpoint(
    run: Run, network: SplitNetwork, optimiser: torch.optim.Optimizer, epoch: int, random_state: torch.Tensor
) -> None:
    """Everything that the next epoch depends on."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": tensor for name, tensor in state.items()}
    save_tensors(run.checkpoint, tensors | {"random_state": random_state}, {"epoch": str(epoch)})


def load_checkpoint(
    run: Run, network: SplitNetwork, optimiser: torch.optim.Optimizer
) -> tuple[int, torch.Tensor]:
    """Restore what `save_checkpoint` wrote; returns the number of finished epochs and the random state."""
    try:
        with safe_open(run.checkpoint, "pt") as file:
            epoch = int(file.metadata()["epoch"])
        tensors = load_file(run.checkpoint)
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{run.checkpoint}: is damaged ({error}). Delete it to begin this run again."
        ) from error
    network.load_state_dict(
        {name.removeprefix("network."): t for name, t in tensors.items() if name.startswith("network.")}
    )
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    return epoch, tensors["random_state"]
