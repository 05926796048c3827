"""Files of a folder: images or DICOM, read once, and sorted into done/ and failed/ if asked."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge.capture import Capture, Frame, digest_of, printable
from edge.errors import CaptureError
from splitward.errors import DataError
from splitward.imaging.inputs import Pixels

WATCH_S = 1.0
WATCH_PART = 0.02
"""Most of the time that looking for files may take: a folder of a hundred thousand is looked at less often."""
DONE, FAILED = "done", "failed"
log = logging.getLogger(__name__)


class _Look(NamedTuple):
    """A file as it was when the folder was looked at."""

    path: Path
    modified_ns: int
    size: int


@dataclass(frozen=True)
class FolderSource:
    """Files of a folder and of those below it, by name; watched for more if asked."""

    path: Path
    capture: Capture
    read: Callable[[Path], Iterator[tuple[int, Pixels]]]
    """Images of a file, each with the number of all; none is read before it is asked for."""
    suffixes: frozenset[str]

    def __iter__(self) -> Iterator[Frame]:
        if not self.path.is_dir():
            raise CaptureError(f"{self.path}: is not a folder. Set `capture.path` to the folder of images.")
        return self.capture.pace(self._frames())

    def _frames(self) -> Iterator[Frame]:
        seen: set[_Look] = set()
        young: set[_Look] = set()
        while True:
            started_s = time.monotonic()
            files, young = self._files(young)
            pause_s = max(WATCH_S, (time.monotonic() - started_s) / WATCH_PART)
            seen &= set(files)  # no longer than the folder itself
            for look in files:
                if look not in seen:
                    seen.add(look)
                    yield from self._read(look.path, look.modified_ns)
            if not self.capture.config.watch:
                return
            self.capture.give_back()  # while nothing comes here, other sources may use the room
            self.capture.stop.wait(pause_s)
            if not self.capture.admit():
                return

    def _files(self, young: set[_Look]) -> tuple[list[_Look], set[_Look]]:
        """Files, and which of all are young; in a watched folder only those that are no longer written to.

        These are old, or `young` at the look before and the same now: a file may come with a time that lies ahead.
        """
        watch = self.capture.config.watch
        # Against the file system's own clock: the device's may have jumped since the file was written.
        settled_ns = _file_system_now_ns(self.path) - int(WATCH_S * 1e9) if watch else 0
        found: list[_Look] = []
        young_now: set[_Look] = set()
        for folder, folders, names in os.walk(self.path):
            if Path(folder) == self.path and self.capture.config.sort:
                folders[:] = [name for name in folders if name not in (DONE, FAILED)]
            for name in names:
                path = Path(folder, name)
                if path.suffix.lower() in self.suffixes:
                    with contextlib.suppress(OSError):  # removed since it was listed
                        state = path.stat()
                        look = _Look(path, state.st_mtime_ns, state.st_size)
                        is_young = watch and look.modified_ns >= settled_ns
                        if is_young:
                            young_now.add(look)
                        if not is_young or look in young:
                            found.append(look)
        return sorted(found), young_now

    def _read(self, path: Path, modified_ns: int) -> Iterator[Frame]:
        name = path.relative_to(self.path).as_posix()
        key = self._key(path, modified_ns)
        if digest_of(key) in self.capture.known:
            self._sort(path, modified_ns)  # the agent was stopped before it could
            return
        if self.capture.is_poison(name):
            self._fail(path, modified_ns, "crashed", "reading or releasing it ended the releaser twice.")
            return
        images = self.read(path)
        for index in itertools.count():
            try:
                with self.capture.open(self.capture.name(name)):
                    count, pixels = next(images)
            except DataError as error:
                self._fail(path, modified_ns, "unreadable", str(error))
                return
            # The last frame of a file stands for the whole file, so that a restart need not read it again.
            last = index == count - 1
            digest = digest_of(key + ("" if last else f"#{index}"))
            if digest not in self.capture.known:
                settle = (lambda: self._sort(path, modified_ns)) if last else None
                yield self.capture.take(name if count == 1 else f"{name}#{index}", pixels, digest, settle)
            if last:
                return

    def _key(self, path: Path, modified_ns: int) -> str:
        return f"{self.capture.name(path.relative_to(self.path).as_posix())}@{modified_ns}"

    def _fail(self, path: Path, modified_ns: int, reason: str, message: str) -> None:
        log.warning("a file is passed over: %s", reason, extra={"file": str(path), "error": message})
        name = self.capture.name(path.relative_to(self.path).as_posix())
        self.capture.lose(reason, digest_of(self._key(path, modified_ns)), name)
        self._sort(path, modified_ns, {"reason": reason, "message": printable(message)})

    def _sort(self, path: Path, modified_ns: int, failure: dict[str, str] | None = None) -> None:
        """Move a file to done/, or to failed/ with the reason beside it; one that has changed since stays."""
        if not self.capture.config.sort:
            return
        target = self.path / (FAILED if failure else DONE) / path.relative_to(self.path)
        try:
            if path.stat().st_mtime_ns != modified_ns:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target = target.with_name(f"{target.stem}-{time.time_ns()}{target.suffix}")
            if failure:
                target.with_name(target.name + ".json").write_bytes(msgspec.json.encode(failure))
            path.replace(target)
        except OSError as error:
            log.warning("a file stays where it is: %s", error.strerror, extra={"file": str(path)})


def image_folder(path: Path, capture: Capture) -> FolderSource:
    """Folder of image files."""
    from splitward.imaging import files

    def read(file: Path) -> Iterator[tuple[int, Pixels]]:
        yield 1, files.read_image(file)

    return FolderSource(path, capture, read, files.SUFFIXES)


def dicom_folder(path: Path, capture: Capture) -> FolderSource:
    """Folder of DICOM files."""
    from splitward.imaging import dicom

    def read(file: Path) -> Iterator[tuple[int, Pixels]]:
        return ((one.count, one.pixels) for one in dicom.iter_dicom(file))

    return FolderSource(path, capture, read, dicom.SUFFIXES)


def _file_system_now_ns(folder: Path) -> int:
    """Now, as the file system stamps files; by this device's clock where nothing may be written there."""
    probe = folder / ".splitward-clock"
    try:
        probe.touch()
        return probe.stat().st_mtime_ns
    except OSError:
        return time.time_ns()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
