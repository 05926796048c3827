"""Figures of the demo's run, from the devices' result files and from the cloud's store."""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge.results import read_results
from firmware_sim.fleet import FleetConfig, FleetReport
from splitward.imaging.inputs import Pixels
from splitward.wire.control import STREAMS


def summarise(
    report: FleetReport, fleet: FleetConfig, labels: dict[str, int], images: Pixels, store: Path
) -> dict[str, Any]:
    """The measured part of `summary.json`.

    `lost` is the larger of what the devices and what the store miss; `duplicated` counts frames with more than
    one result, at a device or in the store.
    """
    answers = {
        one.device: list(read_results(Path(fleet.folder) / one.device / "results.jsonl"))
        for one in report.devices
    }
    latencies = np.array([answer["latency_ms"] for each in answers.values() for answer in each])
    captured = sum(one.frames for one in report.devices)
    stored, stored_frames = _count_results(store)
    at_devices = sum(one.results for one in report.devices)
    return {
        "frames_sent": captured,
        "results": stored,
        "lost": max(captured - at_devices, captured - stored_frames),
        "duplicated": sum(one.duplicated for one in report.devices) + max(0, stored - captured),
        "accuracy": {
            one.device: {"variant": one.variant} | _accuracy(answers[one.device], labels)
            for one in report.devices
        },
        "bytes_per_frame": round(float(np.mean([one.bytes_per_frame for one in report.devices])), 1),
        "png_bytes_per_frame": round(png_bytes(images), 1),
        "latency_ms": {
            "p50": round(float(np.percentile(latencies, 50)), 2),
            "p95": round(float(np.percentile(latencies, 95)), 2),
        },
        "devices": [
            {"device": one.device, "variant": one.variant, "frames": one.frames, "results": one.results,
             "lost": one.lost, "duplicated": one.duplicated, "p50_ms": one.latency_p50_ms,
             "p95_ms": one.latency_p95_ms, "bytes_per_frame": one.bytes_per_frame}
            for one in report.devices
        ],
    }  # fmt: skip


def _count_results(store: Path) -> tuple[int, int]:
    """Rows of the store, and distinct frames among them."""
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM results").fetchone()
        (frames,) = connection.execute(
            "SELECT count(*) FROM (SELECT DISTINCT device, boot, sequence FROM results)"
        ).fetchone()
    return int(rows), int(frames)


def _accuracy(answers: list[dict[str, Any]], labels: dict[str, int]) -> dict[str, float]:
    """Accuracy of each stream and of the decision over one device's results."""
    results = [answer for answer in answers if answer["type"] == "result"]
    truth = np.array([labels[answer["name"]] for answer in results])
    found: dict[str, NDArray[Any]] = {
        stream: np.array([answer["streams"][stream] for answer in results]) for stream in STREAMS
    }
    found["decision"] = np.array([answer["class_index"] for answer in results])
    return {name: round(float((predicted == truth).mean()), 4) for name, predicted in found.items()}


def png_bytes(images: Pixels) -> float:
    """Mean size of the images [N, C, H, W] as PNG, which is what sending them would cost at least."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, "png", optimize=True)
        sizes.append(buffer.tell())
    return float(np.mean(sizes))
