"""What the privacy table and the search for it measure, as data: data sets, schedules, seeds and budgets.

The attackers' budget is the quick one (half the steps of a full audit); four times as much of the strongest attack on
`sealed` is tried as well, and the table says by how much that moves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitward.audit.attacks import CEILING, QUICK
from splitward.audit.suite import NEEDS_RUN
from splitward.method.split import COMPARED, DEFENCES

CAPTURES = 8
"""Captures of each target that the averaging attacker has."""
ATTACKERS = {"none": 3, "psgl": 3, "sealed": 3}
"""Attackers' seeds for each target network; 1 for every other defence."""
TARGET_SEEDS = (0, 1, 2)
CORE = ("ridge", "neighbour", CEILING, "decoder-residual", "decoder-label-conditioned", "optimise")
"""The attacks that every defence meets, by every attacker: strong ones that take minutes. Others can be stronger."""
TIMES = 4.0
"""How much more of the strongest attack is tried."""


@dataclass(frozen=True)
class Plan:
    """One data set of a grid.

    Attributes
    ----------
    spec : str
        As `open_dataset` takes it, relative to the folder of the data sets unless it is a name.
    epochs, batch, shift, learning_rate
        Schedule of every defence alike.
    auxiliary, targets : int
        Most images of the attacker's own, and of its targets.
    seal : dict
        What of `sealed`'s settings the search chose otherwise than the profile has them.
    resplit : bool
        Whether each target seed draws its own split by patient: for small data, where one split is luck.
    variants : dict of str to dict
        Settings of `sealed` to choose from, by name. A plan with variants chooses: its test split is the validation
        split, and what was the test split is not touched.
    """

    name: str
    spec: str
    task: str | None
    size: int | None
    epochs: int
    batch: int
    shift: int
    learning_rate: float = 3e-3
    auxiliary: int = 5_000
    targets: int = 300
    seal: Mapping[str, Any] = field(default_factory=dict)
    resplit: bool = False
    variants: Mapping[str, dict[str, Any]] = field(default_factory=dict)


_DRAWN_TOGETHER = {"entropy_weight": 0.15, "spread": "frame", "captures": 8}
"""Under the noise that the mean of eight captures has left, and each frame for itself."""
_LESS_RELEASED = _DRAWN_TOGETHER | {"captures": 2, "sigma": 0.15, "training_sigma": 0.3}
"""The same training (0.15 has as much left of two captures as 0.3 of eight), released with half the noise."""
_SMALL: dict[str, dict[str, Any]] = {
    "k16_s0.3_e0.2_a0": {"entropy_weight": 0.2},
    "k16_s0.3_e0.5_a0": {"entropy_weight": 0.5},
    "k16_s0.5_e1_a0": {"sigma": 0.5, "entropy_weight": 1.0},
    "k8_s0.5_e1_a0": {"values": 8, "sigma": 0.5, "entropy_weight": 1.0},
    "k16_s0.3_e0.5_a0.3": {"entropy_weight": 0.5, "adversary_weight": 0.3},
    "k16_s0.3_e0.15_a0": {"entropy_weight": 0.15},
    "k16_s0.3_e0.1_a0": {},
    "k16_s0.3_e0.05_a0": {"entropy_weight": 0.05},
    "k16_s0.2_e0.1_a0": {"sigma": 0.2},
    "k16_s0.2_e0.05_a0": {"sigma": 0.2, "entropy_weight": 0.05},
    "k16_s0.3_e0.3_a0_class8": {"entropy_weight": 0.3, "captures": 8},
    "k16_s0.3_e0.15_a0_frame8": _DRAWN_TOGETHER,
    "k16_s0.15_e0.15_a0_frame2_t0.3": _LESS_RELEASED,
    "k16_s0.15_e0.15_a0_frame2_t0.3_n2": _LESS_RELEASED | {"steps": 2},
    "k16_s0.3_e0.1_a0_n2": {"steps": 2},
}
"""What differs from the profile, by a name that tells values, sigma, weights of the entropy term and of an adversary,
and where they are other than the profile's, spread with captures, sigma of the training, and steps."""
PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "mnist",
            "mnist",
            None,
            None,
            epochs=6,
            batch=128,
            shift=1,
            seal=_SMALL["k16_s0.15_e0.15_a0_frame2_t0.3_n2"],
        ),
        Plan("pneumoniamnist", "pneumoniamnist.npz", None, None, epochs=30, batch=64, shift=2),
        Plan("mias", "mias", "roi", 64, epochs=15, batch=32, shift=4, resplit=True),
    )
}
SEARCHES = {
    plan.name: plan
    for plan in (
        Plan("mnist", "mnist", None, None, epochs=3, batch=128, shift=1, variants=_SMALL),
        Plan("pneumoniamnist", "pneumoniamnist.npz", None, None, epochs=20, batch=64, shift=2, variants=_SMALL),
    )
}
SEARCH_ATTACKS = (CEILING, "decoder-residual", "decoder-label-conditioned", "averaging-residual")

DEFENCE_NAMES = (*DEFENCES, *COMPARED)
CONTROLS = ("label", "scores")
"""No defences: a device that sends the label, or the scores, of a classifier of its own."""


def attacker_seeds(defence: str, target_seed: int) -> tuple[int, ...]:
    """Seeds of the attackers of one target network; no two targets share one."""
    count = ATTACKERS.get(defence, 1)
    return tuple(100 * (target_seed + 1) + index for index in range(count))


def attack_names(defence: str, index: int) -> tuple[str, ...]:
    """Attacks that attacker number `index` makes on a target.

    All of them on `sealed`, and once on what it is compared with first; else `CORE`, which can only flatter the
    others. A label and a rounded score have no gradient, so that only those that need no weights work on the controls.
    """
    if defence in CONTROLS:
        return tuple(name for name in CORE if not NEEDS_RUN & set(QUICK[name].card.knows))
    if defence == "sealed" or (defence in ATTACKERS and index == 0):
        return tuple(QUICK)
    return CORE
