"""The device agent as a whole: memory, start, its own time for a frame, idling. Writes docs/results/edge.json.

`python -m benchmarks.edge` after `make demo`, or with `--bundle`, `--trusted-key` and `--frames`. Agent and releaser
are measured together: anonymous memory of both, and each mapped file once, by the process that has
more of it resident; the sum of both RSS stands beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge.config import BrokerConfig, CaptureConfig, DeviceConfig, EdgeConfig, LinkConfig, RuntimeConfig
from edge.health import memory_of
from firmware_sim.broker import start_broker
from firmware_sim.fleet import to_toml
from firmware_sim.processes import children_of
from splitward.versions import versions
from splitward.wire import topics
from splitward.wire.control import Result, Status, decode_status, encode_control
from splitward.wire.message import decode

RATE_HZ = 50.0
IDLE_S = 20.0
STARTS = 5
TIMEOUT_S = 120.0


class Answerer:
    """Answers every activation at once, and keeps the latest status."""

    def __init__(self, port: int) -> None:
        self.first_s: float | None = None
        self.answered = 0
        self.status = Status("offline")
        self.changed = threading.Condition()
        self._ready = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, "answerer", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._take
        self._client.connect("127.0.0.1", port)
        self._client.subscribe([("splitward/v1/+/+/activation", 1), (topics.every_status(), 1)])
        self._client.loop_start()
        self._ready.wait(TIMEOUT_S)

    def wait(self, count: int) -> None:
        """Wait until so many frames were answered."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.answered >= count, TIMEOUT_S):
                raise TimeoutError(f"{self.answered} of {count} frames came.")

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _take(self, client: Client, _data: Any, message: MQTTMessage) -> None:
        site, device, kind = topics.parse(message.topic)
        with self.changed:
            if kind == "status":
                self.status = decode_status(bytes(message.payload))
            else:
                self.first_s = self.first_s or time.monotonic()
                one = decode(bytes(message.payload))
                result = Result(
                    *(one.boot.hex(), one.sequence, one.model.hex(), 0, "", (1.0,), {}),
                    *(one.captured_at_ns, time.time_ns()),
                )
                client.publish(topics.result(site, device), encode_control(result), qos=1)
                self.answered += 1
            self.changed.notify_all()


def measure(backend: str, folder: Path, arguments: argparse.Namespace, port: int) -> dict[str, Any]:
    """Every figure of one runtime."""
    starts = [
        _measure_start(backend, folder / f"{backend}-{number}", arguments, port) for number in range(STARTS)
    ]
    answerer = Answerer(port)
    process = _start(backend, folder / backend, arguments, port)
    try:
        answerer.wait(arguments.count // 4)
        pids = [process.pid, *children_of(process.pid)]
        before, at_s, done = [_cpu_s(pid) for pid in pids], time.monotonic(), answerer.answered
        answerer.wait(arguments.count)
        after, frames = [_cpu_s(pid) for pid in pids], answerer.answered - done
        rate_hz = frames / (time.monotonic() - at_s)
        memory, together_mb = [memory_of(pid) for pid in pids], _resident_mb(pids)
        time.sleep(3.0)  # the next status
        health = dict(answerer.status.health)
    finally:
        process.terminate()
        process.wait()
        answerer.close()
    agent_us, releaser_us = (1e6 * (late - early) / frames for early, late in zip(before, after, strict=True))
    return {
        "resident_mb": round(together_mb, 1),
        "rss_sum_mb": round(sum(one["Rss"] for one in memory), 1),
        "agent_rss_mb": round(memory[0]["Rss"], 1),
        "releaser_rss_mb": round(memory[1]["Rss"], 1),
        "start_s": round(statistics.median(starts), 3),
        "start_s_all": [round(one, 3) for one in starts],
        "overhead_us_p50": health["releaser_us_p50"],
        "agent_cpu_us": round(agent_us, 1),
        "releaser_cpu_us": round(releaser_us, 1),
        "runtime_us_p50": health["runtime_us_p50"],
        "rate_hz": round(rate_hz, 1),
        "idle_cpu_percent": _measure_idling(backend, folder / f"{backend}-idle", arguments, port),
    }


def _measure_start(backend: str, folder: Path, arguments: argparse.Namespace, port: int) -> float:
    """Seconds from the start of the interpreter to the arrival of the first published frame."""
    answerer = Answerer(port)
    started_s = time.monotonic()
    process = _start(backend, folder, arguments, port)
    try:
        answerer.wait(1)
        assert answerer.first_s is not None
        return answerer.first_s - started_s
    finally:
        process.terminate()
        process.wait()
        answerer.close()


def _measure_idling(backend: str, folder: Path, arguments: argparse.Namespace, port: int) -> float:
    """CPU, in percent of one core, of an agent that watches an empty folder."""
    (folder / "images").mkdir(parents=True)
    watched = CaptureConfig(kind="folder", path=str(folder / "images"), watch=True)
    process = _start(backend, folder, arguments, port, watched)
    try:
        time.sleep(IDLE_S / 3)  # the start is over
        pids = [process.pid, *children_of(process.pid)]
        before = sum(_cpu_s(pid) for pid in pids)
        time.sleep(IDLE_S)
        spent_s = sum(_cpu_s(pid) for pid in pids) - before
    finally:
        process.terminate()
        process.wait()
    return round(100 * spent_s / IDLE_S, 3)


def _start(
    backend: str, folder: Path, arguments: argparse.Namespace, port: int, capture: CaptureConfig | None = None
) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    config = EdgeConfig(
        device=DeviceConfig(
            id=folder.name,
            bundle=str(arguments.bundle.resolve()),
            trusted_key=str(arguments.trusted_key.resolve()),
            state_dir=str(folder / "state"),
        ),
        capture=capture or CaptureConfig(path=str(_recording(folder, arguments)), rate_hz=RATE_HZ),
        runtime=RuntimeConfig(backend="onnx" if backend == "onnx" else "tflite"),
        broker=BrokerConfig(port=port),
        link=LinkConfig(status_s=2.0),
    )
    settings = folder / "edge.toml"
    settings.write_text(to_toml(config), encoding="utf-8")
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}  # as the systemd unit sets it
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "edge", "run", "--config", str(settings)],
            stderr=log,
            stdout=log,
            env=environment,
        )


def _recording(folder: Path, arguments: argparse.Namespace) -> Path:
    import numpy as np

    from edge.recording import read_recording

    images, _ = read_recording(arguments.frames)
    path = folder / "frames.npz"
    np.savez(
        path, images=images[np.arange(3 * arguments.count) % len(images)]
    )  # it does not end while measured
    return path


def _resident_mb(pids: list[int]) -> float:
    """Anonymous memory of the processes, and each mapped file once."""
    anonymous_kb, files_kb = 0, dict[str, int]()
    for pid in pids:
        own_kb: dict[str, int] = {}
        name = ""
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            words = line.split()
            if not words[0].endswith(":"):
                name = words[5] if len(words) > 5 and words[5].startswith("/") else ""
            elif words[0] == "Anonymous:":
                anonymous_kb += int(words[1])
                own_kb[name] = own_kb.get(name, 0) - int(words[1])
            elif words[0] == "Rss:":
                own_kb[name] = own_kb.get(name, 0) + int(words[1])
        for name, size_kb in own_kb.items():
            files_kb[name] = max(files_kb.get(name, 0), size_kb)
    return (anonymous_kb + sum(files_kb.values())) / 1024


def _cpu_s(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("demo/model.bundle"))
    parser.add_argument("--trusted-key", type=Path, default=Path("demo/signing.key.pub"))
    parser.add_argument("--frames", type=Path, default=Path("demo/frames.npz"))
    parser.add_argument("--count", type=int, default=1000, help="frames for each runtime")
    parser.add_argument("--out", type=Path, default=Path("docs/results/edge.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, start_broker() as broker:
        found = {
            backend: measure(backend, Path(scratch), arguments, broker.port) for backend in ("onnx", "tflite")
        }
    result = {
        "rss_mb": {backend: one["resident_mb"] for backend, one in found.items()},
        "start_s": max(one["start_s"] for one in found.values()),
        "overhead_us_p50": max(one["overhead_us_p50"] for one in found.values()),
        "idle_cpu_percent": max(one["idle_cpu_percent"] for one in found.values()),
        "detail": found,
        "meaning": {
            "rss_mb": "resident memory of agent and releaser together, a mapped file counted once",
            "start_s": "from the start of the interpreter to the first frame at a subscriber, median of the starts",
            "overhead_us_p50": "median wall time of the releaser for a frame outside the runtime",
            "agent_cpu_us": "CPU time of the agent for a frame: spool, flush to disk, link; beside the frame's way",
        },
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, shared",
        "load_average": [round(one, 1) for one in os.getloadavg()],
        "command": f"python -m benchmarks.edge --count {arguments.count}",
        "versions": versions(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({key: result[key] for key in list(result)[:4]}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
