"""One loaded server half: activations in, scores out. `compiled` for the CPU, `torch` for everything else."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from splitward.errors import BundleError, ConfigError
from splitward.wire.control import STREAMS
from splitward.wire.server import ServerCard

if TYPE_CHECKING:
    from splitward.method.halves import ServerHalf

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""How far a compiled score may be from torch's on the trial at the start; more, and torch runs the model."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the server half says of B frames.

    Attributes
    ----------
    decision : ndarray, float32 [B, K]
        Scores of the decision fusion; each row sums to 1.
    streams : ndarray, int64 [B, 3]
        Class index of each stream, in the order of `STREAMS`.
    """

    decision: NDArray[np.float32]
    streams: NDArray[np.int64]


class LoadedHalf(Protocol):
    """Runs one batch in the calling thread."""

    backend: str

    def run(self, activations: NDArray[np.float32]) -> Scores:
        """Scores of `activations`, float32 [B, *shape]."""


def check_device(device: str) -> None:
    """`ConfigError` where torch cannot compute on `device` as `TorchHalf` would."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1).to(device).cpu().pin_memory()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch's own differ by device
        fault = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"engine.device {device!r}: torch cannot compute there: {fault}. "
            'Give "cpu", or install the driver and the build of torch for this device.'
        ) from error


class TorchHalf:
    """The method's own modules: the reference, and what runs on a GPU."""

    def __init__(self, network: ServerHalf, device: str = "cpu") -> None:
        self.backend = f"torch-{device}"
        self._network = network.to(device)
        self._device = device

    def run(self, activations: NDArray[np.float32]) -> Scores:
        """Scores of `activations`."""
        import torch

        with torch.inference_mode():
            values = torch.from_numpy(activations)
            if self._device != "cpu":
                values = values.pin_memory().to(self._device, non_blocking=True)
            outputs = self._network(values)
            streams = torch.stack([getattr(outputs, name).argmax(1) for name in STREAMS], dim=1)
            return Scores(outputs.decision.cpu().numpy(), streams.cpu().numpy())


class CompiledHalf:
    """Expansion and everything behind the recovery by ONNX Runtime, the recovery by `cloud.kernel`.

    Raises
    ------
    UnsupportedError
        The network is of a kind that only torch runs.
    """

    backend = "compiled"

    def __init__(self, network: ServerHalf, threads: int) -> None:
        import onnxruntime
        from torch import nn

        from cloud.graph import UnsupportedError, build_expansion, build_tail
        from cloud.kernel import MAX_ROWS
        from splitward.method.recovery import sparse_weight

        self._shape = network.settings.server_shape
        rows, columns = self._shape[0], self._shape[1] * self._shape[2]
        if rows > min(MAX_ROWS, columns) or not (
            network.expand is None or isinstance(network.expand, nn.Linear)
        ):
            raise UnsupportedError(f"matrices of {rows} x {columns}")
        recovery = network.recovery
        mu = np.float32(recovery.mu)
        plain = recovery.method == "svt"
        reach = np.float32(np.inf) if plain else np.float32(mu * np.float32(sparse_weight(rows, columns)))
        steps, tolerance = (1, 0.0) if plain else (recovery.steps, recovery.tolerance)
        self._recovery = (mu, reach, steps, np.float32(tolerance))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        def load(model: bytes) -> onnxruntime.InferenceSession:
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

        # NumPy's matrix product differs in the last bit by a row's place in the batch; ONNX Runtime's does not.
        self._expand = load(build_expansion(network.expand)) if network.expand is not None else None
        self._tail = load(build_tail(network))
        self._inputs = {one.name for one in self._tail.get_inputs()}

    def run(self, activations: NDArray[np.float32]) -> Scores:
        """Scores of `activations`."""
        from cloud.kernel import recover

        u = activations
        if self._expand is not None:
            (u,) = self._expand.run(None, {"released": activations})
        matrices = u.reshape(len(u), self._shape[0], -1)
        v = np.empty_like(matrices)
        recover(matrices, v, *self._recovery)
        feeds = {"released": activations, "u": u.reshape(-1, *self._shape), "v": v.reshape(-1, *self._shape)}
        decision, streams = self._tail.run(None, {name: feeds[name] for name in self._inputs})
        return Scores(decision, streams)


def load_half(
    card: ServerCard, weights: Path, *, backend: str, device: str, threads: int, batch: int
) -> LoadedHalf:
    """The server half of `card`, ready to run.

    Parameters
    ----------
    backend : "auto", "compiled" or "torch"
        "auto" compiles for the CPU where it can and agrees with torch within `TOLERANCE`.
    device : str
        torch's name of it: "cpu", "cuda", "cuda:1".

    Raises
    ------
    BundleError
        `unfit`: weights and card do not fit each other, or "compiled" was demanded and cannot be had.
    """
    import torch
    from safetensors.torch import load_file

    from splitward.method.halves import build_server

    try:
        network = build_server(card.network)
        network.load_state_dict(load_file(weights), strict=True)
        network.eval()
        trial = _trial(card, batch)
        with torch.inference_mode():
            wanted = network(torch.from_numpy(trial)).decision.numpy()
        if wanted.shape[1] != len(card.classes):
            raise ValueError(f"{wanted.shape[1]} scores for {len(card.classes)} classes")
    except (RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        raise BundleError(
            "unfit", f"{weights}: does not fit its card: {error}. Export the run again."
        ) from error
    if backend == "torch" or device != "cpu":
        return TorchHalf(network, device)
    try:
        return _compile(network, threads, trial, wanted)
    except _CannotCompileError as error:
        if backend == "compiled":
            raise BundleError(
                "unfit", f"{card.name}: cannot be compiled: {error}. Use engine.backend torch."
            ) from error
        log.warning("%s: torch runs it: %s", card.name, error)
        return TorchHalf(network, device)


class _CannotCompileError(Exception):
    pass


def _compile(
    network: ServerHalf, threads: int, trial: NDArray[np.float32], wanted: NDArray[np.float32]
) -> CompiledHalf:
    """A compiled half that was tried against torch's scores."""
    try:
        from cloud.graph import UnsupportedError

        half = CompiledHalf(network, threads)
    except (ImportError, UnsupportedError) as error:
        raise _CannotCompileError(str(error)) from error
    apart = float(np.abs(half.run(trial).decision - wanted).max())
    if not apart <= TOLERANCE:  # so written, NaN fails too
        raise _CannotCompileError(f"its scores are up to {apart:.2g} from torch's")
    return half


def _trial(card: ServerCard, batch: int) -> NDArray[np.float32]:
    """Random released values, on the release's grid."""
    generator, law = np.random.default_rng(0), card.release
    shape = (batch, *law.shape)
    if law.dtype == "float32":
        return generator.standard_normal(shape, np.float32)
    return generator.integers(-127, 128, shape).astype(np.float32) * np.float32(law.scale)
