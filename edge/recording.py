"""A recording replayed, for demonstrations and tests."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge.capture import Capture, Frame, digest_of
from edge.errors import CaptureError
from splitward.imaging.inputs import Pixels


@dataclass(frozen=True)
class SimulatorSource:
    """Replays `images` of an .npz file, with `names` if it holds any.

    `images` is uint8 or uint16: [N,H,W], [N,H,W,3] or [N,C,H,W] with one or three channels.
    """

    path: Path
    capture: Capture

    def __iter__(self) -> Iterator[Frame]:
        images, names = read_recording(self.path)
        return self.capture.pace(self._frames(images, names), live=self.capture.config.real_time)

    def _frames(self, images: Pixels, names: list[str]) -> Iterator[Frame]:
        for name, pixels in zip(names, images, strict=True):
            digest = digest_of(self.capture.name(name))
            if digest in self.capture.known:
                continue
            if self.capture.is_poison(name):
                self.capture.lose("crashed", digest, self.capture.name(name))
                continue
            yield self.capture.take(name, pixels, digest)


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
