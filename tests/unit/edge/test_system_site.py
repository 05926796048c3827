"""site.toml: refused when wrong, and what files it becomes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import tomllib

from edge.config import EdgeConfig
from edge.system.site import SiteConfig, agent_settings, apply_site, read_site, take_imports
from splitward.config import read_config
from splitward.errors import ConfigError

WHOLE = """\
hostname = "ward-3"
ssh_keys = ["ssh-ed25519 AAAA someone"]
[network]
address = "192.0.2.7/24"
gateway = "192.0.2.1"
dns = ["192.0.2.53"]
ntp = ["time.example.org"]
[network.wifi]
name = "Ward 3"
passphrase = "correct horse"
country = "DE"
[update]
url = "https://images.example.org/ward"
[agent.device]
id = "ward-3"
[agent.broker]
host = "broker.example.org"
[agent.broker.tls]
ca = "/ca.pem"
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_whole_site_becomes_files(tmp_path: Path) -> None:
    site = read_site(write(tmp_path / "site.toml", WHOLE))
    apply_site(site, tmp_path / "root")
    read = lambda name: (tmp_path / "root" / name).read_text()  # noqa: E731  # three words, used at once
    assert read("etc/hostname") == "ward-3\n"
    assert read("run/splitward/authorized_keys") == "ssh-ed25519 AAAA someone\n"
    assert "Address=192.0.2.7/24\nGateway=192.0.2.1\nDNS=192.0.2.53\nNTP=time.example.org" in read(
        "etc/systemd/network/70-site.network"
    )
    assert "DHCP=no" in read("etc/systemd/network/70-site.network")
    assert 'psk="correct horse"' in read("etc/wpa_supplicant/wpa_supplicant-wlan0.conf")
    assert (tmp_path / "root/etc/wpa_supplicant/wpa_supplicant-wlan0.conf").stat().st_mode & 0o777 == 0o600
    assert tomllib.loads(read("etc/splitward/update.toml")) == {
        "url": "https://images.example.org/ward",
        "every_s": 3600.0,
        "allow_older": False,
    }
    agent = read_config(tmp_path / "root/etc/splitward/edge.toml", EdgeConfig)
    assert agent.device.id == "ward-3"
    assert agent.device.state_dir == "/var/lib/splitward"
    assert agent.broker.tls is not None


def test_an_empty_site_is_one_that_starts(tmp_path: Path) -> None:
    apply_site(read_site(write(tmp_path / "site.toml", "")), tmp_path)
    assert (tmp_path / "run/splitward/authorized_keys").read_text() == ""
    assert not (tmp_path / "etc/systemd/network/70-site.network").exists()
    assert agent_settings(SiteConfig())["device"]["bundle"] == "/usr/share/splitward/model.bundle"


def test_what_is_written_outlives_a_power_cut(tmp_path: Path, monkeypatch: Any) -> None:
    flush, flushed = os.fsync, []

    def note(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        flush(descriptor)

    monkeypatch.setattr("os.fsync", note)
    apply_site(SiteConfig(), tmp_path)
    folder = tmp_path / "etc/splitward"
    assert flushed.index(folder / "edge.toml.partial") < flushed.index(folder), "the file, then its new name"
    assert [path.name for path in folder.iterdir()] == ["edge.toml"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('host_name = "x"', "Did you mean 'hostname'"),
        ('hostname = "Ward_3"', "hostname"),
        ('[network]\naddress = "here; rm"', "address"),
        ('[network.wifi]\nname = "a"\npassphrase = "short"\ncountry = "DE"', "passphrase"),
        ('ssh_keys = ["a\\nb"]', "ssh_keys"),
        ('[update]\nurl = "http://x"', "url"),
        ("format = 2", "format"),
        ("hostname =", "is not TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_site(write(tmp_path / "site.toml", text))


def test_imports_are_moved_whole(tmp_path: Path) -> None:
    boot, state = tmp_path / "boot", tmp_path / "state"
    (boot / "import/tls").mkdir(parents=True)
    write(boot / "import/frames.npz", "frames")
    write(boot / "import/tls/device.key", "key")
    assert take_imports(boot, state) == ["frames.npz", "tls/device.key"]
    assert (state / "import/tls/device.key").read_text() == "key"
    assert (state / "import/tls/device.key").stat().st_mode & 0o777 == 0o600
    assert not list((boot / "import").rglob("*.*"))
    assert take_imports(boot, state) == []
