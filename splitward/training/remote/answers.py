"""What the cloud may answer: a site checks it before it keeps it, for what is kept comes back at every start."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from splitward.errors import TrainingError
from splitward.training.remote.envelope import check_key
from splitward.training.remote.session import MAX_HALF_PARTS
from splitward.wire.training import Phase, TrainingMessage

OVERTAKEN = frozenset({Phase.STEP, Phase.BACK, Phase.HALF, Phase.FETCH})
"""Requests that the round may go on without."""


class Agreement(msgspec.Struct, frozen=True):
    """Answer to who joins: the plan, and each client's key in base64 and number of frames."""

    plan: dict[str, Any]
    keys: dict[str, str]
    frames: dict[str, Annotated[int, Meta(ge=2)]]


class RoundStart(msgspec.Struct, frozen=True):
    """Answer to who asks for the round: its number, and in how many parts each client half of the one before comes."""

    round: Annotated[int, Meta(ge=0, lt=1 << 32)]
    halves: dict[str, Annotated[int, Meta(ge=0, le=MAX_HALF_PARTS)]]


Told = TypeVar("Told", Agreement, RoundStart)


def read(answer: TrainingMessage, kind: type[Told]) -> Told:
    """What an answer tells in JSON; `TrainingError` where it tells something else."""
    try:
        return msgspec.json.decode(answer.values.tobytes(), type=kind)
    except msgspec.DecodeError as error:
        raise _odd(answer.phase, str(error)) from error


def check_answer(
    answer: TrainingMessage,
    request: TrainingMessage,
    released: tuple[int, ...],
    features: int,
    members: Mapping[str, str],
    next_round: int,
) -> None:
    """Refuse an answer that the request cannot have.

    Parameters
    ----------
    released : tuple of int
        Shape of what is released of one frame.
    features : int
        That enter a last layer, where these are at the client; 0 where they are not.
    members : mapping
        Clients of the training, once that is known.
    next_round : int
        The earliest that may begin.

    Raises
    ------
    TrainingError
        What is wrong with it.
    """
    phase, shape = request.phase, answer.values.shape
    if answer.phase is Phase.SUPERSEDED and phase in OVERTAKEN:
        return
    if answer.phase is not phase:
        raise _odd(phase, f"an answer to {answer.phase.name}")
    if phase is Phase.JOIN:
        _check_agreement(answer)
    elif phase is Phase.ROUND:
        told = read(answer, RoundStart)
        if strangers := told.halves.keys() - members.keys():
            raise _odd(phase, f"halves of {', '.join(sorted(strangers))}, who is not of this training")
        if told.round < next_round:
            raise _odd(phase, f"round {told.round}, which is over")
    elif phase is Phase.WEIGHTS and not 1 <= answer.epoch <= MAX_HALF_PARTS:
        raise _odd(phase, f"{answer.epoch} parts")
    count = len(request.values)
    wanted = {
        Phase.STEP: (count, 3, features) if features else (count, *released),
        Phase.BACK: (count, *released),
        Phase.EVALUATE: (count, 4, 2),
    }.get(phase, shape)
    if shape != wanted:
        raise _odd(phase, f"a tensor of shape {shape} instead of {wanted}")


def read_tensors(content: bytes, what: str) -> dict[str, Tensor]:
    """Tensors of a half; `TrainingError` where they cannot be read."""
    try:
        return load(content)
    except SafetensorError as error:
        raise TrainingError(f"{what} cannot be read: {error}. Begin a new training.") from error


def _check_agreement(answer: TrainingMessage) -> None:
    told = read(answer, Agreement)
    try:
        for key in told.keys.values():
            check_key(base64.b64decode(key, validate=True))
    except ValueError as error:
        raise _odd(Phase.JOIN, f"a key: {error}") from error
    if told.keys.keys() != told.frames.keys():
        raise _odd(Phase.JOIN, "not a key and a number of frames for each client")


def _odd(phase: Phase, what: str) -> TrainingError:
    return TrainingError(f"the cloud's answer to {phase.name} cannot be: {what}. Trust it no more.")
