"""The server half, behind an interface: recover, infer the three streams, fuse, decide."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from cloud.metrics import CpuClock
from splitward.errors import BundleError
from splitward.wire.control import STREAMS
from splitward.wire.server import ServerCard, read_server_card

if TYPE_CHECKING:
    from torch import nn


SMALLER_SIZES = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class Scores:
    """What the server half says of B frames.

    Attributes
    ----------
    decision : ndarray, float32 [B, K]
        Scores of the decision fusion; each row sums to 1.
    streams : dict
        Class index, int64 [B], of each stream.
    """

    decision: NDArray[np.float32]
    streams: dict[str, NDArray[np.int64]]


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


class LocalEngine:
    """torch in this process, in one thread beside the event loop.

    Parameters
    ----------
    paths : iterable of str
        Server cards, `NAME.server.json`.
    batch_size : int
        Largest batch. Kernels may differ by batch size in the last bits, and a frame's result must not depend
        on its company: every batch is padded to this size, or to a smaller one of `SMALLER_SIZES` that was
        found at the start to give the same bits on this machine.
    threads : int
        Threads of torch.

    Raises
    ------
    BundleError
        A card or its weights cannot be used.
    """

    def __init__(self, paths: Iterable[str], batch_size: int, threads: int, clock: CpuClock) -> None:
        cards = [read_server_card(Path(path)) for path in paths]
        self.cards: Mapping[bytes, ServerCard] = {bytes.fromhex(card.model): card for card, _ in cards}
        self._weights = {bytes.fromhex(card.model): weights for card, weights in cards}
        self._networks: dict[bytes, nn.Module] = {}
        self._batch_size = batch_size
        self._sizes: dict[bytes, list[int]] = {}
        self._threads = threads
        self._clock = clock
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")

    async def start(self) -> None:
        """Load every model and run each once."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self._load)

    async def infer(self, model: bytes, activations: NDArray[np.float32]) -> Scores:
        """Scores of `activations`, float32 [B, *shape] with B up to the batch size."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._infer, model, activations)

    async def stop(self) -> None:
        """Finish what runs and let go of the models."""
        await asyncio.to_thread(self._pool.shutdown)
        self._networks.clear()

    def _load(self) -> None:
        import torch

        torch.set_num_threads(self._threads)
        for model, card in self.cards.items():
            self._load_model(model, card)

    def _load_model(self, model: bytes, card: ServerCard) -> None:
        from safetensors.torch import load_file

        from splitward.method.halves import build_server

        weights = self._weights[model]
        try:
            network = build_server(card.network)
            network.load_state_dict(load_file(weights), strict=True)
            self._networks[model] = network.eval()
            self._sizes[model] = [self._batch_size]
            trial = self._infer(model, np.zeros((1, *card.release.shape), np.float32))
            if trial.decision.shape != (1, len(card.classes)):
                raise ValueError(f"{trial.decision.shape[1]} scores for {len(card.classes)} classes")
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(
                "unfit", f"{weights}: does not fit its card: {error}. Export the run again."
            ) from error

        self._sizes[model] = [*self._sizes_alike(model, card), self._batch_size]

    def _sizes_alike(self, model: bytes, card: ServerCard) -> list[int]:
        """The smaller sizes whose results are, bit for bit, those of the full size."""
        import torch

        network = self._networks[model]
        trial = torch.randn(self._batch_size, *card.release.shape, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            whole = network(trial)
            return [
                size
                for size in SMALLER_SIZES
                if size < self._batch_size
                and all(
                    torch.equal(part, full[:size])
                    for part, full in zip(network(trial[:size]), whole, strict=True)
                )
            ]

    def _infer(self, model: bytes, activations: NDArray[np.float32]) -> Scores:
        import torch

        started_s = time.thread_time()
        count = len(activations)
        size = next(size for size in self._sizes[model] if size >= count)
        padded = np.zeros((size, *activations.shape[1:]), np.float32)
        padded[:count] = activations
        with torch.inference_mode():
            outputs = self._networks[model](torch.from_numpy(padded))
        decision = outputs.decision[:count].numpy()
        streams = {name: getattr(outputs, name)[:count].argmax(1).numpy() for name in STREAMS}
        self._clock.charge("inference", time.thread_time() - started_s)
        return Scores(decision, streams)
