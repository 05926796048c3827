"""The client's guard against a server that hijacks its training (method.md, section 5, rule 8).

A label travels with each released tensor in training, so the server can compute the task's gradient, and the
client knows what that gradient depends on. For a cross entropy it is `J^T (p - e_y)`: frames of one class are
pulled one way, frames of two classes apart, from the very first batch, and the way stays the same for some
batches, as the server half changes slowly. A server that trains the client half to its own ends
(`splitward.audit.hijack`) pulls all frames alike, whatever their labels; or, if its critic is told the labels,
each class its own way, but from batch to batch another one, as a critic follows what it criticises. The guard
watches for both: how often two gradients of one class are more alike than two of different classes, over all
pairs of the last batches. This is the similarity of the gradient scrutinizer (Fu et al., NDSS 2023), by rank and
across batches. The rank (our choice; theirs combines three measures and a fit) is free of scale and needs no model
of either distribution. Across batches (ours too) is what tells honest gradients whose separation within a batch
dips, once the task is learned or where sites hold different classes, from those of a critic that is told the labels.

SplitGuard (Erdogan, Kupcu and Cicek 2022) sends batches with wrong labels instead and compares their
gradients with regular ones. That tells little before the task is half learned, and spends training on wrong
labels, so the guard does not do it. It is passive: a guarded training ends with the same weights as an
unguarded one.

What it cannot see: a server whose gradients depend on the labels as the task's do, such as one that answers with
the task's own gradient while it is watched.

numpy only: a device has no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitward.errors import HijackError


@dataclass(frozen=True)
class GuardSettings:
    """When the guard gives the alarm.

    Attributes
    ----------
    window : int
        Batches whose pairs are compared; the first alarm can come after so many.
    frames : int
        The first so many of each batch count: cost grows with their square.
    threshold : float
        Alarm below this separation. Chosen on trainings with other seeds than those of the published trial.
    """

    window: int = 8
    frames: int = 32
    threshold: float = 0.65


class GradientGuard:
    """Watches the gradients at the cut that come back to one client.

    Parameters
    ----------
    settings : GuardSettings, optional

    Attributes
    ----------
    batches : int
        Batches seen so far.
    separation : float
        Over the last batches; 1 before there are pairs of both kinds.
    """

    def __init__(self, settings: GuardSettings | None = None) -> None:
        self.settings = settings or GuardSettings()
        self.batches, self.separation = 0, 1.0
        self._rows: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._labels = self._batch = np.empty(0, np.int64)

    def state(self) -> dict[str, NDArray[Any]]:
        """What it goes by, for `resume`."""
        return {
            "rows": self._rows,
            "labels": self._labels,
            "batch": self._batch,
            "batches": np.array(self.batches),
        }

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where another guard was."""
        self._rows, self._labels, self._batch = (state[name] for name in ("rows", "labels", "batch"))
        self.batches = int(state["batches"])

    def observe(self, gradient: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> None:
        """Judge the gradient of one batch, before it is applied.

        Parameters
        ----------
        gradient : ndarray, [B, ...]
            As the server sent it, one row a frame.
        labels : ndarray of int64, [B]
            As the client sent them.

        Raises
        ------
        HijackError
            The gradients do not depend on the labels as the task's would.
        """
        settings = self.settings
        rows = gradient[: settings.frames].reshape(min(len(labels), settings.frames), -1)
        self.batches += 1
        kept = self._batch > self.batches - settings.window
        batch = np.full(len(rows), self.batches)
        self._rows = np.concatenate([self._rows.reshape(-1, rows.shape[1])[kept], rows.astype(np.float32)])
        self._labels = np.concatenate([self._labels[kept], labels[: settings.frames]])
        self._batch = np.concatenate([self._batch[kept], batch])
        separation = class_separation(self._rows, self._labels)
        self.separation = 1.0 if separation is None else separation
        if self.batches >= settings.window and self.separation < settings.threshold:
            raise HijackError(
                f"batch {self.batches}: the server's gradients separate the classes by {self.separation:.2f}, "
                f"under {settings.threshold:.2f}: they do not serve the task. Stop, and trust neither "
                "this server nor the client half that it trained."
            )


def class_separation(gradient: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> float | None:
    """How often two gradients of one class are more alike than two of different classes.

    The area under the ROC curve of the pairs' cosine similarity: 1 where every pair of one class is more
    alike than every other pair, 0.5 where the class tells nothing (rank statistic of Mann and Whitney). None
    for a batch without pairs of both kinds.
    """
    rows = gradient.reshape(len(labels), -1).astype(np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    first, second = np.triu_indices(len(labels), 1)
    alike = np.round((rows @ rows.T)[first, second], 9)  # so that equal rows tie
    same = labels[first] == labels[second]
    pairs = int(same.sum())
    if pairs in (0, len(same)):
        return None
    _, position, counts = np.unique(alike, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # ties share their mean rank
    above = ranks[position][same].sum() - pairs * (pairs + 1) / 2
    return float(above / (pairs * (len(same) - pairs)))
