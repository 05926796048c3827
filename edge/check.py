"""`edge check`: whether this board can do its work, and what stands in the way."""

from __future__ import annotations

import ctypes
import datetime
import importlib.util
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from edge import health
from edge.config import CaptureConfig, EdgeConfig
from edge.errors import EdgeError
from edge.models import ModelStore
from edge.probe import probe
from edge.secret import load_secret
from splitward.errors import SplitwardError
from splitward.wire.bundle import read_trusted_key

State = Literal["ok", "warn", "fail"]
BUILT = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
"""A clock before this is wrong: the software did not exist."""
CONNECT_S = 5.0
LOW_MEMORY_BYTES = 128 << 20
EXPIRY_WARNING = datetime.timedelta(days=14)
TIME_ERROR, REFUSED = 5, -1
"""What adjtimex(2) answers where nothing keeps the clock right, and where it may not be asked (the agent's unit)."""


class Finding(Struct, frozen=True):
    """One line of `edge check`."""

    name: str
    state: State
    detail: str


def check_device(config: EdgeConfig, quick: bool = False) -> list[Finding]:
    """Look at everything; what cannot be looked at is a finding, not an error. `quick`: no camera and no network."""
    checks: list[Callable[[EdgeConfig], Iterator[Finding]]] = [
        _clock,
        _processor,
        _memory,
        _disk,
        _state,
        _bundle,
        _orders,
        _certificate,
        *([] if quick else [_sources, _broker]),
    ]
    findings: list[Finding] = []
    for check in checks:
        findings += _findings_of(check, config)
    return findings


def format_findings(findings: list[Finding]) -> str:
    """The findings as lines, for a terminal."""
    width = max(len(one.name) for one in findings)
    return "\n".join(f"{one.state:4}  {one.name:{width}}  {one.detail}" for one in findings)


def _findings_of(check: Callable[[EdgeConfig], Iterator[Finding]], config: EdgeConfig) -> list[Finding]:
    try:
        return list(check(config))
    except (SplitwardError, OSError) as error:
        return [Finding(check.__name__.strip("_"), "fail", str(error))]


def _clock(_config: EdgeConfig) -> Iterator[Finding]:
    now = datetime.datetime.now(datetime.timezone.utc)
    shown = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < BUILT:
        yield Finding(
            "clock", "fail", f"{shown} is before this software was made. Set the clock; TLS needs it."
        )
        return
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.adjtimex(ctypes.create_string_buffer(512))  # over sizeof(struct timex); no mode: a question
    hints = {
        TIME_ERROR: "; nothing keeps it right. Enable a time service.",
        REFUSED: "; whether something keeps it right cannot be asked here. See `timedatectl`.",
    }
    yield Finding("clock", "warn" if answer in hints else "ok", shown + hints.get(answer, ""))


def _processor(_config: EdgeConfig) -> Iterator[Finding]:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    features = set((fields.get("Features") or fields.get("flags") or "").split())
    name = fields.get("model name") or fields.get("CPU part") or os.uname().machine
    known = [one for one in ("asimd", "asimddp", "fphp", "sve", "avx2", "avx512f", "neon") if one in features]
    vector = bool(features & {"asimd", "neon", "avx2", "sse4_2"})
    detail = f"{name}, {os.cpu_count()} cores, {' '.join(known) or 'no vector unit that is known'}"
    yield Finding("processor", "ok" if vector else "warn", detail)
    heat = health.temperature_c()
    if heat is not None:
        yield Finding("temperature", "ok" if heat < 80 else "warn", f"{heat:.1f} degrees C")


def _memory(_config: EdgeConfig) -> Iterator[Finding]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = {line[0]: int(line[1]) * 1024 for line in lines}.get("MemAvailable:", 0)
    enough = free >= LOW_MEMORY_BYTES
    yield Finding("memory", "ok" if enough else "warn", f"{free >> 20} MB available")


def _disk(config: EdgeConfig) -> Iterator[Finding]:
    state = Path(config.device.state_dir)
    existing = next(folder for folder in (state, *state.resolve().parents) if folder.exists())
    free = health.disk_free_bytes(existing) or 0
    needed = config.spool.max_bytes
    if free >= needed:
        yield Finding("disk", "ok", f"{free >> 20} MB free at {existing}")
    else:
        yield Finding(
            *("disk", "warn"),
            f"{free >> 20} MB free at {existing}, {needed >> 20} for the spool. Free some, or lower spool.max_bytes.",
        )
    for wear in Path("/sys/block").glob("mmcblk*/device/life_time"):
        # Tenths of its life that are used, of both kinds of memory (JEDEC eMMC 5.0, EXT_CSD 268 and 269).
        used = max(int(value, 16) for value in wear.read_text().split())
        yield Finding(
            "wear", "ok" if used <= 8 else "warn", f"{wear.parts[3]}: at most {10 * used} % of its life used"
        )


def _state(config: EdgeConfig) -> Iterator[Finding]:
    load_secret(config.device.secret_path)
    yield Finding("secret", "ok", f"{config.device.secret_path}, readable by its owner only")
    spool = Path(config.device.state_dir) / "spool.sqlite"
    detail = f"{spool.stat().st_size >> 10} kB" if spool.exists() else "none yet"
    yield Finding("spool", "ok", f"{spool}: {detail}")


def _bundle(config: EdgeConfig) -> Iterator[Finding]:
    path = ModelStore(config).path()
    report = probe(config, str(path), 1)
    if report.error:
        yield Finding("bundle", "fail", f"{path}: {report.error}")
    else:
        yield Finding(
            "bundle",
            "ok",
            f"{report.model}: {report.runtime}, golden input agrees, {report.runtime_us_p50:.0f} us",
        )


def _orders(config: EdgeConfig) -> Iterator[Finding]:
    key = config.device.order_key
    if key is not None:
        read_trusted_key(Path(key))
    yield Finding("orders", "ok", "none are followed" if key is None else f"those that {key} has signed")


def _certificate(config: EdgeConfig) -> Iterator[Finding]:
    tls = config.broker.tls
    if tls is None:
        local = config.broker.host in ("127.0.0.1", "::1", "localhost")
        yield Finding(
            "tls",
            "ok" if local else "fail",
            "off" + ("" if local else ": the network reads along. Set broker.tls."),
        )
        return
    if tls.cert is None:
        yield Finding("certificate", "warn", "the device shows none to the broker; `edge enroll` gets one")
        return
    ends_ns = health.certificate_expires_at_ns(Path(tls.cert))
    if ends_ns is None:
        yield Finding("certificate", "fail", f"{tls.cert}: is no certificate. Run `edge enroll`.")
        return
    left = datetime.timedelta(seconds=ends_ns / 1e9 - time.time())
    state: State = "fail" if left < datetime.timedelta() else "warn" if left < EXPIRY_WARNING else "ok"
    yield Finding("certificate", state, f"{tls.cert}: {left.days} days left")
    if tls.key is not None and Path(tls.key).stat().st_mode & 0o077:
        yield Finding("key", "fail", f"{tls.key}: others may read it. Run `chmod 600 {tls.key}`.")


def _sources(config: EdgeConfig) -> Iterator[Finding]:
    for source in config.every_source:
        name = f"source {source.name}".strip()
        try:
            yield Finding(name, "ok", _try_source(source))
        except (EdgeError, OSError) as error:
            yield Finding(name, "fail", str(error))


def _try_source(source: CaptureConfig) -> str:
    path = Path(source.path)
    if source.kind == "camera":
        from edge.camera import try_camera

        return try_camera(source.camera)
    if source.kind == "receiver":
        if importlib.util.find_spec("pynetdicom") is None:
            raise EdgeError(
                "pynetdicom: is not installed, and a receiver needs it. Install `splitward[dicom]`."
            )
        host, _, port = source.listen.rpartition(":")
        if not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
            raise EdgeError(f"{source.listen!r}: is not HOST:PORT. Set `capture.listen`.")
        with socket.socket() as probe_socket:
            taken = probe_socket.connect_ex((host, int(port))) == 0
        existing = next(one for one in (path, *path.resolve().parents) if one.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise EdgeError(f"{existing}: is no folder that this user may write to. Set `capture.path`.")
        return f"{source.listen}, {'in use (by the agent?)' if taken else 'free'}, into {path}"
    if not path.exists():
        raise EdgeError(f"{path}: does not exist. Set `capture.path`.")
    if not os.access(path, os.R_OK):
        raise EdgeError(f"{path}: may not be read by this user.")
    if source.sort and not os.access(path, os.W_OK):
        raise EdgeError(f"{path}: files are to be sorted, but this user may not write there.")
    return f"{source.kind} {path}"


def _broker(config: EdgeConfig) -> Iterator[Finding]:
    broker = config.broker
    where = f"{broker.host}:{broker.port}"
    started_s = time.monotonic()
    try:
        connection = socket.create_connection((broker.host, broker.port), CONNECT_S)
    except OSError as error:
        yield Finding(
            "broker", "fail", f"{where}: {error.strerror or error}. Is it up, and `broker.host` right?"
        )
        return
    with connection:
        if broker.tls is not None:
            from edge.link import tls_context

            try:
                with tls_context(broker.tls).wrap_socket(connection, server_hostname=broker.host) as secured:
                    yield Finding("tls", "ok", f"{where}: {secured.version()}, {secured.cipher()[0]}")  # type: ignore[index]  # connected, so it has one
            except ssl.SSLError as error:
                yield Finding(
                    "tls", "fail", f"{where}: {error.reason or error}. Check the certificates and the clock."
                )
                return
    answer = _ask_broker(config)
    took_ms = 1e3 * (time.monotonic() - started_s)
    state: State = "ok" if answer == "Success" else "fail"
    yield Finding("broker", state, f"{where}: {answer}, {took_ms:.0f} ms")


def _ask_broker(config: EdgeConfig) -> str:
    """What the broker says to a connection under another client id, so that a running agent keeps its own."""
    from paho.mqtt.client import Client
    from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

    from edge.link import tls_context

    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=f"{config.device.site}.{config.device.id}.check",
        protocol=MQTTProtocolVersion.MQTTv311
        if config.broker.protocol == "3.1.1"
        else MQTTProtocolVersion.MQTTv5,
    )
    if config.broker.username is not None:
        client.username_pw_set(config.broker.username, config.broker.password)
    if config.broker.tls is not None:
        client.tls_set_context(tls_context(config.broker.tls))
    answered = threading.Event()
    said = ["no answer to CONNECT"]

    def on_connect(_client: Any, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
        said[0] = str(code)
        answered.set()

    client.on_connect = on_connect
    client.connect(config.broker.host, config.broker.port)
    client.loop_start()
    answered.wait(CONNECT_S)
    client.disconnect()
    client.loop_stop()
    return said[0]
