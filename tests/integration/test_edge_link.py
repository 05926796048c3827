"""The link: old brokers, bad networks, mutual TLS, enrolment, renewal and revocation, against real brokers."""

from __future__ import annotations

import getpass
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from edge.agent import run_agent
from edge.check import check_device
from edge.cli import main
from edge.config import BrokerConfig, CaptureConfig, EdgeConfig, LinkConfig, SpoolConfig, TlsConfig
from edge.enrolment import enroll, finish_renewal, renew
from edge.errors import FetchError
from edge.link import Connected, Link
from edge.settings import load_settings
from edge.system.enrol import enrol_device
from edge.system.site import AGENT_ID, EnrolmentConfig, SiteConfig, apply_site, read_site
from firmware_sim.broker import Broker, Mosquitto, find_mosquitto, free_port
from firmware_sim.proxy import FaultProxy, Toxics
from splitward.errors import ConfigError
from splitward.wire.control import Status
from tests.integration.cloud_double import (
    LINK,
    TIMEOUT_S,
    assert_each_once,
    cloud_at,
    configure,
    running,
)
from tests.integration.cloud_https import Authority, HttpsCloud, https_cloud, pem, private_pem


@pytest.fixture
def web(tmp_path: Path) -> Iterator[HttpsCloud]:
    folder = tmp_path / "web"
    folder.mkdir()
    with https_cloud(folder) as cloud:
        yield cloud


@contextmanager
def connected(config: EdgeConfig) -> Iterator[queue.SimpleQueue[Any]]:
    """Events of a link."""
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    link = Link(config, events.put)
    link.start()
    try:
        yield events
    finally:
        link.stop(Status("offline"))


@contextmanager
def old_broker(folder: Path) -> Iterator[int]:
    """rumqttd with a listener of MQTT 3.1.1 only; its port."""
    iotcore = pytest.importorskip("iotcore", reason="iotcore is not installed: pip install 'splitward[broker]'")
    port = free_port()
    (folder / "old.toml").write_text(
        f"""
        id = 0
        [router]
        id = 0
        max_connections = 100
        max_outgoing_packet_count = 200
        max_segment_size = 1048576
        max_segment_count = 10
        [v4.1]
        name = "v4"
        listen = "127.0.0.1:{port}"
        next_connection_delay_ms = 1
        [v4.1.connections]
        connection_timeout_ms = 5000
        max_payload_size = 1048576
        max_inflight_count = 100
        """
    )
    broker = iotcore.Broker(config_path=str(folder / "old.toml"))
    broker.start(10.0)
    try:
        yield port
    finally:
        broker.stop()


def test_a_frame_for_an_idle_link_wakes_it(
    tmp_path: Path, mosquitto: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.link.LOOP_S", 10 * TIMEOUT_S)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    link = Link(EdgeConfig(broker=BrokerConfig(port=mosquitto.port)), events.put)
    link.start()
    try:
        assert isinstance(events.get(timeout=TIMEOUT_S), Connected)
        for _ in range(3):
            mid = link.publish(b"a frame")
            assert events.get(timeout=TIMEOUT_S).mid == mid
    finally:
        link.stop(Status("offline"))


def test_a_broker_of_mqtt_3_1_1_is_spoken_to_in_its_own_version(tmp_path: Path) -> None:
    with old_broker(tmp_path) as port:
        link = LinkConfig(reconnect_s=0.05, reconnect_max_s=0.2)
        config = EdgeConfig(broker=BrokerConfig(port=port), link=link)
        with connected(config) as events:
            assert isinstance(events.get(timeout=TIMEOUT_S), Connected)
        stubborn = EdgeConfig(broker=BrokerConfig(port=port, protocol="5"), link=link)
        with connected(stubborn) as events, pytest.raises(queue.Empty):
            events.get(timeout=2.0)


def test_frames_are_answered_over_mqtt_3_1_1(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 50, capture=CaptureConfig(rate_hz=100))
    config = msgspec.structs.replace(config, broker=msgspec.structs.replace(config.broker, protocol="3.1.1"))
    with cloud_at(mosquitto) as cloud, running(config, until_answered=True) as reports:
        cloud.wait(lambda: len(cloud.answers) > 10)
        mosquitto.stop()
        mosquitto.start()
    assert reports[0].results == 50
    assert_each_once(tmp_path, 50)


@pytest.mark.parametrize(
    "toxics",
    [
        Toxics(latency_ms=80, jitter_ms=80),
        Toxics(loss=0.2),
        Toxics(bytes_per_s=20_000),
        Toxics(half_open=True),
        Toxics(closed=True),
    ],
    ids=["latency", "loss", "bandwidth", "half-open", "closed"],
)
def test_a_bad_network_loses_and_doubles_nothing(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, toxics: Toxics
) -> None:
    with FaultProxy(mosquitto.port) as proxy:
        config = configure(tmp_path, mosquitto, tiny_bundle, 60, capture=CaptureConfig(rate_hz=60))
        config = msgspec.structs.replace(config, broker=BrokerConfig(port=proxy.port, keepalive_s=1))
        with cloud_at(mosquitto) as cloud, running(config, until_answered=True) as reports:
            cloud.wait(lambda: len(cloud.answers) > 5)
            proxy.toxics = toxics
            if toxics.closed:
                proxy.cut()
            if toxics.closed or toxics.half_open:
                cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")  # the broker's keep alive
            else:
                cloud.wait(lambda: len(cloud.answers) > 30)
            proxy.toxics = Toxics()
            proxy.cut()
    assert reports[0].results == 60
    assert_each_once(tmp_path, 60)
    assert len(cloud.answers) == 60


def test_the_pause_between_attempts_grows_and_has_a_limit(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(TIMEOUT_S)
        config = EdgeConfig(
            broker=BrokerConfig(port=door.getsockname()[1], protocol="5"),
            link=LinkConfig(reconnect_s=0.05, reconnect_max_s=0.8),
        )
        with connected(config):
            times = []
            for _ in range(9):
                visitor, _ = door.accept()
                times.append(time.monotonic())
                visitor.close()
    gaps = [late - early for early, late in itertools.pairwise(times)]
    # A busy machine makes some gaps longer, and none shorter. Half of a pause is random: the last are 0.4 s at least.
    assert min(gaps[:3]) < 0.39 < min(gaps[-3:])
    assert min(gaps[-2:]) < 1.6  # without a limit the one before the last would be 1.6 s at least


class SecureMosquitto(Mosquitto):
    """mosquitto as in production: certificates both ways, and the common name is the user name."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        program = find_mosquitto()
        if program is None:
            pytest.skip("mosquitto is not installed: apt install mosquitto")
        super().__init__(program, free_port(), folder)
        self._crl = authority.revoke()
        (folder / "acl").write_text(
            "pattern write splitward/v1/+/%u/activation\npattern write splitward/v1/+/%u/status\n"
            "pattern write splitward/v1/+/%u/outcome\npattern read splitward/v1/+/%u/result\n"
            "pattern read splitward/v1/+/%u/command\npattern read splitward/v1/+/%u/bundle\n"
            "user cloud\ntopic readwrite splitward/v1/#\n"
        )
        (folder / "mosquitto.conf").write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous false\npersistence false\nuser {getpass.getuser()}\n"
            f"cafile {authority.path}\ncertfile {authority.folder}/server.pem\n"
            f"keyfile {authority.folder}/server.key\nrequire_certificate true\nuse_identity_as_username true\n"
            f"crlfile {self._crl}\nacl_file {folder}/acl\nset_tcp_nodelay true\nlog_dest stderr\n"
        )


@pytest.fixture
def secure(tmp_path: Path, web: HttpsCloud) -> Iterator[SecureMosquitto]:
    folder = tmp_path / "broker"
    folder.mkdir()
    broker = SecureMosquitto(folder, web.authority)
    broker.start()
    yield broker
    broker.stop()


def enrolled(
    tmp_path: Path, web: HttpsCloud, secure: Broker, tiny: Any, device: str = "device-1"
) -> EdgeConfig:
    """Configuration of a device that has enrolled, with the test's capture and state on top."""
    out = tmp_path / "etc"
    token = tmp_path / "token"
    token.write_text("good\n")
    code = main(
        [
            *("enroll", "--url", web.url, "--token-file", str(token), "--site", "demo", "--device", device),
            *("--ca", str(web.authority.path), "--out", str(out)),
        ]
    )
    assert code == 0
    made = load_settings(out / "edge.toml", {})
    base = configure(tmp_path, secure, tiny, 20)
    return msgspec.structs.replace(
        made,
        device=msgspec.structs.replace(base.device, id=device, order_key=made.device.order_key),
        capture=base.capture,
        broker=msgspec.structs.replace(made.broker, port=secure.port),
        link=LINK,
    )


def cloud_client(web: HttpsCloud, folder: Path) -> TlsConfig:
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "cloud.pem").write_bytes(pem(web.authority.issue(key.public_key(), "cloud")))
    (folder / "cloud.key").write_bytes(private_pem(key))
    return TlsConfig(ca=str(web.authority.path), cert=str(folder / "cloud.pem"), key=str(folder / "cloud.key"))


def test_an_enrolled_device_delivers_over_mutual_tls_until_it_is_revoked(
    tmp_path: Path, web: HttpsCloud, secure: SecureMosquitto, tiny_bundle: Any
) -> None:
    config = enrolled(tmp_path, web, secure, tiny_bundle)
    key = tmp_path / "etc" / "device.key"
    assert key.stat().st_mode & 0o777 == 0o600
    findings = {one.name: one for one in check_device(config)}
    assert {name: one.state for name, one in findings.items() if name in ("certificate", "tls", "broker")} == {
        "certificate": "ok",
        "tls": "ok",
        "broker": "ok",
    }, findings
    with cloud_at(secure, cloud_client(web, tmp_path)) as cloud:
        assert run_agent(config, until_answered=True).results == 20
        cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")
        assert cloud.statuses["device-1"][-2].certificate_expires_at_ns
    web.authority.revoke(x509.load_pem_x509_certificate((tmp_path / "etc" / "device.pem").read_bytes()))
    secure.stop()
    secure.start()
    with connected(config) as events, pytest.raises(queue.Empty):
        events.get(timeout=2.0)
    broker = {one.name: one.state for one in check_device(config)}
    assert "fail" in (broker.get("tls"), broker.get("broker"))


def test_only_the_links_own_thread_uses_the_socket(
    tmp_path: Path, web: HttpsCloud, secure: SecureMosquitto, tiny_bundle: Any, monkeypatch: Any, caplog: Any
) -> None:
    """Two threads in one TLS connection break it: now and then on a fast machine, with every frame on a slow one."""
    users = set()
    for name in ("_sock_send", "_sock_recv"):
        real = getattr(paho.mqtt.client.Client, name)

        def use(client: Any, data: Any, real: Any = real) -> Any:
            if client._client_id.endswith(b".device-1"):
                users.add(threading.current_thread().name)
            return real(client, data)

        monkeypatch.setattr(paho.mqtt.client.Client, name, use)
    config = enrolled(tmp_path, web, secure, tiny_bundle)
    with cloud_at(secure, cloud_client(web, tmp_path)):
        assert run_agent(config, until_answered=True).results == 20
    assert users == {"link"}
    assert not [one for one in caplog.records if one.name == "edge.link" and one.levelname == "WARNING"]


def test_a_device_may_not_speak_for_another(
    tmp_path: Path, web: HttpsCloud, secure: SecureMosquitto, tiny_bundle: Any
) -> None:
    config = enrolled(tmp_path, web, secure, tiny_bundle)
    other = msgspec.structs.replace(
        config, device=msgspec.structs.replace(config.device, id="device-2", results_file=None)
    )
    with cloud_at(secure, cloud_client(web, tmp_path)) as cloud, connected(other) as events:
        assert isinstance(events.get(timeout=TIMEOUT_S), Connected)
        Link(other, events.put)
        run_agent(config, until_answered=True)
        assert set(cloud.statuses) == {"device-1"}


def test_an_image_enrols_at_its_first_start_and_the_agent_delivers(
    tmp_path: Path, web: HttpsCloud, secure: SecureMosquitto, tiny_bundle: Any
) -> None:
    """As on the card: no edge.toml before the device has enrolled, and the same one at every start after."""
    root, site_toml = tmp_path / "root", tmp_path / "site.toml"
    base = configure(tmp_path, secure, tiny_bundle, 20)
    site_toml.write_text(
        f'[enrolment]\nurl = "{web.url}"\ntoken = "{{}}"\ndevice = "device-1"\nca = "{web.authority.path}"\n'
        f'[agent.device]\nbundle = "{tiny_bundle.path}"\ntrusted_key = "{tiny_bundle.trusted_key}"\n'
        f'state_dir = "{tmp_path / "state"}"\nresults_file = "{tmp_path / "results.jsonl"}"\n'
        f'[agent.capture]\npath = "{base.capture.path}"\n[agent.broker]\nport = {secure.port}\n'
    )
    text = site_toml.read_text()
    site_toml.write_text(text.replace("{}", "spent"))
    apply_site(read_site(site_toml), root)
    settings = root / "etc/splitward/edge.toml"
    with pytest.raises(FetchError, match="403"):
        enrol_device(read_site(site_toml), root)
    assert not settings.exists(), "the agent would begin without a certificate"
    site_toml.write_text(text.replace("{}", "good"))
    assert enrol_device(read_site(site_toml), root)
    assert not enrol_device(read_site(site_toml), root), "the token is spent"
    first = settings.read_text()
    settings.unlink()  # the root forgets
    apply_site(read_site(site_toml), root)
    assert settings.read_text() == first
    config = load_settings(settings, {})
    assert config.broker.tls is not None
    assert config.device.order_key is not None
    assert config.cloud.url == web.url
    with cloud_at(secure, cloud_client(web, tmp_path)):
        assert run_agent(config, until_answered=True).results == 20


def test_a_power_cut_after_the_token_is_spent_leaves_the_agent_its_key(
    tmp_path: Path, web: HttpsCloud, monkeypatch: Any
) -> None:
    if os.geteuid():
        pytest.skip("only root writes into other users' folders: run as root")
    root = tmp_path / "root"
    (root / "var/lib/splitward").mkdir(parents=True)
    os.chown(root / "var/lib/splitward", AGENT_ID, AGENT_ID)
    enrolment = EnrolmentConfig(url=web.url, token="good", device="device-1", ca=str(web.authority.path))

    def cut(*_: object) -> bool:
        raise OSError("the power is cut")

    with monkeypatch.context() as patched:
        patched.setattr("edge.system.enrol.write_agent_settings", cut)
        with pytest.raises(OSError, match="cut"):
            enrol_device(SiteConfig(enrolment=enrolment), root)
    identity = root / "var/lib/splitward/identity"
    assert (identity / "edge.toml").exists()
    assert {path.stat().st_uid for path in (identity, *identity.iterdir())} == {AGENT_ID}
    os.chown(identity / "device.key", 0, 0)  # as an image before this one left it
    assert not enrol_device(SiteConfig(enrolment=enrolment), root)
    assert (identity / "device.key").stat().st_uid == AGENT_ID


def test_root_enrols_into_no_folder_in_which_the_agent_could_not_read(
    tmp_path: Path, web: HttpsCloud, monkeypatch: Any
) -> None:
    if os.geteuid():
        pytest.skip("only root writes into other users' folders: run as root")
    for name in ("state", "old"):
        (tmp_path / name).mkdir()
    os.chown(tmp_path / "state", AGENT_ID, AGENT_ID)
    monkeypatch.setattr("edge.enrolment.STATE", tmp_path / "state")
    with pytest.raises(ConfigError, match="chown"):
        enroll(web.url, "good", "site", "a", tmp_path / "old", web.authority.path)
    enroll(web.url, "good", "site", "a", tmp_path / "new", web.authority.path)
    made = [tmp_path / "new", *(tmp_path / "new").iterdir()]
    assert {path.stat().st_uid for path in made} == {AGENT_ID}


def test_enrolment_says_why_it_is_refused(tmp_path: Path, web: HttpsCloud, capsys: Any) -> None:
    for token, device, reason in (("bad", "a", "http_403"), ("good", "b", ""), ("good", "c", "http_403")):
        out = tmp_path / device
        if reason:
            with pytest.raises(FetchError, match="403") as caught:
                enroll(web.url, token, "site", device, out, web.authority.path)
            assert caught.value.reason == reason
            assert not (out / "edge.toml").exists()
        else:
            assert "is enrolled" in enroll(web.url, token, "site", device, out, web.authority.path)
    web.tokens.add("second")
    with pytest.raises(FetchError) as caught:
        enroll(web.url, "second", "site", "b", tmp_path / "again", web.authority.path)
    assert caught.value.reason == "http_409"
    with pytest.raises(ConfigError, match="match"):
        enroll(web.url, "second", "site", "no/slash", tmp_path / "d", web.authority.path)
    with pytest.raises(FetchError) as caught:  # an authority that is not the server's
        enroll(web.url, "second", "site", "e", tmp_path / "e", None)
    assert caught.value.reason == "unreachable"
    assert (
        main(
            [
                *("enroll", "--url", "http://127.0.0.1", "--token", "t", "--site", "s", "--device", "d"),
                *("--out", str(tmp_path / "f")),
            ]
        )
        == 2
    )
    assert "HTTPS" in capsys.readouterr().err


def test_a_certificate_is_renewed_when_it_is_time(
    tmp_path: Path, web: HttpsCloud, secure: SecureMosquitto, tiny_bundle: Any
) -> None:
    config = enrolled(tmp_path, web, secure, tiny_bundle)
    certificate = tmp_path / "etc" / "device.pem"
    old = certificate.read_bytes()
    assert "is renewed from" in renew(config)
    assert certificate.read_bytes() == old
    due = msgspec.structs.replace(config, cloud=msgspec.structs.replace(config.cloud, renew_at=0.01))
    done = subprocess.run(
        [sys.executable, "-m", "edge.enrolment"],
        input=msgspec.json.encode(due),
        capture_output=True,
        check=True,
    )
    assert b"is renewed" in done.stdout
    assert certificate.read_bytes() != old
    with cloud_at(secure, cloud_client(web, tmp_path)):
        assert run_agent(config, until_answered=True).results == 20
    web.revoked.add(x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number)
    with pytest.raises(FetchError, match="revoked") as caught:
        renew(config, force=True)
    assert caught.value.reason == "http_403"


def test_the_agent_renews_by_itself_and_takes_the_new_certificate(
    tmp_path: Path, web: HttpsCloud, secure: SecureMosquitto, tiny_bundle: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("edge.upkeep.FIRST_S", 0.5)
    config = enrolled(tmp_path, web, secure, tiny_bundle)
    config = msgspec.structs.replace(config, cloud=msgspec.structs.replace(config.cloud, renew_at=0.01))
    with cloud_at(secure, cloud_client(web, tmp_path)) as cloud, running(config):

        def renewed() -> bool:
            ends = {one.certificate_expires_at_ns for one in cloud.statuses.get("device-1", [])} - {None}
            return len(ends) == 2

        cloud.wait(renewed)


def test_a_power_cut_during_renewal_leaves_a_matching_pair(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    for stage in range(4):
        folder = tmp_path / str(stage)
        folder.mkdir()
        old, new = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        key, certificate = folder / "device.key", folder / "device.pem"
        key.write_bytes(private_pem(new if stage == 3 else old))
        certificate.write_bytes(pem(authority.issue(old.public_key(), "d")))
        if stage in (1, 2):
            (folder / "device.key.new").write_bytes(private_pem(new))
        if stage in (2, 3):
            (folder / "device.pem.new").write_bytes(pem(authority.issue(new.public_key(), "d")))
        finish_renewal(certificate, key)
        expected = new if stage in (2, 3) else old
        assert key.read_bytes() == private_pem(expected)
        assert x509.load_pem_x509_certificate(certificate.read_bytes()).public_key() == expected.public_key()
        assert not list(folder.glob("*.new"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("order", ["oldest", "newest"])
def test_an_hour_without_a_broker_costs_no_memory_and_no_frame(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, order: Any
) -> None:
    """An hour at 10 frames a second, as fast as the disk takes them; then all arrive in the order that was set."""
    frames = 36_000
    mosquitto.stop()
    config = configure(
        *(tmp_path, mosquitto, tiny_bundle, frames),
        capture=CaptureConfig(max_unanswered=frames),
        spool=SpoolConfig(order=order, synchronous="normal"),
        link=msgspec.structs.replace(LINK, window=64, status_s=1.0),
    )
    from edge.health import memory_of
    from firmware_sim.processes import children_of
    from tests.integration.cloud_double import start_process

    process = start_process(config, tmp_path, "--until-answered")
    try:
        spool = tmp_path / "state" / "spool.sqlite"
        deadline_s = time.monotonic() + 4 * TIMEOUT_S
        while not spool.exists() or spool.stat().st_size < 200_000:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        early = [memory_of(pid)["Pss"] for pid in (process.pid, *children_of(process.pid))]
        size = 0
        while spool.stat().st_size != size or size < frames * 150:
            size = spool.stat().st_size
            assert time.monotonic() < deadline_s
            time.sleep(1.0)
        late = [memory_of(pid)["Pss"] for pid in (process.pid, *children_of(process.pid))]
        mosquitto.start()
        with cloud_at(mosquitto) as cloud:
            output, _ = process.communicate(timeout=8 * TIMEOUT_S)
    finally:
        process.kill()
        process.communicate()
    assert json.loads(output)["results"] == frames
    assert json.loads(output)["dropped"] == {}
    assert len(cloud.answers) == frames
    assert late[0] - early[0] < 10, (early, late)
    sequences = [sequence for _, _, sequence in cloud.received]
    first = sequences[: frames // 2]
    assert (sum(first) / len(first) < frames / 2) == (order == "oldest")


def test_memory_mode_spares_the_disk_while_results_come(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, monkeypatch: Any
) -> None:
    commits, spared = [], {}
    from edge.spool import Spool

    real = Spool.commit
    monkeypatch.setattr(Spool, "commit", lambda spool: (commits.append(spool.rows), real(spool))[1])
    for mode in ("memory", "disk"):
        folder = tmp_path / mode
        folder.mkdir()
        commits.clear()
        config = configure(
            *(folder, mosquitto, tiny_bundle, 100),
            capture=CaptureConfig(rate_hz=100),
            spool=SpoolConfig(mode=mode, settle_s=2.0),  # type: ignore[arg-type]  # one of its two
        )
        with cloud_at(mosquitto):
            report = run_agent(config, until_answered=True)
        assert report.results == 100
        assert_each_once(folder, 100)
        spared[mode] = len(commits)
    assert 3 * spared["memory"] < spared["disk"]
