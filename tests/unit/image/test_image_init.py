"""What the RAM disk does with the data partition: its own lines, on files that stand for partitions."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from splitward.image.root import FILES

# The kernel's part: a mount works once it has failed so many times, if there is a file system.
STUBS = """\
failures=$1; slot=$2
mount() {
    case $* in *vfat*) [ -d "$BOOT" ]; return ;; esac
    failures=$((failures - 1)); [ $failures -lt 0 ] && dumpe2fs -h "$DISK" > /dev/null 2>&1
}
umount() { :; }
sleep() { :; }
inside() { "$@"; }
say() { echo "$*"; }
fail() { echo "restart: $*"; exit 1; }
"""
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"


def mount_data(folder: Path, failures: int = 0, slot: str = "a") -> tuple[bool, str]:
    """Whether init goes on, and what it says, where the first mounts fail."""
    disk, boot = folder / "disk", folder / "boot"
    text = (FILES / "init").read_text()
    functions = re.findall(
        r"^(?:on_trial|check_data|mount_data)\(\) \{\n.*?^\}\n", text, re.MULTILINE | re.DOTALL
    )
    assert len(functions) == 3
    script = "".join(functions).replace("/dev/$data", str(disk)).replace("/dev/kmsg", "/dev/null")
    script = STUBS + script.replace(" /boot/", f" {boot}/") + "check_data; mount_data\n"
    environment = {"PATH": PATH, "DISK": str(disk), "BOOT": str(boot)}
    command = ["sh", "-c", script, "sh", str(failures), slot]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert not done.stderr
    return done.returncode == 0, done.stdout.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data partition of 32 MiB, and a boot partition on which no slot is on trial."""
    (tmp_path / "boot/loader/entries").mkdir(parents=True)
    (tmp_path / "boot/loader/entries/slot-a.conf").touch()
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(32 << 20)
    command = ["mke2fs", "-q", "-t", "ext4", "-b", "1024", str(tmp_path / "disk")]
    subprocess.run(command, check=True, env={"PATH": PATH})
    return tmp_path


def file_system(folder: Path) -> str | None:
    """Identifier of the file system that there is."""
    command = ["dumpe2fs", "-h", str(folder / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": PATH})
    found = re.search(r"UUID: *(\S+)", done.stdout)
    return found[1] if found else None


def wipe(folder: Path, size: int) -> None:
    with (folder / "disk").open("r+b") as file:
        file.write(bytes(size))


def test_a_mount_that_fails_once_is_tried_again(folder: Path) -> None:
    before = file_system(folder)
    assert mount_data(folder, failures=1) == (True, "")
    assert file_system(folder) == before


def test_a_file_system_that_cannot_be_mounted_is_left_alone(folder: Path) -> None:
    before = file_system(folder)
    assert mount_data(folder, failures=9) == (False, "restart: the data partition cannot be mounted")
    assert file_system(folder) == before


def test_a_lost_superblock_is_found_again(folder: Path) -> None:
    before = file_system(folder)
    wipe(folder, 4096)
    assert file_system(folder) is None
    assert mount_data(folder) == (True, "")
    assert file_system(folder) == before


def test_a_partition_that_cannot_be_read_is_not_an_empty_one(folder: Path) -> None:
    (folder / "disk").unlink()
    assert mount_data(folder) == (False, "restart: the data partition cannot be read")


def test_only_an_empty_partition_gets_a_file_system(folder: Path) -> None:
    wipe(folder, 32 << 20)
    assert mount_data(folder) == (True, "the data partition holds no file system; making one")
    assert file_system(folder) is not None


@pytest.mark.parametrize(
    ("name", "text"),
    [("loader/entries/slot-b+2-1.conf", ""), ("tryboot.txt", "arm_64bit=1\nos_prefix=slot-b/\n")],
)
def test_a_slot_on_trial_makes_no_file_system(folder: Path, name: str, text: str) -> None:
    wipe(folder, 32 << 20)
    (folder / "boot" / name).write_text(text)
    said = "restart: the data partition holds no file system, and slot b is on trial"
    assert mount_data(folder, slot="b") == (False, said)
    assert file_system(folder) is None
    assert mount_data(folder, slot="a")[0], "the slot that was kept may"


def test_without_a_boot_partition_no_slot_has_proved_itself(folder: Path) -> None:
    wipe(folder, 32 << 20)
    (folder / "boot/loader/entries/slot-a.conf").unlink()
    (folder / "boot/loader/entries").rmdir()
    (folder / "boot/loader").rmdir()
    (folder / "boot").rmdir()
    assert not mount_data(folder)[0]
    assert file_system(folder) is None
