"""Cameras and video files through OpenCV, which nothing else on the device loads."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge.capture import Capture, Frame, digest_of
from edge.errors import CaptureError
from edge.logs import shown_address
from splitward.imaging.inputs import Pixels

RECONNECT_S = (0.5, 1.0, 2.0, 5.0)
"""Pauses before the camera is opened again; the last one repeats."""
log = logging.getLogger(__name__)


class CameraSource:
    """Frames of the camera at an index or URL, uint8 RGB [H, W, 3]; it is opened again whenever it fails.

    Its own thread reads on and keeps the newest frame only: an old picture of a live scene has no use. Without OpenCV
    there is no source, but a `CaptureError`.
    """

    def __init__(self, camera: int | str, capture: Capture) -> None:
        self._cv2 = _open_cv()  # here, where its absence ends the start and not a thread
        self._camera = camera
        self._capture = capture
        self._fresh = threading.Condition()
        self._newest: Frame | None = None

    def __iter__(self) -> Iterator[Frame]:
        threading.Thread(target=self._read_on, name="camera", daemon=True).start()
        return self._capture.pace(self._frames(), live=True)

    def _frames(self) -> Iterator[Frame]:
        while True:
            with self._fresh:
                while self._newest is None:
                    if self._capture.stop.is_set():
                        return
                    self._fresh.wait(0.2)  # looks at `stop` in between
                frame, self._newest = self._newest, None
            yield frame

    def _read_on(self) -> None:
        failures = 0
        while not self._capture.stop.is_set():
            read = self._read_once()
            if self._capture.stop.is_set():
                return
            failures = 0 if read else failures + 1
            pause_s = RECONNECT_S[min(failures, len(RECONNECT_S) - 1)]
            log.warning("camera %s gives no frame; opening it again in %.1f s", _shown(self._camera), pause_s)
            self._capture.stop.wait(pause_s)

    def _read_once(self) -> int:
        """Open the camera and read until it fails; the number of frames read. OpenCV's own error is a frame lost."""
        try:
            device = self._cv2.VideoCapture(self._camera)
            try:
                return self._read_until_failure(device)
            finally:
                device.release()
        except self._cv2.error as error:
            text = " ".join(str(error).split()).replace(str(self._camera), _shown(self._camera))
            log.error("camera %s: %s", _shown(self._camera), text)
            self._capture.lose("unreadable", None, "")
            return 0

    def _read_until_failure(self, device: Any) -> int:
        """Keep the newest frame until a read fails; the number of frames read."""
        read = 0
        while not self._capture.stop.is_set():
            whole, pixels = device.read()
            if not whole:
                break
            read += 1
            with self._fresh:
                if self._newest is not None:
                    self._capture.supersede()
                self._newest = self._capture.take(f"camera-{time.time_ns()}", _to_rgb(pixels))
                self._fresh.notify()
        return read


@dataclass(frozen=True)
class VideoSource:
    """Every frame of a video file, once."""

    path: Path
    capture: Capture

    def __iter__(self) -> Iterator[Frame]:
        if not self.path.is_file():
            raise CaptureError(f"{self.path}: no such file. Set `capture.path` to a video file.")
        return self.capture.pace(self._frames())

    def _frames(self) -> Iterator[Frame]:
        name = self.path.name
        key = f"{self.capture.name(name)}@{self.path.stat().st_mtime_ns}"
        if self.capture.is_poison(name):
            self.capture.lose("crashed", digest_of(key), self.capture.name(name))
            return
        if digest_of(key) in self.capture.known:  # given up by an earlier run
            return
        video = _open_cv().VideoCapture(str(self.path))
        try:
            index = 0
            while not self.capture.stop.is_set():
                with self.capture.open(self.capture.name(name)):
                    whole, pixels = video.read()
                if not whole:
                    break
                digest = digest_of(f"{key}#{index}")
                if digest not in self.capture.known:
                    yield self.capture.take(f"{name}#{index}", _to_rgb(pixels), digest)
                index += 1
        finally:
            video.release()
        if not index:
            log.warning("a video holds no frame that OpenCV can read", extra={"file": str(self.path)})
            self.capture.lose("unreadable", digest_of(key), self.capture.name(name))


def try_camera(camera: int | str) -> str:
    """What a camera gives, for a person; `CaptureError` when it gives nothing."""
    cv2 = _open_cv()
    try:
        device = cv2.VideoCapture(camera)
        whole, pixels = device.read()
        device.release()
    except cv2.error:
        whole = False
    if not whole:
        raise CaptureError(
            f"camera {_shown(camera)}: gives no frame. Is it plugged in, and may this user open it?"
        )
    return f"camera {_shown(camera)}: {pixels.shape[1]} x {pixels.shape[0]}"


def _shown(camera: int | str) -> str:
    return shown_address(str(camera))


def _to_rgb(pixels: Pixels) -> Pixels:
    """OpenCV orders the channels blue, green, red."""
    return pixels[..., ::-1].copy() if pixels.ndim == 3 else pixels


def _open_cv() -> Any:
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # it writes a camera's address, with the password
    try:
        import cv2
    except ImportError as error:
        raise CaptureError(f"cv2: {error}. Install `splitward[camera]`.") from error
    return cv2
