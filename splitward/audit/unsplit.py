"""UnSplit: a server that has no weights of the client half learns the half and the frames at once.

E. Erdogan, A. Kupcu, A. E. Cicek, "UnSplit: Data-Oblivious Model Inversion, Model Stealing, and Label Inference
Attacks Against Split Learning", WPES 2022 (arXiv:2108.09033), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.descent import activation_of, descend, total_variation
from splitward.audit.optimise import weights_of
from splitward.method.split import SplitNetwork
from splitward.training.loop import reproducible

CARD = ThreatModel(
    name="unsplit",
    title="UnSplit: frames and a clone of the client half, from released tensors alone",
    phase="inference",
    knows=("released tensor", "release law", "architecture of the client half"),
    method="Knows the architecture but neither weights nor images: alternates between descending on the frames, with "
    "total variation, and on a clone of the client half, until the clone's releases are the observed ones.",
    source="Erdogan, Kupcu and Cicek, WPES 2022",
)


@dataclass(frozen=True)
class UnSplit:
    """`min over frames and clone of |release(clone(x)) - z|^2 / variance + weight * TV(x)`, in turns.

    Attributes
    ----------
    targets : int
        It works on the first so many targets, together: all of them pin the clone down.
    effort : float
        Multiplies `rounds`.
    rounds, frame_steps, clone_steps : int
        Turns, and steps of each turn.
    weight : float
        Of the total variation.
    """

    targets: int = 64
    effort: float = 1.0
    rounds: int = 20
    frame_steps: int = 20
    clone_steps: int = 20
    weight: float = 0.1

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return CARD

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[m, C, H, W] for the first m = `targets`.

        Of `case.network` it takes the architecture alone; `ValueError` when there is none.
        """
        settings, case = weights_of(case, CARD).settings, case.first(self.targets)
        variance = case.released.var(0).mean().clamp_min(1e-12)
        with reproducible(seed):
            clone = SplitNetwork(settings).eval()
            optimiser = torch.optim.Adam(clone.parameters(), 1e-3, amsgrad=True)
            frames = torch.full((len(case.released), *case.frame_shape), 0.5)

            def objective(frames: Tensor) -> Tensor:
                gap = clone.release(activation_of(clone, frames)) - case.released
                misfit = gap.square().flatten(1).mean(1) / variance
                return misfit + self.weight * total_variation(frames)

            for _ in range(round(self.rounds * self.effort)):
                (frames,) = descend(objective, frames, steps=self.frame_steps, rate=0.02)
                for _ in range(self.clone_steps):
                    optimiser.zero_grad()
                    objective(frames).mean().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    optimiser.step()
        return frames
