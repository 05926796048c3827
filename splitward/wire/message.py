"""The binary message that carries one activation, as docs/wire.md specifies it byte by byte.

Decoding checks everything before it believes anything: length, magic, CRC-32, version, codes, the product of
the shape against a cap (before any allocation), the payload's length, and that every value is finite.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from splitward.errors import MessageError
from splitward.wire.names import MAX_INTEGER, NAME

MAGIC = b"SWRD"
VERSION = 1
KIND_ACTIVATION = 1
CODEC_RAW = 0
DTYPES: dict[int, np.dtype[np.generic]] = {0: np.dtype("<f4"), 1: np.dtype("i1")}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_DIMENSIONS = 4
MAX_VALUES = 1 << 22
"""Most values one message may carry: 16 MiB of float32."""

_SCALES = (2.0**-149, (2 - 2.0**-23) * 2.0**127)
"""Least and greatest positive float32."""
_FIXED = struct.Struct("<4sBBHBBBB16sQQ16sfiI")
_CRC = struct.Struct("<I")


class Blocks(Protocol):
    """What another kind of message adds to the format of kind 1."""

    @property
    def codecs(self) -> tuple[int, ...]:
        """Codecs beside the raw one."""

    def length(self, message: bytes, at: int, end: int) -> int:
        """Bytes of the block at `at`; `MessageError` (`bad_header`) where it does not end before `end`."""

    def stored(self, count: int, dtype: np.dtype[np.generic], codec: int) -> int:
        """Bytes of `count` values."""

    def unpack(self, payload: bytes, count: int) -> NDArray[np.generic]:
        """Values of a payload that is not stored as it is."""


class Activation(msgspec.Struct, frozen=True, eq=False):
    """One released tensor and what the cloud needs to know of it.

    Attributes
    ----------
    device : str
        Device id, matching `NAME`; must equal the topic's.
    boot : bytes
        16 random bytes, new at every start of the agent.
    sequence : int
        Counts frames within a boot, from 0. (device, boot, sequence) names a frame for ever.
    captured_at_ns : int
        Capture time in nanoseconds of UTC since 1970.
    model : bytes
        Model id: first 16 bytes of the bundle's SHA-256.
    values : ndarray
        float32 or int8, 1 to 4 dimensions, C order.
    scale, zero_point : float, int
        `real = (values - zero_point) * scale` for int8; 1.0 and 0 for float32.
    """

    device: str
    boot: bytes
    sequence: int
    captured_at_ns: int
    model: bytes
    values: NDArray[np.generic]
    scale: float = 1.0
    zero_point: int = 0


def encode(activation: Activation) -> bytes:
    """Bytes of the message.

    Raises
    ------
    MessageError
        A field is outside the format: `bad_dtype`, `bad_shape`, `oversize`, `not_finite`, `bad_device`,
        `bad_identifier`, `out_of_range` or `bad_quantisation`.
    """
    check(activation)
    return assemble(activation, KIND_ACTIVATION, CODEC_RAW, b"", activation.values.tobytes())


def check(activation: Activation) -> None:
    """Refuse what a reader would refuse; raises as `encode`."""
    values = activation.values
    code = DTYPE_CODES.get(values.dtype)
    if code is None:
        raise MessageError("bad_dtype", f"dtype {values.dtype} has no code; send float32 or int8.")
    _check_shape(values.shape)
    if code == 0 and not np.isfinite(values).all():
        raise MessageError("not_finite", "the activation holds NaN or infinity; it is not sent.")
    if not NAME.fullmatch(activation.device):
        raise MessageError("bad_device", f"device id {activation.device!r} must match {NAME.pattern}.")
    if len(activation.boot) != 16 or len(activation.model) != 16:
        raise MessageError("bad_identifier", "boot id and model id are 16 bytes each.")
    _check_numbers(activation.sequence, activation.captured_at_ns)
    _check_quantisation(activation.scale, activation.zero_point)


def assemble(activation: Activation, kind: int, codec: int, block: bytes, payload: bytes) -> bytes:
    """Message of a checked activation, with `block` between the device id and the payload."""
    device, values = activation.device.encode("ascii"), activation.values
    header = (
        _FIXED.pack(
            MAGIC,
            VERSION,
            kind,
            _FIXED.size + 4 * values.ndim + 1 + len(device) + len(block),
            codec,
            DTYPE_CODES[values.dtype],
            values.ndim,
            0,
            activation.boot,
            activation.sequence,
            activation.captured_at_ns,
            activation.model,
            activation.scale,
            activation.zero_point,
            len(payload),
        )
        + struct.pack(f"<{values.ndim}I", *values.shape)
        + bytes((len(device),))
        + device
        + block
    )
    body = header + payload
    return body + _CRC.pack(zlib.crc32(body))


def decode(message: bytes) -> Activation:
    """Activation held by `message`; its values are a read-only view of the bytes.

    Raises
    ------
    MessageError
        Anything is not as docs/wire.md says; `.reason` names the rule.
    """
    return disassemble(message, KIND_ACTIVATION)[0]


def disassemble(message: bytes, wanted: int, blocks: Blocks | None = None) -> tuple[Activation, bytes]:
    """Activation and block of a message of kind `wanted`; raises as `decode`.

    Parameters
    ----------
    blocks : Blocks, optional
        What this kind adds; kind 1 has no block, and its values are stored as they are.
    """
    if len(message) < _FIXED.size + _CRC.size:
        raise MessageError("truncated", f"{len(message)} bytes are shorter than a header.")
    if message[:4] != MAGIC:
        raise MessageError("bad_magic", f"starts with {message[:4]!r}, not {MAGIC!r}.")
    end = len(message) - _CRC.size
    if zlib.crc32(memoryview(message)[:end]) != _CRC.unpack_from(message, end)[0]:
        raise MessageError("bad_crc", "the CRC-32 does not match: the message was damaged or cut.")
    (_, version, kind, header_bytes, codec, code, ndim, flags, boot, sequence, captured_at_ns, model, scale,
     zero_point, payload_bytes) = _FIXED.unpack_from(message)  # fmt: skip
    if version != VERSION:
        raise MessageError("bad_version", f"version {version}; this end speaks {VERSION}.")
    if kind != wanted or codec not in (CODEC_RAW, *(blocks.codecs if blocks else ())) or flags != 0:
        raise MessageError("bad_code", f"kind {kind}, codec {codec}, flags {flags} are not known here.")
    dtype = DTYPES.get(code)
    if dtype is None:
        raise MessageError("bad_dtype", f"dtype code {code} is not known here.")
    if not 1 <= ndim <= MAX_DIMENSIONS:
        raise MessageError("bad_shape", f"{ndim} dimensions; 1 to {MAX_DIMENSIONS} are allowed.")
    names_at = _FIXED.size + 4 * ndim
    block_at = names_at + 1 + message[names_at] if names_at < end else end
    block_bytes = 0 if blocks is None else blocks.length(message, block_at, end)
    if names_at >= end or header_bytes != block_at + block_bytes:
        raise MessageError("bad_header", f"header length {header_bytes} disagrees with its own fields.")
    if header_bytes + payload_bytes != end:
        raise MessageError("bad_length", f"payload of {payload_bytes} bytes does not fill the message.")
    shape = struct.unpack_from(f"<{ndim}I", message, _FIXED.size)
    count = _check_shape(shape)
    stored = count * dtype.itemsize if blocks is None else blocks.stored(count, dtype, codec)
    if stored != payload_bytes:
        raise MessageError("bad_shape", f"shape {shape} of {dtype} does not fill {payload_bytes} bytes.")
    device = message[names_at + 1 : block_at].decode("ascii", errors="replace")
    if not NAME.fullmatch(device):
        raise MessageError("bad_device", f"device id {device!r} must match {NAME.pattern}.")
    _check_numbers(sequence, captured_at_ns)
    _check_quantisation(scale, zero_point)
    if codec == CODEC_RAW:
        values: NDArray[np.generic] = np.frombuffer(message, dtype, count, header_bytes).reshape(shape)
    else:
        assert blocks is not None  # noqa: S101  # kind 1 knows no other codec
        values = blocks.unpack(message[header_bytes:end], count).reshape(shape)
    if code == 0 and not np.isfinite(values).all():
        raise MessageError("not_finite", "the activation holds NaN or infinity.")
    activation = Activation(device, boot, sequence, captured_at_ns, model, values, scale, zero_point)
    return activation, message[block_at:header_bytes]


def rows_of(message: bytes) -> int:
    """First dimension, of a message that is long enough to have one; not checked yet."""
    return int.from_bytes(message[_FIXED.size : _FIXED.size + 4], "little")


def _check_shape(shape: tuple[int, ...]) -> int:
    """Product of `shape`, in Python integers that cannot overflow, checked against the caps."""
    if not 1 <= len(shape) <= MAX_DIMENSIONS:
        raise MessageError("bad_shape", f"{len(shape)} dimensions; 1 to {MAX_DIMENSIONS} are allowed.")
    count = math.prod(shape)
    if not 1 <= count <= MAX_VALUES:
        raise MessageError("oversize", f"shape {shape} holds {count} values; 1 to {MAX_VALUES} are allowed.")
    return count


def _check_numbers(*numbers: int) -> None:
    if not all(0 <= number <= MAX_INTEGER for number in numbers):
        raise MessageError("out_of_range", f"sequence and capture time are 0 to {MAX_INTEGER}.")


def _check_quantisation(scale: float, zero_point: int) -> None:
    if not _SCALES[0] <= scale <= _SCALES[1] or not -128 <= zero_point <= 127:  # so written, NaN fails too
        raise MessageError("bad_quantisation", f"scale {scale}, zero point {zero_point} are out of range.")
