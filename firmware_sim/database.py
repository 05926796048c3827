"""A PostgreSQL server of one's own, for simulations and tests: on the loopback, killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from firmware_sim.broker import HOST, free_port
from splitward.errors import SplitwardError

START_S = 60.0


class DatabaseError(SplitwardError):
    """No database can be started."""


class Postgres:
    """One server; its data lie in `folder` and outlive `kill`."""

    def __init__(self, programs: Path, folder: Path, durable: bool) -> None:
        self.port = free_port()
        self._programs, self._folder = programs, folder
        self._as_user: list[str] = []
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(folder, "postgres", "postgres")
            self._as_user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        self._settings = ["-k", str(folder), "-h", HOST, "-p", str(self.port)]
        self._settings += ["-c", f"fsync={'on' if durable else 'off'}"]
        self._process: subprocess.Popen[bytes] | None = None
        command = [
            *self._as_user,
            str(programs / "initdb"),
            "-D",
            str(folder / "data"),
            "-A",
            "trust",
            "-U",
            "test",
        ]
        subprocess.run([*command, "--no-sync"], check=True, capture_output=True, cwd=folder)

    @property
    def url(self) -> str:
        """SQLAlchemy's, without a database's name."""
        return f"postgresql+psycopg://test@{HOST}:{self.port}"

    @property
    def runs(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers; `DatabaseError` when it does not."""
        command = [*self._as_user, str(self._programs / "postgres"), "-D", str(self._folder / "data")]
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._settings], stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        ask = [str(self._programs / "pg_isready"), "-h", HOST, "-p", str(self.port), "-t", "30"]
        deadline_s = time.monotonic() + START_S
        while subprocess.run(ask, check=False, capture_output=True).returncode:
            if not self.runs or time.monotonic() > deadline_s:
                said = (self._folder / "postgres.log").read_text(errors="replace")[-500:]
                raise DatabaseError(f"PostgreSQL does not answer at {HOST}:{self.port}: {said!r}.")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill every process of it, as a power cut would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None


@contextmanager
def start_postgres(durable: bool = True) -> Iterator[Postgres]:
    """Server that runs until the context ends; not `durable`: without fsync, for tests that nobody kills.

    Raises
    ------
    DatabaseError
        It is not installed, or does not start.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path("/usr/bin")]
    if not (found[-1] / "initdb").exists():
        raise DatabaseError("postgresql is not installed: apt install postgresql.")
    folder = Path(tempfile.mkdtemp(prefix="splitward-postgres-"))
    try:
        server = Postgres(found[-1], folder, durable)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
