"""Where frames come from. A source is an iterable of `Frame`; folder.py, recording.py, camera.py and receiver.py
have one each.

What cannot be read is logged, counted and passed over. A frame that an earlier run has taken into the spool is
passed over too: a restarted agent goes on where it was stopped.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge.config import CaptureConfig
from splitward.imaging.inputs import Pixels


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
    priority : int
        Its source's.
    can_wait : bool
        Whether its source has it again after a crash.
    settle : callable or None
        To be called when the frame is safe in the spool.
    fail : callable or None
        To be called with a reason and a message where it cannot be released, in place of `settle`.
    """

    name: str
    pixels: Pixels = field(repr=False)
    captured_at_ns: int
    captured_tick_ns: int
    digest: int | None = None
    priority: int = 0
    can_wait: bool = True
    settle: Callable[[], None] | None = None
    fail: Callable[[str, str], None] | None = None


class Source(Protocol):
    """What frames are captured from."""

    def __iter__(self) -> Iterator[Frame]: ...


class Digests:
    """Digests of the frames that were taken already: 8 bytes each, in a sorted array."""

    def __init__(self, packed: bytes = b"") -> None:
        self._sorted: NDArray[np.int64] = np.sort(np.frombuffer(packed, np.int64))

    def __contains__(self, digest: int) -> bool:
        at = int(np.searchsorted(self._sorted, digest))
        return at < len(self._sorted) and int(self._sorted[at]) == digest


@dataclass(frozen=True)
class Capture:
    """What one source is given.

    Attributes
    ----------
    config : CaptureConfig
    stop : Event
        Ends the source.
    known : Digests
        Of the frames that earlier runs have taken.
    poison : tuple of str
        Names that have ended the releaser twice, and are not to be opened again.
    admit : callable
        Waits for room for one more frame; False when stopped. `give_back` returns room that was not used.
    open : callable
        Context manager for reading the file or frame of a name: it is watched, and ends in time or at all.
    lose : callable
        Counts a lost frame under a reason; with a digest it is not tried again. Its full name, or its file's, is
        given for its strikes to be forgotten.
    supersede : callable
        Counts a live frame that gave way to a newer one.
    """

    config: CaptureConfig
    stop: threading.Event
    known: Digests
    poison: tuple[str, ...]
    admit: Callable[[], bool]
    give_back: Callable[[], None]
    open: Callable[[str], AbstractContextManager[None]]
    lose: Callable[[str, int | None, str], None]
    supersede: Callable[[], None]

    def name(self, name: str) -> str:
        """Name of a frame of this source, which every encoder takes."""
        return printable(f"{self.config.name}/{name}" if self.config.name else name)

    def is_poison(self, name: str) -> bool:
        """Whether the file or frame `name`, or a frame of that file, has ended the releaser twice."""
        own = self.name(name)
        return any(one == own or one.startswith(own + "#") for one in self.poison)

    def take(
        self,
        name: str,
        pixels: Pixels,
        digest: int | None = None,
        settle: Callable[[], None] | None = None,
        fail: Callable[[str, str], None] | None = None,
    ) -> Frame:
        """Frame captured now; without a digest it is a live one."""
        return Frame(
            *(self.name(name), pixels, time.time_ns(), time.monotonic_ns(), digest),
            *(self.config.priority, digest is not None, settle, fail),
        )

    def pace(self, frames: Iterator[Frame], live: bool = False) -> Iterator[Frame]:
        """`frames` at the source's rate, until stopped. Each is read only when it is due and there is room."""
        due, rate_hz = time.monotonic(), self.config.rate_hz
        while not self.stop.is_set():
            if rate_hz:
                self.stop.wait(max(0.0, due - time.monotonic()))
                due = max(due + 1.0 / rate_hz, time.monotonic())
            if not live and not self.admit():
                return
            frame = next(frames, None)
            if frame is None or self.stop.is_set():
                if not live:
                    self.give_back()
                return
            yield frame


def open_source(capture: Capture) -> Source:
    """Source that `capture.config` names. Only then are the libraries that it needs imported.

    Raises
    ------
    CaptureError
        It cannot be opened, or needs a library that is not installed.
    """
    config, path = capture.config, Path(capture.config.path)
    if config.kind == "camera":
        from edge.camera import CameraSource

        return CameraSource(config.camera, capture)
    if config.kind == "video":
        from edge.camera import VideoSource

        return VideoSource(path, capture)
    if config.kind == "simulator":
        from edge.recording import SimulatorSource

        return SimulatorSource(path, capture)
    if config.kind == "receiver":
        from edge.receiver import ReceiverSource

        return ReceiverSource(path, capture)
    from edge.folder import dicom_folder, image_folder

    return dicom_folder(path, capture) if config.kind == "dicom" else image_folder(path, capture)


def merge(sources: Sequence[Source], stop: threading.Event) -> Iterator[Frame]:
    """Frames of all `sources` as they come; each source but a single one has a thread of its own."""
    if len(sources) == 1:
        yield from sources[0]
        return
    handed: queue.Queue[Frame | BaseException | None] = queue.Queue(1)

    def run(source: Source) -> None:
        try:
            for frame in source:
                handed.put(frame)
            handed.put(None)
        except BaseException as error:  # noqa: BLE001  # the reader raises it: a dead source must not go unnoticed
            handed.put(error)

    for source in sources:
        threading.Thread(target=run, args=(source,), name="source", daemon=True).start()
    left = len(sources)
    while left and not stop.is_set():
        try:
            item = handed.get(timeout=0.5)  # looks at `stop` in between
        except queue.Empty:
            continue
        if isinstance(item, BaseException):
            raise item
        if item is None:
            left -= 1
        else:
            yield item


def printable(text: str) -> str:
    """`text` as it is, but that surrogates are escaped: a file's name need not be UTF-8, and Python then stands one
    in for each of its odd bytes, which nothing but the file system takes."""
    return text.encode(errors="backslashreplace").decode()


def digest_of(name: str) -> int:
    """63 bits that stand for `name`, so that the spool keeps no file names of long ago."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
