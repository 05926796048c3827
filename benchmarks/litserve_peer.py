"""LitServe with batching, one worker. A module of its own, as LitServe's worker process imports its class by name."""

from __future__ import annotations

import base64

import litserve
from fastapi import Response

from benchmarks.peers import Answerer
from cloud.config import CloudConfig


class Api(litserve.LitAPI):  # type: ignore[misc]  # litserve has no types
    """The same work as the other peers', on whole batches."""

    def __init__(self, config: CloudConfig) -> None:
        super().__init__(max_batch_size=config.batch.max_size, batch_timeout=config.batch.max_wait_ms / 1000)
        self._config = config

    def setup(self, device: str) -> None:  # noqa: ARG002  # litserve calls it so
        """Load, in the worker."""
        self.answerer = Answerer(self._config, self._config.batch.max_size)

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # an annotation is read
        """The message out of LitServe's JSON: it takes no bytes."""
        return base64.b64decode(request["message"])

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """A batch is a list."""
        return inputs

    def predict(self, messages: list[bytes]) -> list[bytes]:
        """Decode, infer, commit, encode."""
        return self.answerer.answer(messages)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        """And stays one."""
        return output

    def encode_response(self, output: bytes) -> Response:
        """The scores, which are JSON already."""
        return Response(output, media_type="application/json")


def serve(config: CloudConfig) -> None:
    """Serve until the process ends."""
    server = litserve.LitServer(Api(config), accelerator="cpu", workers_per_device=1)
    server.run(host=config.api.host, port=config.api.port, generate_client_file=False, log_level="warning")
