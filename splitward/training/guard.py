"""The client's guard against a server that hijacks its training (method.md, section 5, rule 8).

A label travels with each released tensor in training, so the server can compute the task's gradient, and the
client knows what that gradient depends on. For a cross entropy it is `J^T (p - e_y)`: frames of one class are
pulled one way, frames of two classes apart, from the very first batch. A server that trains the client half
to its own ends (`splitward.audit.hijack`) pulls all frames alike, whatever their labels. The guard watches
for that: how often two gradients of one class are more alike than two of different classes. This is the
similarity of the gradient scrutinizer (Fu et al., NDSS 2023), by rank. The rank (our choice; theirs combines
three measures and a fit) is free of scale and needs no model of either distribution.

SplitGuard (Erdogan, Kupcu and Cicek 2022) sends batches with wrong labels instead and compares their
gradients with regular ones. That tells little before the task is half learned, and spends training on wrong
labels, so the guard does not do it. It is passive: a guarded training ends with the same weights as an
unguarded one.

Where one network is trained by sites that hold different classes, what an honest server sends them dips for some
tens of batches, though not in the first (FedSGD on MNIST dealt out by Dirichlet(0.3): to 0.78 over 8 batches). So
a site whose own labels are uneven expects less after the first batches. It goes by its labels alone: a hijacking
server would plan the training that is guarded least.

What it cannot see: a server whose gradients depend on the labels as the task's do, be it that it answers with
the task's own gradient while it is watched, or that its critic is told the labels. The latter evades the
guard where the client half is undefended, and is caught where it is sealed (`splitward.audit.hijack_trial`),
except by an uneven site if it has served the task at first.

numpy only: a device has no torch.
"""

from __future__ import annotations

from collections import deque
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
        Batches over which the separation is averaged; the first alarm can come after so many.
    threshold : float
        Alarm below this separation. Chosen on trainings with other seeds than those of the published trial.
    even : float
        A site whose labels' perplexity is under this share of the number of classes is uneven.
    early, later : int, float
        An uneven site's threshold after so many batches.
    """

    window: int = 8
    threshold: float = 0.85
    even: float = 0.75
    early: int = 16
    later: float = 0.75


class GradientGuard:
    """Watches the gradients at the cut that come back to one client.

    Parameters
    ----------
    settings : GuardSettings, optional
    perplexity : float
        Of the site's labels, by the number of classes (`even_share`).

    Attributes
    ----------
    batches : int
        Batches that could be judged so far.
    """

    def __init__(self, settings: GuardSettings | None = None, perplexity: float = 1.0) -> None:
        self.settings = settings or GuardSettings()
        self._uneven = perplexity < self.settings.even
        self.batches = 0
        self._recent: deque[float] = deque(maxlen=self.settings.window)

    @property
    def separation(self) -> float:
        """Mean over the last batches; 1 before there is any."""
        return float(np.mean(self._recent)) if self._recent else 1.0

    @property
    def threshold(self) -> float:
        """Separation below which it gives the alarm now."""
        settings = self.settings
        return settings.later if self._uneven and self.batches > settings.early else settings.threshold

    @property
    def recent(self) -> list[float]:
        """What the last batches gave, oldest first."""
        return list(self._recent)

    def resume(self, recent: list[float], batches: int) -> None:
        """Go on where another guard was."""
        self._recent.extend(recent)
        self.batches = batches

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
        separation = class_separation(gradient, labels)
        if separation is None:
            return
        self.batches += 1
        self._recent.append(separation)
        if len(self._recent) == self.settings.window and self.separation < self.threshold:
            raise HijackError(
                f"batch {self.batches}: the server's gradients separate the classes by {self.separation:.2f}, "
                f"under {self.threshold:.2f}: they do not serve the task. Stop, and trust neither "
                "this server nor the client half that it trained."
            )


def even_share(labels: NDArray[np.int64], classes: int) -> float:
    """Perplexity of the labels by the number of classes: 1 where all are as frequent, `1 / classes` for one alone."""
    shares = np.bincount(labels, minlength=classes) / max(1, len(labels))
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()) / classes)


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
