"""Weights and optimisers of one side as named tensors, for snapshots and for what clients hand to each other."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

TURN = threading.RLock()
"""torch has one random state and one choice of kernels for a process: sides that share one take turns."""


class Trained(Protocol):
    """A side of a training; `seen` frames have gradients that wait for the end of the round."""

    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Optimizer]
    seen: int


def state_of(side: Trained, *, optimisers: bool = True) -> dict[str, Tensor]:
    """Every tensor that the side's next step depends on, or its weights alone."""
    tensors: dict[str, Tensor] = {}
    for name, module in side.modules.items():
        tensors |= {f"{name}/module/{key}": tensor for key, tensor in module.state_dict().items()}
        if optimisers:
            for index, state in side.optimisers[name].state_dict()["state"].items():
                tensors |= {f"{name}/optimiser/{index}/{key}": tensor for key, tensor in state.items()}
            if side.seen:
                tensors |= {
                    f"{name}/gradient/{key}": parameter.grad
                    for key, parameter in module.named_parameters()
                    if parameter.grad is not None
                }
    return tensors | ({"seen": torch.tensor(side.seen)} if side.seen else {})


def restore(side: Trained, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `state_of`; optimisers stay as they are where `tensors` has nothing of them."""
    for name, module in side.modules.items():
        head = f"{name}/module/"
        module.load_state_dict({k.removeprefix(head): t for k, t in tensors.items() if k.startswith(head)})
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{name}/optimiser/"):
                _, _, index, field = key.split("/")
                states.setdefault(int(index), {})[field] = tensor.clone()
        if states:
            optimiser = side.optimisers[name]
            optimiser.load_state_dict(optimiser.state_dict() | {"state": states})
        for key, parameter in module.named_parameters():
            if (gradient := tensors.get(f"{name}/gradient/{key}")) is not None:
                parameter.grad = gradient.clone()
    if (seen := tensors.get("seen")) is not None:
        side.seen = int(seen)


def average(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Weighted mean of each tensor; integers, which count batches, are the first one's. In float64, then back.

    Parameters
    ----------
    weights : sequence of float
        One for each state, such as its number of frames.
    """
    total = float(sum(weights))
    found: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            found[name] = first.clone()
            continue
        mean = sum(
            (state[name].double() * (w / total) for state, w in zip(states, weights, strict=True)),
            torch.zeros(()),
        )
        found[name] = mean.to(first.dtype)
    return found


def to_tensor(value: Any) -> Tensor:
    """Plain values or a struct as a tensor of bytes, so that a snapshot is one file."""
    return torch.frombuffer(bytearray(msgspec.msgpack.encode(value)), dtype=torch.uint8)


def from_tensor(tensor: Tensor, kind: type[Any]) -> Any:
    """Inverse of `to_tensor`."""
    return msgspec.msgpack.decode(np.asarray(tensor).tobytes(), type=kind)
