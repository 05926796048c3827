"""The binary message of a training: docs/wire.md, section 9. The activation's, with a training block in its header.

Tensors go as they do in inference. Everything else that two halves say to each other is JSON or bytes, carried as a
vector of int8, so that there is one format, one check and one checksum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from splitward.errors import MessageError
from splitward.wire.message import CODEC_RAW, Activation, assemble, check, disassemble, rows_of

KIND_TRAINING = 2
CODEC_NIBBLES = 1
"""Two int8 values of -8..7 to a byte, the first one in its lower half."""
MAX_LABELS = 1 << 14
MAX_PART = 1 << 19
"""Most bytes of weights in one message: hardened brokers take messages of 1 MiB."""
_BLOCK = struct.Struct("<BBHIIIfI")
_STEPPED, _WIDE = 1, 2
"""Flags: exponents follow the labels; labels have two bytes each."""


class Phase(IntEnum):
    """What a message is about; a reply has the phase of its request, or one of the last two."""

    JOIN = 1
    ROUND = 2
    FETCH = 3
    STEP = 4
    BACK = 5
    HALF = 6
    EVALUATE = 7
    WEIGHTS = 8
    LEAVE = 9
    SUPERSEDED = 32
    REFUSED = 33


_PHASES = frozenset(Phase)


@dataclass(frozen=True, slots=True)
class TrainingMessage:
    """A request of a client, or the reply to it.

    Attributes
    ----------
    device : str
        The client's.
    training : bytes
        16 bytes, of the training.
    sequence : int
        Counts the client's requests in this training, from 0; a reply carries its request's.
    plan : bytes
        First 16 bytes of the SHA-256 of the plan; zeros before the client knows it.
    phase : Phase
    values : ndarray, float32 or int8
    labels : ndarray of uint16
        Of a step, where the labels go to the cloud.
    round, step, epoch : int
        Where the client is: round of the training, its own step and epoch, from 0. For parts of weights, `step`
        is the number of the part and `epoch` how many there are (to the cloud: which half is asked for).
    loss, right : float, int
        In the reply to a step: mean loss of the batch, and how many frames the decision had right.
    scale : float
        As in the activation message.
    nibbles : bool
        Two values to a byte.
    exponents : ndarray of uint8, [shape[0]], or None
        Where each row has a step of its own: `scale * 2**-exponent`.
    """

    device: str
    training: bytes
    sequence: int
    plan: bytes
    phase: Phase
    values: NDArray[np.generic]
    labels: NDArray[np.uint16]
    round: int = 0
    step: int = 0
    epoch: int = 0
    loss: float = 0.0
    right: int = 0
    scale: float = 1.0
    nibbles: bool = False
    exponents: NDArray[np.uint8] | None = None


class _TrainingBlocks:
    codecs: tuple[int, ...] = (CODEC_NIBBLES,)

    def length(self, message: bytes, at: int, end: int) -> int:
        if at + _BLOCK.size > end:
            raise MessageError("bad_header", "the training block is cut off.")
        flags, labels = _BLOCK.unpack_from(message, at)[1:3]
        exponents = rows_of(message) if flags & _STEPPED else 0
        return int(_BLOCK.size + _labels_dtype(flags).itemsize * labels + exponents)

    def stored(self, count: int, dtype: np.dtype[np.generic], codec: int) -> int:
        if codec == CODEC_RAW:
            return count * dtype.itemsize
        if dtype != np.int8:
            raise MessageError("bad_code", "only int8 values lie two to a byte.")
        return (count + 1) // 2

    def unpack(self, payload: bytes, count: int) -> NDArray[np.generic]:
        pairs = np.frombuffer(payload, np.int8)
        if count % 2 and pairs[-1] >> 4:
            raise MessageError("bad_code", "the half byte after the last value is not 0.")
        # Arithmetic shifts bring the sign along.
        return np.stack((np.left_shift(pairs, 4) >> 4, pairs >> 4), axis=1).reshape(-1)[:count]


_BLOCKS = _TrainingBlocks()


def encode_training(message: TrainingMessage) -> bytes:
    """Bytes of a training message.

    Raises
    ------
    MessageError
        As `splitward.wire.message.encode`; `bad_labels` for more than `MAX_LABELS`.
    """
    activation = Activation(
        message.device,
        message.training,
        message.sequence,
        0,
        message.plan,
        message.values,
        message.scale,
    )
    check(activation)
    if len(message.labels) > MAX_LABELS:
        raise MessageError(
            "bad_labels", f"{len(message.labels)} labels; {MAX_LABELS} are allowed in a message."
        )
    exponents = message.exponents
    if exponents is not None and (exponents.dtype != np.uint8 or exponents.shape != message.values.shape[:1]):
        raise MessageError("bad_shape", "exponents are uint8, one for each row of the values.")
    counters = (message.round, message.step, message.epoch, message.right)
    if not all(0 <= number < 1 << 32 for number in counters):
        raise MessageError("out_of_range", f"round, step, epoch and right {counters} are u32.")
    flags = _STEPPED * (exponents is not None) | _WIDE * bool((message.labels > 255).any())
    block = (
        _BLOCK.pack(
            message.phase,
            flags,
            len(message.labels),
            message.round,
            message.step,
            message.epoch,
            message.loss,
            message.right,
        )
        + message.labels.astype(_labels_dtype(flags)).tobytes()
        + (b"" if exponents is None else exponents.tobytes())
    )
    codec = CODEC_NIBBLES if message.nibbles else CODEC_RAW
    payload = _pack(message.values) if message.nibbles else message.values.tobytes()
    return assemble(activation, KIND_TRAINING, codec, block, payload)


def decode_training(message: bytes) -> TrainingMessage:
    """Training message held by the bytes; its values are a read-only view of them where they lie as they are.

    Raises
    ------
    MessageError
        Anything is not as docs/wire.md says; `.reason` names the rule.
    """
    activation, block = disassemble(message, KIND_TRAINING, _BLOCKS)
    phase, flags, count, round_, step, epoch, loss, right = _BLOCK.unpack_from(block)
    if phase not in _PHASES or flags > _STEPPED | _WIDE or activation.captured_at_ns or activation.zero_point:
        raise MessageError("bad_code", f"phase {phase} is not known here, or what must be 0 is not.")
    if not np.isfinite(loss):
        raise MessageError("not_finite", "the loss is NaN or infinite.")
    if count > MAX_LABELS:
        raise MessageError("bad_labels", f"{count} labels; {MAX_LABELS} are allowed in a message.")
    labels = np.frombuffer(block, _labels_dtype(flags), count, _BLOCK.size)
    if flags & _WIDE and not (labels > 255).any():
        raise MessageError("bad_labels", "labels under 256 have one byte each.")
    return TrainingMessage(
        device=activation.device,
        training=activation.boot,
        sequence=activation.sequence,
        plan=activation.model,
        phase=Phase(phase),
        values=activation.values,
        labels=labels.astype(np.uint16),
        round=round_,
        step=step,
        epoch=epoch,
        loss=loss,
        right=right,
        scale=activation.scale,
        nibbles=message[8] == CODEC_NIBBLES,
        exponents=np.frombuffer(block, np.uint8, -1, _BLOCK.size + labels.nbytes) if flags & _STEPPED else None,
    )


def _labels_dtype(flags: int) -> np.dtype[np.generic]:
    return np.dtype("<u2" if flags & _WIDE else "u1")


def _pack(values: NDArray[np.generic]) -> bytes:
    """int8 values of -8..7, two to a byte."""
    flat = values.reshape(-1)
    if values.dtype != np.int8 or (flat < -8).any() or (flat > 7).any():  # type: ignore[operator]  # int8 has an order
        raise MessageError("bad_dtype", "two values to a byte are int8 within -8..7.")
    even = np.zeros(len(flat) + len(flat) % 2, np.int8)
    even[: len(flat)] = flat
    pairs = even.reshape(-1, 2)
    return bytes(((pairs[:, 0] & 15) | np.left_shift(pairs[:, 1], 4)).astype(np.int8).tobytes())
