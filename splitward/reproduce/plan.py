"""What the privacy table and the search for it measure, as data: data sets, schedules, seeds and budgets.

The attackers' budget is the quick one (half the steps of a full audit); four times as much of the strongest attack on
`sealed` is tried as well, and the table says by how much that moves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitward.audit.attacks import CEILING, QUICK
from splitward.method.sealing import Spread
from splitward.method.split import COMPARED, DEFENCES

CAPTURES = 8
"""Captures of each target that the averaging attacker has."""
ATTACKERS = {"none": 3, "psgl": 3, "sealed": 3}
"""Attackers' seeds for each target network; 1 for every other defence."""
TARGET_SEEDS = (0, 1, 2)
CORE = ("ridge", "neighbour", CEILING, "decoder-residual", "decoder-label-conditioned", "optimise")
"""The attacks that come out strongest."""
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
    resplit: bool = False
    variants: Mapping[str, dict[str, Any]] = field(default_factory=dict)


PLANS = {
    plan.name: plan
    for plan in (
        Plan("mnist", "mnist", None, None, epochs=6, batch=128, shift=1),
        Plan("pneumoniamnist", "pneumoniamnist.npz", None, None, epochs=30, batch=64, shift=2),
        Plan("mias", "mias", "roi", 64, epochs=15, batch=32, shift=4, resplit=True),
    )
}


def _variants(*rows: tuple[int, float, float, float, Spread, int]) -> dict[str, dict[str, Any]]:
    names = ("values", "sigma", "entropy_weight", "adversary_weight", "spread", "captures")
    return {
        f"k{row[0]}_s{row[1]:g}_e{row[2]:g}_a{row[3]:g}"
        + ("" if row[4:] == ("class", 1) else f"_{row[4]}{row[5]}"): dict(zip(names, row, strict=True))
        for row in rows
    }


_SMALL = _variants(
    (16, 0.3, 0.2, 0.0, "class", 1),
    (16, 0.3, 0.5, 0.0, "class", 1),
    (16, 0.5, 1.0, 0.0, "class", 1),
    (8, 0.5, 1.0, 0.0, "class", 1),
    (16, 0.3, 0.5, 0.3, "class", 1),
    (16, 0.3, 0.15, 0.0, "class", 1),
    (16, 0.3, 0.1, 0.0, "class", 1),
    (16, 0.3, 0.05, 0.0, "class", 1),
    (16, 0.2, 0.1, 0.0, "class", 1),
    (16, 0.2, 0.05, 0.0, "class", 1),
    (16, 0.3, 0.1, 0.0, "class", 8),
    (16, 0.3, 0.3, 0.0, "class", 8),
    (16, 0.3, 0.05, 0.0, "frame", 8),
    (16, 0.3, 0.15, 0.0, "frame", 8),
)
SEARCHES = {
    plan.name: plan
    for plan in (
        Plan("mnist", "mnist", None, None, epochs=3, batch=128, shift=1, variants=_SMALL),
        Plan("pneumoniamnist", "pneumoniamnist.npz", None, None, epochs=20, batch=64, shift=2, variants=_SMALL),
    )
}
SEARCH_ATTACKS = (CEILING, "decoder-residual", "decoder-label-conditioned", "averaging-residual")

DEFENCE_NAMES = (*DEFENCES, *COMPARED)


def attacker_seeds(defence: str, target_seed: int) -> tuple[int, ...]:
    """Seeds of the attackers of one target network; no two targets share one."""
    count = ATTACKERS.get(defence, 1)
    return tuple(100 * (target_seed + 1) + index for index in range(count))


def attack_names(defence: str, index: int) -> tuple[str, ...]:
    """Attacks that attacker number `index` makes on a target.

    All of them on `sealed`, and once on what it is compared with first; else the strongest, which can only flatter
    the others.
    """
    if defence == "sealed" or (defence in ATTACKERS and index == 0):
        return tuple(QUICK)
    return CORE
