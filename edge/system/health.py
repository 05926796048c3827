"""The container's health: does the agent hold a connection to its broker?"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge.settings import load_settings
from edge.system.checkin import TABLES, connections


def main(arguments: list[str]) -> int:
    """0 when our user holds a connection to the broker of the edge.toml that is named and the environment, else 1."""
    port = load_settings(Path(arguments[0])).broker.port
    if connections(port, os.getuid(), TABLES):
        return 0
    print(f"no connection to port {port}")
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
