"""What runs a graph on the device: ONNX Runtime, LiteRT or tflite-runtime, behind one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge.errors import BackendError
from splitward.wire.bundle import Backend

if TYPE_CHECKING:
    import onnxruntime


class Runtime(Protocol):
    """A loaded graph with one float32 input and one float32 output, both with a batch axis of 1."""

    name: str
    """Library and version, for the status."""

    def run(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        """Output for `frame`, float32 [C,H,W]; neither has a batch axis."""
        ...


PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's names of its execution providers."""


class OnnxRuntime:
    """ONNX Runtime, on the CPU or on what `providers` names.

    Threads do not spin between frames: at a camera's rate spinning would burn the core that the frame needs.
    """

    def __init__(self, model: bytes, threads: int, providers: Sequence[str] = ("cpu",)) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise BackendError(f"onnxruntime: {error}. Install `splitward[edge]`.") from error
        self.name = f"onnxruntime {onnxruntime.__version__}"
        wanted, there = [PROVIDERS[one] for one in providers], onnxruntime.get_available_providers()
        missing = [one for one in wanted if one not in there]
        if missing:  # ONNX Runtime itself would fall back to the CPU without a word
            raise BackendError(
                f"{self.name} has no {', '.join(missing)}, only {', '.join(there)}. Install the build for this "
                'board, or set `runtime.providers` to ["cpu"].'
            )
        try:
            self._session = onnxruntime.InferenceSession(model, _session_options(threads), providers=wanted)
        except Exception as error:  # its own classes derive from Exception alone
            raise BackendError(f"{self.name} refuses the graph: {error}. Export the bundle again.") from error
        self._input = _only("input", [value.name for value in self._session.get_inputs()])
        self._outputs = [_only("output", [value.name for value in self._session.get_outputs()])]

    def run(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        """Output for `frame`; `BackendError` when the graph does not take its shape."""
        try:
            batch = self._session.run(self._outputs, {self._input: frame[None]})[0]
        except Exception as error:  # its own classes derive from Exception alone
            raise BackendError(f"{self.name} refuses a frame of shape {frame.shape}: {error}.") from error
        output: NDArray[np.float32] = batch[0]
        return output


class LiteRt:
    """LiteRT, from `ai_edge_litert` or else from its predecessor `tflite_runtime`."""

    def __init__(self, model: bytes, threads: int) -> None:
        interpreter, self.name = _interpreter_class()
        try:
            self._interpreter = interpreter(model_content=model, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"{self.name} refuses the graph: {error}. Export the bundle again.") from error
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        self._input = _only("input", [detail["index"] for detail in inputs])
        self._output = _only("output", [detail["index"] for detail in outputs])

    def run(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        """Output for `frame`; `BackendError` when the graph does not take its shape."""
        try:
            self._interpreter.set_tensor(self._input, frame[None])
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise BackendError(f"{self.name} refuses a frame of shape {frame.shape}: {error}.") from error
        output: NDArray[np.float32] = self._interpreter.get_tensor(self._output)[0]
        return output


def load_runtime(backend: Backend, model: bytes, threads: int, providers: Sequence[str] = ("cpu",)) -> Runtime:
    """Load a graph.

    Parameters
    ----------
    backend : "onnx" or "tflite"
    model : bytes
        The graph's file.
    threads : int
        Threads within one operator.
    providers : sequence of str
        Keys of `PROVIDERS`, first choice first; ONNX Runtime's only.

    Raises
    ------
    BackendError
        The library or a provider is not installed, or refuses the graph.
    """
    return OnnxRuntime(model, threads, providers) if backend == "onnx" else LiteRt(model, threads)


def _session_options(threads: int) -> onnxruntime.SessionOptions:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _interpreter_class() -> tuple[Any, str]:
    try:
        import ai_edge_litert as package
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as missing:
        try:
            import tflite_runtime as package
            from tflite_runtime.interpreter import Interpreter
        except ImportError:
            raise BackendError(f"ai_edge_litert: {missing}. Install `splitward[edge-tflite]`.") from missing
    return Interpreter, f"{package.__name__} {getattr(package, '__version__', '')}".strip()


def _only(what: str, found: list[Any]) -> Any:
    if len(found) != 1:
        raise BackendError(f"the graph has {len(found)} {what}s, not one. Export the bundle again.")
    return found[0]
