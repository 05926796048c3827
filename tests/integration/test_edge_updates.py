"""Bundles over the air, and other orders: what is refused and why, what is rolled back, and what a power cut leaves."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge.config import CaptureConfig, CloudConfig, DeviceConfig, EdgeConfig, UpdateConfig
from edge.errors import UpdateError
from edge.installation import InstallRequest, install, install_apart
from edge.models import ModelStore
from edge.settings import load_settings
from firmware_sim.broker import Broker
from firmware_sim.fleet import to_toml
from splitward.wire.bundle import read_bundle, read_trusted_key, write_bundle
from splitward.wire.message import Activation
from splitward.wire.orders import Announcement, Command
from tests.integration.cloud_double import (
    TIMEOUT_S,
    Cloud,
    assert_none_twice,
    cloud_at,
    configure,
    running,
)
from tests.integration.cloud_https import HttpsCloud, https_cloud, public_pem


@pytest.fixture
def web(tmp_path: Path) -> Iterator[HttpsCloud]:
    folder = tmp_path / "web"
    folder.mkdir()
    with https_cloud(folder) as cloud:
        yield cloud


def settings(folder: Path, broker: Broker, tiny: Any, web: HttpsCloud, **update: Any) -> EdgeConfig:
    config = configure(folder, broker, tiny, 400, capture=CaptureConfig(rate_hz=20))
    key = folder / "order.key.pub"
    key.write_bytes(public_pem(web.order_key))
    return msgspec.structs.replace(
        config,
        device=msgspec.structs.replace(config.device, order_key=str(key)),
        cloud=CloudConfig(ca=str(web.authority.path)),
        update=UpdateConfig(**{"trial_s": 1.0, "fetch_tries": 3, **update}),
    )


def publish(web: HttpsCloud, path: Path, model: bytes) -> dict[str, Any]:
    """Put a bundle's file on the server; what an announcement says of it."""
    data = path.read_bytes()
    web.files[model.hex()] = data
    return {
        "model": model.hex(),
        "url": f"{web.url}/v1/bundles/{model.hex()}/file?ticket=t",
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }


def announce(cloud: Cloud, web: HttpsCloud, serial: int, said: dict[str, Any], **more: Any) -> str:
    order = Announcement(id=f"{serial:032x}", serial=serial, site="demo", device="device-1", **{**said, **more})
    return cloud.order(order, web.order_key)


def command(cloud: Cloud, web: HttpsCloud, serial: int, name: Any, **arguments: Any) -> str:
    order = Command(
        id=f"{serial:032x}", serial=serial, site="demo", device="device-1", name=name, arguments=arguments
    )
    return cloud.order(order, web.order_key)


def newer(tiny: Any, path: Path, created_at: str = "2026-02-01T00:00:00Z", **changes: Any) -> bytes:
    """A later bundle at `path`; its model id."""
    made = tiny.rewrite(path, created_at=created_at, name=path.stem, **changes)
    return read_bundle(made.path, read_trusted_key(tiny.trusted_key)).model


def test_an_announced_bundle_is_fetched_tried_and_kept(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, web: HttpsCloud
) -> None:
    config = settings(tmp_path, mosquitto, tiny_bundle, web)
    model = newer(tiny_bundle, tmp_path / "second.bundle")
    with cloud_at(mosquitto) as cloud:
        with running(config):
            said = publish(web, tmp_path / "second.bundle", model)
            web.cut_after = 1000  # the transfer breaks off, and goes on where it was
            outcome = cloud.outcome_of(announce(cloud, web, 5, said))
            assert (outcome.state, outcome.reason, outcome.model) == ("done", "", model.hex())
            cloud.wait(lambda: cloud.statuses["device-1"][-1].model_name == "second")
            assert web.ranges == ["", "bytes=1000-"]
            states = {one.model: one.state for one in ModelStore(config).installed()}
            assert states == {"configured": "previous", model.hex(): "active"}
        with running(config):  # it runs after a restart, and the retained order is answered as before
            cloud.wait(lambda: cloud.statuses["device-1"][-1].model_name == "second")
            cloud.wait(lambda: [one.state for one in cloud.outcomes].count("done") >= 2)
            assert len(web.ranges) == 2
            back = cloud.outcome_of(command(cloud, web, 6, "rollback"))
            assert back.state == "done"
            cloud.wait(lambda: cloud.statuses["device-1"][-1].model_name == "tiny")
            again = cloud.outcome_of(command(cloud, web, 7, "rollback"))
            assert (again.state, ModelStore(config).active.model) == ("done", model.hex())
    assert_none_twice(tmp_path)


def test_a_command_within_a_trial_leaves_both_their_outcomes(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, web: HttpsCloud
) -> None:
    config = settings(tmp_path, mosquitto, tiny_bundle, web, trial_s=600.0)
    model = newer(tiny_bundle, tmp_path / "second.bundle")
    with cloud_at(mosquitto) as cloud:
        with running(config) as reports:
            bundle = announce(cloud, web, 1, publish(web, tmp_path / "second.bundle", model))
            cloud.wait(
                lambda: "device-1" in cloud.statuses and cloud.statuses["device-1"][-1].model_name == "second"
            )
            setting = command(cloud, web, 2, "configure", **{"link.status_s": 2.5})
            assert cloud.outcome_of(setting).state == "done"
            cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")
        assert reports[0].restart
        assert ModelStore(config).active.trial is not None
        shorter = msgspec.structs.replace(config.update, trial_s=1.0)
        with running(
            msgspec.structs.replace(config, update=shorter)
        ):  # and the retained announcement comes again
            outcome = cloud.outcome_of(bundle)
            assert (outcome.state, outcome.model) == ("done", model.hex())
    states = {(one.of, one.state) for one in cloud.outcomes}
    assert states == {(one, state) for one in (bundle, setting) for state in ("accepted", "done")}


def test_part_of_a_file_is_kept_until_another_is_announced(tmp_path: Path) -> None:
    config = EdgeConfig(device=DeviceConfig(state_dir=str(tmp_path)), update=UpdateConfig(fetch_tries=1))
    staging = ModelStore(config).staging
    staging.mkdir(parents=True)
    first, second, by_hand = f"{'ab' * 32}.bundle", f"{'cd' * 32}.bundle", "file.bundle"
    for name in (first, second, by_hand):
        (staging / name).write_bytes(b"part")
    url = "https://127.0.0.1:1/bundle"
    report = install(InstallRequest(config=config, url=url, sha256="cd" * 32, size=1000, model="0f" * 16))
    assert report.reason == "unreachable"
    assert sorted(path.name for path in staging.iterdir()) == [second, by_hand]


BAD = {
    "tampered": "bad_hash",
    "truncated": "wrong_hash",
    "unsigned": "unsigned",
    "foreign": "bad_signature",
    "wrong_board": "no_variant",
    "older": "older",
    "wrong_model": "wrong_model",
    "golden": "golden_mismatch",
    "not_there": "http_404",
    "plain_http": "bad_url",
    "oversize": "oversize",
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_bundle_is_refused_with_its_reason(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, web: HttpsCloud, fault: str
) -> None:
    config = settings(tmp_path, mosquitto, tiny_bundle, web)
    path = tmp_path / "bad.bundle"
    model = newer(tiny_bundle, path)
    if fault == "wrong_board":
        model = newer(tiny_bundle, path, client={"tflite-int8": "client.tflite"})
    elif fault == "older":
        model = newer(tiny_bundle, path, created_at="2025-01-01T00:00:00Z")
    elif fault == "foreign":
        write_bundle(path, tiny_bundle.manifest, tiny_bundle.files, Ed25519PrivateKey.generate())
    elif fault == "golden":
        model = newer_with(tiny_bundle, path)
    data = path.read_bytes()
    if fault == "tampered":
        path.write_bytes(tamper(path))
    elif fault == "unsigned":
        path.write_bytes(without_signature(path))
    said = publish(web, path, model)
    if fault == "truncated":
        web.files[model.hex()] = data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    elif fault == "wrong_model":
        said["model"], web.files["ab" * 16] = "ab" * 16, data
        said["url"] = said["url"].replace(model.hex(), "ab" * 16)
    elif fault == "not_there":
        web.files.clear()
    elif fault == "plain_http":
        said["url"] = said["url"].replace("https:", "http:")
    elif fault == "oversize":
        said["size"] = 1 << 40
    with cloud_at(mosquitto) as cloud, running(config):
        outcome = cloud.outcome_of(announce(cloud, web, 1, said))
        assert outcome.reason == BAD[fault]
        assert outcome.state == ("failed" if fault == "not_there" else "refused")
        cloud.wait(lambda: len(cloud.answers) > 5)  # the one that runs goes on
        cloud.wait(lambda: cloud.statuses["device-1"][-1].model_name == "tiny")
        assert not list((Path(config.device.state_dir) / "models").glob("*.bundle"))


def newer_with(tiny: Any, path: Path) -> bytes:
    import io

    file = io.BytesIO()
    np.save(file, np.zeros((2, 8, 8), np.float32))
    made = tiny.rewrite(path, {"golden-activation.npy": file.getvalue()}, created_at="2026-02-01T00:00:00Z")
    return read_bundle(made.path, read_trusted_key(tiny.trusted_key)).model


def tamper(path: Path) -> bytes:
    """The bundle with another file in the place of one that was signed, the zip itself sound."""
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:-1] + bytes([data[-1] ^ 1]) if name == "client.onnx" else data)
    return out.getvalue()


def without_signature(path: Path) -> bytes:
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            if name != "manifest.sig":
                target.writestr(name, source.read(name))
    return out.getvalue()


def test_a_bundle_whose_frames_fail_is_rolled_back(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, web: HttpsCloud
) -> None:
    """Although frames of the bundle before it are answered well while it is started."""
    config = settings(tmp_path, mosquitto, tiny_bundle, web, trial_s=60.0)
    model = newer(tiny_bundle, tmp_path / "unserved.bundle")
    withheld: list[Activation] = []

    def ignore(one: Activation, _copies: int) -> bool:
        if one.model == model:
            return False
        withheld.append(one)
        return True

    def answer_late() -> None:
        until_s = time.monotonic() + TIMEOUT_S
        while ModelStore(config).active.trial is None and time.monotonic() < until_s:
            time.sleep(0.01)
        for one in withheld:
            cloud.answer(one)
            time.sleep(0.05)

    with cloud_at(mosquitto) as cloud, running(config):
        cloud.ignore = ignore
        cloud.judge = lambda one: "unknown_model" if one.model == model else None
        late = threading.Thread(target=answer_late, daemon=True)
        late.start()
        cloud.wait(lambda: len(withheld) >= 10)
        outcome = cloud.outcome_of(announce(cloud, web, 1, publish(web, tmp_path / "unserved.bundle", model)))
        assert (outcome.state, outcome.reason) == ("rolled_back", "frames_fail")
        cloud.wait(lambda: cloud.statuses["device-1"][-1].model_name == "tiny")
        assert ModelStore(config).active.model == ""
        late.join(TIMEOUT_S)


def test_a_bundle_that_is_gone_within_its_trial_is_rolled_back_to_the_one_before(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, web: HttpsCloud
) -> None:
    config = settings(tmp_path, mosquitto, tiny_bundle, web)
    models = ModelStore(config)
    for name in ("second", "third"):
        bundle = tiny_bundle.rewrite(tmp_path / name, name=name)
        model = read_bundle(bundle.path, read_trusted_key(bundle.trusted_key)).model.hex()
        models.take(bundle.path, model)
        models.activate(model)
        if name == "second":
            models.accept()
    models.path().unlink()
    with cloud_at(mosquitto) as cloud, running(config):
        cloud.wait(
            lambda: "device-1" in cloud.statuses and cloud.statuses["device-1"][-1].model_name == "second"
        )


def test_a_bundle_that_crashes_the_releaser_is_rolled_back(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, web: HttpsCloud, monkeypatch: Any
) -> None:
    """The seam is the probe, which such a bundle would not pass: its file is replaced after that."""
    config = settings(tmp_path, mosquitto, tiny_bundle, web, trial_s=60.0)
    model = newer(tiny_bundle, tmp_path / "second.bundle")

    def install_and_spoil(request: InstallRequest, _started: Any) -> Any:
        report = install(request)
        ModelStore(config).path(report.model).write_bytes(b"no bundle any more")
        return report

    monkeypatch.setattr("edge.installation.install_apart", install_and_spoil)
    with cloud_at(mosquitto) as cloud, running(config):
        outcome = cloud.outcome_of(announce(cloud, web, 1, publish(web, tmp_path / "second.bundle", model)))
        assert (outcome.state, outcome.reason) == ("rolled_back", "unreadable")
        cloud.wait(lambda: cloud.statuses["device-1"][-1].model_name == "tiny")


def test_a_bundle_that_kills_the_probe_is_refused(tmp_path: Path, tiny_bundle: Any, monkeypatch: Any) -> None:
    config = EdgeConfig()
    config = msgspec.structs.replace(
        config,
        device=msgspec.structs.replace(
            config.device,
            state_dir=str(tmp_path / "state"),
            bundle=str(tiny_bundle.path),
            trusted_key=str(tiny_bundle.trusted_key),
        ),
    )
    for number, reason in ((11, "probe_crashed"), (14, "probe_hung")):
        monkeypatch.setattr("sys.executable", write_dying(tmp_path / "python", number))
        report = install_apart(InstallRequest(config=config, path=str(tiny_bundle.path)))
        assert report.reason == reason
        monkeypatch.undo()
    assert install_apart(InstallRequest(config=config, path=str(tiny_bundle.path))).reason == ""


def write_dying(path: Path, number: int) -> str:
    """A program in the interpreter's place that dies as a crashing runtime does."""
    path.write_text(f"#!/bin/sh\nkill -{number} $$\n")
    path.chmod(0o755)
    return str(path)


class PowerCut(BaseException):
    """Ends everything at once."""


def test_a_power_cut_at_each_step_leaves_a_working_model(
    tmp_path: Path, tiny_bundle: Any, monkeypatch: Any
) -> None:
    model = newer(tiny_bundle, tmp_path / "second.bundle").hex()
    trusted = read_trusted_key(tiny_bundle.trusted_key)
    real = (os.replace, os.fsync, Path.replace)
    cuts = 0
    for step in range(100):
        state = tmp_path / f"state-{step}"
        config = EdgeConfig()
        config = msgspec.structs.replace(
            config,
            device=msgspec.structs.replace(
                config.device,
                state_dir=str(state),
                bundle=str(tiny_bundle.path),
                trusted_key=str(tiny_bundle.trusted_key),
            ),
        )
        left = [step]

        def count(inner: Any, left: list[int] = left) -> Any:
            def call(*arguments: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise PowerCut
                return inner(*arguments)

            return call

        monkeypatch.setattr(os, "fsync", count(real[1]))
        monkeypatch.setattr(Path, "replace", count(real[2]))
        try:
            store = ModelStore(config)
            assert install(InstallRequest(config=config, path=str(tmp_path / "second.bundle"))).reason == ""
            store.activate(model, "order")
            store.note_start()
            store.accept()
            store.roll_back()
            store.roll_back()
            finished = True
        except PowerCut:
            finished = False
            cuts += 1
        finally:
            monkeypatch.undo()
        after = ModelStore(config)
        assert read_bundle(after.path(), trusted).manifest.name in ("tiny", "second")
        if finished:
            break
    assert cuts > 10


def test_orders_that_are_not_the_clouds_or_come_again_are_not_followed(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, web: HttpsCloud
) -> None:
    config = settings(tmp_path, mosquitto, tiny_bundle, web)
    with cloud_at(mosquitto) as cloud, running(config):
        cloud.wait(lambda: "device-1" in cloud.statuses)
        forged = Command(id="f" * 32, serial=99, site="demo", device="device-1", name="restart")
        cloud.order(forged, Ed25519PrivateKey.generate())
        refused = cloud.outcome_of(command(cloud, web, 10, "configure", **{"broker.host": "evil.example.org"}))
        assert (refused.state, refused.reason) == ("refused", "bad_setting")
        again = cloud.outcome_of(command(cloud, web, 11, "configure", **{"runtime.threads": 2}))
        assert (again.state, again.reason) == ("refused", "bad_setting")
        assert "'runtime.threads' may not be changed from afar" in again.message
        assert not (Path(config.device.state_dir) / "remote.json").exists()
        old = cloud.outcome_of(command(cloud, web, 9, "restart"))
        assert (old.state, old.reason) == ("refused", "old_order")
        collected = cloud.outcome_of(command(cloud, web, 12, "diagnostics"))
        assert collected.state == "done"
        assert list((Path(config.device.state_dir) / "diagnostics").glob("*.tar.gz"))
        cloud.wait(lambda: cloud.statuses["device-1"][-1].health.get("orders_refused:bad_signature") == 1)
        assert not [one for one in cloud.outcomes if one.of == forged.id]


def test_a_setting_is_changed_by_order_and_kept(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, web: HttpsCloud
) -> None:
    config = settings(tmp_path, mosquitto, tiny_bundle, web)
    path = tmp_path / "edge.toml"
    path.write_text(to_toml(config))
    with cloud_at(mosquitto) as cloud:
        with running(config) as reports:
            cloud.wait(lambda: "device-1" in cloud.statuses)
            order = command(cloud, web, 1, "configure", **{"link.status_s": 2.5, "capture.rate_hz": 50.0})
            assert cloud.outcome_of(order).state == "done"
            cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")
        assert reports[0].restart
    changed = load_settings(path, {})
    assert (changed.link.status_s, changed.capture.rate_hz) == (2.5, 50.0)
    assert load_settings(path, {"SPLITWARD_EDGE__LINK__STATUS_S": "7.0"}).link.status_s == 7.0


def test_a_bundle_on_trial_is_not_gone_back_to(tmp_path: Path) -> None:
    configured = tmp_path / "configured.bundle"
    configured.touch()
    device = msgspec.structs.replace(
        EdgeConfig().device, state_dir=str(tmp_path / "state"), bundle=str(configured)
    )
    models = ModelStore(EdgeConfig(device=device))

    def try_out(model: str) -> None:
        (tmp_path / model).touch()
        models.take(tmp_path / model, model)
        models.activate(model)
        models.note_start()

    try_out("a")
    models.accept()
    try_out("b")
    try_out("c")
    assert models.roll_back() == "a"
    try_out("b")
    try_out("a")  # announced again, before b has proved itself
    assert models.roll_back() == ""
    assert models.path() == configured


def test_going_back_needs_something_to_go_back_to(tmp_path: Path) -> None:
    config = EdgeConfig()
    device = msgspec.structs.replace(config.device, state_dir=str(tmp_path))
    with pytest.raises(UpdateError, match="no bundle was installed") as caught:
        ModelStore(msgspec.structs.replace(config, device=device)).roll_back()
    assert caught.value.reason == "no_previous"
