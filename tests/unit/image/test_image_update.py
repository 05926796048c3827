"""From the update that a build writes to the device that takes or refuses it, by RAUC's own signature check."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.errors import SystemUpdateError
from edge.system.site import UpdateConfig
from edge.system.slot import TRIES, Loader, Slot, SystemdBoot, Tryboot, current_slot, format_entry
from edge.system.update import Image, Tried, look, read_build
from firmware_sim.arm64.trial import serve_folder
from firmware_sim.authority import Authority
from splitward.errors import ImageError
from splitward.image.build import ImageSettings, _make_update, _number
from splitward.image.keys import create_update_key

OTHER: Slot = "b" if current_slot() == "a" else "a"


class Device:
    """A device that runs `running`, and the folder of images that it looks at.

    Its `rauc` is this machine's, told whom to trust; what it is asked to install it only notes.
    """

    def __init__(self, folder: Path, url: str, ca: Path) -> None:
        self.folder, self.served = folder, folder / "served"
        self.config = UpdateConfig(url=url, ca=str(ca))
        self.running = Image("running", 5)
        entries = folder / "boot/loader/entries"
        entries.mkdir(parents=True)
        (entries / f"slot-{current_slot()}.conf").write_text(format_entry(current_slot(), 1, "quiet"))
        self.loader: Loader = SystemdBoot(folder / "boot")
        self.key, self.certificate = create_update_key(folder / "keys")

    def publish(self, build: int, key: Path | None = None, certificate: Path | None = None) -> None:
        """Serve an update of this number."""
        squashed, content = self.folder / "root.img", self.folder / "update"
        shutil.rmtree(content, ignore_errors=True)
        squashed.write_bytes(os.urandom(8192))
        settings = settings_of(
            self.folder,
            out=self.served / "edge.img",
            update_key=key or self.key,
            update_certificate=certificate or self.certificate,
        )
        _make_update(settings, squashed, f"1.0+{build}", build, self.folder)

    def announce(self, **values: Any) -> None:
        """Change what the folder's update.json says, as anyone can who writes to the folder."""
        path = self.served / "update.json"
        path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | values))

    def look(self) -> bool:
        return look(self.config, self.running, self.loader, self.folder / "state")

    @property
    def installed(self) -> int:
        """How often `rauc install` was called."""
        path = self.folder / "installed"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def device(tmp_path: Path, monkeypatch: Any) -> Iterator[Device]:
    rauc = shutil.which("rauc")
    if rauc is None:
        pytest.skip("rauc is not installed: apt install rauc")
    (tmp_path / "bin").mkdir()
    (tmp_path / "served").mkdir()
    program = tmp_path / "bin/rauc"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = install ] && {{ echo "$2" >> {tmp_path}/installed; exit; }}\n'
        f'[ "$1" = info ] && set -- --keyring={tmp_path}/keys/update.crt "$@"\nexec {rauc} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    Authority(tmp_path).issue("cloud", ("127.0.0.1",))
    with serve_folder(tmp_path / "served", tmp_path / "cloud.pem") as port:
        yield Device(tmp_path, f"https://127.0.0.1:{port}", tmp_path / "ca.pem")


def test_a_newer_build_is_installed_once(device: Device) -> None:
    device.publish(6)
    assert device.look(), "the device restarts into it"
    assert device.installed == 1
    assert not device.look(), "it has not checked in: the device waits for a newer one"
    device.publish(7)
    assert device.look()
    assert device.installed == 2
    assert not list((device.folder / "state").glob("*.raucb"))


@pytest.mark.parametrize("build", [4, 5])
def test_a_build_that_is_not_newer_is_refused_whatever_it_is_called(device: Device, build: int) -> None:
    device.publish(build)
    device.announce(version="anything")
    assert not device.look()
    device.announce(version="anything else", build=99)
    with pytest.raises(SystemUpdateError, match=f"is build {build}, and update.json says 99"):
        device.look()
    assert device.installed == 0
    assert not (device.folder / "state/tried").exists()


def test_what_was_tried_is_not_tried_again_by_another_way(device: Device) -> None:
    for build in (8, 7, 8):  # each of them newer than what runs
        device.publish(build)
        device.look()
    assert device.installed == 1


def test_an_older_build_is_installed_where_the_site_says_so(device: Device) -> None:
    device.config = msgspec.structs.replace(device.config, allow_older=True)
    device.publish(4)
    assert device.look()
    device.running = Image("older", 4)
    assert not device.look()
    device.running = Image("running", 5)
    assert not device.look(), "it was tried"


def test_a_bundle_of_another_signer_is_refused(device: Device) -> None:
    device.publish(6, *create_update_key(device.folder / "strange"))
    with pytest.raises(SystemUpdateError, match="is not trusted"):
        device.look()
    assert device.installed == 0


def test_a_bundle_without_a_number_is_refused(device: Device) -> None:
    program = device.folder / "bin/rauc"
    program.write_text('#!/bin/sh\necho \'{"compatible":"splitward-virt","version":"9","build":null}\'\n')
    with pytest.raises(SystemUpdateError, match="has no build number"):
        read_build(device.folder / "edge.raucb")


def test_a_trial_that_a_power_cut_took_from_a_pi_is_started_again(device: Device) -> None:
    boot = device.folder / "boot"
    (boot / "config.txt").write_text(f"os_prefix=slot-{current_slot()}/\n")
    device.loader = Tryboot(boot)
    device.publish(6)
    assert device.look()
    device.loader.try_next(OTHER)  # as RAUC has it do
    assert [device.look() for _ in range(TRIES)] == [True] * (TRIES - 1) + [False]
    assert device.installed == 1
    (device.folder / "state/tried").write_bytes(msgspec.json.encode(Tried(6, 1)))
    device.announce(build=5)
    assert not device.look(), "the release was taken back"
    device.announce(build=6)
    device.loader.mark(OTHER, "bad")
    assert not device.look(), "it was given up"


@pytest.mark.parametrize(("given", "epoch", "number"), [(7, "8", 7), (None, "8", 8), (0, None, 0)])
def test_the_number_of_a_build_is_given(
    tmp_path: Path, monkeypatch: Any, given: int | None, epoch: str | None, number: int
) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    if epoch is not None:
        monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert _number(settings_of(tmp_path, build=given)) == number


def test_an_image_that_takes_updates_needs_a_number(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    with pytest.raises(ImageError, match="needs the number of its build"):
        _number(settings_of(tmp_path))
    with pytest.raises(ImageError, match="is below 0"):
        _number(settings_of(tmp_path, build=-1))
    assert _number(settings_of(tmp_path, update_certificate=None)) == 0


def settings_of(folder: Path, **values: Any) -> ImageSettings:
    given: dict[str, Any] = dict.fromkeys(("site", "bundle", "signing_key", "out", "cache"), folder)
    return ImageSettings(**{"board": "virt", "update_certificate": folder} | given | values)
