"""The demo's figures for a person: a table for the terminal and a self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from splitward import page

STREAMS = ("attacked", "recovered", "fused", "decision")


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
        f"<h1>Splitward on {page.text(data['name'])}</h1>",
        f"<p>Task {page.text(data['task'])}; images {_counts(data['images'])}; licence "
        f"{page.text(data['licence'])}.{synthetic}</p>",
        page.tiles(tiles),
        "<h2>What a decoder sees</h2>",
        page.picture(picture.read_bytes(), "Test images above their reconstructions"),
        "<p>The decoder was trained on released tensors of images that no network was trained on. "
        "<i>label</i> is the mean image of the true class and <i>nothing</i> the mean of all: no accurate "
        "classifier can leak less than its label. One seed and one small decoder: a demonstration, not an "
        "audit.</p>",
        page.table(["profile", "accuracy", "SSIM", "MSE"], profiles),
        "<h2>Devices</h2>",
        page.table(
            ["device", "variant", "results", "lost", "dup", *STREAMS, "p50 ms", "p95 ms"], _device_rows(summary)
        ),
        "<h2>How it was made</h2>",
        f"<p><code>{page.text(summary['command'])}</code>, seed {summary['seed']}, "
        f"epochs {_counts(summary['epochs'])}, broker {page.text(summary['broker'])}, "
        f"{summary['wall_s']} s.</p>",
        page.table(["package", "version"], [[k, v] for k, v in summary["versions"].items()]),
        "<footer>Splitward is research software and not a medical device.</footer>",
    ]
    page.write_page(path, "Splitward demo", parts)


def _device_rows(summary: dict[str, Any]) -> list[list[str]]:
    return [
        [one["device"], one["variant"], str(one["results"]), str(one["lost"]), str(one["duplicated"])]
        + [f"{summary['accuracy'][one['device']][stream]:.4f}" for stream in STREAMS]
        + [f"{one['p50_ms']:.1f}", f"{one['p95_ms']:.1f}"]
        for one in summary["devices"]
    ]


def _counts(values: dict[str, int]) -> str:
    return page.text(", ".join(f"{name} {count}" for name, count in values.items()))
