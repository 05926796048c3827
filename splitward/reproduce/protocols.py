"""Two ways to split augmented medical images, and what the wrong one seems to gain.

By patient: patients are dealt out first, then the training images are augmented. Augmented first: every image
is turned and mirrored, and the copies are dealt out at random, so that the test split holds copies of
training images.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from splitward.data import Dataset, Split
from splitward.data.dataset import FRACTIONS

TURNS = 4


def augment(split: Split) -> Split:
    """Each image turned by 0, 90, 180 and 270 degrees, plain and mirrored: 8 times the images, which are square."""
    turned = [np.rot90(split.images, turn, axes=(2, 3)) for turn in range(TURNS)]
    images = np.concatenate([*turned, *(image[..., ::-1] for image in turned)])
    copies = 2 * TURNS
    return Split(images, np.tile(split.labels, copies), np.tile(split.patients, copies))


def split_by_patient_first(dataset: Dataset) -> Dataset:
    """The data set's own splits by patient, the training images augmented."""
    return replace(dataset, train=augment(dataset.train), source=f"{dataset.source}; then augmented")


def augment_first(dataset: Dataset, seed: int) -> Dataset:
    """All images augmented, then dealt out at random without regard to image or patient."""
    splits = (dataset.train, dataset.validation, dataset.test)
    whole = augment(
        Split(
            np.concatenate([split.images for split in splits]),
            np.concatenate([split.labels for split in splits]),
            np.concatenate([split.patients for split in splits]),
        )
    )
    order = np.random.default_rng(seed).permutation(len(whole))
    ends = np.rint(np.cumsum(FRACTIONS)[:-1] * len(order)).astype(int)
    train, validation, test = (
        Split(whole.images[rows], whole.labels[rows], whole.patients[rows]) for rows in np.split(order, ends)
    )
    return replace(
        dataset, train=train, validation=validation, test=test, source=f"{dataset.source}; augmented before"
    )


def shared_patients(dataset: Dataset) -> float:
    """Share of the test images whose patient is in the training split too."""
    return float(np.isin(dataset.test.patients, dataset.train.patients).mean())
