"""The agent's configuration: one frozen struct for each table of `edge.toml`.

Relative paths start at the working directory. The defaults run the demo's first device. What the environment and
signed orders change on top: settings.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from splitward.wire.names import NAME, Backend, Precision

Name = Annotated[str, Meta(pattern=rf"^{NAME.pattern}\Z")]
Port = Annotated[int, Meta(ge=1, le=65535)]
# Upper bounds are what timers, clocks and SQLite still take, or beyond what any device needs: an order may set some of
# these, and a value that no start survives could not be ordered back.
Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Whole = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Bytes = Annotated[int, Meta(ge=1, le=1 << 50)]
Seconds = Annotated[float, Meta(ge=0.001, le=10 * 366 * 86400)]
Span = Annotated[float, Meta(ge=0, le=10 * 366 * 86400)]
SLOWEST_HZ = 1 / 86400


class DeviceConfig(Struct, frozen=True, kw_only=True):
    """`[device]`: who this device is and what it runs.

    Attributes
    ----------
    bundle : str
        What runs until a bundle is installed over the air or by `edge model install`.
    trusted_key : str
        Public key that signs bundles.
    order_key : str or None
        Public key that signs orders; without it the device follows none.
    state_dir : str
        Folder that outlives restarts: the spool, installed bundles and, by default, the secret.
    secret_file : str
        32 random bytes that key the noise; created with mode 0600 at the first start. Empty: in `state_dir`.
    results_file : str or None
        JSON lines, one for each answered frame, for people and for tests.
    """

    id: Name = "device-1"
    site: Name = "demo"
    bundle: str = "demo/model.bundle"
    trusted_key: str = "demo/signing.key.pub"
    order_key: str | None = None
    state_dir: str = "demo/device-1"
    secret_file: str = ""
    results_file: str | None = None

    @property
    def secret_path(self) -> Path:
        """Where the device's secret lies."""
        return Path(self.secret_file) if self.secret_file else Path(self.state_dir) / "secret"


SourceKind = Literal["folder", "dicom", "receiver", "camera", "video", "simulator"]


class CaptureConfig(Struct, frozen=True, kw_only=True):
    """`[capture]`, and each `[[sources]]` beside it: where frames come from.

    Attributes
    ----------
    name : str
        Precedes the names of this source's frames; must differ between sources.
    path : str
        Folder of images or of DICOM files, video file, or the simulator's .npz file. A receiver puts there what
        it is sent.
    camera : int or str
        Index or URL that OpenCV opens.
    rate_hz : float
        Most frames in a second, one a day at least; 0 takes them as fast as they are accepted.
    watch : bool
        Keep looking for new files in the folder; otherwise the source ends with its last file.
    sort : bool
        Move a file to `done/` within its folder when its frames are safe in the spool, and to `failed/`, with
        the reason beside it, when it cannot be read or a frame of it not released. Otherwise files stay where they
        are. A receiver always does.
    keep_done_s, keep_failed_s : float or None
        How long files stay in `done/` and `failed/`; 0 deletes a file at once. By default a folder's stay for ever;
        a receiver's are deleted at once when they are done, and after a week when they have failed.
    max_unanswered : int
        A source that can wait (all but a camera) does so while this many frames have no result.
    priority : int
        Frames of a higher priority are published first and dropped last.
    real_time : bool
        The simulator does not wait, as a camera would not.
    listen, ae_title, callers : str, str, tuple of str
        A receiver's address `HOST:PORT`, its DICOM application entity title, and the titles that may call it
        (empty: every one).
    min_free_bytes : int
        A receiver refuses what would leave less space than this on the disk.
    """

    name: str = ""
    kind: SourceKind = "simulator"
    path: str = "demo/frames.npz"
    camera: Annotated[int, Meta(ge=0, le=9999)] | str = 0
    rate_hz: Span = 0.0
    watch: bool = False
    sort: bool = False
    keep_done_s: Span | None = None
    keep_failed_s: Span | None = None
    max_unanswered: Count = 64
    priority: Annotated[int, Meta(ge=0, le=9)] = 0
    real_time: bool = False
    listen: str = "127.0.0.1:11112"
    ae_title: Annotated[str, Meta(pattern=r"^[\x20-\x5b\x5d-\x7e]{1,16}\Z")] = "SPLITWARD"
    callers: tuple[str, ...] = ()
    min_free_bytes: Annotated[int, Meta(ge=0, le=1 << 50)] = 256 << 20

    def __post_init__(self) -> None:
        """Refuse a pause between frames that no clock counts, and a time to keep what is not sorted."""
        if 0 < self.rate_hz < SLOWEST_HZ:
            raise ValueError("Expected `rate_hz` of 0, or of one frame a day at least")
        kept = (self.keep_done_s, self.keep_failed_s)
        if kept != (None, None) and not self.sort and self.kind != "receiver":
            raise ValueError("Expected `sort = true` beside `keep_done_s` and `keep_failed_s`")


class RuntimeConfig(Struct, frozen=True, kw_only=True):
    """`[runtime]`: which variant of the client half runs, and how long it may take.

    Attributes
    ----------
    providers : tuple of str
        ONNX Runtime's execution providers, first choice first: "cpu", "cuda", "tensorrt". One that is not
        installed is an error, not a silent fall back.
    deadline_s : float
        A frame that takes longer ends the releaser, which is started again.
    restarts, restart_window_s : int, float
        So many restarts within so many seconds; then the agent ends, for its supervisor to start it anew.
    """

    backend: Backend = "onnx"
    precision: Precision = "float32"
    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    providers: tuple[Literal["cpu", "cuda", "tensorrt"], ...] = ("cpu",)
    deadline_s: Annotated[float, Meta(ge=0.1, le=86400)] = 10.0
    restarts: Whole = 5
    restart_window_s: Seconds = 600.0


class TlsConfig(Struct, frozen=True, kw_only=True):
    """`[broker.tls]`: certificate of the authority, and the device's own certificate and key (PEM files)."""

    ca: str
    cert: str | None = None
    key: str | None = None


class BrokerConfig(Struct, frozen=True, kw_only=True):
    """`[broker]`: the MQTT broker.

    Attributes
    ----------
    protocol : "auto", "5" or "3.1.1"
        `auto` speaks MQTT 5, and 3.1.1 to a broker that refuses it.
    """

    host: str = "127.0.0.1"
    port: Port = 1883
    username: str | None = None
    password: str | None = None
    keepalive_s: Annotated[int, Meta(ge=1, le=65535)] = 30
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    tls: TlsConfig | None = None


class SpoolConfig(Struct, frozen=True, kw_only=True):
    """`[spool]`: what waits for a result.

    Attributes
    ----------
    max_bytes : int
        Most bytes of messages at rest.
    max_age_s : float
        Frames that were spooled longer ago are dropped (`expired`). Time counts while the agent runs, on a
        clock that nobody sets; time switched off does not count.
    drop : "oldest" or "newest"
        Which frame of the lowest priority goes (`spool_full`) when the next one does not fit.
    order : "oldest" or "newest"
        Which frame of the highest priority is published first.
    mode : "disk" or "memory"
        `disk` commits every frame before it is published. `memory` spares flash: while results come, frames stay
        in memory, and go to the disk when the connection is lost, when they are `settle_s` old, and at the end.
        A power cut then loses, or captures again under another name, the frames of the last `settle_s` seconds.
    commit_s : float
        Least time between two commits of mode `disk`: frames wait for it, and share one flush.
    synchronous : "full" or "normal"
        `full` survives a power cut: each commit is on the disk before its frames are published. `normal`
        survives a crash of the agent only, and spares slow flash.
    """

    max_bytes: Bytes = 64 << 20
    max_age_s: Seconds = 7 * 86400.0
    drop: Literal["oldest", "newest"] = "oldest"
    order: Literal["oldest", "newest"] = "oldest"
    mode: Literal["disk", "memory"] = "disk"
    commit_s: Span = 0.0
    settle_s: Seconds = 5.0
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
        Pauses between attempts to connect double from the first to the longest, each cut by a random part.
    session_expiry_s : int
        How long the broker keeps results for a device that is away.
    status_s : float
        Period of the status message.
    """

    window: Annotated[int, Meta(ge=1, le=65535)] = 16
    retry_s: Seconds = 10.0
    retry_max_s: Seconds = 300.0
    reconnect_s: Seconds = 1.0
    reconnect_max_s: Seconds = 60.0
    session_expiry_s: Annotated[int, Meta(ge=0, lt=1 << 32)] = 86400
    status_s: Seconds = 30.0


class CloudConfig(Struct, frozen=True, kw_only=True):
    """`[cloud]`: the cloud's HTTPS side, for bundles and certificates.

    Attributes
    ----------
    url : str or None
        Address that certificates are renewed at; written by `edge enroll`.
    ca : str or None
        PEM file of the authority of its certificate; the system's by default.
    renew_at : float
        Part of a certificate's life after which it is renewed.
    """

    url: str | None = None
    ca: str | None = None
    renew_at: Annotated[float, Meta(gt=0, lt=1)] = 0.67


class UpdateConfig(Struct, frozen=True, kw_only=True):
    """`[update]`: bundles over the air.

    Attributes
    ----------
    trial_s : float
        A new bundle that fails within this time is rolled back.
    trial_starts : int
        So is one under which the agent was started more often than this without outliving `trial_s`.
    fetch_s : float
        Longest time for fetching and probing a bundle; a fetch goes on where it was at the next attempt.
    fetch_tries : int
        Attempts at fetching, the pause between them doubling, before the order is answered `failed`.
    max_bytes : int
        A larger file is refused.
    keep : int
        Installed bundles that are kept besides the one that runs.
    """

    trial_s: Seconds = 120.0
    trial_starts: Count = 3
    fetch_s: Seconds = 1800.0
    fetch_tries: Annotated[int, Meta(ge=1, le=1000)] = 8
    max_bytes: Bytes = 512 << 20
    keep: Count = 2


class HealthConfig(Struct, frozen=True, kw_only=True):
    """`[health]`: what the agent tells of itself.

    Attributes
    ----------
    metrics : str or None
        Where Prometheus finds metrics: `unix:PATH`, or `HOST:PORT` of the loopback; the agent runs without where it
        cannot be had.
    log_file : str or None
        JSON lines, rotated at `log_bytes`, `log_files` of them kept; standard error by default.
    log_format : "text" or "json"
        Of standard error.
    log_level : "debug", "info", "warning" or "error"
        Of the agent's own lines; libraries add warnings at most, as their other lines may name a patient.
    """

    metrics: str | None = None
    log_file: str | None = None
    log_bytes: Bytes = 4 << 20
    log_files: Count = 4
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class EdgeConfig(Struct, frozen=True, kw_only=True):
    """The whole of `edge.toml`."""

    device: DeviceConfig = DeviceConfig()
    capture: CaptureConfig = CaptureConfig()
    sources: tuple[CaptureConfig, ...] = ()
    runtime: RuntimeConfig = RuntimeConfig()
    broker: BrokerConfig = BrokerConfig()
    spool: SpoolConfig = SpoolConfig()
    link: LinkConfig = LinkConfig()
    cloud: CloudConfig = CloudConfig()
    update: UpdateConfig = UpdateConfig()
    health: HealthConfig = HealthConfig()

    @property
    def every_source(self) -> tuple[CaptureConfig, ...]:
        """`capture` and `sources`."""
        return (self.capture, *self.sources)
