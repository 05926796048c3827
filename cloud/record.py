"""What the store keeps, as typed structs."""

from __future__ import annotations

from typing import Any

import msgspec

from splitward.wire.control import Result, Status

Key = tuple[str, str, int]
"""Device, boot (32 hexadecimal digits) and sequence: names a frame for ever."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
"""A site or a device, as the API's description has it."""
HEX = r"^[0-9a-f]{32}$"
"""An id."""


class Record(msgspec.Struct, frozen=True):
    """A result, and where, when and with which checksum its activation came in."""

    site: str
    device: str
    received_at_ns: int
    result: Result
    checksum: int = 0

    @property
    def key(self) -> Key:
        """Name of the frame."""
        return self.device, self.result.boot, self.result.sequence


class Page(msgspec.Struct, frozen=True):
    """Records in the order of storing, and the cursor behind the last of them."""

    results: list[Record]
    next: str | None


class Device(msgspec.Struct, frozen=True):
    """When a device was last heard of, and its last status if it sent one."""

    site: str
    device: str
    seen_at_ns: int
    status: Status | None


class DeadLetter(msgspec.Struct, frozen=True):
    """A refused message: `head` is its first bytes in hexadecimal."""

    at_ns: int
    topic: str
    reason: str
    head: str


class Label(msgspec.Struct, frozen=True):
    """The true class of a frame, told by a person or another system."""

    device: str
    boot: str
    sequence: int
    class_index: int


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a device was told to do, and what became of it.

    Attributes
    ----------
    serial : int
        Given when it is kept.
    kind : str
        "bundle" or "command"; `name` says which command.
    model, previous : str
        Of a bundle: the one announced, and the one that the device ran before.
    rollout : str, optional
        Id of the roll-out that it belongs to; None of an operator's own command.
    canary : bool
        Whether it was among the first of its roll-out.
    sent_at_ns, published_at_ns, withdrawn_at_ns, answered_at_ns : int
        As the table says.
    """

    id: str
    site: str
    device: str
    serial: int = 0
    kind: str
    name: str
    model: str = ""
    previous: str = ""
    rollout: str | None = None
    canary: bool = False
    arguments: dict[str, Any] = {}
    state: str = "sent"
    reason: str = ""
    message: str = ""
    sent_at_ns: int
    published_at_ns: int | None = None
    withdrawn_at_ns: int | None = None
    answered_at_ns: int | None = None
