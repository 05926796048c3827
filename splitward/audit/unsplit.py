"""UnSplit: a server that has no weights of the client half learns the half and the frames at once.

E. Erdogan, A. Kupcu, A. E. Cicek, "UnSplit: Data-Oblivious Model Inversion, Model Stealing, and Label Inference
Attacks Against Split Learning", WPES 2022 (arXiv:2108.09033), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.descent import descend, release_gap
from splitward.audit.optimise import weights_of
from splitward.method.split import SplitNetwork
from splitward.training.loop import reproducible

CARD = ThreatModel(
    name="unsplit",
    title="UnSplit: frames and a clone of the client half, from released tensors alone",
    phase="inference",
    knows=("released tensor", "release law", "architecture of the client half"),
    method="Knows the architecture but neither weights nor images: alternates between descending on the frames, with "
    "total variation, and on a clone of the client half, until the clone's releases are the observed ones. Stretches "
    "the frames to the whole range after each turn, and goes on from the best of several clones.",
    source="Erdogan, Kupcu and Cicek, WPES 2022",
)


@dataclass(frozen=True)
class UnSplit:
    """`min over frames and clone of |release(clone(x)) - z|^2 / variance + weight * TV(x)`, in turns.

    Frames and first layer could exchange contrast for weights without end, which total variation would take to grey
    frames; so the frames are stretched after each turn (our choice). Much total variation at first tells which of the
    layouts that give the same release is a picture; little of it lets the picture sharpen (our choice).

    Attributes
    ----------
    targets : int
        It works on the first so many targets, together: all of them pin the clone down.
    effort : float
        Multiplies `rounds`.
    rounds, frame_steps, clone_steps : int
        Turns, and steps of each turn.
    first_weight, last_weight : float
        Of the total variation; geometric between the two.
    trials : int
        Clones that are begun; the one with the least objective after a quarter of the turns goes on: of the layouts
        that a clone may take the frames to be in, the true one is the smoothest, and some clones have units that never
        wake.
    """

    targets: int = 64
    effort: float = 1.0
    rounds: int = 40
    frame_steps: int = 20
    clone_steps: int = 20
    first_weight: float = 1.0
    last_weight: float = 0.1
    trials: int = 8

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return CARD

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[m, C, H, W] for the first m = `targets`.

        Of `case.network` it takes the architecture alone; `ValueError` when there is none.
        """
        settings, case = weights_of(case, CARD).settings, case.first(self.targets)
        rounds = max(1, round(self.rounds * self.effort))
        weights = [
            self.first_weight * (self.last_weight / self.first_weight) ** (turn / rounds)
            for turn in range(rounds)
        ]
        with reproducible(seed):
            trials = [_Trial(SplitNetwork(settings).eval(), case) for _ in range(self.trials)]
            for trial in trials:
                trial.go_on(weights[: rounds // 4], self.frame_steps, self.clone_steps)
            best = min(trials, key=lambda trial: trial.left)
            best.go_on(weights[rounds // 4 :], self.frame_steps, self.clone_steps)
        return best.frames


class _Trial:
    """A clone, and the frames that it takes the releases for."""

    def __init__(self, clone: SplitNetwork, case: Case) -> None:
        self.frames, self.left = torch.full((len(case.released), *case.frame_shape), 0.5), float("inf")
        self._clone, self._released = clone, case.released
        self._optimiser = torch.optim.Adam(clone.parameters(), 3e-3, amsgrad=True)

    def go_on(self, weights: list[float], frame_steps: int, clone_steps: int) -> None:
        """A turn for each weight of the total variation."""
        for weight in weights:
            objective = release_gap(self._clone, self._released, weight)
            (frames,) = descend(objective, self.frames, steps=frame_steps, rate=0.02)
            self.frames = _stretch(frames)
            for _ in range(clone_steps):
                loss = objective(self.frames).mean()
                self._optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                self._optimiser.step()
            self.left = loss.item()


def _stretch(frames: Tensor) -> Tensor:
    """The same with nearly all pixels of all frames spread over 0..1; grey stays grey."""
    low, high = (
        torch.quantile(frames.flatten()[:: 1 + frames.numel() // 100_000], share) for share in (0.02, 0.99)
    )
    return frames if high - low < 1e-3 else ((frames - low) / (high - low)).clamp(0, 1)
