"""The system update: fetch a newer image, go on where a fetch was broken off, hand it to RAUC, restart on trial.

The folder of images (`[update] url` of site.toml) holds `update.json` beside RAUC's bundle. What decides whether an
image may be installed is the bundle's signature, which RAUC checks; `update.json` only says what to fetch.
"""

from __future__ import annotations

import os
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
from edge.system.slot import BOOT, Tryboot, find_loader
from splitward.config import read_config
from splitward.errors import SplitwardError

FOLDER = Path("/data/update")
RELEASE = Path("/etc/splitward-release")
MAX_BYTES = 2 << 30


class Release(Struct, frozen=True):
    """What `update.json` says of the newest image; `file` lies beside it."""

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


def install(bundle: Path, release: Release) -> None:
    """Have RAUC write the other slot and put it on trial; `SystemUpdateError` when it refuses."""
    done = subprocess.run(["rauc", "install", str(bundle)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemUpdateError(
            f"{release.version} is not installed: {(done.stdout + done.stderr).strip()[-500:]}"
        )


def running_version(path: Path = RELEASE) -> str:
    """Version of the running image."""
    return path.read_text(encoding="utf-8").strip()


def look(config: UpdateConfig) -> bool:
    """Look once, and install what is newer; whether the device must restart.

    Raises
    ------
    SystemUpdateError
        It cannot be fetched or installed; nothing that runs has changed.
    """
    tried = FOLDER / "tried"
    release = fetch_release(config)
    if release.version == running_version():
        return False
    if tried.exists() and tried.read_text(encoding="utf-8") == release.version:
        return False  # it was installed once and has not checked in: it waits for a newer one
    bundle = fetch_bundle(config, release, FOLDER)
    print(f"{release.version} is fetched; installing", flush=True)
    install(bundle, release)
    # Noted only now: a power cut during the installation must not count as a failed trial.
    tried.write_text(release.version, encoding="utf-8")
    os.sync()
    bundle.unlink()
    print(f"{release.version} is installed; restarting", flush=True)
    return True


def main() -> int:
    """Look again and again, until there is something to restart into."""
    config = read_config(Path("/etc/splitward/update.toml"), UpdateConfig)
    print(f"image {running_version()}; looking for a newer one at {config.url}", flush=True)
    while True:
        # A fleet that was switched on together does not ask together.
        time.sleep(min(config.every_s, 300.0) * random.uniform(0.1, 1.0))  # noqa: S311  # no secret
        try:
            if look(config):
                break
        except SplitwardError as error:
            print(f"system update: {error}", file=sys.stderr, flush=True)
        time.sleep(max(0.0, config.every_s - 300.0))
    words = ["--reboot-argument=0 tryboot"] if isinstance(find_loader(BOOT), Tryboot) else []
    subprocess.run(["systemctl", "reboot", *words], check=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
