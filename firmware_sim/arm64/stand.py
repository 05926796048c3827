"""What an emulated device meets on this machine: a broker with mutual TLS, the cloud, and one who listens."""

from __future__ import annotations

import json
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from firmware_sim.arm64.user import EmulationError
from firmware_sim.authority import Authority
from firmware_sim.broker import find_mosquitto, free_port, secured_settings
from splitward.config import format_toml
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
        self._client.tls_set(str(folder / "ca.pem"), str(folder / "cloud.pem"), str(folder / "cloud.key"))
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

    def model(self, device: str) -> str:
        """Id of the model that `device` runs, as far as it said."""
        with self._lock:
            heard = self._statuses.get(device)
            return heard[-1].model if heard else ""

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
    """Broker, cloud and listener; `port` is the broker's.

    The device's certificate is brought to its card. With `trusted_key`, which verifies the bundle, the device enrols
    instead: the cloud's own authority certifies everyone, and `token` is the device's. It needs a clock for that.
    """

    def __init__(
        self, folder: Path, device: str, cards: Sequence[Path], trusted_key: Path | None = None
    ) -> None:
        self.folder, self.device = folder, device
        self.port, self.api_port = free_port(), free_port()
        self.token = ""
        self._write_settings(cards, trusted_key)
        if trusted_key is not None:
            for service in ("broker", "cloud"):
                self._certify(service)
            (folder / "ca.pem").write_bytes((folder / "authority.pem").read_bytes())
        else:
            # A board without a clock starts at the time of the image's lock file.
            authority = Authority(folder, since_s=read_epoch())
            for name in ("broker", "cloud"):
                authority.issue(name, ("127.0.0.1", GUEST_HOST))
            authority.issue(device)
        self.enrols = trusted_key is not None
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

    def start_cloud(self) -> None:
        """Start the cloud, wait until it is ready, and have it make the device's token if it is to enrol."""
        self._cloud = self._spawn([*self._command, "serve"], "cloud.log")
        _wait(lambda: self._ask("/readyz") is not None, "the cloud", self.folder / "cloud.log")
        if self.enrols:
            made = self._ask("/v1/enrolment-tokens", {"site": "stand", "device": self.device})
            self.token = json.loads(made or b"{}")["token"]

    def stored(self) -> set[tuple[str, int]]:
        """Boot and sequence of the device's results in the cloud's store."""
        with sqlite3.connect(f"file:{self.folder}/cloud.db?mode=ro", uri=True) as database:
            rows = database.execute(
                "SELECT boot, sequence FROM results WHERE device = ?", (self.device,)
            ).fetchall()
        return {(boot, sequence) for boot, sequence in rows}

    def upload(self, bundle: Path) -> None:
        """Add a bundle to the cloud's registry."""
        if self._ask("/v1/bundles", bundle.read_bytes()) is None:
            raise EmulationError(f"the cloud does not take {bundle}: see {self.folder / 'cloud.log'}.")

    def roll_out(self, model: str) -> str:
        """Roll a bundle of the registry out, whatever its age; the id by which `halt` ends it."""
        body = {"model": model, "canary_share": 1.0, "allow_older": True, "roll_back": False}
        answer = self._ask("/v1/rollouts", body)
        if answer is None:
            raise EmulationError(f"no roll-out of {model}: see {self.folder / 'cloud.log'}.")
        return str(json.loads(answer)["id"])

    def halt(self, rollout: str) -> None:
        """End a roll-out, if it has not ended."""
        self._ask(f"/v1/rollouts/{rollout}/halt", {})

    def credentials(self) -> dict[str, Path]:
        """Files that the device's card carries in `import`."""
        authority = {"import/ca.pem": self.folder / "ca.pem"}
        if self.enrols:
            return authority
        return {
            **authority,
            "import/device.pem": self.folder / f"{self.device}.pem",
            "import/device.key": self.folder / f"{self.device}.key",
        }

    def close(self) -> None:
        """End everything."""
        if self.listener is not None:
            self.listener.close()
        _end(self._cloud, kill=False)
        _end(self._broker, kill=True)

    @property
    def _command(self) -> list[str]:
        return [sys.executable, "-m", "cloud", "--config", str(self.folder / "cloud.toml")]

    def _write_settings(self, cards: Sequence[Path], trusted_key: Path | None) -> None:
        folder, names = self.folder, (("ca", "ca.pem"), ("cert", "cloud.pem"), ("key", "cloud.key"))
        tls = {name: str(folder / file) for name, file in names}
        public_url = f"https://{GUEST_HOST}:{self.api_port}"
        fleet: dict[str, Any] = {"state_dir": str(folder / "fleet"), "public_url": public_url}
        if trusted_key is not None:
            fleet |= {"trusted_key": str(trusted_key), "broker_host": GUEST_HOST, "broker_port": self.port}
        tables = {
            "models": [str(card) for card in cards],
            "broker": {"port": self.port, "tls": tls},
            "api": {
                "port": self.api_port,
                "cert": tls["cert"],
                "key": tls["key"],
                "names": [GUEST_HOST],
                "require_token": False,
            },
            "store": {"url": f"sqlite+aiosqlite:///{folder}/cloud.db"},
            "fleet": fleet,
        }
        (folder / "cloud.toml").write_text(format_toml(tables))

    def _certify(self, service: str) -> None:
        hosts = ("--host", "127.0.0.1", "--host", GUEST_HOST)
        command = [*self._command, "certify", service, *hosts, "--out", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EmulationError(f"no certificate for the {service}: {done.stderr.strip()}")

    def _ask(self, path: str, body: bytes | dict[str, Any] | None = None) -> bytes | None:
        """What the cloud's API answers; None when it does not, or refuses."""
        given, kind = (body, "octet-stream") if isinstance(body, bytes) else (json.dumps(body).encode(), "json")
        request = urllib.request.Request(  # our own address
            f"https://127.0.0.1:{self.api_port}{path}",
            None if body is None else given,
            {"Content-Type": f"application/{kind}"},
        )
        trust = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        try:
            with urllib.request.urlopen(request, timeout=5, context=trust) as answer:  # noqa: S310  # likewise
                return bytes(answer.read())
        except OSError:
            return None

    def _spawn(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(command, stdout=output, stderr=output)


@contextmanager
def open_stand(
    folder: Path, device: str, cards: Sequence[Path], trusted_key: Path | None = None
) -> Iterator[Stand]:
    """Stand for one device, whose server halves are described at `cards`, until the context ends; see `Stand`."""
    folder.mkdir(parents=True, exist_ok=True)
    stand = Stand(folder, device, cards, trusted_key)
    try:
        stand.start_broker()
        stand.listener = Listener(folder, stand.port)
        stand.start_cloud()
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
