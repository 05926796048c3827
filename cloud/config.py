"""The configuration file of the cloud service."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

import msgspec

from splitward.config import read_config
from splitward.errors import ConfigError

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class TlsConfig(msgspec.Struct, frozen=True):
    """Mutual TLS towards the broker: PEM files. `cert` and `key` go together."""

    ca: str
    cert: str | None = None
    key: str | None = None


class BrokerConfig(msgspec.Struct, frozen=True):
    """The broker, and this worker's place among those that share its messages.

    Attributes
    ----------
    group : str
        Workers of one group divide the activations among them.
    client_id : str
        One for each worker, and the same after a restart, so that the broker keeps its session.
    session_expiry_s : int
        How long the broker keeps the session of a worker that is away; 0 for the embedded broker, which dies of
        a kept session with unacknowledged messages of a shared subscription.
    max_in_flight : int
        Most messages in hand, unacknowledged, at any time.
    max_packet_bytes : int
        Larger messages are not accepted from the broker.
    """

    host: str = "127.0.0.1"
    port: Port = 1883
    username: str | None = None
    password: str | None = None
    tls: TlsConfig | None = None
    group: str = "cloud"
    client_id: str = "splitward-cloud-1"
    session_expiry_s: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 3600
    max_in_flight: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 128
    max_packet_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 1 << 20


class ApiConfig(msgspec.Struct, frozen=True):
    """Where the API and the dashboard listen: loopback only, because they ask for no token yet."""

    host: str = "127.0.0.1"
    port: Port = 8080


class StoreConfig(msgspec.Struct, frozen=True):
    """SQLAlchemy URL of the database."""

    url: str = "sqlite+aiosqlite:///cloud.db"
    max_dead_letters: Count = 1000


class BatchConfig(msgspec.Struct, frozen=True):
    """A micro-batch leaves when it holds `max_size` frames or its first has waited `max_wait_ms`."""

    max_size: Count = 32
    max_wait_ms: Annotated[float, msgspec.Meta(ge=0)] = 5.0


class EngineConfig(msgspec.Struct, frozen=True):
    """Threads that the server half computes with."""

    threads: Count = 1


class CloudConfig(msgspec.Struct, frozen=True):
    """All of `cloud.toml`. Paths are relative to the working directory."""

    models: tuple[str, ...]
    broker: BrokerConfig = BrokerConfig()
    api: ApiConfig = ApiConfig()
    store: StoreConfig = StoreConfig()
    batch: BatchConfig = BatchConfig()
    engine: EngineConfig = EngineConfig()


def read_cloud_config(path: Path) -> CloudConfig:
    """Configuration held by the TOML file `path`.

    Raises
    ------
    ConfigError
        As `read_config`, or the API would listen beyond loopback, or the TLS files are incomplete.
    """
    config = read_config(path, CloudConfig)
    if not _is_loopback(config.api.host):
        raise ConfigError(
            f"{path}: api.host {config.api.host!r} is not a loopback address, and the API asks for no token. "
            "Use 127.0.0.1, and a reverse proxy that authenticates if others must reach it."
        )
    tls = config.broker.tls
    if tls is not None and (tls.cert is None) != (tls.key is None):
        raise ConfigError(f"{path}: broker.tls needs cert and key together. Give both, or neither.")
    return config


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, not an address
        return host == "localhost"
