"""A folder of DICOM files with labels (see `listing`). Each frame is an image with the label of its file.

The patient is the `patient` column, else Patient ID (0010,0020). A file with neither is refused: its
patient could stand in two splits unseen.
"""

from __future__ import annotations

from pathlib import Path

from splitward.data.dataset import Dataset, labelled_folder
from splitward.data.listing import list_files
from splitward.errors import DataError
from splitward.imaging.dicom import read_dicom
from splitward.imaging.inputs import Pixels, fit_pixels
from splitward.wire.bundle import InputSpec

TASKS = ("classes",)
DEFAULT_SIZE = 64


def load(folder: Path, task: str, size: int | None, seed: int) -> Dataset:
    """Read every labelled frame of `folder`, split by patient; RGB where any frame is in colour."""
    side = size or DEFAULT_SIZE
    listed = list_files(folder)
    images: list[Pixels] = []
    names: list[str] = []
    identities: list[str] = []
    for entry in listed:
        for frame in read_dicom(entry.path):
            patient = entry.patient or frame.patient_id
            if not patient:
                raise DataError(f"{entry.path}: has no Patient ID. Name the patient in a column of labels.csv.")
            channels = 3 if frame.pixels.ndim == 3 else 1
            images.append(fit_pixels(frame.pixels, InputSpec(channels, side, side)))
            names.append(entry.label)
            identities.append(patient)
    source = f"{len(images)} frames of {len(listed)} DICOM files"
    return labelled_folder(folder, task, images, names, identities, seed, source)
