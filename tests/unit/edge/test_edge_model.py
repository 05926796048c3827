"""The client half on the device, by both runtimes: what is released, and what is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from edge.config import RuntimeConfig
from edge.errors import BackendError
from edge.model import ClientModel
from edge.runtime import load_runtime
from splitward.errors import BundleError
from splitward.wire.bundle import Backend, Bundle, read_bundle, read_trusted_key
from splitward.wire.release import release

SECRET = bytes(32)
FRAME = np.linspace(0.2, 0.9, 64, dtype=np.float32).reshape(1, 8, 8)
BACKENDS: tuple[Backend, ...] = ("onnx", "tflite")


def load(tiny: Any) -> Bundle:
    return read_bundle(tiny.path, read_trusted_key(tiny.trusted_key))


def expected(frame: np.ndarray) -> np.ndarray:
    return np.tanh(np.concatenate((frame, np.tanh(frame))))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_release_is_perturb_then_client_half_then_seal(
    tiny_bundle: Any, backend: Backend, precision: Any
) -> None:
    model = ClientModel(load(tiny_bundle), RuntimeConfig(backend=backend, precision=precision), SECRET)
    np.testing.assert_allclose(model.activation(FRAME), expected(FRAME), atol=1e-5)
    released = model.release(FRAME)
    assert released.dtype == np.int8
    np.testing.assert_array_equal(released, release(model.activation(FRAME), model.law, SECRET))
    np.testing.assert_array_equal(released, model.release(FRAME))  # sending again gains an attacker nothing
    assert backend in model.runtime or "litert" in model.runtime


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_profile_without_a_map_feeds_the_frame_itself(
    tiny_bundle: Any, backend: Backend, tmp_path: Any
) -> None:
    twice = np.concatenate((FRAME, FRAME))
    files = {"golden-frame.npy": npy(twice), "golden-activation.npy": npy(np.tanh(twice))}
    plain = tiny_bundle.rewrite(tmp_path / "plain.bundle", files, saliency={})
    model = ClientModel(load(plain), RuntimeConfig(backend=backend), SECRET)
    np.testing.assert_allclose(model.activation(twice), np.tanh(twice), atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "shift", "refused"),
    [("float32", 5e-4, False), ("float32", 2e-3, True), ("int8", 0.05, False), ("int8", 0.9, True)],
)
def test_the_golden_probe_bounds_the_difference(
    tiny_bundle: Any, tmp_path: Any, precision: Any, shift: float, refused: bool
) -> None:
    golden = np.load(io.BytesIO(tiny_bundle.files["golden-activation.npy"]))
    shifted = tiny_bundle.rewrite(tmp_path / "b", {"golden-activation.npy": npy(golden + np.float32(shift))})
    config = RuntimeConfig(precision=precision)
    if refused:
        with pytest.raises(BundleError) as caught:
            ClientModel(load(shifted), config, SECRET)
        assert caught.value.reason == "golden_mismatch"
    else:
        ClientModel(load(shifted), config, SECRET)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("golden-frame.npy", b"not an array", "bad_golden"),
        ("golden-activation.npy", b"", "bad_golden"),
        ("golden-activation.npy", None, "golden_mismatch"),
    ],
)
def test_a_bad_golden_pair_is_refused(
    tiny_bundle: Any, tmp_path: Any, name: str, content: bytes | None, reason: str
) -> None:
    content = npy(np.full((2, 8, 8), np.nan, np.float32)) if content is None else content
    with pytest.raises(BundleError) as caught:
        ClientModel(load(tiny_bundle.rewrite(tmp_path / "b", {name: content})), RuntimeConfig(), SECRET)
    assert caught.value.reason == reason


def test_a_missing_variant_is_refused(tiny_bundle: Any, tmp_path: Any) -> None:
    bundle = load(tiny_bundle.rewrite(tmp_path / "b", client={"onnx-float32": "client.onnx"}))
    with pytest.raises(BundleError, match="it has onnx-float32") as caught:
        ClientModel(bundle, RuntimeConfig(precision="int8"), SECRET)
    assert caught.value.reason == "no_variant"


def test_an_activation_that_is_not_finite_is_never_released(tiny_bundle: Any) -> None:
    model = ClientModel(load(tiny_bundle), RuntimeConfig(), SECRET)
    with pytest.raises(BackendError, match="NaN"):
        model.release(np.full((1, 8, 8), np.nan, np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_runtime_refuses_what_it_cannot_run(tiny_bundle: Any, backend: Backend) -> None:
    with pytest.raises(BackendError, match="refuses the graph"):
        load_runtime(backend, b"no graph", threads=1)
    runtime = load_runtime(backend, tiny_bundle.files[f"client.{backend}"], threads=1)
    with pytest.raises(BackendError, match="refuses a frame"):
        runtime.run(np.zeros((5, 8, 8), np.float32))


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
