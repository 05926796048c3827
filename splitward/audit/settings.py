"""What an audit is asked for, and how much it measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from splitward.audit.attack import Attack, Case
from splitward.audit.attacks import FULL, QUICK
from splitward.audit.case import make_case
from splitward.audit.target import Target
from splitward.data import Dataset


@dataclass(frozen=True)
class Effort:
    """How much an audit measures: its attacks, and the sizes that the command line can replace."""

    name: str
    attacks: dict[str, Attack]
    auxiliary: int
    targets: int
    seeds: int


EFFORTS = {"quick": Effort("quick", QUICK, 5000, 200, 1), "full": Effort("full", FULL, 10000, 500, 3)}


@dataclass(frozen=True)
class AuditSettings:
    """What `splitward audit` was asked for; None leaves the effort's own, or the run's own data.

    Attributes
    ----------
    target : Path
        Run folder or bundle.
    data, task, size : str, str, int or None
        As `splitward.data.open_dataset` takes them.
    out : Path
        Folder for ledger, reconstructions, `audit.json` and `report.html`.
    attacks : tuple of str or None
        Names of the attacks to run.
    max_ssim, min_mse : float or None
        Gates on the worst attack.
    key : Path
        Public key that a bundle must be signed by.
    compare : Path or None
        Results file with other defences for the plot.
    command : str
        The command line, for the report.
    """

    target: Path
    data: str | None = None
    task: str | None = None
    size: int | None = None
    out: Path = Path("audit")
    quick: bool = False
    seeds: int | None = None
    attacks: tuple[str, ...] | None = None
    auxiliary: int | None = None
    targets: int | None = None
    max_ssim: float | None = None
    min_mse: float | None = None
    key: Path | None = None
    variant: str | None = None
    compare: Path | None = None
    command: str = "splitward audit"


class Sizes(NamedTuple):
    """Of the case; the same for the deployed path and for what stands beside it."""

    auxiliary: int
    targets: int
    captures: int = 8
    seed: int = 0

    def draw(self, target: Target, dataset: Dataset, *, map_on: bool = True) -> tuple[Case, Tensor]:
        """The case and its originals."""
        return make_case(
            target,
            dataset,
            auxiliary=self.auxiliary,
            targets=self.targets,
            captures=self.captures,
            seed=self.seed,
            map_on=map_on,
        )
