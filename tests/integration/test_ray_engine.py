"""The trials of the Ray engine, in a process of their own: Ray's threads outlive its shutdown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_ray_engine_gives_the_local_engines_results_whatever_is_lost() -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'splitward[ray]'")
    trials = Path(__file__).with_name("ray_trials.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(trials)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=880)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "3 passed" in done.stdout
