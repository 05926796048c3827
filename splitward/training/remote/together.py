"""All sides of a training in one process, without a network: for experiments, and what tests compare with."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from splitward.errors import TrainingError
from splitward.training.remote.client import Client
from splitward.training.remote.server import Server


def run_together(server: Server, clients: Sequence[Client]) -> None:
    """Let the clients train with the server until all are done; requests are taken in turn.

    Raises
    ------
    TrainingError
        As the clients, or they wait for each other for ever.
    """
    by_name = {client.device: client for client in clients}
    pending = deque(by_name)
    while pending:
        device = pending.popleft()
        request = by_name[device].request
        for name, reply in [] if request is None else server.handle(device, request):
            if by_name[name].take(reply):
                pending.append(name)
    if any(client.request is not None for client in clients):
        raise TrainingError("the clients wait for each other: fewer take part than the plan says.")
