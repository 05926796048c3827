"""The root file system: packages, the accounts and links that maintainer scripts would have made, the agent."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from splitward.image import debian
from splitward.image.wheels import PYTHON, SOURCE, compile_python, copy_agent, fetch
from splitward.image.wheels import unpack as unpack_wheels

FILES = Path(__file__).with_name("files")
SITE_PACKAGES = f"usr/local/lib/python{PYTHON}/dist-packages"
AGENT_USER = "splitward"
_ACCOUNTS = (
    # name, number, home; none has a password, and none but root a shell
    ("messagebus", 990, "/nonexistent"),
    ("sshd", 991, "/run/sshd"),
    ("systemd-network", 998, "/"),
    ("systemd-resolve", 997, "/"),
    ("systemd-timesync", 996, "/"),
    (AGENT_USER, 900, "/var/lib/splitward"),
)
_GROUPS = (
    ("systemd-journal", 995),
    ("render", 994),
    ("sgx", 993),
    ("kvm", 992),
    ("crontab", 989),
    ("input", 988),
    ("netdev", 987),
)
_AGENT_GROUPS = ("video",)
"""The camera's."""
_ENABLED = {
    "multi-user.target.wants": (
        *("ssh.service", "splitward-edge.service", "splitward-checkin.service", "splitward-ssh-key.service"),
        *("splitward-enrol.service", "splitward-update.service"),
        *("systemd-networkd.service", "rauc.service"),
    ),
    "sysinit.target.wants": ("splitward-site.service", "systemd-timesyncd.service", "systemd-resolved.service"),
}
_MASKED = (
    # Nobody can log in at a console that knows no password; nothing here is Debian's to renew by itself.
    *("getty.target", "serial-getty@.service", "getty@.service", "console-getty.service"),
    *("systemd-firstboot.service", "systemd-machine-id-commit.service", "systemd-update-done.service"),
    *("ldconfig.service", "systemd-hwdb-update.service", "systemd-journal-catalog-update.service"),
    *("fstrim.timer", "e2scrub_all.timer", "e2scrub_reap.service", "systemd-pstore.service"),
    # Accounts are made with the image, no foreign programs run here, and nobody asks who was logged in when.
    *("systemd-sysusers.service", "systemd-repart.service", "systemd-binfmt.service"),
    *(
        "proc-sys-fs-binfmt_misc.automount",
        "systemd-update-utmp.service",
        "systemd-update-utmp-runlevel.service",
    ),
    *("sys-fs-fuse-connections.mount", "modprobe@fuse.service", "modprobe@drm.service"),
    # Who needs an address tries again; waiting for one would hold up everything else at a site without network.
    "systemd-networkd-wait-online.service",
)


def build_base(folder: Path, cache: Path, mirror: str | None, with_test: bool, with_agent: bool) -> None:
    """Unpack Debian with Python into `folder`: a container's base, or with the agent a root for emulation."""
    groups, shared = ({"python", "test"}, debian.TEST_SHARES) if with_test else ({"python"}, frozenset[str]())
    packages = [one for one in debian.read_lock() if one.group in groups or one.name in shared]
    folder.mkdir(parents=True)
    folder.chmod(0o755)
    debian.unpack(debian.fetch(packages, cache / "debian", mirror or debian.find_mirror()), folder)
    finish_root(folder, fetch(cache / "wheels") if with_agent else [], with_agent=with_agent)
    write_status(folder, [(one.name, one.version) for one in packages])


def finish_root(root: Path, wheels: list[Path], with_agent: bool = True, name: str = "splitward") -> None:
    """Make the unpacked packages in `root` a system: accounts, certificates, time zone, Python, the agent."""
    _write_accounts(root)
    _bundle_certificates(root)
    site_packages = root / SITE_PACKAGES
    site_packages.mkdir(parents=True, exist_ok=True)
    unpack_wheels(wheels, site_packages)
    if with_agent:
        copy_agent(site_packages)
    python = root / "usr/bin/python3"
    if not python.exists():
        python.symlink_to(f"python{PYTHON}")
    for folder in (
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "data",
        "root",
        "var/tmp",
        "var/lib/splitward",
        "boot/firmware",
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
    _link(root / "var/run", "/run")
    _link(root / "var/lock", "/run/lock")
    for folder in ("tmp", "var/tmp"):
        (root / folder).chmod(0o1777)
    (root / "root").chmod(0o700)
    _write(root / "etc/hostname", f"{name}\n")
    _write(root / "etc/hosts", f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost ip6-localhost\n")
    _prune(root)
    compile_python(root, (f"usr/lib/python{PYTHON}", SITE_PACKAGES))


def finish_system(root: Path) -> None:
    """Make `root` one that starts: units, mounts, the settings in `files/root`."""
    shutil.copytree(FILES / "root", root, dirs_exist_ok=True, symlinks=True)
    units = root / "etc/systemd/system"
    shutil.copy(SOURCE / "edge/systemd/splitward-edge.service", units)
    for target, names in _ENABLED.items():
        (units / target).mkdir(exist_ok=True)
        for name in names:
            found = next((at for at in (units, root / "usr/lib/systemd/system") if (at / name).exists()), None)
            if found is None:
                raise FileNotFoundError(f"{name}: no package of the image holds this unit")
            _link(units / target / name, "/" + str((found / name).relative_to(root)))
    for name in _MASKED:
        _link(units / name, "/dev/null")
    _link(units / "default.target", "/usr/lib/systemd/system/multi-user.target")
    _link(units / "dbus.service", "/usr/lib/systemd/system/dbus.service")
    _link(root / "etc/resolv.conf", "/run/systemd/resolve/stub-resolv.conf")
    _link(root / "etc/localtime", "/usr/share/zoneinfo/Etc/UTC")
    for name in ("regulatory.db", "regulatory.db.p7s"):
        _link(root / "usr/lib/firmware" / name, f"{name}-debian")
    _write(root / "etc/machine-id", "")
    (root / "etc/splitward").mkdir(exist_ok=True)
    (root / "var/lib/systemd/timesync").mkdir(parents=True, exist_ok=True)
    _write(root / "usr/lib/clock-epoch", "")  # systemd: no clock shows less than this file's time, the image's
    shutil.rmtree(root / "var/lib/dbus", ignore_errors=True)


def write_status(root: Path, names: list[tuple[str, str]]) -> None:
    """Tell scanners what is installed: dpkg's status file, by name and version."""
    stanzas = [
        f"Package: {name}\nStatus: install ok installed\nMaintainer: Debian\nArchitecture: arm64\n"
        f"Version: {version}\nDescription: {name}\n"
        for name, version in sorted(names)
    ]
    (root / "var/lib/dpkg").mkdir(parents=True, exist_ok=True)
    _write(root / "var/lib/dpkg/status", "\n".join(stanzas))


def _write_accounts(root: Path) -> None:
    passwd = (root / "usr/share/base-passwd/passwd.master").read_text()
    groups = (root / "usr/share/base-passwd/group.master").read_text()
    for name, number, home in _ACCOUNTS:
        passwd += f"{name}:x:{number}:{number}::{home}:/usr/sbin/nologin\n"
        groups += f"{name}:x:{number}:\n"
    groups += "".join(f"{name}:x:{number}:\n" for name, number in _GROUPS)
    lines = [line + AGENT_USER if line.split(":")[0] in _AGENT_GROUPS else line for line in groups.splitlines()]
    _write(root / "etc/passwd", passwd.replace(":*:", ":x:"))
    _write(root / "etc/group", "\n".join(lines).replace(":*:", ":x:") + "\n")
    locked = [line.split(":")[0] for line in passwd.splitlines()]
    # A `*` admits nobody by password; a `!` would make sshd refuse root's key as well.
    _write(root / "etc/shadow", "".join(f"{name}:*:19000:0:99999:7:::\n" for name in locked))
    (root / "etc/shadow").chmod(0o640)
    _write(root / "etc/gshadow", "".join(f"{line.split(':')[0]}:*::\n" for line in lines))
    (root / "etc/gshadow").chmod(0o640)
    _write(
        root / "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nshadow: files\nhosts: files resolve [!UNAVAIL=return] dns\n"
        "networks: files\nprotocols: files\nservices: files\n",
    )


def _bundle_certificates(root: Path) -> None:
    found = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    folder = root / "etc/ssl/certs"
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "ca-certificates.crt", "".join(path.read_text() for path in found))


def _prune(root: Path) -> None:
    """Remove what no device uses: half of Python's library, Perl, terminals, translations."""
    library = root / f"usr/lib/python{PYTHON}"
    for name in ("test", "idlelib", "tkinter", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "distutils"):
        shutil.rmtree(library / name, ignore_errors=True)
    for name in (
        "perl",
        "perl5",
        "locale",
        "i18n",
        "gdb",
        "pixmaps",
        "applications",
        "menu",
        "common-licenses.bak",
    ):
        shutil.rmtree(root / "usr/share" / name, ignore_errors=True)
    shutil.rmtree(root / "usr/lib/aarch64-linux-gnu/gconv", ignore_errors=True)
    shutil.rmtree(root / "usr/lib/udev/hwdb.d", ignore_errors=True)
    for path in (root / "var/cache").glob("*"):
        shutil.rmtree(path, ignore_errors=True)


def settle(root: Path, epoch: int) -> None:
    """Take out of `root` what differs from build to build: times and leftovers."""
    for path in sorted(root.rglob("*")):
        if not path.is_symlink() and stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
            continue
        os.utime(path, (epoch, epoch), follow_symlinks=False)
    os.utime(root, (epoch, epoch))


def _link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
