"""What an emulated device meets on this machine: a broker with mutual TLS, the cloud, and one who listens."""

from __future__ import annotations

import ipaddress
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path

import paho.mqtt.client as mqtt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion

from firmware_sim.arm64.user import EmulationError
from firmware_sim.broker import find_mosquitto, free_port
from splitward.errors import WireError
from splitward.image.debian import read_epoch
from splitward.wire import topics
from splitward.wire.control import Result, Status, decode_reply, decode_status

GUEST_HOST = "10.0.2.2"
"""This machine, as QEMU's own network shows it to the device."""
START_S = 300.0
_BROKER = """\
listener {port} 127.0.0.1
cafile {folder}/ca.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder}/broker.acl
persistence false
max_queued_messages 0
log_dest stderr
user root
"""
_ACCESS = """\
user cloud
topic readwrite splitward/#
user observer
topic read splitward/#
pattern write splitward/v1/+/%u/activation
pattern write splitward/v1/+/%u/status
pattern write splitward/v1/+/%u/outcome
pattern read splitward/v1/+/%u/result
pattern read splitward/v1/+/%u/command
pattern read splitward/v1/+/%u/bundle
"""


class Authority:
    """A certificate authority of one test, whose files lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "stand")])
        certificate = self._build(self._name, self._key, []).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self._write("ca.pem", certificate.sign(self._key, hashes.SHA256()).public_bytes(_PEM))

    def issue(self, name: str, addresses: tuple[str, ...] = ()) -> None:
        """Write `name`.pem and `name`.key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        others = [x509.IPAddress(ipaddress.ip_address(one)) for one in addresses]
        certificate = self._build(subject, key, others).sign(self._key, hashes.SHA256())
        self._write(f"{name}.pem", certificate.public_bytes(_PEM))
        plain = serialization.NoEncryption()
        self._write(f"{name}.key", key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, plain))

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, others: list[x509.IPAddress]
    ) -> x509.CertificateBuilder:
        # A board without a clock starts at the time of the image's lock file.
        start = min(datetime.now(timezone.utc), datetime.fromtimestamp(read_epoch(), timezone.utc))
        start -= timedelta(days=2)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(start).not_valid_after(start + timedelta(days=3650))
        return builder.add_extension(x509.SubjectAlternativeName(others), critical=False) if others else builder

    def _write(self, name: str, data: bytes) -> None:
        with os.fdopen(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(data)


_PEM = serialization.Encoding.PEM


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
        authority = Authority(folder)
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
        (self.folder / "broker.acl").write_text(_ACCESS)
        (self.folder / "broker.acl").chmod(0o600)
        settings = self.folder / "broker.conf"
        settings.write_text(_BROKER.format(port=self.port, folder=self.folder))
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
