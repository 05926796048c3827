"""Files written whole, and whose they are where root has written them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitward.disk import make_folder, move_whole, write_whole

USER = 900


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Folder of another user, in which root writes."""
    if os.geteuid():
        pytest.skip("only root writes into other users' folders: run as root")
    folder = tmp_path / "home"
    folder.mkdir()
    os.chown(folder, USER, USER)
    return folder


def owners(folder: Path) -> set[tuple[int, int]]:
    return {(path.stat().st_uid, path.stat().st_gid) for path in (folder, *folder.rglob("*"))}


def test_what_root_writes_is_its_folder_s_owner_s(home: Path, tmp_path: Path) -> None:
    write_whole(home / "models/deep/active.json", b"{}")
    (tmp_path / "bundle").write_bytes(b"bundle")
    move_whole(tmp_path / "bundle", home / "models/bundle")
    make_folder(home / "private", 0o700)
    assert owners(home) == {(USER, USER)}
    assert (home / "private").stat().st_mode & 0o777 == 0o700
    assert (home / "models/deep/active.json").stat().st_mode & 0o777 == 0o600
    write_whole(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_uid == 0


def test_it_is_before_it_has_its_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(source: Path, target: Path) -> None:
        assert source.stat().st_uid == USER
        raise OSError("the power is cut")

    monkeypatch.setattr(Path, "replace", cut)
    for write in (lambda: write_whole(home / "device.key", b"key"), lambda: make_folder(home / "models")):
        with pytest.raises(OSError, match="cut"):
            write()


def test_root_writes_through_no_link(home: Path, tmp_path: Path) -> None:
    (tmp_path / "shadow").write_text("root's")
    (home / "remote.json.partial").symlink_to(tmp_path / "shadow")
    write_whole(home / "remote.json", b"{}")
    assert (tmp_path / "shadow").read_text() == "root's"
    assert (tmp_path / "shadow").stat().st_uid == 0
