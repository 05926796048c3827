"""White-box optimisation: the frame whose release is nearest to the target's, among smooth frames.

After He, Zhang and Lee (ACSAC 2019), with what docs/method.md, section 5, asks of attacks on noised releases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from splitward.audit.attack import Case, ThreatModel
from splitward.audit.descent import descend, release_gap
from splitward.audit.metrics import mse
from splitward.method.split import SplitNetwork
from splitward.training.loop import reproducible

CARD = ThreatModel(
    name="optimise",
    title="white-box optimisation with total variation",
    phase="inference",
    knows=("released tensor", "release law", "client weights", "auxiliary images"),
    method="Gradient descent on the frame, from the auxiliary mean image, until its own release, noised afresh at "
    "every step, is nearest to the target's; total variation as the prior, weighted as is best on auxiliary frames.",
    source="He, Zhang and Lee, ACSAC 2019; noise resampled after Athalye et al., ICML 2018",
)


@dataclass(frozen=True)
class Optimise:
    """`min over x of |release(x) - z|^2 / variance + weight * TV(x)`, x in 0..1.

    Attributes
    ----------
    targets : int
        It works on the first so many targets.
    effort : float
        Multiplies `steps`.
    steps, rate : int, float
        Of the descent.
    weights : tuple of float
        Weights of the total variation to choose from; our choice.
    trials : int
        Auxiliary frames on which the weight is chosen.
    """

    targets: int = 64
    effort: float = 1.0
    steps: int = 300
    rate: float = 0.05
    weights: tuple[float, ...] = (0.003, 0.03, 0.3, 3.0)
    trials: int = 8

    @property
    def card(self) -> ThreatModel:
        """Who the attacker is."""
        return CARD

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        """[m, C, H, W] for the first m = `targets`; `ValueError` when the case has no weights."""
        network, case = weights_of(case, CARD), case.first(self.targets)
        with reproducible(seed):
            rows = torch.randperm(len(case.auxiliary))[: self.trials]
            trial = case.auxiliary[rows]
            released = case.release(trial, torch.Generator().manual_seed(seed))
            # All weights at once: the trial frames are repeated, and each copy has its own weight.
            copies, weights = len(self.weights), torch.tensor(self.weights)
            guesses = self._descend(
                network,
                case,
                released.repeat(copies, *[1] * (released.dim() - 1)),
                weights.repeat_interleave(len(rows)),
            )
            errors = torch.stack([mse(guess, trial).mean() for guess in guesses.chunk(copies)])
            best = weights[errors.argmin()]
            return self._descend(network, case, case.released, best.expand(len(case.released)))

    def _descend(self, network: SplitNetwork, case: Case, released: Tensor, weights: Tensor) -> Tensor:
        objective = release_gap(network, released, weights)
        start = case.auxiliary.mean(0).expand(len(released), -1, -1, -1)
        return descend(objective, start, steps=round(self.steps * self.effort), rate=self.rate)[0]


def weights_of(case: Case, card: ThreatModel) -> SplitNetwork:
    """The network under attack; `ValueError` for an attack that needs its weights when there are none."""
    if case.network is None:
        raise ValueError(
            f"{card.name}: needs the network's weights, and this case has only a black box; leave it out."
        )
    return case.network
