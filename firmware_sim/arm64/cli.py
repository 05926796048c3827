"""`python -m firmware_sim arm64`: the edge image and its parts under emulation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from splitward.errors import SplitwardError

FIRST_ACK_S = 600.0


def add_arm64(commands: Any) -> None:
    """Add `arm64` to the commands of `firmware_sim`."""
    words = commands.add_parser("arm64", help="the edge image and its parts under emulation").add_subparsers(
        required=True, metavar="WHAT"
    )
    boot = words.add_parser("boot", help="start an image in a machine, against a broker and cloud of its own")
    boot.add_argument("--machine", choices=("virt", "uefi", "raspi3b"), default="virt")
    boot.add_argument("--image", type=Path, required=True, metavar="edge.img.zst")
    boot.add_argument("--server", type=Path, required=True, metavar="NAME.server.json")
    boot.add_argument("--frames", type=Path, required=True, metavar="FILE.npz")
    boot.add_argument("--scenario", type=Path, metavar="FILE.toml", help="what befalls it (default: nothing)")
    boot.add_argument("--out", type=Path, required=True, help="folder of serial log, logs, store and report")
    boot.set_defaults(run=_boot)

    run = words.add_parser("run", help="run a program of an arm64 root under qemu-user; as root")
    run.add_argument("--root", type=Path, required=True, help="unpacked by `splitward image base`")
    run.add_argument("--board", choices=("rpi3", "rpi4"), default="rpi4", help="whose processor it meets")
    run.add_argument("--bind", action="append", default=[], metavar="HERE:INSIDE")
    run.add_argument("--timeout-s", type=float, default=600.0)
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="PROGRAM ...")
    run.set_defaults(run=_run)


def _boot(options: dict[str, Any]) -> int:
    from edge.recording import read_recording
    from firmware_sim.arm64.machine import missing_tools
    from firmware_sim.arm64.trial import format_trial, run_trial
    from firmware_sim.arm64.user import EmulationError
    from firmware_sim.scenario import Scenario
    from splitward.config import read_config

    out: Path = options["out"]
    try:
        if (missing := missing_tools()) is not None:
            raise EmulationError(f"machines cannot be emulated: {missing}.")
        images, _ = read_recording(options["frames"])
        path = options["scenario"]
        scenario = Scenario(rate_hz=0.0) if path is None else read_config(path, Scenario)
        machine, image, server = options["machine"], options["image"], options["server"]
        trial = run_trial(machine, image, server, images, scenario, out, FIRST_ACK_S)
    except (SplitwardError, OSError) as error:
        print(f"firmware_sim: {error}", file=sys.stderr)
        return 2
    (out / "report.json").write_text(format_trial(trial) + "\n", encoding="utf-8")
    print(format_trial(trial))
    return 0 if trial.stored == trial.frames else 1


def _run(options: dict[str, Any]) -> int:
    from firmware_sim.arm64.user import EmulationError, missing_tools, run_in_root

    program = [word for word in options["program"] if word != "--"]
    try:
        if (missing := missing_tools()) is not None:
            raise EmulationError(f"arm64 programs cannot be emulated: {missing}.")
        binds = {
            Path(here).resolve(): inside for here, _, inside in (one.partition(":") for one in options["bind"])
        }
        done = run_in_root(options["root"], program, options["timeout_s"], options["board"], binds)
    except (SplitwardError, OSError) as error:
        print(f"firmware_sim: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode
