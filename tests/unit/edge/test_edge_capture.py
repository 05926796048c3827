"""Sources: every frame once, in order; what cannot be read is counted and passed over."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge.capture import Capture, open_source, read_recording
from edge.config import CaptureConfig
from edge.errors import CaptureError
from splitward.imaging.inputs import to_frame
from splitward.wire.bundle import InputSpec

BLACK = np.zeros((8, 8), np.uint8)


def capture(known: frozenset[int] = frozenset(), rate_hz: float = 0.0) -> tuple[Capture, list[str]]:
    dropped: list[str] = []
    return Capture(rate_hz, threading.Event(), known, dropped.append), dropped


def test_a_folder_gives_its_images_by_name_and_passes_over_bad_files(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "b").mkdir()
    for name in ("c.png", "a.png", "b/z.pgm"):
        Image.fromarray(BLACK).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    shared, dropped = capture()
    frames = list(open_source(CaptureConfig(kind="folder", path=str(tmp_path)), shared))
    assert [frame.name for frame in frames] == ["a.png", "b/z.pgm", "c.png"]
    assert dropped == ["unreadable"]
    assert "bad.png" in caplog.text
    assert all(frame.pixels.shape == (8, 8) for frame in frames)


def test_known_frames_are_passed_over_until_the_file_changes(tmp_path: Path) -> None:
    config = CaptureConfig(kind="folder", path=str(tmp_path))
    for name in ("a.png", "b.png"):
        Image.fromarray(BLACK).save(tmp_path / name)
    first, _ = list(open_source(config, capture()[0]))
    assert first.digest is not None
    shared, _ = capture(frozenset([first.digest]))
    assert [frame.name for frame in open_source(config, shared)] == ["b.png"]
    Image.fromarray(BLACK + 1).save(tmp_path / "a.png")
    assert [frame.name for frame in open_source(config, shared)] == ["a.png", "b.png"]


def test_a_watched_folder_gives_files_that_come_later(tmp_path: Path) -> None:
    shared, _ = capture()
    Image.fromarray(BLACK).save(tmp_path / "a.png")
    frames = iter(open_source(CaptureConfig(kind="folder", path=str(tmp_path), watch=True), shared))
    assert next(frames).name == "a.png"
    Image.fromarray(BLACK).save(tmp_path / "later.png")
    assert next(frames).name == "later.png"
    shared.stop.set()
    assert list(frames) == []


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
    config = CaptureConfig(kind="dicom", path=str(tmp_path))
    frames = list(open_source(config, capture()[0]))
    assert [frame.name for frame in frames] == ["one.dcm", "three.dcm#0", "three.dcm#1", "three.dcm#2"]
    assert all(frame.pixels.shape == (8, 8) for frame in frames)
    known = frozenset(frame.digest for frame in frames[1:3] if frame.digest is not None)
    assert [frame.name for frame in open_source(config, capture(known)[0])] == ["one.dcm", "three.dcm#2"]


@pytest.mark.parametrize(
    ("shape", "channels"), [((5, 8, 8), 1), ((5, 8, 8, 3), 3), ((5, 1, 8, 8), 1), ((5, 3, 8, 8), 3)]
)
def test_a_recording_is_replayed_whatever_its_layout(
    tmp_path: Path, shape: tuple[int, ...], channels: int
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "r.npz", images=images)
    frames = list(open_source(CaptureConfig(path=str(tmp_path / "r.npz")), capture()[0]))
    assert [frame.name for frame in frames] == [f"frame-{index:06d}" for index in range(5)]
    fed = to_frame(frames[3].pixels, InputSpec(channels, 8, 8))
    planes = np.moveaxis(images[3], -1, 0) if shape[-1] == 3 else images[3].reshape(channels, 8, 8)
    np.testing.assert_array_equal(fed, planes.astype(np.float32) / 255)


def test_a_recording_names_its_frames_and_keeps_its_rate(tmp_path: Path) -> None:
    np.savez(tmp_path / "r.npz", images=np.zeros((4, 8, 8), np.uint8), names=np.array(["a", "b", "c", "d"]))
    frames = list(open_source(CaptureConfig(path=str(tmp_path / "r.npz")), capture(rate_hz=50.0)[0]))
    assert [frame.name for frame in frames] == ["a", "b", "c", "d"]
    gaps_ns = [late.captured_tick_ns - early.captured_tick_ns for early, late in itertools.pairwise(frames)]
    assert min(gaps_ns) > 10e6


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
    for kind in ("folder", "dicom", "simulator"):
        with pytest.raises(CaptureError, match="nowhere"):
            list(open_source(CaptureConfig(kind=kind, path=str(tmp_path / "nowhere")), capture()[0]))


def test_a_camera_gives_its_newest_frame_and_is_opened_again(tmp_path: Path) -> None:
    import cv2

    film = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (32, 32))
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 2] = 255  # OpenCV writes blue, green, red
    for _ in range(3):
        film.write(red)
    film.release()
    shared, _ = capture()
    source = open_source(CaptureConfig(kind="camera", camera=str(tmp_path / "film.avi")), shared)
    assert source.real_time
    frames = iter(source)
    seen = [next(frames), next(frames)]  # the film ends before the second: it was opened again
    assert len({frame.name for frame in seen}) == 2
    assert all(frame.pixels[16, 16, 0] > 200 > 50 > frame.pixels[16, 16, 2] for frame in seen)
    shared.stop.set()
    assert list(frames) == []
