"""Debian packages: the lock file, the cache, and how they become files of a root. Nothing of them is run here.

The lock names every package by version and SHA-256, so a root holds the same bytes wherever it is built. The
archive of a mirror keeps only current versions: when one of the lock's is gone, build from a snapshot mirror, or
run `splitward image lock` and review what changes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from splitward.errors import ImageError

LOCK = Path(__file__).with_name("debian.lock")
ARCHITECTURE = "arm64"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
FETCH_TIMEOUT_S = 120.0

GROUPS = {
    # What the container and the emulated root hold: Python and what its modules load.
    "python": (
        *("base-files", "base-passwd", "bash", "ca-certificates", "coreutils", "dash", "findutils", "grep"),
        *("libc-bin", "libstdc++6", "python3", "sed", "util-linux"),
    ),
    # What makes it a system that boots, is reached, updates itself and says what time it is.
    "system": (
        *(
            "systemd",
            "systemd-sysv",
            "systemd-timesyncd",
            "systemd-resolved",
            "udev",
            "kmod",
            "dbus",
            "iproute2",
        ),
        *(
            "openssh-server",
            "rauc",
            "rauc-service",
            "e2fsprogs",
            "dosfstools",
            "fdisk",
            "mount",
            "procps",
            "gzip",
        ),
        *("tar", "hostname", "wpasupplicant", "wireless-regdb", "login"),
    ),
    # Unpacked beside the root: parts of it go to the boot partition.
    "boot": ("busybox-static", "systemd-boot-efi", "raspi-firmware"),
    "kernel": ("linux-image-arm64",),
    "kernel-rpi5": ("linux-image-arm64/trixie-backports",),
    "firmware": ("firmware-brcm80211",),
    # What the tests of the agent need under emulation, and what the container is built with.
    "test": ("mosquitto", "python3-pip"),
}
TEST_SHARES = frozenset({"libwrap0", "mount"})
"""What the tests' packages need as well, and the lock counts to the group that needed it first."""
BESIDE = frozenset({"boot", "kernel", "kernel-rpi5", "firmware"})
"""Groups that are unpacked beside the root, in part."""
SUITES = {
    "debian": ("bookworm", "bookworm-updates", "trixie-backports"),
    "debian-security": ("bookworm-security",),
}
WITHOUT = frozenset(
    (
        *("adduser", "apt", "debconf", "debian-archive-keyring", "dbus-session-bus-common", "gpgv"),
        *("init-system-helpers", "libapt-pkg6.0", "libfile-find-rule-perl", "libgdbm-compat4", "libgdbm6"),
        *("libnumber-compare-perl", "libpam-runtime", "libperl5.36", "libtext-glob-perl", "perl", "perl-base"),
        *("perl-modules-5.36", "runit-helper", "sensible-utils", "ucf", "usrmerge"),
    )
)
"""Asked for by maintainer scripts, which are never run."""


@dataclass(frozen=True, order=True)
class Package:
    """One line of the lock file; `path` is relative to a mirror, archive included."""

    group: str
    name: str
    version: str
    sha256: str
    size: int
    path: str


def read_lock(path: Path = LOCK) -> list[Package]:
    """Packages of the lock file at `path`; `ImageError` when a line is not one."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 6 or not fields[4].isdigit():
            raise ImageError(f"{path}:{number}: is not GROUP NAME VERSION SHA256 SIZE PATH. Restore the file.")
        group, name, version, sha256, size, where = fields
        found.append(Package(group, name, version, sha256, int(size), where))
    return found


def read_epoch(path: Path = LOCK) -> int:
    """Seconds since 1970 when the lock file at `path` was made: the time that everything in an image shows.

    It is also the floor of the clock of a board that has none, so it must not lie far back.
    """
    first = path.read_text(encoding="utf-8").splitlines()[0]
    try:
        return int(first.removeprefix("# epoch "))
    except ValueError:
        raise ImageError(f"{path}:1: is not `# epoch SECONDS`. Restore the file.") from None


def write_lock(packages: Iterable[Package], epoch: int, path: Path = LOCK) -> None:
    """Write the lock file at `path`, sorted."""
    lines = [
        f"{one.group} {one.name} {one.version} {one.sha256} {one.size} {one.path}" for one in sorted(packages)
    ]
    header = "# Made by `splitward image lock`: GROUP NAME VERSION SHA256 SIZE PATH (below a Debian mirror)"
    path.write_text("\n".join([f"# epoch {epoch}", header, *lines]) + "\n", encoding="utf-8")


def find_mirror() -> str:
    """Base address of a Debian mirror: SPLITWARD_MIRROR, else the one that this machine's own apt uses.

    Raises
    ------
    ImageError
        It uses none.
    """
    if named := os.environ.get("SPLITWARD_MIRROR"):
        return named.rstrip("/")
    try:
        found = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    for address in found:
        if address.rstrip("/").endswith("/debian"):
            return address.rstrip("/").removesuffix("/debian")
    raise ImageError(
        "this machine's apt names no Debian mirror. Give one with --mirror: the address below which "
        "debian/ and debian-security/ lie."
    )


def fetch(packages: Sequence[Package], cache: Path, mirror: str) -> list[Path]:
    """Paths of the packages' files in `cache`, fetched from `mirror` where they are missing.

    Raises
    ------
    ImageError
        One cannot be fetched, or is not what the lock says.
    """
    cache.mkdir(parents=True, exist_ok=True)
    return [_fetch_one(package, cache, mirror) for package in packages]


def _fetch_one(package: Package, cache: Path, mirror: str) -> Path:
    target = cache / f"{package.sha256[:16]}-{Path(package.path).name}"
    if target.exists() and target.stat().st_size == package.size:
        return target
    address = f"{mirror}/{package.path}"
    partial = target.with_name(target.name + ".partial")
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(address, timeout=FETCH_TIMEOUT_S) as source, partial.open("wb") as file:  # noqa: S310 -- the mirror that the user named
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise ImageError(
            f"{address}: {error}. A mirror keeps current versions only: give a snapshot mirror with --mirror, or "
            "renew the lock with `splitward image lock`."
        ) from error
    if digest.hexdigest() != package.sha256:
        partial.unlink()
        raise ImageError(f"{address}: differs from the lock file. Try again; if it stays so, trust neither.")
    partial.replace(target)
    return target


def unpack(archives: Iterable[Path], root: Path) -> None:
    """Unpack the files of `archives` into `root`, whose /bin, /lib and /sbin are links into /usr."""
    for name in ("bin", "lib", "sbin"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for archive in archives:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as source:
            command = ["tar", "-x", "--keep-directory-symlink", "--numeric-owner", "-C", str(root)]
            code = subprocess.run([*command, *_excludes()], stdin=source.stdout, check=False).returncode
        if code or source.returncode:
            raise ImageError(f"{archive}: cannot be unpacked into {root}. Is the disk full? Are you root?")


def _excludes() -> list[str]:
    """Documentation, translations and other people's init scripts stay out; licences stay in."""
    out = ("doc/*", "man/*", "info/*", "locale/*", "lintian/*", "bash-completion/*", "zsh/*", "bug/*")
    kept_out = [f"--exclude=./usr/share/{name}" for name in out[1:]]
    # `tar` has no exclusion of an exclusion: changelogs go by name, so that copyright files stay.
    by_name = ("changelog*", "NEWS*", "README*", "TODO*", "examples")
    kept_out += [f"--exclude=./usr/share/doc/*/{name}" for name in by_name]
    return ["--wildcards", *kept_out, "--exclude=./etc/init.d/*", "--exclude=./usr/share/initramfs-tools"]


def resolve(mirror: str) -> list[Package]:
    """Today's versions of `GROUPS` and of what they depend on, by apt in a root of its own.

    Raises
    ------
    ImageError
        apt is not there, or cannot resolve them.
    """
    with tempfile.TemporaryDirectory(prefix="splitward-lock-") as name:
        apt = _Apt(Path(name), mirror)
        apt.run("apt-get", "update")
        planned: list[tuple[str, str, str, str]] = []
        names: set[str] = set()
        for group, wanted in GROUPS.items():
            beside = group in BESIDE
            for path, version, package in apt.plan(wanted, with_dependencies=group != "boot"):
                if package not in WITHOUT and (_belongs(group, package) if beside else package not in names):
                    planned.append((group, package, version, path))
                    names |= set() if beside else {package}
        described = apt.describe([f"{package}={version}" for _, package, version, _ in planned])
        return [
            Package(group, package, version, *described[package, version], path)
            for group, package, version, path in planned
        ]


def _belongs(group: str, package: str) -> bool:
    """Whether the group means this package; the others that apt adds build initial RAM disks."""
    if group.startswith("kernel"):
        return package.startswith("linux-") and package not in ("linux-base", "linux-image-arm64")
    return package in GROUPS[group]


class _Apt:
    """apt on an empty arm64 system."""

    def __init__(self, folder: Path, mirror: str) -> None:
        for name in ("etc/apt.conf.d", "etc/preferences.d", "state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        lines = [
            f"deb [signed-by={KEYRING}] {mirror}/{archive} {suite} main non-free-firmware"
            for archive, suites in SUITES.items()
            for suite in suites
        ]
        (folder / "etc" / "sources.list").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._mirror = mirror
        settings = {
            "Dir::Etc": folder / "etc",
            "Dir::Etc::Parts": folder / "etc/apt.conf.d",
            "Dir::Etc::PreferencesParts": folder / "etc/preferences.d",
            "Dir::State": folder / "state",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "APT::Install-Recommends": "false",
            "Acquire::Languages": "none",
        }
        self._options = [text for key, value in settings.items() for text in ("-o", f"{key}={value}")]

    def run(self, program: str, *words: str) -> str:
        """What `program` says; `ImageError` when it fails."""
        try:
            done = subprocess.run(
                [program, *self._options, *words], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise ImageError(f"{program}: {error}. The lock is renewed on Debian or Ubuntu.") from error
        if done.returncode:
            raise ImageError(f"{program} {' '.join(words)}: {done.stderr.strip()[-800:]}")
        return done.stdout

    def plan(self, wanted: Sequence[str], with_dependencies: bool) -> list[tuple[str, str, str]]:
        """Path below the mirror, version and name of everything that `wanted` would install."""
        words = ("install", "-y") if with_dependencies else ("download",)
        found = []
        for line in self.run("apt-get", *words, "--print-uris", "-qq", *wanted).splitlines():
            address, name, *_ = line.split()
            package, version, _ = unquote(name).split("_")
            found.append((address.strip("'").removeprefix(self._mirror).lstrip("/"), version, package))
        return found

    def describe(self, wanted: Sequence[str]) -> dict[tuple[str, str], tuple[str, int]]:
        """SHA-256 and size by name and version."""
        found = {}
        for stanza in self.run("apt-cache", "show", *wanted).split("\n\n"):
            fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line)
            if fields:
                found[fields["Package"], fields["Version"]] = (fields["SHA256"], int(fields["Size"]))
        return found
