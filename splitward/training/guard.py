"""The client's guard against a server that hijacks its training (docs/method.md, section 5, rule 8).

A label travels with each released tensor in training, so the server can compute the task's gradient, and the
client knows what that gradient depends on. For a cross entropy it is `J^T (p - e_y)`: frames of one class are
pulled one way, those of another class another way, from the very first batch, and the next batches go on so, as the
server half changes slowly. A server that trains the client half to its own ends (`splitward.audit.hijack`)
pulls all frames alike, whatever their labels; or, if its critic is told the labels, each class its own way, but
in the next batch a different one, as a critic follows what it criticises. So the guard takes the mean direction in
which each class of a batch is pulled, and watches how often those of one class are more alike, from batch to
batch, than those of two. It does so twice: once each frame counts alike, and once by its gradient's length, as it does
to the client half; else a server could hijack by a few frames of each class and outnumber them by short gradients in a
fixed way of the class. The gradient scrutinizer (Fu et al., NDSS 2023) compares frames of one batch, by three
measures and a fit; there, honest gradients look like those of a critic that is told the labels once the task is
learned, or where sites hold different classes, and in the mean over a class and across batches they do not. The rank
(ours, as are both of these) is free of scale and needs no model of either distribution.

SplitGuard (Erdogan, Kupcu and Cicek 2022) sends batches with wrong labels instead and compares their
gradients with regular ones. That tells little before the task is half learned, and spends training on wrong
labels, so the guard does not do it. It is passive: a guarded training ends with the same weights as an
unguarded one.

What it cannot see: a server whose gradients depend on the labels as the task's do, such as one that answers with
the task's own gradient while it is watched. One that adds the task's gradient to its own is seen late, and where the
client half is undefended too late (`splitward.audit.hijack_trial`); a fixed way of each class, as long as its own,
hides it as well. One that hijacks by the frames of a single class, and pulls each other class a fixed way, is not seen
at all, and reads an undefended client half; against `sealed` it gains nothing (`by_one_class` in
docs/results/hijack*.json). No threshold on lengths would tell it from an honest server: the others' gradients need not
be under a tenth of that one's, and in honest trainings two classes come to differ by more, as one is learned before
the other. Where a site has one class alone, there is nothing to compare.

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
        Batches that are compared.
    reach : int
        Each batch with so many before it: honest gradients turn in time, for example when client halves are averaged.
    first : int
        Batch with which the first alarm can come.
    threshold : float
        Alarm below this separation. Chosen on trainings with other seeds than those of the published trial.
    """

    window: int = 16
    reach: int = 3
    first: int = 8
    threshold: float = 0.8


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
        Over the last batches, by the mean directions or by the pulls, whichever is less; 1 before there are pairs of
        both kinds.
    alone : int
        Batches of two classes and more in a row of which one class alone had a gradient.
    """

    def __init__(self, settings: GuardSettings | None = None) -> None:
        self.settings = settings or GuardSettings()
        self.batches, self.separation, self.alone = 0, 1.0, 0
        self._means = self._pulls = np.empty((0, 0), np.float32)
        self._classes = self._batch = np.empty(0, np.int64)

    def state(self) -> dict[str, NDArray[Any]]:
        """What it goes by, for `resume`: mean directions and pulls, float32 [N, D], of which class and batch."""
        return {
            "means": self._means,
            "pulls": self._pulls,
            "classes": self._classes,
            "batch": self._batch,
            "batches": np.array(self.batches),
            "alone": np.array(self.alone),
        }

    def resume(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on where another guard was."""
        self._means, self._classes, self._batch = (state[name] for name in ("means", "classes", "batch"))
        self.batches = int(state["batches"])
        # Guards before this one had neither.
        self._pulls, self.alone = state.get("pulls", self._means), int(state.get("alone", 0))

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
        means, pulls, classes = class_directions(gradient, labels)
        self.batches += 1
        kept = self._batch > self.batches - settings.window
        self._means = np.concatenate([self._means.reshape(-1, means.shape[1])[kept], means])
        self._pulls = np.concatenate([self._pulls.reshape(-1, pulls.shape[1])[kept], pulls])
        self._classes = np.concatenate([self._classes[kept], classes])
        self._batch = np.concatenate([self._batch[kept], np.full(len(classes), self.batches)])
        if len(np.unique(labels)) > 1 and len(classes):
            self.alone = self.alone + 1 if len(classes) == 1 else 0
        if self.alone >= settings.window:
            raise HijackError(
                f"batch {self.batches}: for {self.alone} batches the server has sent gradients to frames of one class "
                "alone: they do not serve the task. Stop, and trust neither this server nor the client half that it "
                "trained."
            )
        found = [
            class_separation(directions, self._classes, self._batch, settings.reach)
            for directions in (self._means, self._pulls)
        ]
        self.separation = min(1.0 if separation is None else separation for separation in found)
        if self.batches >= settings.first and self.separation < settings.threshold:
            raise HijackError(
                f"batch {self.batches}: the server's gradients separate the classes by {self.separation:.2f}, "
                f"under {settings.threshold:.2f}: they do not serve the task. Stop, and trust neither this server nor "
                "the client half that it trained. Where sites hold different classes and client halves are averaged, "
                "a training may fail so by itself: make it anew with the arrangement fedsgd."
            )


def class_directions(
    gradient: NDArray[np.floating[Any]], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Mean directions and pulls of a batch's classes, both [K, D] of length 1, and the classes [K].

    To the mean direction each frame counts alike, whatever its gradient's length; the pull is the direction of the
    gradients' sum, which is what moves the client half. A class whose gradients have vanished has neither.
    """
    rows = gradient.reshape(len(labels), -1).astype(np.float64)
    alike, _ = _directions(rows)
    classes = np.unique(labels)
    members = [labels == label for label in classes]
    means, lengths = _directions(np.stack([alike[member].mean(0) for member in members]))
    pulls, _ = _directions(np.stack([rows[member].sum(0) for member in members]))
    kept = lengths > 0
    return means[kept].astype(np.float32), pulls[kept].astype(np.float32), classes[kept]


def class_separation(
    means: NDArray[np.float32], classes: NDArray[np.int64], batch: NDArray[np.int64], reach: int
) -> float | None:
    """How often two directions of one class, from different batches, are more alike than two of different classes.

    The area under the ROC curve of the pairs' cosine similarity: 1 where every pair of one class is more
    alike than every other pair, 0.5 where the class tells nothing (rank statistic of Mann and Whitney). Pairs are of
    batches that are at most `reach` apart. None without pairs of both kinds.
    """
    first, second = np.triu_indices(len(classes), 1)
    apart = batch[second] - batch[first]
    first, second = (side[(apart > 0) & (apart <= reach)] for side in (first, second))
    alike = np.round((means @ means.T)[first, second].astype(np.float64), 6)  # so that equal ones tie
    same = classes[first] == classes[second]
    pairs = int(same.sum())
    if pairs in (0, len(same)):
        return None
    _, position, counts = np.unique(alike, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # ties share their mean rank
    above = ranks[position][same].sum() - pairs * (pairs + 1) / 2
    return float(above / (pairs * (len(same) - pairs)))


def _directions(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows [N, D] of length 1, and the lengths [N] that they had."""
    lengths = np.linalg.norm(rows, axis=1)
    return rows / np.maximum(lengths, np.finfo(np.float64).tiny)[:, None], lengths
