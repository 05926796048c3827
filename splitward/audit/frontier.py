"""The leakage-accuracy plot: what a defence costs, and what it hides."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitward.errors import AuditError

_MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Point:
    """One defence: accuracy and worst SSIM, each with a standard deviation over seeds (0 without)."""

    name: str
    accuracy: float
    worst_ssim: float
    accuracy_std: float = 0.0
    worst_ssim_std: float = 0.0
    highlighted: bool = False


def read_points(path: Path, data: str) -> list[Point]:
    """The defences of data set `data` in a results file laid out as `docs/results/privacy.json`.

    Raises
    ------
    AuditError
        The file cannot be read, or has no such data set.
    """
    try:
        defences = json.loads(path.read_text(encoding="utf-8"))[data]["defences"]
        return [
            Point(
                name,
                one["accuracy"],
                one["worst_ssim"],
                one.get("accuracy_std", 0.0),
                one.get("worst_ssim_std", 0.0),
            )
            for name, one in defences.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AuditError(
            f"{path}: gives no points for {data}: {error!r}. It is laid out as docs/results/privacy.json."
        ) from error


def draw_frontier(points: Sequence[Point], lines: dict[str, float], title: str) -> bytes:
    """PNG of accuracy over worst SSIM; `lines` are SSIM values to mark, such as the floors.

    Up and to the left is better. The step line joins the points that no other point beats in both.
    """
    from matplotlib.figure import Figure  # here, so that only audits load matplotlib

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    best = frontier(points)
    if len(best) > 1:
        axes.step(
            [point.worst_ssim for point in best], [100 * point.accuracy for point in best], where="post",
            color="0.75", zorder=1,
        )  # fmt: skip
    for point, marker in zip(points, itertools.cycle(_MARKERS)):
        axes.errorbar(
            point.worst_ssim, 100 * point.accuracy, xerr=point.worst_ssim_std or None,
            yerr=100 * point.accuracy_std or None, fmt=marker, markersize=10 if point.highlighted else 6,
            color="#2a6fb0" if point.highlighted else "0.35", capsize=3, label=point.name,
        )  # fmt: skip
    for index, (name, value) in enumerate(sorted(lines.items(), key=lambda line: line[1])):
        axes.axvline(value, color="0.6", linestyle=":", zorder=0)
        high = index % 2  # neighbours lie close: their names alternate between bottom and top
        axes.annotate(
            name, (value, 0.98 if high else 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0),
            textcoords="offset points", rotation=90, color="0.4", ha="right", fontsize=9,
            va="top" if high else "bottom",
        )  # fmt: skip
    axes.set(title=title, xlabel="SSIM of the worst attack (less is more private)", ylabel="accuracy in %")
    axes.set_xlim(0, 1.05)
    axes.margins(y=0.25)
    axes.set_ylim(top=min(axes.get_ylim()[1], 100.0 + 0.05 * (100.0 - axes.get_ylim()[0])))
    if points:
        figure.legend(
            loc="outside right upper", frameon=False
        )  # points of undefended cuts lie too close for names
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in accuracy without leaking more, by rising SSIM."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.worst_ssim, -one.accuracy)):
        if not best or point.accuracy > best[-1].accuracy:
            best.append(point)
    return best
