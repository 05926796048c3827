"""The activation message: golden bytes, round trips, and bytes that somebody else made."""

from __future__ import annotations

import math
import random
import re
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec.structs import replace

from splitward.errors import MessageError
from splitward.wire.message import DTYPES, MAX_VALUES, Activation, decode, encode

BOOT = bytes(range(16))
GOLDEN = {
    "activation-int8": Activation(
        device="pi-4",
        boot=BOOT,
        sequence=7,
        captured_at_ns=1_790_000_000_123_456_789,
        model=BOOT[::-1],
        values=np.array([[-127, -1, 0], [1, 2, 127]], np.int8),
        scale=0.014960629865527153,
    ),
    "activation-float32": Activation(
        device="D" * 63 + "_",
        boot=BOOT[::-1],
        sequence=2**63 - 1,
        captured_at_ns=0,
        model=BOOT,
        values=np.array([[[[1.5]], [[-0.0]]]], np.float32),
    ),
}
INT8, FLOAT32 = (encode(activation) for activation in GOLDEN.values())
REASONS = {
    "truncated", "bad_magic", "bad_crc", "bad_version", "bad_code", "bad_dtype", "bad_shape", "bad_header",
    "bad_length", "oversize", "bad_device", "out_of_range", "bad_quantisation", "not_finite",
}  # fmt: skip
MAX_FLOAT32 = math.ldexp(2 - 2.0**-23, 127)


def sealed(body: bytes) -> bytes:
    """`body` with its right CRC-32."""
    return body + struct.pack("<I", zlib.crc32(body))


def patched(message: bytes, *patches: tuple[int, bytes]) -> bytes:
    """`message` with other bytes at some offsets, and the right CRC-32 for them."""
    body = bytearray(message[:-4])
    for offset, data in patches:
        body[offset : offset + len(data)] = data
    return sealed(bytes(body))


def facts(activation: Activation) -> tuple[object, ...]:
    """Everything that an activation says, comparable to the bit."""
    values = activation.values
    return (
        *(activation.device, activation.boot, activation.sequence, activation.captured_at_ns),
        *(activation.model, activation.scale, activation.zero_point),
        *(values.dtype, values.shape, values.tobytes()),
    )


def verdict(message: bytes) -> str:
    """Reason for which `message` is refused, or "ok": then it is what the format makes of its content."""
    try:
        activation = decode(message)
    except MessageError as error:
        reason = error.reason
    else:
        assert encode(activation) == message
        reason = "ok"
    assert reason in REASONS | {"ok"}
    return reason


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str, golden_bytes: dict[str, bytes]) -> None:
    assert encode(GOLDEN[name]) == golden_bytes[name]
    assert facts(decode(golden_bytes[name])) == facts(GOLDEN[name])


def test_specification_shows_the_golden_message(specification, golden_bytes: dict[str, bytes]) -> None:
    (block,) = specification.blocks(1, "hex")
    rows = [re.match(r" *(\d+)  ((?:[0-9a-f]{2} )+) ", line) for line in block.splitlines()]
    shown = b""
    for row in rows:
        assert row is not None
        assert int(row[1]) == len(shown)
        shown += bytes.fromhex(row[2])
    assert shown == golden_bytes["activation-int8"]


def test_specification_lists_every_reason(specification) -> None:
    assert specification.reasons(1) == REASONS


@st.composite
def activations(draw: st.DrawFn) -> Activation:
    """Any activation that the format can carry."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=5))
    values = draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, **finite)))
    return Activation(
        device=draw(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")),
        boot=draw(st.binary(min_size=16, max_size=16)),
        sequence=draw(st.integers(0, 2**63 - 1)),
        captured_at_ns=draw(st.integers(0, 2**63 - 1)),
        model=draw(st.binary(min_size=16, max_size=16)),
        values=draw(st.sampled_from([values, values.T, values[::-1]])),
        scale=draw(st.floats(2.0**-149, MAX_FLOAT32, width=32)),
        zero_point=draw(st.integers(-128, 127)),
    )


@settings(max_examples=150)
@given(activations())
def test_round_trip(activation: Activation) -> None:
    message = encode(activation)
    decoded = decode(message)
    assert facts(decoded) == facts(activation)
    assert not decoded.values.flags.writeable
    assert verdict(message) == "ok"


@settings(max_examples=100)
@given(activations(), st.data())
def test_no_damaged_byte_goes_unnoticed(activation: Activation, data: st.DataObject) -> None:
    message = bytearray(encode(activation))
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    assert verdict(bytes(message)) in {"bad_magic", "bad_crc"}


@pytest.mark.parametrize("message", [INT8, FLOAT32], ids=GOLDEN)
def test_every_single_byte_mutation(message: bytes) -> None:
    for offset in range(len(message)):
        for change in range(1, 256):
            mutated = bytearray(message)
            mutated[offset] ^= change
            assert verdict(bytes(mutated)) == ("bad_magic" if offset < 4 else "bad_crc")
            if offset < len(message) - 4:
                verdict(sealed(bytes(mutated[:-4])))


@pytest.mark.parametrize("message", [INT8, FLOAT32], ids=GOLDEN)
def test_every_truncation(message: bytes) -> None:
    for length in range(len(message)):
        assert verdict(message[:length]) in {"truncated", "bad_crc"}
    for length in range(len(message) - 4):
        assert verdict(sealed(message[:length])) in {"truncated", "bad_header", "bad_length"}


def test_random_bytes() -> None:
    source = random.Random(1)
    for _ in range(2_000):
        noise = source.randbytes(source.randrange(200))
        assert verdict(noise) in {"truncated", "bad_magic"}
        assert verdict(sealed(b"SWRD" + noise)) != "ok"


def test_mutations_with_and_without_a_right_checksum() -> None:
    source = random.Random(2)
    seen: set[str] = set()
    for number in range(20_000):
        body = bytearray(source.choice((INT8, FLOAT32)))
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(body))
            mutation = source.randrange(4)
            if mutation == 0:
                body[at] = source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))
            elif mutation == 1:
                body[at : at + 4] = source.randbytes(4)
            elif mutation == 2:
                del body[at : at + source.randint(1, 8)]
            else:
                body[at:at] = source.randbytes(source.randint(1, 8))
        seen.add(verdict(sealed(bytes(body[:-4])) if number % 2 else bytes(body)))
    assert seen == REASONS | {"ok"}  # the mutations reach every rule


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 4, (2**31, 2**31, 4, 1), (MAX_VALUES + 1,), (2048, 2049)])
def test_a_huge_declared_shape_allocates_nothing(shape: tuple[int, ...]) -> None:
    message = bytearray(FLOAT32[:-4])
    message[10] = len(shape)
    message[72:88] = struct.pack(f"<{len(shape)}I", *shape)
    struct.pack_into("<H", message, 6, len(message) - 8)
    message = bytearray(sealed(bytes(message)))
    tracemalloc.start()
    try:
        with pytest.raises(MessageError) as refused:
            decode(bytes(message))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused.value.reason == "oversize"
    assert peak_bytes < 16_384


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("truncated", b""),
        ("truncated", INT8[:75]),
        ("bad_magic", patched(INT8, (0, b"SWRd"))),
        ("bad_crc", INT8[:-1] + bytes((INT8[-1] ^ 1,))),
        ("bad_version", patched(INT8, (4, b"\2"))),
        ("bad_code", patched(INT8, (5, b"\2"))),
        ("bad_code", patched(INT8, (8, b"\1"))),
        ("bad_code", patched(INT8, (11, b"\x80"))),
        ("bad_dtype", patched(INT8, (9, b"\2"))),
        ("bad_shape", patched(INT8, (10, b"\0"))),
        ("bad_shape", patched(INT8, (10, b"\5"))),
        ("bad_shape", patched(INT8, (76, b"\4"))),
        ("bad_shape", patched(INT8, (9, b"\0"))),
        ("bad_header", patched(INT8, (6, b"\x54"))),
        ("bad_header", patched(INT8, (80, b"\x05"))),
        ("bad_header", sealed(INT8[:72])),
        ("bad_length", patched(INT8, (68, b"\7"))),
        ("bad_length", patched(INT8, (68, b"\xff\xff\xff\xff"))),
        ("bad_length", sealed(INT8[:-4] + b"\0")),
        ("oversize", patched(INT8, (72, b"\0"))),
        ("oversize", patched(INT8, (72, b"\xff" * 8))),
        ("bad_device", patched(INT8, (81, b"-"))),
        ("bad_device", patched(INT8, (82, b"/"))),
        ("bad_device", patched(INT8, (82, b"\xe9"))),
        ("bad_device", patched(INT8, (84, b"\n"))),
        ("out_of_range", patched(INT8, (35, b"\x80"))),
        ("out_of_range", patched(INT8, (43, b"\x80"))),
        ("bad_quantisation", patched(INT8, (60, struct.pack("<f", 0.0)))),
        ("bad_quantisation", patched(INT8, (60, struct.pack("<f", -1.0)))),
        ("bad_quantisation", patched(INT8, (60, struct.pack("<f", math.nan)))),
        ("bad_quantisation", patched(INT8, (60, struct.pack("<f", math.inf)))),
        ("bad_quantisation", patched(INT8, (64, struct.pack("<i", 128)))),
        ("bad_quantisation", patched(INT8, (64, struct.pack("<i", -129)))),
        ("not_finite", patched(FLOAT32, (len(FLOAT32) - 8, struct.pack("<f", math.nan)))),
        ("not_finite", patched(FLOAT32, (len(FLOAT32) - 12, struct.pack("<f", -math.inf)))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_rule_has_its_reason(reason: str, message: bytes) -> None:
    assert verdict(message) == reason


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("bad_dtype", {"values": np.zeros(3)}),
        ("bad_dtype", {"values": np.zeros(3, ">f4")}),
        ("bad_shape", {"values": np.zeros((), np.int8)}),
        ("bad_shape", {"values": np.zeros((1,) * 5, np.int8)}),
        ("oversize", {"values": np.zeros((0, 3), np.int8)}),
        ("oversize", {"values": np.zeros(MAX_VALUES + 1, np.int8)}),
        ("not_finite", {"values": np.array([math.nan], np.float32)}),
        ("bad_device", {"device": "a/b"}),
        ("bad_device", {"device": "a" * 65}),
        ("bad_device", {"device": "pi-4\n"}),
        ("bad_identifier", {"boot": BOOT[1:]}),
        ("bad_identifier", {"model": BOOT + b"\0"}),
        ("out_of_range", {"sequence": -1}),
        ("out_of_range", {"captured_at_ns": 2**63}),
        ("bad_quantisation", {"scale": 1e40}),
        ("bad_quantisation", {"scale": 1e-50}),
        ("bad_quantisation", {"scale": math.nan}),
        ("bad_quantisation", {"zero_point": 128}),
    ],
)
def test_nothing_is_encoded_that_would_be_refused(reason: str, changes: dict[str, object]) -> None:
    with pytest.raises(MessageError) as refused:
        encode(replace(GOLDEN["activation-int8"], **changes))
    assert refused.value.reason == reason
