"""A fleet of the real agent, a real broker and the real cloud under a short seeded scenario; the tools for it."""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
import subprocess
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from firmware_sim.chaos import run_chaos
from firmware_sim.errors import ScenarioError
from firmware_sim.processes import FAKETIME, delay_flushes
from firmware_sim.proxy import FaultProxy, Toxics
from firmware_sim.scenario import Counts, Event, Scenario, plan
from splitward.config import read_config
from splitward.errors import ConfigError
from splitward.wire.bundle import read_bundle, read_trusted_key
from splitward.wire.law import ReleaseLaw
from splitward.wire.server import ServerCard, server_card_path, write_server_card

SCENARIOS = Path(str(files("firmware_sim"))) / "scenarios"


@pytest.fixture
def served_bundle(tiny_bundle: Any, tmp_path: Path) -> Any:
    """The tiny bundle with a server half beside it: not trained, as only the way of the frames matters."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from splitward.method.halves import build_server

    network = {"size": "small", "channels": 1, "side": 8, "classes": 2, "mapped": True, "values": 128}
    law = ReleaseLaw((128,), "int8", bound=1.0, sigma=0.3)
    golden = np.load(io.BytesIO(tiny_bundle.files["golden-activation.npy"])).reshape(128)
    file = io.BytesIO()
    np.save(file, golden)
    made = tiny_bundle.rewrite(
        tmp_path / "served.bundle",
        {"client.onnx": flat_client(), "golden-activation.npy": file.getvalue()},
        release=law,
        client={"onnx-float32": "client.onnx"},
    )
    model = read_bundle(made.path, read_trusted_key(made.trusted_key)).model
    torch.manual_seed(0)
    weights = tmp_path / "served.server.safetensors"
    save_file(build_server(network).state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    card = ServerCard(1, model.hex(), "served", ("no", "yes"), law, network, weights.name, digest)
    write_server_card(server_card_path(made.path), card)
    return made


def flat_client() -> bytes:
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("Tanh", ["x"], ["t"]),
            helper.make_node("Reshape", ["t", "shape"], ["y"]),
        ],
        "client",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 128])],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [1, 128])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_chaos_loses_and_doubles_nothing(
    tmp_path: Path, mosquitto: Any, postgres: Any, served_bundle: Any
) -> None:
    if not FAKETIME.exists():
        pytest.skip(f"{FAKETIME} is missing: apt install faketime")
    np.savez(tmp_path / "r.npz", images=np.random.default_rng(0).integers(0, 255, (64, 8, 8), dtype=np.uint8))
    scenario = read_config(SCENARIOS / "short.toml", Scenario)
    scenario = msgspec.structs.replace(scenario, variants=("onnx-float32",))
    report = run_chaos(
        *(scenario, tmp_path / "r.npz", served_bundle.path, served_bundle.trusted_key, tmp_path / "chaos")
    )
    assert (report.lost, report.duplicated, report.dropped) == (0, 0, {})
    assert report.results == report.frames == scenario.frames
    counts = scenario.counts
    assert report.kills == {
        "agent": counts.kill_agent,
        "releaser": counts.kill_releaser,
        "broker": counts.kill_broker,
        "cloud": counts.kill_cloud,
        "database": counts.kill_database,
    }
    assert report.faults["disk_full"] == counts.disk_full
    assert report.faults["slow_disk"] == counts.slow_disk
    assert report.faults["clock_jump"] == counts.clock_jump
    assert report.complete


@pytest.mark.parametrize(("limit_mb", "answered"), [(512, 20), (96, 0)])
def test_the_agent_lives_within_a_small_boards_memory(
    tmp_path: Path, mosquitto: Any, served_bundle: Any, limit_mb: int, answered: int
) -> None:
    np.savez(tmp_path / "r.npz", images=np.zeros((20, 8, 8), np.uint8))
    scenario = Scenario(
        devices=1,
        frames=20,
        duration_s=3.0,
        heal_s=60.0 if answered else 5.0,
        rate_hz=50.0,
        variants=("onnx-float32",),
        memory_bytes=limit_mb << 20,
    )
    report = run_chaos(scenario, tmp_path / "r.npz", served_bundle.path, served_bundle.trusted_key)
    assert report.results == answered
    assert report.complete == bool(answered)


@pytest.mark.timeout(600)
def test_a_scenario_that_runs_again_reports_nothing_of_the_run_before(
    tmp_path: Path, mosquitto: Any, served_bundle: Any
) -> None:
    np.savez(tmp_path / "r.npz", images=np.zeros((20, 8, 8), np.uint8))
    given = (tmp_path / "r.npz", served_bundle.path, served_bundle.trusted_key, tmp_path / "chaos")
    calm = Scenario(
        devices=1, frames=20, duration_s=3.0, heal_s=240.0, rate_hz=50.0, variants=("onnx-float32",)
    )
    assert run_chaos(calm, *given).complete
    again = run_chaos(msgspec.structs.replace(calm, frames=10), *given)
    assert (again.results, again.complete) == (10, True)


def test_a_slow_disk_is_slow_until_it_is_mended(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is missing: apt install strace")
    program = "import os, time\nfile = os.open('f', os.O_RDWR | os.O_CREAT)\nwhile True:\n"
    program += " began = time.monotonic()\n os.fdatasync(file)\n print(time.monotonic() - began, flush=True)\n"
    flusher = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert flusher.stdout is not None
    tracer = delay_flushes(flusher.pid, 250.0)
    try:
        while float(flusher.stdout.readline()) < 0.25:
            pass  # those before the tracer came
        assert float(flusher.stdout.readline()) >= 0.25
        tracer.terminate()
        tracer.wait(10)
        for _ in range(2):
            flusher.stdout.readline()  # under way at the time
        assert float(flusher.stdout.readline()) < 0.25
    finally:
        flusher.kill()
        flusher.wait()
        flusher.stdout.close()


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_scenarios_are_the_same_day_for_the_same_seed(path: Path) -> None:
    scenario = read_config(path, Scenario)
    assert plan(scenario) == plan(scenario)
    other = msgspec.structs.replace(scenario, seed=scenario.seed + 1)
    assert plan(other) != plan(scenario)
    events = plan(scenario)
    assert all(one.at_s >= 0 and one.at_s + one.lasts_s <= scenario.duration_s for one in events)
    assert len(events) == sum(getattr(scenario.counts, kind) for kind in Counts.__struct_fields__)
    assert all(abs(one.value) >= 1.0 for one in events if one.kind == "clock_jump")


def test_a_wrong_scenario_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    nothing = tmp_path / "nothing"
    with pytest.raises(ScenarioError, match="postgresql"):
        run_chaos(Scenario(counts=Counts(kill_database=1)), nothing, nothing, nothing)
    (tmp_path / "s.toml").write_text("[counts]\nkill_brooker = 1\n")
    with pytest.raises(ConfigError, match=r"Did you mean 'counts\.kill_broker'"):
        read_config(tmp_path / "s.toml", Scenario)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    scenario = Scenario(events=(Event(at_s=1.0, kind="disk_full"),))
    with pytest.raises(ScenarioError, match="root"):
        run_chaos(scenario, *(tmp_path / "x" for _ in range(3)))


class Echo:
    """A server that sends back what it gets."""

    def __init__(self) -> None:
        self._door = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._door.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                visitor, _ = self._door.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(visitor,), daemon=True).start()

    def _answer(self, visitor: socket.socket) -> None:
        try:
            while data := visitor.recv(4096):
                visitor.sendall(data)
        except OSError:
            pass  # the proxy cut it: what this test is about
        visitor.close()

    def close(self) -> None:
        self._door.close()


def test_the_proxy_spoils_a_connection_as_it_is_told() -> None:
    echo = Echo()
    with FaultProxy(echo.port) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as line:
            line.settimeout(10)

            def ask(text: bytes) -> float:
                started_s = time.monotonic()
                line.sendall(text)
                assert line.recv(100) == text
                return time.monotonic() - started_s

            ask(b"good")
            proxy.toxics = Toxics(latency_ms=100)
            assert ask(b"late") >= 0.2, "both ways"
            proxy.toxics = Toxics(bytes_per_s=100)
            assert ask(bytes(20)) >= 0.4
            proxy.toxics = Toxics(half_open=True)
            line.settimeout(0.5)
            line.sendall(b"held")
            with pytest.raises(TimeoutError):
                line.recv(100)
            proxy.toxics = Toxics()
            line.settimeout(10)
            assert line.recv(100) == b"held"
            proxy.cut()
            assert is_cut(line)
        proxy.toxics = Toxics(closed=True)
        with socket.create_connection(("127.0.0.1", proxy.port)) as line:
            line.settimeout(10)
            assert is_cut(line)
    echo.close()


def is_cut(line: socket.socket) -> bool:
    try:
        line.sendall(b"?")
        return line.recv(100) == b""
    except ConnectionError:
        return True
