"""The demo's figures for a person: a table for the terminal and a self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STREAMS = ("attacked", "recovered", "fused", "decision")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --strong: #2a6fb0; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; padding: 0; list-style: none; }
.tiles li { flex: 1 1 9rem; background: var(--soft); border-radius: .6rem; padding: .7rem 1rem; }
.tiles b { display: block; font-size: 1.4rem; color: var(--strong); }
img { max-width: 100%; background: white; border-radius: .4rem; }
footer { margin-top: 2.5rem; opacity: .75; font-size: .85rem; }
"""


def format_summary(summary: dict[str, Any]) -> str:
    """The table that ends the demo."""
    header = ["device", "variant", "results", "lost", "dup", *STREAMS, "p50 ms", "p95 ms"]
    rows = [header, *_device_rows(summary)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    ssim = summary["decoder_ssim"]
    lines += [
        "",
        f"frames sent {summary['frames_sent']}, results {summary['results']}, lost {summary['lost']}, "
        f"duplicated {summary['duplicated']}; latency p50 {summary['latency_ms']['p50']} ms, "
        f"p95 {summary['latency_ms']['p95']} ms",
        f"bytes a frame: {summary['bytes_per_frame']} on the wire, {summary['png_bytes_per_frame']} as PNG",
        f"accuracy on the whole test set: undefended {summary['accuracy_undefended']:.4f}, "
        f"sealed {summary['accuracy_test_set']['sealed']['decision']:.4f}",
        f"a decoder's SSIM: none {ssim['none']:.3f}, psgl {ssim['psgl']:.3f}, sealed {ssim['sealed']:.3f} "
        f"(knowing only the label {ssim['label']:.3f})",
    ]
    return "\n".join(lines)


def write_report(summary: dict[str, Any], picture: Path, path: Path) -> None:
    """Write the page; the picture goes into it."""
    data, ssim = summary["data"], summary["decoder_ssim"]
    encoded = base64.b64encode(picture.read_bytes()).decode("ascii")
    synthetic = " The images are synthetic." if data["synthetic"] else ""
    tiles = [
        ("results", f"{summary['results']} of {summary['frames_sent']}"),
        ("lost, duplicated", f"{summary['lost']}, {summary['duplicated']}"),
        ("sealed accuracy", f"{summary['accuracy_test_set']['sealed']['decision']:.2%}"),
        ("undefended accuracy", f"{summary['accuracy_undefended']:.2%}"),
        ("bytes a frame (PNG)", f"{summary['bytes_per_frame']:.0f} ({summary['png_bytes_per_frame']:.0f})"),
        ("latency p50, p95", f"{summary['latency_ms']['p50']:.1f}, {summary['latency_ms']['p95']:.1f} ms"),
    ]
    accuracies = summary["accuracy_test_set"]
    profiles = [
        [name, f"{accuracies[name]['decision']:.4f}" if name in accuracies else "", f"{ssim[name]:.3f}",
         f"{summary['decoder_mse'][name]:.4f}"]
        for name in ssim
    ]  # fmt: skip
    parts = [
        f"<h1>Splitward on {html.escape(data['name'])}</h1>",
        f"<p>Task {html.escape(data['task'])}; images {_counts(data['images'])}; licence "
        f"{html.escape(data['licence'])}.{synthetic}</p>",
        '<ul class="tiles">' + "".join(f"<li>{_text(k)}<b>{_text(v)}</b></li>" for k, v in tiles) + "</ul>",
        "<h2>What a decoder sees</h2>",
        f'<img alt="Test images above their reconstructions" src="data:image/png;base64,{encoded}">',
        "<p>The decoder was trained on released tensors of images that no network was trained on. "
        "<i>label</i> is the mean image of the true class and <i>nothing</i> the mean of all: no accurate "
        "classifier can leak less than its label. One seed and one small decoder: a demonstration, not an "
        "audit.</p>",
        _table(["profile", "accuracy", "SSIM", "MSE"], profiles),
        "<h2>Devices</h2>",
        _table(
            ["device", "variant", "results", "lost", "dup", *STREAMS, "p50 ms", "p95 ms"], _device_rows(summary)
        ),
        "<h2>How it was made</h2>",
        f"<p><code>{_text(summary['command'])}</code>, seed {summary['seed']}, "
        f"epochs {_counts(summary['epochs'])}, broker {_text(summary['broker'])}, {summary['wall_s']} s.</p>",
        _table(["package", "version"], [[k, v] for k, v in summary["versions"].items()]),
        "<footer>Splitward is research software and not a medical device.</footer>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Splitward demo</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _device_rows(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [one["device"], one["variant"], str(one["results"]), str(one["lost"]), str(one["duplicated"])]
        + [f"{summary['accuracy'][one['device']][stream]:.4f}" for stream in STREAMS]
        + [f"{one['p50_ms']:.1f}", f"{one['p95_ms']:.1f}"]
        for one in summary["devices"]
    ]


def _counts(values: dict[str, int]) -> str:
    return _text(", ".join(f"{name} {count}" for name, count in values.items()))


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
