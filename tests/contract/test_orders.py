"""Orders: golden bytes, and everything that a device must refuse."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from splitward.errors import MessageError
from splitward.wire.control import MAX_BYTES
from splitward.wire.orders import CONTEXT, Announcement, Command, Order, decode_order, encode_order

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ANNOUNCEMENT = Announcement(
    id="00112233445566778899aabbccddeeff",
    serial=1_790_000_000_123_456_789,
    site="st-anna",
    device="ward-3-camera",
    model="0f0e0d0c0b0a09080706050403020100",
    url="https://cloud.example.org/v1/bundles/0f0e0d0c0b0a09080706050403020100/file?ticket=abc",
    sha256="ab" * 32,
    size=70_000,
)
COMMAND = Command(
    id="ffeeddccbbaa99887766554433221100",
    serial=1_790_000_000_223_456_789,
    site="st-anna",
    device="ward-3-camera",
    name="configure",
    arguments={"capture": {"rate_hz": 2.0}},
)


@dataclass(frozen=True)
class _Address:
    site: str = "st-anna"
    device: str = "ward-3-camera"


def read(payload: bytes, at: _Address = _Address(), key: Ed25519PrivateKey = KEY) -> Order:
    return decode_order(payload, key.public_key(), site=at.site, device=at.device)


def verdict(payload: bytes, at: _Address = _Address(), key: Ed25519PrivateKey = KEY) -> str:
    try:
        read(payload, at, key)
    except MessageError as error:
        return error.reason
    return "ok"


def sealed(body: bytes, key: Ed25519PrivateKey = KEY, context: bytes = CONTEXT) -> bytes:
    signature = base64.b64encode(key.sign(context + body)).decode()
    return msgspec.json.encode(
        {"type": "order", "body": base64.b64encode(body).decode(), "signature": signature}
    )


@pytest.mark.parametrize("order", [ANNOUNCEMENT, COMMAND])
def test_round_trip_by_the_letter_of_the_specification(order: Order) -> None:
    payload = encode_order(order, KEY)
    assert payload == sealed(msgspec.json.encode(order))
    assert read(payload) == order


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
    st.integers(0, 2**63 - 1),
)
def test_any_arguments_survive(arguments: dict[str, int | str], serial: int) -> None:
    order = msgspec.structs.replace(COMMAND, arguments=arguments, serial=serial)
    assert read(encode_order(order, KEY)) == order


def test_refused_with_the_reason_of_the_first_check_that_fails() -> None:
    payload, other = encode_order(COMMAND, KEY), Ed25519PrivateKey.from_private_bytes(bytes(32))
    assert verdict(payload.ljust(MAX_BYTES + 1)) == "oversize"
    assert verdict(b"{}") == "bad_json"
    assert verdict(payload, key=other) == "bad_signature"
    assert verdict(sealed(msgspec.json.encode(COMMAND), context=b"")) == "bad_signature"
    assert verdict(sealed(b'{"type":"command"}')) == "bad_json"
    assert verdict(sealed(b"[" * 10_000)) == "bad_json"
    assert verdict(payload, _Address(device="ward-4-camera")) == "wrong_device"
    assert verdict(payload, _Address(site="st-berta")) == "wrong_device"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(
            ("sha256", bad)
            for bad in ("", "../" + "a" * 61, "/etc/passwd", "ab" * 31, "AB" * 32, "ab" * 32 + "\n")
        ),
        *(("model", bad) for bad in ("", "../" + "a" * 29, "0F" * 16, "0f" * 17, "0f" * 16 + "\n")),
        *(("id", bad) for bad in ("", "../../x", "0f" * 16 + "\n")),
        *(("size", bad) for bad in (0, -1)),
    ],
)
def test_a_field_that_could_name_another_file_is_refused_though_it_is_signed(field: str, value: object) -> None:
    assert verdict(encode_order(msgspec.structs.replace(ANNOUNCEMENT, **{field: value}), KEY)) == "bad_json"


def test_every_changed_byte_of_a_body_breaks_the_signature() -> None:
    body = bytearray(msgspec.json.encode(ANNOUNCEMENT))
    good = msgspec.json.decode(encode_order(ANNOUNCEMENT, KEY))
    for at in range(len(body)):
        changed = body.copy()
        changed[at] ^= 1
        good["body"] = base64.b64encode(bytes(changed)).decode()
        assert verdict(msgspec.json.encode(good)) == "bad_signature"


def test_every_truncation_is_refused() -> None:
    payload = encode_order(COMMAND, KEY)
    assert {verdict(payload[:end]) for end in range(len(payload))} == {"bad_json"}
