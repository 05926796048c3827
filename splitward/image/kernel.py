"""The kernel's modules that a device may need, and the initial RAM disk that finds the root."""

from __future__ import annotations

import fnmatch
import gzip
import io
import os
import shutil
import stat
import subprocess
from pathlib import Path

from splitward.errors import ImageError
from splitward.image.root import FILES

START_MODULES = (
    # Disks: virtual machines, SD cards of the boards, USB sticks; then file systems.
    *("virtio_blk", "virtio_pci", "virtio_mmio", "mmc_block", "bcm2835", "sdhci_iproc", "sdhci_brcmstb"),
    *(
        "clk_raspberrypi",
        "clk_bcm2711_dvp",
        "gpio_raspberrypi_exp",
        "raspberrypi_power",
        "gpio_regulator",
        "fixed",
    ),
    *("pcie_brcmstb", "xhci_pci", "xhci_plat_hcd", "dwc2", "usb_storage", "uas", "sd_mod"),
    *("squashfs", "overlay", "ext4", "crc32c_generic", "vfat", "nls_cp437", "nls_ascii", "nls_utf8"),
)
APPLETS = (
    *(
        "cat",
        "chown",
        "chroot",
        "dd",
        "echo",
        "hexdump",
        "insmod",
        "mkdir",
        "mount",
        "mv",
        "reboot",
        "rm",
        "sed",
    ),
    *("sh", "sleep", "switch_root", "sync", "touch", "tr", "umount", "wc"),
)
KEPT = (
    *("fs/*", "lib/*", "crypto/*", "arch/*", "net/*", "drivers/block/*", "drivers/md/*", "drivers/virtio/*"),
    *(
        "drivers/mmc/*",
        "drivers/usb/host/*",
        "drivers/usb/storage/*",
        "drivers/usb/dwc2/*",
        "drivers/usb/core/*",
    ),
    *("drivers/usb/common/*", "drivers/usb/serial/*", "drivers/usb/class/*", "drivers/usb/roles/*"),
    *("drivers/net/usb/*", "drivers/net/virtio_net*", "drivers/net/phy/*", "drivers/net/mdio/*"),
    *("drivers/net/ethernet/broadcom/*", "drivers/net/ethernet/cadence/*", "drivers/net/wireless/broadcom/*"),
    *("drivers/net/net_failover*", "drivers/net/mii*", "drivers/net/dummy*", "drivers/scsi/sd_mod*"),
    *("drivers/scsi/scsi_*", "drivers/clk/*", "drivers/gpio/*", "drivers/regulator/*", "drivers/thermal/*"),
    *("drivers/hwmon/raspberrypi*", "drivers/watchdog/*", "drivers/rtc/*", "drivers/pci/*", "drivers/phy/*"),
    *("drivers/char/hw_random/*", "drivers/firmware/*", "drivers/mailbox/*", "drivers/soc/*", "drivers/mfd/*"),
    *("drivers/media/usb/uvc/*", "drivers/media/v4l2-core/*", "drivers/media/common/videobuf2/*"),
    *("drivers/media/common/uvc*", "drivers/media/mc/*", "drivers/media/platform/bcm2835/*"),
    *(
        "drivers/i2c/*",
        "drivers/spi/*",
        "drivers/pwm/*",
        "drivers/reset/*",
        "drivers/misc/*",
        "drivers/input/*",
    ),
    *(
        "drivers/cpufreq/*",
        "drivers/nvmem/*",
        "drivers/power/reset/*",
        "drivers/dma/*",
        "drivers/bluetooth/none",
    ),
    *(
        "drivers/staging/vc04_services/*",
        "drivers/leds/*",
        "drivers/iio/none",
        "drivers/tty/*",
        "drivers/hid/*",
    ),
)
LEFT_OUT = (
    *("fs/btrfs/*", "fs/xfs/*", "fs/ocfs2/*", "fs/gfs2/*", "fs/ceph/*", "fs/nfs*", "fs/smb*", "fs/cifs/*"),
    *(
        "fs/f2fs/*",
        "fs/jfs/*",
        "fs/reiserfs/*",
        "fs/udf/*",
        "fs/afs/*",
        "fs/orangefs/*",
        "fs/ksmbd/*",
        "fs/dlm/*",
    ),
    *("net/bluetooth/*", "net/netfilter/*", "net/ipv4/netfilter/*", "net/ipv6/netfilter/*", "net/sctp/*"),
    *("net/tipc/*", "net/rds/*", "net/ceph/*", "net/sunrpc/*", "net/openvswitch/*", "net/batman-adv/*"),
    *("net/can/*", "net/sched/*", "net/bridge/*", "net/mpls/*", "net/9p/none", "drivers/input/*/*"),
    *("drivers/block/drbd/*", "drivers/soc/qcom/*", "drivers/phy/qualcomm/*", "drivers/clk/qcom/*"),
    *("drivers/pci/controller/dwc/*", "drivers/block/rbd*", "drivers/md/bcache/*", "drivers/md/raid*"),
)


def prune_modules(root: Path) -> str:
    """Keep the modules that a device may need, index them, and return the kernel's version.

    Raises
    ------
    ImageError
        The package holds no kernel, or `depmod` fails.
    """
    versions = sorted(path.name for path in (root / "usr/lib/modules").glob("*"))
    if len(versions) != 1:
        raise ImageError(f"the kernel's package holds {versions or 'no modules'}, not those of one kernel.")
    modules = root / "usr/lib/modules" / versions[0]
    _index(root, versions[0])
    needs = _read_needs(modules)
    wanted = [name for name in needs if _is_kept(name.removeprefix("kernel/"))]
    kept = set()
    while wanted:  # and what those need, wherever it lies
        name = wanted.pop()
        if name not in kept:
            kept.add(name)
            wanted += needs[name]
    for name in set(needs) - kept:
        (modules / name).unlink()
    for folder in sorted((path for path in modules.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()
    _index(root, versions[0])
    return versions[0]


def _is_kept(name: str) -> bool:
    return any(fnmatch.fnmatch(name, one) for one in KEPT) and not any(
        fnmatch.fnmatch(name, one) for one in LEFT_OUT
    )


def _index(root: Path, version: str) -> None:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        subprocess.run(
            ["depmod", "-b", str(root), version],
            check=True,
            capture_output=True,
            env=dict(os.environ, PATH=path),
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImageError(f"depmod: {error}. Install kmod.") from error


def _read_needs(modules: Path) -> dict[str, list[str]]:
    """Modules that each module needs, by path below `modules`."""
    found = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        found[path] = rest.split()
    return found


def build_ramdisk(root: Path, busybox: Path, version: str, epoch: int) -> bytes:
    """The initial RAM disk: busybox, `files/init` and the modules that reach a disk, in the order they load."""
    modules = root / "usr/lib/modules" / version
    archive = _Archive(epoch)
    for folder in ("bin", "boot", "dev", "lower", "modules", "proc", "root", "sys", "upper"):
        archive.add_folder(folder)
    archive.add_file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in APPLETS:
        archive.add_link(f"bin/{applet}", "busybox")
    archive.add_file("init", (FILES / "init").read_bytes(), 0o755)
    listed = []
    for name in _closure(modules, START_MODULES):
        path = modules / name
        data = path.read_bytes()
        if path.suffix == ".xz":
            import lzma

            data = lzma.decompress(data)
        target = "modules/" + path.name.removesuffix(".xz")
        archive.add_file(target, data, 0o644)
        listed.append("/" + target)
    archive.add_file("modules.list", ("\n".join(listed) + "\n").encode(), 0o644)
    return gzip.compress(archive.close(), 9, mtime=0)


def place_boot_files(root: Path, version: str, ramdisk: bytes, board: str) -> None:
    """Put kernel, RAM disk and device trees where a slot keeps them: below /usr/lib/splitward/boot of its root."""
    folder = root / "usr/lib/splitward/boot"
    folder.mkdir(parents=True)
    kernel = next((root / "boot").glob("vmlinuz-*"), None) or root / "usr/lib/modules" / version / "vmlinuz"
    shutil.move(kernel, folder / "vmlinuz")
    (folder / "initrd.gz").write_bytes(ramdisk)
    trees = root / f"usr/lib/linux-image-{version}/broadcom"
    for name in DEVICE_TREES[board]:
        if (trees / name).exists():
            shutil.copy(trees / name, folder / name)
    shutil.rmtree(root / f"usr/lib/linux-image-{version}", ignore_errors=True)
    for path in (root / "boot").iterdir():
        if path.name != "firmware":
            path.unlink()


DEVICE_TREES = {
    "virt": (),
    "rpi3": ("bcm2837-rpi-3-b.dtb", "bcm2837-rpi-3-b-plus.dtb", "bcm2837-rpi-zero-2-w.dtb"),
    "rpi4": ("bcm2711-rpi-4-b.dtb", "bcm2711-rpi-400.dtb", "bcm2711-rpi-cm4-io.dtb"),
    "rpi5": ("bcm2712-rpi-5-b.dtb", "bcm2712-d-rpi-5-b.dtb"),
}


def _closure(modules: Path, names: tuple[str, ...]) -> list[str]:
    """Files of the modules `names` and of what they need, needed ones first; those built in are passed over."""
    needs = _read_needs(modules)
    files = {Path(path).name.split(".")[0].replace("-", "_"): path for path in needs}
    softly = {"ext4": ("crc32c_generic",), "virtio_blk": ("virtio_pci",)}
    order: list[str] = []

    def add(path: str) -> None:
        for needed in reversed(needs[path]):
            add(needed)
        if path not in order:
            order.append(path)

    for name in names:
        for one in (*softly.get(name, ()), name):
            if one in files:
                add(files[one])
    return order


class _Archive:
    """A cpio archive in the `newc` format, as the kernel unpacks it."""

    def __init__(self, epoch: int) -> None:
        self._epoch, self._number, self._out = epoch, 0, io.BytesIO()

    def add_folder(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def add_file(self, name: str, data: bytes, mode: int) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def add_link(self, name: str, target: str) -> None:
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def close(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return self._out.getvalue()

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._number += 1
        path = name.encode() + b"\0"
        fields = (self._number, mode, 0, 0, 1, self._epoch, len(data), 0, 0, 0, 0, len(path), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + path)
        self._pad()
        self._out.write(data)
        self._pad()

    def _pad(self) -> None:
        self._out.write(bytes(-self._out.tell() % 4))
