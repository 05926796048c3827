"""Does every exported graph do what the trained network does? Checked with the device's own runtime code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edge.runtime import load_runtime
from splitward.errors import ExportError
from splitward.method.split import SplitNetwork
from splitward.wire.bundle import Backend
from splitward.wire.release import ReleaseLaw, keyed_noise
from splitward.wire.tensor import quantise

FLOAT32_TOLERANCE = 1e-4
"""Largest difference of an exported float32 activation from torch's."""
INT8_COST = 0.01
"""Most accuracy that an int8 variant may cost on the parity images (or two images, where they are few)."""
_SECRET = bytes(32)


@dataclass(frozen=True)
class Variant:
    """What was found of one variant of the client half."""

    max_error: float
    accuracy: float


def check_parity(
    network: SplitNetwork,
    law: ReleaseLaw,
    clients: dict[str, bytes],
    saliency: dict[str, bytes],
    frames: torch.Tensor,
    labels: NDArray[np.int64],
) -> dict[str, Variant]:
    """Run every variant on real frames [N, C, H, W], release under one noise, and let the server half decide.

    Raises
    ------
    ExportError
        A float32 variant differs from torch by more than `FLOAT32_TOLERANCE`, or an int8 variant loses more
        than `INT8_COST` of accuracy: nothing may be shipped.
    """
    with torch.no_grad():
        reference = network.client(network.attack(frames)).numpy()
    noise = _noise(reference, law)
    expected = _accuracy(network, reference, noise, labels)
    allowed = max(INT8_COST, 2 / len(labels))
    found = {}
    for name, graph in clients.items():
        backend, precision = name.split("-")
        activations = _activations(backend, graph, saliency.get(backend), frames.numpy())
        variant = Variant(
            float(np.abs(activations - reference).max()), _accuracy(network, activations, noise, labels)
        )
        if precision == "float32" and not variant.max_error <= FLOAT32_TOLERANCE:
            raise ExportError(
                f"{name} differs from the trained network by {variant.max_error:.2g}, not within "
                f"{FLOAT32_TOLERANCE}. Pin the converters to the tested versions (constraints.txt)."
            )
        if expected - variant.accuracy > allowed:
            raise ExportError(
                f"{name} has accuracy {variant.accuracy:.4f}, the trained network {expected:.4f}: more than "
                f"{allowed:.3g} lost. Train longer, or calibrate on more varied images."
            )
        found[name] = variant
    return found


def _activations(
    backend: str, graph: bytes, saliency: bytes | None, frames: NDArray[np.float32]
) -> NDArray[np.float32]:
    kind: Backend = "onnx" if backend == "onnx" else "tflite"
    client = load_runtime(kind, graph, threads=1)
    attack = load_runtime(kind, saliency, threads=1) if saliency is not None else None
    return np.stack([client.run(attack.run(frame) if attack else frame) for frame in frames])


def _noise(reference: NDArray[np.float32], law: ReleaseLaw) -> torch.Tensor | None:
    """The same noise for every variant, so that what differs is the variant."""
    if law.dtype == "float32":
        return None
    return torch.from_numpy(np.stack([keyed_noise(_SECRET, quantise(one, law.grid), law) for one in reference]))


def _accuracy(
    network: SplitNetwork,
    activations: NDArray[np.float32],
    noise: torch.Tensor | None,
    labels: NDArray[np.int64],
) -> float:
    """Accuracy of the decision on what a device would release."""
    with torch.no_grad():
        released = network.release(torch.from_numpy(activations), noise)
        decision = network.server(released).decision.argmax(1).numpy()
    return float((decision == labels).mean())
