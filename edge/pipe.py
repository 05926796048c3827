"""What agent and releaser tell each other: typed messages over a socket pair, each after its length.

The releaser sees pixels and has no network; the agent has the network and sees released tensors only. What the
releaser is at now stands in a page of memory that both see: it is read only when the releaser has died of it, and a
message for every frame would cost both of them more than the frame's own.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from edge.config import EdgeConfig

_LENGTH = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
_OPENED = struct.Struct("<8x?H")
"""After the number: whether it can wait, and the length of the name that follows."""


class Start(Struct, frozen=True, tag=True):
    """To the releaser, first: what to run.

    `known` holds the digests of the frames that were taken already, `poison` the names of those that ended an
    earlier releaser twice.
    """

    config: EdgeConfig
    bundle: str
    known: bytes
    poison: tuple[str, ...]


class Progress(Struct, frozen=True, tag=True):
    """To the releaser: how many of its frames are safe in the spool, and how many it may release in all."""

    safe: int
    room: int


class Ready(Struct, frozen=True, tag=True):
    """The bundle is verified, loaded and probed."""

    boot: bytes
    model: str
    model_name: str
    runtime: str


class Released(Struct, frozen=True, tag=True):
    """One frame's message; `opening` is the number of what was opened for it."""

    boot: bytes
    sequence: int
    name: str
    captured_at_ns: int
    captured_tick_ns: int
    priority: int
    digest: int | None
    message: bytes
    runtime_us: int
    other_us: int
    opening: int


class Lost(Struct, frozen=True, tag=True):
    """A frame became no message, for `reason`; `digest` keeps it from being tried again. `opening` as in `Released`.

    `name` is that of the frame, or of the file that gave none; empty where there is neither.
    """

    reason: str
    digest: int | None
    name: str
    opening: int


class Beat(Struct, frozen=True, tag=True):
    """The releaser lives; `superseded` live frames had to give way to newer ones since its start."""

    superseded: int


class Logged(Struct, frozen=True, tag=True):
    """A line for the agent's log: the agent alone writes it."""

    level: int
    logger: str
    message: str
    fields: dict[str, str] = {}


class Ended(Struct, frozen=True, tag=True):
    """Every source has given its last frame."""


class Unfit(Struct, frozen=True, tag=True):
    """The releaser cannot start; `kind` is the class of its error, `reason` its code where it has one."""

    kind: str
    reason: str
    message: str


FromReleaser = Ready | Released | Lost | Beat | Logged | Ended | Unfit
ToReleaser = Start | Progress
_encoder = msgspec.msgpack.Encoder()


class Opened(NamedTuple):
    """What the releaser reads or releases; `can_wait`: it comes again if the releaser dies of it."""

    number: int
    name: str
    can_wait: bool


class Page:
    """The page of memory where the latest `Opened` stands; the agent makes it, the releaser gets its descriptor."""

    def __init__(self, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("splitward-opened")
            os.ftruncate(descriptor, mmap.PAGESIZE)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)

    def write(self, opened: Opened) -> None:
        """Note what is opened. Whoever is killed in the middle of it leaves the former number."""
        name = opened.name.encode()[: mmap.PAGESIZE - _OPENED.size]
        _OPENED.pack_into(self._memory, 0, opened.can_wait, len(name))
        self._memory[_OPENED.size : _OPENED.size + len(name)] = name
        _NUMBER.pack_into(self._memory, 0, opened.number)

    def read(self) -> Opened:
        """What was opened last; its number is 0 when nothing was."""
        (number,) = _NUMBER.unpack_from(self._memory)
        can_wait, length = _OPENED.unpack_from(self._memory)
        name = self._memory[_OPENED.size : _OPENED.size + length]
        return Opened(number, name.decode(errors="replace"), can_wait)

    def close(self) -> None:
        """Let go of it."""
        self._memory.close()
        os.close(self.descriptor)


class Pipe:
    """One end of the socket pair; `kind` is the union of what comes out of it. Any thread writes, one reads."""

    def __init__(self, end: socket.socket, kind: Any) -> None:
        self._end = end
        self._decoder = msgspec.msgpack.Decoder(kind)
        self._file = end.makefile("rb")
        self._writing = threading.Lock()

    def send(self, message: FromReleaser | ToReleaser) -> bool:
        """Send, waiting while the other end is behind; False when there is no other end."""
        data = _encoder.encode(message)
        try:
            with self._writing:
                self._end.sendall(_LENGTH.pack(len(data)) + data)
        except OSError:
            return False
        return True

    def receive(self) -> Any:
        """The next message; None at the end."""
        try:
            head = self._file.read(_LENGTH.size)
            data = self._file.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
        except OSError:
            return None
        try:
            return self._decoder.decode(data) if data else None
        except msgspec.DecodeError:  # its sender died in the middle
            return None

    def finish(self) -> None:
        """Send no more: the other end sees the end, and may still send."""
        with suppress(OSError):
            self._end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end; the other one reads its end."""
        with suppress(OSError):  # it is closed already
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()
