"""Files that a power cut leaves whole: the old content or the new, never half of it.

What root writes belongs to the owner of the folder that it is in, from the moment at which it has its name: a command
that a person runs as root leaves nothing behind that the folder's own user, such as the agent, cannot read or replace.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace the file at `path`; when this returns, `data` is on the disk."""
    make_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # never written through: it may be a link that the folder's user has laid
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        _give(file.fileno(), path.parent)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    move_whole(partial, path)


def move_whole(source: Path, target: Path) -> None:
    """Rename; when this returns, the new name is on the disk."""
    _give(source, target.parent)
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make the folder at `path`, of `mode`, and those above it, where there is none."""
    if path.is_dir():
        return
    make_folder(path.parent)
    if _is_at_home(path.parent):
        path.mkdir(mode, exist_ok=True)
        return
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(mode, exist_ok=True)
    _give(partial, path.parent)
    partial.replace(path)


def _is_at_home(folder: Path) -> bool:
    """Whether what this process makes in `folder` is its own to keep: it is not root's, or the folder is."""
    return os.geteuid() != 0 or folder.stat().st_uid == 0


def _give(what: Path | int, folder: Path) -> None:
    """Let the owner of `folder` have a path, or an open file."""
    if not _is_at_home(folder):
        owner = folder.stat()
        with suppress(OSError):  # a file system that knows no owners, or whose root we are not
            os.chown(what, owner.st_uid, owner.st_gid, follow_symlinks=isinstance(what, int))
