"""The device's Python packages: aarch64 wheels named by version and hash, unpacked on any host."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from splitward.errors import ImageError
from splitward.image.prune import is_dropped

LOCK = Path(__file__).with_name("python.lock")
SOURCE = Path(__file__).resolve().parents[2]
PYTHON = "3.11"
"""Debian 12's, which the wheels are for."""
TOP_LEVEL = (
    *("numpy", "onnxruntime", "ai-edge-litert", "opencv-python-headless", "paho-mqtt", "pillow", "msgspec"),
    *("cryptography", "pydicom", "pynetdicom"),
)
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
_FILES = ("__init__.py", "config.py", "disk.py", "errors.py", "py.typed", "versions.py")
AGENT = ("edge", "splitward/wire", "splitward/imaging", *(f"splitward/{name}" for name in _FILES))
"""What of this repository runs on a device."""


@dataclass(frozen=True, order=True)
class Requirement:
    """One line of the lock file."""

    name: str
    version: str
    sha256: str


def read_lock(path: Path = LOCK) -> list[Requirement]:
    """Wheels of the lock file at `path`, which is also a requirements file of pip's."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line and not line.startswith("#"):
            pinned, _, digest = line.partition(" --hash=sha256:")
            name, _, version = pinned.partition("==")
            if not (name and version and len(digest) == 64):
                raise ImageError(f"{path}:{number}: is not NAME==VERSION --hash=sha256:... Restore the file.")
            found.append(Requirement(name, version, digest))
    return found


def resolve(constraints: Path) -> list[Requirement]:
    """What `TOP_LEVEL` needs on a device within `constraints`, by pip."""
    with tempfile.TemporaryDirectory(prefix="splitward-wheels-") as name:
        _download(Path(name), ["--constraint", str(constraints), *TOP_LEVEL])
        found = []
        for wheel in Path(name).glob("*.whl"):
            package, version, *_ = wheel.name.split("-")
            if package != "tqdm":  # of LiteRT's own tools, which stay out
                found.append(Requirement(package, version, hashlib.sha256(wheel.read_bytes()).hexdigest()))
    return sorted(found)


def write_lock(requirements: Sequence[Requirement], path: Path = LOCK) -> None:
    """Write the lock file at `path`."""
    lines = [f"{one.name}=={one.version} --hash=sha256:{one.sha256}" for one in requirements]
    header = f"# aarch64, CPython {PYTHON}; made by `splitward image lock`, installed with --no-deps"
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")


def fetch(cache: Path, lock: Path = LOCK) -> list[Path]:
    """Paths of the lock's wheels in `cache`, fetched by pip where they are missing.

    Raises
    ------
    ImageError
        pip cannot fetch one, or it is not what the lock says.
    """
    cache.mkdir(parents=True, exist_ok=True)
    wanted = {one.sha256 for one in read_lock(lock)}
    have = _by_hash(cache)
    if not wanted <= set(have):
        _download(cache, ["--no-deps", "--require-hashes", "--requirement", str(lock)])
        have = _by_hash(cache)
    return sorted(have[digest] for digest in wanted)


def fetch_others(cache: Path, wanted: Sequence[str], constraints: Path) -> list[Path]:
    """Paths of aarch64 wheels of `wanted`, and of what they need, within `constraints`: for tests alone."""
    cache.mkdir(parents=True, exist_ok=True)
    _download(cache, ["--constraint", str(constraints), *wanted])
    return sorted(cache.glob("*.whl"))


def _by_hash(folder: Path) -> dict[str, Path]:
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.glob("*.whl"))}


def _download(folder: Path, words: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"pip cannot fetch the device's wheels: {done.stderr.strip()[-800:]}")


def unpack(wheels: Sequence[Path], target: Path) -> None:
    """Unpack `wheels` into the folder `target`, without what a device never loads."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                if not entry.is_dir() and not is_dropped(entry.filename):
                    archive.extract(entry, target)


def copy_agent(target: Path) -> None:
    """Copy what of this repository runs on a device into the folder `target`."""
    for name in AGENT:
        source = SOURCE / name
        if source.is_dir():
            shutil.copytree(
                source, target / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / name)


def compile_python(root: Path, folders: Sequence[str]) -> None:
    """Compile the modules below `folders` of `root`, so that a read-only device need not at every start.

    Raises
    ------
    ImageError
        There is no Python 3.11, whose byte code the image's Python reads.
    """
    program = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if program is None:
        raise ImageError(f"Python {PYTHON} is needed to compile the image's modules. Install python{PYTHON}.")
    command = [program, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", str(root), "-p", "/", *[str(root / folder) for folder in folders]]
    # Some packages carry modules for other versions of Python; they do not compile, and are not loaded.
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
