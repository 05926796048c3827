"""The device's side: saliency graph against client half, and the agent's own time for a frame."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from benchmarks.timing import alternate
from edge.agent import run_agent
from edge.capture import Capture, Frame, Source, open_source
from edge.config import BrokerConfig, CaptureConfig, DeviceConfig, EdgeConfig, LinkConfig, RuntimeConfig
from edge.runtime import Runtime, load_runtime
from splitward.wire.bundle import Bundle, Precision

RATE_HZ = 100.0
VARIANTS: tuple[tuple[str, Precision], ...] = (
    ("onnx", "float32"), ("onnx", "int8"), ("tflite", "float32"), ("tflite", "int8"),
)  # fmt: skip


def measure_graphs(bundle: Bundle, repeats: int) -> dict[str, Any]:
    """Microseconds of every graph, batch 1, one thread, and saliency over client for each variant."""
    spec = bundle.manifest.input
    frame = np.random.default_rng(0).random((spec.channels, spec.height, spec.width), dtype=np.float32)
    found: dict[str, Any] = {}
    for backend, precision in VARIANTS:
        kind = "onnx" if backend == "onnx" else "tflite"
        saliency = load_runtime(kind, bundle.files[bundle.manifest.saliency[kind]], 1)
        client = load_runtime(kind, bundle.files[bundle.manifest.client[f"{kind}-{precision}"]], 1)
        attacked = saliency.run(frame)
        saliency_s, client_s = alternate(
            (lambda s=saliency: s.run(frame), lambda c=client, a=attacked: c.run(a)), repeats
        )
        found[f"{kind}-{precision}"] = {
            "saliency_us": round(1e6 * saliency_s, 1),
            "client_us": round(1e6 * client_s, 1),
            "ratio": round(saliency_s / client_s, 2),
        }
    return found


class _Timed:
    """A runtime that notes how long it ran."""

    def __init__(self, inner: Runtime, spent_s: list[float]) -> None:
        self.name, self._inner, self._spent_s = inner.name, inner, spent_s

    def run(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        started_s = time.perf_counter()
        output = self._inner.run(frame)
        self._spent_s.append(time.perf_counter() - started_s)
        return output


class _Metered:
    """A source that times what the agent does between taking a frame and asking for the next."""

    real_time = True  # the agent never waits for room

    def __init__(self, inner: Source, spent_s: list[float]) -> None:
        self._inner, self._spent_s = inner, spent_s

    def __iter__(self) -> Iterator[Frame]:
        for frame in self._inner:
            started_s = time.perf_counter()
            yield frame
            self._spent_s.append(time.perf_counter() - started_s)


def measure_agent(folder: Path, bundle: Path, trusted_key: Path, frames: Path, port: int) -> dict[str, Any]:
    """Median microseconds of the agent's thread for a frame, outside the runtime, at `RATE_HZ`."""
    found = {}
    for backend, precision in (("onnx", "float32"), ("tflite", "int8")):
        runtime_s: list[float] = []
        agent_s: list[float] = []
        config = EdgeConfig(
            device=DeviceConfig(
                id=f"bench-{backend}",
                bundle=str(bundle),
                trusted_key=str(trusted_key),
                state_dir=str(folder / backend),
            ),
            capture=CaptureConfig(path=str(frames), rate_hz=RATE_HZ),
            runtime=RuntimeConfig(backend="onnx" if backend == "onnx" else "tflite", precision=precision),
            broker=BrokerConfig(port=port),
            link=LinkConfig(retry_s=2.0),
        )

        def source(capture: Capture, config: EdgeConfig = config, spent: list[float] = agent_s) -> _Metered:
            return _Metered(open_source(config.capture, capture), spent)

        def timed(*arguments: Any, spent: list[float] = runtime_s) -> _Timed:
            return _Timed(load_runtime(*arguments), spent)

        with mock.patch("edge.model.load_runtime", timed):
            run_agent(config, source=source, until_answered=True)
        in_runtime_s = np.array(runtime_s[-2 * len(agent_s) :]).reshape(-1, 2).sum(1)
        outside_s = np.array(agent_s) - in_runtime_s
        found[f"{backend}-{precision}"] = {
            "overhead_us": round(1e6 * statistics.median(outside_s), 1),
            "runtime_us": round(1e6 * statistics.median(in_runtime_s), 1),
            "frames": len(agent_s),
        }
    return found
