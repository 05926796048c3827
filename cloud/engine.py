"""Where the server half runs, behind an interface: recover, infer the three streams, fuse, decide."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cloud.config import EngineConfig
from cloud.metrics import CpuClock
from cloud.server_half import Scores, check_device, load_half
from splitward.wire.server import ServerCard, read_server_card

SIZE_STEP = 4
__all__ = ["Engine", "LocalEngine", "Scores", "SizedHalf"]


class Engine(Protocol):
    """Where the server half runs."""

    @property
    def cards(self) -> Mapping[bytes, ServerCard]:
        """Cards of the models that it serves, by model id."""

    async def start(self) -> None:
        """Load every model."""

    async def infer(self, model: bytes, activations: NDArray[np.float32]) -> Scores:
        """Scores of dequantised `activations`, float32 [B, *shape]; raises any exception when it fails."""

    async def stop(self) -> None:
        """Finish what runs and let go of the models."""


class SizedHalf:
    """A loaded half whose batches all have one of a few sizes.

    Kernels may differ by batch size in the last bits, and a frame's result must not depend on its company: every
    batch is padded to `batch_size`, or to a smaller multiple of `SIZE_STEP` that was found at the start to give
    the same bits on this machine.
    """

    def __init__(self, card: ServerCard, weights: Path, config: EngineConfig, batch_size: int) -> None:
        self._half = load_half(
            card,
            weights,
            backend=config.backend,
            device=config.device,
            threads=config.threads,
            batch=batch_size,
        )
        self._sizes = [*self._sizes_alike(card, batch_size), batch_size]

    @property
    def backend(self) -> str:
        """What runs it."""
        return self._half.backend

    def run(self, activations: NDArray[np.float32]) -> Scores:
        """Scores of `activations`, float32 [B, *shape] with B up to the batch size."""
        count = len(activations)
        size = next(size for size in self._sizes if size >= count)
        if size == count:
            return self._half.run(activations)
        padded = np.zeros((size, *activations.shape[1:]), np.float32)
        padded[:count] = activations
        scores = self._half.run(padded)
        return Scores(scores.decision[:count], scores.streams[:count])

    def _sizes_alike(self, card: ServerCard, batch_size: int) -> list[int]:
        """The smaller sizes whose results are, bit for bit, those of the full size."""
        shape = (batch_size, *card.release.shape)
        trial = np.random.default_rng(0).standard_normal(shape, np.float32)
        whole = self._half.run(trial)
        return [size for size in range(SIZE_STEP, batch_size, SIZE_STEP) if self._alike(trial, whole, size)]

    def _alike(self, trial: NDArray[np.float32], whole: Scores, size: int) -> bool:
        part = self._half.run(np.ascontiguousarray(trial[:size]))
        return np.array_equal(part.decision, whole.decision[:size])


class LocalEngine:
    """In this process, in one thread beside the event loop.

    Parameters
    ----------
    paths : iterable of str
        Server cards, `NAME.server.json`.
    batch_size : int
        Largest batch.

    Raises
    ------
    BundleError
        A card or its weights cannot be used.
    ConfigError
        Torch cannot compute on the configured device.
    """

    def __init__(self, paths: Iterable[str], batch_size: int, config: EngineConfig, clock: CpuClock) -> None:
        check_device(config.device)
        cards = [read_server_card(Path(path)) for path in paths]
        self.cards: Mapping[bytes, ServerCard] = {bytes.fromhex(card.model): card for card, _ in cards}
        self._weights = {bytes.fromhex(card.model): weights for card, weights in cards}
        self._halves: dict[bytes, SizedHalf] = {}
        self._batch_size = batch_size
        self._config = config
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def start(self) -> None:
        """Load every model and run each once."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self._load)

    async def infer(self, model: bytes, activations: NDArray[np.float32]) -> Scores:
        """Scores of `activations`, float32 [B, *shape] with B up to the batch size."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._infer, model, activations)

    async def stop(self) -> None:
        """Finish what runs and let go of the models."""
        await asyncio.to_thread(self._pool.shutdown)
        self._halves.clear()

    @property
    def backends(self) -> dict[str, str]:
        """What runs each model, by name."""
        return {self.cards[model].name: half.backend for model, half in self._halves.items()}

    def _load(self) -> None:
        import torch

        torch.set_num_threads(self._config.threads)
        for model, card in self.cards.items():
            self._halves[model] = SizedHalf(card, self._weights[model], self._config, self._batch_size)

    def _infer(self, model: bytes, activations: NDArray[np.float32]) -> Scores:
        started_s = time.thread_time()
        try:
            return self._halves[model].run(activations)
        finally:
            self._clock.charge("inference", time.thread_time() - started_s)
