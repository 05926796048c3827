"""What one side of a training keeps on its disk: a snapshot, and the messages that it took since.

```
FOLDER/snapshot-N.safetensors   weights, optimisers, random state after N steps
FOLDER/log-N                    each message since: u32 length, u32 CRC-32, bytes
FOLDER/lock                     held by the one process that writes here
```

A message is on the disk before it has any effect. A step depends on nothing but the state and its message, so to do the
messages since the snapshot again gives the very state that was lost, and a kill costs no more than that time.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitward.errors import TrainingError

_HEAD = struct.Struct("<II")


class Journal:
    """The folder of one side.

    Parameters
    ----------
    folder : Path
        Made where it does not exist.

    Attributes
    ----------
    since_snapshot : int
        Messages since the snapshot.

    Raises
    ------
    TrainingError
        Another process writes here, or the snapshot is damaged.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder / "lock")
        if lock is None:
            raise TrainingError(f"{folder}: another process takes part in this training. End that one first.")
        self._lock = lock
        self._folder = folder
        self._number = max((_number(path) for path in folder.glob("snapshot-*.safetensors")), default=-1)
        self.since_snapshot = 0
        self._forget_older()
        self._log = self._open_log()

    def snapshot(self) -> dict[str, Tensor] | None:
        """The tensors of the last snapshot, or None before the first."""
        if self._number < 0:
            return None
        path = self._path(self._number)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise TrainingError(f"{path}: is damaged ({error}). Begin this training again.") from error

    def messages(self) -> Iterator[bytes]:
        """Messages since the snapshot, oldest first."""
        data = self._log_path().read_bytes()
        at = 0
        while (whole := _read(data, at)) is not None:
            at += _HEAD.size + len(whole)
            yield whole

    def append(self, message: bytes) -> None:
        """Put a message on the disk."""
        head = _HEAD.pack(len(message), zlib.crc32(message))
        view = memoryview(head + message)
        while view:
            view = view[os.write(self._log, view) :]
        os.fdatasync(self._log)
        self.since_snapshot += 1

    def save(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Replace snapshot and messages by the snapshot after `number` steps, as a whole or not at all."""
        path = self._path(number)
        partial = path.with_name("partial")
        partial.unlink(missing_ok=True)
        partial.touch(0o600)  # it holds the secret that keys the noise
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        os.close(self._log)
        self._number = number
        self._log_path().unlink(missing_ok=True)
        self._log = self._open_log()
        _sync(self._folder)
        self._forget_older()

    def close(self) -> None:
        """Let go of the log and the folder."""
        os.close(self._log)
        os.close(self._lock)

    def _open_log(self) -> int:
        log = os.open(self._log_path(), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        data = self._log_path().read_bytes()
        end = self.since_snapshot = 0
        while (whole := _read(data, end)) is not None:
            end += _HEAD.size + len(whole)
            self.since_snapshot += 1
        os.ftruncate(log, end)  # a message that was cut off had no effect
        return log

    def _forget_older(self) -> None:
        for path in (*self._folder.glob("snapshot-*.safetensors"), *self._folder.glob("log-*")):
            if _number(path) < self._number:
                path.unlink()

    def _path(self, number: int) -> Path:
        return self._folder / f"snapshot-{number}.safetensors"

    def _log_path(self) -> Path:
        return self._folder / f"log-{max(self._number, 0)}"


def count_messages(folder: Path) -> int:
    """Messages that the side which writes `folder` has taken; a moment old where it is being written."""
    number = max((_number(path) for path in folder.glob("snapshot-*.safetensors")), default=0)
    try:
        data = (folder / f"log-{number}").read_bytes()
    except FileNotFoundError:  # the snapshot has just been made
        return number
    at = count = 0
    while (whole := _read(data, at)) is not None:
        at, count = at + _HEAD.size + len(whole), count + 1
    return number + count


def take_lock(path: Path) -> int | None:
    """Descriptor that keeps the lock until it is closed, as a kill does; None where another has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _number(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _read(data: bytes, at: int) -> bytes | None:
    """The whole message at `at`, or None where it is cut off, damaged, or the end."""
    if at + _HEAD.size > len(data):
        return None
    length, checksum = _HEAD.unpack_from(data, at)
    message = data[at + _HEAD.size : at + _HEAD.size + length]
    return message if len(message) == length and zlib.crc32(message) == checksum else None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
