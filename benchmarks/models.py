"""Untrained server halves for the benchmarks: speed does not depend on what the weights say."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from splitward.method.halves import NetworkSettings, ServerHalf
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import FORMAT, ServerCard, write_server_card

SMALL = NetworkSettings("small", 1, 28, 10, mapped=True, values=16)
HEAVY = NetworkSettings("residual", 1, 64, 3, mapped=True, values=64)


def write_model(folder: Path, name: str, network: NetworkSettings) -> Path:
    """A server card of random weights in `folder`; its path."""
    torch.manual_seed(0)
    weights = folder / f"{name}.server.safetensors"
    save_file(ServerHalf(network).state_dict(), weights)
    card = ServerCard(
        format=FORMAT,
        model=hashlib.sha256(name.encode()).hexdigest()[:32],
        name=name,
        classes=tuple(map(str, range(network.classes))),
        release=ReleaseLaw(network.release_shape, "int8", sigma=0.3),
        network=asdict(network),
        weights=weights.name,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
    )
    path = folder / f"{name}.server.json"
    write_server_card(path, card)
    return path
