"""Programs of an arm64 root under qemu-user: the device's own interpreter and wheels, at the speed of a test.

It says that instructions, libraries and results are right. It says nothing of a board's speed, memory or devices.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from splitward.errors import SplitwardError

BINFMT = Path("/proc/sys/fs/binfmt_misc")
REGISTRATION = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
CPUS = {"rpi3": "cortex-a53", "rpi4": "cortex-a72"}
_PARTS = {"rpi3": "0xd03", "rpi4": "0xd08"}
_CORES = 4


class EmulationError(SplitwardError):
    """A program or machine cannot be emulated here."""


def missing_tools() -> str | None:
    """What emulating programs lacks on this machine, for people; None when nothing."""
    if os.geteuid():
        return "root, which changes into the emulated root"
    if shutil.which("qemu-aarch64-static") is None:
        return "qemu-aarch64-static: apt install qemu-user-static"
    try:
        register()
    except EmulationError as error:
        return str(error)
    return None


def register() -> None:
    """Have the kernel start arm64 programs through qemu-user, where it does not yet.

    Raises
    ------
    EmulationError
        The kernel does not let us.
    """
    if (BINFMT / "qemu-aarch64").exists():
        return
    try:
        if not (BINFMT / "register").exists():
            subprocess.run(["mount", "-t", "binfmt_misc", "none", str(BINFMT)], check=True, capture_output=True)
        if not (BINFMT / "qemu-aarch64").exists():
            (BINFMT / "register").write_bytes(_registration())
    except (OSError, subprocess.CalledProcessError) as error:
        raise EmulationError(
            f"{BINFMT}: arm64 programs cannot be registered: {error}. Start `binfmt-support`, or run as root."
        ) from error


def _registration() -> bytes:
    """Debian's line; `F` opens the emulator now, so that it need not lie inside the emulated root."""
    if REGISTRATION.exists():
        return REGISTRATION.read_bytes().strip()
    magic = r"\x7fELF\x02\x01\x01" + r"\x00" * 9 + r"\x02\x00\xb7\x00"
    mask = r"\xff" * 7 + r"\x00" + r"\xff" * 8 + r"\xfe\xff\xff\xff"
    return f":qemu-aarch64:M::{magic}:{mask}:/usr/bin/qemu-aarch64-static:POF".encode()


def cpuinfo(board: str = "rpi4") -> str:
    """What /proc/cpuinfo says on a board. With the host's own, ONNX Runtime and LiteRT crash under qemu-user 7.2."""
    core = (
        "BogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {_PARTS[board]}\nCPU revision\t: 3\n"
    )
    return "\n".join(f"processor\t: {number}\n{core}" for number in range(_CORES))


def run_in_root(
    root: Path,
    command: Sequence[str],
    timeout_s: float,
    board: str = "rpi4",
    binds: Mapping[Path, str] | None = None,
    environment: Mapping[str, str] | None = None,
    folder: str = "/",
) -> subprocess.CompletedProcess[str]:
    """Run `command` of the arm64 `root`; mounts are its own and end with it.

    Parameters
    ----------
    root : Path
        Unpacked by `splitward image base`.
    command : sequence of str
        Path inside the root, and arguments.
    timeout_s : float
        It is killed after so long.
    board : "rpi3" or "rpi4"
        Whose processor it meets: an instruction that the board lacks is illegal here too.
    binds : mapping, optional
        Folders of this machine, and where they lie inside.
    environment : mapping, optional
    folder : str
        Where it runs, inside.

    Raises
    ------
    EmulationError
        It did not end in time.
    """
    info = root.with_name(f"{root.name}.cpuinfo-{board}")
    info.write_text(cpuinfo(board))
    steps = [f"mount --bind {shlex.quote(str(root))} {shlex.quote(str(root))}", f"cd {shlex.quote(str(root))}"]
    steps += [
        "mount -t proc proc proc",
        "mount --rbind /dev dev",
        "mount --rbind /sys sys",
        f"mount --bind {shlex.quote(str(info))} proc/cpuinfo",
    ]
    steps += ["mount -t tmpfs tmpfs tmp"]
    for source, target in (binds or {}).items():
        inside = shlex.quote(str(root / target.lstrip("/")))
        steps += [f"mkdir -p {inside}", f"mount --bind {shlex.quote(str(source))} {inside}"]
    inner = {"PATH": "/usr/sbin:/usr/bin", "HOME": "/root", "LANG": "C.UTF-8", "QEMU_CPU": CPUS[board]}
    inner |= dict(environment or {})
    words = ["env", "-i", f"--chdir={folder}", *[f"{key}={value}" for key, value in inner.items()], *command]
    steps += [f"exec chroot . {shlex.join(words)}"]
    # A process namespace of its own: what the command leaves behind ends with it.
    whole = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", "\n".join(steps)]
    try:
        return subprocess.run(whole, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise EmulationError(
            f"{shlex.join(command)} did not end within {timeout_s} s under qemu-user."
        ) from error
