"""site.toml: refused when wrong, and what files it becomes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomllib

from edge.config import EdgeConfig
from edge.system.site import SiteConfig, agent_settings, apply_site, read_site, take_imports, take_site
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
        (
            '[agent.device]\nidd = "x"',
            r"site.toml, \[agent\]: unknown key 'device.idd'. Did you mean 'device.id'",
        ),
        ('[agent]\ndevice = "cam"', r"device"),
        ('[[agent.device]]\nid = "x"', r"device"),
        ("[agent.device]\nid = 2026-01-01", r"device.id"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_site(write(tmp_path / "site.toml", text))


def start(folder: Path, text: str) -> tuple[str, str, str]:
    """SSH keys, edge.toml and site-error.txt after a start with this site.toml; a root forgets."""
    (folder / "boot").mkdir(exist_ok=True)
    shutil.rmtree(folder / "root", ignore_errors=True)
    write(folder / "boot/site.toml", text)
    take_site(folder / "boot", folder / "kept.toml", folder / "root")
    names = ("root/run/splitward/authorized_keys", "root/etc/splitward/edge.toml", "boot/site-error.txt")
    keys, agent, said = [(folder / name).read_text() if (folder / name).exists() else "" for name in names]
    return keys, agent, said


@pytest.mark.parametrize("mistake", ['[agent]\ndevice = "cam"\n', "[agent.device]\nidd = 1\n", "hostname =\n"])
def test_a_mistake_leaves_the_last_good_one_in_force(tmp_path: Path, mistake: str) -> None:
    keys, agent, said = start(tmp_path, WHOLE)
    assert ("someone" in keys, said) == (True, "")
    assert start(tmp_path, mistake)[:2] == (keys, agent)
    assert "site.toml" in start(tmp_path, mistake)[2]
    assert (tmp_path / "kept.toml").read_text() == WHOLE
    assert start(tmp_path, WHOLE) == (keys, agent, "")


@pytest.mark.parametrize("agent", ['[agent]\ndevice = "cam"\n', "[agent.device]\nid = 2026-01-01\n"])
def test_what_an_earlier_version_kept_lets_a_person_in_and_starts_no_agent(tmp_path: Path, agent: str) -> None:
    poison = 'ssh_keys = ["ssh-ed25519 AAAA someone"]\n' + agent
    write(tmp_path / "kept.toml", poison)
    for text in (poison, "hostname =\n"):
        keys, settings, said = start(tmp_path, text)
        assert (keys, settings) == ("ssh-ed25519 AAAA someone\n", "")
        assert "The agent is not started" in said
        assert "kept.toml" in said
    write(tmp_path / "kept.toml", "hostname =\n")
    keys, settings, said = start(tmp_path, "format = 2\n")
    assert (keys, settings) == ("", "")
    assert "site.toml: " in said
    assert "kept.toml: " in said
    assert start(tmp_path, WHOLE)[2] == ""


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
