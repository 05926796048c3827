"""The cloud of the demo: `python -m cloud` in its own process, beside a broker."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from firmware_sim.broker import free_port
from splitward.errors import SplitwardError
from splitward.wire.server import server_card_path

START_S = 60.0
STOP_S = 20.0


@contextmanager
def start_cloud(folder: Path, bundle: Path, broker_port: int, threads: int = 1) -> Iterator[str]:
    """Run the cloud on a free port until the block ends; yields its address once it is ready.

    Its configuration, store and log are left in `folder`.

    Raises
    ------
    SplitwardError
        It was not ready in time, or it failed as it ended; the message holds the end of its log.
    """
    port = free_port()
    store = folder / "cloud.db"
    for leftover in folder.glob("cloud.db*"):
        leftover.unlink()
    quoted = json.dumps([str(server_card_path(bundle))])
    config = folder / "cloud.toml"
    config.write_text(
        f"models = {quoted}\n\n[broker]\nport = {broker_port}\nsession_expiry_s = 0\n\n"
        f"[api]\nport = {port}\nrequire_token = false\n\n"
        f"[store]\nurl = {json.dumps(f'sqlite+aiosqlite:///{store}')}\n\n[engine]\nthreads = {threads}\n\n"
        f"[fleet]\nstate_dir = {json.dumps(str(folder / 'cloud-fleet'))}\n",
        encoding="utf-8",
    )
    log = folder / "cloud.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloud", "--config", str(config)], stdout=output, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(process, address, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise SplitwardError(f"the cloud ended with {process.returncode}; the end of {log}:\n{_end_of(log)}")


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=2):  # noqa: S310 -- our own http address
            return True
    except OSError:  # not listening yet, or 503
        return False


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if _is_ready(address):
            return
        time.sleep(0.1)
    raise SplitwardError(f"the cloud did not become ready; the end of {log}:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-10:])
