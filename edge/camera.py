"""A live camera through OpenCV. Its own thread reads on and keeps the newest frame only."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from edge.capture import Capture, Frame, take_frame

RECONNECT_S = (0.5, 1.0, 2.0, 5.0)
"""Pauses before the camera is opened again; the last one repeats."""
log = logging.getLogger(__name__)


class CameraSource:
    """Frames of the camera at an index or URL, uint8 RGB [H, W, 3]; it is opened again whenever it fails.

    A frame that the agent was too slow for is replaced by the next: an old picture of a live scene has no use.
    """

    real_time = True

    def __init__(self, camera: int | str, capture: Capture) -> None:
        self._camera = camera
        self._capture = capture
        self._fresh = threading.Condition()
        self._newest: Frame | None = None

    def __iter__(self) -> Iterator[Frame]:
        threading.Thread(target=self._read_on, name="camera", daemon=True).start()
        return self._capture.pace(self._frames())

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
        import cv2

        failures = 0
        while not self._capture.stop.is_set():
            device = cv2.VideoCapture(self._camera)
            try:
                read = self._read_until_failure(device)
            finally:
                device.release()
            failures = 0 if read else failures + 1
            pause_s = RECONNECT_S[min(failures, len(RECONNECT_S) - 1)]
            log.warning("camera %s gives no frame; opening it again in %.1f s", self._camera, pause_s)
            self._capture.stop.wait(pause_s)

    def _read_until_failure(self, device: Any) -> int:
        """Keep the newest frame until a read fails; the number of frames read."""
        read = 0
        while not self._capture.stop.is_set():
            whole, pixels = device.read()
            if not whole:
                break
            read += 1
            # OpenCV orders the channels blue, green, red.
            rgb = pixels[..., ::-1].copy() if pixels.ndim == 3 else pixels
            with self._fresh:
                self._newest = take_frame(f"camera-{time.time_ns()}", rgb)
                self._fresh.notify()
        return read
