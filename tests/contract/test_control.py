"""Control messages: golden JSON, round trips, and JSON that somebody else made."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from splitward.errors import MessageError
from splitward.wire.control import (
    MAX_BYTES,
    STREAMS,
    Outcome,
    Refusal,
    Result,
    Status,
    decode_outcome,
    decode_reply,
    decode_status,
    encode_control,
)

BOOT, MODEL = "000102030405060708090a0b0c0d0e0f", "0f0e0d0c0b0a09080706050403020100"
RESULT = Result(
    boot=BOOT,
    sequence=7,
    model=MODEL,
    class_index=1,
    class_name="pneumonia",
    scores=(0.125, 0.875),
    streams={"attacked": 1, "recovered": 0, "fused": 1},
    captured_at_ns=1_790_000_000_123_456_789,
    stored_at_ns=1_790_000_000_223_456_789,
)
REFUSAL = Refusal(
    boot=BOOT,
    sequence=7,
    reason="unknown_model",
    message=f"model {MODEL} is not served here; add its card to `models`.",
)
STATUS = Status(
    state="online",
    version="0.1.0",
    model=MODEL,
    model_name="mnist-sealed",
    runtime="onnx-int8, onnxruntime 1.32.0",
    at_ns=1_790_000_000_323_456_789,
    queued=2,
    captured=10,
    sent=9,
    results=7,
    dropped={"spool_full": 1},
    spooled_bytes=208,
    disk_free_bytes=21_474_836_480,
    temperature_c=47.5,
    clock_skew_ms=-3.5,
    certificate_expires_at_ns=1_821_536_000_000_000_000,
    health={"restarts": 0},
)
OUTCOME = Outcome(
    of="00112233445566778899aabbccddeeff",
    kind="bundle",
    state="refused",
    reason="bad_signature",
    message="mnist.bundle: the signature is not the trusted key's.",
    model=MODEL,
    at_ns=1_790_000_000_423_456_789,
)
GOLDEN = [
    (
        RESULT,
        b'{"type":"result","boot":"000102030405060708090a0b0c0d0e0f","sequence":7,'
        b'"model":"0f0e0d0c0b0a09080706050403020100","class_index":1,"class_name":"pneumonia",'
        b'"scores":[0.125,0.875],"streams":{"attacked":1,"recovered":0,"fused":1},'
        b'"captured_at_ns":1790000000123456789,"stored_at_ns":1790000000223456789}',
    ),
    (
        REFUSAL,
        b'{"type":"refusal","boot":"000102030405060708090a0b0c0d0e0f","sequence":7,'
        b'"reason":"unknown_model","message":"model 0f0e0d0c0b0a09080706050403020100 is not served here; '
        b'add its card to `models`."}',
    ),
    (
        STATUS,
        b'{"type":"status","state":"online","version":"0.1.0","model":"0f0e0d0c0b0a09080706050403020100",'
        b'"model_name":"mnist-sealed","runtime":"onnx-int8, onnxruntime 1.32.0","at_ns":1790000000323456789,'
        b'"queued":2,"captured":10,"sent":9,"results":7,"dropped":{"spool_full":1},"spooled_bytes":208,'
        b'"disk_free_bytes":21474836480,"temperature_c":47.5,"clock_skew_ms":-3.5,'
        b'"certificate_expires_at_ns":1821536000000000000,"health":{"restarts":0}}',
    ),
    (
        OUTCOME,
        b'{"type":"outcome","of":"00112233445566778899aabbccddeeff","kind":"bundle","state":"refused",'
        b'"reason":"bad_signature","message":"mnist.bundle: the signature is not the trusted key\'s.",'
        b'"model":"0f0e0d0c0b0a09080706050403020100","at_ns":1790000000423456789}',
    ),
]
INTEGERS = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
HEXES = st.binary(min_size=16, max_size=16).map(bytes.hex)

Control = Result | Refusal | Status | Outcome
DECODERS = {Result: decode_reply, Refusal: decode_reply, Status: decode_status, Outcome: decode_outcome}


def decode(payload: bytes, kind: type[Control]) -> Control:
    """`payload` as a message of `kind`."""
    return DECODERS[kind](payload)


def verdict(payload: bytes, kind: type[Control]) -> str:
    """Reason for which `payload` is refused, or "ok": then what it says survives being sent on."""
    try:
        message = decode(payload, kind)
    except MessageError as error:
        reason = error.reason
    else:
        assert decode(encode_control(message), kind) == message
        reason = "ok"
    return reason


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=["result", "refusal", "status", "outcome"])
def test_golden_bytes(message: Control, golden: bytes) -> None:
    assert encode_control(message) == golden
    assert decode(golden, type(message)) == message


def test_specification_shows_the_golden_messages(specification) -> None:
    shown = [msgspec.json.decode(block) for block in specification.blocks(4, "json")]
    assert shown == [msgspec.json.decode(golden) for _, golden in GOLDEN]


def test_the_streams_of_a_result_have_one_order() -> None:
    assert tuple(RESULT.streams) == STREAMS


@settings(max_examples=60)
@given(
    st.builds(
        Result,
        boot=HEXES,
        sequence=INTEGERS,
        model=HEXES,
        class_index=INTEGERS,
        class_name=TEXT,
        scores=st.lists(st.floats(0, 1), max_size=5).map(tuple),
        streams=st.dictionaries(st.sampled_from(STREAMS), INTEGERS),
        captured_at_ns=INTEGERS,
        stored_at_ns=INTEGERS,
    )
    | st.builds(Refusal, boot=HEXES, sequence=INTEGERS, reason=TEXT, message=TEXT)
    | st.builds(
        Status,
        st.sampled_from(["online", "offline"]),
        *(TEXT, HEXES, TEXT, TEXT),
        *[INTEGERS] * 5,
        dropped=st.dictionaries(TEXT, INTEGERS, max_size=3),
        temperature_c=st.none() | st.floats(-40, 125),
        health=st.dictionaries(TEXT, st.floats(0, 1e9), max_size=3),
    )
    | st.builds(
        Outcome, HEXES, st.sampled_from(["bundle", "command"]), st.sampled_from(["done", "failed"]), TEXT
    )
)
def test_round_trip(message: Control) -> None:
    assert decode(encode_control(message), type(message)) == message


def test_a_last_will_needs_nothing_but_its_state() -> None:
    assert decode_status(b'{"type":"status","state":"offline"}') == Status("offline")
    assert decode_status(encode_control(Status("offline"))) == Status("offline")


def test_unknown_fields_are_for_later_versions() -> None:
    assert decode_reply(GOLDEN[1][1][:-1] + b',"later":{"a":[1]}}') == REFUSAL


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"type":"command"}',
        b'{"type":"result"}',
        b'{"type":"refusal","boot":"","sequence":"7","reason":"","message":""}',
        b'{"type":"refusal","boot":"","sequence":7.5,"reason":"","message":""}',
        b'{"type":"refusal","boot":"","sequence":-1,"reason":"","message":""}',
        b'{"type":"refusal","boot":"","sequence":9223372036854775808,"reason":"","message":""}',
        GOLDEN[0][1].replace(b'"stored_at_ns":1', b'"stored_at_ns":1000000000000'),
        b'{"type":"refusal","boot":null,"sequence":7,"reason":"","message":""}',
        b'{"type":"refusal","boot":"\xff","sequence":7,"reason":"","message":""}',
        b'{"type":"refusal","boot":"\\ud800","sequence":7,"reason":"","message":""}',
        b'{"type":"refusal","boot":"","sequence":1e999,"reason":"","message":""}',
        b'{"type":"refusal","boot":"","sequence":' + b"9" * 60_000 + b',"reason":"","message":""}',
        b'{"type":"refusal","later":' + b"[" * 60_000,
        b'{"type":"refusal","later":' + b'{"a":' * 10_000,
        b"[" * MAX_BYTES,
        b"\x00" * 100,
    ],
)
def test_what_is_no_reply_is_refused(payload: bytes) -> None:
    assert verdict(payload, Result) == "bad_json"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b'{"type":"status"}',
        b'{"type":"status","state":"asleep"}',
        b'{"type":"status","state":"online","dropped":{"a":"b"}}',
        b'{"type":"status","state":"online","version":"\xff"}',
        b'{"type":"status","state":"online","later":' + b"[" * 60_000,
        b'{"type":"status","state":"online","queued":-1}',
        b'{"type":"status","state":"online","queued":9223372036854775808}',
        b'{"type":"status","state":"online","sent":1' + b"0" * 400 + b"}",
        b'{"type":"status","state":"online","dropped":{"a":1' + b"0" * 400 + b"}}",
        b'{"type":"status","state":"online","at_ns":1' + b"0" * 400 + b"}",
    ],
)
def test_what_is_no_status_is_refused(payload: bytes) -> None:
    assert verdict(payload, Status) == "bad_json"


@pytest.mark.parametrize("text", ["a\0b", "\\\0", '"\0'])
def test_the_character_0_is_refused(text: str) -> None:
    assert verdict(encode_control(Outcome("1", "bundle", "failed", text)), Outcome) == "bad_json"
    assert verdict(encode_control(Status("online", health={text: 1.0})), Status) == "bad_json"


def test_what_looks_like_the_character_0_is_not_refused() -> None:
    for text in (r"\u0000", r"C:\u0000", "\\" * 4 + "u0000"):
        assert verdict(encode_control(Outcome("1", "bundle", "failed", text)), Outcome) == "ok"


def test_a_reply_is_no_status_and_a_status_no_reply() -> None:
    assert verdict(encode_control(RESULT), Status) == "bad_json"
    assert verdict(encode_control(STATUS), Result) == "bad_json"


def test_size_limit() -> None:
    padded = encode_control(STATUS).ljust(MAX_BYTES)
    assert verdict(padded, Status) == "ok"
    assert verdict(padded + b" ", Status) == "oversize"


def test_every_truncation_is_refused() -> None:
    for message, golden in GOLDEN:
        assert all(verdict(golden[:end], type(message)) == "bad_json" for end in range(len(golden)))


def test_mutations() -> None:
    source = random.Random(3)
    seen = set()
    for _ in range(6_000):
        message, golden = source.choice(GOLDEN)
        mutated = bytearray(golden)
        for _ in range(source.randint(1, 3)):
            at = source.randrange(len(mutated))
            mutated[at : at + source.randint(0, 3)] = source.choice((b'"', b"\\", b"{", b"\xff", b"9", b"\0"))
        seen.add(verdict(bytes(mutated), type(message)))
    assert seen == {"ok", "bad_json"}
