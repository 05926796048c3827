"""The audit from end to end: open, attack path by path, judge, report."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from splitward.audit.attack import Attack, Case
from splitward.audit.attacks import CEILING, MAP_OFF
from splitward.audit.frontier import Point, read_points
from splitward.audit.gallery import Images
from splitward.audit.ledger import Ledger
from splitward.audit.measure import Floors, measure_floors, open_floors, to_pixels
from splitward.audit.report import describe_worst, write_report
from splitward.audit.settings import EFFORTS, AuditSettings, Effort, Sizes
from splitward.audit.suite import SHOWN, Attacked, Cell, run_suite
from splitward.audit.summary import (
    check_certificate,
    check_gates,
    infer_beyond_images,
    summarise_attacks,
    worst_case,
)
from splitward.audit.target import Target, open_target, undefended
from splitward.data import Dataset, open_dataset
from splitward.errors import AuditError, SplitwardError
from splitward.training.loop import evaluate
from splitward.training.run import open_run, write_atomically
from splitward.versions import versions
from splitward.wire.bundle import read_trusted_key

FORMAT = 1


Cells = dict[Attacked, list[Cell]]


def run_audit(settings: AuditSettings) -> int:
    """Run, or go on with, the audit in `settings.out`.

    Returns
    -------
    int
        0; 1 when a gate is broken; 2 when none is, but an attack failed, nothing was measured, or an attack
        fell below the certified bound.
    """
    began_s = time.monotonic()
    effort = EFFORTS["quick" if settings.quick else "full"]
    attacks = choose_attacks(effort.attacks, settings.attacks)
    trusted = read_trusted_key(settings.key.expanduser()) if settings.key is not None else None
    target = open_target(settings.target, trusted, variant=settings.variant)
    dataset, own_data = _open_data(target, settings)
    seeds = list(range(settings.seeds or effort.seeds))
    sizes = Sizes(settings.auxiliary or effort.auxiliary, settings.targets or effort.targets)
    case, originals = sizes.draw(target, dataset)
    if own_data:  # changed since, or split otherwise, they would have training images among the targets
        open_run(settings.target).check_data(dataset.digest())
    ledger = Ledger(settings.out / "ledger.jsonl", _shared(target, dataset, case, originals, sizes))
    cells: Cells = {
        "deployed": run_suite(case, originals, attacks, ledger, seeds),
        "map off": _map_off(target, dataset, sizes, attacks, ledger),
        "undefended": _ceiling(dataset, sizes, effort, ledger),
    }
    floors = open_floors(case, ledger)
    results = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": settings.command,
        "suite": effort.name,
        "seeds": seeds,
        "target": _describe_target(target, dataset, own_data),
        "data": _describe_data(dataset, case, own_data),
        **_judge(target, case, originals, floors, cells, settings),
        "versions": versions(),
        "wall_s": round(time.monotonic() - began_s, 1),
    }
    write_atomically(settings.out / "audit.json", json.dumps(results, indent=2) + "\n")
    write_report(
        results,
        _shown(case, originals, floors, cells),
        _points(results, settings.compare),
        settings.out / "report.html",
    )
    return _say_result(results, settings.out)


def choose_attacks(known: dict[str, Attack], names: tuple[str, ...] | None) -> dict[str, Attack]:
    """The attacks with these names, or all; `AuditError` names what is not known."""
    if names is None:
        return known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise AuditError(f"attack {', '.join(unknown)}: not known. Choose from {', '.join(known)}.")
    return {name: known[name] for name in names}


def _open_data(target: Target, settings: AuditSettings) -> tuple[Dataset, bool]:
    """The data set, and whether it is the one that the target was trained on."""
    if settings.data is None:
        if target.data is None:
            raise AuditError(f"{settings.target}: a bundle does not say where its data lies; give --data.")
        spec, task, size = target.data
        dataset, same = open_dataset(spec, task=settings.task or task, size=settings.size or size), True
    else:
        size = settings.size or target.frame_shape[-1]
        dataset = open_dataset(settings.data, task=settings.task, size=size)
        same = target.data is not None and os.path.realpath(settings.data) == os.path.realpath(target.data[0])
        if target.data is not None and not same:
            _refuse_trained_on(target.data, settings.data, dataset)
    if sorted(dataset.classes) == sorted(target.classes):  # folders sort them by name, an archive as it likes
        dataset = dataset.in_order(target.classes)
    return dataset, same


def _refuse_trained_on(own: tuple[str, str | None, int | None], given: str, dataset: Dataset) -> None:
    """`AuditError` where images to be attacked, or to attack with, are among the run's training images."""
    spec, task, size = own
    try:
        trained = {_digest(image) for image in open_dataset(spec, task=task, size=size).train.images}
    except SplitwardError:  # the run's own data is not here, and nothing can be compared
        return
    held = [*dataset.validation.images, *dataset.test.images]
    if shared := sum(_digest(image) in trained for image in held):
        raise AuditError(
            f"{given}: {shared} of its {len(held)} held-out images are among those that the run was trained on. Leave "
            "--data out, or give images that it has not seen."
        )


def _digest(image: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _shared(target: Target, dataset: Dataset, case: Case, originals: Tensor, sizes: Sizes) -> dict[str, Any]:
    """What all cells of one ledger depend on."""
    digest = hashlib.sha256()
    for tensor in (case.auxiliary, case.auxiliary_labels, originals, case.labels):
        digest.update(tensor.numpy().tobytes())
    return {
        "target": target.fingerprint,
        "defence": target.defence,
        "data": f"{dataset.name}, {dataset.task}",
        "data_sha256": digest.hexdigest(),
        "splitward": versions()["splitward"],
        **sizes._asdict(),
    }


def _map_off(
    target: Target, dataset: Dataset, sizes: Sizes, attacks: dict[str, Attack], ledger: Ledger
) -> list[Cell]:
    if target.unmapped is None:
        return []
    chosen = {name: attack for name, attack in attacks.items() if name in MAP_OFF}
    case, originals = sizes.draw(target, dataset, map_on=False)
    return run_suite(case, originals, chosen, ledger, [0], attacked="map off")


def _ceiling(dataset: Dataset, sizes: Sizes, effort: Effort, ledger: Ledger) -> list[Cell]:
    """The same attacker on the same architecture, untrained and undefended: it must be near perfect."""
    case, originals = sizes.draw(undefended(dataset), dataset)
    return run_suite(case, originals, {CEILING: effort.attacks[CEILING]}, ledger, [0], attacked="undefended")


def _judge(
    target: Target, case: Case, originals: Tensor, floors: Floors, cells: Cells, settings: AuditSettings
) -> dict[str, Any]:
    rows = summarise_attacks(cells["deployed"])
    worst = worst_case(rows)
    return {
        "worst": worst,
        "gates": check_gates(rows, settings.max_ssim, settings.min_mse),
        "floors": measure_floors(floors, originals, case.labels),
        "attacks": rows,
        "map_off": summarise_attacks(cells["map off"]),
        "ceiling": summarise_attacks(cells["undefended"]),
        "inference": infer_beyond_images(case, originals),
        "certificate": check_certificate(target, case, originals, rows),
    }


def _describe_target(target: Target, dataset: Dataset, own_data: bool) -> dict[str, Any]:
    accuracy, origin = target.accuracy, "of the decision on the test split, as recorded by the training"
    if target.network is not None and not own_data:
        accuracy, origin = evaluate(target.network, dataset.test)["decision"], "measured on the test split"
    return {
        "name": target.name,
        "kind": target.kind,
        "fingerprint": target.fingerprint,
        "defence": target.defence,
        "classes": list(target.classes),
        "frame": list(target.frame_shape),
        "released_bytes": target.released_bytes,
        "accuracy": accuracy,
        "accuracy_from": origin,
        "bundle_certificate": target.certificate,
    }


def _describe_data(dataset: Dataset, case: Case, own_data: bool) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "task": dataset.task,
        "synthetic": dataset.synthetic,
        "licence": dataset.licence,
        "source": dataset.source,
        "own": own_data,
        "auxiliary": len(case.auxiliary),
        "targets": len(case.labels),
        "captures": len(case.captures),
    }


def _shown(case: Case, originals: Tensor, floors: Floors, cells: Cells) -> dict[str, Images]:
    """Originals, floors, and each attack's reconstructions with its first seed."""
    shown = {"original": to_pixels(originals[:SHOWN]).numpy()}
    shown |= {name: to_pixels(images[case.labels[:SHOWN]]).numpy() for name, images in floors.items()}
    for attacked, group in cells.items():
        prefix = "" if attacked == "deployed" else f"{attacked}/"
        for cell in reversed(group):
            if cell.shown is not None:
                shown[prefix + cell.name] = load_file(cell.shown)["images"].numpy()
    return shown


def _points(results: dict[str, Any], compare: Path | None) -> list[Point]:
    target, worst = results["target"], results["worst"]
    points = read_points(compare, results["data"]["name"]) if compare is not None else []
    if worst is not None and target["accuracy"] is not None:
        by_seed = next(
            row["ssim_by_seed"] for row in results["attacks"] if row["name"] == worst["ssim"]["attack"]
        )
        spread = float(torch.tensor(by_seed).std()) if len(by_seed) > 1 else 0.0
        own = Point(
            target["name"], target["accuracy"], worst["ssim"]["value"], worst_ssim_std=spread, highlighted=True
        )
        points.append(own)
    return points


def _say_result(results: dict[str, Any], out: Path) -> int:
    """Say what was found; returns the exit code."""
    for gate in results["gates"]:
        state = "BROKEN" if gate["broken"] else "held"
        _say(f"gate {gate['gate']} {gate['limit']:g}: {state}, {gate['attack']} reaches {gate['value']:.4f}")
    errors = [
        f"{row['name']} failed: {'; '.join(row['reasons'])}"
        for row in results["attacks"] + results["map_off"] + results["ceiling"]
        if row["status"] == "failed"
    ]
    if results["worst"] is None:
        errors.append("no attack at inference was measured, so nothing can be said of this target.")
    else:
        _say(describe_worst(results["worst"]))
    if results["certificate"] and results["certificate"]["broken_by"]:
        errors.append(f"the certificate is broken by {', '.join(results['certificate']['broken_by'])}.")
    for error in errors:
        sys.stderr.write(f"splitward: {error}\n")
    _say(f"Report: {out / 'report.html'}, {out / 'audit.json'}")
    if any(gate["broken"] for gate in results["gates"]):
        return 1
    return 2 if errors else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
