"""`edge bench`: every variant of the bundle that this board can run, measured one after the other."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path

import msgspec
from msgspec import Struct

from edge.config import EdgeConfig
from edge.errors import BackendError
from edge.health import temperature_c
from edge.models import ModelStore
from edge.probe import ProbeReport, probe
from edge.settings import choose_variant
from edge.verify import TrustedKey
from splitward.wire.bundle import read_bundle


class BenchReport(Struct, frozen=True):
    """What `edge bench` measured; temperatures are None where the kernel tells none."""

    machine: str
    frames: int
    temperature_before_c: float | None
    temperature_after_c: float | None
    variants: tuple[ProbeReport, ...]

    @property
    def fastest(self) -> ProbeReport | None:
        """Of those that run and agree with the golden activation."""
        sound = [one for one in self.variants if not one.error]
        return min(sound, key=lambda one: one.runtime_us_p50, default=None)


def bench_device(config: EdgeConfig, frames: int) -> BenchReport:
    """Measure every variant of the bundle that runs here, `frames` frames each.

    Raises
    ------
    BundleError, ConfigError
        The bundle cannot be read.
    """
    path = ModelStore(config).path()
    bundle = read_bundle(path, TrustedKey(Path(config.device.trusted_key)))
    before = temperature_c()
    reports = []
    with tempfile.TemporaryDirectory(prefix="splitward-bench-") as scratch:  # a secret of its own
        device = msgspec.structs.replace(config.device, state_dir=scratch, secret_file="")
        for variant in sorted(bundle.manifest.client):
            backend, _, precision = variant.partition("-")
            runtime = msgspec.structs.replace(config.runtime, backend=backend, precision=precision)
            tried = msgspec.structs.replace(config, device=device, runtime=runtime)
            reports.append(probe(tried, str(path), frames))
    return BenchReport(_machine(), frames, before, temperature_c(), tuple(reports))


def choose_fastest(config: EdgeConfig, report: BenchReport) -> str:
    """Keep the fastest sound variant for the agent's next start; what was chosen, for a person.

    Raises
    ------
    BackendError
        None runs here.
    """
    best = report.fastest
    if best is None:
        raise BackendError("no variant of the bundle runs on this board. `edge check` says why.")
    backend, _, precision = best.variant.partition("-")
    choose_variant(config, backend, precision)
    return f"{best.variant} is chosen; it runs from the agent's next start."


def format_bench(report: BenchReport) -> str:
    """The report as a table, for a terminal."""
    columns = ("variant", "p50 us", "p99 us", "other us", "frames/s", "bytes", "RSS MB", "start s")
    rows = [columns]
    for one in report.variants:
        figures = (
            *(f"{one.runtime_us_p50:.1f}", f"{one.runtime_us_p99:.1f}", f"{one.other_us_p50:.1f}"),
            *(f"{one.frames_per_s:.0f}", str(one.message_bytes), f"{one.rss_mb:.1f}", f"{one.start_s:.2f}"),
        )
        rows.append((one.variant, *(figures if not one.error else ("-",) * 7)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines += [f"{one.variant}: {one.error}" for one in report.variants if one.error]
    temperatures = (report.temperature_before_c, report.temperature_after_c)
    heat = "" if None in temperatures else f", {temperatures[0]:.1f} to {temperatures[1]:.1f} degrees C"
    return "\n".join([*lines, f"{report.frames} frames each on {report.machine}{heat}"])


def _machine() -> str:
    board = Path("/proc/device-tree/model")
    name = board.read_bytes().rstrip(b"\0").decode(errors="replace") if board.exists() else platform.machine()
    return f"{name}, {os.cpu_count()} cores"
