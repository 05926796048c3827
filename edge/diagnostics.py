"""`edge diagnostics`: what helps to find a fault, in one archive, without secrets and without names of patients."""

from __future__ import annotations

import io
import platform
import sqlite3
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from edge.check import check_device
from edge.config import EdgeConfig
from edge.errors import EdgeError
from edge.health import disk_free_bytes, temperature_c
from edge.logs import redact
from edge.models import InstalledModel, ModelStore
from splitward.errors import SplitwardError
from splitward.versions import versions

KEPT = 3
LIMIT_S = 180.0


def collect(config: EdgeConfig, folder: Path) -> Path:
    """Write the archive to `folder`, and remove the oldest there; its path.

    Raises
    ------
    EdgeError
        `folder` cannot be written.
    """
    parts = {
        "check.json": check_device(config),
        "config.json": redact("", msgspec.to_builtins(config)),
        "models.json": _models_of(config),
        "spool.json": _spool_of(config),
        "system.json": {
            "machine": platform.platform(),
            "python": sys.version,
            "versions": versions(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "disk_free_bytes": disk_free_bytes(Path(config.device.state_dir)),
            "temperature_c": temperature_c(),
        },
    }
    path = folder / f"diagnostics-{config.device.id}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.tar.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tarfile.open(path, "w:gz") as archive:
            for name, value in parts.items():
                _add(archive, name, msgspec.json.format(msgspec.json.encode(value), indent=2))
            for log in _logs_of(config):
                _add(archive, f"logs/{log.name}", log.read_bytes())
        for old in sorted(folder.glob("diagnostics-*.tar.gz"))[:-KEPT]:
            old.unlink()
    except OSError as error:
        raise EdgeError(f"{folder}: {error.strerror}. Give --out a folder that may be written.") from error
    return path


def collect_apart(config: EdgeConfig, folder: Path) -> str:
    """As `collect`, in a process of its own, so that the agent stays small; the archive's path."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edge.diagnostics", str(folder)],
            input=msgspec.json.encode(config),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EdgeError(f"the diagnostics took over {LIMIT_S:.0f} s.") from None
    if done.returncode:
        raise EdgeError(done.stderr.decode(errors="replace").strip()[-500:])
    return done.stdout.decode().strip()


def _models_of(config: EdgeConfig) -> list[InstalledModel] | dict[str, str]:
    try:
        return ModelStore(config).installed()
    except SplitwardError as error:
        return {"unreadable": str(error)}


def _spool_of(config: EdgeConfig) -> dict[str, Any]:
    """What the spool holds, as far as it can be read beside a running agent."""
    path = Path(config.device.state_dir) / "spool.sqlite"
    found: dict[str, Any] = {"bytes": path.stat().st_size if path.exists() else 0}
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.5)) as database:
            found["rows"] = database.execute("SELECT count(*) FROM frame").fetchone()[0]
            found["dropped"] = dict(database.execute("SELECT reason, count FROM dropped").fetchall())
    except sqlite3.Error as error:
        found["unreadable"] = str(error)  # the agent holds it
    return found


def _logs_of(config: EdgeConfig) -> list[Path]:
    if config.health.log_file is None:
        return []
    log = Path(config.health.log_file)
    return sorted(log.parent.glob(log.name + "*"))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    entry.mtime = int(time.time())
    archive.addfile(entry, io.BytesIO(data))


def main() -> int:
    """Collect by the configuration on standard input, to the folder of the first argument."""
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=EdgeConfig)
    try:
        print(collect(config, Path(sys.argv[1])))
    except SplitwardError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
