"""The system update: fetch a newer image, go on where a fetch was broken off, hand it to RAUC, restart on trial.

The folder of images (`[update] url` of site.toml) holds `update.json` beside RAUC's bundle. `update.json` only says
what to fetch; nobody signs it. Two things decide whether an image is installed: the bundle's signature, and the build
number in its signed manifest, which must be above that of the image that runs, and of any that was tried.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edge.errors import SystemUpdateError
from edge.fetch import fetch_file, get
from edge.system.site import UpdateConfig
from edge.system.slot import BOOT, TRIES, Loader, Tryboot, current_slot, find_loader
from splitward.config import read_config
from splitward.disk import write_whole
from splitward.errors import SplitwardError

FOLDER = Path("/data/update")
RELEASE = Path("/etc/splitward-release")
MAX_BYTES = 2 << 30
Build = Annotated[int, Meta(ge=0)]


class Image(Struct, frozen=True):
    """What `/etc/splitward-release` says of the image that runs: of two, the one with the higher `build` is newer."""

    version: str
    build: Build


class Tried(Struct, frozen=True):
    """The latest image that was installed, and how often the device was restarted into it."""

    build: Build = 0
    starts: int = 0


class Release(Struct, frozen=True):
    """What `update.json` says of the newest image; `file` lies beside it."""

    build: Build
    version: Annotated[str, Meta(min_length=1, max_length=200)]
    file: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
    size: Annotated[int, Meta(ge=1, le=MAX_BYTES)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


def fetch_release(config: UpdateConfig) -> Release:
    """What the folder of images offers.

    Raises
    ------
    FetchError, SystemUpdateError
        It cannot be had, or is not what a build writes.
    """
    address = f"{config.url.rstrip('/')}/update.json"
    try:
        return msgspec.json.decode(get(address, config.ca), type=Release)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise SystemUpdateError(f"{address}: {error}. Publish the one that the build wrote.") from error


def fetch_bundle(config: UpdateConfig, release: Release, folder: Path) -> Path:
    """Path of the release's bundle in `folder`; a fetch that was broken off goes on where it was.

    Raises
    ------
    FetchError
        It cannot be fetched, or is not what `update.json` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{release.sha256}.raucb"
    for leftover in folder.glob("*.raucb*"):
        if leftover != target:
            leftover.unlink()  # of another release: the partition holds one
    # Once: the next look is the next attempt.
    fetch_file(
        f"{config.url.rstrip('/')}/{release.file}", target, release.sha256, release.size, config.ca, tries=1
    )
    return target


def read_build(bundle: Path) -> int:
    """Build number in the manifest of `bundle`; RAUC says nothing of a bundle whose signature it does not trust.

    Raises
    ------
    SystemUpdateError
        The bundle is not signed by whom this device trusts, or has no number.
    """
    command = ["rauc", "info", "--output-format=json", str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemUpdateError(f"{bundle}: is not trusted: {done.stderr.strip()[-500:]}")
    try:
        return msgspec.json.decode(done.stdout, type=_Manifest, strict=False).build
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise SystemUpdateError(f"{bundle}: its manifest has no build number: {error}.") from error


def install(bundle: Path, release: Release) -> None:
    """Have RAUC write the other slot and put it on trial; `SystemUpdateError` when it refuses."""
    done = subprocess.run(["rauc", "install", str(bundle)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemUpdateError(
            f"{release.version} is not installed: {(done.stdout + done.stderr).strip()[-500:]}"
        )


def look(config: UpdateConfig, running: Image, loader: Loader, folder: Path) -> bool:
    """Look once, and install what is newer; whether the device must restart.

    Parameters
    ----------
    config : UpdateConfig
    running : Image
    loader : Loader
    folder : Path
        Keeps the bundle, and `tried`.

    Raises
    ------
    FetchError, SystemUpdateError
        It cannot be fetched or installed; nothing that runs has changed.
    """
    release, tried = fetch_release(config), _read_tried(folder)
    if release.build == tried.build and tried.starts < TRIES and loader.primary() != current_slot():
        # A Pi's firmware tries a slot only when this restart asks for it, and a power cut came first.
        _write_tried(folder, Tried(tried.build, tried.starts + 1))
        print(f"{release.version} is installed and was not kept; restarting into it again", flush=True)
        return True
    if not _is_wanted(config, release.build, running, tried):
        return False
    bundle = fetch_bundle(config, release, folder)
    if (signed := read_build(bundle)) != release.build:
        raise SystemUpdateError(
            f"{release.file}: is build {signed}, and update.json says {release.build}. Publish both of one build."
        )
    print(f"{release.version} is fetched; installing", flush=True)
    install(bundle, release)
    # Noted only now: a power cut during the installation must not count as a failed trial.
    _write_tried(folder, Tried(release.build, 1))
    bundle.unlink()
    print(f"{release.version} is installed; restarting", flush=True)
    return True


def main() -> int:
    """Look again and again, until there is something to restart into."""
    config = read_config(Path("/etc/splitward/update.toml"), UpdateConfig)
    running, loader = read_config(RELEASE, Image), find_loader(BOOT)
    said = f"image {running.version}, build {running.build}; looking for a newer one at {config.url}"
    print(said, flush=True)
    while True:
        # A fleet that was switched on together does not ask together.
        time.sleep(min(config.every_s, 300.0) * random.uniform(0.1, 1.0))  # noqa: S311  # no secret
        try:
            if look(config, running, loader, FOLDER):
                break
        except SplitwardError as error:
            print(f"system update: {error}", file=sys.stderr, flush=True)
        time.sleep(max(0.0, config.every_s - 300.0))
    words = ["--reboot-argument=0 tryboot"] if isinstance(loader, Tryboot) else []
    subprocess.run(["systemctl", "reboot", *words], check=False)
    return 0


class _Manifest(Struct):
    """Of what `rauc info` says, the part that is needed."""

    build: Build


def _is_wanted(config: UpdateConfig, build: int, running: Image, tried: Tried) -> bool:
    """Whether `build` may be installed. One that was tried has not checked in: the device waits for a newer one."""
    if config.allow_older:
        return build not in (running.build, tried.build)
    return build > max(running.build, tried.build)


def _read_tried(folder: Path) -> Tried:
    try:
        return msgspec.json.decode((folder / "tried").read_bytes(), type=Tried)
    except (FileNotFoundError, msgspec.DecodeError, msgspec.ValidationError):
        return Tried()  # none yet, or by an image that noted something else


def _write_tried(folder: Path, tried: Tried) -> None:
    write_whole(folder / "tried", msgspec.json.encode(tried))


if __name__ == "__main__":
    raise SystemExit(main())
