"""The shipped broker configuration on a real mosquitto: a device's certificate reaches its own topics alone."""

from __future__ import annotations

import getpass
import json
import queue
import ssl
import subprocess
import time
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloud.__main__ import main
from cloud.authority import SERVICE, Authority
from firmware_sim.broker import find_mosquitto, free_port
from splitward.wire import topics
from splitward.wire.names import NAME

SHIPPED = Path(__file__).resolve().parents[2] / "deploy" / "mosquitto"


def serve_with(folder: Path, service: str, *hosts: str) -> None:
    """Certificate of a service, by the operator's own command."""
    settings = folder / "cloud.toml"
    settings.write_text(f"models = []\n[fleet]\nstate_dir = {json.dumps(str(folder / 'fleet'))}\n")
    names = [word for host in hosts for word in ("--host", host)]
    assert main(["--config", str(settings), "certify", service, *names, "--out", str(folder)]) == 0


def certify(authority: Authority, folder: Path, name: str) -> int:
    """Certificate and key of `name` in `folder`; its serial number."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    certificate = authority.issue(csr, name, 1)
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    write_key(folder / f"{name}.key", key)
    return certificate.serial_number


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pkcs8, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, plain))


class Member:
    """A client with the certificate of `name`."""

    def __init__(self, folder: Path, port: int, name: str) -> None:
        self.messages: queue.Queue[str] = queue.Queue()
        self.codes: queue.Queue[list[int]] = queue.Queue()
        self.published: queue.Queue[int] = queue.Queue()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, f"client-{name}", protocol=paho.MQTTv5)
        self.client.tls_set(
            str(folder / "authority.pem"), str(folder / f"{name}.pem"), str(folder / f"{name}.key")
        )
        self.client.on_message = lambda _c, _d, message: self.messages.put(message.topic)
        self.client.on_subscribe = lambda _c, _d, _m, codes, _p: self.codes.put([code.value for code in codes])
        self.client.on_publish = lambda _c, _d, _m, code, _p: self.published.put(code.value)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def subscribe(self, name: str) -> None:
        self.client.subscribe(name, 1)
        self.codes.get(timeout=10)

    def publish(self, name: str) -> int:
        """The reason code of the broker's acknowledgement."""
        self.client.publish(name, b"x", 1)
        return self.published.get(timeout=10)

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def hardened(tmp_path: Path):
    program = find_mosquitto()
    if program is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    authority, port = Authority(tmp_path / "fleet"), free_port()
    serve_with(tmp_path, "broker", "127.0.0.1", "broker.example.org")
    serve_with(tmp_path, "cloud")
    serials = {name: certify(authority, tmp_path, name) for name in ("pi-1", "pi-2", "pi-3")}
    (tmp_path / "revoked.crl").write_bytes(authority.revocation_list([(serials["pi-3"], time.time_ns())]))
    (tmp_path / "acl").write_text((SHIPPED / "acl").read_text())
    text = (SHIPPED / "mosquitto.conf").read_text().replace("listener 8883", f"listener {port} 127.0.0.1")
    for there in ("/mosquitto/certs", "/mosquitto/config", "/mosquitto/data"):
        text = text.replace(there, str(tmp_path))
    (tmp_path / "mosquitto.conf").write_text(f"{text}\nuser {getpass.getuser()}\n")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([program, "-c", str(tmp_path / "mosquitto.conf")], stdout=log, stderr=log)
    members: list[Member] = []

    def join(name: str) -> Member:
        deadline_s = time.monotonic() + 10
        while True:
            try:
                members.append(Member(tmp_path, port, name))
            except ConnectionRefusedError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline_s
                continue
            return members[-1]

    yield join
    for member in members:
        member.stop()
    process.kill()
    process.wait()


def test_a_device_reaches_its_own_topics_alone(hardened):
    cloud, mine, other = hardened("cloud"), hardened("pi-1"), hardened("pi-2")
    cloud.subscribe(topics.every_activation("cloud"))
    cloud.subscribe(topics.every_status())
    for name in (topics.result("ward", "pi-1"), topics.command("ward", "pi-1"), topics.bundle("ward", "pi-1")):
        mine.subscribe(name)
        other.subscribe(name)
    other.subscribe("splitward/v1/#")
    other.subscribe(topics.result("ward", "pi-2"))

    assert mine.publish(topics.activation("ward", "pi-1")) < 128
    assert cloud.messages.get(timeout=10) == topics.activation("ward", "pi-1")
    for forged in (
        topics.activation("ward", "pi-1"),
        topics.status("ward", "pi-1"),
        topics.train("ward", "pi-1"),
        topics.result("ward", "pi-2"),
    ):
        assert other.publish(forged) == 135  # not authorized
    assert other.publish(topics.train("ward", "pi-2")) < 128
    assert other.publish(topics.status("ward", "pi-2")) < 128
    assert cloud.messages.get(timeout=10) == topics.status("ward", "pi-2")

    for order in (topics.result, topics.command, topics.bundle):
        assert cloud.publish(order("ward", "pi-1")) < 128
        assert mine.messages.get(timeout=10) == order("ward", "pi-1")
    own = topics.result("ward", "pi-2")
    assert cloud.publish(own) < 128
    assert other.messages.get(timeout=10) == own  # and nothing before it
    while not other.messages.empty():
        assert other.messages.get() == own  # its two filters overlap, so it may come twice


def test_a_revoked_certificate_and_none_at_all_are_refused(hardened, tmp_path):
    hardened("pi-1")
    revoked = hardened("pi-3")
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s and not revoked.client.is_connected():
        time.sleep(0.05)
    assert not revoked.client.is_connected()
    bare = paho.Client(paho.CallbackAPIVersion.VERSION2, "bare", protocol=paho.MQTTv5)
    bare.tls_set(str(tmp_path / "authority.pem"), tls_version=ssl.PROTOCOL_TLS_CLIENT)
    port = revoked.client.port
    try:
        bare.connect("127.0.0.1", port)
        bare.loop_start()
        deadline_s = time.monotonic() + 2
        while time.monotonic() < deadline_s:
            assert not bare.is_connected()
            time.sleep(0.05)
    except OSError:
        pass  # refused at once, in the handshake
    finally:
        bare.loop_stop()


def test_no_device_can_bear_a_services_name(hardened, tmp_path):
    certificate = x509.load_pem_x509_certificate((tmp_path / "cloud.pem").read_bytes())
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == f"{SERVICE}cloud"
    assert f"user {name.value}\n" in (SHIPPED / "acl").read_text()
    assert not NAME.fullmatch(str(name.value))


def test_a_broker_is_certified_only_with_the_name_it_is_reached_by(tmp_path, capsys):
    settings = tmp_path / "cloud.toml"
    settings.write_text(f"models = []\n[fleet]\nstate_dir = {json.dumps(str(tmp_path / 'fleet'))}\n")
    assert main(["--config", str(settings), "certify", "broker", "--out", str(tmp_path)]) == 2
    assert "--host" in capsys.readouterr().err
    assert not (tmp_path / "broker.key").exists()
