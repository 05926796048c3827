"""A trained run becomes a bundle that a device runs and a server half that the cloud loads."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file

from edge.config import RuntimeConfig
from edge.model import ClientModel
from edge.runtime import load_runtime
from export import exporter
from export.exporter import export_run
from export.parity import FLOAT32_TOLERANCE, check_parity
from splitward.data import Dataset, Split, phantom
from splitward.errors import BundleError, ExportError, TrainingError
from splitward.method.halves import build_server
from splitward.method.saliency import LocalClassifier, MapSettings, Saliency
from splitward.method.split import SplitNetwork
from splitward.training.loop import frames_of, to_unit, train
from splitward.training.run import Run, create_run
from splitward.training.settings import RunSettings, release_law, split_settings
from splitward.wire.bundle import Bundle, read_bundle
from splitward.wire.release import keyed_noise
from splitward.wire.server import read_server_card, server_card_path
from splitward.wire.tensor import dequantise

pytestmark = pytest.mark.slow
VARIANTS = ("onnx-float32", "onnx-int8", "tflite-float32", "tflite-int8")
SECRET = bytes(32)


@dataclass(frozen=True)
class Exported:
    """A run of a few steps and its bundle."""

    run: Run
    dataset: Dataset
    network: SplitNetwork
    path: Path
    key: Ed25519PrivateKey
    model: bytes

    @property
    def bundle(self) -> Bundle:
        return read_bundle(self.path, self.key.public_key())


@pytest.fixture(scope="module")
def export_profile(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Train and export one profile on few phantoms; INT8_COST does not matter to so small a network."""

    def make(profile: str, **seal: float) -> Exported:
        folder = tmp_path_factory.mktemp(profile)
        dataset = phantom.load("mass", 28, seed=0, count=120)
        settings = RunSettings(
            "phantom", None, 28, split_settings(dataset, profile, seal=seal), epochs=1, batch=16
        )
        run = train(dataset, settings, folder / "run", progress=False)
        key = Ed25519PrivateKey.generate()
        path = folder / "out" / "mass.bundle"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("export.parity.INT8_COST", 1.0)
            model = export_run(run, dataset, path, key)
        return Exported(run, dataset, run.load_network(), path, key, model)

    return make


@pytest.fixture(scope="module")
def sealed(export_profile: Callable[..., Exported]) -> Exported:
    return export_profile("sealed")


def test_the_bundle_verifies_and_is_whole(sealed):
    manifest = sealed.bundle.manifest
    assert sealed.bundle.model == sealed.model
    assert set(manifest.client) == set(VARIANTS)
    assert set(manifest.saliency) == {"onnx", "tflite"}
    assert set(manifest.files) == {*manifest.client.values(), *manifest.saliency.values(), *manifest.golden}
    assert (manifest.name, manifest.task, manifest.classes) == ("mass", "mass", ("normal", "mass"))
    assert (manifest.input.channels, manifest.input.height, manifest.input.width) == (1, 28, 28)
    settings = sealed.run.settings.split
    assert manifest.release == release_law(settings.network, settings.defence)
    assert manifest.defence["profile"] == "sealed"
    assert manifest.data["synthetic"] is True
    assert manifest.metrics["test"] == sealed.run.read_metrics()[-1]["test"]
    with pytest.raises(BundleError) as caught:
        read_bundle(sealed.path, Ed25519PrivateKey.generate().public_key())
    assert caught.value.reason == "bad_signature"


def test_the_bundle_holds_nothing_of_the_server_half(sealed):
    """Whoever steals a device gets the client half, the saliency graph and one frame."""
    matrices = [value for value in sealed.network.server.state_dict().values() if value.ndim > 1]
    assert len(matrices) > 6
    for data in sealed.bundle.files.values():
        assert not any(matrix.numpy().tobytes()[:256] in data for matrix in matrices)


@pytest.mark.parametrize("count", [256, 300, 900])
def test_frames_are_drawn_from_the_whole_split(count):
    """Rows that lie class by class, as a folder's do, or in turns: every class has its share."""
    images = np.arange(900, dtype=np.uint16).reshape(900, 1, 1, 1)
    for labels in (np.repeat(np.arange(3), 300), np.arange(900) % 3):
        split = Split(images, labels, np.arange(900))
        frames, own = exporter._drawn(split, count)
        np.testing.assert_array_equal(own, labels[(frames.flatten() * 65535).round().int()])
        assert np.bincount(own, minlength=3).min() > 0.27 * count


def test_int8_is_calibrated_on_every_class(tmp_path):
    """300 dark frames before 300 bright ones: calibrated on the dark alone, int8 would cut the bright ones off."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 300)
    images = (generator.random((600, 1, 16, 16)) * np.where(labels, 255, 25)[:, None, None, None]).astype(
        np.uint8
    )
    split = Split(images, labels, np.arange(600))
    facts = {"synthetic": True, "licence": "none", "source": "drawn"}
    dataset = Dataset("light", "light", ("dark", "bright"), split, split, split, **facts)
    settings = RunSettings("light", None, 16, split_settings(dataset, "none"), epochs=1, batch=64)
    run = train(dataset, settings, tmp_path / "run", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.parity.INT8_COST", 1.0)
        key = Ed25519PrivateKey.generate()
        export_run(run, dataset, tmp_path / "light.bundle", key)
    parity = read_bundle(tmp_path / "light.bundle", key.public_key()).manifest.metrics["parity"]
    network = run.load_network()
    with torch.no_grad():
        reach = float(network.client(to_unit(frames_of(split))).abs().max())
    assert parity["onnx-int8"]["max_error"] < 0.1 * reach
    assert parity["tflite-int8"]["max_error"] < 0.1 * reach


def test_parity_is_recorded_for_every_variant(sealed):
    parity = sealed.bundle.manifest.metrics["parity"]
    assert set(parity) == set(VARIANTS)
    for name, found in parity.items():
        assert 0 <= found["accuracy"] <= 1
        if name.endswith("float32"):
            assert 0 <= found["max_error"] <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_device_loads_every_variant(sealed, variant):
    backend, precision = variant.split("-")
    model = ClientModel(sealed.bundle, RuntimeConfig(backend=backend, precision=precision), SECRET)
    frames = to_unit(frames_of(sealed.dataset.test))
    with torch.no_grad():
        expected = sealed.network.client(sealed.network.attack(frames)).numpy()
    activations = np.stack([model.activation(frame) for frame in frames.numpy()])
    assert np.abs(activations - expected).max() < (1e-5 if precision == "float32" else 0.2)
    released = model.release(frames[0].numpy())
    assert released.dtype == np.int8
    assert released.shape == (16,)


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_the_saliency_graph_is_torchs(sealed, backend):
    data = sealed.bundle.files[sealed.bundle.manifest.saliency[backend]]
    agree(sealed.network.saliency, data, backend, to_unit(frames_of(sealed.dataset.test)))


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_a_saliency_graph_with_odd_sides_a_mask_and_colour_is_torchs(backend):
    """100 pixels: 50, 25, 13, 7."""
    torch.manual_seed(0)
    graph = Saliency(LocalClassifier(3, 100, 4), MapSettings(eps=0.2, gamma=0.25)).eval()
    convert = exporter.to_onnx if backend == "onnx" else exporter.to_tflite
    agree(graph, convert(graph, (3, 100, 100)), backend, torch.rand(4, 3, 100, 100))


@torch.no_grad()
def agree(graph: torch.nn.Module, data: bytes, backend: str, frames: torch.Tensor) -> None:
    expected = graph(frames).numpy()
    runtime = load_runtime(backend, data, threads=1)
    found = np.stack([runtime.run(frame) for frame in frames.numpy()])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_the_golden_pair_is_the_float32_networks_own(sealed):
    frame, activation = (
        np.load(io.BytesIO(sealed.bundle.files[name]), allow_pickle=False)
        for name in sealed.bundle.manifest.golden
    )
    with torch.no_grad():
        expected = sealed.network.client(sealed.network.attack(torch.from_numpy(frame[None])))[0].numpy()
    np.testing.assert_array_equal(activation, expected)


def test_a_bundle_holds_nobodys_image(sealed):
    """It goes to every device and to the cloud, which is whom the images are kept from."""
    frame = np.load(
        io.BytesIO(sealed.bundle.files[sealed.bundle.manifest.golden[0]]), allow_pickle=False
    ).ravel()
    splits = (sealed.dataset.train, sealed.dataset.validation, sealed.dataset.test)
    images = torch.cat([to_unit(frames_of(split)) for split in splits]).flatten(1).numpy()
    likeness = [abs(np.corrcoef(frame, image)[0, 1]) for image in images]
    assert max(likeness) < 0.9
    held = b"".join(sealed.bundle.files.values())
    assert not [image for image in images if image[:64].tobytes() in held]


@torch.no_grad()
def test_the_server_card_loads_as_the_trained_server_half(sealed):
    card, weights = read_server_card(server_card_path(sealed.path))
    assert bytes.fromhex(card.model) == sealed.model
    assert card.release == sealed.bundle.manifest.release
    server = build_server(card.network)
    server.load_state_dict(load_file(weights), strict=True)
    released = torch.randn(20, *card.release.shape)
    for ours, theirs in zip(server.eval()(released), sealed.network.server(released), strict=True):
        assert torch.equal(ours, theirs)


def test_a_device_releases_on_the_grid_and_under_the_noise_that_the_run_was_given(export_profile):
    """Not under the training's: that is nobody's business but the training's."""
    coarse = export_profile("sealed", steps=2, sigma=0.15, training_sigma=0.3)
    law = coarse.bundle.manifest.release
    assert (law.sigma, law.steps) == (0.15, 2)
    model = ClientModel(coarse.bundle, RuntimeConfig(), SECRET)
    frames = to_unit(frames_of(coarse.dataset.test)).numpy()
    activations = np.stack([model.activation(frame) for frame in frames])
    clean = np.rint(2 * activations).astype(np.int8)
    noise = np.stack([keyed_noise(SECRET, row, law) for row in clean])
    expected = clean / 2 + 0.15 * noise
    released = np.stack([dequantise(model.release(frame), law.scale) for frame in frames])
    np.testing.assert_allclose(
        released, expected.clip(-127 * law.scale, 127 * law.scale), atol=law.scale / 2 + 1e-6
    )
    trained = coarse.network.release(torch.from_numpy(activations), torch.from_numpy(noise)).numpy()
    np.testing.assert_allclose(released, trained, atol=1e-6)


def test_a_profile_without_a_map_exports_without_saliency(export_profile):
    plain = export_profile("none")
    assert plain.bundle.manifest.saliency == {}
    assert plain.bundle.manifest.release.dtype == "float32"
    assert plain.bundle.manifest.defence["map"] is None
    model = ClientModel(plain.bundle, RuntimeConfig(), SECRET)
    frame = to_unit(frames_of(plain.dataset.test))[:1]
    with torch.no_grad():
        expected = plain.network.client(frame)[0].numpy()
    released = model.release(frame[0].numpy())
    assert released.dtype == np.float32
    np.testing.assert_allclose(released, expected, rtol=0, atol=1e-5)


def test_the_same_run_gives_the_same_bundle(sealed, tmp_path, monkeypatch):
    """Under SOURCE_DATE_EPOCH: manifest, signature and every graph, byte for byte."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr("export.parity.INT8_COST", 1.0)
    paths = [tmp_path / folder / "mass.bundle" for folder in ("one", "two")]
    models = [export_run(sealed.run, sealed.dataset, path, sealed.key) for path in paths]
    one, two = (contents(path) for path in paths)
    assert json.loads(one["manifest.json"])["created_at"] == "2023-11-14T22:13:20+00:00"
    assert [name for name in one if one[name] != two[name]] == []
    assert models[0] == models[1]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert server_card_path(paths[0]).read_bytes() == server_card_path(paths[1]).read_bytes()


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_another_suffix_is_refused(sealed, tmp_path):
    with pytest.raises(ExportError, match=r"ends in \.bundle"):
        export_run(sealed.run, sealed.dataset, tmp_path / "mass.zip", sealed.key)
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run_is_refused(sealed, tmp_path):
    unfinished = create_run(tmp_path / "run", sealed.run.settings, sealed.run.card)
    with pytest.raises(TrainingError, match="has not finished"):
        export_run(unfinished, sealed.dataset, tmp_path / "mass.bundle", sealed.key)


def test_other_data_than_the_runs_is_refused(sealed, tmp_path):
    other = phantom.load("mass", 28, seed=1, count=120)
    with pytest.raises(TrainingError, match="is not what this run was trained on"):
        export_run(sealed.run, other, tmp_path / "mass.bundle", sealed.key)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_does_something_else_is_never_shipped(sealed):
    manifest, files = sealed.bundle.manifest, sealed.bundle.files
    clients = {name: files[path] for name, path in manifest.client.items()}
    saliency = {name: files[path] for name, path in manifest.saliency.items()}
    frames = to_unit(frames_of(sealed.dataset.validation))
    labels = sealed.dataset.validation.labels
    torch.manual_seed(1)
    other = SplitNetwork(sealed.run.settings.split).eval()
    with pytest.raises(ExportError, match="onnx-float32 differs from the trained network"):
        check_parity(other, manifest.release, clients, saliency, frames, labels)
