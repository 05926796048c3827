"""The words of `splitward image`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BOARDS = ("virt", "rpi3", "rpi4", "rpi5")
DEFAULT_KEY = Path("~/.config/splitward/signing.key")
DEFAULT_CACHE = Path(os.environ.get("SPLITWARD_CACHE", "~/.cache/splitward")) / "arm64"


def add_image(commands: Any) -> None:
    """Add `image` to the commands of `splitward`."""
    words = commands.add_parser("image", help="build the edge image: a card that boots").add_subparsers(
        required=True, metavar="WHAT"
    )
    build = words.add_parser("build", help="from Debian packages and wheels to a card's image; as root")
    build.add_argument("--board", choices=BOARDS, required=True)
    build.add_argument("--config", type=Path, required=True, metavar="site.toml")
    build.add_argument("--bundle", type=Path, required=True, help="what the device starts with")
    build.add_argument("--out", type=Path, required=True, metavar="NAME.img.zst", help="or NAME.img")
    build.add_argument(
        "--key", type=Path, default=DEFAULT_KEY, help="signing key of the bundle and the checksum"
    )
    build.add_argument("--update-certificate", type=Path, help="that the device trusts system updates by")
    build.add_argument("--update-key", type=Path, help="makes NAME.raucb and update.json as well")
    build.add_argument(
        "--build",
        type=int,
        help="its number, higher each time; needed for updates (default: SOURCE_DATE_EPOCH)",
    )
    _add_sources(build)
    build.set_defaults(run=_build)

    verify = words.add_parser("verify", help="check an image against its checksum and the checksum's signature")
    verify.add_argument("image", type=Path)
    verify.add_argument("--key", type=Path, required=True, metavar="signing.key.pub")
    verify.set_defaults(run=_verify)

    keygen = words.add_parser("keygen", help="make the key and certificate of system updates")
    keygen.add_argument("folder", type=Path)
    keygen.set_defaults(run=_keygen)

    lock = words.add_parser(
        "lock", help="renew the lock files with what Debian and the package index hold today"
    )
    lock.add_argument("--constraints", type=Path, default=Path("constraints.txt"))
    lock.add_argument("--mirror", help="as for build")
    lock.set_defaults(run=_lock)

    base = words.add_parser("base", help="unpack the container's base: Debian with Python, for tests; as root")
    base.add_argument("folder", type=Path)
    base.add_argument("--system", action="store_true", help="the whole system of the image, agent included")
    base.add_argument("--test", action="store_true", help="with mosquitto and pip")
    _add_sources(base)
    base.set_defaults(run=_base)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=f"(default: {DEFAULT_CACHE})")
    parser.add_argument(
        "--mirror", help="base address of a Debian mirror (default: that of this machine's apt)"
    )


def _build(arguments: argparse.Namespace) -> int:
    from splitward.image.build import ImageSettings, build_image

    settings = ImageSettings(
        board=arguments.board,
        site=arguments.config,
        bundle=arguments.bundle,
        signing_key=arguments.key.expanduser(),
        out=arguments.out,
        cache=arguments.cache.expanduser(),
        update_certificate=arguments.update_certificate,
        update_key=arguments.update_key,
        build=arguments.build,
        mirror=arguments.mirror,
    )
    image = build_image(settings, _teller())
    sys.stdout.write(f"{image}: {image.stat().st_size / 1e6:.1f} MB\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from splitward.image.check import verify_image

    verify_image(arguments.image, arguments.key)
    sys.stdout.write(f"{arguments.image}: is what was built and signed\n")
    return 0


def _keygen(arguments: argparse.Namespace) -> int:
    from splitward.image.keys import create_update_key

    for path in create_update_key(arguments.folder):
        sys.stdout.write(f"{path}\n")
    return 0


def _lock(arguments: argparse.Namespace) -> int:
    from splitward.image import debian, wheels

    packages = debian.resolve(arguments.mirror or debian.find_mirror())
    debian.write_lock(packages, int(time.time()))
    wheels.write_lock(wheels.resolve(arguments.constraints))
    sys.stdout.write(f"{len(packages)} packages, {len(wheels.read_lock())} wheels\n")
    return 0


def _base(arguments: argparse.Namespace) -> int:
    from splitward.image.root import build_base

    build_base(
        arguments.folder,
        arguments.cache.expanduser(),
        arguments.mirror,
        with_test=arguments.test,
        with_agent=arguments.system,
    )
    return 0


def _teller() -> Callable[[str], None]:
    started_s = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started_s:6.1f} s  {text}\n")

    return say
