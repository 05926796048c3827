"""A frame's result is its own, bit for bit: alone, in any company, at any position of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cloud.config import EngineConfig
from cloud.engine import LocalEngine, Scores
from cloud.metrics import CpuClock
from cloud.server_half import TOLERANCE
from splitward.method.halves import NetworkSettings, ServerHalf
from splitward.training.run import save_tensors
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import FORMAT, ServerCard, write_server_card

pytestmark = pytest.mark.anyio
MODEL = bytes(16)
NETWORKS = {
    "small": NetworkSettings("small", 1, 28, 10, mapped=True, values=16),
    "residual": NetworkSettings("residual", 1, 64, 3, mapped=True, values=64),
    "unsealed": NetworkSettings("small", 1, 28, 10, mapped=True, recovery="svt"),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine_for(tmp_path: Path) -> Callable:
    """Context manager that serves a random server half."""

    @asynccontextmanager
    async def serve(
        network: NetworkSettings, batch_size: int, threads: int, backend: str = "auto"
    ) -> AsyncIterator[LocalEngine]:
        before = torch.get_num_threads()
        torch.manual_seed(0)
        weights = tmp_path / "x.server.safetensors"
        save_tensors(weights, ServerHalf(network).state_dict())
        card = ServerCard(
            format=FORMAT,
            model=MODEL.hex(),
            name="x",
            classes=tuple(map(str, range(network.classes))),
            release=ReleaseLaw(network.release_shape, "int8", sigma=0.3),
            network=asdict(network),
            weights=weights.name,
            sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        )
        write_server_card(tmp_path / "x.server.json", card)
        config = EngineConfig(threads=threads, backend=backend)
        engine = LocalEngine([str(tmp_path / "x.server.json")], batch_size, config, CpuClock())
        await engine.start()
        yield engine
        await engine.stop()
        torch.set_num_threads(before)

    return serve


def released(network: NetworkSettings, count: int, seed: int = 0) -> NDArray[np.float32]:
    """Random values on the release's grid."""
    steps = np.random.default_rng(seed).integers(-127, 128, (count, *network.release_shape))
    return steps.astype(np.float32) * np.float32(0.015)


def rows_of(scores: Scores) -> list[bytes]:
    """Every bit that the engine says of each frame."""
    return [
        scores.decision[row].tobytes() + scores.streams[row].tobytes() for row in range(len(scores.decision))
    ]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch_size", [1, 3, 8, 32])
@pytest.mark.parametrize("threads", [1, 2])
async def test_a_result_does_not_depend_on_company_or_position(engine_for, name, batch_size, threads):
    network = NETWORKS[name]
    frames = released(network, batch_size)
    async with engine_for(network, batch_size, threads) as engine:
        alone = [rows_of(await engine.infer(MODEL, frames[row : row + 1]))[0] for row in range(batch_size)]
        assert len(set(alone)) == batch_size
        for shift in range(0, batch_size, max(1, batch_size // 8)):
            order = (np.arange(batch_size) + shift) % batch_size
            together = rows_of(await engine.infer(MODEL, frames[order]))
            assert together == [alone[row] for row in order]
        others = released(network, batch_size, seed=1)
        others[-1] = frames[0]
        assert rows_of(await engine.infer(MODEL, others))[-1] == alone[0]


@pytest.mark.parametrize("name", NETWORKS)
async def test_what_is_compiled_agrees_with_torch(engine_for, name):
    network = NETWORKS[name]
    frames = released(network, 64, seed=2)
    found = {}
    for backend in ("compiled", "torch"):
        async with engine_for(network, 64, 1, backend) as engine:
            assert engine.backends == {"x": "compiled" if backend == "compiled" else "torch-cpu"}
            found[backend] = await engine.infer(MODEL, frames)
    apart = np.abs(found["compiled"].decision - found["torch"].decision).max()
    assert apart < TOLERANCE / 10
    assert np.array_equal(found["compiled"].streams, found["torch"].streams)
