"""The message of a training: golden bytes, round trips, and bytes that somebody else made."""

from __future__ import annotations

import math
import random
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitward.errors import MessageError
from splitward.wire.message import decode
from splitward.wire.training import MAX_LABELS, Phase, TrainingMessage, decode_training, encode_training
from tests.contract.test_message import BOOT, GOLDEN, INT8, patched

STEP = TrainingMessage(
    device="site-1",
    training=BOOT,
    sequence=41,
    plan=BOOT[::-1],
    phase=Phase.STEP,
    values=np.array([[-127, -1, 0], [1, 2, 127]], np.int8),
    labels=np.array([1, 258], np.uint16),
    round=1,
    step=9,
    epoch=2,
    scale=0.25,
)
GRADIENT = replace(
    STEP,
    values=np.array([[-7, -1, 0], [1, 2, 7]], np.int8),
    labels=np.zeros(0, np.uint16),
    loss=0.5,
    right=1,
    nibbles=True,
    exponents=np.array([0, 9], np.uint8),
)
MESSAGES = {"training-step": STEP, "training-gradient": GRADIENT}


def facts(message: TrainingMessage) -> list[object]:
    """Everything that a message says, comparable to the bit."""
    values = [getattr(message, field.name) for field in fields(message)]
    return [(one.dtype.str, one.shape, one.tobytes()) if isinstance(one, np.ndarray) else one for one in values]


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_bytes(name: str, golden_bytes: dict[str, bytes]) -> None:
    assert encode_training(MESSAGES[name]) == golden_bytes[name]
    assert facts(decode_training(golden_bytes[name])) == facts(MESSAGES[name])


@st.composite
def messages(draw: st.DrawFn) -> TrainingMessage:
    """Any message that the format can carry."""
    nibbles = draw(st.booleans())
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    if nibbles or draw(st.booleans()):
        reach = 7 if nibbles else 127
        values: Any = draw(hnp.arrays(np.int8, shape, elements=st.integers(-reach - 1, reach)))
    else:
        finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
        values = draw(hnp.arrays(np.float32, shape, elements=finite))
    word = st.integers(0, 2**32 - 1)
    return TrainingMessage(
        device=draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)),
        training=draw(st.binary(min_size=16, max_size=16)),
        sequence=draw(st.integers(0, 2**63 - 1)),
        plan=draw(st.binary(min_size=16, max_size=16)),
        phase=draw(st.sampled_from(list(Phase))),
        values=values,
        labels=draw(hnp.arrays(np.uint16, st.integers(0, 9))),
        round=draw(word),
        step=draw(word),
        epoch=draw(word),
        loss=draw(st.floats(allow_nan=False, allow_infinity=False, width=32)),
        right=draw(word),
        scale=draw(st.floats(2.0**-20, 2.0**20, width=32)) if values.dtype == np.int8 else 1.0,
        nibbles=nibbles,
        exponents=draw(st.none() | hnp.arrays(np.uint8, shape[0])),
    )


@given(messages())
def test_round_trip(message: TrainingMessage) -> None:
    assert facts(decode_training(encode_training(message))) == facts(message)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": np.zeros(MAX_LABELS + 1, np.uint16)}, "bad_labels"),
        ({"step": 2**32}, "out_of_range"),
        ({"nibbles": True}, "bad_dtype"),
        ({"exponents": np.zeros(3, np.uint8)}, "bad_shape"),
        ({"exponents": np.zeros(2, np.int32)}, "bad_shape"),
        ({"scale": math.nan}, "bad_quantisation"),
    ],
)
def test_what_the_format_cannot_carry_is_not_sent(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(MessageError) as caught:
        encode_training(replace(STEP, **changes))
    assert caught.value.reason == reason


def verdict(message: bytes) -> str:
    """Reason for which `message` is refused, or nothing: then it is what the format makes of its content."""
    try:
        found = decode_training(message)
    except MessageError as error:
        return error.reason
    assert encode_training(found) == message
    return ""


def test_bytes_that_somebody_else_made_are_refused_or_mean_what_they_say() -> None:
    """Every single byte changed, each way; random cuts and insertions; all with the right checksum."""
    chance, refused, understood = random.Random(2), set[str](), 0
    for message in map(encode_training, MESSAGES.values()):
        forged = [
            patched(message, (at, bytes((value,)))) for at in range(len(message) - 4) for value in range(256)
        ]
        for _ in range(2000):
            at, end = sorted(chance.sample(range(len(message) - 4), 2))
            forged.append(patched(message[:at] + chance.randbytes(chance.randrange(4)) + message[end:]))
        verdicts = [verdict(one) for one in forged]
        understood += verdicts.count("")
        refused |= set(verdicts)
    assert understood > 500
    assert refused >= {"bad_code", "bad_header", "bad_length", "bad_shape", "bad_quantisation"}


def test_labels_that_would_fit_one_byte_in_two_are_refused() -> None:
    narrow = encode_training(replace(STEP, labels=np.array([1, 2], np.uint16)))
    assert len(encode_training(STEP)) == len(narrow) + 2
    wide = encode_training(STEP)
    at = wide.index(bytes((1, 0, 2, 1)))  # 1 and 258
    with pytest.raises(MessageError, match="one byte each"):
        decode_training(patched(wide, (at, bytes((1, 0, 2, 0)))))


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(MessageError, match="loss"):
        decode_training(encode_training(replace(STEP, loss=math.nan)))


def test_neither_kind_is_taken_for_the_other() -> None:
    with pytest.raises(MessageError, match="kind 2"):
        decode(encode_training(STEP))
    with pytest.raises(MessageError, match="kind 1"):
        decode_training(INT8)
    assert decode(INT8).sequence == GOLDEN["activation-int8"].sequence
