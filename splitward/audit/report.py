"""The audit for a person: one self-contained HTML page. `audit.json` holds the same figures for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitward import page
from splitward.audit.frontier import Point, draw_frontier
from splitward.audit.gallery import STYLE as GALLERY_STYLE
from splitward.audit.gallery import Images, draw_gallery

STYLE = """
.verdict { border-left: .4rem solid var(--strong); padding: .6rem 1rem; background: var(--soft); }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
details { border-bottom: 1px solid var(--line); padding: .4rem 0; } summary { cursor: pointer; }
body { max-width: 72rem; }
"""

BOUNDS = {
    "bound_mse": "least MSE of any attacker, from one capture of each scene",
    "values_mse": "least MSE of whoever knows the values before the noise",
    "identified": "how often an attacker who has the list of the targets finds the right one at best",
    "class_mean_mse": "for comparison: MSE of each class's mean over these targets",
    "trace_mse": "least MSE under a Gaussian prior for each class (a model, no promise)",
    "unbiased_mse": "least MSE of unbiased estimators, which no decoder is",
}

LIMITATIONS = (
    "These attacks are the strongest that this version has. A stronger one may come: an attack that fails "
    "proves nothing, and only the certificate bounds attackers that nobody has built yet.",
    "The figures are means over the targets. The percentiles show how single images fare; one image that is "
    "unlike all others can leak more.",
    "The attacker knows code, weights, settings and noise law, and trains on defended tensors of images of the "
    "same kind that no network was trained on. With images of another kind it does worse, with far more of the "
    "same kind perhaps better.",
    "SSIM and MSE measure pixels. They do not say whether a person or a diagnosis is recognised.",
    "What the label tells is not protected: the floors need nothing but the label, and no accurate classifier "
    "can leak less.",
    "An MSE above the mean image's is a failed attack, not protection.",
    "The figures hold for this target, these images, these seeds and these budgets, and for no others.",
)


def write_report(
    results: dict[str, Any], shown: dict[str, Images], points: Sequence[Point], path: Path
) -> None:
    """Write the page.

    Parameters
    ----------
    results : dict
        What `audit.json` holds (`splitward.audit.flow`).
    shown : dict of str to ndarray, uint8 [n, C, H, W]
        `original`, the floors, and the first reconstructions of each attack by its name; a path other than the
        deployed one prefixes its own ("map off/ridge").
    points : sequence of Point
        For the plot; the target's own is highlighted.
    """
    target, data = results["target"], results["data"]
    lines = {name.replace("_", " "): floor["ssim"]["mean"] for name, floor in results["floors"].items()}
    if results["ceiling"] and "ssim" in results["ceiling"][0]:
        lines["undefended cut"] = results["ceiling"][0]["ssim"]["mean"]
    parts = [
        f"<h1>Privacy audit of {page.text(target['name'])}</h1>",
        f"<p>{page.text(_data_line(data))}</p>",
        *_verdict(results),
        page.tiles(_tiles(results)),
        "<h2>Attacks on the deployed path</h2>",
        _attack_table([row for row in results["attacks"] if row["phase"] == "inference"]),
        _floor_table(results["floors"], results["ceiling"]),
        *_training([row for row in results["attacks"] if row["phase"] == "training"]),
        *_failures(results["attacks"]),
        "<h2>What the attackers see</h2>",
        draw_gallery(results, shown),
        "<h2>Accuracy and leakage</h2>",
        page.picture(
            draw_frontier(points, lines, f"{data['name']}: accuracy and leakage"),
            "Accuracy over the worst attack's SSIM: "
            + "; ".join(f"{p.name} {p.accuracy:.1%} at {p.worst_ssim:.3f}" for p in points),
        ),
        *_map_off(results["map_off"]),
        *_inference(results["inference"]),
        *_certificate(results["certificate"]),
        "<h2>Who the attackers are</h2>",
        *(_card(row) for row in results["attacks"]),
        "<h2>How to read this</h2>",
        page.items(LIMITATIONS),
        "<h2>How it was made</h2>",
        f"<p><code>{page.text(results['command'])}</code></p>",
        page.facts(_facts(results)),
        page.table(["package", "version"], [[name, value] for name, value in results["versions"].items()]),
        "<footer>Splitward is research software and not a medical device.</footer>",
    ]
    page.write_page(path, f"Privacy audit of {target['name']}", parts, STYLE + GALLERY_STYLE)


def _data_line(data: dict[str, Any]) -> str:
    synthetic = " The images are synthetic." if data["synthetic"] else ""
    return (
        f"{data['name']}, task {data['task']}; {data['targets']} targets, {data['auxiliary']} auxiliary images "
        f"of the attacker's own, no patient in both; licence {data['licence']}.{synthetic}"
    )


def _verdict(results: dict[str, Any]) -> list[str]:
    worst, lines = results["worst"], []
    for gate in results["gates"]:
        what = "SSIM at most" if gate["gate"] == "max_ssim" else "MSE at least"
        state = "broken" if gate["broken"] else "held"
        lines.append(
            (
                gate["broken"],
                f"Gate {what} {gate['limit']:g}: {state}. {gate['attack']} reaches {gate['value']:.4f}.",
            )
        )
    failed = [row["name"] for row in results["attacks"] + results["map_off"] if row["status"] == "failed"]
    if failed:
        lines.append((True, f"Not complete: {', '.join(failed)} failed. Run the same command again."))
    certificate = results["certificate"]
    if certificate and certificate["broken_by"]:
        lines.append((True, f"The certificate is broken by {', '.join(certificate['broken_by'])}."))
    if worst:
        lines.append((None, describe_worst(worst) + ("" if results["gates"] else " No gate was given.")))
    kinds = {True: "bad", False: "good", None: ""}
    return [f'<p class="verdict {kinds[bad]}">{page.text(line)}</p>' for bad, line in lines]


def describe_worst(worst: dict[str, dict[str, Any]]) -> str:
    """The worst case in a sentence."""
    ssim, mse = worst["ssim"], worst["mse"]
    return (
        f"Worst attack: {ssim['attack']} with SSIM {ssim['value']:.3f} (the label alone {ssim['floor']:.3f}), "
        f"{mse['attack']} with MSE {mse['value']:.4f} (the label alone {mse['floor']:.4f})."
    )


def _tiles(results: dict[str, Any]) -> list[tuple[str, str]]:
    worst, accuracy = results["worst"], results["target"]["accuracy"]
    found = [("defence", str(results["target"]["defence"]["profile"]))]
    if accuracy is not None:
        found.append(("accuracy", f"{accuracy:.2%}"))
    if worst:
        found += [
            ("worst SSIM (label alone)", f"{worst['ssim']['value']:.3f} ({worst['ssim']['floor']:.3f})"),
            ("worst MSE (label alone)", f"{worst['mse']['value']:.4f} ({worst['mse']['floor']:.4f})"),
        ]
    found.append(("bytes released", str(results["target"]["released_bytes"])))
    if certificate := results["certificate"]:
        found.append(("certified MSE at least", f"{certificate['bound_mse']:.4f}"))
    return found


def _attack_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "attack",
        "SSIM",
        "SSIM 5..95 %",
        "over the label's",
        "MSE",
        "MSE 5..95 %",
        "of the label's",
        "targets",
        "seconds",
    ]
    return page.table(header, [_attack_cells(row) for row in rows])


def _attack_cells(row: dict[str, Any]) -> list[str]:
    name = f"{row['name']}: {row['title']}"
    if "ssim" not in row:
        return [name, row["status"], *[""] * 7]
    ssim, mse = row["ssim"], row["mse"]
    return [
        name,
        f"{ssim['mean']:.3f}",
        f"{ssim['p5']:.2f}..{ssim['p95']:.2f}",
        f"{row['ssim_over_floor']:+.3f}",
        f"{mse['mean']:.4f}",
        f"{mse['p5']:.3f}..{mse['p95']:.3f}",
        f"{row['mse_of_floor']:.0%}",
        str(row["targets"]),
        f"{row['seconds']:.0f}",
    ]


def _floor_table(floors: dict[str, Any], ceiling: Sequence[dict[str, Any]]) -> str:
    named = {
        "mean_image": "floor: nothing released, the mean image",
        "class_mean": "floor: only the label, its class's mean image",
        "class_template": "floor: only the label, its class's image of highest SSIM",
    }
    rows = [
        [named[name], f"{floor['ssim']['mean']:.3f}", f"{floor['mse']['mean']:.4f}"]
        for name, floor in floors.items()
    ]
    rows += [
        [f"ceiling: undefended cut, {row['title']}", f"{row['ssim']['mean']:.3f}", f"{row['mse']['mean']:.4f}"]
        for row in ceiling
        if "ssim" in row
    ]
    return page.table(["beside them", "SSIM", "MSE"], rows)


def _training(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "<h2>Attacks on the training</h2>",
        "<p>Whoever sees a training's gradients sees more than a deployed device ever releases. These figures "
        "are no part of the worst case.</p>",
        _attack_table(rows),
    ]


def _failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    reasons = [f"{row['name']}: {row['status']}: {'; '.join(row['reasons'])}" for row in rows if row["reasons"]]
    return ["<h3>Not measured</h3>", page.items(reasons)] if reasons else []


def _map_off(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "<h2>With the intentional attack switched off</h2>",
        "<p>The frame enters unattacked, with a map of zeros, as public code does when it is attacked. No "
        "device does this; the difference says what the map itself hides.</p>",
        _attack_table(rows),
        *_failures(rows),
    ]


def _inference(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [
        [f"{row['title']}: {row['of']}", f"{row['accuracy']:.3f}", f"{row['majority']:.3f}",
         "" if row["from_label"] is None else f"{row['from_label']:.3f}"]
        for row in rows
    ]  # fmt: skip
    return [
        "<h2>What else the released tensor tells</h2>",
        "<p>The label is what the device is there to tell. An attribute leaks as far as it is inferred better "
        "than from the label alone.</p>",
        page.table(["inferred", "accuracy", "most frequent value", "from the label alone"], cells),
    ]


def _certificate(certificate: dict[str, Any] | None) -> list[str]:
    if certificate is None:
        return [
            "<h2>Certificate</h2>",
            "<p>None: nothing noised is released, and nothing can be certified.</p>",
        ]
    figures = [
        [what, f"{certificate[name]:.4f}"] for name, what in BOUNDS.items() if certificate.get(name) is not None
    ]
    figures += [
        [f"the same with {captures} captures of each scene that are alike before the noise", f"{bound:.4f}"]
        for captures, bound in certificate.get("captures_mse", {}).items()
        if captures != "1"
    ]
    if movement := certificate.get("movement"):
        most = max(certificate["captures_mse"], key=int)
        law = f"{movement['pixels']} pixel and a camera's noise of {movement['noise']:g}"
        what = f"the same with {most} that differ by {law}"
        figures.append([what, f"{certificate['recaptures_mse']:.4f}"])
    checked = [
        [one["attack"], str(one["targets"]), str(one["captures"]), f"{one['mse']:.4f}",
         f"{one['bound_mse']:.4f}", "yes" if one["broken"] else "no"]
        for one in certificate["attacks"]
    ]  # fmt: skip
    return [
        "<h2>Certificate</h2>",
        page.table(["bound on these targets", "value"], figures),
        "<p>It holds whatever the attacker's method, under these assumptions:</p>",
        page.items(certificate["assumptions"]),
        page.table(["attack", "targets", "captures", "its MSE", "bound on the same", "below it"], checked),
    ]


def _card(row: dict[str, Any]) -> str:
    budget = ", ".join(f"{name} {value}" for name, value in row["budget"].items()) or "none to set"
    facts = {
        "knows": "; ".join(row["knows"]),
        "does": row["method"],
        "budget": budget,
        "seeds": ", ".join(map(str, row["seeds"])) or "not run",
        "source": row["source"],
    }
    title = page.text(f"{row['title']} ({row['name']})")
    body = "".join(f"<dt>{name}</dt><dd>{page.text(value)}</dd>" for name, value in facts.items())
    return f"<details><summary>{title}</summary><dl>{body}</dl></details>"


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    data, target = results["data"], results["target"]
    facts = {
        "date": results["date"],
        "target": f"{target['kind']} {target['name']}",
        "fingerprint": target["fingerprint"],
        "defence": ", ".join(f"{name} {value}" for name, value in target["defence"].items()),
        "accuracy": f"{target['accuracy_from']}",
        "data": data["source"],
        "suite": results["suite"],
        "attackers' seeds": ", ".join(map(str, results["seeds"])),
        "captures of each target": str(data["captures"]),
        "wall time of this command": f"{results['wall_s']} s",
    }
    return list(facts.items())
