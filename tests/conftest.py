"""Fixtures that many tests share: brokers and data, skipping where they are missing, and a tiny bundle."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import settings
from numpy.typing import NDArray

from firmware_sim.broker import Broker, find_mosquitto, start_broker
from firmware_sim.database import DatabaseError, start_postgres
from splitward.wire.bundle import InputSpec, Manifest, create_signing_key, public_key_path, write_bundle
from splitward.wire.release import ReleaseLaw

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch loads
if "PYTEST_XDIST_WORKER" in os.environ:  # the other worker has the other core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("unhurried", deadline=None)  # any example can take long on a busy machine
settings.load_profile("unhurried")
KINDS = ("onnx", "tflite")
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With SPLITWARD_FORBID_SKIPS=1, as in CI, a test that skips fails: nothing goes unnoticed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("SPLITWARD_FORBID_SKIPS") == "1":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which is forbidden here: {report.longrepr}"
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The emulated device first, the whole product next: of two workers none waits long for the other at the end."""
    rooms = ("arm64", "integration")
    items.sort(key=lambda item: [room not in Path(item.path).parts for room in rooms])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay with one worker, and so do those of the emulated device, for what they make once for all."""
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return "arm64" if path.startswith("tests/arm64/") else path

    return ByRoom(config, log)


@pytest.fixture
def mosquitto() -> Iterator[Broker]:
    """A mosquitto of the test's own."""
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    with start_broker() as broker:
        yield broker


@pytest.fixture
def embedded_broker() -> Iterator[Broker]:
    """An embedded broker of the test's own."""
    pytest.importorskip("iotcore", reason="iotcore is not installed: pip install 'splitward[broker]'")
    with start_broker(prefer="embedded") as broker:
        yield broker


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL, without a database's name, of a PostgreSQL server of the session's own."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(start_postgres(durable=False))
        except DatabaseError as error:
            pytest.skip(str(error))
        yield server.url


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """URL of an empty database of the test's own."""
    import psycopg

    name = f"test_{os.urandom(6).hex()}"
    server = postgres.replace("+psycopg", "")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres}/{name}"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the public data sets."""
    folder = Path(os.environ.get("SPLITWARD_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: set SPLITWARD_DATA to the folder of the data sets")
    return folder


@dataclass(frozen=True)
class TinyBundle:
    """A signed bundle of an 8x8 model, and what it was made of."""

    path: Path
    trusted_key: Path
    manifest: Manifest
    files: dict[str, bytes]
    key: Ed25519PrivateKey

    def rewrite(self, path: Path, files: dict[str, bytes] | None = None, **changes: object) -> TinyBundle:
        """The same bundle with other files or another manifest, signed anew."""
        files = {**self.files, **(files or {})}
        manifest = msgspec.structs.replace(self.manifest, **changes)
        write_bundle(path, manifest, files, self.key)
        return replace(self, path=path, manifest=manifest, files=files)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """Saliency graph: x -> (x, tanh x); client half: tanh. In ONNX and TFLite; "int8" is the same graph."""
    folder = tmp_path_factory.mktemp("bundle")
    frame = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    activation = np.tanh(np.concatenate((frame, np.tanh(frame))))
    files = {
        "saliency.onnx": onnx_graph("saliency"),
        "client.onnx": onnx_graph("client"),
        "saliency.tflite": tflite_graph("saliency"),
        "client.tflite": tflite_graph("client"),
        "golden-frame.npy": npy_bytes(frame),
        "golden-activation.npy": npy_bytes(activation),
    }
    manifest = Manifest(
        format=1,
        name="tiny",
        created_at="2026-01-01T00:00:00Z",
        task="classification",
        classes=("no", "yes"),
        input=InputSpec(1, 8, 8),
        release=ReleaseLaw((2, 8, 8), "int8", bound=1.0, sigma=0.3),
        client={f"{kind}-{precision}": f"client.{kind}" for kind in KINDS for precision in ("float32", "int8")},
        saliency={kind: f"saliency.{kind}" for kind in KINDS},
        golden=("golden-frame.npy", "golden-activation.npy"),
        defence={},
        data={},
        metrics={},
        files={},
    )
    key = create_signing_key(folder / "signing.key")
    write_bundle(folder / "tiny.bundle", manifest, files, key)
    return TinyBundle(folder / "tiny.bundle", public_key_path(folder / "signing.key"), manifest, files, key)


def npy_bytes(array: NDArray[np.generic]) -> bytes:
    """`array` as a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def onnx_graph(part: str) -> bytes:
    """One part of the tiny model as ONNX."""
    from onnx import TensorProto, helper

    channels = 1 if part == "saliency" else 2
    nodes = [helper.make_node("Tanh", ["x"], ["t" if part == "saliency" else "y"])]
    if part == "saliency":
        nodes.append(helper.make_node("Concat", ["x", "t"], ["y"], axis=1))
    graph = helper.make_graph(
        nodes,
        part,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, channels, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, 8, 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def tflite_graph(part: str) -> bytes:
    """One part of the tiny model as TFLite."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: str, channels: int) -> object:
        made = schema.TensorT()
        made.name, made.shape, made.type = name, [1, channels, 8, 8], schema.TensorType.FLOAT32
        return made

    def operator(code: int, inputs: list[int], output: int) -> object:
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = code, inputs, [output]
        return made

    def code(builtin: int) -> object:
        made = schema.OperatorCodeT()
        made.builtinCode = made.deprecatedBuiltinCode = builtin
        return made

    graph, model, empty = schema.SubGraphT(), schema.ModelT(), schema.BufferT()
    if part == "saliency":
        concat = operator(1, [0, 1], 2)
        concat.builtinOptionsType = schema.BuiltinOptions.ConcatenationOptions
        concat.builtinOptions = schema.ConcatenationOptionsT()
        concat.builtinOptions.axis = 1
        graph.tensors = [tensor("x", 1), tensor("t", 1), tensor("y", 2)]
        graph.operators = [operator(0, [0], 1), concat]
        graph.inputs, graph.outputs = [0], [2]
    else:
        graph.tensors = [tensor("x", 2), tensor("y", 2)]
        graph.operators = [operator(0, [0], 1)]
        graph.inputs, graph.outputs = [0], [1]
    model.version, model.subgraphs, model.buffers = 3, [graph], [empty]
    model.operatorCodes = [code(schema.BuiltinOperator.TANH), code(schema.BuiltinOperator.CONCATENATION)]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
