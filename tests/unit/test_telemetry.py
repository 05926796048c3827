"""No library that we run reports to its makers, or makes an id of the device to do so."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("splitward", "edge", "cloud", "export", "firmware_sim", "benchmarks")
VARIABLE = "ORT_DISABLE_TELEMETRY"

RUN = """
import time
from pathlib import Path
import numpy as np
from edge.runtime import load_runtime

for kind in ("onnx", "tflite"):
    runtime = load_runtime(kind, Path(f"client.{kind}").read_bytes(), 1)
    runtime.run(np.zeros((2, 8, 8), np.float32))
time.sleep(6)  # ONNX Runtime's id and database appeared after three
"""

RAY = """
import os
from cloud.config import EngineConfig
from cloud.ray_engine import RayEngine

RayEngine([], 1, EngineConfig(kind="ray"))
assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
"""


def run(code: str, folder: Path, **variables: str) -> str:
    """Standard error of a new interpreter whose home is `folder`/home."""
    environment = {key: os.environ[key] for key in os.environ if key not in (VARIABLE, "XDG_CACHE_HOME")}
    environment |= {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("variables", [{}, {VARIABLE: "0"}], ids=["unset", "switched on"])
def test_a_device_that_runs_a_graph_writes_nothing_into_its_home(tmp_path, tiny_bundle, variables):
    (tmp_path / "home").mkdir()
    for name in ("client.onnx", "client.tflite"):
        (tmp_path / name).write_bytes(tiny_bundle.files[name])
    run(RUN, tmp_path, **variables)
    assert list((tmp_path / "home").rglob("*")) == []


def test_whoever_imports_onnxruntime_first_is_told(tmp_path):
    code = "import sys; sys.modules['onnxruntime'] = sys; import splitward"  # the real one would report
    assert "Import splitward first" in run(code, tmp_path)
    assert run(code, tmp_path, **{VARIABLE: "1"}) == ""


def imports(node: ast.AST) -> set[str]:
    """Packages that a statement imports."""
    if isinstance(node, ast.Import):
        return {one.name.split(".")[0] for one in node.names}
    return {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) and node.module else set()


def test_whatever_imports_onnxruntime_has_imported_splitward():
    rooms = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "onnxruntime" in text and any("onnxruntime" in imports(node) for node in ast.walk(ast.parse(text))):
            rooms.add(path.relative_to(ROOT).parts[0])
    assert rooms >= {"edge", "cloud", "export"}
    for room in rooms - {"splitward"}:
        first = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
        assert any("splitward" in imports(node) for node in first.body), f"{room}/__init__.py: import splitward"


def test_the_services_switch_it_off_too():
    for name in (
        "edge/systemd/splitward-edge.service",
        "edge/systemd/splitward-edge-check.service",
        "Dockerfile.arm64",
        "deploy/cloud/Dockerfile",
    ):
        assert f"{VARIABLE}=1" in (ROOT / name).read_text(encoding="utf-8"), name


def test_a_cluster_of_rays_reports_nothing(tmp_path):
    if find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'splitward[ray]'")
    run(RAY, tmp_path, RAY_USAGE_STATS_ENABLED="1")
