"""The card: a partition table and four partitions, written into a sparse file without mounting anything.

| | holds | file system |
|---|---|---|
| 1 | firmware, boot loader, kernels of both slots, site.toml | FAT32: every computer and every board reads it |
| 2 | slot a | squashfs |
| 3 | slot b, empty until the first update | squashfs |
| 4 | data: spool, models, keys; grown to the whole card at the first start | ext4 |
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path

from splitward.errors import ImageError

DISK_ID = 0x53504C54
SECTOR = 512
MIB = 1 << 20
BOOT_MIB, SLOT_MIB, DATA_MIB = 256, 512, 64
START_MIB = 4
_FAT, _LINUX = 0x0C, 0x83
_DATA_UUID = "53706c69-7477-6172-6400-000000000004"


def partition_offset(number: int) -> int:
    """Byte at which partition `number`, from 1, begins."""
    sizes = (BOOT_MIB, SLOT_MIB, SLOT_MIB)
    return (START_MIB + sum(sizes[: number - 1])) * MIB


def write_disk(path: Path, boot: Path, root: Path, epoch: int) -> None:
    """Write the raw image at `path`.

    Parameters
    ----------
    path : Path
    boot : Path
        Folder that becomes the boot partition.
    root : Path
        squashfs file that becomes slot a.
    epoch : int
        Seconds since 1970 that every time in the image shows.

    Raises
    ------
    ImageError
        The root is larger than a slot, or a tool is missing.
    """
    if root.stat().st_size > SLOT_MIB * MIB:
        raise ImageError(f"the root has {root.stat().st_size} bytes, more than a slot's {SLOT_MIB} MiB.")
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(partition_offset(4) + DATA_MIB * MIB)
        file.write(_partition_table())
        file.seek(partition_offset(2))
        with root.open("rb") as source:
            while chunk := source.read(MIB):
                file.write(chunk)
    _write_fat(path, boot, epoch)
    _write_data(path, epoch)


def list_files(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its relative name, sorted."""
    return {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()
    }


def copy_to_boot(image: Path, files: Mapping[str, Path], epoch: int | None = None) -> None:
    """Copy `files`, by their name on it, to the boot partition of the raw `image`."""
    drive = f"{image}@@{partition_offset(1)}"
    environment = dict(os.environ, MTOOLS_SKIP_CHECK="1")
    if epoch is not None:
        environment |= {"SOURCE_DATE_EPOCH": str(epoch), "TZ": "UTC"}
    folders = {str(parent) for name in files for parent in Path(name).parents if str(parent) != "."}
    for folder in sorted(folders):
        _run(["mmd", "-D", "s", "-i", drive, f"::{folder}"], environment, check=epoch is not None)
    for name, path in files.items():
        _run(["mcopy", "-o", "-m", "-i", drive, str(path), f"::{name}"], environment)


def copy_from_boot(image: Path, name: str, target: Path) -> None:
    """Copy the file `name` of the boot partition of the raw `image` to `target`."""
    drive = f"{image}@@{partition_offset(1)}"
    _run(["mcopy", "-n", "-o", "-i", drive, f"::{name}", str(target)], dict(os.environ, MTOOLS_SKIP_CHECK="1"))


def _partition_table() -> bytes:
    """A master boot record: the boot ROM of a Pi 3 reads nothing newer, and UEFI reads it too."""
    sizes = (BOOT_MIB, SLOT_MIB, SLOT_MIB, DATA_MIB)
    kinds = (_FAT, _LINUX, _LINUX, _LINUX)
    record = bytearray(SECTOR)
    struct.pack_into("<I", record, 440, DISK_ID)
    for number, (size, kind) in enumerate(zip(sizes, kinds, strict=True), 1):
        first, count = partition_offset(number) // SECTOR, size * MIB // SECTOR
        unused = b"\xfe\xff\xff"  # cylinders and heads: beyond what they can count
        entry = struct.pack("<B3sB3sII", 0x80 if number == 1 else 0, unused, kind, unused, first, count)
        record[446 + 16 * (number - 1) : 446 + 16 * number] = entry
    record[510:] = b"\x55\xaa"
    return bytes(record)


def _write_fat(path: Path, folder: Path, epoch: int) -> None:
    scratch = path.with_name(path.name + ".boot")
    scratch.unlink(missing_ok=True)
    environment = dict(os.environ, SOURCE_DATE_EPOCH=str(epoch), TZ="UTC")
    command = ["mkfs.vfat", "--invariant", "-F", "32", "-n", "SPLITWARD", "-i", f"{DISK_ID:08x}"]
    _run([*command, "-C", str(scratch), str(BOOT_MIB * 1024)], environment)
    _splice(scratch, path, partition_offset(1))
    for file in sorted(folder.rglob("*")):
        os.utime(file, (epoch, epoch))
    copy_to_boot(path, list_files(folder), epoch)


def _write_data(path: Path, epoch: int) -> None:
    scratch = path.with_name(path.name + ".data")
    scratch.unlink(missing_ok=True)
    with scratch.open("wb") as file:
        file.truncate(DATA_MIB * MIB)
    environment = dict(os.environ, E2FSPROGS_FAKE_TIME=str(epoch), SOURCE_DATE_EPOCH=str(epoch), TZ="UTC")
    # lazy initialisation is left to the kernel: an image full of zeros compresses to nothing
    features = f"hash_seed={_DATA_UUID},lazy_itable_init=1,resize=67108864"
    command = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-L", "data", "-U", _DATA_UUID, "-m", "1"]
    _run([*command, "-E", features, str(scratch)], environment)
    _splice(scratch, path, partition_offset(4))


def _splice(source: Path, target: Path, offset: int) -> None:
    """Write `source` into `target` at `offset`, leaving holes where it holds zeros, and remove it."""
    with source.open("rb") as reader, target.open("r+b") as writer:
        position = offset
        while chunk := reader.read(MIB):
            if chunk.count(0) != len(chunk):
                writer.seek(position)
                writer.write(chunk)
            position += len(chunk)
    source.unlink()


def _run(command: list[str], environment: dict[str, str], check: bool = True) -> None:
    path = environment.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            command, env=environment | {"PATH": path}, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ImageError(f"{command[0]}: {error}. Install mtools, dosfstools and e2fsprogs.") from error
    if check and done.returncode:
        raise ImageError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")
