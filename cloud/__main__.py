"""`python -m cloud --config cloud.toml`: run the service until SIGTERM, then drain."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from cloud.app import create_app
from cloud.config import read_cloud_config
from cloud.feed import Feed
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
    """Run the service; the exit code is 2 when it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m cloud", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="TOML file; the README lists its keys")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("gmqtt").setLevel(logging.ERROR)  # cloud.transport reports what matters of it
    try:
        config = read_cloud_config(arguments.config)
        app = create_app(config)
    except SplitwardError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    settings = uvicorn.Config(
        app,
        config.api.host,
        config.api.port,
        loop="auto",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = _Server(settings, app.state.service.feed)
    for ended in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains at the signal and then raises it once more, for whoever handled it before.
        signal.signal(ended, signal.SIG_IGN)
    server.run()
    return 0 if server.started else 2


if __name__ == "__main__":
    sys.exit(main())
