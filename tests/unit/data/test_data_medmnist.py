from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from splitward.data import open_dataset
from splitward.errors import DataError

COUNTS = {"train": 12, "val": 6, "test": 5}


def make_arrays(shape=(28, 28), classes=2):
    generator = np.random.default_rng(7)
    arrays = {}
    for split, count in COUNTS.items():
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return arrays


def write(path, arrays):
    np.savez_compressed(path, **arrays)
    return str(path)


def test_grey_and_colour_archives(tmp_path):
    grey = open_dataset(write(tmp_path / "grey.npz", make_arrays()))
    assert grey.train.images.shape == (12, 1, 28, 28)
    assert grey.classes == ("0", "1")
    arrays = make_arrays((28, 28, 3), classes=4)
    colour = open_dataset(write(tmp_path / "colour.npz", arrays))
    assert colour.classes == ("0", "1", "2", "3")
    assert np.array_equal(colour.test.images, np.moveaxis(arrays["test_images"], 3, 1))
    assert open_dataset(str(tmp_path / "colour.npz"), size=16).test.images.shape == (5, 3, 16, 16)


def test_every_image_is_its_own_patient(tmp_path):
    dataset = open_dataset(write(tmp_path / "a.npz", make_arrays()))
    patients = np.concatenate([dataset.train.patients, dataset.validation.patients, dataset.test.patients])
    assert len(set(patients.tolist())) == sum(COUNTS.values())


def test_validation_copies_are_dropped_and_test_copies_reported(tmp_path):
    arrays = make_arrays()
    arrays["val_images"][1] = arrays["train_images"][4]
    arrays["val_images"][2] = arrays["test_images"][0]
    arrays["test_images"][3] = arrays["train_images"][0]
    dataset = open_dataset(write(tmp_path / "a.npz", arrays))
    assert np.array_equal(dataset.validation.images[:, 0], arrays["val_images"][[0, 3, 4, 5]])
    assert dataset.validation.labels.tolist() == [0, 1, 0, 1]
    assert len(dataset.test) == 5
    assert "2 validation images dropped" in dataset.source
    assert "1 test images also stand in train" in dataset.source


def bomb() -> bytes:
    """Two members whose directory entries declare 4 GiB each over a few bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "val"):
            archive.writestr(f"{split}_images.npy", b"\x93NUMPY")
    first, *entries = buffer.getvalue().split(b"PK\x01\x02")
    size = (0xFFFFFFF0).to_bytes(4, "little")
    return b"PK\x01\x02".join([first, *(entry[:20] + size + entry[24:] for entry in entries)])


def npz(**replaced) -> bytes:
    buffer = io.BytesIO()
    arrays = {**make_arrays(), **replaced}
    np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


def lying_header() -> bytes:
    """An array that declares 2**40 rows over a few bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 28, 28), }\n"
        length = len(header).to_bytes(2, "little")
        archive.writestr("train_images.npy", b"\x93NUMPY\x01\x00" + length + header + bytes(64))
    return buffer.getvalue()


def encrypted() -> bytes:
    """An archive in which one flipped bit calls an entry encrypted."""
    data = bytearray(npz())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def with_entry(name: str, data: bytes) -> bytes:
    """An archive in which these bytes stand for an array."""
    buffer = io.BytesIO(npz(**{name: None}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def open_header() -> bytes:
    """An array in whose header a bracket is never closed."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (12, 28, 28, \n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


HOSTILE = {
    "empty": (b"", "no whole .npz"),
    "text": (b"not a zip", "no whole .npz"),
    "half": (npz()[:3000], "no whole .npz"),
    "bomb": (bomb(), "over the limit"),
    "lying_header": (lying_header(), "no whole .npz"),
    "encrypted": (encrypted(), "no whole .npz"),
    "open_header": (with_entry("train_images", open_header()), "no whole .npz"),
    "no_array": (with_entry("train_images", b"notes"), "train_images is no array"),
    "no_array_of_labels": (with_entry("val_labels", b""), "val_labels is no array"),
    "no_test": (npz(test_images=None), "It must hold"),
    "pickled": (npz(train_labels=np.array([{"a": 1}] * 12, object)), "no whole .npz"),
    "float_images": (npz(val_images=np.zeros((6, 28, 28))), "val_images is float64"),
    "volumes": (npz(train_images=np.zeros((12, 28, 28, 28), np.uint8)), "train_images is uint8"),
    "many_labels": (npz(test_labels=np.zeros((5, 14), np.uint8)), "test_labels is uint8"),
    "fewer_labels": (npz(test_labels=np.zeros((4, 1), np.uint8)), "test_labels is uint8"),
    "float_labels": (npz(test_labels=np.zeros((5, 1))), "test_labels is float64"),
    "negative_labels": (npz(test_labels=np.full((5, 1), -1)), "negative label"),
    "too_many_classes": (npz(train_labels=np.full((12, 1), 400_000_000)), "has the label 400000000"),
    "label_beyond_int64": (
        npz(test_labels=np.full((5, 1), 2**64 - 1, np.uint64)),
        f"has the label {2**64 - 1}",
    ),
    "one_class": (
        npz(**{f"{split}_labels": np.ones((count, 1), np.uint8) for split, count in COUNTS.items()}),
        "every image has the label 1",
    ),
    "validation_in_test": (
        npz(val_images=make_arrays()["test_images"], val_labels=make_arrays()["test_labels"]),
        "every validation image also stands",
    ),
    "no_images": (
        npz(val_images=np.zeros((0, 28, 28), np.uint8), val_labels=np.zeros((0, 1), np.uint8)),
        "val is empty",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, name):
    data, fault = HOSTILE[name]
    path = tmp_path / f"{name}.npz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=fault) as caught:
        open_dataset(str(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_archive_and_a_third_class_of_pneumonia(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_dataset(str(tmp_path / "none.npz"))
    with pytest.raises(DataError, match="label 2, but pneumoniamnist has 2 classes"):
        open_dataset(write(tmp_path / "pneumoniamnist.npz", make_arrays(classes=3)))


def test_real_pneumoniamnist(real_data):
    path = real_data / "pneumoniamnist.npz"
    if not path.exists():
        pytest.skip(f"no {path}")
    dataset = open_dataset(str(path))
    assert dataset.classes == ("normal", "pneumonia")
    assert np.bincount(dataset.train.labels).tolist() == [1214, 3494]
    assert np.bincount(dataset.test.labels).tolist() == [234, 390]
    assert len(dataset.validation) == 516
    assert "8 validation images dropped" in dataset.source
    assert dataset.licence.startswith("CC BY 4.0")
