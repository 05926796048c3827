"""A broker for the demo and for tests: mosquitto where it is installed, else one embedded in a child process.

Both listen on the loopback only and forget everything when they stop. They admit everybody, unless mosquitto is given
certificates: then it asks everyone for one, and a device reaches its own topics alone, as deploy/mosquitto has it.
"""

from __future__ import annotations

import getpass
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from splitward.errors import SplitwardError

HOST = "127.0.0.1"
START_S = 10.0
Kind = Literal["mosquitto", "embedded"]
log = logging.getLogger(__name__)

_OPEN = """\
listener {port} {host}
allow_anonymous true
"""
_SECURED = """\
listener {port} {host}
cafile {folder}/ca.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file {folder}/broker.acl
"""
_LIMITS = """\
persistence false
set_tcp_nodelay true
max_queued_messages 0
max_inflight_messages 1000
log_dest stderr
log_type error
log_type warning
user {user}
"""
_ACCESS = """\
user cloud
topic readwrite splitward/#
user service:cloud
topic readwrite splitward/#
pattern write splitward/v1/+/%u/activation
pattern write splitward/v1/+/%u/status
pattern write splitward/v1/+/%u/outcome
pattern write splitward/v1/+/%u/train
pattern read splitward/v1/+/%u/result
pattern read splitward/v1/+/%u/command
pattern read splitward/v1/+/%u/bundle
pattern read splitward/v1/+/%u/step
"""
_EMBEDDED = """\
id = 0
[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "v5"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 1048576
max_inflight_count = 100
dynamic_filters = true
"""


class BrokerError(SplitwardError):
    """No broker can be started."""


class Broker(Protocol):
    """One broker on the loopback; `start` and `stop` may alternate, the port stays."""

    kind: Kind
    host: str
    port: int

    def start(self) -> None:
        """Start it and wait until it listens; `BrokerError` when it does not."""
        ...

    def stop(self) -> None:
        """End it; what it held is gone."""
        ...


class Mosquitto:
    """mosquitto as a child process; its settings and log lie in `folder`, its certificates in `certificates`."""

    kind: Kind = "mosquitto"
    host = HOST

    def __init__(self, program: str, port: int, folder: Path, certificates: Path | None = None) -> None:
        self.port = port
        self._log = folder / "mosquitto.log"
        self._command = [program, "-c", str(folder / "mosquitto.conf")]
        settings = (
            (_OPEN + _LIMITS).format(host=HOST, port=port, user=getpass.getuser())
            if certificates is None
            else secured_settings(port, certificates)
        )
        (folder / "mosquitto.conf").write_text(settings)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens; `BrokerError` when it does not."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=output)
        deadline_s = time.monotonic() + START_S
        while not _listens(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.stop()
                said = self._log.read_text(errors="replace")[-500:]
                raise BrokerError(
                    f"mosquitto does not listen at {HOST}:{self.port}: {said!r}. Is the port taken?"
                )
            time.sleep(0.02)

    def stop(self) -> None:
        """Kill it, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Embedded:
    """iotcore's broker (rumqttd) as a child process."""

    kind: Kind = "embedded"
    host = HOST

    def __init__(self, port: int, folder: Path) -> None:
        try:
            from iotcore import Broker as IotcoreBroker
        except ImportError as error:
            raise BrokerError(f"iotcore: {error}. Install mosquitto, or `splitward[broker]`.") from error
        self.port = port
        settings = folder / "rumqttd.toml"
        settings.write_text(_EMBEDDED.format(host=HOST, port=port))
        self._broker = IotcoreBroker(config_path=str(settings))

    def start(self) -> None:
        """Start it and wait until it listens; `BrokerError` when it does not."""
        try:
            self._broker.start(START_S)
        except (OSError, RuntimeError) as error:
            raise BrokerError(f"the embedded broker does not listen at {HOST}:{self.port}: {error}.") from error
        log.warning("the embedded broker is neither durable nor secure: for demonstration on this machine only")

    def stop(self) -> None:
        """End it; what it held is gone."""
        self._broker.stop()


@contextmanager
def start_broker(
    port: int | None = None, prefer: Kind = "mosquitto", certificates: Path | None = None
) -> Iterator[Broker]:
    """Broker that runs until the context ends.

    Parameters
    ----------
    port : int, optional
        A free one by default.
    prefer : "mosquitto" or "embedded"
        mosquitto, where it is not installed, gives way to the embedded broker.
    certificates : Path, optional
        Folder with `ca.pem`, `broker.pem` and `broker.key`: mosquitto with mutual TLS. The user "cloud" reaches every
        topic, and any other is a device.

    Raises
    ------
    BrokerError
        Neither is installed, or it does not listen; or the embedded one is asked for mutual TLS.
    """
    with tempfile.TemporaryDirectory(prefix="splitward-broker-") as name:
        folder, port = Path(name), port or free_port()
        program = find_mosquitto() if prefer == "mosquitto" else None
        if program is None and certificates is not None:
            raise BrokerError("the embedded broker speaks no mutual TLS. Install mosquitto.")
        broker: Broker = (
            Embedded(port, folder) if program is None else Mosquitto(program, port, folder, certificates)
        )
        broker.start()
        try:
            yield broker
        finally:
            broker.stop()


def secured_settings(port: int, certificates: Path) -> str:
    """mosquitto's settings for mutual TLS; who may do what is written to `broker.acl` in `certificates`."""
    access = certificates / "broker.acl"
    access.write_text(_ACCESS)
    access.chmod(0o600)
    return (_SECURED + _LIMITS).format(host=HOST, port=port, folder=certificates, user=getpass.getuser())


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def find_mosquitto() -> str | None:
    """Path of mosquitto, which Debian keeps where only root's PATH looks; None when it is not installed."""
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
