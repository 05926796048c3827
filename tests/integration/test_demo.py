"""The whole demo, at a hundredth of its effort, on a small file of the user's own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from splitward.data import open_dataset
from splitward.demo.flow import DemoSettings, run_demo
from splitward.demo.report import STREAMS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    """A MedMNIST-like file of synthetic images."""
    dataset = open_dataset("phantom", size=28)
    arrays = {}
    for name, key in (("train", "train"), ("validation", "val"), ("test", "test")):
        split = getattr(dataset, name)
        arrays |= {f"{key}_images": split.images[:, 0], f"{key}_labels": split.labels[:, None].astype(np.uint8)}
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    return path


def test_demo_on_a_file_of_ones_own(own_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert run_demo(DemoSettings(str(own_file), out=out, frames=40, effort=0.02)) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["frames_sent"] == summary["results"] == 120
    assert summary["lost"] == summary["duplicated"] == 0
    assert [set(one) for one in summary["accuracy"].values()] == [{"variant", *STREAMS}] * 3
    assert 0 < summary["bytes_per_frame"] < 200
    assert 0 < summary["latency_ms"]["p50"] <= summary["latency_ms"]["p95"]
    assert {"none", "psgl", "sealed", "label", "nothing"} == set(summary["decoder_ssim"])
    assert (out / "reconstructions.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    said = capsys.readouterr().out
    assert "frames sent 120, results 120, lost 0, duplicated 0" in said
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(out) not in left
