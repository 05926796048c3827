"""From locked packages to a card's image. Nothing of the image runs here and nothing is mounted."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from cryptography.hazmat.primitives import serialization

from edge.system.site import SiteConfig, read_site
from edge.system.slot import format_entry
from edge.system.update import RELEASE, Release
from splitward import __version__
from splitward.config import format_toml
from splitward.errors import ImageError
from splitward.image import debian, wheels
from splitward.image.check import sign_checksum
from splitward.image.disk import DISK_ID, write_disk
from splitward.image.kernel import build_ramdisk, place_boot_files, prune_modules
from splitward.image.root import FILES, finish_root, finish_system, settle, write_status
from splitward.image.sbom import format_sbom
from splitward.wire.bundle import read_bundle, read_signing_key

Board = Literal["virt", "rpi3", "rpi4", "rpi5"]
BOARDS: tuple[Board, ...] = ("virt", "rpi3", "rpi4", "rpi5")
TITLES = {
    "virt": "UEFI and virtual arm64 machines",
    "rpi3": "the Raspberry Pi 3 and Zero 2 W",
    "rpi4": "the Raspberry Pi 4, 400 and Compute Module 4",
    "rpi5": "the Raspberry Pi 5",
}
_CONSOLES = {"virt": "console=ttyAMA0", "rpi5": "console=ttyAMA10,115200"}
_OPTIONS = f"splitward.disk={DISK_ID:08x} splitward.slot=a rauc.slot=a panic=10 quiet"
_FIRMWARE = {
    "rpi3": ("bootcode.bin", "start.elf", "fixup.dat"),
    "rpi4": ("start4.elf", "fixup4.dat"),
    "rpi5": (),
    "virt": (),
}


@dataclass(frozen=True)
class ImageSettings:
    """What to build, and from what.

    Attributes
    ----------
    site : Path
        site.toml.
    bundle : Path
        Signed bundle that the device starts with.
    signing_key : Path
        Signs the checksum; its public half is what the device trusts bundles by.
    out : Path
        `NAME.img.zst`, or `NAME.img` for the raw image.
    update_certificate, update_key : Path or None
        X.509 certificate that a device trusts system updates by, and its key; with the key an update is made as
        well.
    build : int or None
        Number of this build, in the image and in the update's signed manifest: devices take only a higher one than
        theirs. `SOURCE_DATE_EPOCH` by default; an image that takes no updates needs none.
    cache : Path
        Where packages and wheels are kept.
    mirror : str or None
        Base address of a Debian mirror; the one of this machine's apt by default.
    """

    board: Board
    site: Path
    bundle: Path
    signing_key: Path
    out: Path
    cache: Path
    update_certificate: Path | None = None
    update_key: Path | None = None
    build: int | None = None
    mirror: str | None = None


def build_image(settings: ImageSettings, say: Callable[[str], None]) -> Path:
    """Build the image and what lies beside it, and return its path; `say` hears of each step.

    Raises
    ------
    ImageError
        A package, a tool, the number of the build or the room on the disk is missing.
    ConfigError, BundleError
        site.toml or the bundle cannot be used: nothing is built that would not start.
    """
    site = read_site(settings.site)
    _check(settings, site)
    if os.geteuid():
        raise ImageError(
            "files of the image belong to root: run as root, or as `unshare --map-root-user --map-auto` gives it."
        )
    number = _number(settings)
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", debian.read_epoch()))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".image-", dir=settings.out.resolve().parent) as name:
        folder = Path(name)
        folder.chmod(0o700)
        packages = _packages(settings.board)
        root, boot = folder / "root", folder / "boot"
        say("fetching packages and wheels")
        version = _release(settings, number)
        kernel = unpack_root(packages, root, folder / "beside", settings.cache, settings.mirror)
        say(f"root unpacked, kernel {kernel}")
        _add_model(settings, root)
        _add_release(root, version, number)
        ramdisk = build_ramdisk(root, folder / "beside/usr/bin/busybox", kernel, epoch)
        place_boot_files(root, kernel, ramdisk, settings.board)
        _fill_boot(settings, boot, root, folder / "beside")
        settle(root, epoch)
        squashed = folder / "root.img"
        say("packing the root")
        pack_root(root, squashed, epoch)
        raw = folder / "card.img"
        write_disk(raw, boot, squashed, epoch)
        say("compressing")
        compressed = _compress(raw, settings.out)
        sbom = format_sbom(f"splitward-{settings.board}", version, packages, wheels.read_lock(), epoch)
        _write_beside(settings, compressed, sbom)
        if settings.update_key is not None:
            say(f"making the update, build {number}")
            _make_update(settings, squashed, version, number, folder)
    return compressed


def unpack_root(
    packages: list[debian.Package], root: Path, beside: Path, cache: Path, mirror: str | None
) -> str:
    """Unpack `packages` into a whole system at `root`, boot programs into `beside`; the kernel's version."""
    found = debian.fetch(packages, cache / "debian", mirror or debian.find_mirror())
    files = dict(zip(packages, found, strict=True))
    root.mkdir(parents=True)
    root.chmod(0o755)
    beside.mkdir(parents=True)
    debian.unpack([path for package, path in files.items() if package.group != "boot"], root)
    debian.unpack([path for package, path in files.items() if package.group == "boot"], beside)
    finish_root(root, wheels.fetch(cache / "wheels"))
    kernel = prune_modules(root)
    finish_system(root)
    write_status(root, [(one.name, one.version) for one in packages if one.group not in ("boot", "test")])
    return kernel


def pack_root(root: Path, target: Path, epoch: int) -> None:
    """Pack the folder `root` into the squashfs file `target`."""
    command = ["mksquashfs", str(root), str(target), "-comp", "zstd", "-Xcompression-level", "9", "-b", "256K"]
    command += [
        "-noappend",
        "-no-progress",
        "-no-xattrs",
        "-quiet",
        "-mkfs-time",
        str(epoch),
        "-all-time",
        str(epoch),
    ]
    _run(command, "squashfs-tools")


def _check(settings: ImageSettings, site: SiteConfig) -> None:
    """Refuse what would build an image that does not start."""
    read_bundle(settings.bundle, read_signing_key(settings.signing_key).public_key())
    if site.update is not None and settings.update_certificate is None:
        raise ImageError(
            f"{settings.site}: [update] wants system updates, but there is no certificate to trust them by. Make "
            "one with `splitward image keygen`, and give it with --update-certificate."
        )


def _packages(board: Board) -> list[debian.Package]:
    groups = {"python", "system", "boot", "firmware", "kernel-rpi5" if board == "rpi5" else "kernel"}
    return [one for one in debian.read_lock() if one.group in groups]


def _number(settings: ImageSettings) -> int:
    """Number of the build. Given from outside: two builds of the same inputs are the same, whenever they are made."""
    given = settings.build if settings.build is not None else os.environ.get("SOURCE_DATE_EPOCH")
    if given is None and settings.update_certificate is not None:
        raise ImageError(
            "an image that takes updates needs the number of its build, by which devices tell newer from older: "
            "--build, higher each time, such as `--build $(date +%s)`, or SOURCE_DATE_EPOCH."
        )
    if (number := int(given or 0)) < 0:
        raise ImageError(f"--build {number}: is below 0. Devices compare it with that of the image they run.")
    return number


def _release(settings: ImageSettings, number: int) -> str:
    """Version of the image: ours, and a digest of everything that goes into a slot."""
    digest = hashlib.sha256(settings.board.encode())
    sources = [debian.LOCK, wheels.LOCK, settings.bundle, *sorted(FILES.rglob("*"))]
    sources += sorted(Path(__file__).parent.glob("*.py"))
    for name in wheels.AGENT:
        sources += sorted((wheels.SOURCE / name).rglob("*.py")) or [wheels.SOURCE / name]
    for path in sources:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(str(number).encode())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def _add_model(settings: ImageSettings, root: Path) -> None:
    share = root / "usr/share/splitward"
    share.mkdir(parents=True)
    shutil.copy(settings.bundle, share / "model.bundle")
    trusted = read_signing_key(settings.signing_key).public_key()
    (share / "trusted.pub").write_bytes(
        trusted.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    (root / "etc/rauc").mkdir(exist_ok=True)
    if settings.update_certificate is not None:
        shutil.copy(settings.update_certificate, root / "etc/rauc/keyring.pem")
    (root / "etc/rauc/system.conf").write_text(_rauc_settings(settings.board))
    for path in (share / "model.bundle", share / "trusted.pub", root / "etc/rauc/system.conf"):
        path.chmod(0o644)


def _add_release(root: Path, version: str, number: int) -> None:
    path = root / RELEASE.relative_to("/")
    path.write_text(format_toml({"version": version, "build": number}))
    path.chmod(0o644)


def _rauc_settings(board: Board) -> str:
    slots = "".join(
        f"\n[slot.root.{index}]\ndevice=/dev/disk/by-partuuid/{DISK_ID:08x}-{index + 2:02d}\ntype=raw\n"
        f"bootname={name}\n"
        for index, name in enumerate("ab")
    )
    return (
        f"[system]\ncompatible=splitward-{board}\nbootloader=custom\nstatusfile=/data/rauc/status\n"
        "mountprefix=/run/rauc\nbundle-formats=verity\n\n"
        "[handlers]\nbootloader-custom-backend=/usr/lib/splitward/slot\n\n"
        f"[keyring]\npath=/etc/rauc/keyring.pem\n{slots}"
    )


def _fill_boot(settings: ImageSettings, boot: Path, root: Path, beside: Path) -> None:
    shutil.copytree(root / "usr/lib/splitward/boot", boot / "slot-a")
    shutil.copy(settings.site, boot / "site.toml")
    (boot / "EFI/BOOT").mkdir(parents=True)
    shutil.copy(beside / "usr/lib/systemd/boot/efi/systemd-bootaa64.efi", boot / "EFI/BOOT/BOOTAA64.EFI")
    (boot / "loader/entries").mkdir(parents=True)
    (boot / "loader/loader.conf").write_text("timeout 0\n")
    console = _CONSOLES.get(settings.board, "console=tty0 console=ttyS1,115200")
    options = f"{_OPTIONS} {console}"
    (boot / "loader/entries/slot-a.conf").write_text(format_entry("a", 1, options))
    if settings.board != "virt":
        (boot / "slot-a/cmdline.txt").write_text(options + "\n")
        shutil.copy(FILES / "config.txt", boot / "config.txt")
        for name in _FIRMWARE[settings.board]:
            shutil.copy(beside / "usr/lib/raspi-firmware" / name, boot / name)


def _compress(raw: Path, out: Path) -> Path:
    if out.suffix != ".zst":
        raw.replace(out)
        return out
    partial = out.with_name(out.name + ".partial")
    _run(["zstd", "-q", "-f", "-10", "-T2", str(raw), "-o", str(partial)], "zstd")
    partial.replace(out)
    return out


def _write_beside(settings: ImageSettings, image: Path, sbom: str) -> None:
    image.with_name(image.name + ".cdx.json").write_text(sbom, encoding="utf-8")
    text = (FILES / "flash.md").read_text(encoding="utf-8")
    text = text.replace("{name}", image.name).replace("{board}", TITLES[settings.board])
    image.with_name("flash.md").write_text(text, encoding="utf-8")
    sign_checksum(image, settings.signing_key)


def _make_update(settings: ImageSettings, squashed: Path, version: str, number: int, folder: Path) -> None:
    content = folder / "update"
    content.mkdir()
    squashed.replace(content / "root.img")
    (content / "manifest.raucm").write_text(
        f"[update]\ncompatible=splitward-{settings.board}\nversion={version}\nbuild={number}\n\n"
        "[bundle]\nformat=verity\n\n[image.root]\nfilename=root.img\n"
    )
    bundle = settings.out.with_name(settings.out.name.removesuffix(".zst").removesuffix(".img") + ".raucb")
    bundle.unlink(missing_ok=True)
    command = ["rauc", f"--cert={settings.update_certificate}", f"--key={settings.update_key}"]
    _run([*command, "bundle", str(content), str(bundle)], "rauc")
    with bundle.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    release = Release(number, version, bundle.name, bundle.stat().st_size, digest)
    settings.out.with_name("update.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(release), indent=2)
    )


def _run(command: list[str], package: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        raise ImageError(f"{command[0]}: {error}. Install {package}.") from error
    if done.returncode:
        raise ImageError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-800:]}")
