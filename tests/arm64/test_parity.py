"""Every runtime and precision that ships, on emulated arm64 and on this machine, over the same real images."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from firmware_sim.arm64 import activations
from firmware_sim.arm64.user import run_in_root
from splitward.wire.bundle import read_bundle, read_trusted_key
from splitward.wire.release import keyed_noise
from splitward.wire.tensor import quantise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROGRAM = Path(activations.__file__)
REPOSITORY = Path(__file__).resolve().parents[2]
VARIANTS = ("onnx-float32", "onnx-int8", "tflite-float32", "tflite-int8")


@dataclass(frozen=True)
class Both:
    """Activations by variant, here and under emulation."""

    here: dict[str, NDArray[Any]]
    emulated: dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, emulated_root: Path, model: Any) -> Both:
    folder = tmp_path_factory.mktemp("parity")
    np.savez(folder / "frames.npz", images=model.images)
    for path in (model.bundle, model.trusted_key):
        (folder / path.name).write_bytes(path.read_bytes())
    words = [model.bundle.name, model.trusted_key.name, "frames.npz"]
    done = run_in_root(
        emulated_root,
        [
            "/usr/bin/python3",
            "/code/activations.py",
            *[f"/run/parity/{word}" for word in (*words, "arm64.npz")],
        ],
        timeout_s=600,
        binds={PROGRAM.parent: "/code", folder: "/run/parity"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"{variant}: 1000 frames" in done.stdout for variant in VARIANTS), done.stdout
    command = [sys.executable, str(PROGRAM), *[str(folder / word) for word in (*words, "here.npz")]]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    return Both(dict(np.load(folder / "here.npz")), dict(np.load(folder / "arm64.npz")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_class_for_every_image(both: Both, model: Any, variant: str) -> None:
    law = read_bundle(model.bundle, read_trusted_key(model.trusted_key)).manifest.release
    # One noise for both, as in export/parity.py: the device's is keyed by the activation, and a value that
    # crosses a step of the grid would draw another one, which is no difference of the machines.
    grids = [quantise(one, law.grid) for one in both.here[variant]]
    noise = torch.from_numpy(np.stack([keyed_noise(bytes(32), one, law) for one in grids]))

    def decide(activations: NDArray[np.float32]) -> NDArray[np.int64]:
        with torch.no_grad():
            released = model.network.release(torch.from_numpy(activations), noise)
            decided: NDArray[np.int64] = model.network.server(released).decision.argmax(1).numpy()
        return decided

    here = decide(both.here[variant])
    assert np.array_equal(here, decide(both.emulated[variant]))
    # Which says something only if the classes do.
    assert (here == model.labels).mean() > 0.85


@pytest.mark.parametrize("variant", ["onnx-float32", "tflite-float32"])
def test_float_activations_agree(both: Both, variant: str) -> None:
    assert np.abs(both.here[variant] - both.emulated[variant]).max() <= 1e-5


def test_the_saliency_graph_is_part_of_it(model: Any) -> None:
    manifest = read_bundle(model.bundle, read_trusted_key(model.trusted_key)).manifest
    assert set(manifest.saliency) == {"onnx", "tflite"}
    assert set(manifest.client) == set(VARIANTS)
