"""The processes of a scenario: a device with its disk and its clock, and the cloud; killed, and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from edge.config import EdgeConfig
from firmware_sim.broker import free_port
from firmware_sim.fleet import to_toml
from splitward.wire.server import server_card_path

RESTART_S = 0.5
FAKETIME = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "faketime" / "libfaketimeMT.so.1"
"""Where Debian puts the library that gives a process a clock of its own."""


class SimulatedDevice:
    """One device: its disk, its clock, and its agent, started again whenever it ends."""

    def __init__(self, folder: Path, config: EdgeConfig, clock: Path | None, memory_bytes: int) -> None:
        self.folder = folder
        self.config = config
        self.starts = 0
        self._clock = clock
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._tracer: subprocess.Popen[bytes] | None = None
        self._start_at_s = 0.0
        self._toml = folder / "edge.toml"
        self._toml.write_text(to_toml(config), encoding="utf-8")

    @property
    def results_path(self) -> Path:
        return self.folder / "results.jsonl"

    def supervise(self, now_s: float) -> None:
        """Start the agent if it does not run."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
            self._start_at_s = now_s + RESTART_S
        if self._process is None and now_s >= self._start_at_s:
            self._process = self._start()

    def kill(self) -> bool:
        """Kill the agent as a power cut would, its releaser with it; whether it ran."""
        if self._process is None or self._process.poll() is not None:
            return False
        for pid in [self._process.pid, *children_of(self._process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        return True

    def signal_releaser(self, number: signal.Signals) -> bool:
        """Send a signal to the releaser; whether there was one."""
        children = [] if self._process is None else children_of(self._process.pid)
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return bool(children)

    def jump(self, hours: float) -> None:
        """Set the device's clock, as a network time service or a dead battery would."""
        assert self._clock is not None  # noqa: S101  # run_chaos checked
        text = self._clock.read_text()
        partial = self._clock.with_suffix(".new")
        partial.write_text(f"{float(text) + 3600 * hours:+.0f}")
        partial.replace(self._clock)

    def fill_disk(self) -> None:
        """Take every byte that is left on the device's disk."""
        with (
            (Path(self.config.device.state_dir) / "ballast").open("wb", buffering=0) as file,
            suppress(OSError),
        ):
            while file.write(bytes(4096)):
                pass

    def empty_disk(self) -> None:
        """Give the space back."""
        (Path(self.config.device.state_dir) / "ballast").unlink(missing_ok=True)

    def slow_disk(self, milliseconds: float) -> bool:
        """Let every flush to the disk take so long, as on a worn card, until `mend_disk`; whether it is so now."""
        if self._process is None or self._process.poll() is not None or self._tracer is not None:
            return False
        self._tracer = delay_flushes(self._process.pid, milliseconds)
        return True

    def mend_disk(self) -> None:
        """Let the disk be as fast as it was."""
        if self._tracer is not None:
            self._tracer.terminate()
            self._tracer.wait()
            self._tracer = None

    def finish(self) -> None:
        """End the agent; then start it once more, until every frame is answered."""
        self.stop()
        self._process = self._start("--until-answered")

    def wait(self, deadline_s: float) -> dict[str, Any]:
        """The report of an agent that was told to finish; empty where it did not by the deadline."""
        if self._process is None:
            return {}
        try:
            self._process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            return {}
        said = (self.folder / "report.json").read_bytes()
        return dict(json.loads(said)) if said else {}

    def stop(self) -> None:
        """End the agent politely, and then not."""
        self.mend_disk()
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        self.starts += 1
        environment = dict(os.environ)
        if self._clock is not None:
            environment |= {
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME_TIMESTAMP_FILE": str(self._clock),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        limited = ["prlimit", f"--as={self._memory_bytes}"] if self._memory_bytes else []
        with (self.folder / "report.json").open("wb") as output, (self.folder / "agent.log").open("ab") as said:
            return subprocess.Popen(
                [*limited, sys.executable, "-m", "edge", "run", "--config", str(self._toml), *flags],
                stdout=output,
                stderr=said,
                env=environment,
            )


class SimulatedCloud:
    """The cloud as a process of its own; its store and log lie in `folder`. `tls` names its certificate's files."""

    def __init__(self, folder: Path, bundle: Path, broker_port: int, tls: dict[str, str], store: str) -> None:
        self._config = folder / "cloud.toml"
        self._log = folder / "cloud.log"
        secured = "".join(f"tls.{name} = {json.dumps(path)}\n" for name, path in tls.items())
        self._config.write_text(
            f"models = {json.dumps([str(server_card_path(bundle))])}\n\n[broker]\nport = {broker_port}\n{secured}\n"
            f"[api]\nport = {free_port()}\nrequire_token = false\n\n[store]\nurl = {json.dumps(store)}\n"
            f"[fleet]\nstate_dir = {json.dumps(str(folder / 'fleet'))}\n",
            encoding="utf-8",
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._away_until_s = 0.0

    def supervise(self, now_s: float) -> None:
        """Start it if it does not run and should."""
        if (self._process is None or self._process.poll() is not None) and now_s >= self._away_until_s:
            with self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "cloud", "--config", str(self._config)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )

    def kill(self, until_s: float) -> bool:
        """Kill it, and leave it dead until then; whether it ran."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._away_until_s = until_s
        self._process.kill()
        self._process.wait()
        return True

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def delay_flushes(pid: int, milliseconds: float) -> subprocess.Popen[bytes]:
    """Let every flush of a process to its disk take so much longer, until what is returned is ended."""
    flushes, delay_us = "fsync,fdatasync", round(1000 * milliseconds)
    return subprocess.Popen(
        [
            *("strace", "-f", "-qqq", "-o", "/dev/null", "-p", str(pid)),
            *("-e", f"trace={flushes}", "-e", f"inject={flushes}:delay_enter={delay_us}"),
        ],
        stderr=subprocess.DEVNULL,
    )


def children_of(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(one) for one in (task / "children").read_text().split()]
    return found
