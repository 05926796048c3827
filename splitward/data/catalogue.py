"""Which loader reads what."""

from __future__ import annotations

from pathlib import Path

from splitward.data import dicom_folder, image_folder, medmnist, mias, mnist, phantom
from splitward.data.dataset import Dataset
from splitward.data.listing import first_file
from splitward.errors import DataError
from splitward.imaging.dicom import is_dicom

_UNDERSTOOD = """  mnist                the MNIST digits, from the cache or fetched once
  phantom              synthetic mammogram-like images, made on the spot
  FILE.npz             MedMNIST layout
  FOLDER               mini-MIAS (Info.txt and .pgm files)
  FOLDER               MNIST as IDX files (train-images-idx3-ubyte[.gz], ...)
  FOLDER               DICOM files or images with a labels.csv (file,label[,patient]) or one folder per class"""


SIZES = range(8, 225, 4)
"""Heights and widths that the networks take, in pixels."""


def open_dataset(
    spec: str, *, task: str | None = None, size: int | None = None, seed: int = 0, cache: Path | None = None
) -> Dataset:
    """Open the data set that `spec` names.

    Parameters
    ----------
    spec : str
        `"mnist"`, `"phantom"`, or the path of a file or folder; README and the error list the layouts.
    task : str, optional
        What the labels say, where a source can be read in several ways; the loader's first by default.
    size : int, optional
        Height and width of the images in pixels, one of `SIZES`; the source's own, or 64 for folders, by default.
    seed : int
        Of the split by patient and of what is drawn (phantoms, crops of normal tissue).
    cache : Path, optional
        Where fetched data lies; `SPLITWARD_CACHE` or `~/.cache/splitward` by default.

    Raises
    ------
    DataError
        No network takes frames of `size`, nothing reads `spec`, it has no such task, or a file of it is missing,
        damaged or inconsistent.
    """
    if size is not None and size not in SIZES:
        raise DataError(f"size {size}: give {SIZES[0]} to {SIZES[-1]} pixels, a multiple of {SIZES.step}.")
    if spec == "mnist":
        return mnist.load(mnist.fetch_mnist(cache), check_task("mnist", task, mnist.TASKS), size)
    if spec == "phantom":
        return phantom.load(check_task("phantom", task, phantom.TASKS), size, seed)
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".npz":
        return medmnist.load(path, check_task(spec, task, medmnist.TASKS), size)
    if path.is_dir():
        return _open_folder(path, task, size, seed)
    if path.name.endswith((".tar", ".tar.gz", ".tar.xz", ".tgz", ".zip")) and path.exists():
        raise DataError(f"{path}: is an archive. Unpack it and give the folder.")
    reason = "is not a data set" if path.exists() else "no such file or folder, nor a known name"
    raise DataError(f"{spec}: {reason}. Understood are:\n{_UNDERSTOOD}")


def check_task(source: str, task: str | None, known: tuple[str, ...]) -> str:
    """Return `task`, or the first of the `known` ones where it is None; `DataError` where it is another."""
    if task is not None and task not in known:
        raise DataError(f"{source}: has no task {task!r}. Its tasks: {', '.join(known)}.")
    return task or known[0]


def _open_folder(path: Path, task: str | None, size: int | None, seed: int) -> Dataset:
    mias_folder = mias.find_folder(path)
    if mias_folder is not None:
        return mias.load(mias_folder, check_task(str(path), task, mias.TASKS), size, seed)
    if mnist.holds_idx(path):
        return mnist.load_idx(path, check_task(str(path), task, mnist.TASKS), size)
    first = first_file(path)
    if first is None:
        raise DataError(
            f"{path}: holds no labels.csv and no class folder with files. Understood are:\n{_UNDERSTOOD}"
        )
    if is_dicom(first):
        return dicom_folder.load(path, check_task(str(path), task, dicom_folder.TASKS), size, seed)
    return image_folder.load(path, check_task(str(path), task, image_folder.TASKS), size, seed)
