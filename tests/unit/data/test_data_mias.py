from __future__ import annotations

import tarfile

import numpy as np
import pytest
from PIL import Image

from splitward.data import mias, open_dataset
from splitward.errors import DataError

# Rows as they stand in the real file, oddities included: blanks, no place, *NOTE 3*, two findings, prose.
INFO = """MIAS MiniMammographic Database
mdb001 is described below
2) The size of ALL the images is 1024 pixels x 1024 pixels.
mdb001 G CIRC B 535 425 197
mdb002 G CIRC B 522 280 69
mdb003 D NORM\x20
mdb004 D NORM\x20
mdb005 F CIRC B 477 133 30
mdb005 F CIRC B 500 168 26
mdb006 F NORM
mdb059 F CIRC B
mdb060 F NORM
mdb144 F MISC B 233 994 29
mdb144 F MISC M 313 540 27
mdb216 D CALC M *NOTE 3*\x20
"""
NUMBERS = (1, 2, 3, 4, 5, 6, 59, 60, 144, 216)


@pytest.fixture
def folder(tmp_path):
    """Films whose breast is grey 120, with every lesion of INFO drawn at 240 where its row puts it."""
    (tmp_path / "pgm").mkdir()
    (tmp_path / "pgm" / "Info.txt").write_text(INFO)
    findings = mias.read_findings(tmp_path / "pgm" / "Info.txt")
    for number in NUMBERS:
        film = np.zeros((1024, 1024), np.uint8)
        film[:, 200:700] = 120
        for finding in findings:
            if finding.image == number and finding.circle:
                row, column, _ = finding.circle
                film[max(row - 5, 0) : row + 6, column - 5 : column + 6] = 240
        Image.fromarray(film).save(tmp_path / "pgm" / f"mdb{number:03}.pgm")
    return tmp_path


def rows(dataset):
    return [
        (image[0], int(label), int(patient))
        for split in (dataset.train, dataset.validation, dataset.test)
        for image, label, patient in zip(split.images, split.labels, split.patients, strict=True)
    ]


def test_rows_are_read_with_y_from_the_bottom(folder):
    findings = mias.read_findings(folder / "pgm" / "Info.txt")
    assert len(findings) == 12
    assert findings[0] == mias.Finding(1, 1, 1, (1023 - 425, 535, 197))
    assert findings[2] == mias.Finding(3, 2, 0, None)
    assert findings[7] == mias.Finding(59, 0, 1, None)
    assert findings[-1] == mias.Finding(216, 2, 2, None)


@pytest.mark.parametrize("inner", ["", "pgm"])
def test_whole_images_and_their_patients(folder, inner):
    dataset = open_dataset(str(folder / inner), task="severity", size=32)
    assert dataset.classes == ("normal", "benign", "malignant")
    assert sorted((patient, label) for _, label, patient in rows(dataset)) == [
        (1, 1), (1, 1), (2, 0), (2, 0), (3, 0), (3, 1), (30, 0), (30, 1), (72, 2), (108, 2),
    ]  # fmt: skip
    held = [set(split.patients.tolist()) for split in (dataset.train, dataset.validation, dataset.test)]
    assert sum(map(len, held)) == len(set.union(*held)) == 6


def test_density_is_the_default_task(folder):
    dataset = open_dataset(str(folder))
    assert dataset.task == "density"
    assert dataset.train.images.shape[1:] == (1, 64, 64)
    assert sorted(label for _, label, _ in rows(dataset)) == [0] * 5 + [1] * 2 + [2] * 3


def test_regions_hold_their_lesion_in_the_middle(folder):
    dataset = open_dataset(str(folder), task="roi", size=32)
    labels = [label for _, label, _ in rows(dataset)]
    assert sorted(labels) == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    for image, label, patient in rows(dataset):
        if label == 0:
            assert image.min() == 120
        elif patient in (1, 72) and not (patient == 72 and label == 1):
            assert image[16, 16] > image[2, 16], "the lesion is at the centre"
        else:
            assert image.max() > 120


def test_the_seed_moves_the_normal_regions(folder):
    film = np.random.default_rng(0).integers(100, 140, (1024, 1024), np.uint8)
    Image.fromarray(film).save(folder / "pgm" / "mdb003.pgm")
    first, again, other = (
        sorted(
            image.tobytes()
            for image, label, _ in rows(open_dataset(str(folder), task="roi", seed=seed))
            if not label
        )
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_dark_film_still_gives_a_region(folder):
    Image.fromarray(np.zeros((1024, 1024), np.uint8)).save(folder / "pgm" / "mdb003.pgm")
    assert len(rows(open_dataset(str(folder), task="roi"))) == 10


@pytest.mark.parametrize("fault", ["missing", "cut", "small", "empty", "deep"])
def test_one_bad_film_spoils_the_set_by_name(folder, fault):
    path = folder / "pgm" / "mdb005.pgm"
    if fault == "missing":
        path.unlink()
    elif fault == "small":
        Image.fromarray(np.zeros((512, 512), np.uint8)).save(path)
    elif fault == "deep":
        Image.fromarray(np.zeros((1024, 1024), np.uint16)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:1000] if fault == "cut" else b"")
    with pytest.raises(DataError) as caught:
        open_dataset(str(folder))
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "fault"),
    [("", "has no rows"), ("mdb001 X NORM\nmdb1 G NORM\n", "has no rows"),
     ("mdb001 G NORM\nmdb001 D NORM\n", "gives mdb001 two tissues")],
)  # fmt: skip
def test_other_info_files_are_refused(folder, text, fault):
    (folder / "pgm" / "Info.txt").write_text(text)
    with pytest.raises(DataError, match=fault):
        open_dataset(str(folder))


def test_a_wrong_task_lists_the_three(folder):
    with pytest.raises(DataError, match="Its tasks: density, severity, roi"):
        open_dataset(str(folder), task="birads")


@pytest.mark.slow
def test_the_real_films(real_data, tmp_path):
    archive = real_data / "mias.tar.xz"
    if not archive.exists():
        pytest.skip(f"no {archive}")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    density = open_dataset(str(tmp_path), task="density")
    assert np.bincount([label for _, label, _ in rows(density)]).tolist() == [106, 104, 112]
    assert len({patient for _, _, patient in rows(density)}) == 161
    severity = open_dataset(str(tmp_path), task="severity")
    assert np.bincount([label for _, label, _ in rows(severity)]).tolist() == [207, 63, 52]
    roi = open_dataset(str(tmp_path), task="roi")
    counts = np.bincount([label for _, label, _ in rows(roi)]).tolist()
    assert counts[0] == 207
    assert sum(counts) == 207 + 119
    # Lesions are brighter than what surrounds them; with y counted from the top this is gone.
    lesions = np.stack([image for image, label, _ in rows(roi) if label]).astype(float)
    assert lesions[:, 20:44, 20:44].mean() > lesions[:, :8].mean() + 15
