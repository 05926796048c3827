"""`python -m firmware_sim`: simulated devices from the command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from firmware_sim.arm64.cli import add_arm64
from firmware_sim.fleet import FleetConfig, format_report, run_fleet
from firmware_sim.scenario import Scenario
from splitward.config import build_config, read_config
from splitward.errors import SplitwardError
from splitward.versions import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when nothing was lost or came twice, else 1; 2 after an error, 130 interrupted."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        return int(run(options))
    except (SplitwardError, OSError) as error:
        print(f"firmware_sim: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("firmware_sim: interrupted.", file=sys.stderr)
        return 130


def _fleet(options: dict[str, Any]) -> int:
    source, out = options.pop("config"), options.pop("out")
    config = FleetConfig() if source is None else read_config(source, FleetConfig)
    report = run_fleet(build_config(_overlay(config, options), FleetConfig, where="flags"))
    print(format_report(report))
    if out is not None:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    return 0 if report.complete else 1


def _chaos(options: dict[str, Any]) -> int:
    from firmware_sim.chaos import run_chaos, write_report

    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    scenario = read_config(options["scenario"], Scenario)
    for name in ("frames", "bundle", "trusted_key"):
        if not options[name].exists():
            flag = f"--{name.replace('_', '-')}"
            raise SplitwardError(
                f"{options[name]} is not there: `make demo` makes it in demo/, or give {flag}."
            )
    if options["seed"] is not None:
        scenario = msgspec.structs.replace(scenario, seed=options["seed"])
    report = run_chaos(
        scenario, options["frames"], options["bundle"], options["trusted_key"], options["folder"]
    )
    print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    if options["out"] is not None:
        command = f"python -m firmware_sim chaos {options['scenario']} --seed {scenario.seed}"
        write_report(report, options["out"], command=command, versions=versions())
    return 0 if report.complete else 1


def _hospitals(options: dict[str, Any]) -> int:
    from firmware_sim.hospitals import Training, format_report, run_hospitals

    path, folder, out = (options.pop(name) for name in ("scenario", "folder", "out"))
    scenario = Scenario(name="calm", devices=3) if path is None else read_config(path, Scenario)
    sites = options.pop("sites")
    if sites is not None:
        scenario = msgspec.structs.replace(scenario, devices=sites)
    training = Training(**{key: value for key, value in options.items() if value is not None})
    report = run_hospitals(scenario, training, folder)
    text = format_report(report, training)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    return 0 if report.complete else 1


def _load(options: dict[str, Any]) -> int:
    from firmware_sim.load import LoadConfig, run_load

    out = options.pop("out")
    given = {key: value for key, value in options.items() if value is not None}
    report = run_load(build_config(given, LoadConfig, where="flags"))
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    print(text.decode())
    if out is not None:
        out.write_bytes(text)
    return 0 if report.complete else 1


def _overlay(config: FleetConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Values of `config` with the flags that were given on top."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    given = {key: value for key, value in options.items() if value is not None}
    values["broker"] |= {key: given.pop(key) for key in ("host", "port") if key in given}
    return values | given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="firmware_sim", description="Simulated devices of Splitward.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fleet = commands.add_parser("fleet", help="run devices on recorded frames and count what became of them")
    fleet.add_argument("--config", type=Path, metavar="FILE", help="fleet.toml; the flags below override it")
    fleet.add_argument("--devices", type=int, metavar="N")
    fleet.add_argument("--frames", metavar="FILE.npz")
    fleet.add_argument("--share", choices=("split", "same"), help="deal the frames out, or give all to each")
    fleet.add_argument("--variants", type=lambda text: text.split(","), metavar="onnx-float32,tflite-int8,...")
    fleet.add_argument("--bundle", metavar="FILE")
    fleet.add_argument("--trusted-key", metavar="FILE")
    fleet.add_argument(
        "--folder", metavar="FOLDER", help="where the devices live, in the place of an earlier run's"
    )
    fleet.add_argument("--rate-hz", type=float, metavar="HZ", help="0: as fast as results come")
    fleet.add_argument("--timeout-s", type=float, metavar="S")
    fleet.add_argument("--host", metavar="HOST")
    fleet.add_argument("--port", type=int, metavar="PORT")
    fleet.add_argument("--out", type=Path, metavar="FILE.json", help="write the report there as well")
    fleet.set_defaults(run=_fleet)
    chaos = commands.add_parser("chaos", help="let a scenario befall a fleet, and account for every frame")
    chaos.add_argument("scenario", type=Path, metavar="SCENARIO.toml")
    chaos.add_argument("--seed", type=int, metavar="N", help="draw other events")
    for flag, file in (
        ("frames", "frames.npz"),
        ("bundle", "model.bundle"),
        ("trusted-key", "signing.key.pub"),
    ):
        path = Path("demo", file)
        chaos.add_argument(f"--{flag}", type=Path, default=path, metavar="FILE", help=f"default: {path}")
    chaos.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="where the devices live; it stays until the next run"
    )
    chaos.add_argument("--out", type=Path, metavar="FILE.json", help="write the report there as well")
    chaos.set_defaults(run=_chaos)
    load = commands.add_parser(
        "load", help="load a cloud with many light devices; report losses and percentiles"
    )
    load.add_argument("--card", metavar="FILE.server.json", help="of the model whose messages are sent")
    load.add_argument("--devices", type=int, metavar="N")
    load.add_argument("--frames", type=int, metavar="N", help="of all devices together")
    load.add_argument(
        "--rate-hz", type=float, metavar="HZ", help="of all devices together; 0: as fast as may be"
    )
    load.add_argument("--window", type=int, metavar="N", help="unanswered frames of a device, without a rate")
    load.add_argument("--retry-s", type=float, metavar="S")
    load.add_argument("--timeout-s", type=float, metavar="S")
    load.add_argument("--host", metavar="HOST")
    load.add_argument("--port", type=int, metavar="PORT")
    load.add_argument("--prefix", metavar="NAME", help="the devices are NAME-0, NAME-1, ...")
    load.add_argument("--out", type=Path, metavar="FILE.json", help="write the report there as well")
    load.set_defaults(run=_load)
    hospitals = commands.add_parser(
        "hospitals", help="sites that train together over a real broker, each with its own patients' images"
    )
    hospitals.add_argument(
        "scenario", type=Path, nargs="?", metavar="SCENARIO.toml", help="default: nothing happens"
    )
    hospitals.add_argument("--sites", type=int, metavar="N", help="default: the scenario's devices")
    hospitals.add_argument("--data", metavar="DATA", help="as for `splitward train` (default: phantom)")
    hospitals.add_argument("--task")
    hospitals.add_argument("--size", type=int)
    hospitals.add_argument("--defence")
    hospitals.add_argument("--arrangement", choices=("turn", "splitfed-v1", "splitfed-v2", "fedsgd"))
    hospitals.add_argument("--precision", choices=("float32", "int8", "int4"))
    hospitals.add_argument("--alpha", type=float, help="Dirichlet: how unlike the sites are (default: alike)")
    hospitals.add_argument("--epochs", type=int)
    hospitals.add_argument("--rounds", type=int)
    hospitals.add_argument("--batch", type=int)
    hospitals.add_argument("--seed", type=int)
    hospitals.add_argument("--folder", type=Path, metavar="FOLDER", help="a new one, for runs and journals")
    hospitals.add_argument("--out", type=Path, metavar="FILE.json", help="write the report there as well")
    hospitals.set_defaults(run=_hospitals)
    add_arm64(commands)
    return parser
