"""The server half on a Ray cluster: Ray Serve replicas, handed whole micro-batches through a handle.

Ray's own HTTP ingress is not used. A replica that is lost takes no batch with it: the batch is done again by another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloud.config import EngineConfig
from cloud.engine import Scores, SizedHalf
from cloud.errors import EngineError
from splitward.errors import ConfigError
from splitward.wire.server import ServerCard, read_server_card, server_card_path, write_server_card

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
MAX_PAUSE_S = 5.0


class Replica:
    """One server half in a process of Ray's, anywhere in the cluster: its files come with it."""

    def __init__(self, card: ServerCard, weights: bytes, config: EngineConfig, batch_size: int) -> None:
        import torch

        torch.set_num_threads(config.threads)
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / Path(card.weights).name
            path.write_bytes(weights)
            write_server_card(server_card_path(path.with_name("model.bundle")), card)
            self._half = SizedHalf(card, path, config, batch_size)

    def infer(self, activations: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Decision and streams of `activations`, as `Scores` holds them."""
        scores = self._half.run(activations)
        return scores.decision, scores.streams


class RayEngine:
    """Replicas on the cluster at `config.ray.address`, or on one that is started on this machine.

    Several workers may share a cluster: they use the same replicas, one deployment for each model.

    Parameters
    ----------
    paths : iterable of str
        Server cards, `NAME.server.json`.
    batch_size : int
        Largest batch.

    Raises
    ------
    ConfigError
        Ray is not installed.
    BundleError
        A card or its weights cannot be used.
    """

    def __init__(self, paths: Iterable[str], batch_size: int, config: EngineConfig) -> None:
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # its threads outlive a shutdown, and would start a cluster
        os.environ["RAY_USAGE_STATS_ENABLED"] = (
            "0"  # a cluster of this process's own would report to Ray's makers
        )
        try:
            import ray.serve
        except ImportError as error:
            raise ConfigError('engine.kind = "ray" needs Ray: pip install "splitward[ray]".') from error
        self._serve = ray.serve
        cards = [read_server_card(Path(path)) for path in paths]
        self.cards: Mapping[bytes, ServerCard] = {bytes.fromhex(card.model): card for card, _ in cards}
        self._weights = {bytes.fromhex(card.model): weights.read_bytes() for card, weights in cards}
        self._handles: dict[bytes, Any] = {}
        self._batch_size = batch_size
        self._config = config

    async def start(self) -> None:
        """Join the cluster and deploy every model; `EngineError` when that fails."""
        try:
            await asyncio.to_thread(self._deploy)
        except Exception as error:  # Ray raises what it likes
            raise EngineError(f"Ray Serve does not take the models: {error}") from error

    async def infer(self, model: bytes, activations: NDArray[np.float32]) -> Scores:
        """Scores of `activations`, float32 [B, *shape]; by another replica where one is lost on the way.

        Raises
        ------
        EngineError
            No replica has answered within `config.ray.patience_s`.
        """
        from ray.exceptions import RayActorError

        pause_s, loop = FIRST_PAUSE_S, asyncio.get_running_loop()
        deadline_s = loop.time() + self._config.ray.patience_s
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    return Scores(*await self._handles[model].infer.remote(activations))
            except (RayActorError, TimeoutError) as error:
                if loop.time() + pause_s >= deadline_s:
                    raise EngineError(f"no replica of {self.cards[model].name} answers: {error}") from error
                log.warning("a replica of %s is lost; its batch is done again", self.cards[model].name)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def stop(self) -> None:
        """Leave the cluster; a cluster of this process's own ends with it. The deployments stay for other workers."""
        import ray

        await asyncio.to_thread(ray.shutdown)
        self._handles.clear()

    def _deploy(self) -> None:
        import ray

        own, serve = self._config.ray, self._serve
        if not ray.is_initialized():
            ray.init(
                own.address or "local", namespace="splitward", log_to_driver=False, include_dashboard=False
            )
        serve.start(proxy_location="Disabled")
        for model, card in self.cards.items():
            deployment = serve.deployment(Replica).options(
                name="half",
                max_ongoing_requests=2,  # one computes while the other is on its way
                ray_actor_options={"num_cpus": self._config.threads, "num_gpus": own.gpus},
                autoscaling_config={
                    "min_replicas": own.min_replicas,
                    "max_replicas": own.max_replicas,
                    "target_ongoing_requests": 1,
                },
            )
            application = deployment.bind(card, self._weights[model], self._config, self._batch_size)
            self._handles[model] = serve.run(application, name=f"splitward-{card.model}", route_prefix=None)
