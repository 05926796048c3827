"""`python -m cloud --config cloud.toml`: run the service until SIGTERM, then drain."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import socket
import ssl
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from cloud.access import Access, Scope
from cloud.app import create_app
from cloud.authority import AUTHORITY_DAYS, Authority
from cloud.config import ApiConfig, CloudConfig, read_cloud_config
from cloud.feed import Feed
from cloud.guard import UPLOAD
from cloud.logs import start_log
from cloud.problem import Problem
from cloud.store import Store
from splitward.disk import write_whole
from splitward.errors import ConfigError, SplitwardError

REQUEST_S = 30.0
"""How long a caller may take to send a request, from its connection or the answer before."""
LINGER_S = 10
"""How long a request may still take at the end: a client that stops reading, or sending, must not hold up the drain."""


class _Server(uvicorn.Server):
    """Ends the event streams at a signal: uvicorn waits for open requests before the lifespan may drain.

    It also ends connections that owe it a request for too long, for which uvicorn has no limit: a few hundred of them
    would use up the process's files.
    """

    def __init__(self, config: uvicorn.Config, feed: Feed) -> None:
        super().__init__(config)
        self._feed = feed
        self._owing: dict[H11Protocol, tuple[RequestResponseCycle | None, float]] = {}
        """By connection: the last request that began, and since when the rest of it, or the next one, is awaited."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and take what is in memory then out of Python's garbage collection: it stays, and to go through
        all of torch's and the models' objects again and again would hold up every reply."""
        await super().startup(sockets)
        logging.getLogger(__name__).info("the API answers at %s, port %d", self.config.host, self.config.port)
        gc.collect()
        gc.freeze()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 10 == 0:
            self._end_slow()
        return await super().on_tick(counter)

    def _end_slow(self) -> None:
        now_s, before, self._owing = time.monotonic(), self._owing, {}
        for connection in self.server_state.connections:
            if (
                not isinstance(connection, H11Protocol)
                or connection.transport.is_closing()
                or not _owes(connection)
            ):
                continue
            cycle, since_s = before.get(connection, (connection.cycle, now_s))
            if cycle is not connection.cycle:
                since_s = now_s
            if now_s - since_s > REQUEST_S:
                connection.transport.close()
            else:
                self._owing[connection] = connection.cycle, since_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._feed.close()
        super().handle_exit(sig, frame)


def _owes(connection: H11Protocol) -> bool:
    """Whether a caller is to send something: a request, or the rest of one, but for the upload, which may take long."""
    cycle: RequestResponseCycle | None = connection.cycle
    if cycle is None or cycle.response_complete:
        return True
    return cycle.more_body and cycle.scope["path"] != UPLOAD


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code is 2 when it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m cloud", description=__doc__)
    parser.add_argument(
        "--config", type=Path, required=True, help="TOML file; cloud/config.py describes its keys"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("serve", help="run the service (the default)")
    commands.add_parser("migrate", help="bring the database's tables up to date")
    token = commands.add_parser("token", help="make an API token and print it; the first one is made so")
    token.add_argument("name")
    token.add_argument("--scope", choices=("read", "operate"), default="read")
    certify = commands.add_parser("certify", help="make a certificate of the broker or of this service")
    certify.add_argument("service", choices=("broker", "cloud"))
    certify.add_argument("--host", action="append", default=[], help="name or address by which it is reached")
    certify.add_argument(
        "--days", type=float, default=365.0, help=f"how long it is good, up to {AUTHORITY_DAYS}"
    )
    certify.add_argument("--out", type=Path, required=True, help="folder for SERVICE.pem and SERVICE.key")
    arguments = parser.parse_args(argv)
    try:
        config = read_cloud_config(arguments.config)
        start_log(config.log)
        if arguments.command == "certify":
            _certify(config, arguments.service, tuple(arguments.host), arguments.days, arguments.out)
            return 0
        if arguments.command == "token":
            sys.stdout.write(f"{asyncio.run(_create_token(config, arguments.name, arguments.scope))}\n")
            return 0
        if arguments.command == "migrate":
            asyncio.run(_migrate(config))
            return 0
        _check_tls(config.api)
        app = create_app(config)
        asyncio.run(
            _migrate(config)
        )  # here a store that cannot be used is told in one line, in the server by a traceback
        return _serve(app, config)
    except (SplitwardError, Problem) as error:
        sys.stderr.write(f"{error.detail if isinstance(error, Problem) else error}\n")
        return 2


def _certify(config: CloudConfig, service: str, hosts: tuple[str, ...], days: float, out: Path) -> None:
    """Write the certificate and key, and beside them what the broker needs: the authority, and a revocation list."""
    if service == "broker" and not hosts:
        raise ConfigError("a broker needs --host: the name or address by which devices reach it.")
    if not 0 < days <= AUTHORITY_DAYS:
        raise ConfigError(
            f"--days {days:g}: give a number over 0 and up to {AUTHORITY_DAYS}, as the authority's own."
        )
    authority = Authority(Path(config.fleet.state_dir))
    certificate, key = authority.issue_service(service, hosts, days)
    try:
        for name, data in ((f"{service}.pem", certificate), ("authority.pem", authority.pem.encode())):
            write_whole(out / name, data, 0o644)
        write_whole(out / f"{service}.key", key)
        if service == "broker" and not (out / "revoked.crl").exists():  # the service serves the true one
            write_whole(out / "revoked.crl", authority.revocation_list([], days), 0o644)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}. The certificates are written there.") from error


def _check_tls(api: ApiConfig) -> None:
    """`ConfigError` where the API's certificate and key cannot be used; the server would end in a traceback."""
    if api.cert is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(api.cert, api.key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"api.cert {api.cert}, api.key {api.key}: {error}. Give readable PEM files."
        ) from error


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


def _listen(api: ApiConfig) -> list[socket.socket]:
    """Listen at each address of the host, before anything starts; callers wait until the service answers.

    A start whose port is taken must end before it connects to the broker: it has the client id of the worker that
    runs, whose connection would end. Two that start at once could both bind the port, but not both listen.
    """
    try:
        found = socket.getaddrinfo(api.host or None, api.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = dict.fromkeys((family, address) for family, _, _, _, address in found)
        return [socket.create_server(address, family=family) for family, address in addresses]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"api.host {api.host}, api.port {api.port}: {error}. Give an address of this machine and a free port."
        ) from error


def _serve(app: FastAPI, config: CloudConfig) -> int:
    sockets = _listen(config.api)
    settings = uvicorn.Config(
        app,
        config.api.host,
        config.api.port,
        loop="auto",
        http="h11",  # whatever else is installed
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        ssl_certfile=config.api.cert,
        ssl_keyfile=config.api.key,
        timeout_graceful_shutdown=LINGER_S,
    )
    server = _Server(settings, app.state.service.feed)
    for ended in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains at the signal and then raises it once more, for whoever handled it before.
        signal.signal(ended, signal.SIG_IGN)
    server.run(sockets)
    return 0 if server.started else 2


if __name__ == "__main__":
    sys.exit(main())
