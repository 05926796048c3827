"""Which files of a folder carry which label: `labels.csv`, or one sub-folder per class.

`labels.csv` has the columns `file,label[,patient]`, files relative to the folder. Without it each sub-folder
is a class, its files (at any depth) the images, and `patients.csv` (`file,patient`) may name their patients.
Blanks around a value count for nothing.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from splitward.errors import DataError

LABELS = "labels.csv"
PATIENTS = "patients.csv"


@dataclass(frozen=True, slots=True)
class Listed:
    """One file with its label, and its patient where the folder names one."""

    path: Path
    label: str
    patient: str | None = field(repr=False)


def list_files(folder: Path) -> list[Listed]:
    """Every labelled file of `folder`, sorted by path.

    Raises
    ------
    DataError
        A table lacks a column or a value, names a file twice, outside the folder or that is not there; or fewer
        than two classes are found.
    """
    listed = _from_table(folder) if (folder / LABELS).is_file() else _from_class_folders(folder)
    classes = {entry.label for entry in listed}
    if len(classes) < 2:
        raise DataError(
            f"{folder}: holds {len(classes)} class(es); give two or more, by labels.csv or sub-folders."
        )
    return sorted(listed, key=lambda entry: entry.path)


def first_file(folder: Path) -> Path | None:
    """Return one file of `folder` that tells its format, or None where no file has a label."""
    if (folder / LABELS).is_file():
        return min((entry.path for entry in _from_table(folder)), default=None)
    return min((entry.path for entry in _from_class_folders(folder)), default=None)


def _from_table(folder: Path) -> list[Listed]:
    rows = _read_table(folder, LABELS, ("file", "label"))
    return [Listed(folder / name, row["label"], row.get("patient")) for name, row in rows.items()]


def _from_class_folders(folder: Path) -> list[Listed]:
    patients: dict[str, str] = {}
    if (folder / PATIENTS).is_file():
        patients = {
            name: row["patient"] for name, row in _read_table(folder, PATIENTS, ("file", "patient")).items()
        }
    listed = []
    for path in _visible_files(folder):
        name = path.relative_to(folder).as_posix()
        if patients and name not in patients:
            raise DataError(
                f"{folder / PATIENTS}: has no row for {name}. Name the patient of every file, or of none."
            )
        listed.append(Listed(path, PurePosixPath(name).parts[0], patients.get(name)))
    return listed


def _visible_files(folder: Path) -> list[Path]:
    """Files in the sub-folders, without those that systems hide (.DS_Store, .git) or strew (Thumbs.db)."""
    return [
        path
        for path in folder.rglob("*")
        if len(parts := path.relative_to(folder).parts) > 1
        and path.name != "Thumbs.db"
        and not any(part.startswith(".") for part in parts)
        and path.is_file()
    ]


def _read_table(folder: Path, name: str, needed: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Rows of a CSV file by their `file` column."""
    table = folder / name
    rows: dict[str, dict[str, str]] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
            missing = [column for column in needed if column not in reader.fieldnames]
            if missing:
                raise DataError(
                    f"{table}: has no column {missing[0]!r}. Its first line must name {','.join(needed)}."
                )
            for row in reader:
                where = f"{table}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(
                        f"{where}: has a missing or surplus value. Fill every column of the first line."
                    )
                cells = {column: value.strip() for column, value in row.items()}
                _check_row(folder, cells, where, rows)
                rows[cells["file"]] = cells
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: is no CSV file in UTF-8: {error}. Save it again as one.") from error
    return rows


def _check_row(folder: Path, row: dict[str, str], where: str, rows: dict[str, dict[str, str]]) -> None:
    if not all(row.values()):
        raise DataError(f"{where}: has an empty value. Fill every column of the first line.")
    name = row["file"]
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{where}: {name} lies outside the folder. Give paths relative to {folder}.")
    if name in rows:
        raise DataError(f"{where}: {name} is listed twice. Keep one row.")
    if not (folder / name).is_file():
        raise DataError(f"{where}: {name} is not there. Correct the row, or add the file.")
