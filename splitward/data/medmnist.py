"""MedMNIST archives: one .npz with {train,val,test}_{images,labels} (Yang et al., Scientific Data 10:41, 2023).

The archives name no patients, so each image counts as its own; images that stand in more than one split are
found by their bytes.
"""

from __future__ import annotations

import hashlib
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitward.data.dataset import Dataset, Split
from splitward.errors import DataError
from splitward.imaging.inputs import Pixels, fit_pixels
from splitward.wire.bundle import InputSpec

TASKS = ("classes",)
MAX_BYTES = 4 << 30
MAX_CLASSES = 1000
# What damaged archives raise: MemoryError comes of a header that declares more than there is memory, RuntimeError of an
# entry that says that it is encrypted, TokenError of a header that is no Python.
_BROKEN = (
    OSError,
    EOFError,
    MemoryError,
    RuntimeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
_SPLITS = ("train", "val", "test")
_CLASSES = {"pneumoniamnist": ("normal", "pneumonia")}
_LICENCES = {"pneumoniamnist": "CC BY 4.0 (MedMNIST v2, Yang et al. 2023)"}

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def load(path: Path, task: str, size: int | None) -> Dataset:
    """Read the archive at `path`; validation images that also stand in train or test are dropped.

    Raises
    ------
    DataError
        The file is missing, damaged, over `MAX_BYTES` unpacked, or not of that layout with one label per image; it
        has one class, or over `MAX_CLASSES`; or every validation image also stands in train or test.
    """
    arrays = _read(path)
    known = path.stem.lower().split("_")[0]
    highest = max(int(labels.max()) for _, labels in arrays.values())
    if len(np.unique(np.concatenate([labels for _, labels in arrays.values()]))) < 2:
        raise DataError(f"{path}: every image has the label {highest}. A training needs two classes or more.")
    classes = _CLASSES.get(known, tuple(str(label) for label in range(highest + 1)))
    if highest >= len(classes):
        raise DataError(
            f"{path}: has the label {highest}, but {known} has {len(classes)} classes. Fetch it again."
        )
    hashes = {split: [_digest(image) for image in images] for split, (images, _) in arrays.items()}
    elsewhere = {*hashes["train"], *hashes["test"]}
    kept = np.array([value not in elsewhere for value in hashes["val"]], np.bool_)
    dropped = int((~kept).sum())
    if not kept.any():
        raise DataError(
            f"{path}: every validation image also stands in train or test. Take val_images out of train_images."
        )
    trained = set(hashes["train"])
    shared = sum(value in trained for value in hashes["test"])
    arrays["val"] = (arrays["val"][0][kept], arrays["val"][1][kept])
    starts = np.cumsum([0, *(len(labels) for _, labels in arrays.values())])
    train, validation, test = (
        Split(_shape(arrays[split][0], size), arrays[split][1], start + np.arange(len(arrays[split][1])))
        for split, start in zip(_SPLITS, starts, strict=False)
    )
    return Dataset(
        name=path.stem,
        task=task,
        classes=classes,
        train=train,
        validation=validation,
        test=test,
        synthetic=False,
        licence=_LICENCES.get(known, "not stated by the file"),
        source=(
            f"MedMNIST layout; patients unknown, each image its own; {dropped} validation images dropped that "
            f"also stand in train or test; {shared} test images also stand in train and were kept"
        ),
    )


def _read(path: Path) -> dict[str, Arrays]:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_BYTES:
            raise DataError(
                f"{path}: unpacks to {unpacked} bytes, over the limit of {MAX_BYTES}. Take a smaller size."
            )
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {split: _read_split(path, archive, split) for split in _SPLITS}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the path.") from None
    except KeyError as error:
        raise DataError(f"{path}: {error}. It must hold {{train,val,test}}_{{images,labels}}.") from error
    except _BROKEN as error:
        raise DataError(f"{path}: is no whole .npz archive: {error}. Fetch it again.") from error


def _read_split(path: Path, archive: np.lib.npyio.NpzFile, split: str) -> Arrays:
    images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    for name, array in (("images", images), ("labels", labels)):
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of what is no .npy
            raise DataError(f"{path}: {split}_{name} is no array. Fetch it again.")
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)):
        raise DataError(
            f"{path}: {split}_images is {images.dtype} {list(images.shape)}; "
            "it must be uint8 [N, H, W] or [N, H, W, 3]."
        )
    if labels.shape not in ((len(images), 1), (len(images),)) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: {split}_labels is {labels.dtype} {list(labels.shape)}; "
            "it must be one integer per image, [N, 1]."
        )
    if images.size == 0 or int(labels.min()) < 0:
        raise DataError(f"{path}: {split} is empty or has a negative label. Fetch it again.")
    highest = int(labels.max())  # before the cast, which would make it negative
    if highest >= MAX_CLASSES:
        raise DataError(
            f"{path}: has the label {highest}. Number the classes from 0; {MAX_CLASSES} are the most."
        )
    return images, labels.reshape(-1).astype(np.int64)


def _digest(image: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _shape(images: NDArray[np.uint8], size: int | None) -> Pixels:
    channels = 3 if images.ndim == 4 else 1
    height, width = (size, size) if size else images.shape[1:3]
    if len(images) == 0:
        return np.zeros((0, channels, height, width), np.uint8)
    return np.stack([fit_pixels(image, InputSpec(channels, height, width)) for image in images])
