"""Capture end to end: a DICOM receiver, and a corpus of damaged files that must each get a clear error."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge.agent import run_agent
from edge.config import CaptureConfig, EdgeConfig
from edge.settings import load_settings
from firmware_sim.broker import Broker, free_port
from splitward.errors import ConfigError
from tests.integration.cloud_double import cloud_at, configure, read_answers, running
from tests.unit.edge.test_edge_capture import receiving, wait_for

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'splitward[dicom]'")


def make_dicom(number: int, frames: int = 1) -> Any:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.{number}"
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "4711"
    dataset.Rows = dataset.Columns = 8
    dataset.NumberOfFrames, dataset.SamplesPerPixel, dataset.PixelRepresentation = frames, 1, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = np.random.default_rng(number).integers(0, 256, 64 * frames, dtype=np.uint8).tobytes()
    return dataset


def send(
    port: int, datasets: list[Any], title: str = "SPLITWARD", caller: str = "PACS", answered: bool = True
) -> list[int] | None:
    """Statuses of C-STORE requests; None when no association comes about. Not `answered`: those with a status."""
    from pynetdicom import AE
    from pynetdicom.sop_class import SecondaryCaptureImageStorage

    entity = AE(ae_title=caller)
    entity.add_requested_context(SecondaryCaptureImageStorage)
    association = entity.associate("127.0.0.1", port, ae_title=title)
    if not association.is_established:
        return None
    try:
        answers = [association.send_c_store(dataset) for dataset in datasets]
        return [int(answer.Status) for answer in answers if answered or "Status" in answer]
    finally:
        association.release()


def break_off(port: int, dataset: Any) -> int:
    """Send the first part of an object and close the connection; the bytes sent."""
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import SecondaryCaptureImageStorage

    dataset.Rows = dataset.Columns = 1024
    dataset.PixelData = bytes(1024 * 1024)
    sent = []

    def cut(event: Any) -> None:
        sent.append(len(event.data))
        if len(sent) == 8:
            event.assoc.dul.socket.socket.close()

    entity = AE(ae_title="PACS")
    entity.dimse_timeout = 1.0
    entity.add_requested_context(SecondaryCaptureImageStorage)
    association = entity.associate(
        "127.0.0.1", port, ae_title="SPLITWARD", evt_handlers=[(evt.EVT_DATA_SENT, cut)]
    )
    association.send_c_store(dataset)
    return sum(sent)


def receiver(tmp_path: Path, broker: Broker, tiny: Any, **more: Any) -> tuple[EdgeConfig, int]:
    pytest.importorskip("pynetdicom", reason="pynetdicom is not installed: pip install 'splitward[dicom]'")
    port = free_port()
    config = configure(tmp_path, broker, tiny, 1)
    capture = CaptureConfig(
        kind="receiver", path=str(tmp_path / "received"), listen=f"127.0.0.1:{port}", callers=("PACS",), **more
    )
    return msgspec.structs.replace(config, capture=capture), port


def test_what_is_sent_by_dicom_is_answered_and_sorted(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    config, port = receiver(tmp_path, mosquitto, tiny_bundle, keep_done_s=3600.0)
    with cloud_at(mosquitto) as cloud, running(config):
        cloud.wait(lambda: any(one.runtime for one in cloud.statuses.get("device-1", [])))
        assert send(port, [make_dicom(1), make_dicom(2, frames=3), make_dicom(1)]) == [0, 0, 0]
        assert send(port, [make_dicom(3)], title="OTHER") is None
        assert send(port, [make_dicom(3)], caller="STRANGER") is None
        wait_for(lambda: len(read_answers(tmp_path)) == 4)
        assert send(port, [make_dicom(2, frames=3), make_dicom(4)]) == [0, 0], "the first association broke"
        wait_for(lambda: len(read_answers(tmp_path)) == 5)
        done = tmp_path / "received" / "done"
        wait_for(lambda: len(list(done.iterdir())) == 3)
        assert break_off(port, make_dicom(5)) > 0
        wait_for(lambda: not list((tmp_path / "received" / ".incoming").iterdir()))
    names = [path.name.partition("-")[0] for path in done.iterdir()]
    assert sorted(names) == ["1.2.826.0.1.1", "1.2.826.0.1.2", "1.2.826.0.1.4"]
    assert len(cloud.answers) == 5, "an object that was sent twice is one frame"


def test_an_object_that_is_too_large_is_refused_as_it_comes(tmp_path: Path, monkeypatch: Any) -> None:
    from edge import receiver as module

    monkeypatch.setattr(module, "MAX_OBJECT_BYTES", 1 << 20)
    large = make_dicom(1)
    large.Rows = large.Columns = 2048
    large.PixelData = bytes(2048 * 2048)
    port = free_port()
    with receiving(tmp_path, listen=f"127.0.0.1:{port}") as source:
        assert send(port, [large], answered=False) == []
        assert send(port, [make_dicom(2)]) == [0]
        assert source._server.ae.maximum_associations == 4
    assert [path.name.partition("-")[0] for path in tmp_path.rglob("*.dcm")] == ["1.2.826.0.1.2"]


def test_a_receiver_refuses_what_would_fill_the_disk(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    config, port = receiver(tmp_path, mosquitto, tiny_bundle, min_free_bytes=1 << 50)
    with cloud_at(mosquitto) as cloud, running(config) as reports:
        cloud.wait(lambda: any(one.runtime for one in cloud.statuses.get("device-1", [])))
        assert send(port, [make_dicom(1)]) == [0xA700]
    assert reports[0].dropped == {"refused_no_space": 1}
    assert not list((tmp_path / "received").glob("*.dcm"))


def test_names_that_are_not_utf_8_stop_no_device(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 1)
    images = tmp_path / "images"
    images.mkdir()
    black = png(np.zeros((8, 8), np.uint8))
    for name, data in (("M\udcfcller.png", black), ("bad\udcff.png", b"no image"), ("zzz.png", black)):
        (images / name).write_bytes(data)  # the bytes FC and FF
    capture = CaptureConfig(kind="folder", path=str(images), sort=True)
    with cloud_at(mosquitto):
        report = run_agent(msgspec.structs.replace(config, capture=capture), until_answered=True)
    assert report.dropped == {"unreadable": 1}
    assert sorted(read_answers(tmp_path)) == [r"M\udcfcller.png", "zzz.png"]
    assert sorted(path.name for path in (images / "done").iterdir()) == ["M\udcfcller.png", "zzz.png"]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def dicom_bytes(dataset: Any) -> bytes:
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def damaged_images() -> list[bytes]:
    """Images that no reader should take, by cutting, flipping and lying about their size."""
    draw = np.random.default_rng(0)
    whole = png(draw.integers(0, 256, (24, 24), dtype=np.uint8))
    found = [whole[: int(cut)] for cut in np.linspace(0, len(whole) - 60, 40)]
    huge = bytearray(whole)
    huge[16:24] = struct.pack(">II", 1 << 30, 1 << 30)
    found += [
        bytes(huge),
        b"",
        b"GIF89a" + bytes(50),
        b"%PDF-1.4",
        b"\xff\xd8\xff" + bytes(200),
        b"P5\n9 9\n255\n",
    ]
    for start in range(54):
        data = bytearray(whole)
        data[start % 30 : start % 30 + 4] = draw.integers(0, 256, 4, dtype=np.uint8).tobytes()
        found.append(bytes(data[: len(data) - 1 - start]))
    return found


def damaged_dicoms() -> list[bytes]:
    draw = np.random.default_rng(1)
    whole = dicom_bytes(make_dicom(1))
    found = [whole[: int(cut)] for cut in np.linspace(0, len(whole) - 20, 40)]
    for change in (
        {"Rows": 60000, "Columns": 60000},
        {"NumberOfFrames": 10**6},
        {"NumberOfFrames": -1},
        {"PhotometricInterpretation": "NONSENSE"},
        {"BitsAllocated": 7},
        {"SamplesPerPixel": 5},
        {"Rows": 0},
        {"PixelData": b""},
    ):
        dataset = make_dicom(2)
        for key, value in change.items():
            setattr(dataset, key, value)
        found.append(dicom_bytes(dataset))
    report = make_dicom(3)
    del report.Rows, report.PixelData
    found.append(dicom_bytes(report))
    for _ in range(11):
        data = bytearray(whole)
        at = int(draw.integers(140, 250))
        data[at : at + 8] = b"\xff" * 8
        found.append(bytes(data[: at + 40]))
    return found


def damaged_settings() -> list[str]:
    tables = ("device", "capture", "runtime", "broker", "spool", "link", "cloud", "update", "health")
    found = [f"[{table}]\nunknown_key = 1\n" for table in tables]
    found += [f"[{table}\n" for table in tables]
    found += [f"{table} = 3\n" for table in tables]
    found += [f"[{table}s]\n" for table in tables]
    found += ['[device]\nid = "a/b"\n', "[device]\nid = 3\n", '[broker]\nport = "x"\n', "[broker]\nport = 0\n"]
    found += [
        "[capture]\nrate_hz = -1\n",
        '[capture]\nkind = "scanner"\n',
        "[[capture]]\n",
        "\x00",
        "= 1",
        "[a]\n[a]\n",
    ]
    found += [
        '[runtime]\nproviders = ["npu"]\n',
        "[spool]\nmax_bytes = 0\n",
        "[link]\nwindow = 1.5\n",
        "[[sources]]\nkid = 1\n",
    ]
    return found


def test_every_damaged_file_gets_a_clear_error_and_the_agent_goes_on(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    images, dicoms = tmp_path / "images", tmp_path / "dicoms"
    images.mkdir()
    dicoms.mkdir()
    bad = 0
    for number, data in enumerate(damaged_images()):
        (images / f"bad-{number:03d}.png").write_bytes(data)
        bad += 1
    for number, data in enumerate(damaged_dicoms()):
        (dicoms / f"bad-{number:03d}.dcm").write_bytes(data)
        bad += 1
    (images / "z-good.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    (dicoms / "z-good.dcm").write_bytes(dicom_bytes(make_dicom(9)))
    config = configure(tmp_path, mosquitto, tiny_bundle, 1)
    config = msgspec.structs.replace(
        config,
        capture=CaptureConfig(kind="folder", path=str(images), sort=True),
        sources=(CaptureConfig(name="dicom", kind="dicom", path=str(dicoms), sort=True),),
    )
    with cloud_at(mosquitto):
        report = run_agent(config, until_answered=True)
    assert report.dropped == {"unreadable": bad}
    assert sorted(read_answers(tmp_path)) == ["dicom/z-good.dcm", "z-good.png"]
    reasons = [*(images / "failed").glob("*.json"), *(dicoms / "failed").glob("*.json")]
    for path in reasons:
        failure = json.loads(path.read_bytes())
        assert failure["reason"] == "unreadable"
        assert path.name.removesuffix(".json") in failure["message"]
        assert "Traceback" not in failure["message"]
        assert len(failure["message"]) > 30
        assert "Doe" not in failure["message"]
    configs = damaged_settings()
    for text in configs:
        path = tmp_path / "edge.toml"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_settings(path, {})
        assert "edge.toml" in str(caught.value)
    assert len(reasons) == bad
    assert bad + len(configs) >= 200
