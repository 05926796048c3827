"""One device under emulation from first start to last result, and what befalls it on the way.

The scenarios are those of the fleet, as far as a whole machine can meet them: `kill_agent` cuts the device's power,
`cut` takes its network away, `kill_broker` the broker, each for `lasts_s`, counted from the first result.
"""

from __future__ import annotations

import functools
import http.server
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from firmware_sim.arm64.machine import Kind, Machine, insert_card, unpack_card
from firmware_sim.arm64.stand import GUEST_HOST, Stand, open_stand
from firmware_sim.arm64.user import EmulationError
from firmware_sim.errors import ScenarioError
from firmware_sim.scenario import Scenario, plan
from splitward.config import format_toml
from splitward.wire.bundle import read_bundle, read_signing_key, write_bundle
from splitward.wire.server import read_server_card, server_card_path, write_server_card

DEVICE = "device-1"
IMPORTS = "/var/lib/splitward/import"


BLOWS = frozenset({"kill_agent", "cut", "kill_broker"})


class Trial(Struct, frozen=True):
    """What came of it. `first_ack_s` counts from power-on to the device's own word of its first result."""

    machine: str
    frames: int
    stored: int
    first_ack_s: float
    all_stored_s: float
    starts: int


def run_trial(
    kind: Kind,
    image: Path,
    card: Path,
    frames: NDArray[Any],
    scenario: Scenario,
    folder: Path,
    first_ack_limit_s: float,
) -> Trial:
    """Start `image` in a machine, let the scenario happen, and wait until every frame's result is stored.

    Parameters
    ----------
    kind : "virt", "uefi" or "raspi3b"
    image : Path
        `.img` or `.img.zst`.
    card : Path
        Card of the server half of the image's model.
    frames : ndarray
        As the simulator replays them.
    scenario : Scenario
    folder : Path
        Keeps serial log, broker's and cloud's logs and the store.
    first_ack_limit_s : float

    Raises
    ------
    EmulationError
        The device does not start, or a frame is not answered in time.
    ScenarioError
        The scenario holds a blow that a whole machine cannot be dealt.
    """
    unknown = sorted({event.kind for event in plan(scenario)} - BLOWS)
    if unknown:
        raise ScenarioError(f"a machine cannot be dealt {', '.join(unknown)}, only {', '.join(sorted(BLOWS))}.")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open_stand(folder / "stand", DEVICE, [card]) as stand,
        open_machine(kind, image, stand, frames, folder, rate_hz=scenario.rate_hz) as device,
    ):
        listener = stand.listener
        if listener is None:
            raise EmulationError("nobody listens at the stand.")
        started_s = time.monotonic()
        device.wait(lambda: listener.answered(DEVICE) >= 1, first_ack_limit_s, "the first result")
        first_s = time.monotonic() - started_s
        starts = 1 + _play(scenario, stand, device)
        device.wait(lambda: len(stand.stored()) >= len(frames), scenario.heal_s, "the last result")
        whole_s = time.monotonic() - started_s
        stored = len(stand.stored())
    return Trial(kind, len(frames), stored, round(first_s, 1), round(whole_s, 1), starts)


@contextmanager
def open_machine(
    kind: Kind,
    image: Path,
    stand: Stand,
    frames: NDArray[Any],
    folder: Path,
    update_port: int | None = None,
    rate_hz: float = 0.0,
) -> Iterator[Machine]:
    """A machine that is switched on, in it the card of `image` with site.toml, certificates and `frames`."""
    raw = unpack_card(image, folder / "raw.img")
    (folder / "site.toml").write_text(site_text(stand, update_port, rate_hz))
    names = np.array([f"frame-{number:04d}" for number in range(len(frames))])
    np.savez(folder / "frames.npz", images=frames, names=names)
    files = {
        "site.toml": folder / "site.toml",
        "import/frames.npz": folder / "frames.npz",
        **stand.credentials(),
    }
    device = Machine(kind, insert_card(raw, folder, files), folder)
    raw.unlink()
    device.start()
    try:
        yield device
    finally:
        device.cut_power()


def site_text(stand: Stand, update_port: int | None, rate_hz: float) -> str:
    """site.toml of the device that reports to `stand`."""
    tables: dict[str, Any] = {
        "hostname": stand.device,
        "agent": {
            "capture": {"kind": "simulator", "path": f"{IMPORTS}/frames.npz", "rate_hz": rate_hz},
            "link": {"status_s": 1.0, "retry_s": 2.0, "reconnect_max_s": 2.0},
            "update": {"trial_s": 5.0},
        },
    }
    if update_port is not None:
        tables["update"] = {"url": f"https://{GUEST_HOST}:{update_port}", "every_s": 2.0}
        tables["update"] |= {"ca": f"{IMPORTS}/ca.pem"}
    if stand.enrols:
        url = f"https://{GUEST_HOST}:{stand.api_port}"
        tables["enrolment"] = {"url": url, "token": stand.token, "ca": f"{IMPORTS}/ca.pem"}
        tables["enrolment"] |= {"device": stand.device, "site": "stand"}
    else:
        files = {"ca": "ca.pem", "cert": "device.pem", "key": "device.key"}
        tls = {name: f"{IMPORTS}/{file}" for name, file in files.items()}
        tables["agent"] |= {"device": {"id": stand.device, "site": "stand"}}
        tables["agent"] |= {"broker": {"host": GUEST_HOST, "port": stand.port, "tls": tls}}
    return format_toml(tables)


@contextmanager
def serve_folder(folder: Path, certificate: Path) -> Iterator[int]:
    """Port of the loopback at which the files of `folder` are served by HTTPS.

    The server's key lies beside its `certificate`, such as `cloud.key` beside the stand's `cloud.pem`.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    handler = functools.partial(Handler, directory=str(folder))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        # A device whose power goes amid the handshake holds up its own thread alone.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def sign_again(bundle: Path, key: Path, target: Path) -> Path:
    """A bundle of the same network under another name, newer by a second, with its server card; its path."""
    signer = read_signing_key(key)
    whole = read_bundle(bundle, signer.public_key())
    newer = datetime.fromisoformat(whole.manifest.created_at) + timedelta(seconds=1)
    target.parent.mkdir(parents=True, exist_ok=True)
    manifest = msgspec.structs.replace(whole.manifest, name=target.stem, created_at=newer.isoformat())
    model = write_bundle(target, manifest, whole.files, signer)
    card, weights = read_server_card(server_card_path(bundle))
    copied = target.with_name(target.stem + ".server.safetensors")
    copied.write_bytes(weights.read_bytes())
    write_server_card(
        server_card_path(target),
        msgspec.structs.replace(card, model=model.hex(), name=target.stem, weights=copied.name),
    )
    return target


def format_trial(trial: Trial) -> str:
    """The trial as one line of JSON."""
    return json.dumps({name: getattr(trial, name) for name in trial.__struct_fields__})


def _play(scenario: Scenario, stand: Stand, device: Machine) -> int:
    """Let the events happen; how often the device was started again."""
    started_s, starts = time.monotonic(), 0
    for event in plan(scenario):
        time.sleep(max(0.0, started_s + event.at_s - time.monotonic()))
        if event.kind == "kill_agent":
            device.cut_power()
            time.sleep(event.lasts_s)
            device.start()
            starts += 1
        elif event.kind == "cut":
            device.connect(False)
            time.sleep(event.lasts_s)
            device.connect(True)
        else:
            stand.stop_broker()
            time.sleep(event.lasts_s)
            stand.start_broker()
    return starts
