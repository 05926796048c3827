"""`python -m benchmarks.cloud`: the cloud service beside its peers, to docs/results/cloud.json and its page.

CPU time is that of the server's processes, by the kernel's account, over the inferences that they made meanwhile:
client, decoding, inference, commit and reply, for every server. Servers take turns and each figure is a median.

What else stands in the file comes of benchmarks.mutations, and of the campaign `python -m firmware_sim chaos
firmware_sim/scenarios/database.toml --out docs/results/cloud-chaos.json`, whose sum is taken over.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.cloud_page import format_page
from benchmarks.models import HEAVY, SMALL, write_model
from benchmarks.service import _read
from firmware_sim.broker import free_port, start_broker
from firmware_sim.load import LoadConfig, LoadReport, run_load
from splitward.versions import versions
from splitward.wire.message import Activation, encode
from splitward.wire.server import read_server_card

TICKS = os.sysconf("SC_CLK_TCK")
CLIENTS = ("mqtt5", "aiomqtt")
POSTS = ("fastapi_post", "litserve")
SPEEDUP_FRAMES = 8192
"""Of the heavy network: enough that the last batch, which one worker answers alone, does not count."""


class Server:
    """A server process and what it spent."""

    def __init__(self, process: subprocess.Popen[bytes], address: str, broker_port: int) -> None:
        self.process, self.address, self.broker_port = process, address, broker_port

    def cpu_s(self) -> float:
        """CPU time of the process and its children, alive or not."""
        wanted, total = {self.process.pid}, 0
        for stat in sorted(Path("/proc").glob("[0-9]*/stat"), key=lambda path: int(path.parent.name)):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(stat.parent.name) in wanted or int(fields[1]) in wanted:
                    wanted.add(int(stat.parent.name))
                    total += sum(map(int, fields[11:13]))
        return total / TICKS


@contextlib.contextmanager
def serve(kind: str, folder: Path, card: Path, broker_port: int, number: int = 1) -> Iterator[Server]:
    """A server of `kind` until the block ends."""
    port, name = free_port(), f"{kind}-{number}"
    for leftover in folder.glob(f"{name}.db*"):
        leftover.unlink()
    config = folder / f"{name}.toml"
    store = folder / ("shared.db" if number else f"{name}.db")
    config.write_text(
        f'models = ["{card}"]\n[broker]\nport = {broker_port}\nclient_id = "{name}"\n'
        f"[api]\nport = {port}\nrequire_token = false\nrequests_per_s = 1e9\nburst = 1000000000\n[store]\n"
        f'url = "sqlite+aiosqlite:///{store}"\n[fleet]\nstate_dir = "{folder}/fleet"\n[log]\nlevel = "ERROR"\n'
    )
    module = ["cloud"] if kind == "mqtt5" else ["benchmarks.peers", kind]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module, "--config", str(config)], stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(
            process, address + ("/readyz" if kind in CLIENTS else "/health" if kind == "litserve" else "/docs")
        )
        yield Server(process, address, broker_port)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves workers behind, which spin


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):  # noqa: S310  # our own address
            return
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer.")


def measure_speedup(folder: Path, card: Path, broker_port: int, frames: int, repeats: int) -> float:
    """Results a second of two workers on a core each, over one store, beside those of one on one core."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for workers, found in rates.items():
            for leftover in folder.glob("shared.db*"):
                leftover.unlink()
            with contextlib.ExitStack() as stack:
                for number in range(1, workers + 1):
                    server = stack.enter_context(serve("mqtt5", folder, card, broker_port, number))
                    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
                        os.sched_setaffinity(int(task.name), {number - 1})
                measure_mqtt(server, card, frames // 4)
                found.append(measure_mqtt(server, card, frames)[1].results_per_s)
    return round(statistics.median(rates[2]) / statistics.median(rates[1]), 2)


def measure_mqtt(
    server: Server, card: Path, frames: int, devices: int = 10, **more: Any
) -> tuple[float, LoadReport]:
    """CPU microseconds of the server for an inference, and the load's report."""
    prefix = f"d{time.monotonic_ns()}"
    window = max(1, 400 // devices)
    before_s = server.cpu_s()
    report = run_load(
        LoadConfig(card=str(card), port=server.broker_port, devices=devices, frames=frames, window=window,
                   prefix=prefix, **more)
    )  # fmt: skip
    return 1e6 * (server.cpu_s() - before_s) / report.results, report


def measure_half_load(server: Server, card: Path, frames: int, repeats: int) -> tuple[float, float]:
    """Results a second at saturation, and the 99th percentile in ms from message to reply at half of that."""
    measure_mqtt(server, card, frames // 4)
    full = measure_mqtt(server, card, frames)[1].results_per_s
    half = [measure_mqtt(server, card, frames // 2, rate_hz=full / 2)[1].p99_ms or 0 for _ in range(repeats)]
    return full, statistics.median(half)


def measure_flush(folder: Path, count: int = 300) -> dict[str, float]:
    """What one flush of 8 KiB takes on the disk that holds the store; every commit waits for one."""
    taken_ms = []
    with tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(count):
            file.write(bytes(8192))
            started_s = time.perf_counter()
            os.fdatasync(file.fileno())
            taken_ms.append(1e3 * (time.perf_counter() - started_s))
    return {name: round(float(np.percentile(taken_ms, at)), 2) for name, at in (("p50", 50), ("p99", 99))}


def measure_posts(kind: str, server: Server, card: Path, frames: int) -> float:
    """The same for a server that takes POSTs, 64 at a time; LitServe takes JSON."""
    law, model = read_server_card(card)[0].release, bytes(16)
    generator, boot = np.random.default_rng(0), os.urandom(16)
    bodies = [
        encode(
            Activation(
                "post",
                boot,
                n,
                time.time_ns(),
                model,
                generator.integers(-127, 128, law.shape, np.int8),
                law.scale,
            )
        )
        for n in range(frames)
    ]
    if kind == "litserve":
        bodies = [json.dumps({"message": base64.b64encode(body).decode()}).encode() for body in bodies]

    async def post() -> None:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=64), timeout=60) as client:

            async def some(first: int) -> None:
                for body in bodies[first::64]:
                    while True:
                        try:
                            answer = await client.post(f"{server.address}/predict", content=body)
                        except (
                            httpx.TransportError
                        ):  # an overloaded server closes connections that it keeps alive
                            continue
                        answer.raise_for_status()
                        break

            await asyncio.gather(*map(some, range(64)))

    before_s = server.cpu_s()
    asyncio.run(post())
    return 1e6 * (server.cpu_s() - before_s) / frames


def measure_capacity(card: Path, seconds: float = 5.0) -> float:
    """What a second core is worth here: the bare model's rate in two processes beside that in one."""
    context, rates = multiprocessing.get_context("spawn"), []
    for workers in (1, 2):
        with context.Pool(workers) as pool:
            rates.append(sum(pool.starmap(run_bare, [(card, core, seconds) for core in range(workers)])))
    return round(rates[1] / rates[0], 2)


def run_bare(card: Path, core: int, seconds: float) -> float:
    """Batches a second of the bare model on one core."""
    from cloud.server_half import load_half

    os.sched_setaffinity(0, {core})
    about, weights = read_server_card(card)
    half = load_half(about, weights, backend="auto", device="cpu", threads=1, batch=64)
    values, done, started_s = np.zeros((64, *about.release.shape), np.float32), 0, time.monotonic()
    while time.monotonic() - started_s < seconds:
        half.run(values)
        done += 1
    return done / (time.monotonic() - started_s)


def measure_bare(card: Path, repeats: int) -> dict[str, float]:
    """Thread CPU microseconds of a frame in a batch of 64: compiled, and by torch's modules."""
    import torch

    from cloud.server_half import load_half

    torch.set_num_threads(1)
    found, (about, weights) = {}, read_server_card(card)
    drawn = np.random.default_rng(0).integers(-127, 128, (64, *about.release.shape))  # as the load tool draws
    values = drawn.astype(np.float32) * np.float32(about.release.scale)
    halves = {
        name: load_half(about, weights, backend=name, device="cpu", threads=1, batch=64)
        for name in ("compiled", "torch")
    }
    spent_s: dict[str, list[float]] = {name: [] for name in halves}
    for _ in range(repeats):
        for name, half in halves.items():
            started_s = time.thread_time()
            half.run(values)
            spent_s[name].append(time.thread_time() - started_s)
    for name, times in spent_s.items():
        found[name] = round(1e6 * statistics.median(times) / 64, 2)
    return found


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    folder: Path
    broker_port: int
    frames: int
    repeats: int

    def model(self, name: str) -> Path:
        """Card of the small or the heavy network, written once."""
        card = self.folder / f"{name}.server.json"
        return card if card.exists() else write_model(self.folder, name, HEAVY if name == "heavy" else SMALL)


def measure_clients(bench: Bench) -> dict[str, Any]:
    """CPU of a server for an inference, by what receives it; in turns, so that no one has the quiet minutes."""
    small = bench.model("small")
    rounds: dict[str, list[float]] = {kind: [] for kind in (*CLIENTS, *POSTS)}
    parts: list[dict[str, float]] = []
    for _ in range(bench.repeats):
        for kind in rounds:
            with serve(kind, bench.folder, small, bench.broker_port, 0) as server:
                if kind in POSTS:
                    measure_posts(kind, server, small, bench.frames // 10)
                    rounds[kind].append(measure_posts(kind, server, small, bench.frames // 4))
                    continue
                measure_mqtt(server, small, bench.frames // 4)
                before = _read(server.address)
                rounds[kind].append(measure_mqtt(server, small, bench.frames)[0])
                after = _read(server.address)
                if kind == "mqtt5":
                    done = after["inferences"] - before["inferences"]
                    parts.append({p: 1e6 * (after["cpu"][p] - before["cpu"][p]) / done for p in after["cpu"]})
    cpu: dict[str, Any] = {
        kind: {"total": round(statistics.median(values), 1)} for kind, values in rounds.items()
    }
    cpu["mqtt5"] |= {p: round(statistics.median(one[p] for one in parts), 1) for p in parts[0]}
    ratios = {f"{kind}_over_mqtt5": round(cpu[kind]["total"] / cpu["mqtt5"]["total"], 2) for kind in cpu}
    return {"cpu_us_per_inference": cpu, "ratios": ratios}


def measure_load(bench: Bench) -> dict[str, Any]:
    """The small network at saturation, at half of it, and from few and many devices."""
    small = bench.model("small")
    with serve("mqtt5", bench.folder, small, bench.broker_port, 0) as server:
        full, half = measure_half_load(server, small, bench.frames, bench.repeats)
        spent_us: dict[int, list[float]] = {10: [], 100: [], 2000: []}
        for _ in range(bench.repeats):  # in turns
            for devices, found in spent_us.items():
                found.append(measure_mqtt(server, small, bench.frames, devices)[0])
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:  # a disk that flushes at once
        other = write_model(Path(memory), "small", SMALL)
        with serve("mqtt5", Path(memory), other, bench.broker_port, 0) as server:
            half_memory = measure_half_load(server, other, bench.frames, bench.repeats)[1]
    return {
        "saturation_per_s": full,
        "p99_ms_half_load": half,
        "p99_ms_half_load_memory_disk": half_memory,
        "disk_flush_ms": measure_flush(bench.folder),
        "cpu_us_by_devices": {str(n): round(statistics.median(found), 1) for n, found in spent_us.items()},
    }


def measure_heavy(bench: Bench) -> dict[str, Any]:
    """The service with the heavy network beside the bare networks, in turns: minutes differ by more than the two do."""
    heavy = bench.model("heavy")
    bare: list[dict[str, float]] = []
    served_us: list[float] = []
    served_per_s: list[float] = []
    with serve("mqtt5", bench.folder, heavy, bench.broker_port, 0) as server:
        measure_mqtt(server, heavy, 256)
        before = _read(server.address)
        for _ in range(bench.repeats):
            bare.append(measure_bare(heavy, 5))
            cpu_us, report = measure_mqtt(server, heavy, 2048)
            served_us.append(cpu_us)
            served_per_s.append(report.results_per_s)
        after = _read(server.address)
    spent_s = {part: after["cpu"][part] - before["cpu"][part] for part in after["cpu"]}
    middle = {name: statistics.median(one[name] for one in bare) for name in bare[0]}
    fraction = {f"of_{name}": round(us / statistics.median(served_us), 3) for name, us in middle.items()}
    fraction["throughput_of_compiled"] = round(statistics.median(served_per_s) * middle["compiled"] / 1e6, 3)
    fraction["inference_of_all_cpu"] = round(spent_s["inference"] / sum(spent_s.values()), 3)
    return {
        "model_us": {"small": measure_bare(bench.model("small"), 50), "heavy": middle},
        "heavy_fraction_of_bare": fraction,
    }


def measure_workers(bench: Bench) -> dict[str, Any]:
    """What a second worker on a second core adds, beside what the core adds to the bare network."""
    heavy = bench.model("heavy")
    return {
        "two_bare_processes_speedup": measure_capacity(heavy),
        "two_worker_speedup": measure_speedup(
            bench.folder, heavy, bench.broker_port, SPEEDUP_FRAMES, bench.repeats
        ),
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "clients": measure_clients,
    "load": measure_load,
    "heavy": measure_heavy,
    "workers": measure_workers,
}


def main() -> int:
    """Measure the parts that are asked for, and add them to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/cloud.json"))
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS))
    given = parser.parse_args()
    for part in given.only:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as name, start_broker() as broker:
            found = PARTS[part](Bench(Path(name), broker.port, given.frames, given.repeats))
        result = json.loads(given.out.read_text()) if given.out.exists() else {}
        result |= found
        result.setdefault("parts", {})[part] = {
            "command": f"python -m benchmarks.cloud --only {part} --frames {given.frames} --repeats {given.repeats}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before it",
        }
        result["versions"] = versions()
        campaign = given.out.with_name("cloud-chaos.json")
        if campaign.exists():
            chaos = json.loads(campaign.read_text())
            result["chaos"] = {
                name: chaos[name] for name in ("frames", "lost", "duplicated", "kills", "command")
            }
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        if result["parts"].keys() == PARTS.keys() and {"mutated_messages", "chaos"} <= result.keys():
            given.out.with_suffix(".md").write_text(format_page(result), encoding="utf-8")
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
