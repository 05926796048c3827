"""A folder of PNG, JPEG, BMP, TIFF or PGM files with labels (see `listing`).

Where no table names the patients, the first folder within the class does (CLASS/PATIENT/...): all below it is one
patient's, and a folder of that name in two classes is one patient. Folders that are anything else, such as views or
dates, need a patients.csv. Files that lie in the class folders themselves are named by their stem before its first
`_` or `-`, or by the whole stem: IMG_0001.png and the like need a patients.csv, too. What could put one patient into
two splits is refused: class folders of which some hold folders and some files, and a labels.csv without patients
whose files lie in several folders.
"""

from __future__ import annotations

import re
from pathlib import Path

from splitward.data.dataset import Dataset, labelled_folder
from splitward.data.listing import LABELS, PATIENTS, Listed, list_files
from splitward.errors import DataError
from splitward.imaging.files import SUFFIXES, read_image
from splitward.imaging.inputs import Pixels, fit_pixels
from splitward.wire.bundle import InputSpec

TASKS = ("classes",)
DEFAULT_SIZE = 64


def load(folder: Path, task: str, size: int | None, seed: int) -> Dataset:
    """Read every labelled image of `folder`, split by patient; RGB where any image is in colour.

    Raises
    ------
    DataError
        As `list_files`; a file is no image; it is not plain whose the images are; or they are fewer than three
        patients'.
    """
    side = size or DEFAULT_SIZE
    listed = list_files(folder)
    patients, origin = _patients(folder, listed)
    images = [_read(entry.path, side) for entry in listed]
    labels = [entry.label for entry in listed]
    source = f"{len(listed)} image files; patients {origin}"
    try:
        return labelled_folder(folder, task, images, labels, patients, seed, source)
    except DataError as error:
        raise DataError(f"{error} {_remedy(folder)}") from error


def _read(path: Path, side: int) -> Pixels:
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path}: is no image file ({', '.join(sorted(SUFFIXES))}). Move it out of the class folder."
        )
    pixels = read_image(path)
    return fit_pixels(pixels, InputSpec(3 if pixels.ndim == 3 else 1, side, side))


def _patients(folder: Path, listed: list[Listed]) -> tuple[list[str], str]:
    """Patient of each file, and what says so."""
    named = [entry.patient for entry in listed if entry.patient]
    if named:  # a table names them all, or none
        return named, "as listed"
    parents = [entry.path.parent.relative_to(folder).parts for entry in listed]
    if (folder / LABELS).is_file():
        if len(set(parents)) > 1:
            raise DataError(
                f"{folder / LABELS}: names no patients, and its files lie in several folders. {_remedy(folder)}"
            )
    elif all(len(parts) > 1 for parts in parents):
        return [parts[1] for parts in parents], "by folder"
    elif any(len(parts) > 1 for parts in parents):
        raise DataError(
            f"{folder}: some files lie in their class folder, others in folders within it: whose they are is not "
            f"plain. {_remedy(folder)}"
        )
    stems = [entry.path.stem for entry in listed]
    return [re.split("[_-]", stem, maxsplit=1)[0] or stem for stem in stems], "by file name"


def _remedy(folder: Path) -> str:
    if (folder / LABELS).is_file():
        return f"Name them in a column `patient` of {LABELS}."
    return f"Name them in a {PATIENTS} (file,patient)."
