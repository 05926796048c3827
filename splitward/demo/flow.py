"""The demo from end to end: train, attack, export, run devices against the cloud, report; nothing stays."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge.config import BrokerConfig, LinkConfig
from export.exporter import export_run
from firmware_sim.broker import start_broker
from firmware_sim.fleet import FleetConfig, run_fleet
from splitward.data import Dataset, open_dataset
from splitward.demo.inversion import attack_profiles, draw_reconstructions
from splitward.demo.measure import summarise
from splitward.demo.report import format_summary, write_report
from splitward.demo.services import start_cloud
from splitward.errors import SplitwardError
from splitward.training.loop import frames_of, to_unit, train
from splitward.training.run import Run
from splitward.training.settings import RunSettings, split_settings
from splitward.wire.bundle import create_signing_key, public_key_path, read_signing_key

STEPS = {"sealed": 1290, "none": 860, "psgl": 860}
"""Optimiser steps for each profile: 3, 2 and 2 epochs of MNIST. The compared two need not be at their best."""
ATTACK_STEPS = 400
BATCH = 128
VARIANTS = ("onnx-float32", "onnx-int8", "tflite-int8")
RATE_HZ = 40.0
SERVE_RATE_HZ = 4.0


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs on; `frames` test images for each device; `effort` scales all trainings."""

    data: str = "mnist"
    task: str | None = None
    size: int | None = None
    out: Path = Path("demo")
    frames: int = 1000
    effort: float = 1.0


def run_demo(settings: DemoSettings, *, serve: bool = False, fresh: bool = False) -> int:
    """Run the demo; 0 when every frame has exactly one result, else 1.

    Writes `summary.json`, `report.html`, `reconstructions.png` and everything between to `settings.out`. A
    finished training there is used again unless `fresh`.
    """
    started_s, out = time.monotonic(), settings.out
    _say(1, f"data: {settings.data}")
    dataset = open_dataset(settings.data, task=settings.task, size=settings.size)
    out.mkdir(parents=True, exist_ok=True)
    runs = {profile: _train(dataset, settings, profile, fresh) for profile in STEPS}
    networks = {profile: runs[profile].load_network() for profile in ("none", "psgl", "sealed")}
    _say(5, "attack: a decoder for each profile, trained on what it releases")
    found = attack_profiles(dataset, networks, round(settings.effort * ATTACK_STEPS))
    draw_reconstructions(to_unit(frames_of(dataset.test)[:10]), found, out / "reconstructions.png")
    _say(6, "export: ONNX and TFLite, float32 and int8, checked and signed")
    bundle = out / "model.bundle"
    export_run(runs["sealed"], dataset, bundle, _signing_key(out))
    frames = min(settings.frames, len(dataset.test))
    _say(7, f"run: broker, cloud and {len(VARIANTS)} devices, {frames} test images each")
    names = _write_frames(dataset, frames, out / "frames.npz")
    shutil.rmtree(out / "fleet", ignore_errors=True)
    with start_broker() as broker, start_cloud(out, bundle, broker.port) as address:
        fleet = _fleet(out, bundle, broker.port)
        report = run_fleet(fleet)
        labels = dict(zip(names, dataset.test.labels[:frames].tolist(), strict=True))
        summary = summarise(report, fleet, labels, dataset.test.images[:frames], out / "cloud.db")
        summary |= _about(settings, runs, found, broker.kind)
        summary["wall_s"] = round(time.monotonic() - started_s, 1)
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_report(summary, out / "reconstructions.png", out / "report.html")
        sys.stdout.write("\n" + format_summary(summary) + f"\n\nReport: {out / 'report.html'}\n")
        if serve:
            _serve(fleet, address)
    return 0 if report.complete and summary["lost"] == summary["duplicated"] == 0 else 1


def _say(step: int, what: str) -> None:
    sys.stdout.write(f"[{step}/7] {what}\n")
    sys.stdout.flush()


def _train(dataset: Dataset, settings: DemoSettings, profile: str, fresh: bool) -> Run:
    """The profile's run, trained now or before."""
    folder = settings.out / "runs" / profile
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    steps_per_epoch = -(-len(dataset.train) // BATCH)
    wanted = RunSettings(
        data=settings.data,
        task=settings.task,
        size=settings.size,
        split=split_settings(dataset, profile),
        epochs=max(1, round(settings.effort * STEPS[profile] / steps_per_epoch)),
        batch=BATCH,
    )
    what = f"train: {profile}, {wanted.epochs} epochs of {len(dataset.train)} images"
    done = (folder / "weights.safetensors").exists()
    _say(2 + list(STEPS).index(profile), what + (" (done before; --fresh trains again)" if done else ""))
    try:
        return train(dataset, wanted, folder)
    except SplitwardError as error:
        raise SplitwardError(f"{error} Or give --fresh.") from error


def _signing_key(out: Path) -> Any:
    path = out / "signing.key"
    return read_signing_key(path) if path.exists() else create_signing_key(path)


def _write_frames(dataset: Dataset, count: int, path: Path) -> list[str]:
    names = [f"test-{index:05d}" for index in range(count)]
    np.savez(path, images=dataset.test.images[:count], names=np.array(names))
    return names


def _fleet(out: Path, bundle: Path, broker_port: int) -> FleetConfig:
    return FleetConfig(
        devices=len(VARIANTS),
        frames=str(out / "frames.npz"),
        share="same",
        variants=VARIANTS,
        bundle=str(bundle),
        trusted_key=str(public_key_path(out / "signing.key")),
        folder=str(out / "fleet"),
        rate_hz=RATE_HZ,
        broker=BrokerConfig(port=broker_port),
        link=LinkConfig(status_s=5.0),
    )


def _about(settings: DemoSettings, runs: dict[str, Run], found: dict[str, Any], broker: str) -> dict[str, Any]:
    """What the summary says beside what the devices and the store showed."""
    card = runs["sealed"].card
    return {
        "accuracy_undefended": runs["none"].read_metrics()[-1]["test"]["decision"],
        "accuracy_test_set": {name: run.read_metrics()[-1]["test"] for name, run in runs.items()},
        "decoder_ssim": {name: round(inversion.ssim, 4) for name, inversion in found.items()},
        "decoder_mse": {name: round(inversion.mse, 5) for name, inversion in found.items()},
        "data": {key: card[key] for key in ("name", "task", "synthetic", "licence", "images")},
        "classes": card["classes"],
        "broker": broker,
        "epochs": {name: run.settings.epochs for name, run in runs.items()},
        "seed": runs["sealed"].settings.seed,
        "command": f"splitward demo --data {settings.data}",
        "versions": card["versions"],
    }


def _serve(fleet: FleetConfig, address: str) -> None:
    """Keep devices at work until Ctrl-C."""
    sys.stdout.write(f"\nDashboard: {address}\nCtrl-C ends it.\n")
    sys.stdout.flush()
    calm = msgspec.structs.replace(fleet, rate_hz=SERVE_RATE_HZ, timeout_s=1e9)
    rounds = 0
    try:
        while True:
            rounds += 1
            # A device never sends a frame twice, so that each round needs a state of its own.
            run_fleet(msgspec.structs.replace(calm, folder=f"{fleet.folder}-served-{rounds}"))
    except KeyboardInterrupt:
        sys.stdout.write("\nended.\n")
    finally:
        for number in range(1, rounds + 1):
            shutil.rmtree(f"{fleet.folder}-served-{number}", ignore_errors=True)
