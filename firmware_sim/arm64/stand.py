"""What an emulated device meets on this machine: a broker with mutual TLS, the cloud, and one who listens."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from firmware_sim.arm64.user import EmulationError
from firmware_sim.authority import Authority
from firmware_sim.broker import find_mosquitto, free_port, secured_settings
from splitward.errors import WireError
from splitward.image.debian import read_epoch
from splitward.wire import topics
from splitward.wire.control import Result, Status, decode_reply, decode_status

GUEST_HOST = "10.0.2.2"
"""This machine, as QEMU's own network shows it to the device."""
START_S = 300.0


class Listener:
    """Hears every status and result, with the time of each on this machine's monotonic clock."""

    def __init__(self, folder: Path, port: int) -> None:
        self._lock = threading.Lock()
        self._statuses: dict[str, list[Status]] = {}
        self._results: dict[str, set[tuple[str, int]]] = {}
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, "observer", protocol=mqtt.MQTTv5)
        self._client.tls_set(str(folder / "ca.pem"), str(folder / "observer.pem"), str(folder / "observer.key"))
        self._client.on_connect = lambda client, *_: client.subscribe(
            [(topics.every_status(), 1), (f"{topics.ROOT}/+/+/result", 1)]
        )
        self._client.on_message = self._hear
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def answered(self, device: str) -> int:
        """Frames that `device` itself says were answered since it started."""
        with self._lock:
            heard = self._statuses.get(device, [])
            return heard[-1].results if heard else 0

    def is_online(self, device: str) -> bool:
        """Whether `device` says that it is connected."""
        with self._lock:
            heard = self._statuses.get(device)
            return heard is not None and heard[-1].state == "online"

    def is_idle(self, device: str) -> bool:
        """Whether `device` is connected and nothing waits in its spool."""
        with self._lock:
            heard = self._statuses.get(device)
            return heard is not None and heard[-1].state == "online" and heard[-1].queued == 0

    def results(self, device: str) -> set[tuple[str, int]]:
        """Boot and sequence of every result that went to `device`."""
        with self._lock:
            return set(self._results.get(device, set()))

    def forget(self) -> None:
        """Begin to listen anew."""
        with self._lock:
            self._statuses.clear()

    def close(self) -> None:
        """Stop listening."""
        self._client.disconnect()
        self._client.loop_stop()

    def _hear(self, _client: mqtt.Client, _context: object, message: mqtt.MQTTMessage) -> None:
        try:
            _, device, kind = topics.parse(message.topic)
            with self._lock:
                if kind == "status":
                    self._statuses.setdefault(device, []).append(decode_status(bytes(message.payload)))
                elif isinstance(reply := decode_reply(bytes(message.payload)), Result):
                    self._results.setdefault(device, set()).add((reply.boot, reply.sequence))
        except WireError as error:
            print(f"listener: {error}", file=sys.stderr)


class Stand:
    """Broker, cloud and listener; `port` is the broker's."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.port, self.api_port = free_port(), free_port()
        # A board without a clock starts at the time of the image's lock file.
        authority = Authority(folder, since_s=read_epoch())
        authority.issue("broker", ("127.0.0.1", GUEST_HOST))
        for name in ("cloud", "observer", device):
            authority.issue(name)
        self._broker: subprocess.Popen[bytes] | None = None
        self._cloud: subprocess.Popen[bytes] | None = None
        self.listener: Listener | None = None

    def start_broker(self) -> None:
        """Start mosquitto, and wait until it listens."""
        program = find_mosquitto()
        if program is None:
            raise EmulationError("mosquitto is not installed: apt install mosquitto.")
        settings = self.folder / "broker.conf"
        settings.write_text(secured_settings(self.port, self.folder))
        self._broker = self._spawn([program, "-c", str(settings)], "broker.log")
        _wait(lambda: _listens(self.port), "the broker", self.folder / "broker.log")

    def stop_broker(self) -> None:
        """Kill the broker, as a power cut would."""
        _end(self._broker, kill=True)

    def start_cloud(self, card: Path) -> None:
        """Start the cloud with the server half at `card`, and wait until it is ready."""
        tls = {
            name: str(self.folder / file)
            for name, file in (("ca", "ca.pem"), ("cert", "cloud.pem"), ("key", "cloud.key"))
        }
        lines = [f"models = {json.dumps([str(card)])}", "[broker]", f"port = {self.port}", "[broker.tls]"]
        lines += [f"{name} = {json.dumps(path)}" for name, path in tls.items()]
        lines += ["[api]", f"port = {self.api_port}", "[store]"]
        lines += [f"url = {json.dumps(f'sqlite+aiosqlite:///{self.folder}/cloud.db')}"]
        (self.folder / "cloud.toml").write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "cloud", "--config", str(self.folder / "cloud.toml")]
        self._cloud = self._spawn(command, "cloud.log")
        _wait(lambda: _is_ready(self.api_port), "the cloud", self.folder / "cloud.log")

    def stored(self) -> set[tuple[str, int]]:
        """Boot and sequence of the device's results in the cloud's store."""
        with sqlite3.connect(f"file:{self.folder}/cloud.db?mode=ro", uri=True) as database:
            rows = database.execute(
                "SELECT boot, sequence FROM results WHERE device = ?", (self.device,)
            ).fetchall()
        return {(boot, sequence) for boot, sequence in rows}

    def credentials(self) -> dict[str, Path]:
        """Files that the device's card carries in `import`."""
        return {
            "import/ca.pem": self.folder / "ca.pem",
            "import/device.pem": self.folder / f"{self.device}.pem",
            "import/device.key": self.folder / f"{self.device}.key",
        }

    def close(self) -> None:
        """End everything."""
        if self.listener is not None:
            self.listener.close()
        _end(self._cloud, kill=False)
        _end(self._broker, kill=True)

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output)


@contextmanager
def open_stand(folder: Path, device: str, card: Path) -> Iterator[Stand]:
    """Stand for one device, whose server half is described at `card`, until the context ends."""
    folder.mkdir(parents=True, exist_ok=True)
    stand = Stand(folder, device)
    try:
        stand.start_broker()
        stand.listener = Listener(folder, stand.port)
        stand.start_cloud(card)
        yield stand
    finally:
        stand.close()


def _end(process: subprocess.Popen[bytes] | None, kill: bool) -> None:
    if process is None or process.poll() is not None:
        return
    process.kill() if kill else process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(until: Callable[[], bool], what: str, log: Path) -> None:
    deadline_s = time.monotonic() + START_S
    while not until():
        if time.monotonic() > deadline_s:
            raise EmulationError(f"{what} does not start: {log.read_text(errors='replace')[-800:]}")
        time.sleep(0.05)


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
            return True
    except OSError:
        return False
