"""Entry point of `python -m edge`."""

from __future__ import annotations

from edge.cli import main

raise SystemExit(main())
