"""The shipped broker configuration on a real mosquitto: a device's certificate reaches its own topics alone."""

from __future__ import annotations

import datetime
import getpass
import json
import queue
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cloud import revocations
from cloud.__main__ import main
from cloud.authority import CRL_DAYS, SERVICE, Authority
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
        self.ended = threading.Event()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, f"client-{name}", protocol=paho.MQTTv5)
        self.client.tls_set(
            str(folder / "authority.pem"), str(folder / f"{name}.pem"), str(folder / f"{name}.key")
        )
        self.client.on_message = lambda _c, _d, message: self.messages.put(message.topic)
        self.client.on_subscribe = lambda _c, _d, _m, codes, _p: self.codes.put([code.value for code in codes])
        self.client.on_publish = lambda _c, _d, _m, code, _p: self.published.put(code.value)
        self.client.on_disconnect = lambda *_: self.ended.set()
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


class Hardened:
    """The shipped broker: called with a name, it gives a client with that certificate."""

    def __init__(
        self,
        folder: Path,
        process: subprocess.Popen,
        authority: Authority,
        serials: dict[str, int],
        join: Callable[[str], Member],
    ) -> None:
        self.folder, self.process, self.authority = folder, process, authority
        self.serials, self.join = serials, join

    def __call__(self, name: str) -> Member:
        return self.join(name)

    def admits(self, name: str) -> bool:
        """Whether the broker answers the next attempt of `name`, rather than ending it."""
        member = self.join(name)
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            if member.client.is_connected():
                return True
            if member.ended.is_set():
                return False
            time.sleep(0.02)
        raise TimeoutError(name)

    def revoking(self, *names: str) -> bytes:
        """The authority's list that revokes these devices, newer than the broker's by OpenSSL's clock of seconds."""
        older = x509.load_pem_x509_crl((self.folder / "revoked.crl").read_bytes()).last_update_utc
        while True:
            revoked = self.authority.revocation_list([(self.serials[name], time.time_ns()) for name in names])
            if x509.load_pem_x509_crl(revoked).last_update_utc > older:
                return revoked
            time.sleep(0.02)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s


@pytest.fixture
def hardened(tmp_path: Path, request):
    """Its list revokes pi-3, and is good for as many days as a test's parameter says."""
    program = find_mosquitto()
    if program is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto")
    authority, port, days = Authority(tmp_path / "fleet"), free_port(), getattr(request, "param", CRL_DAYS)
    serve_with(tmp_path, "broker", "127.0.0.1", "broker.example.org")
    serve_with(tmp_path, "cloud")
    serials = {name: certify(authority, tmp_path, name) for name in ("pi-1", "pi-2", "pi-3")}
    (tmp_path / "revoked.crl").write_bytes(authority.revocation_list([(serials["pi-3"], time.time_ns())], days))
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

    yield Hardened(tmp_path, process, authority, serials, join)
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


@pytest.fixture
def service(tmp_path: Path, hardened):
    """The service's address and, in a list, what it gives as the list of revoked certificates."""
    serve_with(tmp_path, "cloud", "127.0.0.1")
    given = [hardened.authority.revocation_list([])]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(given[-1])

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cloud.pem", tmp_path / "cloud.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}/v1/revocations.crl", given
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_first_list_lasts_as_long_as_the_brokers_certificate(tmp_path):
    serve_with(tmp_path, "broker", "127.0.0.1")
    certificate = x509.load_pem_x509_certificate((tmp_path / "broker.pem").read_bytes())
    ends = x509.load_pem_x509_crl((tmp_path / "revoked.crl").read_bytes()).next_update_utc
    assert abs(ends - certificate.not_valid_after_utc) < datetime.timedelta(minutes=1)


@pytest.mark.parametrize("hardened", [-1 / 1440], indirect=True)
def test_a_broker_whose_list_has_ended_admits_again_after_a_refresh(hardened, service, tmp_path):
    url, given = service
    assert not hardened.admits("pi-1")
    given.append(hardened.revoking("pi-3"))
    assert revocations.refresh(url, tmp_path, hardened.process.pid)
    until(lambda: hardened.admits("pi-1"))
    assert not hardened.admits("pi-3")


def test_a_refresh_tells_the_broker_what_is_new_and_nothing_else(hardened, service, tmp_path):
    url, given = service
    path, pid = tmp_path / "revoked.crl", hardened.process.pid
    known = path.read_bytes()
    given.append(hardened.revoking("pi-3"))
    assert not revocations.refresh(url, tmp_path, pid)
    assert hardened.admits("pi-1")
    for wrong in (b"<html>", Authority(tmp_path / "other").revocation_list([])):
        given.append(wrong)
        with pytest.raises(ValueError, match=r"authority|PEM"):
            revocations.refresh(url, tmp_path, pid)
    given.append(hardened.revoking("pi-1", "pi-3"))
    with pytest.raises(ProcessLookupError):
        revocations.refresh(url, tmp_path, 2**22 + 1)  # no process has this number
    assert path.read_bytes() == known
    assert revocations.refresh(url, tmp_path, pid)
    until(lambda: not hardened.admits("pi-1"))
    path.write_bytes(b"half a li")
    assert revocations.refresh(url, tmp_path, pid)
    assert path.read_bytes() == given[-1]


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
