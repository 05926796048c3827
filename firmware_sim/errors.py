"""Errors of the simulation.

SplitwardError
 ├── BrokerError    no broker can be started (broker.py)
 └── ScenarioError  a scenario cannot be carried out on this machine
"""

from __future__ import annotations

from splitward.errors import SplitwardError


class ScenarioError(SplitwardError):
    """A scenario cannot be carried out on this machine."""
