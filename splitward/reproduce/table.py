"""From the grid's ledgers to `privacy.json`, the plots and a page: no figure is typed by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from splitward.audit.attacks import QUICK
from splitward.audit.frontier import Point, draw_frontier, frontier
from splitward.audit.measure import label_floor
from splitward.errors import AuditError
from splitward.reproduce.plan import CONTROLS, TIMES
from splitward.reproduce.privacy import CERTIFICATE, MORE_BUDGET, is_current
from splitward.reproduce.privacy_page import privacy_page
from splitward.training.run import write_atomically
from splitward.versions import versions

Line = dict[str, Any]
Targets = dict[int, list[Line]]
"""Ledgers of one defence's networks, by target seed."""
COMMANDS = {
    kind: f"splitward reproduce {kind} --out docs/results --data FOLDER" for kind in ("privacy", "search")
}
_TRAINING = "training"


def read_cells(folder: Path) -> dict[str, dict[str, Targets]]:
    """Lines of every target network's ledger whose training is done: data set, defence, target seed, lines.

    Cells of an attack that was changed since are left out: they wait to be made again.

    Raises
    ------
    AuditError
        A line is damaged.
    """
    found: dict[str, dict[str, Targets]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*.jsonl")):
        try:
            _, *lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            raise AuditError(f"{path}: a line is damaged: {error}. Run the grid again.") from error
        data, rest = path.stem.split("-", 1)
        defence, seed = rest.rsplit("-", 1)
        if any(line["key"].get("cell") == _TRAINING for line in lines):
            found[data][defence][int(seed)] = [line for line in lines if is_current(line["key"])]
    return found


def make_table(folder: Path) -> dict[str, Any]:
    """The whole table, as `docs/results/privacy.json` holds it."""
    sets: dict[str, Any] = {}
    for data, defences in read_cells(folder).items():
        rows = {name: _defence(list(targets.values())) for name, targets in defences.items()}
        # Networks of other seeds have other targets, and may have another test split: only the same are compared.
        common = sorted(set.intersection(*(set(targets) for targets in defences.values())))
        points = _points(
            {name: _defence([targets[seed] for seed in common]) for name, targets in defences.items()}
            if common
            else {}
        )
        floors = _floors({seed: lines for targets in defences.values() for seed, lines in targets.items()})
        sets[data] = {
            "floors": floors,
            "undefended_accuracy": rows["none"]["accuracy"] if "none" in rows else None,
            "defences": rows,
            "failing_attacks": _failing(rows["none"], floors) if "none" in rows else [],
            "points": [asdict(point) for point in points],
            "point_seeds": common,
            "frontier": [point.name for point in frontier(points)],
            "frontier_of_defences": [
                point.name for point in frontier([one for one in points if one.name not in CONTROLS])
            ],
            "certificate": _certificate(list(defences.get("sealed", {}).values())),
        }
    return {**sets, "versions": versions()}


def _trainings(targets: Iterable[list[Line]]) -> list[Line]:
    return [line["result"] for lines in targets for line in lines if line["key"].get("cell") == _TRAINING]


def _floors(targets: Targets) -> dict[str, Any]:
    """Means over the target seeds, which draw attackers and targets; one network of each."""
    trainings = _trainings(targets.values())
    names = trainings[0]["floors"]
    return {
        name: {
            what: round(fmean(one["floors"][name][what]["mean"] for one in trainings), 5)
            for what in ("ssim", "mse")
        }
        for name in names
    }


def _defence(targets: list[list[Line]]) -> dict[str, Any]:
    """One defence: means over its target networks, and the worst attack.

    The worst is the one that gains most over what the label alone allows on the very targets that it attacked: those
    with fewer targets may have had easier ones. A deviation is that of the target networks' means, where there are two
    or more.
    """
    trainings = _trainings(targets)
    attacks = _attacks(targets, "deployed")
    off = _attacks(targets, "map off")
    accuracies = [one["test"]["decision"] for one in trainings]
    row: dict[str, Any] = {
        "accuracy": round(fmean(accuracies), 5),
        "accuracy_std": _deviation(accuracies),
        "accuracies": accuracies,
        "streams": {
            name: round(fmean(one["test"][name] for one in trainings), 5) for name in trainings[0]["test"]
        },
        "auc": round(fmean(one["auc"] for one in trainings), 5),
        "validation_accuracy": round(fmean(one["validation"]["decision"] for one in trainings), 5),
        "released_bytes": trainings[0]["released_bytes"],
        "target_seeds": len(trainings),
        "attackers": _attackers(targets),
    }
    passive = {name: one for name, one in attacks.items() if one["phase"] == "inference"}
    if passive:
        by_ssim = max(passive, key=lambda name: passive[name]["ssim"] - passive[name]["floor_ssim"])
        by_mse = min(passive, key=lambda name: passive[name]["mse"] / max(passive[name]["floor_mse"], 1e-12))
        row |= {
            "worst_ssim": passive[by_ssim]["ssim"],
            "worst_ssim_std": passive[by_ssim]["ssim_std"],
            "worst_ssim_floor": passive[by_ssim]["floor_ssim"],
            "worst_attack": by_ssim,
            "worst_attack_cells": passive[by_ssim]["cells"],
            "min_mse": passive[by_mse]["mse"],
            "min_mse_floor": passive[by_mse]["floor_mse"],
            "min_mse_attack": by_mse,
            "min_mse_attack_cells": passive[by_mse]["cells"],
            "targets": passive[by_ssim]["targets"],
            "auxiliary": trainings[0]["auxiliary"],
        }
    more = _attacks(targets, MORE_BUDGET)
    return (
        row
        | {"attacks": attacks}
        | ({"map_off": off} if off else {})
        | ({"more_budget": _moved(more, targets)} if more else {})
    )


def _moved(more: dict[str, Any], targets: Sequence[list[Line]]) -> dict[str, Any]:
    """By how much more budget moves the strongest attack's SSIM, on the cell where it was tried."""
    name, with_more = max(more.items(), key=lambda item: item[1]["ssim"])
    seeds: dict[str, dict[int, float]] = {path: {} for path in ("deployed", MORE_BUDGET)}
    for line in (line for lines in targets for line in lines if line["key"].get("attack") == name):
        if (path := line["key"]["attacked"]) in seeds:
            seeds[path][line["key"]["seed"]] = line["result"]["ssim"]["mean"]
    once = fmean(seeds["deployed"][seed] for seed in seeds[MORE_BUDGET])
    return {
        "attack": name,
        "times": TIMES,
        "ssim": round(once, 5),
        "ssim_with_more": with_more["ssim"],
        "moved": round(with_more["ssim"] - once, 5),
    }


def _attackers(targets: Sequence[list[Line]]) -> int:
    """Attackers of each target network; the fewest where they differ."""
    seeds = [
        {line["key"]["seed"] for line in lines if line["key"].get("attacked") == "deployed"}
        for lines in targets
    ]
    return min(len(one) for one in seeds)


def _attacks(targets: list[list[Line]], attacked: str) -> dict[str, Any]:
    """Each attack's figures: means over its cells, and the deviation of the target networks' means."""
    cells: dict[str, list[Line]] = defaultdict(list)
    by_target: dict[str, list[float]] = defaultdict(list)
    for lines in targets:
        own: dict[str, list[Line]] = defaultdict(list)
        for line in lines:
            if line["key"].get("attacked") == attacked:
                own[line["key"]["attack"]].append(line["result"])
        for name, found in own.items():
            cells[name] += found
            by_target[name].append(fmean(cell["ssim"]["mean"] for cell in found))
    return {
        name: {
            "phase": QUICK[name].card.phase,
            "targets": found[0]["targets"],
            "ssim": round(fmean(cell["ssim"]["mean"] for cell in found), 5),
            "ssim_std": _deviation(by_target[name]),
            "ssim_error": round(fmean(_standard_error(cell) for cell in found), 5),
            "ssim_max": round(max(cell["ssim"]["mean"] for cell in found), 5),
            "mse": round(fmean(cell["mse"]["mean"] for cell in found), 6),
            "mse_min": round(min(cell["mse"]["mean"] for cell in found), 6),
            "floor_ssim": round(fmean(label_floor(cell["floors"], "ssim") for cell in found), 5),
            "floor_mse": round(fmean(label_floor(cell["floors"], "mse") for cell in found), 6),
            "cells": len(found),
            "seconds": round(fmean(cell["seconds"] for cell in found), 1),
        }
        for name, found in cells.items()
        if name in QUICK
    }


def _deviation(values: Sequence[float]) -> float:
    return round(stdev(values), 5) if len(values) > 1 else 0.0


def _standard_error(cell: Line) -> float:
    """Of a cell's mean SSIM over its targets, whose deviation is read off the percentiles as if they were normal."""
    spread = cell["ssim"]
    return float((spread["p95"] - spread["p5"]) / (2 * 1.645) / cell["targets"] ** 0.5)


def _failing(none: dict[str, Any], floors: dict[str, Any]) -> list[str]:
    """Attacks at inference that do worse than the mean image where nothing is defended: they show nothing here."""
    return [
        name
        for name, one in none["attacks"].items()
        if one["phase"] == "inference" and one["mse"] > floors["mean_image"]["mse"]
    ]


def _certificate(targets: list[list[Line]]) -> dict[str, Any] | None:
    """The least of the sealed networks' certificates, and the attacks whose error is under that of their targets."""
    given = [line["result"] for lines in targets for line in lines if line["key"] == CERTIFICATE]
    if not given:
        return None
    broken = sorted(
        {
            line["key"]["attack"]
            for lines in targets
            for line in lines
            if _is_certified(line) and line["result"]["mse"]["mean"] < line["result"]["bound_mse"]
        }
    )
    return {
        **{
            key: round(min(one[key] for one in given), 6)
            for key in (
                "bound_mse",
                "recaptures_mse",
                "values_mse",
                "class_mean_mse",
                "trace_mse",
                "unbiased_mse",
            )
            if given[0][key] is not None
        },
        "identified": round(max(one["identified"] for one in given), 6),
        "captures_mse": {
            n: round(min(one["captures_mse"][n] for one in given), 6) for n in given[0]["captures_mse"]
        },
        "movement": given[0]["movement"],
        "networks": len(given),
        "frames": given[0]["frames"],
        "assumptions": given[0]["assumptions"],
        "broken_by": broken,
    }


def _is_certified(line: Line) -> bool:
    """Whether the certificate speaks of this attack: it knows what was released, and no gradients of a training."""
    attack = line["key"].get("attack")
    return attack is not None and "bound_mse" in line["result"] and QUICK[attack].card.phase == "inference"


def _points(rows: dict[str, Any]) -> list[Point]:
    return [
        Point(
            name,
            row["accuracy"],
            row["worst_ssim"],
            row["accuracy_std"],
            row["worst_ssim_std"],
            name == "sealed",
        )
        for name, row in rows.items()
        if "worst_ssim" in row
    ]


def write_table(out: Path, kind: str = "privacy") -> dict[str, Any]:
    """Write `KIND.json` and a plot for each data set, and the page of the privacy table; returns the table.

    What `splitward reproduce hijack` and `recaptures` left in OUT is taken into the privacy table.
    """
    table = make_table(out / kind) | {"command": COMMANDS[kind]}
    if kind == "privacy":
        table |= _fsha(sorted(out.glob("hijack*.json")))
        table |= _recaptures(out / "recaptures.json")
        write_atomically(out / "privacy.md", privacy_page(table))
    write_atomically(out / f"{kind}.json", json.dumps(table, indent=2) + "\n")
    for data, one in table.items():
        if (
            isinstance(one, dict)
            and "defences" in one
            and (points := [Point(**point) for point in one["points"]])
        ):
            floors = one["floors"]
            lines = {
                "label, best SSIM": floors["class_template"]["ssim"],
                "label, mean": floors["class_mean"]["ssim"],
            }
            (out / f"{kind}-{data}.png").write_bytes(
                draw_frontier(points, lines, f"{data}: accuracy against leakage")
            )
    return table


def _fsha(paths: Sequence[Path]) -> dict[str, Any]:
    """The hijacking trials: the figures of `sealed` against the published attack, then all of them by profile."""
    if not paths:
        return {}
    trials = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    profiles = {
        name: row
        for found in trials
        for name, row in found.items()
        if isinstance(row, dict) and "false_alarms" in row
    }
    named = ("detected", "ssim_at_detection", "false_alarms", "honest_trainings", "floor_ssim")
    short = {name: _without_curves(row) for name, row in profiles.items()}
    first = {key: short["sealed"][key] for key in named} if "sealed" in short else {}
    return {"fsha": {**first, "profiles": short, "command": "; ".join(found["command"] for found in trials)}}


def _recaptures(path: Path) -> dict[str, Any]:
    """What captures that differ tell of each sealed network, where that was measured."""
    return {"recaptures": json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}


def _without_curves(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_curves(value) if isinstance(value, dict) else value
        for key, value in row.items()
        if key != "curves"
    }
