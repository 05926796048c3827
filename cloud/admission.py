"""What may enter a batch: an activation that its topic, its model's card, the clock and the store agree with."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cloud.config import LimitsConfig
from cloud.record import Key
from cloud.transport import Delivery
from splitward.errors import MessageError
from splitward.wire.message import Activation
from splitward.wire.server import ServerCard


class Arrival(msgspec.Struct, frozen=True, eq=False):
    """A delivery whose activation was decoded and checked."""

    delivery: Delivery
    site: str
    activation: Activation
    received_at_ns: int
    key: Key
    """Name of the frame."""

    @property
    def checksum(self) -> int:
        """The message's CRC-32, which `decode` found right."""
        return int.from_bytes(self.delivery.payload[-4:], "little")


def check(
    activation: Activation, device: str, cards: Mapping[bytes, ServerCard], now_ns: int, limits: LimitsConfig
) -> None:
    """Refuse an activation that is not what its topic's `device` may send for its model now.

    Raises
    ------
    MessageError
        `wrong_device`, `unknown_model`, `wrong_shape`, `wrong_dtype`, `wrong_scale` or `clock_skew`.
    """
    if activation.device != device:
        raise MessageError("wrong_device", f"device {activation.device} sent on the topic of {device}.")
    card = cards.get(activation.model)
    if card is None:
        raise MessageError(
            "unknown_model", f"model {activation.model.hex()} is not served here; add its card to `models`."
        )
    law, values = card.release, activation.values
    if values.shape != law.shape:
        raise MessageError("wrong_shape", f"shape {values.shape}; {card.name} releases {law.shape}.")
    if values.dtype != law.dtype:
        raise MessageError("wrong_dtype", f"dtype {values.dtype}; {card.name} releases {law.dtype}.")
    if (activation.scale, activation.zero_point) != (law.scale, 0):
        given = f"scale {activation.scale}, zero point {activation.zero_point}"
        raise MessageError("wrong_scale", f"{given}; {card.name} releases scale {law.scale}, zero point 0.")
    ahead_s = (activation.captured_at_ns - now_ns) / 1e9
    if (limits.max_ahead_s and ahead_s > limits.max_ahead_s) or (
        limits.max_age_s and -ahead_s > limits.max_age_s
    ):
        raise MessageError(
            "clock_skew",
            f"captured {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'ago'}; set the device's clock.",
        )
