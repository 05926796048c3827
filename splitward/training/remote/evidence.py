"""What a training that the guard stopped leaves in its folder, which cannot go on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from splitward.disk import write_whole
from splitward.errors import HijackError
from splitward.training.guard import GradientGuard


def write_evidence(
    folder: Path, guard: GradientGuard, gradient: Tensor, labels: Tensor, about: dict[str, Any]
) -> None:
    """Put the last batch's gradient and labels, and what the guard has seen, on the disk."""
    evidence = about | {
        "separation": guard.separation,
        "threshold": guard.settings.threshold,
        "at_ns": time.time_ns(),
        "gradients": "evidence.npz: of the last batch, with labels; and each class's mean directions",
    }
    last = {"gradient": gradient.numpy(), "labels": labels.numpy()}
    np.savez(folder / "evidence.npz", allow_pickle=False, **last, **guard.state())
    write_whole(folder / "evidence.json", json.dumps(evidence, indent=2).encode() + b"\n")


def refuse_evidence(folder: Path | None) -> None:
    """`HijackError` where the guard has stopped this training."""
    if folder is not None and (folder / "evidence.json").exists():
        raise HijackError(
            f"{folder / 'evidence.json'}: the guard stopped this training; its folder is evidence and cannot "
            "go on. Take part in another training with another folder."
        )
