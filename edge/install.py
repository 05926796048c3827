"""`edge install`: the agent on a Debian or Ubuntu system that is there already, such as a Jetson's JetPack 6.

Every step looks first and changes only what differs, so that installing again repairs or updates. The
configuration and the state are never overwritten; `uninstall` leaves them unless it is told to purge.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge.errors import InstallError
from splitward.disk import write_whole

USER = "splitward"
VENV = Path("/opt/splitward")
CONFIG = Path("/etc/splitward")
STATE = Path("/var/lib/splitward")
UNITS = Path("/etc/systemd/system")
SERVICE = "splitward-edge.service"
EXTRAS = "[edge,edge-tflite]"
"""Of the package, what a device runs with: link, image files and both runtimes."""
SHIPPED = Path(__file__).with_name("systemd")
EXAMPLE = f"""\
# The agent's settings; every key is described in edge/config.py.
[device]
id = "change-me"
site = "change-me"
bundle = "{STATE}/model.bundle"
trusted_key = "{CONFIG}/trusted.pub"
state_dir = "{STATE}"

[capture]  # kind = "camera" needs OpenCV: splitward[camera], or the system's with --system-packages
kind = "folder"
path = "{STATE}/images"
watch = true

[broker]
host = "broker.example.org"
port = 8883
"""


@dataclass(frozen=True)
class InstallSettings:
    """What to install.

    Attributes
    ----------
    package : str
        What pip installs: a wheel or a folder, to which `EXTRAS` are added where none are named, or a requirement
        such as `splitward[edge,edge-tflite]`.
    pip_arguments : tuple of str
        Given to pip as they are, such as `--constraint FILE`.
    system_packages : bool
        Let the agent see the system's own Python packages, such as JetPack's OpenCV.
    """

    package: str
    pip_arguments: tuple[str, ...] = ()
    system_packages: bool = False


def install(settings: InstallSettings, say: Callable[[str], None]) -> None:
    """Set up user, virtual environment, folders, units and an example configuration.

    Raises
    ------
    InstallError
        A step fails; the ones before it stand, and the next attempt goes on from there.
    """
    _require_root()
    if not _user_exists():
        _run(["useradd", "--system", "--home-dir", str(STATE), "--shell", "/usr/sbin/nologin", USER])
        say(f"user {USER}: made")
    for folder, mode in ((STATE, 0o700), (CONFIG, 0o750)):
        if not folder.is_dir():
            folder.mkdir(parents=True)
            say(f"{folder}: made")
        folder.chmod(mode)
    (STATE / "images").mkdir(mode=0o700, exist_ok=True)
    # The configuration, too: the agent's user replaces its certificate there. Files that root made, it could not read.
    _run(["chown", "--recursive", "--no-dereference", f"{USER}:{USER}", str(STATE), str(CONFIG)])
    pip = [str(VENV / "bin/python"), "-m", "pip"]
    if not _works([*pip, "--version"]):  # without Debian's python3-venv, one is made that lacks pip
        words = ["--system-site-packages"] if settings.system_packages else []
        _run([sys.executable, "-m", "venv", "--clear", *words, str(VENV)])
        say(f"{VENV}: virtual environment made")
    package = settings.package + (EXTRAS if Path(settings.package).exists() else "")
    command = [*pip, "install", "--quiet", *settings.pip_arguments]
    # What is there is replaced even where its version is the same: its files may be damaged, or the wheel another one.
    _run([*command, "--force-reinstall", "--no-deps", package])
    _run([*command, package])
    say(f"{package}: installed")
    if not (CONFIG / "edge.toml").exists():
        write_whole(CONFIG / "edge.toml", EXAMPLE.encode(), 0o640)
        say(f"{CONFIG / 'edge.toml'}: an example, to be edited")
    changed = [name for name, text in _units().items() if _write(UNITS / name, text)]
    if changed:
        say(f"{', '.join(changed)}: written")
    if Path("/run/systemd/system").is_dir():
        _run(["systemctl", "daemon-reload"])
        _run(["systemctl", "enable", SERVICE])
    else:
        say("systemd does not run here: the units take effect at the next start")
    say(f"edit {CONFIG / 'edge.toml'}, then: systemctl restart {SERVICE}")


def uninstall(purge: bool, say: Callable[[str], None]) -> None:
    """Remove units and virtual environment; with `purge` configuration, state, keys and user as well.

    Raises
    ------
    InstallError
        A step fails; attempt it again.
    """
    _require_root()
    present = [name for name in _units() if (UNITS / name).exists()]
    if present and Path("/run/systemd/system").is_dir():
        _run(["systemctl", "disable", "--now", *present])
    for name in present:
        (UNITS / name).unlink()
        say(f"{name}: removed")
    if present and Path("/run/systemd/system").is_dir():
        _run(["systemctl", "daemon-reload"])
    for folder in (VENV, *((CONFIG, STATE) if purge else ())):
        if folder.exists():
            shutil.rmtree(folder)
            say(f"{folder}: removed")
    if purge and _user_exists():
        _run(["userdel", USER])
        say(f"user {USER}: removed")


def _units() -> dict[str, str]:
    """Texts of the units by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(SHIPPED.glob("*.service"))}


def _write(path: Path, text: str) -> bool:
    """Write `text` to `path` unless it holds it already; whether it was written."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_whole(path, text.encode(), 0o644)
    return True


def _require_root() -> None:
    if os.geteuid():
        raise InstallError("users, units and /opt belong to root: run it with sudo.")


def _user_exists() -> bool:
    try:
        pwd.getpwnam(USER)
    except KeyError:
        return False
    return True


def _works(command: Sequence[str]) -> bool:
    """Whether `command` can be run, and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InstallError(f"{command[0]}: {error.strerror}. It is part of Debian and Ubuntu.") from error
    if done.returncode:
        raise InstallError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")
