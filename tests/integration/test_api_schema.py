"""Schemathesis over the whole API of a running service: whatever is asked, no answer is the service's own fault."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from firmware_sim.broker import free_port


@pytest.fixture
def address(tmp_path: Path, mosquitto, tiny_bundle):
    port = free_port()
    config = tmp_path / "cloud.toml"
    config.write_text(
        f"models = []\n[broker]\nport = {mosquitto.port}\n[api]\nport = {port}\nrequire_token = false\n"
        f'requests_per_s = 1e6\nburst = 1000000\n[store]\nurl = "sqlite+aiosqlite:///{tmp_path}/cloud.db"\n'
        f'[fleet]\nstate_dir = "{tmp_path}/fleet"\ntrusted_key = "{tiny_bundle.trusted_key}"\n'
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloud", "--config", str(config)], stdout=log, stderr=log
        )
    url, deadline_s = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            httpx.get(f"{url}/healthz")
            break
        except httpx.TransportError:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    yield url
    process.kill()
    process.wait()


def test_no_request_makes_the_service_fail(address, tmp_path):
    schema = httpx.get(f"{address}/openapi.json").json()
    for endless in ("/v1/events",):
        del schema["paths"][endless]
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(schema))
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", str(path), "--url", address, "--checks",
        "not_a_server_error", "--exclude-path", "/readyz", "--max-examples", "25", "--seed", "1", "--no-color",
        "--phases", "examples,coverage,fuzzing", "--request-timeout", "30",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=280)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "Operations" in run.stdout
