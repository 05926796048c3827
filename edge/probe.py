"""A bundle tried on this board, in a process of its own: whether it runs, how fast, and in how much memory.

Started as `python -m edge.probe`, request on standard input, report on standard output. A runtime that dies of an
instruction that this CPU lacks, or hangs, ends that process only.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from edge.config import EdgeConfig
from edge.health import memory_of

LIMIT_S = 120.0
WARM_UP = 20


class ProbeRequest(Struct, frozen=True):
    """Run `frames` frames of the bundle with the configured variant."""

    config: EdgeConfig
    bundle: str
    frames: int


class ProbeReport(Struct, frozen=True):
    """What came of it; `error` is empty where it ran.

    `runtime_*` is within the runtime, `other_us_p50` the rest of what the releaser does for a frame: fitting, noise
    and quantisation, encoding. `start_s` is from the start of the process to its first frame.
    """

    variant: str
    error: str = ""
    runtime: str = ""
    model: str = ""
    start_s: float = 0.0
    runtime_us_p50: float = 0.0
    runtime_us_p99: float = 0.0
    other_us_p50: float = 0.0
    frames_per_s: float = 0.0
    message_bytes: int = 0
    rss_mb: float = 0.0


def probe(config: EdgeConfig, bundle: str, frames: int) -> ProbeReport:
    """Try the configured variant of the bundle at the path `bundle`; what fails is reported, not raised."""
    variant = f"{config.runtime.backend}-{config.runtime.precision}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edge.probe"],
            input=msgspec.json.encode(ProbeRequest(config, bundle, frames)),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ProbeReport(variant, error=f"hung: it did not end within {LIMIT_S:.0f} s.")
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return ProbeReport(
            variant, error=f"died of {name}. This board cannot run this runtime; choose another."
        )
    if done.returncode:
        return ProbeReport(variant, error=done.stderr.decode(errors="replace").strip()[-500:])
    return msgspec.json.decode(done.stdout, type=ProbeReport)


def main() -> int:
    """Read a request, run, and write the report."""
    started_s = time.monotonic()
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ProbeRequest)
    from splitward.errors import SplitwardError

    try:
        report = _run(request, started_s)
    except SplitwardError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.buffer.write(msgspec.json.encode(report))
    return 0


def _run(request: ProbeRequest, started_s: float) -> ProbeReport:
    import numpy as np

    from edge.model import ClientModel
    from edge.secret import load_secret
    from edge.verify import TrustedKey
    from splitward.imaging.inputs import to_frame
    from splitward.wire.bundle import read_bundle
    from splitward.wire.message import Activation, encode

    config = request.config
    bundle = read_bundle(Path(request.bundle), TrustedKey(Path(config.device.trusted_key)))
    model = ClientModel(bundle, config.runtime, load_secret(config.device.secret_path))
    spec = model.input
    shape = (spec.height, spec.width) if spec.channels == 1 else (spec.height, spec.width, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    runtime_us: list[float] = []
    other_us: list[float] = []
    start_s, message = 0.0, b""
    for number in range(request.frames + WARM_UP):
        before_ns = time.perf_counter_ns()
        released = model.release(to_frame(pixels, spec))
        message = encode(
            Activation(config.device.id, bytes(16), number, 0, model.id, released, model.law.scale)
        )
        whole_ns = time.perf_counter_ns() - before_ns
        start_s = start_s or time.monotonic() - started_s
        if number >= WARM_UP:
            runtime_us.append(model.runtime_ns / 1e3)
            other_us.append((whole_ns - model.runtime_ns) / 1e3)
    return ProbeReport(
        variant=model.variant,
        runtime=model.runtime,
        model=model.name,
        start_s=round(start_s, 3),
        runtime_us_p50=round(statistics.median(runtime_us), 1),
        runtime_us_p99=round(float(np.percentile(runtime_us, 99)), 1),
        other_us_p50=round(statistics.median(other_us), 1),
        frames_per_s=round(1e6 * len(runtime_us) / (sum(runtime_us) + sum(other_us)), 1),
        message_bytes=len(message),
        rss_mb=round(memory_of().get("Rss", 0.0), 1),
    )


if __name__ == "__main__":
    sys.exit(main())
