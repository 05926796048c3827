"""The device's side of a bundle: frame -> attacked frame and saliency map -> activation -> released tensor."""

from __future__ import annotations

import io
import math
import time

import numpy as np
from numpy.typing import NDArray

from edge.config import RuntimeConfig
from edge.errors import BackendError
from edge.runtime import Runtime, load_runtime
from splitward.errors import BundleError
from splitward.wire.bundle import Bundle
from splitward.wire.release import release

FLOAT32_TOLERANCE = 1e-3
"""Largest difference from the golden activation that two float32 runtimes may show."""
INT8_TOLERANCE = 0.5
"""Root mean square of an int8 variant's difference, relative to the golden activation's own. Loose: it tells
a broken graph (about 1.4 for an unrelated activation) from a coarse one; accuracy is export's to check."""


class ClientModel:
    """The client half, probed and ready.

    Parameters
    ----------
    bundle : Bundle
        Verified.
    config : RuntimeConfig
        Which variant to run.
    secret : bytes
        The device's own; keys the noise.

    Attributes
    ----------
    runtime_ns : int
        Time that the runtime took for the last frame.

    Raises
    ------
    BundleError
        `.reason` is `no_variant`, `bad_golden` (the bundle's own golden pair cannot be used) or
        `golden_mismatch` (this machine computes something else from it).
    BackendError
        The runtime is not installed, or refuses a graph.
    """

    def __init__(self, bundle: Bundle, config: RuntimeConfig, secret: bytes) -> None:
        self.input = bundle.manifest.input
        self.id = bundle.model
        self.name = bundle.manifest.name
        self.variant = f"{config.backend}-{config.precision}"
        self.law = bundle.manifest.release
        self.runtime_ns = 0
        self._secret = secret
        self._saliency: Runtime | None = None
        if bundle.manifest.saliency:
            graph = _file(bundle, bundle.manifest.saliency, config.backend, "saliency graph")
            self._saliency = load_runtime(config.backend, graph, config.threads, config.providers)
        graph = _file(bundle, bundle.manifest.client, self.variant, "client half")
        self._client = load_runtime(config.backend, graph, config.threads, config.providers)
        self.runtime = f"{self.variant}, {self._client.name}"
        self._probe(bundle, FLOAT32_TOLERANCE if config.precision == "float32" else None)

    def release(self, frame: NDArray[np.float32]) -> NDArray[np.generic]:
        """Released tensor of `frame`, float32 [C,H,W]: float32 or int8 of the law's shape.

        Raises
        ------
        BackendError
            The activation is not finite: nothing of this frame may be released.
        """
        activation = self.activation(frame)
        # The sum of finite floats is finite in Python's doubles, and quicker than numpy on a frame's few values.
        if not math.isfinite(sum(activation.ravel().tolist())):
            raise BackendError("the activation holds NaN or infinity; the frame is dropped.")
        return release(activation, self.law, self._secret)

    def activation(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        """Activation of `frame` before noise and quantisation; it never leaves the device."""
        started_ns = time.perf_counter_ns()
        attacked = frame if self._saliency is None else self._saliency.run(frame)
        activation = self._client.run(attacked)
        self.runtime_ns = time.perf_counter_ns() - started_ns
        return activation

    def _probe(self, bundle: Bundle, tolerance: float | None) -> None:
        frame, golden = (_golden(bundle, name) for name in bundle.manifest.golden)
        activation = self.activation(frame)
        if activation.shape != golden.shape or activation.shape != self.law.shape:
            raise BundleError(
                "golden_mismatch",
                f"{self.name}, {self.variant}: the activation has shape {activation.shape}, the manifest says "
                f"{self.law.shape}, the golden one has {golden.shape}. Export the bundle again.",
            )
        difference = activation - golden
        if tolerance is not None:
            error, limit = float(np.abs(difference).max()), tolerance
        else:
            error, limit = _rms(difference), INT8_TOLERANCE * _rms(golden)
        if not error <= limit:  # so written, NaN fails too
            raise BundleError(
                "golden_mismatch",
                f"{self.name}, {self.variant}: differs from the golden activation by {error:.3g}, over "
                f"{limit:.3g}. This machine's runtime cannot be trusted with it; choose another variant.",
            )


def _file(bundle: Bundle, names: dict[str, str], key: str, what: str) -> bytes:
    name = names.get(key)
    if name is None or name not in bundle.files:
        have = ", ".join(sorted(names)) or "none"
        raise BundleError("no_variant", f"{bundle.manifest.name}: no {what} for {key}; it has {have}.")
    return bundle.files[name]


def _golden(bundle: Bundle, name: str) -> NDArray[np.float32]:
    try:
        array = np.load(io.BytesIO(bundle.files[name]), allow_pickle=False)
    except (KeyError, ValueError, EOFError) as error:
        raise BundleError("bad_golden", f"{bundle.manifest.name}: {name}: {error}.") from error
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise BundleError("bad_golden", f"{bundle.manifest.name}: {name}: is not a float32 array.")
    return array


def _rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
