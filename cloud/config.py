"""The configuration file of the cloud service."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path
from typing import Annotated, Literal

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
        One for each worker, and the same after a restart, so that the broker keeps its session. `{host}` stands
        for the host's name: the pod's, in a StatefulSet. A suffix from the fleet's keys makes it one that nobody
        can guess.
    session_expiry_s : int
        How long the broker keeps the session of a worker that is away, and deals its share of the messages to it,
        though nobody answers; 0 for the embedded broker, which dies of a kept session with unacknowledged messages
        of a shared subscription.
    max_in_flight, max_in_flight_per_device, max_held_bytes : int
        Most messages in hand, unacknowledged, at any time; of one device; and their bytes.
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
    session_expiry_s: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 60
    max_in_flight: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 512
    max_in_flight_per_device: Count = 512
    max_held_bytes: Count = 64 << 20
    max_packet_bytes: Annotated[int, msgspec.Meta(ge=1024)] = 1 << 20


class ApiConfig(msgspec.Struct, frozen=True):
    """Where the API and the dashboard listen.

    Attributes
    ----------
    host : str
        Beyond loopback `cert` and `key` are needed.
    cert, key : str, optional
        PEM files; with them the API speaks HTTPS.
    names : tuple of str
        Host names by which it may be asked, beside loopback's; any other is refused.
    require_token : bool
        False, which is taken on loopback alone: whoever reaches the port may read and operate without a token. Not
        behind a reverse proxy, which brings everybody there.
    max_body_bytes : int
        Of a request, other than the upload of a bundle.
    requests_per_s, burst : float, int
        Of each token, and of each address without one.
    """

    host: str = "127.0.0.1"
    port: Port = 8080
    cert: str | None = None
    key: str | None = None
    names: tuple[str, ...] = ()
    require_token: bool = True
    max_body_bytes: Count = 1 << 20
    requests_per_s: Annotated[float, msgspec.Meta(gt=0)] = 50.0
    burst: Count = 200


class StoreConfig(msgspec.Struct, frozen=True):
    """SQLAlchemy URL of the database, and how much it keeps.

    Attributes
    ----------
    url : str
        `sqlite+aiosqlite:///FILE` or `postgresql+psycopg://USER@HOST/NAME`.
    max_dead_letters : int
        Newest refused messages that are kept.
    retention_days : float
        Results older than this are deleted; 0 keeps them all. The audit trail is never deleted.
    """

    url: str = "sqlite+aiosqlite:///cloud.db"
    max_dead_letters: Count = 1000
    retention_days: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class BatchConfig(msgspec.Struct, frozen=True):
    """A micro-batch leaves when it holds `max_size` frames, or when the load promises no fuller one in time: at
    the latest when its first frame has waited `max_wait_ms`."""

    max_size: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 64
    max_wait_ms: Annotated[float, msgspec.Meta(ge=0)] = 4.0


class RayConfig(msgspec.Struct, frozen=True):
    """Replicas of each server half on a Ray cluster.

    Attributes
    ----------
    address : str
        Of the cluster, as `ray.init` takes it, such as "auto"; empty: a cluster of this process's own.
    min_replicas, max_replicas : int
        Ray Serve chooses between them, by the batches that wait.
    gpus : float
        GPUs, or the part of one, that a replica needs.
    patience_s : float
        How long a batch may wait for a replica.
    """

    address: str = ""
    min_replicas: Count = 1
    max_replicas: Count = 4
    gpus: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    patience_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0


class EngineConfig(msgspec.Struct, frozen=True):
    """With what the server half computes.

    Attributes
    ----------
    kind : "local" or "ray"
        In this process, or on a Ray cluster.
    batches_at_once : int
        Batches on their way at a time; with "ray", two for each replica.
    backend : "auto", "compiled" or "torch"
        "auto" compiles for the CPU where the model allows it.
    device : str
        torch's name of the device, such as "cuda".
    threads : int
        Threads that one server half computes with.
    """

    kind: Literal["local", "ray"] = "local"
    batches_at_once: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    backend: Literal["auto", "compiled", "torch"] = "auto"
    device: str = "cpu"
    threads: Count = 1
    ray: RayConfig = RayConfig()


class LimitsConfig(msgspec.Struct, frozen=True):
    """What is refused though it is well formed; 0 stands for no limit.

    Attributes
    ----------
    max_ahead_s, max_age_s : float
        How far the capture time may lie in the future, and in the past. Off by default: a refused frame is lost, and
        a board whose clock is wrong for a day should not lose that day. The time of storing is the cloud's own.
    """

    max_ahead_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    max_age_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class FleetConfig(msgspec.Struct, frozen=True):
    """Enrolment of devices, and the bundles that they run.

    Attributes
    ----------
    state_dir : str
        Keys of the certificate authority and of orders (made at the first start), and the bundles' files.
    trusted_key : str, optional
        Public key that bundles are signed with; without it no device enrols and no bundle is taken.
    broker_host, broker_port : str, int
        Where devices find the broker.
    public_url : str
        Address of this API as devices see it; empty: `https://` or `http://` and the API's own address.
    certificate_days : float
        Life of a device's certificate.
    ticket_s : float
        Life of the address of a bundle's file.
    """

    state_dir: str = "fleet"
    trusted_key: str | None = None
    broker_host: str = ""
    broker_port: Port = 8883
    public_url: str = ""
    certificate_days: Annotated[float, msgspec.Meta(gt=0)] = 365.0
    ticket_s: Annotated[float, msgspec.Meta(gt=0)] = 24 * 3600.0


class LogConfig(msgspec.Struct, frozen=True):
    """What the log says, as text or as one JSON object a line."""

    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class TraceConfig(msgspec.Struct, frozen=True):
    """OpenTelemetry traces.

    Attributes
    ----------
    endpoint : str
        Where a collector takes OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`; empty: no traces.
    share : float
        Share of the batches and requests that are traced.
    timeout_s : float
        Longest wait for the collector; spans that it does not take are dropped.
    """

    endpoint: str = ""
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0


class CloudConfig(msgspec.Struct, frozen=True):
    """All of `cloud.toml`. Paths are relative to the working directory."""

    models: tuple[str, ...]
    broker: BrokerConfig = BrokerConfig()
    api: ApiConfig = ApiConfig()
    store: StoreConfig = StoreConfig()
    batch: BatchConfig = BatchConfig()
    engine: EngineConfig = EngineConfig()
    limits: LimitsConfig = LimitsConfig()
    fleet: FleetConfig = FleetConfig()
    log: LogConfig = LogConfig()
    trace: TraceConfig = TraceConfig()


def read_cloud_config(path: Path) -> CloudConfig:
    """Configuration held by the TOML file `path`.

    Raises
    ------
    ConfigError
        As `read_config`, or the API would listen beyond loopback, or the TLS files are incomplete.
    """
    config = read_config(path, CloudConfig)
    api, tls = config.api, config.broker.tls
    if (api.cert is None) != (api.key is None):
        raise ConfigError(f"{path}: api needs cert and key together. Give both, or neither.")
    if api.cert is None and not is_loopback(api.host):
        raise ConfigError(
            f"{path}: api.host {api.host!r} is not a loopback address, and tokens must not travel in the clear. "
            "Give api.cert and api.key, or use 127.0.0.1 behind a reverse proxy that ends TLS."
        )
    if not api.require_token and not is_loopback(api.host):
        raise ConfigError(f"{path}: api.require_token = false is for loopback, not for api.host {api.host!r}.")
    if tls is not None and (tls.cert is None) != (tls.key is None):
        raise ConfigError(f"{path}: broker.tls needs cert and key together. Give both, or neither.")
    return msgspec.structs.replace(config, broker=_named(config.broker))


def _named(broker: BrokerConfig) -> BrokerConfig:
    return msgspec.structs.replace(broker, client_id=broker.client_id.replace("{host}", socket.gethostname()))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, not an address
        return host == "localhost"
