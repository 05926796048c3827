"""The privacy table: every defence on every data set, attacked as deployed, as a grid that can be resumed.

```
OUT/privacy/DATA-DEFENCE-SEED.jsonl  a ledger for each target network: its training, then a line for each attack
OUT/privacy.json                     the table, made from the ledgers alone
OUT/privacy-DATA.png                 the frontier of each data set
RUNS/DATA-DEFENCE-SEED/              the trained networks; they may be deleted when their cells are done
```

A finished cell is never done again, wherever the grid goes on: its ledger names the settings, not the machine.

The search for the settings of `sealed` is a grid too, of plans with variants (OUT/search/, OUT/search.json). It never
sees a test image.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitward.audit.attack import Attack, Case
from splitward.audit.attacks import MAP_OFF, QUICK
from splitward.audit.case import make_case
from splitward.audit.certificate import candidates_bound, certify
from splitward.audit.ledger import Ledger
from splitward.audit.measure import Floors, draw_floors, measure
from splitward.audit.metrics import roc_auc
from splitward.audit.suite import Attacked, cell_key
from splitward.audit.target import Target, open_target
from splitward.data import Dataset, Split, open_dataset, split_by_patient
from splitward.errors import AuditError
from splitward.method.split import SplitSettings
from splitward.reproduce.plan import (
    CAPTURES,
    DEFENCE_NAMES,
    PLANS,
    SEARCH_ATTACKS,
    TARGET_SEEDS,
    TIMES,
    Plan,
    attack_names,
    attacker_seeds,
)
from splitward.training.loop import evaluate, frames_of, predict, to_unit, train
from splitward.training.settings import RunSettings, split_settings

_BUILT_IN = ("mnist", "phantom")
TRAINING = {"cell": "training"}
CERTIFICATE = {"cell": "certificate", "captures": "alike, and such as differ"}
MORE_BUDGET: Attacked = "deployed, more budget"
"""Path of the cell in which the strongest attack has `TIMES` its budget."""
CERTIFIED_FRAMES = 2000


@dataclass(frozen=True)
class Grid:
    """Where the grid lies, and how much of it is wanted; `kind` names its folder of ledgers."""

    out: Path
    runs: Path
    data: Path
    only: Sequence[str] = tuple(PLANS)
    defences: Sequence[str] = DEFENCE_NAMES
    target_seeds: Sequence[int] = TARGET_SEEDS
    plans: Mapping[str, Plan] = field(default_factory=lambda: PLANS)
    kind: str = "privacy"


def run_grid(grid: Grid) -> None:
    """Do every cell that is not done: target seed by target seed, so that an unfinished grid is a small whole one."""
    for seed in grid.target_seeds:
        for name in grid.only:
            plan = grid.plans[name]
            for defence in ("none", *plan.variants) if plan.variants else grid.defences:
                _attack_target(grid, plan, defence, seed)


def _attack_target(grid: Grid, plan: Plan, defence: str, seed: int) -> None:
    dataset = open_plan(plan, grid.data, seed)
    settings = RunSettings(
        data=plan.spec,
        task=plan.task,
        size=plan.size,
        split=_split_settings(plan, dataset, defence),
        epochs=plan.epochs,
        batch=plan.batch,
        learning_rate=plan.learning_rate,
        shift=plan.shift,
        seed=seed,
    )
    name = f"{plan.name}-{defence}-{seed}"
    ledger = Ledger(grid.out / grid.kind / f"{name}.jsonl", {"run": settings.to_dict(), "sizes": _sizes(plan)})
    sealed = settings.split.defence.sealed
    wanted = (TRAINING, CERTIFICATE) if sealed else (TRAINING,)
    if not _waiting(plan, defence, seed, ledger) and all(ledger.find(key) for key in wanted):
        return
    began_s = time.monotonic()
    run = train(dataset, settings, grid.runs / grid.kind / name, progress=False)
    target = open_target(run.folder)
    identity = {"weights": target.fingerprint, "data_sha256": dataset.digest()}
    _check_identity(ledger, identity)
    case, originals = make_case(
        target, dataset, auxiliary=plan.auxiliary, targets=plan.targets, captures=CAPTURES, seed=seed
    )
    floors = draw_floors(case)
    if ledger.find(TRAINING) is None:
        ledger.append(TRAINING, _training(target, dataset, run.read_metrics(), case, originals, floors)
                      | identity | {"seconds": round(time.monotonic() - began_s, 1)})  # fmt: skip
    if sealed and ledger.find(CERTIFICATE) is None:
        ledger.append(CERTIFICATE, _certificate(target, dataset))
    while cells := _waiting(plan, defence, seed, ledger):
        for cell in cells:
            _run(cell, target, dataset, plan, case, originals, floors, ledger, seed)


def _check_identity(ledger: Ledger, identity: dict[str, str]) -> None:
    """`AuditError` where the cells that are done are of another network, or of other data."""
    done = ledger.find(TRAINING) or {}
    if strange := [what for what, value in identity.items() if done.get(what, value) != value]:
        raise AuditError(
            f"{ledger.path}: its cells are of another network or other data ({', '.join(strange)}). Give --runs the "
            "folder with that network and --data that data, or remove the file to begin it anew."
        )


def _split_settings(plan: Plan, dataset: Dataset, defence: str) -> SplitSettings:
    if defence == "sealed" or defence in plan.variants:
        return split_settings(dataset, "sealed", seal=dict(plan.variants.get(defence, plan.seal)))
    return split_settings(dataset, defence)


@dataclass(frozen=True)
class _Cell:
    name: str
    attack: Attack
    attacker: int
    path: Attacked = "deployed"

    @property
    def key(self) -> dict[str, Any]:
        return cell_key(self.name, self.attack, self.attacker, self.path)


def _waiting(plan: Plan, defence: str, seed: int, ledger: Ledger) -> list[_Cell]:
    """Cells that are not done. Only when all others are, it is known which attack gets more of its budget."""
    cells = list(_cells(plan, defence, seed))
    waiting = [cell for cell in cells if ledger.find(cell.key) is None]
    if waiting or defence != "sealed" or seed != TARGET_SEEDS[0]:
        return waiting
    scaled = [cell for cell in cells if cell.path == "deployed" and cell.attack.card.phase == "inference"
              and hasattr(cell.attack, "effort")]  # fmt: skip
    if not scaled:
        return []
    worst: Any = max(scaled, key=lambda cell: (ledger.find(cell.key) or {})["ssim"]["mean"])
    more = replace(worst.attack, effort=TIMES * worst.attack.effort)
    again = _Cell(worst.name, more, worst.attacker, MORE_BUDGET)
    return [] if ledger.find(again.key) else [again]


def _cells(plan: Plan, defence: str, seed: int) -> Iterator[_Cell]:
    """Every attack with every attacker's seed; those on the path without its map once a target."""
    attackers = attacker_seeds(defence, seed)[: 1 if plan.variants else None]
    for index, attacker in enumerate(attackers):
        for name in SEARCH_ATTACKS if plan.variants else attack_names(defence, index):
            yield _Cell(name, QUICK[name], attacker)
    if defence in ("psgl", "sealed"):
        for name in MAP_OFF:
            yield _Cell(name, QUICK[name], attackers[0], "map off")


def is_current(key: dict[str, Any]) -> bool:
    """Whether a cell is of the attack as it is now: one that was changed since waits to be made again."""
    if "attack" not in key:
        return True
    name, path = key["attack"], key["attacked"]
    attack: Any = QUICK.get(name)
    if path == MORE_BUDGET and attack is not None:
        attack = replace(attack, effort=TIMES * attack.effort)
    return attack is not None and key == json.loads(json.dumps(cell_key(name, attack, key["seed"], path)))


def _run(
    cell: _Cell,
    target: Target,
    dataset: Dataset,
    plan: Plan,
    case: Case,
    originals: Tensor,
    floors: Floors,
    ledger: Ledger,
    seed: int,
) -> None:
    began_s, clean = time.monotonic(), target.clean
    if cell.path == "map off":
        clean = target.unmapped.clean if target.unmapped is not None else None
        case, originals = make_case(
            target, dataset, auxiliary=plan.auxiliary, targets=plan.targets, captures=CAPTURES, seed=seed,
            map_on=False,
        )  # fmt: skip
    if cell.attack.card.phase == "training":  # only these compute from the frames: the gradients that they see
        case = replace(case, frames=originals)
    found = cell.attack.reconstruct(case, cell.attacker).detach()
    result = measure(found, originals, case.labels, floors) | {"seconds": round(time.monotonic() - began_s, 1)}
    if clean is not None:
        # The bound on the very targets that this attack worked on. Cells from before 29 November 2026 have it for an
        # attacker who does not know the label, which is higher, and so the harder to keep above.
        captures = CAPTURES if "several captures of one scene" in cell.attack.card.knows else 1
        sigma = target.law.sigma / captures**0.5
        own, labels = originals[: len(found)], case.labels[: len(found)]
        result["bound_mse"] = candidates_bound(clean(own), own, labels, sigma, seed=seed)[0]
    ledger.append(cell.key, result)
    sys.stdout.write(
        f"{ledger.path.stem} {cell.name} {cell.attacker} {cell.path}: "
        f"SSIM {result['ssim']['mean']:.3f}, MSE {result['mse']['mean']:.4f}, {result['seconds']:.0f} s\n"
    )
    sys.stdout.flush()


def _training(
    target: Target,
    dataset: Dataset,
    metrics: list[dict[str, Any]],
    case: Case,
    originals: Tensor,
    floors: Floors,
) -> dict[str, Any]:
    """What is known of a target network before any attack."""
    network = target.network
    assert network is not None  # noqa: S101  # a run folder has one
    labels = torch.from_numpy(dataset.test.labels)
    return {
        "test": metrics[-1]["test"],
        "validation": evaluate(network, dataset.validation),
        "auc": roc_auc(predict(network, dataset.test).decision, labels),
        "released_bytes": target.released_bytes,
        "images": {name: len(getattr(dataset, name)) for name in ("train", "validation", "test")},
        "auxiliary": len(case.auxiliary),
        "floors": measure(case.auxiliary[:1].expand_as(originals), originals, case.labels, floors)["floors"],
    }


def _certificate(target: Target, dataset: Dataset) -> dict[str, Any]:
    """Of a sealed network, on held-out frames."""
    held_out = dataset.validation
    frames = to_unit(frames_of(held_out)[:CERTIFIED_FRAMES])
    assert target.network is not None  # noqa: S101  # a run folder has one
    certificate = certify(target.network, frames, torch.from_numpy(held_out.labels[: len(frames)]))
    return certificate.to_dict() if certificate else {}


def open_plan(plan: Plan, data: Path, seed: int) -> Dataset:
    """The data set of a plan, split anew for each seed where the plan says so; without test images for a search."""
    spec = plan.spec if plan.spec in _BUILT_IN else str(data / plan.spec)
    dataset = open_dataset(spec, task=plan.task, size=plan.size, seed=seed if plan.resplit else 0)
    return without_test(dataset) if plan.variants else dataset


def without_test(dataset: Dataset) -> Dataset:
    """The validation split in place of the test split, and a fifth of the training patients in place of it."""
    whole = dataset.train
    kept, held = (
        Split(whole.images[rows], whole.labels[rows], whole.patients[rows])
        for rows in split_by_patient(whole.patients, whole.labels, (0.8, 0.2), seed=0)
    )
    return replace(dataset, train=kept, validation=held, test=dataset.validation)


def _sizes(plan: Plan) -> dict[str, int]:
    return {"auxiliary": plan.auxiliary, "targets": plan.targets, "captures": CAPTURES}
