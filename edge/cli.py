"""`python -m edge`: the device agent's command line."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge.agent import run_agent
from edge.config import EdgeConfig
from splitward.config import read_config
from splitward.errors import SplitwardError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 after an error that it explains on standard error."""
    options = _parser().parse_args(arguments)
    if options.command in ("install", "uninstall"):
        return _install(options)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        config = read_config(options.config, EdgeConfig) if options.config else EdgeConfig()
        report = run_agent(config, stop=_stop_on_signal(), until_answered=options.until_answered)
    except SplitwardError as error:
        print(f"edge: {error}", file=sys.stderr)
        return 2
    print(msgspec.json.encode(report).decode())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge", description="The device agent of Splitward.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    run = commands.add_parser("run", help="capture frames, release them, collect results; SIGTERM ends it")
    run.add_argument("--config", type=Path, metavar="FILE", help="edge.toml; without it, the demo's settings")
    run.add_argument(
        "--until-answered",
        action="store_true",
        help="end when the source has no more frames and every frame is answered",
    )
    run.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
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
    uninstall = commands.add_parser("uninstall", help="remove what install has set up; as root")
    uninstall.add_argument("--purge", action="store_true", help="and configuration, spool, keys and user")


def _install(options: argparse.Namespace) -> int:
    from edge.install import InstallSettings, install, uninstall

    try:
        if options.command == "install":
            install(InstallSettings(options.package, tuple(options.pip), options.system_packages), print)
        else:
            uninstall(options.purge, print)
    except SplitwardError as error:
        print(f"edge: {error}", file=sys.stderr)
        return 2
    return 0


def _stop_on_signal() -> threading.Event:
    """Event that SIGTERM or SIGINT sets.

    A thread sets it, not the handler: that runs in the main thread, which may hold the event's lock. (Blocking
    the signals for `sigwait` does not do either: numpy's threads started earlier, and would die of them.)
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
