"""Which slot starts, under both boot loaders, on a folder that stands for the boot partition."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge.errors import SlotError
from edge.system.slot import SystemdBoot, Tryboot, copy_boot_files, for_slot, format_entry

OPTIONS = "splitward.disk=53504c54 splitward.slot=a rauc.slot=a panic=10 quiet"


@pytest.fixture
def uefi(tmp_path: Path) -> tuple[Path, SystemdBoot]:
    entries = tmp_path / "loader" / "entries"
    entries.mkdir(parents=True)
    (entries / "slot-a.conf").write_text(format_entry("a", 1, OPTIONS))
    return entries, SystemdBoot(tmp_path)


@pytest.fixture
def pi(tmp_path: Path) -> tuple[Path, Tryboot]:
    (tmp_path / "config.txt").write_text("arm_64bit=1\nos_prefix=slot-a/\nkernel=vmlinuz\n")
    return tmp_path, Tryboot(tmp_path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_trial_starts_first_and_is_kept_when_it_is_good(uefi: tuple[Path, SystemdBoot]) -> None:
    entries, loader = uefi
    assert (loader.primary(), loader.on_trial("a"), loader.state("b")) == ("a", False, "bad")
    loader.try_next("b")
    assert names(entries) == ["slot-a.conf", "slot-b+3.conf"]
    text = (entries / "slot-b+3.conf").read_text()
    assert "version 2\n" in text
    assert "linux /slot-b/vmlinuz\n" in text
    assert "splitward.slot=b rauc.slot=b panic=10 quiet" in text
    assert (loader.primary(), loader.on_trial("b")) == ("b", True)
    loader.mark("b", "good")
    assert names(entries) == ["slot-a.conf", "slot-b.conf"]
    assert (loader.primary(), loader.on_trial("b")) == ("b", False)


def test_a_trial_without_tries_gives_way(uefi: tuple[Path, SystemdBoot]) -> None:
    entries, loader = uefi
    loader.try_next("b")
    # systemd-boot takes one try from the name at each start.
    (entries / "slot-b+3.conf").rename(entries / "slot-b+1-2.conf")
    assert (loader.primary(), loader.state("b")) == ("b", "good")
    (entries / "slot-b+1-2.conf").rename(entries / "slot-b+0-3.conf")
    assert (loader.primary(), loader.state("b")) == ("a", "bad")
    loader.try_next("b")
    assert names(entries) == ["slot-a.conf", "slot-b+3.conf"]
    loader.mark("b", "bad")
    assert loader.primary() == "a"


def test_slots_take_turns(uefi: tuple[Path, SystemdBoot]) -> None:
    _, loader = uefi
    for slot in ("b", "a", "b"):
        loader.try_next(slot)
        assert loader.primary() == slot
        loader.mark(slot, "good")
        assert loader.primary() == slot


def test_no_entry_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "loader" / "entries").mkdir(parents=True)
    with pytest.raises(SlotError, match="Write the card again"):
        SystemdBoot(tmp_path).primary()


def test_tryboot_names_the_trial_and_leaves_the_kept_one_alone(pi: tuple[Path, Tryboot]) -> None:
    folder, loader = pi
    loader.try_next("b")
    assert "os_prefix=slot-a/" in (folder / "config.txt").read_text()
    assert (folder / "tryboot.txt").read_text() == "arm_64bit=1\nos_prefix=slot-b/\nkernel=vmlinuz\n"
    assert (loader.primary(), loader.on_trial("b")) == ("b", True)
    loader.mark("b", "good")
    assert names(folder) == ["config.txt"]
    assert (loader.primary(), loader.on_trial("b")) == ("b", False)


def test_a_bad_trial_is_forgotten(pi: tuple[Path, Tryboot]) -> None:
    folder, loader = pi
    loader.try_next("b")
    loader.mark("b", "bad")
    assert (loader.primary(), loader.state("b"), loader.state("a")) == ("a", "bad", "good")
    loader.try_next("b")
    assert loader.state("b") == "good"
    loader.mark("b", "bad")
    (folder / "config.txt").write_text("arm_64bit=1\n")
    with pytest.raises(SlotError, match="names no slot"):
        loader.primary()


def test_boot_files_replace_those_of_the_slot_before(tmp_path: Path) -> None:
    root, boot = tmp_path / "root", tmp_path / "boot"
    (root / "usr/lib/splitward/boot").mkdir(parents=True)
    (root / "usr/lib/splitward/boot/vmlinuz").write_bytes(b"new kernel")
    (boot / "slot-b").mkdir(parents=True)
    (boot / "slot-b/old.dtb").write_bytes(b"old")
    (boot / "slot-a").mkdir()
    (boot / "slot-a/cmdline.txt").write_text(OPTIONS)
    copy_boot_files(root, boot, "b")
    assert names(boot / "slot-b") == ["cmdline.txt", "vmlinuz"]
    assert (boot / "slot-b/vmlinuz").read_bytes() == b"new kernel"
    assert "rauc.slot=b" in (boot / "slot-b/cmdline.txt").read_text()


def test_for_slot_changes_the_slots_words_only() -> None:
    assert for_slot(OPTIONS, "b") == OPTIONS.replace("slot=a", "slot=b")
