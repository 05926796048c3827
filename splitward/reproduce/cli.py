"""`splitward reproduce`: the words of its experiments. What they need loads only when they run."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from splitward.errors import SplitwardError

RECAPTURES = "splitward reproduce recaptures --out docs/results --runs FOLDER --data FOLDER"
"""Recorded beside the figures, whatever the folders are called."""


def add_reproduce(commands: Any) -> None:
    """Add the command to the subparsers of `splitward`."""
    experiments = commands.add_parser("reproduce", help="repeat the published experiments").add_subparsers(
        required=True, metavar="WHAT"
    )
    paper = experiments.add_parser("paper", help="the experiments of the method's own paper")
    paper.add_argument("--out", type=Path, required=True, help="folder; the same command again goes on")
    paper.add_argument("--mias", type=Path, metavar="FOLDER", help="the unpacked mini-MIAS archive")
    paper.add_argument("--effort", type=float, default=1.0, help="factor on images, epochs and steps")
    paper.set_defaults(run=_paper)

    privacy = experiments.add_parser("privacy", help="every defence on every data set, attacked; hours")
    _add_grid(privacy)
    privacy.add_argument("--defences", help="names, with commas (default: all)")
    privacy.add_argument("--seeds", help="seeds of the target networks, with commas (default: all)")
    privacy.add_argument("--table", action="store_true", help="only make the table of the cells that are done")
    privacy.set_defaults(run=_privacy)

    search = experiments.add_parser("search", help="settings of sealed, compared on validation data")
    _add_grid(search)
    search.set_defaults(run=_search)

    streams = experiments.add_parser("streams", help="what recovery and fusion add under noise")
    _add_grid(streams)
    streams.set_defaults(run=_streams)

    recaptures = experiments.add_parser(
        "recaptures", help="what captures that differ tell of the sealed networks that `privacy` left in --runs"
    )
    _add_grid(recaptures)
    recaptures.set_defaults(run=_recaptures)

    hijack = experiments.add_parser(
        "hijack", help="feature-space hijacking of a training, under the client's guard"
    )
    hijack.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    hijack.add_argument("--defences", default="none,sealed", help="names, with commas (default: none,sealed)")
    hijack.set_defaults(run=_hijack)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder; the same command again goes on")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the networks (default: runs)"
    )
    parser.add_argument("--data", type=Path, default=Path(), help="folder with pneumoniamnist.npz and mias/")
    parser.add_argument("--only", help="data sets, with commas (default: all)")


def _paper(arguments: argparse.Namespace) -> int:
    from splitward.reproduce.paper import reproduce_paper

    reproduce_paper(arguments.out, mias=arguments.mias, effort=arguments.effort, command=_command(arguments))
    return 0


def _privacy(arguments: argparse.Namespace) -> int:
    from splitward.reproduce.plan import DEFENCE_NAMES, PLANS, TARGET_SEEDS
    from splitward.reproduce.privacy import Grid, run_grid
    from splitward.reproduce.table import write_table

    grid = Grid(
        arguments.out,
        arguments.runs,
        arguments.data,
        _chosen("--only", arguments.only, tuple(PLANS)),
        _chosen("--defences", arguments.defences, DEFENCE_NAMES),
        [int(seed) for seed in _chosen("--seeds", arguments.seeds, tuple(str(seed) for seed in TARGET_SEEDS))],
    )
    if not arguments.table:
        run_grid(grid)
    write_table(arguments.out)
    sys.stdout.write(f"{arguments.out / 'privacy.json'}\n")
    return 0


def _search(arguments: argparse.Namespace) -> int:
    from splitward.reproduce.plan import SEARCHES
    from splitward.reproduce.privacy import Grid, run_grid
    from splitward.reproduce.table import write_table

    only = _chosen("--only", arguments.only, tuple(SEARCHES))
    run_grid(
        Grid(
            arguments.out,
            arguments.runs,
            arguments.data,
            only,
            target_seeds=(0,),
            plans=SEARCHES,
            kind="search",
        )
    )
    write_table(arguments.out, "search")
    sys.stdout.write(f"{arguments.out / 'search.json'}\n")
    return 0


def _streams(arguments: argparse.Namespace) -> int:
    from splitward.reproduce.streams import SETS, compare_streams

    compare_streams(
        _chosen("--only", arguments.only, tuple(SETS)),
        arguments.out,
        arguments.runs,
        arguments.data,
        command=_command(arguments),
    )
    sys.stdout.write(f"{arguments.out / 'streams.json'}\n")
    return 0


def _recaptures(arguments: argparse.Namespace) -> int:
    from splitward.audit.target import open_target
    from splitward.reproduce.plan import PLANS, TARGET_SEEDS
    from splitward.reproduce.privacy import open_plan
    from splitward.reproduce.recaptures import MOVEMENTS, attack_recaptures, decode_recaptures
    from splitward.training.run import write_atomically
    from splitward.versions import versions

    found: dict[str, Any] = {}
    for name in _chosen("--only", arguments.only, tuple(PLANS)):
        for seed in TARGET_SEEDS:
            folder = arguments.runs / "privacy" / f"{name}-sealed-{seed}"
            if folder.exists():
                target, plan = open_target(folder), PLANS[name]
                dataset = open_plan(plan, arguments.data, seed)
                rows = [
                    attack_recaptures(target, dataset, targets=plan.targets, movement=one, seed=seed)
                    for one in MOVEMENTS
                ]
                rows[-1]["decoder"] = decode_recaptures(target, dataset, plan, MOVEMENTS[-1], seed=seed)
                found[folder.name] = rows
                sys.stdout.write(f"{folder.name}: {json.dumps(found[folder.name])}\n")
    out = arguments.out / "recaptures.json"
    text = json.dumps({**found, "command": RECAPTURES, "versions": versions()}, indent=2)
    write_atomically(out, text + "\n")
    sys.stdout.write(f"{out}\n")
    return 0


def _hijack(arguments: argparse.Namespace) -> int:
    from splitward.audit.hijack_trial import run_trial
    from splitward.data import open_dataset
    from splitward.reproduce.plan import DEFENCE_NAMES
    from splitward.training.run import write_atomically
    from splitward.versions import versions

    dataset = open_dataset("mnist")
    found = {
        name: run_trial(dataset, "mnist", name)
        for name in _chosen("--defences", arguments.defences, DEFENCE_NAMES)
    }
    text = json.dumps({**found, "command": _command(arguments), "versions": versions()}, indent=2)
    write_atomically(arguments.out, text + "\n")
    sys.stdout.write(f"{arguments.out}\n")
    return 0


def _command(arguments: argparse.Namespace) -> str:
    return shlex.join(["splitward", *arguments.words])


def _chosen(option: str, given: str | None, known: tuple[str, ...]) -> list[str]:
    """Names from a list with commas, all of `known` by default."""
    if given is None:
        return list(known)
    names = [name.strip() for name in given.split(",")]
    if strange := [name for name in names if name not in known]:
        raise SplitwardError(f"{option} {', '.join(strange)}: not known; choose from {', '.join(known)}.")
    return names
