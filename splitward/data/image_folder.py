"""A folder of PNG, JPEG, BMP, TIFF or PGM files with labels (see `listing`).

Where nothing names the patients, the file name does: the stem before its first `_` or `-`, or the whole stem.
That errs towards too few patients; files such as IMG_0001.png need a patients.csv.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from splitward.data.dataset import Dataset, split_images, stack_images
from splitward.data.listing import Listed, list_files
from splitward.errors import DataError
from splitward.imaging.files import SUFFIXES, read_image
from splitward.imaging.inputs import Pixels, fit_pixels
from splitward.wire.bundle import InputSpec

TASKS = ("classes",)
DEFAULT_SIZE = 64


def load(folder: Path, task: str, size: int | None, seed: int) -> Dataset:
    """Read every labelled image of `folder`, split by patient; RGB where any image is in colour."""
    side = size or DEFAULT_SIZE
    listed = list_files(folder)
    images = stack_images([_read(entry.path, side) for entry in listed])
    classes, labels = np.unique([entry.label for entry in listed], return_inverse=True)
    _, patients = np.unique([_patient(entry) for entry in listed], return_inverse=True)
    origin = "as listed" if all(entry.patient for entry in listed) else "by file name"
    try:
        train, validation, test = split_images(images, labels, patients, seed)
    except DataError as error:
        raise DataError(f"{folder}: {error} A patients.csv (file,patient) names them.") from error
    return Dataset(
        name=folder.name,
        task=task,
        classes=tuple(map(str, classes)),
        train=train,
        validation=validation,
        test=test,
        synthetic=False,
        licence="not stated by the files",
        source=f"{len(listed)} image files; patients {origin}; split by patient",
    )


def _read(path: Path, side: int) -> Pixels:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: is no image file ({', '.join(sorted(SUFFIXES))}). Move it out of the class folder."
        )
    pixels = read_image(path)
    return fit_pixels(pixels, InputSpec(3 if pixels.ndim == 3 else 1, side, side))


def _patient(entry: Listed) -> str:
    return entry.patient or re.split("[_-]", entry.path.stem, maxsplit=1)[0] or entry.path.stem
