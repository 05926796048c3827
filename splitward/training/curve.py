"""The learning curve as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_curve(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss, training accuracy and each stream's validation accuracy over the epochs, written to `path`."""
    from matplotlib.figure import Figure  # here, so that only training loads matplotlib

    epochs = [line for line in metrics if "epoch" in line]
    at = [line["epoch"] for line in epochs]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(at, [line["loss"] for line in epochs], "o-", color="black")
    loss.set(title=f"{title}: training loss", xlabel="epoch", xticks=at)
    for stream in ("attacked", "recovered", "fused", "decision"):
        accuracy.plot(at, [line["validation"][stream] for line in epochs], "o-", label=stream)
    accuracy.plot(at, [line["accuracy"] for line in epochs], "k:", label="training decision")
    accuracy.set(title="validation accuracy", xlabel="epoch", xticks=at)
    accuracy.legend()
    figure.savefig(path, dpi=120)
