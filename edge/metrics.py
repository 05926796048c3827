"""Metrics for Prometheus, in its text format, on a socket of this machine."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct

from edge.errors import EdgeError

log = logging.getLogger(__name__)


class Metric(Struct, frozen=True):
    """One metric; `values` by the value of its `label`, or under "" without one."""

    name: str
    kind: str
    help: str
    values: Mapping[str, float]
    label: str = ""


def render(metrics: Iterable[Metric]) -> str:
    """Prometheus's text format, version 0.0.4."""
    lines = []
    for metric in metrics:
        name = f"splitward_edge_{metric.name}"
        lines += [f"# HELP {name} {metric.help}", f"# TYPE {name} {metric.kind}"]
        for key, value in metric.values.items():
            escaped = key.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
            lines.append(f'{name}{{{metric.label}="{escaped}"}} {value}' if metric.label else f"{name} {value}")
    return "\n".join(lines) + "\n"


class MetricsServer:
    """Answers GET /metrics at `address`, `unix:PATH` or `HOST:PORT`; `read` gives the text, on any thread.

    Raises
    ------
    EdgeError
        The address is none, or cannot be had.
    """

    def __init__(self, address: str, read: Callable[[], str]) -> None:
        import socketserver  # here, as an agent without metrics does without them
        from http.server import BaseHTTPRequestHandler

        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0

            def do_GET(self) -> None:  # the name that http.server calls
                body = read().encode() if self.path == "/metrics" else b"metrics are at /metrics\n"
                self.send_response(200 if self.path == "/metrics" else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing: a scrape is no event."""

            def address_string(self) -> str:
                return "local"

        class Server(socketserver.TCPServer):
            allow_reuse_address = True  # the one before leaves its last scrape in TIME_WAIT

        self._path: Path | None = None
        try:
            if address.startswith("unix:"):
                self._path = Path(address.removeprefix("unix:"))
                self._path.unlink(missing_ok=True)
                self._server: socketserver.BaseServer = socketserver.UnixStreamServer(str(self._path), Handler)
                os.chmod(self._path, 0o660)  # noqa: PTH101  # the group's scraper may read it
            else:
                host, _, port = address.rpartition(":")
                self._server = Server((host, int(port)), Handler)
        except (OSError, ValueError, OverflowError) as error:
            raise EdgeError(
                f"health.metrics = {address!r}: {error}. Give `unix:PATH`, or `127.0.0.1:PORT` of a free port."
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
