"""What the store keeps, as typed structs."""

from __future__ import annotations

import msgspec

from splitward.wire.control import Result, Status

Key = tuple[str, str, int]
"""Device, boot (32 hexadecimal digits) and sequence: names a frame for ever."""


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

    @property
    def cursor(self) -> str:
        """Place of the record in the order of storing, for `Store.results`."""
        return ".".join(map(str, (self.result.stored_at_ns, *self.key)))


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
