"""The deployed path (device runtime, wire, cloud) against the torch reference, on the whole MNIST test set."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from cloud.config import EngineConfig
from cloud.engine import LocalEngine
from cloud.metrics import CpuClock
from edge.config import RuntimeConfig
from edge.model import ClientModel
from export.exporter import export_run
from splitward.data import Dataset, open_dataset
from splitward.errors import DataError
from splitward.method.split import SplitNetwork
from splitward.training.loop import frames_of, to_unit, train
from splitward.training.settings import RunSettings, split_settings
from splitward.wire.bundle import Bundle, read_bundle
from splitward.wire.message import Activation, decode, encode
from splitward.wire.release import keyed_noise
from splitward.wire.server import server_card_path
from splitward.wire.tensor import dequantise, quantise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECRET = bytes(range(32))
BATCH = 32


@dataclass(frozen=True)
class Deployed:
    """A network trained for one epoch, and its bundle."""

    network: SplitNetwork
    dataset: Dataset
    bundle: Bundle
    card: Path

    def activations(self, variant: str, count: int) -> NDArray[np.float32]:
        """Activations of the first test images by the device's code."""
        model = self._model(variant)
        return np.stack([model.activation(frame) for frame in self._frames(count)])

    def messages(self, variant: str, count: int) -> list[bytes]:
        """What the device publishes for the first test images."""
        model = self._model(variant)
        return [
            encode(Activation("d", bytes(16), n, 0, model.id, model.release(frame), model.law.scale))
            for n, frame in enumerate(self._frames(count))
        ]

    def decide(self, messages: list[bytes]) -> NDArray[np.int64]:
        """Classes that the cloud's engine decides on."""
        received = [decode(message) for message in messages]
        return self.decide_released(
            np.stack([dequantise(one.values, one.scale, one.zero_point) for one in received])
        )

    def decide_released(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        """The same for what a message holds, in real units: [N, k]."""

        async def infer() -> list[NDArray[np.float32]]:
            engine = LocalEngine([str(self.card)], BATCH, EngineConfig(), CpuClock())
            await engine.start()
            scores = [
                (await engine.infer(self.bundle.model, values[start : start + BATCH])).decision
                for start in range(0, len(values), BATCH)
            ]
            await engine.stop()
            return scores

        decided: NDArray[np.int64] = np.concatenate(asyncio.run(infer())).argmax(1)
        return decided

    def _model(self, variant: str) -> ClientModel:
        backend, precision = variant.split("-")
        kind = "onnx" if backend == "onnx" else "tflite"
        return ClientModel(
            self.bundle,
            RuntimeConfig(backend=kind, precision="int8" if precision == "int8" else "float32"),
            SECRET,
        )

    def _frames(self, count: int) -> NDArray[np.float32]:
        return to_unit(frames_of(self.dataset.test)[:count]).numpy()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    try:
        dataset = open_dataset("mnist")
    except DataError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("deployed")
    settings = RunSettings("mnist", None, None, split_settings(dataset, "sealed"), epochs=1)
    run = train(dataset, settings, folder / "run", progress=False)
    key = Ed25519PrivateKey.generate()
    target = folder / "mnist.bundle"
    export_run(run, dataset, target, key)
    return Deployed(
        run.load_network(), dataset, read_bundle(target, key.public_key()), server_card_path(target)
    )


def test_float_path_decides_exactly_as_the_reference(deployed: Deployed) -> None:
    count = len(deployed.dataset.test)
    model = deployed._model("onnx-float32")
    frames = deployed._frames(count)
    clean = np.stack([quantise(model.activation(frame), model.law.grid) for frame in frames])
    noise = torch.from_numpy(np.stack([keyed_noise(SECRET, one, model.law) for one in clean]))
    with torch.no_grad():
        passes = [
            deployed.network(torch.from_numpy(frames[start : start + 500]), noise[start : start + 500])
            for start in range(0, count, 500)
        ]
    reference = torch.cat([one.outputs.decision for one in passes]).argmax(1).numpy()
    decided = deployed.decide(deployed.messages("onnx-float32", count))
    assert np.array_equal(decided, reference)
    # The reference itself is worth something after one epoch.
    assert (reference == deployed.dataset.test.labels).mean() > 0.95


@pytest.mark.parametrize("variant", ["onnx-int8", "tflite-int8"])
def test_int8_costs_at_most_0_3_points(deployed: Deployed, variant: str) -> None:
    """Under the same noise, so that what differs is the variant."""
    labels, law = deployed.dataset.test.labels, deployed.bundle.manifest.release
    noise = np.random.default_rng(0).standard_normal((len(labels), *law.shape))
    accuracy = {}
    for name in (f"{variant.split('-')[0]}-float32", variant):
        clean = quantise(deployed.activations(name, len(labels)), law.grid) * law.grid
        released = dequantise(quantise(clean + law.sigma * noise, law.scale), law.scale)
        accuracy[name] = float((deployed.decide_released(released) == labels).mean())
    whole, coarse = accuracy.values()
    assert whole - coarse <= 0.003, accuracy


def test_both_float_runtimes_agree(deployed: Deployed) -> None:
    onnx, tflite = (deployed.activations(f"{kind}-float32", 200) for kind in ("onnx", "tflite"))
    assert np.abs(onnx - tflite).max() < 1e-5
