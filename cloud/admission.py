"""What may enter a batch: an activation that its topic, its model's card and the store agree with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cloud.store import MAX_INTEGER, Key
from cloud.transport import Delivery
from splitward.errors import MessageError
from splitward.wire.message import Activation
from splitward.wire.server import ServerCard


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """A delivery whose activation was decoded and checked."""

    delivery: Delivery
    site: str
    activation: Activation
    received_at_ns: int

    @property
    def key(self) -> Key:
        """Name of the frame."""
        return self.activation.device, self.activation.boot.hex(), self.activation.sequence


def check(activation: Activation, device: str, cards: Mapping[bytes, ServerCard]) -> None:
    """Refuse an activation that is not what its topic's `device` may send for its model.

    Raises
    ------
    MessageError
        `wrong_device`, `unknown_model`, `wrong_shape`, `wrong_dtype`, `wrong_scale` or `out_of_range`.
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
    if values.dtype.name != law.dtype:
        raise MessageError("wrong_dtype", f"dtype {values.dtype}; {card.name} releases {law.dtype}.")
    if (activation.scale, activation.zero_point) != (law.scale, 0):
        given = f"scale {activation.scale}, zero point {activation.zero_point}"
        raise MessageError("wrong_scale", f"{given}; {card.name} releases scale {law.scale}, zero point 0.")
    if max(activation.sequence, activation.captured_at_ns) > MAX_INTEGER:
        raise MessageError("out_of_range", f"sequence and capture time must not exceed {MAX_INTEGER}.")
