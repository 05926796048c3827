"""`edge install` on this machine's own system, in a mount namespace that forgets everything it did."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
REPOSITORY = Path(__file__).resolve().parents[2]
# /etc, /opt and /var/lib are copies in memory over this system's own: what is done to them ends with the shell.
_SCRIPT = """\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
for folder in etc opt var/lib; do
    mkdir -p "$1/$folder/upper" "$1/$folder/work"
    mount -t overlay -o "lowerdir=/$folder,upperdir=$1/$folder/upper,workdir=$1/$folder/work" overlay "/$folder"
done
edge="$2 -m edge"
$edge install --package "$3" --pip=--no-deps --system-packages
id splitward
stat -c '%a %U' /var/lib/splitward /etc/splitward
cat /etc/systemd/system/splitward-edge.service
(cd / && PYTHONPATH= /opt/splitward/bin/python -c 'import edge.install; print("imports from", edge.install.__file__)')
stat -c '%U %a' /etc/splitward/edge.toml /var/lib/splitward/images
setpriv --reuid splitward --regid splitward --clear-groups touch /etc/splitward/device.key.new
echo 'kept = true' > /etc/splitward/edge.toml
install -m 600 /dev/null /etc/splitward/device.key
install -m 600 /dev/null /var/lib/splitward/remote.json
echo AGAIN
rm /opt/splitward/lib/python*/site-packages/edge/agent.py
$edge install --package "$3" --pip=--no-deps --system-packages
test -s /opt/splitward/lib/python*/site-packages/edge/agent.py
cat /etc/splitward/edge.toml
stat -c '%n %U' /etc/splitward/device.key /var/lib/splitward/remote.json
$edge uninstall
test ! -e /opt/splitward
test ! -e /etc/systemd/system/splitward-edge.service
test -e /etc/splitward/edge.toml
$edge uninstall --purge
test ! -e /etc/splitward
test ! -e /var/lib/splitward
! id splitward 2> /dev/null
$edge uninstall --purge
echo DONE
"""


def test_install_again_and_uninstall(tmp_path: Path) -> None:
    if os.geteuid() or shutil.which("useradd") is None:
        pytest.skip("it needs root and useradd: apt install passwd")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    for name in ("splitward", "edge"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            _SCRIPT,
            "sh",
            str(tmp_path / "scratch"),
            sys.executable,
            str(wheel),
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, _, again = done.stdout.partition("AGAIN\n")
    assert "user splitward: made" in first
    assert "700 splitward\n750 splitward" in first, "`edge renew` replaces the certificate there"
    assert "splitward 640\nsplitward 700\n" in first
    assert "imports from /opt/splitward/" in first
    assert "ExecStart=/opt/splitward/bin/python -m edge run" in first
    assert "made" not in again
    assert "written" not in again
    assert "kept = true" in again
    assert "device.key splitward\n/var/lib/splitward/remote.json splitward" in again, "what root left is mended"
    assert again.endswith("DONE\n")
