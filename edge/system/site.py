"""site.toml: what a person says of one device on the card's open partition, applied at every start.

The root forgets what is written to it, so the file is the only place where these settings live. A file with a
mistake, be it one that only the agent would notice, is answered with `site-error.txt` beside it, and the last good one
stays in force. Where there is none, what can be read of either lets a person in, and the agent is not started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct
from msgspec.structs import asdict

from edge.config import EdgeConfig
from splitward.config import build_config, format_toml, read_config, read_toml
from splitward.disk import move_whole, write_whole
from splitward.errors import ConfigError
from splitward.wire.names import NAME

KEPT = Path("/data/site.toml")
"""The last good one."""
AGENT_ID = 900
"""User and group of the agent in the image."""
IDENTITY = "var/lib/splitward/identity"
"""What enrolment gave, below the root; it survives updates of the system."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "device": {
        "bundle": "/usr/share/splitward/model.bundle",
        "trusted_key": "/usr/share/splitward/trusted.pub",
        "state_dir": "/var/lib/splitward",
    }
}
"""Of edge.toml, where the image keeps things."""
Hostname = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
Address = Annotated[str, Meta(pattern=r"^[0-9a-fA-F.:]+(/[0-9]{1,3})?\Z")]
OneLine = Annotated[str, Meta(pattern=r"^[^\n\r\"]*\Z")]


class WifiConfig(Struct, frozen=True, kw_only=True):
    """`[network.wifi]`: name and passphrase of a WPA2 or WPA3 network; `country` as ISO 3166 writes it."""

    name: OneLine
    passphrase: Annotated[str, Meta(min_length=8, max_length=63, pattern=r"^[^\n\r\"]*\Z")]
    country: Annotated[str, Meta(pattern=r"^[A-Z]{2}\Z")]


class NetworkConfig(Struct, frozen=True, kw_only=True):
    """`[network]`: without `address` every interface asks for one (DHCP)."""

    address: Address | None = None
    gateway: Address | None = None
    dns: tuple[Address, ...] = ()
    ntp: tuple[OneLine, ...] = ()
    wifi: WifiConfig | None = None


class UpdateConfig(Struct, frozen=True, kw_only=True):
    """`[update]`: folder of images, an HTTPS address; without it the device never looks for one.

    Attributes
    ----------
    ca : str or None
        Authority of that address, a PEM file; the public ones by default. It protects the fetch only: what may be
        installed is decided by the bundle's own signature.
    every_s : float
        Period of looking.
    allow_older : bool
        Install what the folder offers even where its build number is below the running one's: the way back to an
        older image. Take it out again: whoever rules the folder chooses among all that was ever signed.
    """

    url: Annotated[str, Meta(pattern=r"^https://")]
    ca: str | None = None
    every_s: Annotated[float, Meta(ge=1)] = 3600.0
    allow_older: bool = False


class EnrolmentConfig(Struct, frozen=True, kw_only=True):
    """`[enrolment]`: how the device gets its certificate at its first start, and its broker with it.

    Attributes
    ----------
    url : str
        The cloud.
    token : str
        For one device, once; after that it is worth nothing, and may stay in the file.
    device, site : str
    ca : str or None
        Authority of that address, a PEM file such as `/var/lib/splitward/import/ca.pem`; the public ones by default.
    """

    url: Annotated[str, Meta(pattern=r"^https://")]
    token: OneLine
    device: Annotated[str, Meta(pattern=rf"^{NAME.pattern}\Z")]
    site: Annotated[str, Meta(pattern=rf"^{NAME.pattern}\Z")] = "default"
    ca: str | None = None


class SiteConfig(Struct, frozen=True, kw_only=True):
    """All of `site.toml`.

    Attributes
    ----------
    ssh_keys : tuple of str
        Public keys that may log in as root; none by default, and no password ever.
    agent : dict
        Tables of edge.toml.
    """

    format: Literal[1] = 1
    hostname: Hostname = "splitward"
    ssh_keys: tuple[OneLine, ...] = ()
    network: NetworkConfig = NetworkConfig()
    update: UpdateConfig | None = None
    enrolment: EnrolmentConfig | None = None
    agent: dict[str, Any] = {}


def read_site(path: Path) -> SiteConfig:
    """Settings held by the file at `path`; `ConfigError` says what is wrong with it, or with the agent's tables."""
    site = read_config(path, SiteConfig)
    build_config(agent_settings(site), EdgeConfig, where=f"{path}, [agent]")
    return site


def agent_settings(site: SiteConfig, enrolled: dict[str, Any] | None = None) -> dict[str, Any]:
    """Tables of edge.toml: what the site says, before what its enrolment gave, before the image's own places."""
    given = {name: dict((enrolled or {}).get(name, {})) for name in ("device", "broker", "cloud")}
    for name in DEFAULTS["device"]:
        given["device"].pop(name, None)
    tables = {name: dict(values) if isinstance(values, dict) else values for name, values in site.agent.items()}
    for name, values in given.items():
        own = tables.get(name, {})
        if isinstance(own, dict) and (whole := {**DEFAULTS.get(name, {}), **values, **own}):
            tables[name] = whole
    return tables


def write_agent_settings(site: SiteConfig, root: Path) -> bool:
    """Write edge.toml below `root`; not before a device that is to enrol has done so. Whether it is there."""
    settings, identity = root / "etc/splitward/edge.toml", root / IDENTITY / "edge.toml"
    if site.enrolment is not None and not identity.exists():
        return False
    tables = agent_settings(site, read_toml(identity) if identity.exists() else None)
    write_whole(settings, format_toml(tables).encode(), 0o644)
    return True


def apply_site(site: SiteConfig, root: Path, with_agent: bool = True) -> None:
    """Write the files that `site` stands for below `root`: first what lets a person in, edge.toml last."""
    keys = "".join(f"{key}\n" for key in site.ssh_keys)
    write_whole(root / "run/splitward/authorized_keys", keys.encode(), 0o644)
    network = site.network
    if network.address or network.dns or network.ntp or network.wifi:
        write_whole(root / "etc/systemd/network/70-site.network", _network_file(network).encode(), 0o644)
    if network.wifi is not None:
        write_whole(root / "etc/wpa_supplicant/wpa_supplicant-wlan0.conf", _wifi_file(network.wifi).encode())
    hosts = f"127.0.0.1 localhost\n127.0.1.1 {site.hostname}\n::1 localhost ip6-localhost\n"
    write_whole(root / "etc/hostname", f"{site.hostname}\n".encode(), 0o644)
    write_whole(root / "etc/hosts", hosts.encode(), 0o644)
    if site.update is not None:
        write_whole(root / "etc/splitward/update.toml", format_toml(asdict(site.update)).encode(), 0o644)
    if with_agent:
        write_agent_settings(site, root)


def take_site(boot: Path, kept: Path, root: Path) -> SiteConfig:
    """Apply `boot`/site.toml below `root` and keep it at `kept`; say what is wrong with it, and apply the kept one.

    Where neither can be used, one whose only mistake is in the agent's tables still says who may log in, and how the
    device is reached; of one that cannot be read at all the defaults do. The agent then gets no settings: with others
    than its own, a system update that refuses them would look like one that works.
    """
    given, complaint = boot / "site.toml", boot / "site-error.txt"
    paths, mistakes = [given, kept] if kept.exists() else [given], list[str]()
    usable = _first_of(paths, read_site, mistakes)
    site = usable or _first_of(paths, lambda path: read_config(path, SiteConfig), mistakes) or SiteConfig()
    apply_site(site, root, with_agent=usable is not None)
    if not mistakes:
        complaint.unlink(missing_ok=True)
        if not kept.exists() or kept.read_bytes() != given.read_bytes():
            write_whole(kept, given.read_bytes())
        return site
    if usable is None:
        mistakes.append(
            "The agent is not started: no settings for it can be used. Correct site.toml, and restart."
        )
    text = "".join(f"{mistake}\n" for mistake in mistakes)
    print(f"site.toml is not used: {text}", end="", file=sys.stderr)
    if not complaint.exists() or complaint.read_text(errors="replace") != text:
        complaint.write_text(text)
    return site


def take_imports(boot: Path, state: Path) -> list[str]:
    """Move the files of `import` on the boot partition into the agent's folder, and return their names.

    Each is whole at its new place before it leaves the old one, so that a power cut loses none.
    """
    folder = boot / "import"
    taken = []
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        if not path.is_file():
            continue
        target = state / "import" / path.relative_to(folder)
        for parent in (state / "import", target.parent):
            parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            give_to_agent(parent)
        partial = target.with_name(target.name + ".partial")
        with path.open("rb") as source, os.fdopen(os.open(partial, _CREATE, 0o600), "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        give_to_agent(partial)
        move_whole(partial, target)
        path.unlink()
        taken.append(path.relative_to(folder).as_posix())
    return taken


def main(arguments: list[str]) -> int:
    """Apply the site.toml of the boot partition that is mounted at the first argument."""
    boot = Path(arguments[0])
    site = take_site(boot, KEPT, Path("/"))
    Path("/proc/sys/kernel/hostname").write_text(site.hostname)
    taken = take_imports(boot, Path("/var/lib/splitward"))
    if site.network.wifi is not None:
        subprocess.run(["systemctl", "--no-block", "start", "wpa_supplicant@wlan0.service"], check=False)
    print(
        f"site.toml applied: {site.hostname}, {len(site.ssh_keys)} SSH keys, imported: {', '.join(taken) or 'nothing'}"
    )
    return 0


def _first_of(paths: list[Path], read: Callable[[Path], SiteConfig], mistakes: list[str]) -> SiteConfig | None:
    """The first that can be read; what is wrong with those before it joins `mistakes`."""
    for path in paths:
        try:
            return read(path)
        except ConfigError as error:  # noqa: PERF203  # of two files
            if str(error) not in mistakes:
                mistakes.append(str(error))
    return None


_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def _network_file(network: NetworkConfig) -> str:
    lines = ["[Match]", "Type=ether wlan", "", "[Network]", f"DHCP={'no' if network.address else 'yes'}"]
    lines += [
        f"{key}={value}" for key, value in (("Address", network.address), ("Gateway", network.gateway)) if value
    ]
    lines += [f"DNS={one}" for one in network.dns] + [f"NTP={one}" for one in network.ntp]
    return "\n".join(lines) + "\n"


def _wifi_file(wifi: WifiConfig) -> str:
    return (
        f'country={wifi.country}\nnetwork={{\n    ssid="{wifi.name}"\n    psk="{wifi.passphrase}"\n'
        "    key_mgmt=WPA-PSK SAE\n    ieee80211w=1\n}\n"
    )


def give_to_agent(path: Path) -> None:
    """Let the agent's user own it, where root does this."""
    if os.geteuid() == 0:
        os.chown(path, AGENT_ID, AGENT_ID, follow_symlinks=False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
