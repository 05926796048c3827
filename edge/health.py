"""What the device knows of its own health: disk, temperature, certificate, memory, and systemd's watchdog.

`python -m edge.health CERTIFICATE` prints its end: the agent asks so, as reading it takes 8 MB that would stay.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

THERMAL = Path("/sys/class/thermal")


class Notifier:
    """Tells systemd that the agent is ready, and lives. Without systemd it does nothing.

    It speaks the protocol of sd_notify(3): a datagram to the socket that the environment names.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watchdog_us = int(environment.get("WATCHDOG_USEC") or 0)
        if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            watchdog_us = 0  # it is meant for another process
        self._period_s = watchdog_us / 1e6 / 3
        self._due_s = 0.0

    def say(self, *lines: str) -> None:
        """Send lines such as `READY=1`."""
        if self._address:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
                door.sendto("\n".join(lines).encode(), self._address)

    def live(self, now_s: float) -> None:
        """Feed the watchdog, when it is due."""
        if self._period_s and now_s >= self._due_s:
            self._due_s = now_s + self._period_s
            self.say("WATCHDOG=1")


def disk_free_bytes(folder: Path) -> int | None:
    """Bytes that the agent may still write on the disk of `folder`."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return None
    return disk.f_bavail * disk.f_frsize


def temperature_c(folder: Path = THERMAL) -> float | None:
    """Temperature of the hottest zone that the kernel reports; None where it reports none."""
    found = []
    for zone in folder.glob("thermal_zone*/temp"):
        with suppress(OSError, ValueError):
            found.append(int(zone.read_text()) / 1000)
    return max(found, default=None)


def certificate_expires_at_ns(path: Path) -> int | None:
    """End of the PEM certificate at `path`, nanoseconds of UTC since 1970; None if it cannot be read."""
    from cryptography import x509

    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return None
    return int(certificate.not_valid_after_utc.timestamp() * 1e9)


def certificate_expires_apart(path: Path) -> int | None:
    """As `certificate_expires_at_ns`, in a process of its own. It has no time limit, as clocks may jump."""
    command = [sys.executable, "-m", "edge.health", str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    return int(done.stdout) if done.stdout.strip() else None


def memory_mb(pid: int | str = "self") -> float | None:
    """Resident memory of a process, shared pages counted in their share where the kernel says so (PSS)."""
    return memory_of(pid).get("Pss")


def memory_of(pid: int | str = "self") -> dict[str, float]:
    """`Rss` and `Pss` of a process in MB (2^20 bytes); empty where the kernel does not tell."""
    found: dict[str, float] = {}
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            key, _, rest = line.partition(":")
            if key in ("Rss", "Pss"):
                found[key] = int(rest.split()[0]) / 1024
    return found


def uptime_s(started_s: float) -> float:
    """Seconds since `started_s` of the monotonic clock."""
    return time.monotonic() - started_s


if __name__ == "__main__":
    print(certificate_expires_at_ns(Path(sys.argv[1])) or "")
