"""What every attack is given and what it gives back.

An attack is a frozen dataclass whose fields are the attacker's budget, with a `card` and `reconstruct`. It uses of
its `Case` only what its card lists. The rules for reading its figures are in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from splitward.method.split import SplitNetwork

Knowledge = Literal[
    "released tensor",
    "several captures of one scene",
    "release law",
    "architecture of the client half",
    "client weights",
    "client runs as a black box",
    "server weights",
    "auxiliary images",
    "auxiliary labels",
    "label of the target",
    "gradient at the cut",
    "gradients of the client half",
    "training batches of the target",
]
"""What an attacker can know; the words of the threat-model cards."""


@dataclass(frozen=True)
class ThreatModel:
    """Card of one attack: who the attacker is, for the report.

    Attributes
    ----------
    name : str
        Stable key in results (`decoder-large`).
    title : str
        For people ("large convolutional decoder").
    phase : "inference" or "training"
        Whether the attacker watches a deployed device or a training.
    knows : tuple of Knowledge
    method : str
        One or two sentences: what it does.
    source : str
        Publication.
    """

    name: str
    title: str
    phase: Literal["inference", "training"]
    knows: tuple[Knowledge, ...]
    method: str
    source: str


Release = Callable[[Tensor, torch.Generator], Tensor]
"""Frames [B, C, H, W] in 0..1 to released tensors [B, *shape], exactly as a device makes them: map on, bounded, fresh
noise from the generator (a device of the attacker's own has another secret), quantised, back in real units."""


@dataclass(frozen=True)
class Case:
    """One defended network under attack.

    Attributes
    ----------
    released : Tensor, [M, *shape]
        What the devices released of the targets.
    captures : Tensor, [n, M, *shape]
        Each target captured and released n times with fresh noise; `captures[0]` is `released`.
    labels : Tensor, int64 [M]
        Labels of the targets, for attackers who know them.
    auxiliary, auxiliary_labels : Tensor, [N, C, H, W] in 0..1, int64 [N]
        The attacker's own images: not among the target's training data, no patient in common with the targets.
    classes : int
    release : Release
        The attacker's own device.
    network : SplitNetwork or None
        Weights of both halves in evaluation mode; None where only a black box is at hand.
    frames : Tensor or None, [M, C, H, W] in 0..1
        The targets themselves, from which attacks on training compute the traffic (gradients) that the attacker sees;
        no attack reads them otherwise.
    """

    released: Tensor
    captures: Tensor
    labels: Tensor
    auxiliary: Tensor
    auxiliary_labels: Tensor
    classes: int
    release: Release
    network: SplitNetwork | None
    frames: Tensor | None = None

    def first(self, count: int) -> Case:
        """The same case with its first `count` targets, for attacks that work on each target."""
        return replace(
            self,
            released=self.released[:count],
            captures=self.captures[:, :count],
            labels=self.labels[:count],
            frames=None if self.frames is None else self.frames[:count],
        )

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """[C, H, W] of what is to be reconstructed."""
        channels, height, width = self.auxiliary.shape[1:]
        return channels, height, width


class Attack(Protocol):
    """Reconstructs the targets of a case."""

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """Reconstructions of the first m <= M targets, [m, C, H, W] in 0..1; the same seed gives the same bits.

        m is M unless the attack works on each target on its own and limits their number.
        """
