"""A folder of PNG, JPEG, BMP, TIFF or PGM files with labels (see `listing`).

Where nothing names the patients, the file name does: the stem before its first `_` or `-`, or the whole stem.
That errs towards too few patients; files such as IMG_0001.png need a patients.csv.
"""

from __future__ import annotations

import re
from pathlib import Path

from splitward.data.dataset import Dataset, labelled_folder
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
    images = [_read(entry.path, side) for entry in listed]
    labels, patients = [entry.label for entry in listed], [_patient(entry) for entry in listed]
    named = all(entry.patient for entry in listed)
    source = f"{len(listed)} image files; patients {'as listed' if named else 'by file name'}"
    try:
        return labelled_folder(folder, task, images, labels, patients, seed, source)
    except DataError as error:
        raise DataError(f"{error} A patients.csv (file,patient) names them.") from error


def _read(path: Path, side: int) -> Pixels:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: is no image file ({', '.join(sorted(SUFFIXES))}). Move it out of the class folder."
        )
    pixels = read_image(path)
    return fit_pixels(pixels, InputSpec(3 if pixels.ndim == 3 else 1, side, side))


def _patient(entry: Listed) -> str:
    return entry.patient or re.split("[_-]", entry.path.stem, maxsplit=1)[0] or entry.path.stem
