"""Which slot starts: the boot loader's side of a system update, as RAUC's custom backend calls it.

Two loaders can be on a device, told apart by the firmware. Under UEFI, systemd-boot counts: a slot on trial is an
entry `slot-b+3.conf`, each start takes one try from its name, and one without tries sorts last. On a Raspberry Pi
the firmware tries once: `tryboot.txt` names the slot on trial, `config.txt` the one to come back to.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, Protocol

from edge.errors import SlotError
from splitward.disk import move_whole, write_whole

BOOT = Path("/boot/firmware")
IN_ROOT = Path("usr/lib/splitward/boot")
TRIES = 3
DISK = "53504c54"
NUMBERS = {"a": 2, "b": 3}
Slot = Literal["a", "b"]
State = Literal["good", "bad"]
_PREFIX = re.compile(r"^os_prefix=slot-([ab])/$", re.MULTILINE)
_ENTRY = re.compile(r"^slot-([ab])(?:\+(\d+)(?:-(\d+))?)?\.conf\Z")


class Loader(Protocol):
    """One boot loader's notes on the boot partition."""

    def primary(self) -> Slot:
        """Slot that the next start tries first."""
        ...

    def try_next(self, slot: Slot) -> None:
        """Put `slot` on trial at the next start."""
        ...

    def state(self, slot: Slot) -> State:
        """Whether `slot` may be started at all."""
        ...

    def on_trial(self, slot: Slot) -> bool:
        """Whether `slot` has yet to prove itself."""
        ...

    def mark(self, slot: Slot, state: State) -> None:
        """Keep `slot` for good, or never start it."""
        ...


class SystemdBoot:
    """Entries of systemd-boot under `loader/entries`. A slot without an entry is bad."""

    def __init__(self, boot: Path) -> None:
        self._folder = boot / "loader" / "entries"

    def primary(self) -> Slot:
        """Slot of the entry that sorts first: with tries left, then by the newest version."""
        entries = [entry for entry in self._entries() if entry[1] != 0]
        if not entries:
            raise SlotError(f"{self._folder}: holds no entry that may start. Write the card again.")
        return max(entries, key=lambda entry: entry[2])[0]

    def try_next(self, slot: Slot) -> None:
        """Give `slot` the newest version and `TRIES` tries."""
        version = max((entry[2] for entry in self._entries()), default=0) + 1
        text = format_entry(slot, version, self._options(slot))
        write_whole(self._folder / f"slot-{slot}+{TRIES}.conf", text.encode())
        for path in self._paths(slot):
            if path.name != f"slot-{slot}+{TRIES}.conf":
                path.unlink()

    def state(self, slot: Slot) -> State:
        """Bad without an entry, or without tries."""
        return "good" if any(one == slot and tries != 0 for one, tries, _ in self._entries()) else "bad"

    def on_trial(self, slot: Slot) -> bool:
        """Whether its entry still counts."""
        return any(one == slot and tries is not None for one, tries, _ in self._entries())

    def mark(self, slot: Slot, state: State) -> None:
        """Take the count out of the entry's name, or set it to nothing."""
        target = self._folder / (f"slot-{slot}.conf" if state == "good" else f"slot-{slot}+0.conf")
        for path in self._paths(slot):
            if path != target:
                move_whole(path, target)

    def _paths(self, slot: Slot) -> list[Path]:
        return sorted(
            path
            for path in self._folder.glob("*.conf")
            if (found := _ENTRY.match(path.name)) and found[1] == slot
        )

    def _entries(self) -> list[tuple[Slot, int | None, int]]:
        """Slot, tries left (None: kept for good) and version of every entry."""
        found: list[tuple[Slot, int | None, int]] = []
        for path in sorted(self._folder.glob("*.conf")):
            name = _ENTRY.match(path.name)
            if name is None:
                continue
            version = re.search(r"^version (\d+)$", path.read_text(errors="replace"), re.MULTILINE)
            slot: Slot = "a" if name[1] == "a" else "b"
            found.append((slot, None if name[2] is None else int(name[2]), int(version[1]) if version else 0))
        return found

    def _options(self, slot: Slot) -> str:
        """Kernel's command line of the slot that there is, made that of `slot`."""
        for path in sorted(self._folder.glob("slot-*.conf")):
            found = re.search(r"^options (.*)$", path.read_text(errors="replace"), re.MULTILINE)
            if found:
                return for_slot(found[1], slot)
        return f"splitward.disk={DISK} splitward.slot={slot} rauc.slot={slot} panic=10"


class Tryboot:
    """The Raspberry Pi's own firmware."""

    def __init__(self, boot: Path) -> None:
        self._config, self._trial = boot / "config.txt", boot / "tryboot.txt"
        self._bad = boot / "bad-slot.txt"

    def primary(self) -> Slot:
        """Slot on trial if there is one, else the kept one."""
        return _named(self._trial) if self._trial.exists() else _named(self._config)

    def try_next(self, slot: Slot) -> None:
        """Write tryboot.txt: config.txt with the other slot's name."""
        self._bad.unlink(missing_ok=True)
        write_whole(self._trial, _PREFIX.sub(f"os_prefix=slot-{slot}/", self._config.read_text()).encode())

    def state(self, slot: Slot) -> State:
        """Bad when it was marked so."""
        return "bad" if self._bad.exists() and self._bad.read_text().strip() == slot else "good"

    def on_trial(self, slot: Slot) -> bool:
        """Whether tryboot.txt names it."""
        return self._trial.exists() and _named(self._trial) == slot

    def mark(self, slot: Slot, state: State) -> None:
        """Make the trial's file the kept one, or forget it."""
        if state == "bad":
            write_whole(self._bad, f"{slot}\n".encode())
            if self.on_trial(slot):
                self._trial.unlink()
        elif self.on_trial(slot):
            move_whole(self._trial, self._config)


def find_loader(boot: Path = BOOT) -> Loader:
    """Loader that started this device."""
    return SystemdBoot(boot) if Path("/sys/firmware/efi").is_dir() else Tryboot(boot)


def current_slot() -> Slot:
    """Slot that is running."""
    words = Path("/proc/cmdline").read_text().split()
    return "b" if "splitward.slot=b" in words else "a"


def format_entry(slot: Slot, version: int, options: str) -> str:
    """Entry of systemd-boot for `slot`."""
    return (
        f"title Splitward {slot}\nsort-key splitward\nversion {version}\n"
        f"linux /slot-{slot}/vmlinuz\ninitrd /slot-{slot}/initrd.gz\noptions {options}\n"
    )


def for_slot(options: str, slot: Slot) -> str:
    """The kernel's command line `options`, made that of `slot`."""
    return re.sub(r"\b(splitward\.slot|rauc\.slot)=[ab]\b", rf"\1={slot}", options)


def copy_boot_files(root: Path, boot: Path, slot: Slot) -> None:
    """Copy kernel, RAM disk and device trees of the slot's `root` to where the loaders look for them."""
    target = boot / f"slot-{slot}"
    target.mkdir(exist_ok=True)
    wanted = {path.name: path for path in sorted((root / IN_ROOT).iterdir())}
    for path in target.iterdir():  # room first: the partition holds two kernels, not three
        if path.name not in wanted and path.name != "cmdline.txt":
            path.unlink()
    for name, path in wanted.items():
        with path.open("rb") as source, (target / name).open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    other = boot / f"slot-{'a' if slot == 'b' else 'b'}" / "cmdline.txt"
    if other.exists():
        write_whole(target / "cmdline.txt", for_slot(other.read_text(), slot).encode())


def activate(slot: Slot, loader: Loader, boot: Path = BOOT) -> None:
    """Take the boot files of `slot` from its root and put it on trial."""
    device = f"/dev/disk/by-partuuid/{DISK}-{NUMBERS[slot]:02d}"
    with tempfile.TemporaryDirectory(prefix="slot-", dir="/run") as name:
        subprocess.run(["mount", "-t", "squashfs", "-o", "ro", device, name], check=True)
        try:
            copy_boot_files(Path(name), boot, slot)
        finally:
            subprocess.run(["umount", name], check=True)
    loader.try_next(slot)


def main(arguments: list[str]) -> int:
    """Answer RAUC: `get-primary`, `set-primary SLOT`, `get-state SLOT` or `set-state SLOT good|bad`."""
    loader = find_loader()
    try:
        match arguments:
            case ["get-primary"]:
                print(loader.primary())
            case ["get-current"]:
                print(current_slot())
            case ["set-primary", "a" | "b" as slot]:
                activate(slot, loader)
            case ["get-state", "a" | "b" as slot]:
                print(loader.state(slot))
            case ["set-state", "a" | "b" as slot, "good" | "bad" as state]:
                loader.mark(slot, state)
            case _:
                print(f"slot: cannot do {arguments}", file=sys.stderr)
                return 2
    except (OSError, SlotError, subprocess.CalledProcessError) as error:
        print(f"slot: {error}", file=sys.stderr)
        return 1
    return 0


def _named(path: Path) -> Slot:
    found = _PREFIX.search(path.read_text(errors="replace"))
    if found is None:
        raise SlotError(f"{path}: names no slot. Put the line `os_prefix=slot-a/` into it.")
    return "b" if found[1] == "b" else "a"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
