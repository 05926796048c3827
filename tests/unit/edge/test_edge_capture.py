"""Sources: every frame once, in order; what cannot be read is counted and passed over."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge.camera import try_camera
from edge.capture import Capture, Digests, Frame, Source, open_source
from edge.config import CaptureConfig
from edge.errors import CaptureError
from edge.receiver import SUCCESS, ReceiverSource
from edge.recording import read_recording
from firmware_sim.broker import free_port
from splitward.imaging.inputs import to_frame
from splitward.wire.bundle import InputSpec
from tests.unit.imaging.test_imaging_dicom import write_dicom

BLACK = np.zeros((8, 8), np.uint8)


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    ends_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends_s, "it did not come about in time"
        time.sleep(0.01)


class Setting:
    """A capture, and what its source did with it."""

    def __init__(self, known: frozenset[int] = frozenset(), poison: tuple[str, ...] = ()) -> None:
        self.stop = threading.Event()
        self.lost: list[str] = []
        self.digests: list[int | None] = []
        self.admitted = 0
        self.superseded = 0
        self._known = Digests(np.array(sorted(known), np.int64).tobytes())
        self._poison = poison

    def open(self, **config: Any) -> Source:
        return open_source(
            Capture(
                config=CaptureConfig(**config),
                stop=self.stop,
                known=self._known,
                poison=self._poison,
                admit=self._admit,
                give_back=self._give_back,
                open=lambda name: contextlib.nullcontext(),
                lose=self._lose,
                supersede=self._supersede,
            )
        )

    def frames(self, **config: Any) -> list[Frame]:
        return list(self.open(**config))

    def _lose(self, reason: str, digest: int | None, _name: str) -> None:
        self.lost.append(reason)
        self.digests.append(digest)

    def _admit(self) -> bool:
        self.admitted += 1
        return not self.stop.is_set()

    def _give_back(self) -> None:
        self.admitted -= 1

    def _supersede(self) -> None:
        self.superseded += 1


def test_a_folder_gives_its_images_by_name_and_passes_over_bad_files(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.png", "a.png", "b/z.pgm"):
        Image.fromarray(BLACK).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    setting = Setting()
    frames = setting.frames(kind="folder", path=str(tmp_path))
    assert [frame.name for frame in frames] == ["a.png", "b/z.pgm", "c.png"]
    assert setting.lost == ["unreadable"]
    assert setting.admitted == 3
    assert caplog.records[0].file == str(tmp_path / "bad.png")
    assert "bad.png" not in caplog.text, "file names may name patients"
    assert all(frame.pixels.shape == (8, 8) for frame in frames)


def test_known_frames_are_passed_over_until_the_file_changes(tmp_path: Path) -> None:
    config: Any = {"kind": "folder", "path": str(tmp_path)}
    for name in ("a.png", "b.png"):
        Image.fromarray(BLACK).save(tmp_path / name)
    first, _ = Setting().frames(**config)
    assert first.digest is not None
    known = frozenset([first.digest])
    assert [frame.name for frame in Setting(known).frames(**config)] == ["b.png"]
    Image.fromarray(BLACK + 1).save(tmp_path / "a.png")
    assert [frame.name for frame in Setting(known).frames(**config)] == ["a.png", "b.png"]


def test_files_are_sorted_when_their_frames_are_safe_and_not_before(tmp_path: Path) -> None:
    config: Any = {"kind": "folder", "path": str(tmp_path), "sort": True}
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.png", "poison.png"):
        Image.fromarray(BLACK).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    setting = Setting(poison=("poison.png",))
    a, b = setting.frames(**config)
    assert sorted(setting.lost) == ["crashed", "unreadable"]
    failure = json.loads((tmp_path / "failed" / "bad.png.json").read_bytes())
    assert failure["reason"] == "unreadable"
    assert "no whole image" in failure["message"]
    assert (tmp_path / "failed" / "poison.png").exists()
    assert (tmp_path / "a.png").exists()
    assert a.settle is not None
    a.settle()
    assert (tmp_path / "done" / "a.png").exists()
    assert b.digest is not None
    assert Setting(frozenset([b.digest])).frames(**config) == []  # stopped before it could be sorted
    assert (tmp_path / "done" / "sub" / "b.png").exists()
    Image.fromarray(BLACK + 1).save(tmp_path / "a.png")
    (again,) = Setting().frames(**config)
    assert again.settle is not None
    again.settle()
    assert len(list((tmp_path / "done").glob("a*.png"))) == 2, "a file of the same name is not replaced"


@pytest.mark.parametrize("lost", [0, 2], ids=["a middle frame", "the last frame"])
def test_a_file_with_a_frame_that_cannot_be_released_has_failed(tmp_path: Path, lost: int) -> None:
    write_dicom(tmp_path / "a.dcm", np.zeros((3, 8, 8), np.uint8), NumberOfFrames=3)
    config: Any = {"kind": "dicom", "path": str(tmp_path), "sort": True, "keep_done_s": 0.0}
    frames = Setting().frames(**config)
    assert frames[lost].fail is not None
    frames[lost].fail("not_released", "no longer bounded")
    assert (tmp_path / "a.dcm").exists() == (lost == 0), "it is sorted with its last frame"
    if lost == 0:
        assert frames[-1].settle is not None
        frames[-1].settle()
    known = frozenset(frame.digest for frame in frames if frame.digest is not None)
    assert Setting(known).frames(**config) == []
    assert (tmp_path / "failed" / "a.dcm").exists(), "the only copy of a lost frame"
    failure = json.loads((tmp_path / "failed" / "a.dcm.json").read_bytes())
    assert failure == {"reason": "not_released", "message": "no longer bounded"}


@pytest.mark.parametrize("taken", [2, 3], ids=["before the last frame", "before the file is sorted"])
def test_a_lost_frame_is_not_forgotten_when_the_agent_ends(tmp_path: Path, taken: int) -> None:
    write_dicom(tmp_path / "a.dcm", np.zeros((3, 8, 8), np.uint8), NumberOfFrames=3)
    config: Any = {"kind": "dicom", "path": str(tmp_path), "sort": True, "keep_done_s": 0.0}
    frames = Setting().frames(**config)
    assert frames[0].fail is not None
    frames[0].fail("not_released", "no longer bounded")
    known = frozenset(frame.digest for frame in frames[:taken] if frame.digest is not None)
    for frame in Setting(known).frames(**config):
        assert taken == 2
        assert frame.settle is not None
        frame.settle()
    assert sorted(path.name for path in (tmp_path / "failed").iterdir()) == ["a.dcm", "a.dcm.json"]
    failure = json.loads((tmp_path / "failed" / "a.dcm.json").read_bytes())
    assert failure == {"reason": "not_released", "message": "no longer bounded"}


def test_a_file_fails_even_where_its_reason_cannot_be_written(tmp_path: Path) -> None:
    """As on a full disk: what stayed in its place would be filed as done at the next start."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "failed" / "bad.png.json").mkdir(parents=True)
    assert Setting().frames(kind="folder", path=str(tmp_path), sort=True) == []
    assert (tmp_path / "failed" / "bad.png").read_bytes() == b"no image"


def test_a_file_that_is_replaced_is_not_sorted_for_the_one_before(tmp_path: Path) -> None:
    config: Any = {"kind": "folder", "path": str(tmp_path), "sort": True}
    latest = tmp_path / "latest.png"
    Image.fromarray(BLACK).save(latest)
    (first,) = Setting().frames(**config)
    assert first.digest is not None
    assert first.settle is not None
    Image.fromarray(BLACK + 1).save(tmp_path / "next.tmp", "PNG")
    (tmp_path / "next.tmp").replace(latest)
    first.settle()
    (second,) = Setting(frozenset([first.digest])).frames(**config)
    assert second.pixels.max() == 1
    assert second.settle is not None
    second.settle()
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["latest.png"]
    assert not latest.exists()


def test_names_that_are_not_utf_8_are_names_like_any_other(tmp_path: Path) -> None:
    config: Any = {"kind": "folder", "path": str(tmp_path), "sort": True}
    for name in ("M\udcfcller.png", "poison\udcff.png", "zzz.png"):  # the bytes FC and FF
        Image.fromarray(BLACK).save(tmp_path / name)
    (tmp_path / "bad\udcff.png").write_bytes(b"no image")
    setting = Setting(poison=(r"poison\udcff.png",))
    odd, plain = setting.frames(**config)
    assert (odd.name, plain.name) == (r"M\udcfcller.png", "zzz.png")
    assert sorted(setting.lost) == ["crashed", "unreadable"]
    failure = json.loads((tmp_path / "failed" / "bad\udcff.png.json").read_bytes())
    assert r"bad\udcff.png" in failure["message"]
    assert odd.digest is not None
    assert odd.settle is not None
    known = Setting(frozenset([odd.digest]))
    assert [frame.name for frame in known.frames(**config)] == ["zzz.png"]
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["M\udcfcller.png"]


def test_a_watched_folder_gives_files_that_come_later(tmp_path: Path) -> None:
    shared = Setting()
    Image.fromarray(BLACK).save(tmp_path / "a.png")
    frames = iter(shared.open(kind="folder", path=str(tmp_path), watch=True))
    assert next(frames).name == "a.png"
    Image.fromarray(BLACK).save(tmp_path / "later.png")
    assert next(frames).name == "later.png"
    shared.stop.set()
    assert list(frames) == []


def test_a_watched_folder_gives_a_file_whose_time_lies_ahead_and_gives_it_once(tmp_path: Path) -> None:
    shared = Setting()
    Image.fromarray(BLACK).save(tmp_path / "ahead.png")
    os.utime(tmp_path / "ahead.png", (time.time() + 86400,) * 2)
    frames = iter(shared.open(kind="folder", path=str(tmp_path), watch=True))
    limit = threading.Timer(30.0, shared.stop.set)
    limit.start()
    assert next(frames).name == "ahead.png"
    Image.fromarray(BLACK).save(tmp_path / "later.png")
    assert next(frames).name == "later.png"
    limit.cancel()


def test_dicom_files_give_each_of_their_frames(tmp_path: Path) -> None:
    dicom = pytest.importorskip("splitward.imaging.dicom")

    def write(path: Path, frames: int) -> None:
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian

        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
        dataset = Dataset()
        dataset.file_meta = meta
        dataset.Rows = dataset.Columns = 8
        dataset.NumberOfFrames, dataset.SamplesPerPixel, dataset.PixelRepresentation = frames, 1, 0
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.PixelData = np.arange(64 * frames, dtype=np.uint8).tobytes()
        dataset.save_as(path, enforce_file_format=True)

    write(tmp_path / "one.dcm", 1)
    write(tmp_path / "three.dcm", 3)
    assert ".dcm" in dicom.SUFFIXES
    config: Any = {"kind": "dicom", "path": str(tmp_path)}
    frames = Setting().frames(**config)
    assert [frame.name for frame in frames] == ["one.dcm", "three.dcm#0", "three.dcm#1", "three.dcm#2"]
    assert all(frame.pixels.shape == (8, 8) for frame in frames)
    known = frozenset(frame.digest for frame in frames[1:3] if frame.digest is not None)
    assert [frame.name for frame in Setting(known).frames(**config)] == ["one.dcm", "three.dcm#2"]


def test_dicom_files_of_media_have_no_suffix(tmp_path: Path) -> None:
    for name in ("DICOM/IM000001", "DICOM/1.2.840.5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_dicom(tmp_path / name, BLACK)
    (tmp_path / "README").write_text("no DICOM")
    (tmp_path / "empty").write_bytes(b"")
    setting = Setting()
    frames = setting.frames(kind="dicom", path=str(tmp_path))
    assert [frame.name for frame in frames] == ["DICOM/1.2.840.5", "DICOM/IM000001"]
    assert setting.lost == []
    assert Setting().frames(kind="folder", path=str(tmp_path)) == []


def test_what_is_being_received_is_not_read(tmp_path: Path) -> None:
    (tmp_path / ".incoming").mkdir()
    write_dicom(tmp_path / ".incoming" / "tmp1.dcm", BLACK)
    assert Setting().frames(kind="dicom", path=str(tmp_path)) == []


@contextlib.contextmanager
def receiving(folder: Path, setting: Setting | None = None, **config: Any) -> Iterator[ReceiverSource]:
    pytest.importorskip("pynetdicom", reason="pynetdicom is not installed: pip install 'splitward[dicom]'")
    config = {
        "kind": "receiver",
        "path": str(folder),
        "listen": f"127.0.0.1:{free_port()}",
        "min_free_bytes": 0,
    } | config
    source = (setting or Setting()).open(**config)
    assert isinstance(source, ReceiverSource)
    try:
        yield source
    finally:
        if source._server in source._server.ae._servers:  # else its iterator has ended
            source._server.shutdown()
        tempfile.tempdir = None


def store(source: ReceiverSource, data: bytes) -> int:
    """The answer to a request to store `data` as the object 1.2.3."""
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(data)
    request = SimpleNamespace(AffectedSOPInstanceUID="1.2.3")
    return source._store(SimpleNamespace(request=request, dataset_path=Path(file.name)))


def dicom_bytes(tmp_path: Path, value: int = 0) -> bytes:
    return write_dicom(tmp_path / "written", np.full((8, 8), value, np.uint8)).read_bytes()


def test_a_received_object_has_its_name_on_the_disk_before_it_is_answered(
    tmp_path: Path, monkeypatch: Any
) -> None:
    real, flushed = os.fsync, []

    def fsync(descriptor: int) -> None:
        real(descriptor)
        at = Path(f"/proc/self/fd/{descriptor}").resolve()
        flushed.append((at.is_dir(), len(list(tmp_path.glob("1.2.3-*.dcm")))))

    monkeypatch.setattr(os, "fsync", fsync)
    with receiving(tmp_path) as source:
        assert store(source, b"object") == SUCCESS
    assert flushed == [(False, 0), (True, 1)], "the object, and then its name in the folder"


def test_two_that_send_the_same_object_at_once_are_both_answered(tmp_path: Path, monkeypatch: Any) -> None:
    both = threading.Barrier(2)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_file():
            both.wait(10)  # neither is renamed before the other is written

    monkeypatch.setattr(os, "fsync", fsync)
    with receiving(tmp_path) as source, ThreadPoolExecutor() as pool:
        for objects, files in (((b"a" * 999, b"a" * 999), 1), ((b"a" * 999, b"b" * 999), 2)):
            assert list(pool.map(lambda data: store(source, data), objects)) == [SUCCESS, SUCCESS]
            assert len(list(tmp_path.glob("1.2.3-*.dcm"))) == files
    assert not list((tmp_path / ".incoming").iterdir())


@contextlib.contextmanager
def reading(source: Source, setting: Setting) -> Iterator[list[Frame]]:
    """Within, somebody takes the frames of `source`."""
    seen: list[Frame] = []
    reader = threading.Thread(target=lambda: seen.extend(source))
    reader.start()
    try:
        yield seen
    finally:
        setting.stop.set()
        reader.join()


def test_a_received_object_that_is_sent_again_is_no_second_frame(tmp_path: Path) -> None:
    folder, setting = tmp_path / "received", Setting()
    first, other = dicom_bytes(tmp_path, 1), dicom_bytes(tmp_path, 2)
    with receiving(folder, setting) as source, reading(source, setting) as seen:
        assert store(source, first) == SUCCESS
        wait_for(lambda: len(seen) == 1)
        (path,) = folder.glob("*.dcm")
        state = path.stat()
        assert store(source, first) == SUCCESS
        assert path.stat() == state, "it waits to be safe, as before"
        assert seen[0].settle is not None
        seen[0].settle()
        assert not list(folder.rglob("*.dcm")), "no raw image is kept"
        assert store(source, first) == SUCCESS
        wait_for(lambda: not path.exists())
        assert store(source, other) == SUCCESS, "the same UID, and other bytes"
        wait_for(lambda: len(seen) == 2)
    assert seen[0].name == path.name != seen[1].name
    assert seen[0].digest is not None
    again = Setting(frozenset([seen[0].digest]))
    with receiving(folder, again) as source, reading(source, again) as later:  # the other was not safe yet
        assert store(source, first) == SUCCESS
        wait_for(lambda: not path.exists() and len(later) == 1)
    assert later[0].name == seen[1].name


def test_a_receiver_takes_the_transfer_syntaxes_that_are_read(tmp_path: Path) -> None:
    from pydicom.uid import (
        DeflatedExplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        JPEG2000Lossless,
        RLELossless,
    )

    with receiving(tmp_path) as source:
        entity = source._server.ae
        (image,) = [
            one for one in entity.supported_contexts if one.abstract_syntax == "1.2.840.10008.5.1.4.1.1.1.2"
        ]
    assert {ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless} <= set(image.transfer_syntax)
    assert DeflatedExplicitVRLittleEndian not in image.transfer_syntax


def test_a_receiver_whose_folder_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(CaptureError, match=r"file/received.*capture\.path"),
        receiving(tmp_path / "file" / "received"),
    ):
        pass


def test_sorted_files_are_kept_for_as_long_as_is_set(tmp_path: Path) -> None:
    config: Any = {"kind": "folder", "path": str(tmp_path), "sort": True}
    for folder in ("done/sub", "failed"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "old.png").write_bytes(b"")
    Setting().frames(**config)
    Setting().frames(**config, keep_done_s=3600.0, keep_failed_s=3600.0)
    assert len(list(tmp_path.rglob("old.png"))) == 2
    Setting().frames(**config, keep_done_s=0.0)
    assert [path.parent.name for path in tmp_path.rglob("old.png")] == ["failed"]
    for name in ("a.png", "b.png"):
        Image.fromarray(BLACK).save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"no image")
    (frame,) = Setting().frames(**config, keep_done_s=0.0, keep_failed_s=0.0)
    assert (tmp_path / "a.png").exists(), "it is not safe yet"
    assert frame.settle is not None
    frame.settle()
    assert not list(tmp_path.rglob("*.png*"))


@pytest.mark.parametrize(
    ("shape", "channels"), [((5, 8, 8), 1), ((5, 8, 8, 3), 3), ((5, 1, 8, 8), 1), ((5, 3, 8, 8), 3)]
)
def test_a_recording_is_replayed_whatever_its_layout(
    tmp_path: Path, shape: tuple[int, ...], channels: int
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "r.npz", images=images)
    frames = Setting().frames(path=str(tmp_path / "r.npz"))
    assert [frame.name for frame in frames] == [f"frame-{index:06d}" for index in range(5)]
    fed = to_frame(frames[3].pixels, InputSpec(channels, 8, 8))
    planes = np.moveaxis(images[3], -1, 0) if shape[-1] == 3 else images[3].reshape(channels, 8, 8)
    np.testing.assert_array_equal(fed, planes.astype(np.float32) / 255)


def test_a_recording_names_its_frames_and_keeps_its_rate(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", images=np.zeros((4, 8, 8), np.uint8), names=np.array(["a", "b", "c", "d"]))
    started_ns = time.monotonic_ns()
    frames = Setting().frames(path=str(tmp_path / "r.npz"), rate_hz=50.0)
    assert [frame.name for frame in frames] == ["a", "b", "c", "d"]
    for number, frame in enumerate(frames):
        assert frame.captured_tick_ns - started_ns >= number * 20e6


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"images": np.zeros((4, 8, 8), np.float32)},
        {"images": np.zeros((4, 8), np.uint8)},
        {"images": np.zeros((4, 8, 8), np.uint8), "names": np.array(["a"])},
        {"images": np.array([{}], dtype=object)},
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(CaptureError, match="images"):
        read_recording(tmp_path / "r.npz")


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    for kind in ("folder", "dicom", "simulator", "video"):
        with pytest.raises(CaptureError, match="nowhere"):
            Setting().frames(kind=kind, path=str(tmp_path / "nowhere"))


@contextlib.contextmanager
def running(setting: Setting, camera: int | str) -> Iterator[None]:
    """Within, somebody waits for the camera's frames."""
    source = setting.open(kind="camera", camera=camera)
    reader = threading.Thread(target=lambda: list(source))
    reader.start()
    try:
        yield
    finally:
        setting.stop.set()
        reader.join()


def test_a_camera_gives_its_newest_frame_and_is_opened_again(tmp_path: Path) -> None:
    import cv2

    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 32))
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 2] = 255  # OpenCV writes blue, green, red
    for _ in range(3):
        film.write(red)
    film.release()
    shared = Setting()
    frames = iter(shared.open(kind="camera", camera=str(tmp_path / "film.avi")))
    seen = [next(frames), next(frames)]  # the film ends before the second: it was opened again
    assert len({frame.name for frame in seen}) == 2
    assert all(frame.pixels[16, 16, 0] > 200 > 50 > frame.pixels[16, 16, 2] for frame in seen)
    assert not any(frame.can_wait for frame in seen)
    assert shared.admitted == 0, "a live scene does not wait for room"
    shared.stop.set()
    assert list(frames) == []


def test_a_camera_without_opencv_is_refused_at_the_start(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(CaptureError, match=r"splitward\[camera\]"):
        Setting().open(kind="camera")
    with pytest.raises(CaptureError, match=r"splitward\[camera\]"):
        try_camera(0)


def test_an_error_of_opencv_is_counted_and_the_camera_opened_again() -> None:
    shared = Setting()
    with running(shared, 1 << 40):  # more than OpenCV can count
        wait_for(lambda: len(shared.lost) >= 2)
    assert set(shared.lost) == {"unreadable"}
    with pytest.raises(CaptureError, match="gives no frame"):
        try_camera(1 << 40)


def test_a_camera_s_login_is_in_no_line(tmp_path: Path, caplog: Any, capfd: Any) -> None:
    address = "rtsp://admin:s3cret@127.0.0.1:1/1"
    with pytest.raises(CaptureError, match=r"camera rtsp://127\.0\.0\.1:1/1: gives no frame"):
        try_camera(address)
    shared = Setting()
    with running(shared, address):
        wait_for(lambda: "gives no frame" in caplog.text)
    assert "s3cret" not in caplog.text + "".join(capfd.readouterr())


def test_a_video_gives_each_frame_once(tmp_path: Path) -> None:
    import cv2

    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 32))
    for grey in (50, 100, 150):
        film.write(np.full((32, 32, 3), grey, np.uint8))
    film.release()
    config: Any = {"kind": "video", "path": str(tmp_path / "film.avi"), "name": "theatre", "priority": 3}
    frames = Setting().frames(**config)
    assert [frame.name for frame in frames] == [f"theatre/film.avi#{index}" for index in range(3)]
    assert [round(frame.pixels.mean(), -1) for frame in frames] == [50, 100, 150]
    assert {frame.priority for frame in frames} == {3}
    known = frozenset(frame.digest for frame in frames[:2] if frame.digest is not None)
    assert [frame.name for frame in Setting(known).frames(**config)] == ["theatre/film.avi#2"]
    (tmp_path / "bad.avi").write_bytes(b"no film")
    setting = Setting()
    assert setting.frames(kind="video", path=str(tmp_path / "bad.avi")) == []
    assert setting.lost == ["unreadable"]
    again = Setting(frozenset(one for one in setting.digests if one is not None))
    assert again.frames(kind="video", path=str(tmp_path / "bad.avi")) == []
    assert again.lost == [], "it is counted once"
