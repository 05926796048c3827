"""The agent's configuration: one frozen struct for each table of `edge.toml`.

Relative paths start at the working directory. The defaults run the demo's first device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from splitward.wire.bundle import Backend, Precision
from splitward.wire.message import NAME

Name = Annotated[str, Meta(pattern=rf"^{NAME.pattern}\Z")]
Port = Annotated[int, Meta(ge=1, le=65535)]
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class DeviceConfig(Struct, frozen=True, kw_only=True):
    """`[device]`: who this device is and what it runs.

    Attributes
    ----------
    secret_file : str
        32 random bytes that key the noise; created with mode 0600 at the first start. Empty: in `state_dir`.
    state_dir : str
        Folder that outlives restarts: the spool and, by default, the secret.
    results_file : str or None
        JSON lines, one for each answered frame, for people and for tests.
    """

    id: Name = "device-1"
    site: Name = "demo"
    bundle: str = "demo/model.bundle"
    trusted_key: str = "demo/signing.key.pub"
    state_dir: str = "demo/device-1"
    secret_file: str = ""
    results_file: str | None = None

    @property
    def secret_path(self) -> Path:
        """Where the device's secret lies."""
        return Path(self.secret_file) if self.secret_file else Path(self.state_dir) / "secret"


class CaptureConfig(Struct, frozen=True, kw_only=True):
    """`[capture]`: where frames come from.

    Attributes
    ----------
    path : str
        Folder of images or of DICOM files, or the simulator's .npz file.
    camera : int or str
        Index or URL that OpenCV opens.
    rate_hz : float
        Most frames in a second; 0 takes them as fast as they are accepted.
    watch : bool
        Keep looking for new files in the folder; otherwise the source ends with its last file.
    max_unanswered : int
        A source that can wait (all but the camera) does so while this many frames have no result.
    """

    kind: Literal["folder", "dicom", "camera", "simulator"] = "simulator"
    path: str = "demo/frames.npz"
    camera: int | str = 0
    rate_hz: Annotated[float, Meta(ge=0)] = 0.0
    watch: bool = False
    max_unanswered: Count = 64


class RuntimeConfig(Struct, frozen=True, kw_only=True):
    """`[runtime]`: which variant of the client half runs."""

    backend: Backend = "onnx"
    precision: Precision = "float32"
    threads: Count = 1


class TlsConfig(Struct, frozen=True, kw_only=True):
    """`[broker.tls]`: certificate of the authority, and the device's own certificate and key (PEM files)."""

    ca: str
    cert: str | None = None
    key: str | None = None


class BrokerConfig(Struct, frozen=True, kw_only=True):
    """`[broker]`: the MQTT 5 broker."""

    host: str = "127.0.0.1"
    port: Port = 1883
    username: str | None = None
    password: str | None = None
    keepalive_s: Annotated[int, Meta(ge=1, le=65535)] = 30
    tls: TlsConfig | None = None


class SpoolConfig(Struct, frozen=True, kw_only=True):
    """`[spool]`: what waits for a result.

    Attributes
    ----------
    max_bytes : int
        Most bytes of messages at rest.
    max_age_s : float
        Frames captured longer ago are dropped (`expired`).
    drop : "oldest" or "newest"
        Which frame goes (`spool_full`) when the next one does not fit.
    synchronous : "full" or "normal"
        `full` survives a power cut: each commit is on the disk before its frames are published. `normal`
        survives a crash of the agent only, and spares slow flash.
    """

    max_bytes: Count = 64 << 20
    max_age_s: Seconds = 7 * 86400.0
    drop: Literal["oldest", "newest"] = "oldest"
    synchronous: Literal["full", "normal"] = "full"


class LinkConfig(Struct, frozen=True, kw_only=True):
    """`[link]`: how frames are published.

    Attributes
    ----------
    window : int
        Most frames published and not yet answered.
    retry_s, retry_max_s : float
        How long a result is waited for, and then the pause before the frame is sent again; the pause doubles
        up to `retry_max_s`.
    reconnect_s, reconnect_max_s : float
        First and longest pause between attempts to connect; jittered.
    session_expiry_s : int
        How long the broker keeps results for a device that is away.
    status_s : float
        Period of the status message.
    """

    window: Count = 16
    retry_s: Seconds = 10.0
    retry_max_s: Seconds = 300.0
    reconnect_s: Seconds = 1.0
    reconnect_max_s: Seconds = 60.0
    session_expiry_s: Annotated[int, Meta(ge=0, lt=1 << 32)] = 86400
    status_s: Seconds = 30.0


class EdgeConfig(Struct, frozen=True, kw_only=True):
    """The whole of `edge.toml`."""

    device: DeviceConfig = DeviceConfig()
    capture: CaptureConfig = CaptureConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    broker: BrokerConfig = BrokerConfig()
    spool: SpoolConfig = SpoolConfig()
    link: LinkConfig = LinkConfig()
