"""`python -m cloud --config cloud.toml`: run the service until SIGTERM, then drain."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cloud.access import Access, Scope
from cloud.app import create_app
from cloud.config import CloudConfig, read_cloud_config
from cloud.feed import Feed
from cloud.logs import start_log
from cloud.problem import Problem
from cloud.store import Store
from splitward.errors import SplitwardError


class _Server(uvicorn.Server):
    """Ends the event streams at a signal: uvicorn waits for open requests before the lifespan may drain."""

    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._feed.close()
        super().handle_exit(sig, frame)


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 2 when it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m cloud", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML file; the README lists its keys")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="run the service (the default)")
    commands.add_parser("migrate", help="bring the database's tables up to date")
    token = commands.add_parser("token", help="make an API token and print it; the first one is made so")
    token.add_argument("name")
    token.add_argument("--scope", choices=("read", "operate"), default="read")
    arguments = parser.parse_args(argv)
    try:
        config = read_cloud_config(arguments.config)
        start_log(config.log)
        if arguments.command == "token":
            sys.stdout.write(f"{asyncio.run(_create_token(config, arguments.name, arguments.scope))}\n")
            return 0
        if arguments.command == "migrate":
            asyncio.run(_migrate(config))
            return 0
        app = create_app(config)
    except (SplitwardError, Problem) as error:
        sys.stderr.write(f"{error.detail if isinstance(error, Problem) else error}\n")
        return 2
    return _serve(app, config)


async def _migrate(config: CloudConfig) -> None:
    store = Store(config.store)
    try:
        await store.open()
    finally:
        await store.close()


async def _create_token(config: CloudConfig, name: str, scope: Scope) -> str:
    store = Store(config.store)
    try:
        await store.open()
        return await Access(store, config.api).create(name, (scope,), "command line")
    finally:
        await store.close()


def _serve(app: FastAPI, config: CloudConfig) -> int:
    settings = uvicorn.Config(
        app,
        config.api.host,
        config.api.port,
        loop="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=config.api.cert,
        ssl_keyfile=config.api.key,
    )
    server = _Server(settings, app.state.service.feed)
    for ended in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains at the signal and then raises it once more, for whoever handled it before.
        signal.signal(ended, signal.SIG_IGN)
    server.run()
    return 0 if server.started else 2


if __name__ == "__main__":
    sys.exit(main())
