from __future__ import annotations

import csv

import numpy as np
import pytest
from PIL import Image

from splitward.data import as_float, open_dataset
from splitward.errors import DataError
from splitward.imaging.files import read_image
from splitward.imaging.inputs import to_frame
from splitward.wire.bundle import InputSpec

SPLITS = ("train", "validation", "test")


def draw(seed: int, *, colour: bool = False, dtype=np.uint8) -> np.ndarray:
    shape = (20, 30, 3) if colour else (20, 30)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype)


def write_table(path, header, rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def images(tmp_path):
    """Eight patients of two images each in class folders `calm` and `odd`; the file name names them."""
    for patient in range(8):
        for view in range(2):
            folder = tmp_path / ("odd" if patient % 2 else "calm")
            folder.mkdir(exist_ok=True)
            Image.fromarray(draw(10 * patient + view)).save(folder / f"p{patient}_{view}.png")
    return tmp_path


def all_rows(dataset):
    return [
        (image, int(label), int(patient))
        for name in SPLITS
        for image, label, patient in zip(
            getattr(dataset, name).images,
            getattr(dataset, name).labels,
            getattr(dataset, name).patients,
            strict=True,
        )
    ]


def assert_patients_apart(dataset):
    held = [set(getattr(dataset, name).patients.tolist()) for name in SPLITS]
    assert all(held)
    assert sum(map(len, held)) == len(set.union(*held))


def test_class_folders_with_patients_in_the_file_names(images):
    dataset = open_dataset(str(images), size=16)
    assert dataset.classes == ("calm", "odd")
    assert not dataset.synthetic
    assert len(all_rows(dataset)) == 16
    assert_patients_apart(dataset)
    assert len({patient for _, _, patient in all_rows(dataset)}) == 8
    assert all(label == patient % 2 for _, label, patient in all_rows(dataset))


def test_what_is_trained_on_is_what_the_device_sees(images):
    dataset = open_dataset(str(images), size=16)
    path = images / "odd" / "p3_1.png"
    frame = to_frame(read_image(path), InputSpec(1, 16, 16))
    assert any(np.array_equal(as_float(image), frame) for image, _, _ in all_rows(dataset))


def test_mixed_depths_and_colours_are_widened(images):
    Image.fromarray(draw(90, dtype=np.uint16)).save(images / "calm" / "p8_0.png")
    Image.fromarray(draw(91, colour=True)).save(images / "odd" / "p9_0.png")
    dataset = open_dataset(str(images), size=16)
    assert dataset.train.images.shape[1:] == (3, 16, 16)
    assert dataset.train.images.dtype == np.uint16
    frame = to_frame(read_image(images / "calm" / "p0_0.png"), InputSpec(3, 16, 16))
    assert any(np.allclose(as_float(image), frame, atol=1e-6) for image, _, _ in all_rows(dataset))


def test_patients_csv_overrules_file_names(images):
    files = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    write_table(images / "patients.csv", ["file", "patient"], [(name, i // 4) for i, name in enumerate(files)])
    dataset = open_dataset(str(images), size=8)
    assert len({patient for _, _, patient in all_rows(dataset)}) == 4
    assert_patients_apart(dataset)
    write_table(images / "patients.csv", ["file", "patient"], [(files[0], "a")])
    with pytest.raises(DataError, match="has no row for"):
        open_dataset(str(images))


def test_labels_csv_needs_no_class_folders(tmp_path):
    for number in range(6):
        Image.fromarray(draw(number)).save(tmp_path / f"{number}.png")
    table = [(f"{number}.png", "ab"[number % 2], f"patient {number // 2}") for number in range(6)]
    write_table(tmp_path / "labels.csv", ["file", "label", "patient"], table)
    dataset = open_dataset(str(tmp_path), size=8)
    assert dataset.classes == ("a", "b")
    assert [len(getattr(dataset, name)) for name in SPLITS] == [2, 2, 2]
    assert_patients_apart(dataset)


def test_numbered_files_of_unknown_patients_ask_for_patients_csv(tmp_path):
    for number in range(6):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(draw(number)).save(folder / f"IMG_{number:04}.png")
    with pytest.raises(DataError, match=r"1 patients cannot fill 3 splits.*patients\.csv"):
        open_dataset(str(tmp_path))


def draw_all(folder, names) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(number)).save(folder / name)


@pytest.mark.parametrize("name", ["{view}.png", "scan-{view}.png", "left/{patient}{view}.png"])
def test_a_folder_within_the_class_is_a_patient(tmp_path, name):
    draw_all(
        tmp_path,
        ["ab"[patient % 2] + f"/P{patient}/" + name.format(patient=patient, view=view)
         for patient in range(20) for view in range(10)],
    )  # fmt: skip
    dataset = open_dataset(str(tmp_path), size=8)
    assert len({patient for _, _, patient in all_rows(dataset)}) == 20
    assert "patients by folder" in dataset.source
    folder_of = {
        to_frame(read_image(path), InputSpec(1, 8, 8)).tobytes(): path.relative_to(tmp_path).parts[1]
        for path in tmp_path.rglob("*.png")
    }
    held = [
        {folder_of[as_float(image).tobytes()] for image in getattr(dataset, split).images} for split in SPLITS
    ]
    assert sum(map(len, held)) == len(set.union(*held)) == 20


def test_a_patient_with_folders_in_two_classes_is_one(tmp_path):
    draw_all(
        tmp_path, [f"{label}/P{patient}/{view}.png" for label in "ab" for patient in range(4) for view in "01"]
    )
    dataset = open_dataset(str(tmp_path), size=8)
    assert len({patient for _, _, patient in all_rows(dataset)}) == 4
    assert_patients_apart(dataset)


@pytest.mark.parametrize("loose", ["a/P1_7.png", "b/IMG_0001.png"])
def test_files_beside_patient_folders_are_refused_until_a_table_names_their_patients(tmp_path, loose):
    names = [*(f"{'ab'[patient % 2]}/P{patient}/{view}.png" for patient in range(6) for view in "01"), loose]
    draw_all(tmp_path, names)
    with pytest.raises(DataError, match=r"whose they are is not plain\. Name them in a patients\.csv"):
        open_dataset(str(tmp_path))
    write_table(tmp_path / "patients.csv", ["file", "patient"], [(name, name[2:4]) for name in names])
    assert_patients_apart(open_dataset(str(tmp_path), size=8))


def test_a_table_without_patients_may_have_its_files_in_one_folder_only(tmp_path):
    names = [f"images/p{patient}_{view}.png" for patient in range(6) for view in "01"]
    draw_all(tmp_path, [*names, *(f"more/p{patient}_9.png" for patient in range(6))])
    table = [(name, "ab"[number % 2]) for number, name in enumerate(names)]
    write_table(tmp_path / "labels.csv", ["file", "label"], table)
    dataset = open_dataset(str(tmp_path), size=8)
    assert len({patient for _, _, patient in all_rows(dataset)}) == 6
    write_table(tmp_path / "labels.csv", ["file", "label"], [*table, ("more/p0_9.png", "a")])
    with pytest.raises(DataError, match=r"several folders\. Name them in a column `patient` of labels\.csv"):
        open_dataset(str(tmp_path))


def test_blanks_around_the_values_of_a_table_count_for_nothing(tmp_path):
    draw_all(tmp_path, [f"{number}.png" for number in range(6)])
    rows = "".join(
        f"{number}.png,{blank}{'ab'[number // 2 % 2]}{blank},{blank}P{number // 2}\n"
        for number, blank in enumerate(["", " "] * 3)
    )
    (tmp_path / "labels.csv").write_text(f"file, label, patient\n{rows}")
    dataset = open_dataset(str(tmp_path), size=8)
    assert dataset.classes == ("a", "b")
    assert len({patient for _, _, patient in all_rows(dataset)}) == 3
    assert_patients_apart(dataset)


def test_hidden_files_are_left_out(images):
    (images / "calm" / ".DS_Store").write_bytes(b"x")
    (images / "calm" / "Thumbs.db").write_bytes(b"x")
    (images / ".cache").mkdir()
    (images / ".cache" / "x.png").write_bytes(b"x")
    (images / "LICENCE").write_text("free")
    assert open_dataset(str(images), size=8).classes == ("calm", "odd")


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("p1_9.png", b"", "no whole image"),
        ("p1_9.jpg", b"\xff\xd8\xff\xe0 cut", "no whole image|truncated"),
        ("p1_9.txt", b"notes", "is no image file"),
        ("p1_9.svg", b"<svg/>", "is no image file"),
    ],
)
def test_one_bad_file_spoils_the_folder_by_name(images, name, data, fault):
    (images / "odd" / name).write_bytes(data)
    with pytest.raises(DataError, match=fault) as caught:
        open_dataset(str(images))
    assert str(images / "odd" / name) in str(caught.value)


HOSTILE_TABLES = {
    "no_label_column": (b"file,patient\n0.png,a\n", "has no column 'label'"),
    "empty": (b"", "has no column 'file'"),
    "empty_label": (b"file,label\n0.png,\n", "line 2: has an empty"),
    "blank_patient": (b"file,label,patient\n0.png,a, \n", "line 2: has an empty"),
    "short_row": (b"file,label\n0.png\n", "line 2: has a missing"),
    "long_row": (b"file,label\n0.png,a,b\n", "line 2: has a missing"),
    "missing_file": (b"file,label\n7.png,a\n", "line 2: 7.png is not there"),
    "twice": (b"file,label\n0.png,a\n0.png,b\n", "line 3: 0.png is listed twice"),
    "twice_but_for_blanks": (b"file,label\n0.png,a\n 0.png ,b\n", "line 3: 0.png is listed twice"),
    "outside": (b"file,label\n../x.png,a\n", "lies outside the folder"),
    "absolute": (b"file,label\n/etc/hostname,a\n", "lies outside the folder"),
    "binary": (b"\xff\xfe\x00f", "is no CSV file in UTF-8"),
    "nul_in_name": (b"file,label\n0\x00.png,a\n", "labels.csv"),
    "open_quote": (b'file,label\n"0.png,a\n', "is no CSV file"),
    "one_class": (b"file,label\n0.png,a\n", "holds 1 class"),
    "header_only": (b"file,label\n", "holds no labels.csv"),
}


@pytest.mark.parametrize("name", HOSTILE_TABLES)
def test_hostile_tables_are_refused(tmp_path, name):
    data, fault = HOSTILE_TABLES[name]
    Image.fromarray(draw(0)).save(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(DataError, match=fault):
        open_dataset(str(tmp_path))


def write_dicom(path, seed, patient, frames=1):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.PatientID = patient
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 20, 30, frames
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    pixels = np.random.default_rng(seed).integers(0, 4096, (frames, 20, 30), np.uint16)
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    path.parent.mkdir(exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def test_dicom_class_folders_group_by_patient_id(tmp_path):
    for number in range(8):
        write_dicom(
            tmp_path / "ab"[number % 2] / f"IM{number}", number, f"ID{number // 2}", frames=1 + number % 2
        )
    dataset = open_dataset(str(tmp_path), size=16)
    assert dataset.train.images.dtype == np.uint16
    assert len(all_rows(dataset)) == 12
    assert len({patient for _, _, patient in all_rows(dataset)}) == 4
    assert_patients_apart(dataset)
    assert "ID" not in repr(dataset)


def test_dicom_labels_csv_may_name_the_patients(tmp_path):
    for number in range(6):
        write_dicom(tmp_path / f"{number}.dcm", number, "")
    table = [(f"{number}.dcm", "ab"[number % 2]) for number in range(6)]
    write_table(tmp_path / "labels.csv", ["file", "label"], table)
    with pytest.raises(DataError, match="has no Patient ID"):
        open_dataset(str(tmp_path))
    write_table(
        tmp_path / "labels.csv",
        ["file", "label", "patient"],
        [(*row, f"P{number // 2}") for number, row in enumerate(table)],
    )
    dataset = open_dataset(str(tmp_path), size=16)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [2, 2, 2]


def test_one_bad_dicom_file_spoils_the_folder_by_name(tmp_path):
    for number in range(6):
        write_dicom(tmp_path / "ab"[number % 2] / f"{number}.dcm", number, f"ID{number}")
    bad = tmp_path / "b" / "9.dcm"
    bad.write_bytes((tmp_path / "b" / "1.dcm").read_bytes()[:700])
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path))
    assert str(caught.value).startswith(f"{bad}: ")
