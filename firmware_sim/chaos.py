"""Chaos: a fleet of the real agent, a real broker and the real cloud, under a scenario; and what became of each frame.

The harness is what systemd is on a device: an agent that ends is started again. At the end everything is healed, and
every frame must have exactly one result in the cloud's store, under the name that its device knows it by.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from edge.config import (
    BrokerConfig,
    CaptureConfig,
    DeviceConfig,
    EdgeConfig,
    LinkConfig,
    RuntimeConfig,
    TlsConfig,
)
from edge.recording import read_recording
from edge.results import read_results
from firmware_sim.authority import Authority
from firmware_sim.broker import HOST, Broker, start_broker
from firmware_sim.database import Postgres, start_postgres
from firmware_sim.errors import ScenarioError
from firmware_sim.fleet import clear_device
from firmware_sim.processes import FAKETIME, SimulatedCloud, SimulatedDevice
from firmware_sim.proxy import FaultProxy, Toxics
from firmware_sim.scenario import Event, Scenario, plan, toxics_of

LINK = LinkConfig(retry_s=2.0, retry_max_s=20.0, reconnect_s=0.3, reconnect_max_s=3.0, status_s=10.0)
TICK_S = 0.1
AGAIN_S = 2.0
log = logging.getLogger(__name__)


class ChaosReport(Struct, frozen=True, kw_only=True):
    """What a scenario did, and what became of the frames.

    Attributes
    ----------
    frames : int
        Frames that the devices were given.
    results : int
        Rows in the cloud's store.
    lost : int
        Frames without a result in the store that are not in `dropped` either.
    duplicated : int
        Frames with results under more than one name, and rows that no device knows.
    dropped : dict
        By reason, summed over the devices' own counters.
    kills, faults : dict
        Processes killed by kind, and other events that were carried out.
    """

    scenario: str
    seed: int
    devices: int
    frames: int
    results: int
    lost: int
    duplicated: int
    dropped: dict[str, int]
    kills: dict[str, int]
    faults: dict[str, int]
    starts: int
    wall_s: float
    heal_s: float

    @property
    def complete(self) -> bool:
        """Whether nothing was lost and nothing came twice."""
        return not self.lost and not self.duplicated


class Chaos:
    """One scenario under way."""

    def __init__(
        self,
        scenario: Scenario,
        devices: Sequence[SimulatedDevice],
        broker: Broker,
        proxy: FaultProxy,
        cloud: SimulatedCloud,
        database: Postgres | None,
    ) -> None:
        self._scenario = scenario
        self._devices = devices
        self._broker = broker
        self._proxy = proxy
        self._cloud = cloud
        self._database = database
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._broker_away_until_s: float | None = None
        self.kills: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def run(self) -> None:
        """Let every event happen in its time, and then heal everything."""
        started_s = time.monotonic()
        events = plan(self._scenario)
        while (now_s := time.monotonic()) - started_s < self._scenario.duration_s:
            while events and now_s - started_s >= events[0].at_s:
                event = events.pop(0)
                if not self._carry_out(event, now_s):  # what it was aimed at is down: a little later, then
                    events.append(msgspec.structs.replace(event, at_s=event.at_s + AGAIN_S))
                    events.sort(key=lambda one: one.at_s)
            self._supervise(now_s)
            time.sleep(TICK_S)
        self._proxy.toxics = Toxics()
        for _, heal in self._later:
            heal()
        self._later.clear()
        self._supervise(time.monotonic() + self._scenario.duration_s)  # whoever is away comes back

    def _supervise(self, now_s: float) -> None:
        for due in [one for one in self._later if now_s >= one[0]]:
            self._later.remove(due)
            due[1]()
        if self._broker_away_until_s is not None and now_s >= self._broker_away_until_s:
            self._broker.start()
            self._broker_away_until_s = None
        self._cloud.supervise(now_s)
        for device in self._devices:
            device.supervise(now_s)

    def _carry_out(self, event: Event, now_s: float) -> bool:
        """Let it happen; False when what it is aimed at is not there."""
        device, until_s = self._devices[event.device % len(self._devices)], now_s + event.lasts_s
        if event.kind in ("kill_agent", "kill_releaser", "kill_cloud", "hang_releaser", "slow_disk"):
            blows: dict[str, Callable[[], bool]] = {
                "kill_agent": device.kill,
                "kill_releaser": lambda: device.signal_releaser(signal.SIGKILL),
                "kill_cloud": lambda: self._cloud.kill(until_s),
                "hang_releaser": lambda: device.signal_releaser(signal.SIGSTOP),
                "slow_disk": lambda: device.slow_disk(event.value),
            }
            hit = blows[event.kind]()
            if hit and event.kind == "slow_disk":
                self._later.append((until_s, device.mend_disk))
        elif event.kind == "kill_broker":
            hit = self._broker_away_until_s is None
            if hit:
                self._broker.stop()
                self._broker_away_until_s = until_s
        elif event.kind == "kill_database":
            database = self._database
            hit = database is not None and database.runs
            if database is not None and hit:
                database.kill()
                self._later.append((until_s, database.start))
        else:
            hit = True
            self._spoil(event, device, until_s)
        if hit:
            log.info("%s %s for %.1f s, value %.2f", event.kind, device.folder.name, event.lasts_s, event.value)
            verb, _, what = event.kind.partition("_")
            self.kills[what] += verb == "kill"
            self.faults[event.kind] += verb != "kill"
        return hit

    def _spoil(self, event: Event, device: SimulatedDevice, until_s: float) -> None:
        if event.kind == "clock_jump":
            device.jump(event.value)
        elif event.kind == "disk_full":
            device.fill_disk()
            self._later.append((until_s, device.empty_disk))
        elif event.kind == "cut":
            self._proxy.cut()
        else:
            toxics = toxics_of(event)
            self._proxy.toxics = toxics

            def heal() -> None:
                if self._proxy.toxics is toxics:
                    self._proxy.toxics = Toxics()

            self._later.append((until_s, heal))


def run_chaos(
    scenario: Scenario, frames: Path, bundle: Path, trusted_key: Path, folder: Path | None = None
) -> ChaosReport:
    """Carry out a scenario.

    Parameters
    ----------
    scenario : Scenario
    frames : Path
        Recording whose images are dealt out, again and again if there are too few.
    bundle, trusted_key : Path
        The bundle, its server card beside it.
    folder : Path, optional
        For the devices, the store and the logs, which then stay until the next run there; a temporary one by default.

    Raises
    ------
    ScenarioError
        This machine lacks what an event needs.
    CaptureError
        The frames cannot be read.
    """
    kinds = {event.kind for event in plan(scenario)}
    if "disk_full" in kinds and os.geteuid() != 0:
        raise ScenarioError("only root can mount the small disks that `disk_full` fills. Run it as root.")
    if "kill_database" in kinds and scenario.store == "sqlite":
        raise ScenarioError('SQLite lives in the cloud\'s process: `kill_database` needs store = "postgresql".')
    if "slow_disk" in kinds and shutil.which("strace") is None:
        raise ScenarioError("strace is missing, which `slow_disk` needs: apt install strace.")
    if "clock_jump" in kinds and not FAKETIME.exists():
        raise ScenarioError(f"{FAKETIME} is missing, which `clock_jump` needs: apt install faketime.")
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="splitward-chaos-")))
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in [*folder.glob("cloud.db*"), folder / "cloud.log"]:
            leftover.unlink(missing_ok=True)
        authority = _certify(folder / "certificates", scenario) if scenario.tls else None
        broker = stack.enter_context(start_broker(certificates=None if authority is None else authority.folder))
        proxy = stack.enter_context(FaultProxy(broker.port, seed=scenario.seed))
        database = stack.enter_context(start_postgres()) if scenario.store == "postgresql" else None
        store = f"sqlite+aiosqlite:///{folder}/cloud.db" if database is None else f"{database.url}/postgres"
        tls_files = {} if authority is None else authority.files("cloud")
        cloud = SimulatedCloud(folder, bundle.resolve(), broker.port, tls_files, store)
        stack.callback(cloud.stop)
        devices = []
        for number, (images, names) in enumerate(_deal(frames, scenario)):
            place = folder / _name(number)
            clear_device(place)
            stack.enter_context(_disk(place / "state", scenario.disk_bytes if "disk_full" in kinds else 0))
            np.savez(place / "frames.npz", images=images, names=np.array(names))
            clock = place / "clock" if "clock_jump" in kinds else None
            if clock is not None:
                clock.write_text("+0")
            config = _configure(scenario, place, bundle, trusted_key, proxy.port, number)
            if authority is not None:
                tls = TlsConfig(**authority.files(config.device.id))
                config = msgspec.structs.replace(config, broker=msgspec.structs.replace(config.broker, tls=tls))
            devices.append(SimulatedDevice(place, config, clock, scenario.memory_bytes))
            stack.callback(devices[-1].stop)
        chaos = Chaos(scenario, devices, broker, proxy, cloud, database)
        return _run(chaos, scenario, devices, cloud, store)


def _certify(folder: Path, scenario: Scenario) -> Authority:
    """Certificates of the broker, the cloud and every device."""
    folder.mkdir(exist_ok=True)
    authority = Authority(folder)
    authority.issue("broker", (HOST,))
    for name in ("cloud", *(_name(number) for number in range(scenario.devices))):
        authority.issue(name)
    return authority


def _name(number: int) -> str:
    return f"device-{number + 1}"


def _run(
    chaos: Chaos, scenario: Scenario, devices: Sequence[SimulatedDevice], cloud: SimulatedCloud, store: str
) -> ChaosReport:
    started_s = time.monotonic()
    chaos.run()
    healed_s = time.monotonic()
    for device in devices:
        device.finish()
    reports = [device.wait(healed_s + scenario.heal_s) for device in devices]
    ended_s = time.monotonic()
    cloud.stop()
    per_device = -(-scenario.frames // scenario.devices)
    lost, duplicated, rows = _account(devices, _stored(store), per_device, reports)
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.get("dropped", {}))
    return ChaosReport(
        scenario=scenario.name,
        seed=scenario.seed,
        devices=scenario.devices,
        frames=per_device * scenario.devices,
        results=rows,
        lost=lost,
        duplicated=duplicated,
        dropped=dict(dropped),
        kills=dict(+chaos.kills),
        faults=dict(+chaos.faults),
        starts=sum(device.starts for device in devices),
        wall_s=round(ended_s - started_s, 1),
        heal_s=round(ended_s - healed_s, 1),
    )


def _stored(store: str) -> Counter[tuple[str, str, int]]:
    """Device, boot and sequence of every row of the store at the URL `store`."""
    question = "SELECT device, boot, sequence FROM results"
    if store.startswith("sqlite"):
        with closing(sqlite3.connect(store.partition("///")[2])) as database:
            return Counter(database.execute(question).fetchall())
    import psycopg

    with psycopg.connect(store.replace("+psycopg", "")) as connection:
        return Counter(connection.execute(question).fetchall())


def _account(
    devices: Sequence[SimulatedDevice],
    rows: Counter[tuple[str, str, int]],
    per_device: int,
    reports: Sequence[dict[str, Any]],
) -> tuple[int, int, int]:
    """Frames lost, frames or rows too many, and rows of the store."""
    lost = duplicated = 0
    claimed: set[tuple[str, str, int]] = set()
    for device, report in zip(devices, reports, strict=True):
        names: dict[str, set[tuple[str, str, int]]] = {}
        for line in read_results(device.results_path):
            if line["type"] == "result":
                key = (device.config.device.id, line["boot"], line["sequence"])
                names.setdefault(line["name"], set()).add(key)
        stored = {name: keys & set(rows) for name, keys in names.items()}
        claimed |= {key for keys in stored.values() for key in keys}
        answered = sum(bool(keys) for keys in stored.values())
        lost += per_device - answered - sum(report.get("dropped", {}).values())
        duplicated += sum(len(keys) > 1 for keys in names.values())
    strangers = sum(key not in claimed for key in rows)
    return lost, duplicated + strangers, len(rows)


def _deal(frames: Path, scenario: Scenario) -> Iterator[tuple[Any, list[str]]]:
    images, _ = read_recording(frames)
    each = -(-scenario.frames // scenario.devices)
    for number in range(scenario.devices):
        picked = (np.arange(each) + number * each) % len(images)
        yield images[picked], [f"{_name(number)}-frame-{index:06d}" for index in range(each)]


def _configure(
    scenario: Scenario, place: Path, bundle: Path, trusted_key: Path, port: int, number: int
) -> EdgeConfig:
    backend, precision = scenario.variants[number % len(scenario.variants)].split("-")
    return EdgeConfig(
        device=DeviceConfig(
            id=_name(number),
            site="chaos",
            bundle=str(bundle.resolve()),
            trusted_key=str(trusted_key.resolve()),
            state_dir=str(place / "state"),
            results_file=str(place / "results.jsonl"),
        ),
        capture=CaptureConfig(path=str(place / "frames.npz"), rate_hz=scenario.rate_hz),
        # A releaser that the harness kills is not the runtime's fault.
        runtime=msgspec.convert({"backend": backend, "precision": precision, "restarts": 50}, RuntimeConfig),
        broker=BrokerConfig(port=port, keepalive_s=5),
        link=LINK,
    )


@contextmanager
def _disk(path: Path, size: int) -> Iterator[None]:
    """A folder, on a disk of its own of `size` bytes where it is not 0."""
    path.mkdir(parents=True, exist_ok=True)
    if not size:
        yield
        return
    done = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", f"size={size}", "splitward-chaos", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ScenarioError(f"{path}: no small disk can be mounted: {done.stderr.strip()}.")
    try:
        yield
    finally:
        subprocess.run(["/bin/umount", "-l", str(path)], check=False)


def write_report(report: ChaosReport, path: Path, **more: Any) -> None:
    """Write a report as JSON, with `more` beside it."""
    values = {**msgspec.to_builtins(report), **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
