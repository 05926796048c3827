"""The system update: fetch a newer image, go on where a fetch was broken off, hand it to RAUC, restart on trial.

The folder of images (`[update] url` of site.toml) holds `update.json` beside RAUC's bundle. What decides whether an
image may be installed is the bundle's signature, which RAUC checks; `update.json` only says what to fetch.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edge.errors import SystemUpdateError
from edge.system.site import UpdateConfig
from edge.system.slot import BOOT, Tryboot, find_loader
from splitward.config import read_config
from splitward.errors import SplitwardError

FOLDER = Path("/data/update")
RELEASE = Path("/etc/splitward-release")
TIMEOUT_S = 60.0
MAX_BYTES = 2 << 30
_MAX_MANIFEST = 64 << 10


class Release(Struct, frozen=True):
    """What `update.json` says of the newest image; `file` lies beside it."""

    version: Annotated[str, Meta(min_length=1, max_length=200)]
    file: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
    size: Annotated[int, Meta(ge=1, le=MAX_BYTES)]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


def fetch_release(config: UpdateConfig) -> Release:
    """What the folder of images offers; `SystemUpdateError` when it cannot be had."""
    data = _request(f"{config.url.rstrip('/')}/update.json", config, 0).read(_MAX_MANIFEST)
    try:
        return msgspec.json.decode(data, type=Release)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise SystemUpdateError(
            f"{config.url}/update.json: {error}. Publish the one that the build wrote."
        ) from error


def fetch_bundle(config: UpdateConfig, release: Release, folder: Path) -> Path:
    """Path of the release's bundle in `folder`; a fetch that was broken off goes on where it was.

    Raises
    ------
    SystemUpdateError
        It cannot be fetched, or is not what `update.json` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{release.sha256}.raucb"
    for leftover in folder.glob("*.raucb*"):
        if not leftover.name.startswith(release.sha256):
            leftover.unlink()  # of another release: the partition holds one
    if target.exists() and target.stat().st_size == release.size:
        return target
    partial = folder / f"{release.sha256}.raucb.partial"
    have = partial.stat().st_size if partial.exists() else 0
    if have > release.size:
        partial.unlink()
        have = 0
    if have < release.size:
        _go_on(config, release, partial, have)
    digest = hashlib.sha256()
    with partial.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != release.sha256:
        partial.unlink()
        raise SystemUpdateError(f"{release.file}: is not what update.json says; it is fetched anew next time.")
    partial.replace(target)
    return target


def _go_on(config: UpdateConfig, release: Release, partial: Path, have: int) -> None:
    address = f"{config.url.rstrip('/')}/{urllib.parse.quote(release.file)}"
    answer = _request(address, config, have)
    if have and answer.status != 206:
        have = 0  # a server without ranges gives the whole again
    left = release.size - have
    try:
        with partial.open("ab" if have else "wb") as file:
            while left and (chunk := answer.read(min(left, 1 << 18))):
                file.write(chunk)
                left -= len(chunk)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, http.client.HTTPException) as error:
        raise SystemUpdateError(f"{address}: {error}. The fetch goes on from here next time.") from error
    if left:
        raise SystemUpdateError(f"{address}: ended {left} bytes early. The fetch goes on from here next time.")


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


def _request(address: str, config: UpdateConfig, start: int) -> http.client.HTTPResponse:
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise SystemUpdateError(f"{address}: is no http or https address. Correct `[update] url` of site.toml.")
    context = ssl.create_default_context(cafile=config.ca)
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-"} if start else {})  # noqa: S310 -- checked above
    try:
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context)  # noqa: S310  # http or https, checked above
    except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
        raise SystemUpdateError(f"{address}: {error}. The device looks again later.") from error
    return answer


if __name__ == "__main__":
    raise SystemExit(main())
