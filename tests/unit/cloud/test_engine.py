"""The local engine, on a real (untrained) server half."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from cloud.config import EngineConfig
from cloud.engine import LocalEngine
from cloud.metrics import CpuClock
from splitward.errors import BundleError
from splitward.wire.control import STREAMS
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import ServerCard, write_server_card

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'splitward[cloud]'")
halves = pytest.importorskip("splitward.method.halves")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.anyio

NETWORK = {"size": "small", "channels": 1, "side": 8, "classes": 3, "mapped": False, "values": 16}
MODEL = b"m" * 16


@pytest.fixture
def card(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    weights = tmp_path / "digits.server.safetensors"
    safetensors.save_file(halves.build_server(NETWORK).state_dict(), weights)
    return write_card(tmp_path)


def write_card(folder: Path, classes: tuple[str, ...] = ("zero", "one", "two"), **changes) -> Path:
    digest = hashlib.sha256((folder / "digits.server.safetensors").read_bytes()).hexdigest()
    law, network = ReleaseLaw((16,), "int8"), NETWORK | changes
    path = folder / "digits.server.json"
    weights = "digits.server.safetensors"
    write_server_card(path, ServerCard(1, MODEL.hex(), "digits", classes, law, network, weights, digest))
    return path


def engine_for(card: Path, backend: str = "auto") -> LocalEngine:
    return LocalEngine([str(card)], 4, EngineConfig(backend=backend), CpuClock())


async def test_scores_have_a_row_for_each_frame_and_sum_to_1(card):
    engine = engine_for(card)
    await engine.start()
    scores = await engine.infer(MODEL, np.zeros((3, 16), np.float32))
    assert scores.decision.shape == (3, 3)
    assert scores.decision.dtype == np.float32
    assert scores.decision.sum(1) == pytest.approx(1, abs=1e-5)
    assert scores.streams.shape == (3, len(STREAMS))
    await engine.stop()


async def test_a_result_does_not_depend_on_its_company(card):
    engine = engine_for(card)
    await engine.start()
    values = np.random.default_rng(0).uniform(-1, 1, (4, 16)).astype(np.float32)
    together = await engine.infer(MODEL, values)
    alone = [await engine.infer(MODEL, values[row : row + 1]) for row in range(4)]
    assert (np.concatenate([scores.decision for scores in alone]) == together.decision).all()
    await engine.stop()


async def test_weights_that_do_not_fit_are_refused(card, tmp_path):
    for path in (
        lambda: write_card(tmp_path, classes=("zero", "one")),
        lambda: write_card(tmp_path, classes_=3),
    ):
        engine = engine_for(path())
        with pytest.raises(BundleError, match="Export the run again") as refusal:
            await engine.start()
        assert refusal.value.reason == "unfit"
        await engine.stop()


def test_changed_weights_are_refused(card, tmp_path):
    (tmp_path / "digits.server.safetensors").write_bytes(b"other")
    with pytest.raises(BundleError, match="differs"):
        engine_for(card)
