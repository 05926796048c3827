"""`python -m edge`: the device agent's command line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge.errors import ReleaserError
from edge.secret import leave_no_core
from edge.settings import load_settings
from splitward.errors import ConfigError, SplitwardError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_FAILED, EXIT_ERROR, EXIT_START_ANEW = 1, 2, 75
"""A check failed; something is wrong that starting anew does not mend; starting anew may mend it (EX_TEMPFAIL)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or an exit code of those above after an error that it explains on standard error."""
    leave_no_core()
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.rest = rest
    if rest and options.command is not _train:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(options.command(options))
    except ReleaserError as error:
        print(f"edge: {error}", file=sys.stderr)
        return EXIT_START_ANEW
    except SplitwardError as error:
        print(f"edge: {error}", file=sys.stderr)
        return EXIT_ERROR


def _run(options: argparse.Namespace) -> int:
    from edge.supervisor import launch

    stop = _stop_on_signal()
    while True:
        config = load_settings(options.config)
        releaser = launch()
        from edge.agent import run_agent  # while the releaser imports what it needs
        from edge.logs import start_logging

        start_logging(config.health, options.log_level)
        report = run_agent(config, stop=stop, until_answered=options.until_answered, releaser=releaser)
        if not report.restart:
            break
        logging.getLogger(__name__).info("starting anew, as ordered")
    print(msgspec.json.encode(report).decode())
    return 0


def _check(options: argparse.Namespace) -> int:
    from edge.check import check_device, format_findings

    findings = check_device(load_settings(options.config), quick=options.quick)
    print(_json(findings) if options.json else format_findings(findings))
    return EXIT_FAILED if any(one.state == "fail" for one in findings) else 0


def _bench(options: argparse.Namespace) -> int:
    from edge.bench import bench_device, choose_fastest, format_bench

    config = load_settings(options.config)
    figures = bench_device(config, options.frames)
    print(_json(figures) if options.json else format_bench(figures))
    if options.choose:
        print(choose_fastest(config, figures), file=sys.stderr)
    return 0


def _diagnostics(options: argparse.Namespace) -> int:
    from edge.diagnostics import collect

    print(collect(load_settings(options.config), options.out))
    return 0


def _enroll(options: argparse.Namespace) -> int:
    from edge.enrolment import enroll

    try:
        token = options.token_file.read_text().strip() if options.token_file else options.token
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {options.token_file}: {error}.") from error
    print(enroll(options.url, token, options.site, options.device, options.out, options.ca))
    return 0


def _renew(options: argparse.Namespace) -> int:
    from edge.enrolment import renew

    print(renew(load_settings(options.config), force=options.force))
    return 0


def _list_models(options: argparse.Namespace) -> int:
    from edge.models import ModelStore

    models = ModelStore(load_settings(options.config)).installed()
    print(
        _json(models)
        if options.json
        else "\n".join(f"{one.state:10} {one.model:34} {one.path}" for one in models)
    )
    return 0


def _install_model(options: argparse.Namespace) -> int:
    from edge.installation import InstallRequest, install_apart
    from edge.models import ModelStore

    config = load_settings(options.config)
    report = install_apart(
        InstallRequest(config=config, path=str(options.bundle.resolve()), allow_older=options.allow_older)
    )
    if report.reason:
        print(f"edge: refused: {report.reason}: {report.message}", file=sys.stderr)
        return EXIT_ERROR
    ModelStore(config).activate(report.model)
    print(f"{report.name} ({report.model}) is installed; it runs, on trial, from the agent's next start.")
    return 0


def _roll_back_model(options: argparse.Namespace) -> int:
    from edge.models import ModelStore

    model = ModelStore(load_settings(options.config)).roll_back()
    print(f"{model or 'the configured bundle'} runs from the agent's next start.")
    return 0


def _train(options: argparse.Namespace) -> int:
    from edge.train import training_command

    command, environment = training_command(load_settings(options.config), options.training, options.rest)
    os.execve(command[0], command, environment)  # noqa: S606  # our own interpreter


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge", description="The device agent of Splitward.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    configured = argparse.ArgumentParser(add_help=False)
    configured.add_argument(
        "--config", type=Path, metavar="FILE", help="edge.toml; without it, the demo's settings"
    )

    run = commands.add_parser(
        "run", parents=[configured], help="capture frames, release them, collect results; SIGTERM ends it"
    )
    run.add_argument(
        "--until-answered",
        action="store_true",
        help="end when the sources have no more frames and every frame is answered",
    )
    run.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), help="overrides health.log_level"
    )
    run.set_defaults(command=_run)

    check = commands.add_parser(
        "check", parents=[configured], help="look whether this board can do its work; 1 if not"
    )
    check.add_argument("--quick", action="store_true", help="only what needs no camera and no network")
    check.add_argument("--json", action="store_true")
    check.set_defaults(command=_check)

    bench = commands.add_parser("bench", parents=[configured], help="measure every variant on this board")
    bench.add_argument("--frames", type=int, default=500, metavar="N")
    bench.add_argument("--json", action="store_true")
    bench.add_argument(
        "--choose", action="store_true", help="keep the fastest sound variant for the next start"
    )
    bench.set_defaults(command=_bench)

    diagnostics = commands.add_parser(
        "diagnostics", parents=[configured], help="collect what helps to find a fault, without secrets or names"
    )
    diagnostics.add_argument("--out", type=Path, default=Path(), metavar="FOLDER")
    diagnostics.set_defaults(command=_diagnostics)

    enroll = commands.add_parser("enroll", help="make a key, ask the cloud for a certificate, write edge.toml")
    enroll.add_argument("--url", required=True, metavar="https://CLOUD")
    token = enroll.add_mutually_exclusive_group(required=True)
    token.add_argument("--token", help="one-time token; other users of this machine see it while it is in use")
    token.add_argument("--token-file", type=Path, metavar="FILE")
    enroll.add_argument("--site", required=True)
    enroll.add_argument("--device", required=True)
    enroll.add_argument("--ca", type=Path, metavar="FILE.pem", help="authority of the cloud's certificate")
    enroll.add_argument("--out", type=Path, default=Path("/etc/splitward"), metavar="FOLDER")
    enroll.set_defaults(command=_enroll)

    renew = commands.add_parser("renew", parents=[configured], help="renew the certificate if it is time")
    renew.add_argument("--force", action="store_true", help="even if it is not")
    renew.set_defaults(command=_renew)

    model = commands.add_parser("model", help="installed bundles").add_subparsers(
        required=True, metavar="ACTION"
    )
    listed = model.add_parser("list", parents=[configured], help="what is installed, and what runs")
    listed.add_argument("--json", action="store_true")
    listed.set_defaults(command=_list_models)
    install = model.add_parser("install", parents=[configured], help="verify, probe and install a bundle")
    install.add_argument("bundle", type=Path)
    install.add_argument("--allow-older", action="store_true")
    install.set_defaults(command=_install_model)
    back = model.add_parser("rollback", parents=[configured], help="go back to the bundle before")
    back.set_defaults(command=_roll_back_model)
    train = commands.add_parser(
        "train",
        parents=[configured],
        help="take part in a training across sites; needs splitward[edge-train]",
        epilog="Every other option is that of `splitward train`: --data, --out, --defence, --peer, --no-guard ...",
    )
    train.add_argument("--training", required=True, metavar="ID", help="its id, from whoever leads it")
    train.set_defaults(command=_train)
    _add_install(commands)
    return parser


def _add_install(commands: Any) -> None:
    install = commands.add_parser("install", help="set the agent up on this Debian or Ubuntu system; as root")
    install.add_argument(
        "--package", default="splitward[edge,edge-tflite]", help="wheel, folder or requirement for pip"
    )
    install.add_argument("--pip", action="append", default=[], metavar="ARGUMENT", help="given to pip as it is")
    install.add_argument(
        "--system-packages", action="store_true", help="see the system's Python packages, such as JetPack's"
    )
    install.set_defaults(command=_install)
    uninstall = commands.add_parser("uninstall", help="remove what install has set up; as root")
    uninstall.add_argument("--purge", action="store_true", help="and configuration, spool, keys and user")
    uninstall.set_defaults(command=_uninstall)


def _install(options: argparse.Namespace) -> int:
    from edge.install import InstallSettings, install

    install(InstallSettings(options.package, tuple(options.pip), options.system_packages), print)
    return 0


def _uninstall(options: argparse.Namespace) -> int:
    from edge.install import uninstall

    uninstall(options.purge, print)
    return 0


def _stop_on_signal() -> threading.Event:
    """Event that SIGTERM or SIGINT sets.

    A thread sets it, not the handler: that runs in the main thread, which may hold the event's lock. (Blocking
    the signals for `sigwait` does not do either: other threads started earlier, and would die of them.)
    """
    stop = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.detach())  # stays open as long as the process
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)

    def wait() -> None:
        reader.recv(1)
        stop.set()

    threading.Thread(target=wait, name="signals", daemon=True).start()
    return stop
