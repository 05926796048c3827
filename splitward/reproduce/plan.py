"""What the privacy table measures, as data: data sets, schedules, seeds and the attackers' budgets."""

from __future__ import annotations

from dataclasses import dataclass

from splitward.method.split import COMPARED, DEFENCES

CAPTURES = 8
"""Captures of each target that the averaging attacker has."""
ATTACKERS = {"none": 3, "psgl": 3, "sealed": 3}
"""Attackers' seeds for each target network; 1 for every other defence."""
TARGET_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Plan:
    """One data set of the table.

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
    """

    name: str
    spec: str
    task: str | None
    size: int | None
    epochs: int
    batch: int
    shift: int
    learning_rate: float = 3e-3
    auxiliary: int = 10_000
    targets: int = 500
    resplit: bool = False


PLANS = {
    plan.name: plan
    for plan in (
        Plan("mnist", "mnist", None, None, epochs=8, batch=128, shift=1),
        Plan("pneumoniamnist", "pneumoniamnist.npz", None, None, epochs=30, batch=64, shift=2),
        Plan("mias", "mias", "roi", 64, epochs=40, batch=32, shift=4, resplit=True),
    )
}

DEFENCE_NAMES = (*DEFENCES, *COMPARED)


def attacker_seeds(defence: str, target_seed: int) -> tuple[int, ...]:
    """Seeds of the attackers of one target network; no two targets share one."""
    count = ATTACKERS.get(defence, 1)
    return tuple(100 * (target_seed + 1) + index for index in range(count))
