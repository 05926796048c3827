"""The Ray engine on a simulated cluster of two nodes: the local engine's results, whatever is lost on the way.

`test_ray_engine.py` runs these in a process of their own: Ray's threads outlive its shutdown.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cloud.config import EngineConfig, RayConfig
from cloud.engine import LocalEngine, Scores
from cloud.metrics import CpuClock
from splitward.method.halves import build_server
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import ServerCard, write_server_card

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own, of several kinds and versions
]
NETWORK = {"size": "small", "channels": 1, "side": 8, "classes": 3, "mapped": False, "values": 16}
MODEL = b"m" * 16
BATCH = 8


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    weights = folder / "digits.server.safetensors"
    save_file(build_server(NETWORK).state_dict(), weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    path, law = folder / "digits.server.json", ReleaseLaw((16,), "int8")
    classes = ("zero", "one", "two")
    write_server_card(path, ServerCard(1, MODEL.hex(), "digits", classes, law, NETWORK, weights.name, digest))
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two nodes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Read as Ray is imported. Else a thread of it that outlives the shutdown joins the cluster again, and ends this
    # process, with code 1 and without a word, as the cluster ends.
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    started.add_node(num_cpus=2)
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
async def engines(cluster: Any, card: Path) -> AsyncIterator[tuple[LocalEngine, Any]]:
    from cloud.ray_engine import RayEngine

    settings = RayConfig(cluster.address, min_replicas=2, max_replicas=3, patience_s=240)
    local = LocalEngine([str(card)], BATCH, EngineConfig(), CpuClock())
    remote = RayEngine([str(card)], BATCH, EngineConfig(kind="ray", ray=settings))
    for engine in (local, remote):
        await engine.start()
    yield local, remote
    for engine in (local, remote):
        await engine.stop()


def batch(number: int) -> np.ndarray:
    draw = np.random.default_rng(number)
    return draw.uniform(-1, 1, (1 + number % BATCH, 16)).astype(np.float32)


def assert_same(ours: Scores, theirs: Scores) -> None:
    assert np.array_equal(ours.decision, theirs.decision)
    assert np.array_equal(ours.streams, theirs.streams)


def replicas() -> dict[int, int]:
    """Process of each replica, and the process of its node."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:"):
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return found


async def test_both_engines_give_the_same_bits(engines: Any) -> None:
    local, remote = engines
    for number in range(2 * BATCH):
        assert_same(await local.infer(MODEL, batch(number)), await remote.infer(MODEL, batch(number)))
    assert len(set(replicas().values())) == 2, "a replica on each node"


async def test_a_lost_replica_loses_no_batch(engines: Any) -> None:
    local, remote = engines
    killed = min(replicas())

    async def ask(number: int) -> None:
        assert_same(await local.infer(MODEL, batch(number)), await remote.infer(MODEL, batch(number)))

    tasks = [asyncio.create_task(ask(number)) for number in range(400)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # the others are on their way
    os.kill(killed, signal.SIGKILL)
    await asyncio.gather(*tasks)
    assert killed not in replicas()


async def test_a_lost_node_loses_no_batch(engines: Any, cluster: Any) -> None:
    local, remote = engines
    (worker,) = cluster.worker_nodes
    tasks = [asyncio.create_task(remote.infer(MODEL, batch(number))) for number in range(200)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)  # the others are on their way
    await asyncio.to_thread(cluster.remove_node, worker, allow_graceful=False)
    for number, scores in enumerate(await asyncio.gather(*tasks)):
        assert_same(await local.infer(MODEL, batch(number)), scores)
