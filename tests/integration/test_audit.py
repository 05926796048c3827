"""`splitward audit` itself, with real attacks, on a run of a few steps: gates, a kill, a bundle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.exporter import export_run
from splitward.audit.ridge import Ridge
from splitward.cli import main
from splitward.data import open_dataset
from splitward.training.loop import train
from splitward.training.run import Run
from splitward.training.settings import RunSettings, split_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FEW = ["--quick", "--auxiliary", "60", "--targets", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One epoch on the phantom data set."""
    dataset = open_dataset("phantom", size=28)
    settings = RunSettings("phantom", None, 28, split_settings(dataset, "sealed"), epochs=1)
    return train(dataset, settings, tmp_path_factory.mktemp("run") / "sealed", progress=False)


def done(out: Path) -> Counter[tuple[str, str]]:
    """How often each cell stands in the ledger."""
    lines = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()[1:]]
    return Counter((line["key"]["attack"], line["key"]["attacked"]) for line in lines)


def test_a_killed_audit_goes_on_and_gates_decide(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "audit"
    words = ["audit", str(run.folder), "--out", str(out), "--attacks", "ridge,decoder-small", *FEW]
    command = [sys.executable, "-m", "splitward.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert any("ridge" in line for line in process.stdout)  # blocks until its cell is done
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert done(out) == {("ridge", "deployed"): 1}
    assert main(words) == 0
    cells = [
        ("decoder-medium", "undefended"),
        ("decoder-small", "deployed"),
        ("ridge", "deployed"),
        ("ridge", "map off"),
    ]
    assert sorted(done(out).items()) == [(cell, 1) for cell in cells]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(Ridge, "reconstruct", lambda *arguments: pytest.fail("a finished cell was done again"))
        assert main([*words, "--min-mse", "0.9", "--max-ssim", "1"]) == 1
    said = capsys.readouterr().out
    assert "gate min_mse 0.9: BROKEN" in said
    assert "gate max_ssim 1: held" in said
    results = json.loads((out / "audit.json").read_text())
    assert results["command"].startswith(f"splitward audit {run.folder}")
    assert results["command"].endswith("--min-mse 0.9 --max-ssim 1")
    assert results["certificate"]["broken_by"] == []
    assert 'src="http' not in (out / "report.html").read_text()


@pytest.mark.parametrize("variant", ["onnx-float32", "onnx-int8"])
def test_a_bundle_is_attacked_without_weights(run, tmp_path, monkeypatch, variant):
    key, public = Ed25519PrivateKey.generate(), tmp_path / "signing.key.pub"
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    monkeypatch.setattr("export.parity.INT8_COST", 1.0)
    bundle, out = tmp_path / "mass.bundle", tmp_path / "audit"
    export_run(run, open_dataset("phantom", size=28), bundle, key)
    words = ["audit", str(bundle), "--out", str(out), "--attacks", "ridge,optimise", "--variant", variant, *FEW]
    assert main([*words, "--data", "phantom"]) == 2  # not signed by a key that is trusted
    assert main([*words, "--data", "phantom", "--key", str(public)]) == 0
    ridge, optimise = json.loads((out / "audit.json").read_text())["attacks"]
    assert ridge["status"] == "done"
    assert optimise["status"] == "not run"
    assert "needs the run folder" in optimise["reasons"][0]
    assert "needs the run folder" in (out / "report.html").read_text()
