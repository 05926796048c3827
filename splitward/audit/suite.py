"""Runs attacks on a case, cell by cell: one attack with one attacker's seed.

A cell's key in the ledger names the attack, its whole budget, its seed and the path that is attacked, so that a
quick and a full audit share one ledger and never each other's figures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from tqdm import tqdm

from splitward.audit.attack import Attack, Case, Knowledge
from splitward.audit.ledger import Ledger
from splitward.audit.measure import Floors, label_floor, measure, open_floors, to_pixels
from splitward.training.run import save_tensors

Attacked = Literal["deployed", "map off", "undefended", "deployed, more budget"]
"""The path of a cell: as deployed, with the intentional attack switched off, the undefended ceiling, or as deployed
but with more of the attack's budget than the others have."""

SHOWN = 10
NEEDS_RUN: frozenset[Knowledge] = frozenset(
    {
        "architecture of the client half",
        "client weights",
        "server weights",
        "gradient at the cut",
        "gradients of the client half",
        "training batches of the target",
    }
)
"""What only a run folder has, and a bundle has not."""
NOT_RUN = "needs the run folder: a bundle holds no network that can be differentiated."


@dataclass(frozen=True)
class Cell:
    """One attack with one seed, and what came of it.

    Attributes
    ----------
    name : str
        Key of the attack.
    attack : Attack
    seed : int
    attacked : str
    status : "done", "failed" or "not run"
    result : dict
        Figures of a finished cell; else `reason`.
    shown : Path or None
        Its first reconstructions (safetensors, `images`: uint8 [n, C, H, W]).
    """

    name: str
    attack: Attack
    seed: int
    attacked: Attacked
    status: Literal["done", "failed", "not run"]
    result: dict[str, Any]
    shown: Path | None = None


def run_suite(
    case: Case,
    originals: Tensor,
    attacks: dict[str, Attack],
    ledger: Ledger,
    seeds: Iterable[int],
    *,
    attacked: Attacked = "deployed",
    progress: bool = True,
) -> list[Cell]:
    """Run every cell that the ledger does not hold, and return all of them.

    An attack that raises becomes a failed cell with its message; the others still run, and a later call tries
    it again. `KeyboardInterrupt` ends the suite, with all finished cells in the ledger.

    Parameters
    ----------
    originals : Tensor, [M, C, H, W] in 0..1
        What the attacks are measured against; they never see it.
    attacks : dict of str to Attack
    seeds : iterable of int
        The attackers' seeds.
    """
    plan = [(name, attack, seed) for name, attack in attacks.items() for seed in seeds]
    floors, cells = open_floors(case, ledger), []
    with tqdm(plan, f"attacks, {attacked}", unit="cell", disable=not progress) as bar:
        for name, attack, seed in bar:
            bar.set_postfix_str(f"{name}, seed {seed}")
            cell, fresh = _run_cell(case, originals, floors, name, attack, seed, attacked, ledger)
            cells.append(cell)
            if fresh:
                tqdm.write(describe_cell(cell))
                sys.stdout.flush()  # for whoever watches a log file
    return cells


def describe_cell(cell: Cell) -> str:
    """One line of the terminal."""
    what = f"{cell.attacked:10} {cell.name:24} seed {cell.seed}"
    if cell.status != "done":
        return f"{what}  {cell.status}: {cell.result['reason']}"
    result, floors = cell.result, cell.result["floors"]
    return (
        f"{what}  SSIM {result['ssim']['mean']:.3f} (label alone {label_floor(floors, 'ssim'):.3f})  "
        f"MSE {result['mse']['mean']:.4f} ({label_floor(floors, 'mse'):.4f})  {result['targets']} targets  "
        f"{result['seconds']:.0f} s"
    )


def _run_cell(
    case: Case,
    originals: Tensor,
    floors: Floors,
    name: str,
    attack: Attack,
    seed: int,
    attacked: Attacked,
    ledger: Ledger,
) -> tuple[Cell, bool]:
    """The cell, and whether it was run now."""
    if case.network is None and NEEDS_RUN & set(attack.card.knows):
        return Cell(name, attack, seed, attacked, "not run", {"reason": NOT_RUN}), False
    key = cell_key(name, attack, seed, attacked)
    shown = _shown_path(ledger, key)
    known = ledger.find(key)
    if known is not None and "reason" not in known and shown.exists():
        return Cell(name, attack, seed, attacked, "done", known, shown), False
    began_s = time.monotonic()
    try:
        # Only attacks on training compute from the frames: the gradients that their attacker sees.
        given = dataclasses.replace(case, frames=originals if attack.card.phase == "training" else None)
        reconstructions = attack.reconstruct(given, seed).detach()
        result = measure(reconstructions, originals, case.labels, floors)
    except Exception as error:  # noqa: BLE001  # recorded, shown, and an error at the end of the audit
        result = {"reason": f"{type(error).__name__}: {error}"}
        ledger.append(key, result)
        return Cell(name, attack, seed, attacked, "failed", result), True
    result["seconds"] = round(time.monotonic() - began_s, 1)
    # Before the ledger's line: a cell that is recorded can be shown.
    save_tensors(shown, {"images": to_pixels(reconstructions[:SHOWN])})
    ledger.append(key, result)
    return Cell(name, attack, seed, attacked, "done", result, shown), True


def cell_key(name: str, attack: Attack, seed: int, attacked: Attacked) -> dict[str, Any]:
    """What tells one cell from every other in a ledger: attack, budget, seed and path."""
    return {"attack": name, "budget": budget(attack), "seed": seed, "attacked": attacked}


def budget(attack: Attack) -> dict[str, Any]:
    """The fields of an attack, plain for JSON."""
    fields: dict[str, Any] = dataclasses.asdict(attack)  # type: ignore[call-overload]  # each is a dataclass
    return fields


def _shown_path(ledger: Ledger, key: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = ledger.path.parent / "reconstructions"
    folder.mkdir(exist_ok=True)
    return folder / f"{key['attack']}-{key['seed']}-{digest}.safetensors"
