"""The device's side: saliency graph against client half, and the agent's own time for a frame."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import alternate
from edge.agent import Agent
from edge.config import BrokerConfig, CaptureConfig, DeviceConfig, EdgeConfig, LinkConfig, RuntimeConfig
from edge.runtime import load_runtime
from edge.supervisor import launch
from splitward.wire.bundle import Backend, Bundle, Precision

RATE_HZ = 100.0
VARIANTS: tuple[tuple[Backend, Precision], ...] = (
    ("onnx", "float32"), ("onnx", "int8"), ("tflite", "float32"), ("tflite", "int8"),
)  # fmt: skip


def measure_graphs(bundle: Bundle, repeats: int) -> dict[str, Any]:
    """Microseconds of every graph, batch 1, one thread, and saliency over client for each variant."""
    spec = bundle.manifest.input
    frame = np.random.default_rng(0).random((spec.channels, spec.height, spec.width), dtype=np.float32)
    found: dict[str, Any] = {}
    for kind, precision in VARIANTS:
        saliency = load_runtime(kind, bundle.files[bundle.manifest.saliency[kind]], 1)
        client = load_runtime(kind, bundle.files[bundle.manifest.client[f"{kind}-{precision}"]], 1)
        attacked = saliency.run(frame)
        saliency_s, client_s = alternate((partial(saliency.run, frame), partial(client.run, attacked)), repeats)
        found[f"{kind}-{precision}"] = {
            "saliency_us": round(1e6 * saliency_s, 1),
            "client_us": round(1e6 * client_s, 1),
            "ratio": round(saliency_s / client_s, 2),
        }
    return found


def measure_agent(folder: Path, bundle: Path, trusted_key: Path, frames: Path, port: int) -> dict[str, Any]:
    """Median microseconds for a frame within the runtime and in the rest of the releaser, at `RATE_HZ`."""
    found = {}
    variants: tuple[tuple[Backend, Precision], ...] = (("onnx", "float32"), ("tflite", "int8"))
    for backend, precision in variants:
        config = EdgeConfig(
            device=DeviceConfig(
                id=f"bench-{backend}",
                bundle=str(bundle),
                trusted_key=str(trusted_key),
                state_dir=str(folder / backend),
            ),
            capture=CaptureConfig(path=str(frames), rate_hz=RATE_HZ),
            runtime=RuntimeConfig(backend=backend, precision=precision),
            broker=BrokerConfig(port=port),
            link=LinkConfig(retry_s=2.0),
        )
        with ExitStack() as stack:
            agent = Agent(config, None, threading.Event(), stack, launch())
            report = agent.run(until_answered=True)
        found[f"{backend}-{precision}"] = {
            "overhead_us": agent.releaser_us_p50,
            "runtime_us": agent.runtime_us_p50,
            "frames": report.captured,
        }
    return found
