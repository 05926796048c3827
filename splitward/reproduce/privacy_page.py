"""The page beside `privacy.json`: the tables for a person, each with what it may not be read as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from splitward.reproduce.paper_page import table
from splitward.reproduce.plan import CONTROLS, PLANS, TARGET_SEEDS, Plan, attack_names, attacker_seeds

UNEVEN = 0.05
"""Deviation of a defence's accuracies over which the page tells each of them."""
_READ = """\
How to read them: docs/method.md. `worst SSIM` and `least MSE` are those of the attack at inference that gains most over
what the label alone allows on its targets, which stands in brackets; means over target networks and attackers, ± the
standard deviation of the networks' means where there are two or more. The floors need nothing but the label: the mean
image of each class, for SSIM the image of each class that was drawn to have the highest (an attacker who knows the
label sends that one), and the mean of all images, of which the best counts. No accurate classifier can leak less.
`sealed` is attacked by every attack with every attacker's seed, `none` and `psgl` by every attack once a network and by
six of them (`CORE` in `reproduce/plan.py`) with the other seeds, the others by these six: a defence that was attacked
less can only look better. Where the worst attack was made by fewer attackers than the row has, its cells are counted
behind it. Attacks on training are in `privacy.json`, apart.
"""


def privacy_page(results: dict[str, Any]) -> str:
    """Markdown of `results`, as `privacy.json` holds them."""
    parts = [
        "# Privacy of every defence, attacked as deployed\n",
        f"Command: `{results['command']}`. Figures: `privacy.json`, made from the ledgers in `privacy/`.\n",
        _READ,
    ]
    for name, plan in PLANS.items():
        if name in results:
            parts.append(_data_set(name, results[name], _schedule(plan)))
            parts += _recaptured(
                name, results[name]["defences"].get("sealed", {}), results.get("recaptures", {})
            )
    if fsha := results.get("fsha"):
        parts.append(_fsha(fsha))
    return "\n".join(parts)


def _schedule(plan: Plan) -> str:
    """How the networks were trained."""
    schedule = f"{plan.epochs} epochs, batch {plan.batch}"
    if not plan.seal:
        return schedule
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in plan.seal.items())
    return f"{schedule}; *sealed* with `{options}`, chosen on validation images (`search.json`)"


SHOWN = {
    "mnist": "MNIST, 28x28",
    "pneumoniamnist": "PneumoniaMNIST, 28x28",
    "mias": "mini-MIAS regions, 64x64",
}
CONTRASTED = {
    "none": "none",
    "sealed": "**sealed**",
    "label": "the device sends its own label",
    "scores": "the device sends its own scores",
}
_EVASIONS = {
    "fixed_ways": "as published, and a fixed way of each class besides",
    "by_one_class": "by the frames of one class",
    "by_few_frames": "by one frame of each class in a batch",
}


def readme_table(results: dict[str, Any]) -> str:
    """The table of the README: *sealed* between what it protects from and what label or scores alone would do."""
    header = (
        "data",
        "defence",
        "accuracy %",
        "AUC",
        "worst SSIM (label)",
        "least MSE (label)",
        "bytes",
        "networks",
    )
    cells = [
        (
            shown if defence == "none" else "",
            words,
            f"{100 * row['accuracy']:.2f}",
            f"{row['auc']:.3f}",
            f"{row['worst_ssim']:.3f} ({row['worst_ssim_floor']:.3f})",
            f"{row['min_mse']:.4f} ({row['min_mse_floor']:.4f})",
            str(row["released_bytes"]),
            str(row["target_seeds"]),
        )
        for data, shown in SHOWN.items()
        for defence, words in CONTRASTED.items()
        if (row := results[data]["defences"].get(defence))
    ]
    return table(header, cells)


def _data_set(name: str, found: dict[str, Any], schedule: str) -> str:
    rows, floors = (
        {name: row for name, row in found["defences"].items() if "worst_ssim" in row},
        found["floors"],
    )
    cells = [
        (
            defence,
            _percent(row["accuracy"], row["accuracy_std"]),
            f"{row['auc']:.4f}",
            _spread(row["worst_ssim"], row["worst_ssim_std"], 3) + f" ({row['worst_ssim_floor']:.3f})",
            _made_by(row, "worst_attack"),
            f"{row['min_mse']:.4f} ({row['min_mse_floor']:.4f})",
            _made_by(row, "min_mse_attack"),
            str(row["released_bytes"]),
            f"{row['target_seeds']} x {row['attackers']}",
        )
        for defence, row in sorted(rows.items(), key=lambda item: item[1]["worst_ssim"])
    ]
    header = (
        "defence",
        "accuracy %",
        "AUC",
        "worst SSIM",
        "by",
        "least MSE",
        "by",
        "bytes",
        "targets x attackers",
    )
    missing = [defence for defence, row in rows.items() if not _is_whole(defence, row["attacks"])]
    lines = [
        f"## {name}\n",
        f"![Accuracy against leakage](privacy-{name}.png)\n",
        f"{schedule}; {_counts(rows)}.\n",
        table(header, cells),
        "\nFloors: " + "; ".join(
            f"{floor.replace('_', ' ')} SSIM {one['ssim']:.3f}, MSE {one['mse']:.4f}" for floor, one in floors.items()
        ) + f". On the frontier of networks {', '.join(map(str, found['point_seeds']))}, which all rows have: "
        f"{', '.join(found['frontier'])}; without the controls {_named(CONTROLS)}: "
        f"{', '.join(found['frontier_of_defences'])}.\n",
    ]  # fmt: skip
    if missing:
        lines.append(
            f"Not complete: {', '.join(missing)} with fewer than {len(TARGET_SEEDS)} targets, or fewer attacks or "
            "attackers than planned. The same command goes on.\n"
        )
    if uneven := [f"{name}: {_each(row)}" for name, row in rows.items() if row["accuracy_std"] > UNEVEN]:
        lines.append(f"Networks that learned unlike (accuracy of each): {'; '.join(uneven)}.\n")
    if failing := found["failing_attacks"]:
        lines.append(
            f"Of the attacks, {', '.join(failing)} did worse than the mean image on *none*, where nothing is defended: "
            "at this budget they show nothing here.\n"
        )
    if sealed := rows.get("sealed"):
        lines.append(_sealed(sealed, found["certificate"]))
        lines += [_beside(sealed, name, rows[name]) for name in CONTROLS if name in rows]
    return "\n".join(lines)


def _is_whole(defence: str, attacks: dict[str, Any]) -> bool:
    """Whether every attack was made on every target network by as many attackers as planned."""
    planned = Counter(
        name for index, _ in enumerate(attacker_seeds(defence, 0)) for name in attack_names(defence, index)
    )
    return all(
        name in attacks and attacks[name]["cells"] >= times * len(TARGET_SEEDS)
        for name, times in planned.items()
    )


def _counts(rows: dict[str, Any]) -> str:
    """Images that the attackers had, and targets; with what the mean over so few is worth."""
    row = rows.get("sealed") or next(iter(rows.values()))
    error = row["attacks"][row["worst_attack"]]["ssim_error"]
    return (
        f"{row['auxiliary']} auxiliary images, {row['targets']} targets, over which a mean SSIM has a standard error "
        f"of {error:.3f}"
    )


def _each(row: dict[str, Any]) -> str:
    return ", ".join(f"{100 * accuracy:.1f} %" for accuracy in row["accuracies"])


def _made_by(row: dict[str, Any], which: str) -> str:
    """An attack, and its cells where they are fewer than the row's networks have attackers."""
    cells, planned = row[f"{which}_cells"], row["target_seeds"] * row["attackers"]
    return str(row[which]) + (f" ({cells})" if cells < planned else "")


def _named(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _beside(sealed: dict[str, Any], name: str, control: dict[str, Any]) -> str:
    points, auc, ssim, mse = (
        sealed[what] - control[what] for what in ("accuracy", "auc", "worst_ssim", "min_mse")
    )
    return (
        f"Sealed less the control `{name}`: accuracy {100 * points:+.2f} points, AUC {auc:+.3f}, "
        f"worst SSIM {ssim:+.3f}, least MSE {mse:+.4f}.\n"
    )


def _sealed(row: dict[str, Any], certificate: dict[str, Any] | None) -> str:
    lines = [
        "Streams of `sealed` on the test split: "
        + ", ".join(f"{name} {100 * value:.2f} %" for name, value in row["streams"].items())
        + "."
    ]
    if more := row.get("more_budget"):
        lines.append(
            f"{more['times']:g} times the budget of its strongest attack, {more['attack']}, moves its SSIM from "
            f"{more['ssim']:.3f} to {more['ssim_with_more']:.3f}."
        )
    if certificate:
        broken = ", ".join(certificate["broken_by"]) or "no attack"
        captures = "; ".join(
            f"{bound:.4f} from {count} captures that are alike before the noise"
            for count, bound in certificate["captures_mse"].items()
            if count != "1"
        )
        movement = certificate["movement"]
        captures += (
            f"; {certificate['recaptures_mse']:.4f} from 8 that differ by {movement['pixels']} pixel and a camera's "
            f"noise of {movement['noise']:g}; {certificate['values_mse']:.4f} for whoever knows the values before the "
            "noise"
        )
        lines.append(
            f"Certificate, the least of {certificate['networks']} networks: no attacker who knows the label has an MSE "
            f"below {certificate['bound_mse']:.4f} ({captures}) on {certificate['frames']} held-out frames, where the "
            f"class means have {certificate['class_mean_mse']:.4f}. Other frames have another bound: held against that "
            f"of the very frames that it attacked, it is broken by {broken}."
        )
    return "\n".join(lines) + "\n"


def _recaptured(name: str, sealed: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What captures that differ tell, over the networks of a data set for which it was measured."""
    rows = [row for network, rows in found.items() if network.startswith(f"{name}-sealed-") for row in rows]
    told = []
    for noise, pixels in sorted({(row["noise"], row["pixels"]) for row in rows}):
        alike = [row for row in rows if (row["noise"], row["pixels"]) == (noise, pixels)]
        told.append(
            (f"{noise:g}", str(pixels), ", ".join(f"{row['codes']:.2f}" for row in alike),
             ", ".join(f"{row['mse']:.4f} ± {row['mse_error']:.4f}" for row in alike),
             ", ".join(f"{row['bound_mse']:.4f}" for row in alike),
             ", ".join(f"{row['bound_alike_mse']:.4f}" for row in alike),
             f"{sum(row['broken'] for row in alike)} of {len(alike)}")
        )  # fmt: skip
    header = ("camera noise", "pixels moved", "codes of a scene", "MSE", "bound for these", "bound for 8 alike",
              "bound for these broken")  # fmt: skip
    words = (
        f"Captures that differ tell more than captures that are alike (`{found.get('command')}`): an attacker who "
        "knows the label and holds the list of the scenes, from 8 captures of each under the device's key, network by "
        "network:\n"
    )
    if not told:
        return []
    decoded = [row for row in rows if "decoder" in row]
    alike = sealed["attacks"]["averaging-residual"]
    ssim, mse = (", ".join(f"{row['decoder'][what]:.4f}" for row in decoded) for what in ("ssim", "mse"))
    more = (
        "Without the list, but with images of its own: `averaging-residual`, from the mean of 8 captures that differ "
        f"as in the last line, has SSIM {ssim} and MSE {mse}. From 8 that are alike it has {alike['ssim']:.4f} and "
        f"{alike['mse']:.4f}.\n"
    )
    return [words, table(header, told), more]


def _fsha(found: dict[str, Any]) -> str:
    cells = [
        (
            profile,
            told,
            ("yes" if one["detected_in_time"] else "late") if one["detected"] else "no",
            ", ".join(str(step or "-") for step in one["step_at_detection"]),
            _spread(one["ssim_at_detection"], 0.0, 3),
            f"{one['ssim_final_without_guard']:.3f}",
            f"{row['floor_ssim']:.3f}",
            f"{row['false_alarms']} of {row['honest_trainings']}",
        )
        for profile, row in found["profiles"].items()
        for told, one in _attackers(row)
    ]
    header = ("profile", "attacker", "detected", "at batch", "SSIM then", "SSIM at the end, unguarded", "label floor",
              "false alarms")  # fmt: skip
    return f"## Feature-space hijacking of a training (MNIST)\n\nCommand: `{found['command']}`.\n\n" + table(
        header, cells
    )


def _attackers(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    later = row["turning"]
    turns = f", turns after {later['turns_at']}"
    return [
        ("as published", row),
        ("critic told the labels", row["conditional"]),
        (f"as published{turns}", later),
        (f"critic told the labels{turns}", later["conditional"]),
        ("critic told the labels, serves the task as well", row["blended"]),
        *[(told, row[name]) for name, told in _EVASIONS.items() if name in row],
    ]


def _percent(value: float, deviation: float) -> str:
    return _spread(100 * value, 100 * deviation, 2)


def _spread(value: float | None, deviation: float, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def streams_page(results: dict[str, Any]) -> str:
    """Markdown of `streams.json`."""
    parts = [
        "# What recovery and fusion add under noise\n",
        f"Command: `{results['command']}`. Figures: `streams.json`. Server halves trained anew on one trained client "
        f"half of `sealed`, seeds {', '.join(map(str, results['seeds']))}; accuracy on validation data in per cent, "
        "mean ± standard deviation over the seeds. `attacked alone` is one stream without recovery and fusion; "
        "`three attacked` says what three classifiers gain by being three.\n",
    ]
    for name, rows in results.items():
        if not isinstance(rows, dict) or "svt" not in rows:
            continue
        cells: Sequence[tuple[str, ...]] = [
            (variant, *(_percent(row[stream], row[f"{stream}_std"])
                        for stream in ("attacked", "recovered", "fused", "decision")),
             *(f"{100 * row['decision_by_bits'][bits]:.2f}" for bits in ("6", "4", "3", "2")))
            for variant, row in rows.items()
        ]  # fmt: skip
        header = ("server half", "attacked", "recovered", "fused", "decision", "at 6 bits", "4", "3", "2")
        parts += [f"## {name}\n", table(header, cells)]
    return "\n".join(parts)
