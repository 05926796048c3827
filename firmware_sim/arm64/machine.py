"""A whole machine under qemu-system: it boots the card's image, and its power can be cut at any instant."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from firmware_sim.arm64.user import EmulationError
from splitward.image.disk import copy_from_boot, copy_to_boot

Kind = Literal["virt", "uefi", "raspi3b"]
KINDS: tuple[Kind, ...] = ("virt", "uefi", "raspi3b")
UEFI = Path("/usr/share/AAVMF/AAVMF_CODE.fd")
UEFI_VARIABLES = Path("/usr/share/AAVMF/AAVMF_VARS.fd")
CARD_BYTES = 2 << 30
"""A power of two, as the Pi's card reader wants it; larger than the image, so the first start has to grow."""
STOP_S = 10.0
# Nobody spies on an emulated processor's caches, and what guards them costs an emulator a quarter of its time: each
# entry into the kernel flushes its translations.
_OPTIONS = "splitward.disk=53504c54 splitward.slot=a rauc.slot=a panic=10 kpti=off mitigations=off"


def missing_tools() -> str | None:
    """What emulating machines lacks on this machine, for people; None when nothing."""
    for program, package in (
        ("qemu-system-aarch64", "qemu-system-arm"),
        ("qemu-img", "qemu-utils"),
        ("mcopy", "mtools"),
    ):
        if shutil.which(program) is None:
            return f"{program}: apt install {package}"
    return None if UEFI.exists() else f"{UEFI}: apt install qemu-efi-aarch64"


def unpack_card(image: Path, target: Path) -> Path:
    """Write the raw card of `image` (`.img` or `.img.zst`) to `target`, as a sparse file."""
    if image.suffix == ".zst":
        _run(["zstd", "-q", "-d", "-f", "--sparse", str(image), "-o", str(target)])
    else:
        _run(["cp", "--sparse=always", str(image), str(target)])
    return target


@dataclass(frozen=True)
class Card:
    """A card in a machine's slot: changes of the raw image `base` go to `path`, and stay when the power goes."""

    base: Path
    path: Path


def insert_card(base: Path, folder: Path, files: Mapping[str, Path]) -> Card:
    """A card like the raw image `base`, with `files` put onto its boot partition as a person would."""
    copy = folder / "card.img"
    _run(["cp", "--sparse=always", str(base), str(copy)])
    if files:
        copy_to_boot(copy, files)
    path = folder / "card.qcow2"
    _run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(copy), "-F", "raw", str(path), str(CARD_BYTES)])
    return Card(copy, path)


class Machine:
    """One emulated machine; `start` and `cut_power` may alternate, what was written to the card stays.

    Parameters
    ----------
    kind : "virt", "uefi" or "raspi3b"
        Direct start of the kernel, start through UEFI and systemd-boot, or a Raspberry Pi 3.
    card : Card
    folder : Path
        Gets `serial.log`, over all starts.
    """

    def __init__(self, kind: Kind, card: Card, folder: Path) -> None:
        self.kind, self.card = kind, card
        self.serial = folder / "serial.log"
        self.serial.touch()
        self._folder = folder
        self._monitor = folder / "monitor"
        self._process: subprocess.Popen[bytes] | None = None
        self._prepare()

    @property
    def running(self) -> bool:
        """Whether the emulator runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Switch it on."""
        said = self._folder / "qemu.log"
        self._monitor.unlink(missing_ok=True)
        with said.open("ab") as output:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def cut_power(self) -> None:
        """End it between two instructions."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Press the power button; after `STOP_S` cut the power."""
        if self.running and self._process is not None:
            self._say("system_powerdown")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self.cut_power()

    def connect(self, up: bool) -> None:
        """Plug the network in or out."""
        self._say("set_link", name="net0", up=up)

    def wait(self, until: Callable[[], bool], timeout_s: float, what: str) -> float:
        """Seconds until `until` holds; `EmulationError` when it does not in time, or the emulator ends."""
        started_s = time.monotonic()
        while not until():
            passed_s = time.monotonic() - started_s
            if not self.running or passed_s > timeout_s:
                raise EmulationError(
                    f"{self.kind}: {what} did not come within {passed_s:.0f} s. The end of {self.serial}:\n"
                    f"{self.read_serial()[-2000:]}"
                )
            time.sleep(0.05)
        return time.monotonic() - started_s

    def read_serial(self) -> str:
        """What it has said on its serial line, over all starts."""
        return self.serial.read_text(errors="replace")

    def _prepare(self) -> None:
        if self.kind == "uefi":
            shutil.copy(UEFI_VARIABLES, self._folder / "variables.fd")
            return
        names = ["vmlinuz", "initrd.gz"] + (["bcm2837-rpi-3-b.dtb"] if self.kind == "raspi3b" else [])
        for name in names:
            copy_from_boot(self.card.base, f"slot-a/{name}", self._folder / name)

    def _command(self) -> list[str]:
        folder, disk = self._folder, f"file={self.card.path},format=qcow2"
        command = ["qemu-system-aarch64", "-display", "none", "-monitor", "none"]
        command += ["-qmp", f"unix:{self._monitor},server=on,wait=off"]
        command += ["-chardev", f"file,id=serial,path={self.serial},append=on", "-serial", "chardev:serial"]
        command += ["-netdev", "user,id=net"]
        direct = ["-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd.gz")]
        if self.kind == "raspi3b":
            # QEMU's watchdog of this board resets it the moment that it is set.
            options = f"{_OPTIONS} console=ttyAMA0,115200 console=ttyS1,115200 module_blacklist=bcm2835_wdt"
            command += [
                "-M",
                "raspi3b",
                *direct,
                "-dtb",
                str(folder / "bcm2837-rpi-3-b.dtb"),
                "-append",
                options,
            ]
            command += ["-serial", f"file:{folder / 'serial-1.log'}", "-drive", f"if=sd,{disk}"]
            return [*command, "-device", "usb-net,netdev=net,id=net0"]
        command += ["-M", "virt", "-cpu", "cortex-a72", "-smp", "2", "-m", "1024", "-device", "virtio-rng-pci"]
        command += ["-drive", f"if=none,id=card,{disk}", "-device", "virtio-blk-pci,drive=card"]
        command += ["-device", "virtio-net-pci,netdev=net,id=net0,romfile="]
        if self.kind == "virt":
            return [*command, *direct, "-append", f"{_OPTIONS} console=ttyAMA0"]
        command += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={UEFI}"]
        return [*command, "-drive", f"if=pflash,unit=1,format=raw,file={folder / 'variables.fd'}"]

    def _say(self, command: str, **arguments: object) -> None:
        """Give the emulator one command."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(STOP_S)
            monitor.connect(str(self._monitor))
            with monitor.makefile("rw", encoding="utf-8") as talk:
                talk.readline()
                for words in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
                    talk.write(json.dumps(words) + "\n")
                    talk.flush()
                    while not {"return", "error"} & set(answer := json.loads(talk.readline())):
                        pass
                    if "error" in answer:
                        raise EmulationError(f"the emulator refuses {command}: {answer['error']['desc']}.")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
