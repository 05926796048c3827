"""The mini-MIAS mammograms (Suckling et al. 1994): 322 PGM files of 1024 x 1024 and Info.txt.

Its pictures come in pairs, left and right breast of one patient, so the patient of mdbNNN is ceil(NNN / 2).
Research use only: cite it, never rent, lease or sell it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from splitward.data.dataset import Dataset, split_images
from splitward.errors import DataError
from splitward.imaging.files import read_image
from splitward.imaging.inputs import Pixels, fit_pixels
from splitward.wire.bundle import InputSpec

TASKS = ("density", "severity", "roi")
DEFAULT_SIZE = 64
_SIDE = 1024
_ROI_MARGIN = 1.5  # lesion radii around its centre; the radius encloses it only approximately
_BLOCK = 32
_TISSUE = 40  # mean grey of a block inside the breast; the background lies near 0
_TISSUES = "FGD"
_SEVERITIES = {"": 0, "B": 1, "M": 2}
_CLASSES = {
    "density": ("fatty", "glandular", "dense"),
    "severity": ("normal", "benign", "malignant"),
    "roi": ("normal", "benign", "malignant"),
}
# `mdbNNN tissue class [severity] [x y radius]`; some rows end in blanks or in `*NOTE 3*` instead of a place.
_ROW = re.compile(
    r"mdb(\d{3}) ([FGD]) (?:NORM|(?:CALC|CIRC|SPIC|MISC|ARCH|ASYM) ([BM]))"
    r"(?: (\d+) (\d+) (\d+))?(?: \*NOTE 3\*)?\s*"
)

Labelled = tuple[Pixels, NDArray[np.int64], NDArray[np.int64]]
"""Images [N, 1, side, side], their labels [N], and the number of the film each comes from [N]."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of Info.txt.

    Attributes
    ----------
    image : int
        Number NNN of mdbNNN.
    density, severity : int
        Position in the classes of these tasks.
    circle : tuple of int, or None
        Row and column of the centre and the radius, in pixels from the top left.
    """

    image: int
    density: int
    severity: int
    circle: tuple[int, int, int] | None


def find_folder(path: Path) -> Path | None:
    """Return the folder with Info.txt and the PGM files: `path` or its `pgm`; None where neither has them."""
    for folder in (path, path / "pgm"):
        if (folder / "Info.txt").is_file():
            return folder
    return None


def load(folder: Path, task: str, size: int | None, seed: int) -> Dataset:
    """Read the images of `folder` for one task, split by patient.

    `density` and `severity` take whole images, one row each; a malignant finding outweighs a benign one. `roi`
    takes a square around each finding that has a place, and per normal image one of tissue, drawn by `seed`.

    Raises
    ------
    DataError
        Info.txt has no rows or contradicts itself; an image is missing, damaged or not 1024 x 1024.
    """
    findings = read_findings(folder / "Info.txt")
    side = size or DEFAULT_SIZE
    if task == "roi":
        images, labels, numbers = _cut_rois(folder, findings, side, seed)
    else:
        images, labels, numbers = _take_images(folder, findings, task, side)
    try:
        train, validation, test = split_images(images, labels, (numbers + 1) // 2, seed)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error
    return Dataset(
        name="mias",
        task=task,
        classes=_CLASSES[task],
        train=train,
        validation=validation,
        test=test,
        synthetic=False,
        licence="MIAS: research use only; cite Suckling et al. 1994; never rent, lease or sell",
        source=f"mini-MIAS, {len(labels)} images at {side} x {side}; split by patient, ceil(number / 2)",
        tasks=TASKS,
    )


def read_findings(info: Path) -> list[Finding]:
    """Rows of Info.txt; other lines are prose."""
    try:
        lines = info.read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise DataError(f"{info}: cannot be read: {error.strerror}. Unpack the archive again.") from error
    findings = [_to_finding(match.groups()) for line in lines if (match := _ROW.fullmatch(line))]
    if not findings:
        raise DataError(f"{info}: has no rows `mdbNNN tissue class ...`. Unpack the archive again.")
    densities: dict[int, int] = {}
    for finding in findings:
        if densities.setdefault(finding.image, finding.density) != finding.density:
            raise DataError(f"{info}: gives mdb{finding.image:03} two tissues. Unpack the archive again.")
    return findings


def _to_finding(groups: tuple[str | None, ...]) -> Finding:
    image, tissue, severity, x, y, radius = (group or "" for group in groups)
    # y counts from the bottom.
    circle = (_SIDE - 1 - int(y), int(x), int(radius)) if x else None
    return Finding(int(image), _TISSUES.index(tissue), _SEVERITIES[severity], circle)


def _take_images(folder: Path, findings: list[Finding], task: str, side: int) -> Labelled:
    label_of: dict[int, int] = {}
    for finding in findings:
        label = finding.density if task == "density" else finding.severity
        label_of[finding.image] = max(label, label_of.get(finding.image, 0))
    numbers = sorted(label_of)
    images = [fit_pixels(_read(folder, number), InputSpec(1, side, side)) for number in numbers]
    return np.stack(images), np.array([label_of[number] for number in numbers]), np.array(numbers)


def _cut_rois(folder: Path, findings: list[Finding], side: int, seed: int) -> Labelled:
    used = [finding for finding in findings if finding.circle or finding.severity == 0]
    halves = [_half(finding.circle[2]) for finding in used if finding.circle]
    normal_half = int(np.median(halves)) if halves else 2 * _BLOCK
    images = []
    for finding in used:
        pixels = _read(folder, finding.image)
        if finding.circle:
            row, column, radius = finding.circle
            half = _half(radius)
        else:
            half = normal_half
            row, column = _draw_tissue(pixels, half, np.random.default_rng([seed, finding.image]))
        images.append(fit_pixels(_crop(pixels, row, column, half), InputSpec(1, side, side)))
    return (
        np.stack(images),
        np.array([finding.severity for finding in used]),
        np.array([finding.image for finding in used]),
    )


def _half(radius: int) -> int:
    """Half the side of a square around a lesion of that radius."""
    return min(max(round(_ROI_MARGIN * radius), _BLOCK), _SIDE // 2)


def _crop(pixels: Pixels, row: int, column: int, half: int) -> Pixels:
    """Square of side 2 * half, moved inside the image where it would reach beyond."""
    top = min(max(row - half, 0), _SIDE - 2 * half)
    left = min(max(column - half, 0), _SIDE - 2 * half)
    return pixels[top : top + 2 * half, left : left + 2 * half]


def _draw_tissue(pixels: Pixels, half: int, generator: np.random.Generator) -> tuple[int, int]:
    """Centre of a square in the breast: every block of it is bright, which labels and edges are not."""
    blocks = pixels.reshape(_SIDE // _BLOCK, _BLOCK, _SIDE // _BLOCK, _BLOCK).mean((1, 3))
    span = -(-2 * half // _BLOCK)
    darkest = sliding_window_view(blocks, (span, span)).min((2, 3))
    candidates = np.argwhere(darkest >= min(_TISSUE, darkest.max()))
    top, left = generator.choice(candidates) * _BLOCK
    return int(top) + half, int(left) + half


def _read(folder: Path, number: int) -> Pixels:
    path = folder / f"mdb{number:03}.pgm"
    pixels = read_image(path)
    if pixels.shape != (_SIDE, _SIDE) or pixels.dtype != np.uint8:
        raise DataError(
            f"{path}: is {pixels.dtype} {list(pixels.shape)}, not 8 bits and {_SIDE} x {_SIDE}. "
            "Unpack the archive again."
        )
    return pixels
