"""The edge image under emulation, measured: `make bench-arm64` after `make demo`, as root.

Every figure is of this machine and of the run that wrote it; seconds under emulation say nothing of a board. Each
part adds its figures to docs/results/arm64.json as soon as it has them; `--only` runs some of the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firmware_sim.arm64 import activations
from firmware_sim.arm64.machine import Kind, Machine
from firmware_sim.arm64.stand import Listener, Stand, open_stand
from firmware_sim.arm64.trial import DEVICE, open_machine, run_trial, serve_folder, sign_again
from firmware_sim.arm64.user import run_in_root
from firmware_sim.scenario import Scenario
from splitward.data import open_dataset
from splitward.image.build import ImageSettings, build_image
from splitward.image.cli import DEFAULT_CACHE
from splitward.image.debian import find_mirror
from splitward.image.keys import create_update_key
from splitward.image.root import build_base
from splitward.training.run import open_run
from splitward.wire.bundle import public_key_path, read_bundle, read_trusted_key
from splitward.wire.release import keyed_noise
from splitward.wire.server import server_card_path
from splitward.wire.tensor import quantise

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "docs" / "results" / "arm64.json"
PARITY_IMAGES = 1000
FRAMES = 100
CUT_FRAMES = 1000
START_LIMIT_S = 600.0
MB = 1e6


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    run: Path
    bundle: Path
    key: Path
    folder: Path
    cuts: int
    seed: int

    def image_settings(self, name: str, board: Any = "virt") -> ImageSettings:
        """Settings of one build; the update key is made once."""
        keys = self.folder / "keys"
        if not keys.exists():
            create_update_key(keys)
            (self.folder / "site.toml").write_text("# replaced on the card\n")
        return ImageSettings(
            board=board,
            site=self.folder / "site.toml",
            bundle=self.bundle,
            signing_key=self.key,
            out=self.folder / name / f"edge-{board}.img.zst",
            cache=DEFAULT_CACHE.expanduser(),
            update_certificate=keys / "update.crt",
            build=1,
            mirror=find_mirror(),
        )

    def new_folder(self, name: str) -> Path:
        """An empty folder."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def image(self, board: Any = "virt") -> Path:
        """The image for `board`, built once."""
        settings = self.image_settings("first", board)
        return settings.out if settings.out.exists() else build_image(settings, print)


def measure_image(bench: Bench) -> dict[str, Any]:
    """Two builds, the first with nothing in its cache: how long, how large, and whether they are the same."""
    cold = replace(bench.image_settings("first"), cache=bench.new_folder("cold-cache"))
    started_s = time.monotonic()
    first = build_image(cold, print)
    seconds = time.monotonic() - started_s
    started_s = time.monotonic()
    second = build_image(bench.image_settings("again"), print)
    return {
        "image_build_s": round(seconds, 1),
        "image_build_warm_s": round(time.monotonic() - started_s, 1),
        "image_compressed_mb": round(first.stat().st_size / MB, 1),
        "builds_identical": first.read_bytes() == second.read_bytes(),
    }


def measure_container(bench: Bench) -> dict[str, Any]:
    """The container on a base of the same packages."""
    base, out = bench.folder / "base", bench.folder / "edge.oci.tar"
    if not base.exists():
        build_base(base, DEFAULT_CACHE.expanduser(), find_mirror(), with_test=True, with_agent=False)
    started_s = time.monotonic()
    subprocess.run([str(REPOSITORY / ".ci/container"), str(out), str(base)], check=True)
    return {
        "container_build_s": round(time.monotonic() - started_s, 1),
        "container_compressed_mb": round(out.stat().st_size / MB, 1),
    }


def measure_parity(bench: Bench) -> dict[str, Any]:
    """Classes and activations of every variant, here and under qemu-user."""
    root = bench.folder / "emulated"
    if not root.exists():
        build_base(root, DEFAULT_CACHE.expanduser(), find_mirror(), with_test=False, with_agent=True)
    shared = bench.folder / "parity"
    shared.mkdir(exist_ok=True)
    images = open_dataset("mnist").test.images[:PARITY_IMAGES, 0]
    np.savez(shared / "frames.npz", images=images)
    (shared / "model.bundle").write_bytes(bench.bundle.read_bytes())
    (shared / "trusted.pub").write_bytes(public_key_path(bench.key).read_bytes())
    program = Path(activations.__file__)
    words = ["model.bundle", "trusted.pub", "frames.npz"]
    done = run_in_root(
        root,
        ["/usr/bin/python3", f"/code/{program.name}", *[f"/run/parity/{one}" for one in (*words, "arm64.npz")]],
        timeout_s=1800,
        binds={program.parent: "/code", shared: "/run/parity"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    command = [sys.executable, str(program), *[str(shared / one) for one in (*words, "here.npz")]]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    here, there = dict(np.load(shared / "here.npz")), dict(np.load(shared / "arm64.npz"))
    law = read_bundle(bench.bundle, read_trusted_key(public_key_path(bench.key))).manifest.release
    network = open_run(bench.run).load_network()
    agreement, errors = {}, {}
    for variant in sorted(here):
        noise = torch.from_numpy(
            np.stack([keyed_noise(bytes(32), quantise(one, law.grid), law) for one in here[variant]])
        )
        with torch.no_grad():
            classes = [
                network.server(network.release(torch.from_numpy(found[variant]), noise))
                .decision.argmax(1)
                .numpy()
                for found in (here, there)
            ]
        agreement[variant] = f"{int((classes[0] == classes[1]).sum())} of {len(images)}"
        errors[variant] = float(np.abs(here[variant] - there[variant]).max())
    return {"class_agreement": agreement, "max_abs_error": errors}


def measure_start(bench: Bench, kind: Kind) -> dict[str, Any]:
    """From power-on to the device's own word of its first result."""
    image = bench.image("rpi3" if kind == "raspi3b" else "virt")
    frames = open_dataset("mnist").test.images[:FRAMES, 0]
    folder = bench.new_folder(f"start-{kind}")
    trial = run_trial(
        kind, image, server_card_path(bench.bundle), frames, Scenario(rate_hz=0.0), folder, START_LIMIT_S
    )
    keep_serial(folder / "serial.log", f"arm64-{kind}")
    return {f"{kind}_first_ack_s": trial.first_ack_s, f"{kind}_stored": f"{trial.stored} of {trial.frames}"}


def measure_system_cuts(bench: Bench) -> dict[str, Any]:
    """Cut the power at random instants while a system update is fetched, installed and tried."""
    settings = replace(bench.image_settings("update"), update_key=bench.folder / "keys" / "update.key", build=2)
    if not settings.out.exists():
        build_image(settings, print)
    folder, draw = bench.new_folder("system-cuts"), random.Random(bench.seed)
    frames = open_dataset("mnist").test.images[:CUT_FRAMES, 0]
    with (
        open_stand(folder / "stand", DEVICE, [server_card_path(bench.bundle)]) as stand,
        serve_folder(settings.out.parent, stand.folder / "cloud.pem") as port,
        open_machine("uefi", bench.image(), stand, frames, folder, port, rate_hz=5.0) as device,
    ):
        recovered = _cut(bench, device, stand, lambda: time.sleep(draw.uniform(0.0, 40.0)))
        device.wait(lambda: "slot b has checked in" in device.read_serial(), START_LIMIT_S, "the update")
        found = _end_cuts(device, stand, frames)
    keep_serial(folder / "serial.log", "arm64-system-cuts")
    return {"power_cuts_system": {"tried": bench.cuts, "recovered": recovered, "seed": bench.seed} | found}


def measure_bundle_cuts(bench: Bench) -> dict[str, Any]:
    """Cut the power at random instants while a bundle is fetched, staged, probed and tried.

    There are two bundles of one network, and whichever the device does not run is rolled out before each cut.
    """
    folder, draw = bench.new_folder("bundle-cuts"), random.Random(bench.seed)
    other = sign_again(bench.bundle, bench.key, folder / "other.bundle")
    trusted = public_key_path(bench.key)
    models = [read_bundle(path, read_trusted_key(trusted)).model.hex() for path in (bench.bundle, other)]
    frames = open_dataset("mnist").test.images[:CUT_FRAMES, 0]
    cards = [server_card_path(bench.bundle), server_card_path(other)]
    with (
        open_stand(folder / "stand", DEVICE, cards, trusted) as stand,
        open_machine("virt", bench.image(), stand, frames, folder, rate_hz=5.0) as device,
    ):
        ran: list[str] = []
        rollouts: list[str] = []
        listener = _listener(stand)

        def update() -> None:
            if rollouts:
                stand.halt(rollouts[-1])
            device.wait(lambda: listener.model(DEVICE) in models, START_LIMIT_S, "a whole model")
            ran.append(listener.model(DEVICE))
            rollouts.append(stand.roll_out(models[1 - models.index(ran[-1])]))

        def begin_one() -> None:
            update()
            time.sleep(draw.uniform(0.0, 20.0))

        for path in (bench.bundle, other):
            stand.upload(path)
        recovered = _cut(bench, device, stand, begin_one)
        update()
        goal = models[1 - models.index(ran[-1])]
        device.wait(lambda: listener.model(DEVICE) == goal, START_LIMIT_S, "the last update")
        found = _end_cuts(device, stand, frames)
    keep_serial(folder / "serial.log", "arm64-bundle-cuts")
    changes = sum(one != two for one, two in pairwise(ran))
    found |= {"updates_done_between_cuts": changes}
    return {"power_cuts_bundle": {"tried": bench.cuts, "recovered": recovered, "seed": bench.seed} | found}


def measure_ci(_bench: Bench) -> dict[str, Any]:
    """Minutes of the tests of the emulated device, as continuous integration runs them."""
    started_s = time.monotonic()
    environment = os.environ | {"SPLITWARD_FORBID_SKIPS": "1"}
    subprocess.run([shutil.which("make") or "make", "test-arm64"], check=True, cwd=REPOSITORY, env=environment)
    return {"ci_minutes": round((time.monotonic() - started_s) / 60, 1)}


def _cut(bench: Bench, device: Machine, stand: Stand, begin: Callable[[], None]) -> int:
    """Cut the power after each `begin`; how often the device came online again, with a whole model."""
    listener, recovered = _listener(stand), 0
    for number in range(bench.cuts + 1):
        listener.forget()
        device.wait(lambda: listener.is_online(DEVICE), START_LIMIT_S, f"the start after cut {number}")
        recovered += number > 0
        print(f"cuts {number}, online; {len(stand.stored())} stored", flush=True)
        if number < bench.cuts:
            begin()
            device.cut_power()
            device.start()
    return recovered


def _end_cuts(device: Machine, stand: Stand, frames: Any) -> dict[str, int]:
    """Wait for every frame's result; each is in the store once."""
    device.wait(lambda: len(stand.stored()) >= len(frames), 2 * START_LIMIT_S, "the last result")
    device.wait(lambda: _listener(stand).is_idle(DEVICE), START_LIMIT_S, "an empty spool")
    return {"frames": len(frames), "stored": len(stand.stored())}


def _listener(stand: Stand) -> Listener:
    if stand.listener is None:
        raise SystemExit("nobody listens at the stand")
    return stand.listener


def keep_serial(path: Path, name: str) -> None:
    """Keep a serial log with the results, without what changes the terminal's colours."""
    text = path.read_text(errors="replace").replace("\r", "").replace("\x1b", "")
    (RESULTS.parent / f"{name}.serial.log").write_text(text, encoding="utf-8")


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "image": measure_image,
    "parity": measure_parity,
    "container": measure_container,
    "virt": lambda bench: measure_start(bench, "virt"),
    "uefi": lambda bench: measure_start(bench, "uefi"),
    "raspi3b": lambda bench: measure_start(bench, "raspi3b"),
    "system_cuts": measure_system_cuts,
    "bundle_cuts": measure_bundle_cuts,
    "ci": measure_ci,
}


def main() -> None:
    """Measure the parts that are asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.arm64", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("demo/runs/sealed"), help="the model's run folder")
    parser.add_argument("--bundle", type=Path, default=Path("demo/model.bundle"))
    parser.add_argument("--key", type=Path, default=Path("demo/signing.key"))
    parser.add_argument("--folder", type=Path, help="kept; a temporary one by default")
    parser.add_argument("--only", help=f"parts, with commas (default: all): {', '.join(PARTS)}")
    parser.add_argument("--cuts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-arm64-") as name:
        folder = (options.folder or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(options.run, options.bundle, options.key, folder, options.cuts, options.seed)
        for part in options.only.split(",") if options.only else PARTS:
            load = os.getloadavg()[0]
            found = PARTS[part](bench)
            record(part, found, load)


def record(part: str, found: dict[str, Any], load: float) -> None:
    """Add figures to the results, each part with its command and the load of the machine it was had on."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= found
    cuts = [results[name] for name in ("power_cuts_system", "power_cuts_bundle") if name in results]
    results["power_cuts"] = {name: sum(one[name] for one in cuts) for name in ("tried", "recovered")}
    parts = results.setdefault("parts", {})
    parts[part] = {"command": f"python -m benchmarks.arm64 --only {part}", "load_before": round(load, 1)}
    results["host"] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")
    print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    main()
