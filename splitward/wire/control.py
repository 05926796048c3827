"""Control messages: JSON, decoded into typed structs. docs/wire.md lists their fields."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec

from splitward.errors import MessageError
from splitward.wire.names import MAX_INTEGER

MAX_BYTES = 64 * 1024

STREAMS = ("attacked", "recovered", "fused")
"""The three streams of the server half, in this order everywhere."""


Integer = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]


class Result(msgspec.Struct, frozen=True, tag="result", tag_field="type"):
    """The cloud's answer to one frame. It was committed to the store before it was sent.

    `class_index` and `scores` are of the decision fusion; `streams` holds each stream's own class index.
    """

    boot: str
    sequence: Integer
    model: str
    class_index: Integer
    class_name: str
    scores: tuple[float, ...]
    streams: dict[str, Integer]
    captured_at_ns: Integer
    stored_at_ns: Integer


class Refusal(msgspec.Struct, frozen=True, tag="refusal", tag_field="type"):
    """The cloud will never answer this frame; the device drops it and counts `reason`."""

    boot: str
    sequence: Integer
    reason: str
    message: str


class Status(msgspec.Struct, frozen=True, tag="status", tag_field="type"):
    """What a device says of itself, retained. `state` is `offline` in the last will.

    None stands for what the device cannot tell; `health` holds further counters by name.
    """

    state: Literal["online", "offline"]
    version: str = ""
    model: str = ""
    model_name: str = ""
    runtime: str = ""
    at_ns: Integer = 0
    queued: Integer = 0
    captured: Integer = 0
    sent: Integer = 0
    results: Integer = 0
    dropped: dict[str, Integer] = {}
    spooled_bytes: Integer = 0
    disk_free_bytes: Integer | None = None
    temperature_c: float | None = None
    clock_skew_ms: float | None = None
    certificate_expires_at_ns: Integer | None = None
    health: dict[str, float] = {}


class Outcome(msgspec.Struct, frozen=True, tag="outcome", tag_field="type"):
    """What became of an order (`splitward.wire.orders`); a device may send several as it goes on.

    `of` is the order's id, `reason` a stable code where it was not done, `model` the one that runs now.
    """

    of: str
    kind: Literal["bundle", "command"]
    state: Literal["accepted", "done", "refused", "rolled_back", "failed"]
    reason: str = ""
    message: str = ""
    model: str = ""
    at_ns: Integer = 0


_T = TypeVar("_T")
_ZERO = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
"""The character 0 within JSON, which has no other form there: its escape, behind an even number of backslashes."""
_encoder = msgspec.json.Encoder()
_reply: msgspec.json.Decoder[Result | Refusal] = msgspec.json.Decoder(Result | Refusal)
_status = msgspec.json.Decoder(Status)
_outcome = msgspec.json.Decoder(Outcome)


def encode_control(message: Result | Refusal | Status | Outcome) -> bytes:
    """JSON bytes of a control message."""
    return _encoder.encode(message)


def decode_reply(payload: bytes) -> Result | Refusal:
    """Result or refusal held by `payload`; `MessageError` (`bad_json`, `oversize`) when it holds neither."""
    return _decode(payload, _reply)


def decode_status(payload: bytes) -> Status:
    """Status held by `payload`; `MessageError` (`bad_json`, `oversize`) when it holds none."""
    return _decode(payload, _status)


def decode_outcome(payload: bytes) -> Outcome:
    """Outcome held by `payload`; `MessageError` (`bad_json`, `oversize`) when it holds none."""
    return _decode(payload, _outcome)


def _decode(payload: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    if len(payload) > MAX_BYTES:
        raise MessageError("oversize", f"control message of {len(payload)} bytes; {MAX_BYTES} are allowed.")
    if b"\\u0000" in payload and _ZERO.search(payload):
        raise MessageError("bad_json", "control message refused: it holds the character 0.")
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the last two out
        raise MessageError("bad_json", f"control message refused: {error}.") from error
