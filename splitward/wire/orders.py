"""Orders: what the cloud may tell a device to do, signed. docs/wire.md, section 8, specifies them.

A broker carries orders and is not trusted with them: each names its device and is signed with the fleet's order key.
`serial` grows with every order to a device, so that an old order cannot be played again, and no clock is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from splitward.errors import MessageError
from splitward.wire.control import MAX_BYTES
from splitward.wire.names import Id, Sha256

if TYPE_CHECKING:  # it is large, and a device that gets no order does without it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

CONTEXT = b"splitward order v1\0"
"""Precedes the body under the signature, so that no other signature of the key passes for an order."""


class Announcement(msgspec.Struct, frozen=True, tag="announcement", tag_field="type", kw_only=True):
    """The bundle that a device should run, and where it lies.

    Attributes
    ----------
    id : str
        32 lower-case hexadecimal digits; an `Outcome` names it.
    serial : int
        Greater than that of any earlier order to this device.
    model : str
        Model id, 32 lower-case hexadecimal digits.
    url : str
        HTTPS address of the bundle's file, with its ticket.
    sha256, size : str, int
        Of that file; 64 lower-case hexadecimal digits, and at least 1 byte.
    allow_older : bool
        Whether the device may go back to a bundle that was made before the one it runs.
    """

    id: Id
    serial: int
    site: str
    device: str
    model: Id
    url: str
    sha256: Sha256
    size: Annotated[int, msgspec.Meta(ge=1)]
    allow_older: bool = False


class Command(msgspec.Struct, frozen=True, tag="command", tag_field="type", kw_only=True):
    """One thing to do; `arguments` depend on `name`."""

    id: Id
    serial: int
    site: str
    device: str
    name: Literal["configure", "rollback", "diagnostics", "restart"]
    arguments: dict[str, Any] = {}


Order = Announcement | Command


class _Envelope(msgspec.Struct, frozen=True, tag="order", tag_field="type"):
    body: bytes
    signature: bytes


_encoder = msgspec.json.Encoder()
_envelope = msgspec.json.Decoder(_Envelope)
_order: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)


def encode_order(order: Order, key: Ed25519PrivateKey) -> bytes:
    """Signed JSON of an order."""
    body = _encoder.encode(order)
    return _encoder.encode(_Envelope(body, key.sign(CONTEXT + body)))


def decode_order(payload: bytes, key: Ed25519PublicKey, *, site: str, device: str) -> Order:
    """The order to this device held by `payload`. Its `serial` is for the caller to check.

    Raises
    ------
    MessageError
        `oversize`, `bad_json`, `bad_signature`, or `wrong_device` for an order to another one.
    """
    from cryptography.exceptions import InvalidSignature

    if len(payload) > MAX_BYTES:
        raise MessageError("oversize", f"order of {len(payload)} bytes; {MAX_BYTES} are allowed.")
    envelope: _Envelope = _decode(_envelope, payload)
    try:
        key.verify(envelope.signature, CONTEXT + envelope.body)
    except InvalidSignature as error:
        raise MessageError("bad_signature", "the order is not signed by the order key.") from error
    order: Order = _decode(_order, envelope.body)
    if (order.site, order.device) != (site, device):
        raise MessageError(
            "wrong_device", f"the order is for {order.site}/{order.device}, not {site}/{device}."
        )
    return order


def _decode(decoder: msgspec.json.Decoder[Any], payload: bytes) -> Any:
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # msgspec lets the last two out
        raise MessageError("bad_json", f"order refused: {error}.") from error
