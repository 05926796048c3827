"""A labelled set of images in three splits, none of which shares a patient with another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitward.errors import DataError
from splitward.imaging.inputs import Pixels, as_float

__all__ = [
    "FRACTIONS",
    "Dataset",
    "Split",
    "as_float",
    "labelled_folder",
    "split_by_patient",
    "split_images",
    "stack_images",
]

FRACTIONS = (0.7, 0.15, 0.15)
"""Share of the images in train, validation and test where a source brings no split of its own."""


@dataclass(frozen=True, slots=True)
class Split:
    """Images, labels and patients of one split, row by row.

    Attributes
    ----------
    images : ndarray of uint8 or uint16, [N, C, H, W]
        Full scale; `as_float` gives the values that a model takes.
    labels : ndarray of int64, [N]
        Positions in the data set's `classes`.
    patients : ndarray of int64, [N]
        Equal numbers are one patient. They are ordinals, never identifiers from a file.
    """

    images: Pixels
    labels: NDArray[np.int64]
    patients: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Three splits with what a reader must know of them.

    `source` names origin and treatment; `tasks` is what the labels can be read for, where that is more than one.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    synthetic: bool
    licence: str
    source: str
    tasks: tuple[str, ...] = ()

    def in_order(self, classes: tuple[str, ...]) -> Dataset:
        """The same with its classes in another order, such as that of a network that knows them."""
        place = np.array([classes.index(one) for one in self.classes])
        train, validation, test = (
            replace(split, labels=place[split.labels]) for split in (self.train, self.validation, self.test)
        )
        return replace(self, classes=classes, train=train, validation=validation, test=test)

    def digest(self) -> str:
        """32 hexadecimal digits that name all images and labels; a second for each GB of them."""
        found = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        for split in (self.train, self.validation, self.test):
            for array in (split.images, split.labels):
                found.update(f"{array.dtype.str} {array.shape}".encode())
                found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()


def split_by_patient(
    patients: NDArray[np.int64], labels: NDArray[np.int64], fractions: Sequence[float], seed: int
) -> list[NDArray[np.int64]]:
    """Row numbers of each split: no patient in two, classes in the same proportions as far as possible.

    Patients are dealt out largest first, in an order that `seed` shuffles within equal sizes; each goes to the
    split that lacks most of the patient's classes. Every split gets at least one patient.

    Parameters
    ----------
    patients, labels : ndarray of int64, [N]
    fractions : sequence of float
        Positive shares of the splits, summing to 1.
    seed : int
        The same seed and rows give the same splits.

    Returns
    -------
    list of ndarray of int64
        Ascending row numbers, one array per fraction.

    Raises
    ------
    DataError
        Fewer patients than splits.
    """
    _, patient_of = np.unique(patients, return_inverse=True)
    _, class_of = np.unique(labels, return_inverse=True)
    counts = np.zeros((patient_of.max(initial=-1) + 1, class_of.max(initial=-1) + 1))
    np.add.at(counts, (patient_of, class_of), 1)
    if len(counts) < len(fractions):
        raise DataError(
            f"{len(counts)} patients cannot fill {len(fractions)} splits; give more, or correct the patients."
        )
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    split_of = np.empty(len(counts), np.int64)
    lacking = np.outer(fractions, counts.sum(0))
    for patient in order:
        # The second term breaks ties between classes by the room that is left over all classes.
        need = lacking @ counts[patient] + 1e-6 * lacking.sum(1)
        split_of[patient] = chosen = int(need.argmax())
        lacking[chosen] -= counts[patient]
    _fill_empty(split_of, order, len(fractions))
    return [np.flatnonzero(split_of[patient_of] == split) for split in range(len(fractions))]


def _fill_empty(split_of: NDArray[np.int64], order: NDArray[np.int64], splits: int) -> None:
    """Give each empty split the last-dealt patient of the split that has most patients."""
    for split in range(splits):
        held = np.bincount(split_of, minlength=splits)
        if held[split] == 0:
            smallest = order[split_of[order] == held.argmax()][-1]
            split_of[smallest] = split


def split_images(
    images: Pixels, labels: NDArray[np.int64], patients: NDArray[np.int64], seed: int
) -> tuple[Split, Split, Split]:
    """Train, validation and test split of a source that brings none, by patient in `FRACTIONS`."""
    train, validation, test = (
        Split(images[rows], labels[rows], patients[rows])
        for rows in split_by_patient(patients, labels, FRACTIONS, seed)
    )
    return train, validation, test


def labelled_folder(
    folder: Path,
    task: str,
    images: Sequence[Pixels],
    labels: Sequence[str],
    patients: Sequence[str],
    seed: int,
    source: str,
) -> Dataset:
    """Data set of a user's own images [C, H, W]; labels and patients are names, and the latter become ordinals.

    Raises
    ------
    DataError
        Fewer patients than splits.
    """
    classes, positions = np.unique(labels, return_inverse=True)
    _, ordinals = np.unique(patients, return_inverse=True)
    try:
        train, validation, test = split_images(stack_images(images), positions, ordinals, seed)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    return Dataset(
        name=folder.name,
        task=task,
        classes=tuple(map(str, classes)),
        train=train,
        validation=validation,
        test=test,
        synthetic=False,
        licence="not stated by the files",
        source=f"{source}; split by patient",
    )


def stack_images(images: Sequence[Pixels]) -> Pixels:
    """Stack [C, H, W] images of one size: beside RGB grey is repeated, beside 16 bits 8 are scaled up."""
    channels = max(len(image) for image in images)
    deep = any(image.dtype == np.uint16 for image in images)
    return np.stack([_widen(image, channels, deep) for image in images])


def _widen(image: Pixels, channels: int, deep: bool) -> Pixels:
    if len(image) < channels:
        image = np.repeat(image, channels, axis=0)
    if deep and image.dtype == np.uint8:
        return image.astype(np.uint16) * np.uint16(257)  # 255 * 257 = 65535
    return image
