"""Parts of the image that need no package: partition table, RAM disk, bill of materials, locks, checksum."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from edge.system.site import SiteConfig, apply_site
from splitward.errors import ImageError
from splitward.image import debian, wheels
from splitward.image.check import sign_checksum, verify_image
from splitward.image.disk import DISK_ID, MIB, _partition_table, partition_offset
from splitward.image.kernel import _Archive, _closure
from splitward.image.keys import create_update_key
from splitward.image.prune import prune
from splitward.image.root import FILES
from splitward.image.sbom import format_sbom
from splitward.wire.bundle import create_signing_key, public_key_path


def test_the_partition_table_is_what_boot_roms_read() -> None:
    table = _partition_table()
    assert len(table) == 512
    assert table[510:] == b"\x55\xaa"
    assert struct.unpack_from("<I", table, 440) == (DISK_ID,)
    found = [struct.unpack_from("<B3sB3sII", table, 446 + 16 * number) for number in range(4)]
    assert [entry[2] for entry in found] == [0x0C, 0x83, 0x83, 0x83]
    for number, (_, _, _, _, first, count) in enumerate(found, 1):
        assert first * 512 == partition_offset(number)
        if number < 4:
            assert (first + count) * 512 == partition_offset(number + 1), "partitions neither overlap nor gape"
    assert partition_offset(1) == 4 * MIB


def test_the_ram_disk_is_a_cpio_archive_that_others_read(tmp_path: Path) -> None:
    archive = _Archive(1_000_000)
    archive.add_folder("bin")
    archive.add_file("bin/program", b"odd", 0o755)
    archive.add_link("bin/sh", "program")
    data = archive.close()
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=tmp_path, check=True)
    assert (tmp_path / "bin/program").read_bytes() == b"odd"
    assert (tmp_path / "bin/program").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "bin/program").stat().st_mtime == 1_000_000
    assert (tmp_path / "bin/sh").readlink() == Path("program")


def test_modules_load_after_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "kernel/fs/ext4.ko: kernel/lib/crc16.ko kernel/fs/jbd2.ko\nkernel/lib/crc16.ko:\nkernel/fs/jbd2.ko:\n"
        "kernel/other-name.ko: kernel/fs/jbd2.ko\n"
    )
    order = _closure(tmp_path, ("ext4", "other_name", "built_in"))
    assert order.index("kernel/fs/jbd2.ko") < order.index("kernel/fs/ext4.ko")
    assert order.index("kernel/lib/crc16.ko") < order.index("kernel/fs/ext4.ko")
    assert order[-1] == "kernel/other-name.ko"
    assert len(order) == 4


def test_locks_are_whole() -> None:
    packages, requirements = debian.read_lock(), wheels.read_lock()
    assert {one.group for one in packages} == set(debian.GROUPS)
    assert len({(one.group, one.name) for one in packages}) == len(packages)
    assert all(len(one.sha256) == 64 and one.path.endswith(".deb") for one in packages)
    names = {one.name.replace("_", "-") for one in requirements}
    assert set(wheels.TOP_LEVEL) <= names
    assert "torch" not in names
    assert debian.read_epoch() > 1_700_000_000


@pytest.mark.parametrize("line", ["python python3 3.11", "python python3 3.11 abc many path"])
def test_a_damaged_lock_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "debian.lock").write_text(line + "\n")
    with pytest.raises(ImageError, match=r"debian.lock:1"):
        debian.read_lock(tmp_path / "debian.lock")


def test_a_package_that_differs_from_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror/a.deb").write_bytes(b"other")
    package = debian.Package("python", "a", "1", "0" * 64, 5, "a.deb")
    with pytest.raises(ImageError, match="differs from the lock"):
        debian.fetch([package], tmp_path / "cache", (tmp_path / "mirror").as_uri())
    assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(ImageError, match="snapshot mirror"):
        debian.fetch([package], tmp_path / "cache", (tmp_path / "nowhere").as_uri())


def test_the_agent_needs_nothing_that_a_device_is_not_given(tmp_path: Path) -> None:
    for part in wheels.AGENT:
        source, target = wheels.SOURCE / part, tmp_path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    program = (
        "import importlib, pkgutil, edge\nprint(edge.__file__)\n"
        "for one in pkgutil.walk_packages(edge.__path__, 'edge.'):\n"
        "    if not one.name.endswith('__main__'): importlib.import_module(one.name)"
    )
    # -S: site-packages as a plain folder, without what leads an import to this checkout.
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{sysconfig.get_path('platlib')}"}
    command = [sys.executable, "-S", "-c", program]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert Path(said.stdout.strip()).parent == tmp_path / "edge"
    recipe = (wheels.SOURCE / "Dockerfile.arm64").read_text()
    assert [part for part in wheels.AGENT if f" {part} " not in recipe] == []


def test_the_lock_holds_all_that_the_agent_imports() -> None:
    imported = set[str]()
    for part in wheels.AGENT:
        source = wheels.SOURCE / part
        for path in source.rglob("*.py") if source.is_dir() else [source]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported.update(one.name.partition(".")[0] for one in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.partition(".")[0])
    named = {"PIL": "pillow", "cv2": "opencv_python_headless", "paho": "paho_mqtt"}
    others = {"edge", "splitward", *sys.stdlib_module_names}
    others |= {"tflite_runtime", "tomli"}  # of other devices: without LiteRT's wheels, and with Python 3.10
    assert {named.get(name, name) for name in imported - others} <= {one.name for one in wheels.read_lock()}


def test_root_s_ssh_keys_lie_where_no_unit_gives_and_takes_them(tmp_path: Path) -> None:
    settings = dict(
        line.split(maxsplit=1)
        for line in (FILES / "root/etc/ssh/sshd_config").read_text().splitlines()
        if not line.startswith("#")
    )
    keys = Path(settings["AuthorizedKeysFile"])
    apply_site(SiteConfig(ssh_keys=("ssh-ed25519 AAAA someone",)), tmp_path)
    assert (tmp_path / keys.relative_to("/")).read_text() == "ssh-ed25519 AAAA someone\n"
    units = [*(wheels.SOURCE / "edge/systemd").glob("*.service"), *(FILES / "root").rglob("*.service")]
    assert len(units) > 3
    for unit in units:
        # systemd gives such a folder to the unit's user when it starts, and deletes it when it ends.
        for given in re.findall(r"^RuntimeDirectory=(.*)$", unit.read_text(), re.MULTILINE):
            assert not any(keys.is_relative_to(Path("/run") / name) for name in given.split()), unit.name


def test_a_power_cut_leaves_a_whole_host_key_or_none(tmp_path: Path) -> None:
    unit = (FILES / "root/etc/systemd/system/splitward-ssh-key.service").read_text()
    (name,) = re.findall(r"^ConditionFileNotEmpty=!/data/ssh/(.*)$", unit, re.MULTILINE)
    steps = [shlex.split(line) for line in re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)]

    def start(folder: Path, steps: list[list[str]]) -> None:
        """Take these steps; then a cut empties what was not flushed."""
        flushed: set[int] = set()
        for step in steps:
            program, *words = [word.replace("/data/ssh", str(folder)) for word in step]
            if program == "/usr/bin/ssh-keygen":
                for path in (Path(words[-1]), Path(words[-1] + ".pub")):
                    assert not path.exists(), "it would ask whether to overwrite it"
                    path.write_text("key")
                continue
            subprocess.run([Path(program).name, *words], check=True)
            if program == "/usr/bin/sync":
                flushed.update(Path(word).stat().st_ino for word in words)
        for path in folder.iterdir():
            if path.stat().st_ino not in flushed:
                path.write_text("")

    for cut in range(len(steps) + 1):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / name).touch()  # what a cut left of an earlier version's key
        start(folder, steps[:cut])
        if not (folder / name).read_text():
            start(folder, steps)
        assert (folder / name).read_text() == "key"
    assert steps[-1] == ["/usr/bin/sync", "/data/ssh"], "its name, too"


def test_the_bill_of_materials_is_cyclonedx_and_the_same_each_time() -> None:
    arguments = ("splitward-virt", "1", debian.read_lock(), wheels.read_lock(), debian.read_epoch())
    text = format_sbom(*arguments)
    assert text == format_sbom(*arguments)
    document = json.loads(text)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    purls = [one["purl"] for one in document["components"]]
    assert len(set(purls)) == len(purls)
    assert any(one.startswith("pkg:pypi/onnxruntime@") for one in purls)
    assert any(one.startswith("pkg:deb/debian/python3.11@") for one in purls)


def test_a_checksum_tells_a_changed_image_and_a_strange_signer(tmp_path: Path) -> None:
    image, key, other = tmp_path / "edge.img.zst", tmp_path / "signing.key", tmp_path / "other.key"
    image.write_bytes(b"image")
    create_signing_key(key)
    create_signing_key(other)
    sign_checksum(image, key)
    verify_image(image, public_key_path(key))
    subprocess.run(["sha256sum", "--check", "--quiet", "edge.img.zst.sha256"], cwd=tmp_path, check=True)
    with pytest.raises(ImageError, match="is not signed by"):
        verify_image(image, public_key_path(other))
    image.write_bytes(b"other")
    with pytest.raises(ImageError, match="differs from its checksum"):
        verify_image(image, public_key_path(key))


def test_an_update_key_is_never_overwritten(tmp_path: Path) -> None:
    key, certificate = create_update_key(tmp_path / "keys")
    assert key.stat().st_mode & 0o777 == 0o600
    assert certificate.read_text().startswith("-----BEGIN CERTIFICATE")
    with pytest.raises(ImageError, match="exists already"):
        create_update_key(tmp_path / "keys")


def test_pruning_leaves_what_devices_load(tmp_path: Path) -> None:
    for name in ("onnxruntime/capi/a.so", "onnxruntime/tools/b.py", "numpy/tests/c.py", "numpy/typing/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    prune(tmp_path)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["numpy/typing/d.py", "onnxruntime/capi/a.so"]
    assert not (tmp_path / "onnxruntime/tools").exists()
