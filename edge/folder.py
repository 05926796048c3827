"""Files of a folder: images or DICOM, read once, and sorted into done/ and failed/ if asked."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from edge.capture import Capture, Frame, digest_of, printable
from edge.errors import CaptureError
from splitward.disk import write_whole
from splitward.errors import DataError
from splitward.imaging.inputs import Pixels

WATCH_S = 1.0
WATCH_PART = 0.02
"""Most of the time that looking for files may take: a folder of a hundred thousand is looked at less often."""
SWEEP_S = 60.0
REMEMBERED = 10_000
"""Files that are known by their names within one run; of earlier runs the spool knows more."""
DONE, FAILED, INCOMING = "done", "failed", ".incoming"
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
    has_prefix: Callable[[Path], bool] | None = None
    """Whether a file without a suffix is to be read."""
    named: re.Pattern[str] | None = None
    """Names that stand for a file's bytes: under such a name the same frame comes again, however new the file is."""
    taken: dict[int, None] = field(default_factory=dict, init=False)

    def __iter__(self) -> Iterator[Frame]:
        if not self.path.is_dir():
            raise CaptureError(f"{self.path}: is not a folder. Set `capture.path` to the folder of images.")
        return self.capture.pace(self._frames())

    def _frames(self) -> Iterator[Frame]:
        seen: set[_Look] = set()
        swept_s = -math.inf
        young: set[_Look] = set()
        while True:
            started_s = time.monotonic()
            if started_s - swept_s >= SWEEP_S:
                swept_s = started_s
                self._sweep()
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
            if Path(folder) == self.path:
                ours = (DONE, FAILED, INCOMING) if self.capture.config.sort else (INCOMING,)
                folders[:] = [name for name in folders if name not in ours]
            for name in names:
                path = Path(folder, name)
                if path.suffix.lower() in self.suffixes or self._may_have_prefix(path):
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
        if digest_of(key) in self.capture.known or digest_of(key) in self.taken:
            self._sort(path, modified_ns)  # the agent was stopped before it could, or the file came again
            return
        if self._may_have_prefix(path) and not self._has_prefix(path):
            return
        if self.capture.is_poison(name):
            self._fail(path, modified_ns, "crashed", "reading or releasing it ended the releaser twice.")
            return
        failure: dict[str, str] = {}
        """Of a frame that could not be released: the file then is its only copy."""

        def settle() -> None:
            self._sort(path, modified_ns, failure)

        def fail(reason: str, message: str) -> None:
            failure.update(reason=reason, message=printable(message))
            self._note(path, modified_ns, failure)

        def fail_last(reason: str, message: str) -> None:
            failure.update(reason=reason, message=printable(message))
            settle()

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
            if last:
                self._remember(digest)
            if digest not in self.capture.known:
                yield self.capture.take(
                    *(name if count == 1 else f"{name}#{index}", pixels, digest),
                    settle=settle if last else None,
                    fail=fail_last if last else fail,
                )
            if last:
                return

    def _key(self, path: Path, modified_ns: int) -> str:
        name = self.capture.name(path.relative_to(self.path).as_posix())
        return name if self._is_named(path) else f"{name}@{modified_ns}"

    def _is_named(self, path: Path) -> bool:
        return self.named is not None and self.named.fullmatch(path.name) is not None

    def _may_have_prefix(self, path: Path) -> bool:
        """Whether a file has a name such as media have (IM000001), or is named by its UID."""
        return self.has_prefix is not None and (not path.suffix or path.suffix[1:].isdigit())

    def _has_prefix(self, path: Path) -> bool:
        try:
            return self.has_prefix is None or self.has_prefix(path)
        except OSError:  # removed since it was listed, or not ours to read
            return False

    def _remember(self, digest: int) -> None:
        self.taken[digest] = None
        if len(self.taken) > REMEMBERED:
            del self.taken[next(iter(self.taken))]

    def _fail(self, path: Path, modified_ns: int, reason: str, message: str) -> None:
        log.warning("a file is passed over: %s", reason, extra={"file": str(path), "error": message})
        name = self.capture.name(path.relative_to(self.path).as_posix())
        digest = digest_of(self._key(path, modified_ns))
        self._remember(digest)
        self._sort(path, modified_ns, {"reason": reason, "message": printable(message)})
        self.capture.lose(reason, digest, name)  # only now: what is known is filed as done at the next start

    def _noted(self, path: Path, modified_ns: int) -> Path:
        """Where it stands that a frame of a file was lost, until the file is sorted."""
        return self.path / FAILED / f".{digest_of(self._key(path, modified_ns)):016x}.json"

    def _note(self, path: Path, modified_ns: int, failure: dict[str, str]) -> None:
        """Keep `failure` on the disk: nobody knows of it after a restart, and the file is the frame's only copy."""
        if not self.capture.config.sort:
            return
        try:
            write_whole(self._noted(path, modified_ns), msgspec.json.encode(failure))
        except OSError as error:
            log.warning("a lost frame is not noted: %s", error.strerror, extra={"file": str(path)})

    def _sort(self, path: Path, modified_ns: int, failure: dict[str, str] | None = None) -> None:
        """Move a file to done/, or to failed/ with the reason beside it, or delete it if none is to be kept.

        One that has changed since stays.
        """
        config = self.capture.config
        if not config.sort:
            return
        noted = self._noted(path, modified_ns)
        if not failure:
            with contextlib.suppress(OSError, msgspec.DecodeError):  # mostly there is none
                failure = msgspec.json.decode(noted.read_bytes(), type=dict[str, str])
        target = self.path / (FAILED if failure else DONE) / path.relative_to(self.path)
        try:
            if path.stat().st_mtime_ns != modified_ns:
                return
            again = target.exists() and self._is_named(path)  # the same bytes lie there
            if again or (config.keep_failed_s if failure else config.keep_done_s) == 0:
                path.unlink()
                noted.unlink(missing_ok=True)
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target = target.with_name(f"{target.stem}-{time.time_ns()}{target.suffix}")
            if failure:
                try:
                    target.with_name(target.name + ".json").write_bytes(msgspec.json.encode(failure))
                except OSError as error:  # a full disk: what stayed would be filed as done at the next start
                    log.warning("a reason is not written: %s", error.strerror, extra={"file": str(target)})
            path.replace(target)
            noted.unlink(missing_ok=True)
        except OSError as error:
            log.warning("a file stays where it is: %s", error.strerror, extra={"file": str(path)})

    def _sweep(self) -> None:
        """Delete what was in done/ and failed/ for long enough: since it was moved, by the file system's own clock."""
        config = self.capture.config
        for folder, keep_s in ((DONE, config.keep_done_s), (FAILED, config.keep_failed_s)):
            if keep_s is None or not config.sort:
                continue
            oldest_ns = _file_system_now_ns(self.path) - int(keep_s * 1e9)
            for path in (self.path / folder).rglob("*"):
                with contextlib.suppress(OSError):
                    if path.is_file() and path.stat().st_ctime_ns <= oldest_ns:
                        path.unlink()


def image_folder(path: Path, capture: Capture) -> FolderSource:
    """Folder of image files."""
    from splitward.imaging import files

    def read(file: Path) -> Iterator[tuple[int, Pixels]]:
        yield 1, files.read_image(file)

    return FolderSource(path, capture, read, files.SUFFIXES)


def dicom_folder(path: Path, capture: Capture, named: re.Pattern[str] | None = None) -> FolderSource:
    """Folder of DICOM files, those without a suffix too if they begin as such; `named` as in `FolderSource`."""
    from splitward.imaging import dicom

    def read(file: Path) -> Iterator[tuple[int, Pixels]]:
        return ((one.count, one.pixels) for one in dicom.iter_dicom(file))

    return FolderSource(path, capture, read, dicom.SUFFIXES, dicom.has_prefix, named)


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
