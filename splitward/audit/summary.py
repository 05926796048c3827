"""The figures of an audit from its cells: a row for each attack, the worst case, gates, and the certificate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from splitward.audit.attack import Case
from splitward.audit.certificate import ASSUMPTIONS, candidates_bound, certify
from splitward.audit.inference import ATTRIBUTE_CARD, LABEL_CARD, bright, infer
from splitward.audit.measure import label_floor
from splitward.audit.suite import Cell, budget
from splitward.audit.target import Target

INFERENCE_SEED = 1
MEASURES = ("ssim", "mse")


def summarise_attacks(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One row for each attack: its card, budget, and figures averaged over the attacker's seeds.

    `ssim_over_floor` and `mse_of_floor` compare with the best that the label alone allows on the very targets
    attacked.
    """
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell.name, []).append(cell)
    return [_row(name, group) for name, group in by_name.items()]


def _row(name: str, cells: Sequence[Cell]) -> dict[str, Any]:
    attack, done = cells[0].attack, [cell for cell in cells if cell.status == "done"]
    row: dict[str, Any] = {
        **asdict(attack.card),
        "name": name,
        "budget": budget(attack),
        "seeds": [cell.seed for cell in done],
        "status": min((cell.status for cell in cells), key=["failed", "not run", "done"].index),
        "reasons": sorted({cell.result["reason"] for cell in cells if cell.status != "done"}),
    }
    if not done:
        return row
    results = [cell.result for cell in done]
    row |= {measure: _mean([result[measure] for result in results]) for measure in MEASURES}
    row |= {f"{measure}_by_seed": [result[measure]["mean"] for result in results] for measure in MEASURES}
    row["floors"] = results[0]["floors"]
    row["targets"] = results[0]["targets"]
    row["seconds"] = round(sum(result["seconds"] for result in results), 1)
    row["ssim_over_floor"] = row["ssim"]["mean"] - label_floor(row["floors"], "ssim")
    row["mse_of_floor"] = row["mse"]["mean"] / max(label_floor(row["floors"], "mse"), 1e-12)
    return row


def _mean(spreads: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(spread[key] for spread in spreads) / len(spreads) for key in spreads[0]}


def worst_case(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """The attacks at inference that gain most over what the label allows on the targets that they attacked, by SSIM and
    by MSE; None where none was done.

    An attack with fewer targets may have had easier ones, so that its figure alone says little. Attacks during training
    are reported apart (docs/method.md, section 5, rule 8).
    """
    known = _done_at_inference(rows)
    if not known:
        return None
    chosen = {
        "ssim": max(known, key=lambda row: row["ssim_over_floor"]),
        "mse": min(known, key=lambda row: row["mse_of_floor"]),
    }
    return {
        measure: {
            "attack": row["name"],
            "value": row[measure]["mean"],
            "floor": label_floor(row["floors"], measure),
            "targets": row["targets"],
        }
        for measure, row in chosen.items()
    }


def check_gates(
    rows: Sequence[dict[str, Any]], max_ssim: float | None, min_mse: float | None
) -> list[dict[str, Any]]:
    """The gates that were given: limit, value, attack, and whether it is broken. No attack at inference may do that."""
    known, gates = _done_at_inference(rows), []
    for gate, measure, limit, extreme in (
        ("max_ssim", "ssim", max_ssim, max),
        ("min_mse", "mse", min_mse, min),
    ):
        if limit is None or not known:
            continue
        value, attack = extreme((row[measure]["mean"], row["name"]) for row in known)
        broken = not (value <= limit if measure == "ssim" else value >= limit)
        gates.append({"gate": gate, "limit": limit, "value": value, "attack": attack, "broken": broken})
    return gates


def _done_at_inference(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["phase"] == "inference" and "ssim" in row]


def infer_beyond_images(case: Case, originals: Tensor) -> list[dict[str, Any]]:
    """What the released tensors tell without an image: the label, and one attribute beyond it."""
    released = case.release(case.auxiliary, torch.Generator().manual_seed(INFERENCE_SEED))
    known, wanted = case.auxiliary_labels, case.labels
    found = {LABEL_CARD: infer(released, known, case.released, wanted)}
    attribute = bright(case.auxiliary, known, case.auxiliary, known)
    sought = bright(originals, wanted, case.auxiliary, known)
    found[ATTRIBUTE_CARD] = infer(released, attribute, case.released, sought, (known, wanted))
    what = {LABEL_CARD: "the class", ATTRIBUTE_CARD: "brighter than the median of its class"}
    return [{**asdict(card), **asdict(one), "of": what[card]} for card, one in found.items()]


def check_certificate(
    target: Target, case: Case, originals: Tensor, rows: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """The certificate for these targets, and which attacks fall below it; None where no noise is released.

    Each attack is held against the bound for the very targets that it attacked and for as many captures of a
    scene as it was given. A bundle has no weights to differentiate: it gets the bound without a Jacobian.
    """
    if target.clean is None or target.law.sigma == 0:
        return None
    clean = target.clean(originals)
    stated: dict[str, Any] = {"assumptions": list(ASSUMPTIONS)}
    if target.network is not None:
        certificate = certify(target.network, originals, case.labels)
        stated |= certificate.to_dict() if certificate is not None else {}
    stated["bound_mse"], _ = candidates_bound(clean, originals, case.labels, target.law.sigma)
    bounds: dict[tuple[int, int], float] = {}
    checked = []
    for row in rows:
        if row["phase"] != "inference" or "mse" not in row:
            continue
        captures = len(case.captures) if "several captures of one scene" in row["knows"] else 1
        key = (row["targets"], captures)
        if key not in bounds:
            sigma = target.law.sigma / captures**0.5
            own = (clean[: key[0]], originals[: key[0]], case.labels[: key[0]])
            bounds[key], _ = candidates_bound(*own, sigma)
        mse = row["mse"]["mean"]
        checked.append(
            {"attack": row["name"], "targets": key[0], "captures": captures, "mse": mse,
             "bound_mse": bounds[key], "broken": mse < bounds[key]}
        )  # fmt: skip
    stated["attacks"] = checked
    stated["broken_by"] = [one["attack"] for one in checked if one["broken"]]
    return stated
