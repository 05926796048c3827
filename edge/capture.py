"""Where frames come from: a folder of images or DICOM files, or a recording replayed. The camera: camera.py.

A source is an iterable of `Frame`. What cannot be read is logged, counted and passed over. A frame that an
earlier run has taken into the spool is passed over too: a restarted agent goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.config import CaptureConfig
from edge.errors import CaptureError
from splitward.errors import DataError
from splitward.imaging.inputs import Pixels

WATCH_S = 1.0
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """One captured image.

    Attributes
    ----------
    name : str
        Where it came from; stays on the device.
    pixels : ndarray, uint8 or uint16, [H, W] or [H, W, 3]
    captured_at_ns : int
        Nanoseconds of UTC since 1970.
    captured_tick_ns : int
        The same moment on the device's monotonic clock.
    digest : int or None
        Names the frame across restarts; None when it can never be captured again.
    """

    name: str
    pixels: Pixels = field(repr=False)
    captured_at_ns: int
    captured_tick_ns: int
    digest: int | None = None


def take_frame(name: str, pixels: Pixels, digest: int | None = None) -> Frame:
    """Frame captured now."""
    return Frame(name, pixels, time.time_ns(), time.monotonic_ns(), digest)


class Source(Protocol):
    """What the agent captures from."""

    real_time: bool
    """Whether the world goes on while the agent waits, so that waiting loses frames."""

    def __iter__(self) -> Iterator[Frame]: ...


@dataclass(frozen=True)
class Capture:
    """What every source shares.

    Attributes
    ----------
    rate_hz : float
        Most frames in a second; 0 for as fast as they are taken.
    stop : Event
        Ends the source.
    known : frozenset of int
        Digests of the frames that earlier runs have taken.
    drop : callable
        Counts a lost frame under a reason.
    """

    rate_hz: float
    stop: threading.Event
    known: frozenset[int]
    drop: Callable[[str], None]

    def pace(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """`frames` at the rate, until stopped. Each is read only when it is due."""
        due = time.monotonic()
        while not self.stop.is_set():
            if self.rate_hz:
                self.stop.wait(max(0.0, due - time.monotonic()))
                due = max(due + 1.0 / self.rate_hz, time.monotonic())
            frame = next(frames, None)
            if frame is None or self.stop.is_set():
                return
            yield frame


@dataclass(frozen=True)
class SimulatorSource:
    """Replays `images` of an .npz file, with `names` if it holds any.

    `images` is uint8 or uint16: [N,H,W], [N,H,W,3] or [N,C,H,W] with one or three channels.
    """

    path: Path
    capture: Capture
    real_time = False

    def __iter__(self) -> Iterator[Frame]:
        images, names = read_recording(self.path)
        return self.capture.pace(self._frames(images, names))

    def _frames(self, images: Pixels, names: list[str]) -> Iterator[Frame]:
        for name, pixels in zip(names, images, strict=True):
            digest = _digest(name)
            if digest not in self.capture.known:
                yield take_frame(name, pixels, digest)


@dataclass(frozen=True)
class FolderSource:
    """Files of a folder and of those below it, by name; watched for more if asked."""

    path: Path
    capture: Capture
    read: Callable[[Path], list[Pixels]]
    suffixes: frozenset[str]
    watch: bool
    real_time = False

    def __iter__(self) -> Iterator[Frame]:
        if not self.path.is_dir():
            raise CaptureError(f"{self.path}: is not a folder. Set `capture.path` to the folder of images.")
        return self.capture.pace(self._frames())

    def _frames(self) -> Iterator[Frame]:
        seen: set[tuple[Path, int]] = set()
        while True:
            for path, modified_ns in self._files():
                if (path, modified_ns) not in seen:
                    seen.add((path, modified_ns))
                    yield from self._read(path, modified_ns)
            if not self.watch or self.capture.stop.wait(WATCH_S):
                return

    def _files(self) -> list[tuple[Path, int]]:
        """Files with their time of change; in a watched folder only those that are no longer written to."""
        settled_ns = time.time_ns() - (int(WATCH_S * 1e9) if self.watch else 0)
        found = []
        for path in sorted(self.path.rglob("*")):
            if path.suffix.lower() in self.suffixes:
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    modified_ns = path.stat().st_mtime_ns
                    if not self.watch or modified_ns < settled_ns:
                        found.append((path, modified_ns))
        return found

    def _read(self, path: Path, modified_ns: int) -> Iterator[Frame]:
        name = path.relative_to(self.path).as_posix()
        if _digest(f"{name}@{modified_ns}") in self.capture.known:
            return
        try:
            images = self.read(path)
        except DataError as error:
            log.warning("frame passed over: %s", error)
            self.capture.drop("unreadable")
            return
        for index, pixels in enumerate(images):
            # The last frame of a file stands for the whole file, so that a restart need not read it again.
            digest = _digest(f"{name}@{modified_ns}" + ("" if index == len(images) - 1 else f"#{index}"))
            if digest not in self.capture.known:
                yield take_frame(name if len(images) == 1 else f"{name}#{index}", pixels, digest)


def read_recording(path: Path) -> tuple[Pixels, list[str]]:
    """Images, [N,H,W] or [N,H,W,3], and names of the .npz file at `path`.

    Raises
    ------
    CaptureError
        The file is missing, or holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            images: NDArray[np.generic] = archive["images"]
            names = [str(name) for name in archive["names"]] if "names" in archive else None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CaptureError(f"{path}: is not a recording: {error}. It is an .npz file with `images`.") from error
    shape = images.shape
    if len(shape) == 4 and shape[3] != 3 and shape[1] in (1, 3):
        images = np.ascontiguousarray(np.moveaxis(images, 1, 3))
        images = images[..., 0] if shape[1] == 1 else images
    known = images.dtype in (np.uint8, np.uint16) and (images.ndim == 3 or images.shape[3:] == (3,))
    if not known or (names is not None and len(names) != len(images)):
        raise CaptureError(
            f"{path}: `images` is {images.dtype} {list(shape)}; give uint8 or uint16, [N,H,W], [N,H,W,3] or "
            "[N,C,H,W], and as many `names`, or none."
        )
    return images, names or [f"frame-{index:06d}" for index in range(len(images))]  # type: ignore[return-value]  # checked above


def open_source(config: CaptureConfig, capture: Capture) -> Source:
    """Source that `config` names. Only then are the libraries that it needs imported."""
    path = Path(config.path)
    if config.kind == "camera":
        from edge.camera import CameraSource

        return CameraSource(config.camera, capture)
    if config.kind == "simulator":
        return SimulatorSource(path, capture)
    if config.kind == "dicom":
        from splitward.imaging import dicom

        return FolderSource(
            path,
            capture,
            lambda file: [one.pixels for one in dicom.read_dicom(file)],
            dicom.SUFFIXES,
            config.watch,
        )
    from splitward.imaging import files

    return FolderSource(path, capture, lambda file: [files.read_image(file)], files.SUFFIXES, config.watch)


def _digest(name: str) -> int:
    """63 bits that stand for `name`, so that the spool keeps no file names of long ago."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
