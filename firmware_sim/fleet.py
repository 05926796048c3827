"""A fleet of simulated devices: each a process of its own that runs the device agent on recorded frames."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from edge.config import (
    BrokerConfig,
    CaptureConfig,
    Count,
    DeviceConfig,
    EdgeConfig,
    LinkConfig,
    Name,
    RuntimeConfig,
    Seconds,
)
from edge.errors import CaptureError
from edge.recording import read_recording
from edge.results import read_results
from splitward.config import format_toml

STOP_S = 15.0
Variant = Annotated[str, Meta(pattern=r"^(onnx|tflite)-(float32|int8)\Z")]


class FleetConfig(Struct, frozen=True, kw_only=True):
    """`fleet.toml`, and the flags of `python -m firmware_sim fleet`.

    Attributes
    ----------
    frames : str
        .npz file with `images`, as the simulator reads it.
    share : "split" or "same"
        Deal the frames out one by one, or give every device all of them.
    variants : tuple of str
        Backend and precision, given to the devices in turn.
    folder : str
        Gets one folder for each device: configuration, state, log and results, in the place of an earlier run's.
    timeout_s : float
        After this the devices are stopped, and what has no result is lost.
    """

    devices: Count = 3
    frames: str = "demo/frames.npz"
    share: Literal["split", "same"] = "split"
    variants: tuple[Variant, ...] = ("onnx-float32",)
    bundle: str = "demo/model.bundle"
    trusted_key: str = "demo/signing.key.pub"
    site: Name = "demo"
    folder: str = "demo/fleet"
    rate_hz: Annotated[float, Meta(ge=0)] = 0.0
    timeout_s: Seconds = 300.0
    broker: BrokerConfig = BrokerConfig()
    link: LinkConfig = LinkConfig()


class DeviceReport(Struct, frozen=True):
    """What became of one device's frames.

    `lost` counts frames without a result, the refused ones included; `duplicated` counts frames that got
    results under more than one (boot, sequence). `sent` counts messages, repeats included, and is None when
    the agent died.
    """

    device: str
    variant: str
    frames: int
    sent: int | None
    results: int
    refused: int
    lost: int
    duplicated: int
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    bytes_per_frame: float | None
    exit_code: int


class FleetReport(Struct, frozen=True):
    """All devices, and how long the slowest took."""

    devices: tuple[DeviceReport, ...]
    wall_s: float

    @property
    def complete(self) -> bool:
        """Whether every device ended well, with nothing lost and nothing twice."""
        return not any(one.exit_code or one.lost or one.duplicated for one in self.devices)


class _Device:
    """One device's folder and process."""

    def __init__(self, config: FleetConfig, number: int, images: NDArray[Any], names: list[str]) -> None:
        self.name = f"device-{number + 1}"
        self.variant = config.variants[number % len(config.variants)]
        self.frames = names
        self.folder = Path(config.folder).resolve() / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        clear_device(self.folder)
        recording = self.folder / "frames.npz"
        np.savez(recording, images=images, names=np.array(names))
        self._settings = self.folder / "edge.toml"
        self._settings.write_text(to_toml(self._configure(config, recording)), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def results_path(self) -> Path:
        return self.folder / "results.jsonl"

    def start(self) -> None:
        """Start the agent; what it says goes to agent.log, its report to report.json."""
        command = [sys.executable, "-m", "edge", "run", "--config", str(self._settings), "--until-answered"]
        with (self.folder / "report.json").open("wb") as output, (self.folder / "agent.log").open("ab") as said:
            self._process = subprocess.Popen(command, stdout=output, stderr=said)

    def wait(self, deadline_s: float) -> None:
        """Wait until the agent ends; at the deadline stop it."""
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()

    def stop(self) -> None:
        """End the agent, politely and then not."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def report(self) -> DeviceReport:
        """Count what the results file holds."""
        answers = list(read_results(self.results_path))
        identities: dict[str, set[tuple[str, int]]] = {name: set() for name in self.frames}
        for answer in answers:
            if answer["type"] == "result":
                identities.setdefault(answer["name"], set()).add((answer["boot"], answer["sequence"]))
        latencies_ms = [answer["latency_ms"] for answer in answers]
        said = (self.folder / "report.json").read_bytes()
        return DeviceReport(
            device=self.name,
            variant=self.variant,
            frames=len(self.frames),
            sent=json.loads(said)["sent"] if said else None,
            results=sum(bool(found) for found in identities.values()),
            refused=sum(answer["type"] == "refusal" for answer in answers),
            lost=sum(not found for found in identities.values()),
            duplicated=sum(len(found) > 1 for found in identities.values()),
            latency_p50_ms=_percentile(latencies_ms, 50),
            latency_p95_ms=_percentile(latencies_ms, 95),
            bytes_per_frame=float(np.mean([one["payload_bytes"] for one in answers])) if answers else None,
            exit_code=-1 if self._process is None else self._process.wait(),
        )

    def _configure(self, config: FleetConfig, recording: Path) -> EdgeConfig:
        backend, precision = self.variant.split("-")
        return EdgeConfig(
            device=DeviceConfig(
                id=self.name,
                site=config.site,
                bundle=str(Path(config.bundle).resolve()),
                trusted_key=str(Path(config.trusted_key).resolve()),
                state_dir=str(self.folder / "state"),
                results_file=str(self.results_path),
            ),
            capture=CaptureConfig(path=str(recording), rate_hz=config.rate_hz),
            runtime=msgspec.convert({"backend": backend, "precision": precision}, RuntimeConfig),
            broker=config.broker,
            link=config.link,
        )


def run_fleet(config: FleetConfig) -> FleetReport:
    """Run the devices until every frame is answered or the time is up.

    Raises
    ------
    CaptureError
        The frames cannot be read, or there are fewer than devices.
    """
    images, names = read_recording(Path(config.frames))
    if len(images) < config.devices:
        raise CaptureError(f"{config.frames}: {len(images)} frames are fewer than {config.devices} devices.")
    step = config.devices if config.share == "split" else 1
    devices = [
        _Device(config, number, images[first::step], names[first::step])
        for number in range(config.devices)
        for first in [number if config.share == "split" else 0]
    ]
    started_s = time.monotonic()
    try:
        for device in devices:
            device.start()
        for device in devices:
            device.wait(started_s + config.timeout_s)
    finally:
        for device in devices:
            device.stop()
    wall_s = time.monotonic() - started_s
    return FleetReport(tuple(device.report() for device in devices), round(wall_s, 3))


def format_report(report: FleetReport) -> str:
    """The report as a table, one line for each device."""
    columns = ("device", "variant", "sent", "results", "lost", "duplicated", "p50 ms", "p95 ms", "bytes/frame")
    rows: list[Sequence[str]] = [columns]
    for one in report.devices:
        figures = (one.latency_p50_ms, one.latency_p95_ms, one.bytes_per_frame)
        counts = ("died" if one.sent is None else str(one.sent), str(one.results), str(one.lost))
        shown = ["-" if figure is None else f"{figure:.1f}" for figure in figures]
        rows.append((one.device, one.variant, *counts, str(one.duplicated), *shown))
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, f"{len(report.devices)} devices in {report.wall_s:.1f} s"])


def _percentile(values: list[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 3) if values else None


def clear_device(folder: Path) -> None:
    """Delete what an earlier run's agent left in a device's folder.

    By that state it would capture none of the same frames again, and those results would be reported as this run's.
    """
    if (folder / "state").exists():
        shutil.rmtree(folder / "state")
    for name in ("results.jsonl", "agent.log"):
        (folder / name).unlink(missing_ok=True)


def to_toml(config: EdgeConfig) -> str:
    """The configuration as TOML; what has its default is left out."""
    given, defaults = msgspec.to_builtins(config), msgspec.to_builtins(EdgeConfig())
    return format_toml(
        {
            table: {key: value for key, value in values.items() if value != defaults[table].get(key)}
            if isinstance(values, dict)
            else values
            for table, values in given.items()
            if values
        }
    )
