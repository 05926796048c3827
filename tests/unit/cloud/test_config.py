from __future__ import annotations

import math
import socket
import time
from pathlib import Path

import pytest

from cloud.__main__ import main
from cloud.app import create_app
from cloud.authority import Authority
from cloud.config import (
    ApiConfig,
    BrokerConfig,
    CloudConfig,
    FleetConfig,
    StoreConfig,
    TlsConfig,
    read_cloud_config,
)
from cloud.transport import open_transport
from splitward.errors import ConfigError
from tests.unit.cloud.conftest import FakeTransport


@pytest.fixture
def write(tmp_path):
    def write_text(text: str):
        path = tmp_path / "cloud.toml"
        path.write_text(text)
        return path

    return write_text


@pytest.fixture
def refusal(write, tmp_path, capsys):
    """The one line in which a start with such a section ends, with exit code 2."""

    def start(section: str) -> str:
        text = f"""
            models = []
            {section}
            [store]
            url = "sqlite+aiosqlite:///{tmp_path}/cloud.db"
            [fleet]
            state_dir = "{tmp_path}/fleet"
        """
        assert main(["--config", str(write(text))]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return start


def test_defaults(write):
    config = read_cloud_config(write('models = ["a.server.json"]'))
    assert config == CloudConfig(models=("a.server.json",))
    assert config.broker.client_id


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "cloud.example"])  # noqa: S104  # refused
def test_an_api_beyond_loopback_is_refused(write, host):
    with pytest.raises(ConfigError, match=r"api\.host .* loopback"):
        read_cloud_config(write(f'models = []\n[api]\nhost = "{host}"'))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_is_accepted(write, host):
    assert read_cloud_config(write(f'models = []\n[api]\nhost = "{host}"')).api.host == host


def test_tokens_may_be_done_without_on_loopback_alone(write):
    assert not read_cloud_config(write("models = []\n[api]\nrequire_token = false")).api.require_token
    text = 'models = []\n[api]\nhost = "192.168.1.4"\ncert = "a.pem"\nkey = "a.key"\nrequire_token = false'
    with pytest.raises(
        ConfigError, match=r"require_token = false is for loopback, not for api.host '192.168.1.4'"
    ):
        read_cloud_config(write(text))


def test_half_a_key_pair_is_refused(write):
    with pytest.raises(ConfigError, match="cert and key together"):
        read_cloud_config(write('models = []\n[broker.tls]\nca = "ca.pem"\ncert = "cert.pem"'))


def test_a_certificate_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"broker\.tls"):
        open_transport(BrokerConfig(tls=TlsConfig(str(tmp_path / "missing.pem"))))


def test_a_worker_tells_when_its_certificates_end(tmp_path):
    authority = Authority(tmp_path / "fleet")
    names = [str(tmp_path / name) for name in ("authority.pem", "cloud.pem", "cloud.key")]

    def certify(days: float) -> None:
        pems = (authority.pem.encode(), *authority.issue_service("cloud", (), days))
        for name, pem in zip(names, pems, strict=True):
            Path(name).write_bytes(pem)

    certify(10)
    app = create_app(
        CloudConfig(
            models=(),
            broker=BrokerConfig(tls=TlsConfig(*names)),
            api=ApiConfig(cert=names[1], key=names[2]),
            store=StoreConfig(f"sqlite+aiosqlite:///{tmp_path}/cloud.db"),
            fleet=FleetConfig(state_dir=str(tmp_path / "fleet")),
        )
    )

    def days_left(to: str) -> float:
        name, registry = "splitward_certificate_expires_timestamp_seconds", app.state.service.metrics.registry
        return (registry.get_sample_value(name, {"to": to}) - time.time()) / 86_400

    assert (days_left("api"), days_left("broker")) == pytest.approx((10, 10), abs=0.01)
    certify(20)
    assert (days_left("api"), days_left("broker")) == pytest.approx((10, 20), abs=0.01)
    Path(names[1]).write_text("half a certif")
    assert math.isnan(days_left("broker"))


def test_a_worker_connects_under_an_id_that_no_device_can_guess(tmp_path, monkeypatch):
    opened: list[BrokerConfig] = []
    monkeypatch.setattr("cloud.app.open_transport", opened.append)
    fleet = FleetConfig(state_dir=str(tmp_path / "fleet"))
    store = StoreConfig(f"sqlite+aiosqlite:///{tmp_path}/cloud.db")
    create_app(CloudConfig(models=(), broker=BrokerConfig(client_id="worker"), store=store, fleet=fleet))
    assert [one.client_id for one in opened] == [Authority(tmp_path / "fleet").client_id("worker")]


@pytest.mark.parametrize("text", ["", "models = 3", "models = []\n[batch]\nmax_sise = 3"])
def test_a_wrong_file_is_refused(write, text):
    with pytest.raises(ConfigError):
        read_cloud_config(write(text))


def test_the_command_exits_with_2_and_says_why(write, capsys):
    assert main(["--config", str(write('models = ["missing.server.json"]'))]) == 2
    assert "missing.server.json" in capsys.readouterr().err


@pytest.mark.parametrize("made", [(), ("api.pem",)], ids=["none", "certificate-alone"])
def test_a_start_without_the_apis_tls_files_says_so(refusal, tmp_path, made):
    for name in made:
        (tmp_path / name).write_text("no PEM")
    line = refusal(f'[api]\ncert = "{tmp_path}/api.pem"\nkey = "{tmp_path}/api.key"')
    assert line.startswith(f"api.cert {tmp_path}/api.pem")


@pytest.mark.parametrize("device", ["cuda:99", "graphics", "", "meta"])
def test_a_device_on_which_torch_cannot_compute_is_told_in_one_line(refusal, device):
    line = refusal(f'[engine]\ndevice = "{device}"')
    assert line.startswith(f"engine.device {device!r}: torch cannot compute there: ")
    assert 'Give "cpu"' in line


@pytest.mark.parametrize("host", ["127.0.0.1", *(["::1"] if Path("/proc/net/if_inet6").exists() else [])])
def test_a_start_at_a_taken_port_says_so_and_does_not_reach_the_broker(refusal, monkeypatch, host):
    transport = FakeTransport()
    monkeypatch.setattr("cloud.app.open_transport", lambda _config: transport)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as running:
        port = running.getsockname()[1]
        line = refusal(f'[api]\nhost = "{host}"\nport = {port}')
    assert line.startswith(f"api.host {host}, api.port {port}: ")
    assert not transport.steps
    assert not transport.connected


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        *((["--days", days], f"--days {days}: give") for days in ("-1", "0", "nan", "inf", "1e+12")),
        (["--host", "ä"], "host 'ä': is no name in ASCII"),
    ],
)
def test_a_certificate_that_cannot_be_made_is_told_in_one_line(write, tmp_path, capsys, arguments, fault):
    config = str(write(f'models = []\n[fleet]\nstate_dir = "{tmp_path}/fleet"'))
    out = tmp_path / "made"
    command = ["--config", config, "certify", "broker", "--host", "b.example", "--out", str(out), *arguments]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(fault)
    assert not out.exists()


def test_a_wrong_value_tells_where_every_key_is_described(write):
    with pytest.raises(ConfigError, match=r"cloud/config\.py describes every key"):
        read_cloud_config(write("models = 3"))


def test_beyond_loopback_with_tls_is_accepted(write):
    text = 'models = []\n[api]\nhost = "192.168.1.4"\ncert = "a.pem"\nkey = "a.key"'
    assert read_cloud_config(write(text)).api.cert == "a.pem"


def test_a_workers_client_id_may_be_its_hosts_name(write):
    config = read_cloud_config(write('models = []\n[broker]\nclient_id = "cloud-{host}"'))
    assert config.broker.client_id == f"cloud-{socket.gethostname()}"


def test_the_first_token_is_made_at_the_command_line(write, tmp_path, capsys):
    config = str(write(f'models = []\n[store]\nurl = "sqlite+aiosqlite:///{tmp_path}/cloud.db"'))
    assert main(["--config", config, "token", "ops", "--scope", "operate"]) == 0
    assert capsys.readouterr().out.startswith("swt_")
    assert main(["--config", config, "token", "ops"]) == 2
    assert "already" in capsys.readouterr().err
