"""The agent's own tests, run by the device's interpreter and wheels under qemu-user."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from firmware_sim.arm64.user import run_in_root
from splitward.image.wheels import fetch_others

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = ("pytest", "pytest-timeout", "hypothesis", "onnx", "iotcore", "prometheus-client")
SUITES = {
    "unit": ["tests/unit/edge"],
    "contract": ["tests/contract"],
    # Of the integration tests those whose point is not a clock: emulation is slower than any real device.
    "integration": [
        "tests/integration/test_edge_agent.py",
        *("-k", "mosquitto and (every_frame_is_answered or refused) or second_start or tampered or sigterm"),
    ],
}


@pytest.fixture(scope="module")
def unpacked_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    target = folder / "unpacked"
    for wheel in fetch_others(folder / "wheels", NEEDED, REPOSITORY / "constraints.txt"):
        # What the root holds already stays the root's.
        if not wheel.name.startswith(("numpy-", "protobuf-", "ml_dtypes-")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
    return target


@pytest.fixture(scope="module")
def runs(emulated_root: Path, unpacked_packages: Path) -> Iterator[dict[str, Future[CompletedProcess[str]]]]:
    """Every suite, as many at a time as there are processors: an emulated program has one."""
    binds = {REPOSITORY: "/code", unpacked_packages: "/packages"}
    environment = {
        "PYTHONPATH": "/packages:/code",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SPLITWARD_FORBID_SKIPS": "1",
    }
    command = ["/usr/bin/python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "600"]
    # Nothing drawn is timed, and what the collector finds unclosed at the very end is for the same tests here to say.
    command += ["--hypothesis-profile", "ci", "-p", "no:unraisableexception"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            suite: pool.submit(
                run_in_root,
                emulated_root,
                [*command, *words],
                timeout_s=1100,
                binds=binds,
                environment=environment,
                folder="/code",
            )
            for suite, words in SUITES.items()
        }


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_suite_passes_on_arm64(suite: str, runs: dict[str, Future[CompletedProcess[str]]]) -> None:
    done = runs[suite].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed: Any = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) >= 4
    assert "skipped" not in done.stdout
