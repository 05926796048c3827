"""The paper's own experiments, as far as its text can be had (docs/method.md, section 1).

```
OUT/paper.json   every figure, with command, seed and versions
OUT/paper.md     the same for a person, beside the paper's figures
OUT/fig3.png     error of the recovery against mu
OUT/runs/        the trained networks
```
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from splitward.data import Dataset, Split, open_dataset
from splitward.errors import TrainingError
from splitward.reproduce.paper_page import write_page
from splitward.reproduce.protocols import augment_first, shared_patients, split_by_patient_first
from splitward.reproduce.recovery_error import draw_errors, sweep_mu
from splitward.reproduce.robustness import measure_robustness
from splitward.training.loop import frames_of, to_unit, train
from splitward.training.run import Run, write_atomically
from splitward.training.settings import RunSettings, split_settings
from splitward.versions import versions

PROFILES = ("none", "psgl")
MNIST_EPOCHS, MIAS_EPOCHS = 3, 12
MIAS_TASKS, MIAS_SIZE = ("density", "severity"), 32
_SWEPT = 200
_LEAST = 64


def reproduce_paper(
    out: Path,
    *,
    mnist: bool = True,
    mias: Path | None = None,
    effort: float = 1.0,
    seed: int = 0,
    command: str = "splitward reproduce paper",
) -> dict[str, Any]:
    """Run, or go on with, the experiments in `out`; returns what `paper.json` holds.

    Parameters
    ----------
    mias : Path, optional
        Folder of the unpacked mini-MIAS archive; its part is left out by default.
    effort : float
        Multiplies epochs, the attacks' steps and, below 1, MNIST's images.

    Raises
    ------
    TrainingError
        Nothing to do, or `out` holds networks of another effort or seed.
    """
    if not 0 < effort < math.inf or not (mnist or mias):
        raise TrainingError(f"effort {effort:g}: give a positive effort, and at least one data set.")
    began_s = time.monotonic()
    curves: dict[str, list[dict[str, Any]]] = {}
    robustness: dict[str, list[dict[str, Any]]] = {}
    protocols: list[dict[str, Any]] = []
    if mnist:
        digits = shrink(open_dataset("mnist"), effort)
        runs = train_profiles(digits, "mnist", MNIST_EPOCHS, effort, seed, out / "runs" / "mnist")
        curves["mnist"] = sweep(digits, runs["psgl"], seed)
        robustness["mnist"] = measure_robustness(digits, runs, effort=effort, seed=seed)
    for task in MIAS_TASKS if mias else ():
        dataset = open_dataset(str(mias), task=task, size=MIAS_SIZE)
        rows, runs = compare_protocols(dataset, str(mias), effort, seed, out / "runs" / f"mias-{task}")
        protocols += rows
        if "mias" not in curves:
            curves["mias"] = sweep(dataset, runs["psgl"], seed)
    results = {
        "command": command,
        "effort": effort,
        "seed": seed,
        "fig3": curves,
        "robustness": robustness,
        "protocols": protocols,
        "versions": versions(),
        "wall_s": round(time.monotonic() - began_s, 1),
    }
    draw_errors(curves, out / "fig3.png")
    write_atomically(out / "paper.json", json.dumps(results, indent=2) + "\n")
    write_page(results, out / "paper.md")
    sys.stdout.write(f"{out / 'paper.md'}, {out / 'paper.json'}, {out / 'fig3.png'}\n")
    return results


def shrink(dataset: Dataset, effort: float) -> Dataset:
    """The first share `effort` of each split, but not below a few images; all of it from 1 on."""

    def first(split: Split) -> Split:
        count = max(_LEAST, round(len(split) * effort))
        return Split(split.images[:count], split.labels[:count], split.patients[:count])

    return replace(
        dataset, train=first(dataset.train), validation=first(dataset.validation), test=first(dataset.test)
    )


def train_profiles(
    dataset: Dataset, data: str, epochs: int, effort: float, seed: int, folder: Path, *, batch: int = 128
) -> dict[str, Run]:
    """A finished training for each of `PROFILES`."""
    return {
        profile: train(
            dataset,
            RunSettings(
                data=data,
                task=dataset.task,
                size=dataset.train.images.shape[-1],
                split=split_settings(dataset, profile),
                epochs=max(1, round(epochs * effort)),
                batch=batch,
                seed=seed,
            ),
            folder / profile,
        )
        for profile in PROFILES
    }


def sweep(dataset: Dataset, run: Run, seed: int) -> list[dict[str, Any]]:
    """Fig. 3 on the first test frames."""
    return sweep_mu(run.load_network(), to_unit(frames_of(dataset.test)[:_SWEPT]), seed=seed)


def compare_protocols(
    dataset: Dataset, data: str, effort: float, seed: int, folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Run]]:
    """A row for each protocol and profile, and the networks of the protocol by patient."""
    dealt = {"by patient": split_by_patient_first(dataset), "augmented first": augment_first(dataset, seed)}
    rows, kept = [], {}
    for protocol, split in dealt.items():
        at = folder / protocol.replace(" ", "-")
        runs = train_profiles(split, data, MIAS_EPOCHS, effort, seed, at, batch=32)
        kept[protocol] = runs
        counts = [int((split.test.labels == label).sum()) for label in range(len(split.classes))]
        rows.append(
            {
                "data": dataset.name,
                "task": dataset.task,
                "protocol": protocol,
                "test_images": len(split.test),
                "test_patients_in_training": shared_patients(split),
                "largest_class": max(counts) / len(split.test),
                **{profile: run.read_metrics()[-1]["test"]["decision"] for profile, run in runs.items()},
            }
        )
    return rows, kept["by patient"]
