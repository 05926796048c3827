"""The agent against real brokers, and a cloud that answers from memory as the real one does from its store."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.agent import AgentReport, run_agent
from edge.config import (
    BrokerConfig,
    CaptureConfig,
    RuntimeConfig,
    SpoolConfig,
)
from edge.results import read_results
from firmware_sim.broker import Broker, free_port
from firmware_sim.fleet import FleetConfig, run_fleet
from splitward.errors import BundleError
from splitward.wire.bundle import read_bundle, read_trusted_key
from splitward.wire.control import Status
from splitward.wire.server import ServerCard, write_server_card
from tests.integration.cloud_double import (
    LINK,
    TIMEOUT_S,
    assert_each_once,
    cloud_at,
    configure,
    read_answers,
    running,
    start_process,
    write_frames,
)


@pytest.fixture(params=["mosquitto", "embedded_broker"])
def broker(request: pytest.FixtureRequest) -> Broker:
    found: Broker = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_every_frame_is_answered(tmp_path: Path, broker: Broker, tiny_bundle: Any, backend: Any) -> None:
    link = msgspec.structs.replace(LINK, retry_s=TIMEOUT_S)  # however late an answer is, nothing is sent again
    config = configure(tmp_path, broker, tiny_bundle, 200, runtime=RuntimeConfig(backend=backend), link=link)
    with cloud_at(broker) as cloud:
        report = run_agent(config, until_answered=True)
        cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")
    assert (report.captured, report.sent, report.results, report.queued) == (200, 200, 200, 0)
    assert report.dropped == {}
    assert_each_once(tmp_path, 200)
    line = next(read_results(tmp_path / "results.jsonl"))
    assert line["class_name"] == "yes"
    assert 0 < line["latency_ms"] < 60_000
    assert line["payload_bytes"] > 128
    assert cloud.statuses["device-1"][-1].results == 200


def test_a_second_start_captures_nothing_again(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 20)
    with cloud_at(mosquitto):
        assert run_agent(config, until_answered=True).captured == 20
        assert run_agent(config, until_answered=True).captured == 0
    assert_each_once(tmp_path, 20)


def test_a_broker_that_restarts_loses_nothing(tmp_path: Path, broker: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, broker, tiny_bundle, 200, capture=CaptureConfig(rate_hz=200))
    with cloud_at(broker) as cloud, running(config, until_answered=True) as reports:
        cloud.wait(lambda: len(cloud.answers) > 50)
        broker.stop()
        broker.start()
    assert reports[0].results == 200
    assert_each_once(tmp_path, 200)
    assert len(cloud.answers) == 200


@pytest.mark.parametrize("deaf", [False, True], ids=["answered", "unanswered"])
def test_a_killed_agent_goes_on_where_it_was(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, deaf: bool
) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 200, capture=CaptureConfig(rate_hz=300))
    with cloud_at(mosquitto) as cloud:
        cloud.deaf = deaf
        process = start_process(config, tmp_path)
        cloud.wait(lambda: len(cloud.received) >= (16 if deaf else 50))
        process.kill()
        process.communicate()
        cloud.deaf = False
        second = start_process(config, tmp_path, "--until-answered")
        output, _ = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 0
    assert json.loads(output)["queued"] == 0
    assert_each_once(tmp_path, 200)
    assert len(cloud.answers) == 200
    assert len({boot for _, boot, _ in cloud.answers}) == 2


def test_sigterm_stops_the_agent_and_says_farewell(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 10)
    with cloud_at(mosquitto) as cloud:
        process = start_process(config, tmp_path)
        cloud.wait(lambda: len(cloud.answers) == 10)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")
        assert cloud.statuses["device-1"][-1].captured == 10
    assert process.returncode == 0
    assert json.loads(output)["captured"] == 10


def test_the_last_will_says_offline(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 10)
    with cloud_at(mosquitto) as cloud:
        process = start_process(config, tmp_path)
        cloud.wait(lambda: len(cloud.answers) == 10)
        process.kill()
        process.communicate()
        cloud.wait(lambda: cloud.statuses["device-1"][-1].state == "offline")


def test_refused_frames_are_dropped_and_counted(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = configure(tmp_path, mosquitto, tiny_bundle, 40)
    with cloud_at(mosquitto) as cloud:
        cloud.judge = lambda activation: "wrong_model" if activation.sequence % 4 == 0 else None
        report = run_agent(config, until_answered=True)
    assert (report.results, report.queued) == (30, 0)
    assert report.dropped == {"refused:wrong_model": 10}
    kinds = [line["type"] for line in read_results(tmp_path / "results.jsonl")]
    assert (kinds.count("result"), kinds.count("refusal")) == (30, 10)


def test_a_frame_without_an_answer_is_sent_again_and_holds_up_nobody(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    link = msgspec.structs.replace(LINK, window=2, retry_s=0.3)
    config = configure(tmp_path, mosquitto, tiny_bundle, 30, link=link)
    with cloud_at(mosquitto) as cloud:
        cloud.ignore = lambda activation, copies: activation.sequence < 2 and copies < 3
        report = run_agent(config, until_answered=True)
    assert report.results == 30
    # More often where an answer is later than `retry_s`.
    assert all(cloud.received.count(("device-1", report.boot, sequence)) >= 3 for sequence in range(2))
    assert report.sent >= 34


@pytest.mark.parametrize("drop", ["oldest", "newest"])
def test_a_full_spool_drops_by_its_policy(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any, drop: Any
) -> None:
    spool = SpoolConfig(max_bytes=10 * 230, drop=drop)
    config = configure(tmp_path, mosquitto, tiny_bundle, 50, spool=spool, capture=CaptureConfig(real_time=True))
    with cloud_at(mosquitto) as cloud:
        cloud.deaf = True
        stop = threading.Event()
        reports: list[AgentReport] = []
        thread = threading.Thread(target=lambda: reports.append(run_agent(config, stop=stop)))
        thread.start()
        cloud.wait(lambda: sum(cloud.statuses.get("device-1", [Status("offline")])[-1].dropped.values()) >= 40)
        stop.set()
        thread.join(TIMEOUT_S)
        assert reports[0].dropped == {"spool_full": 40}
        assert reports[0].queued == 10
        cloud.deaf = False
        assert run_agent(config, until_answered=True).results == 10
    kept = sorted(read_answers(tmp_path))
    assert kept == [f"frame-{index:06d}" for index in (range(40, 50) if drop == "oldest" else range(10))]


def test_a_tampered_bundle_is_refused(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    tampered = tmp_path / "tampered.bundle"
    data = bytearray(tiny_bundle.path.read_bytes())
    data[len(data) // 2] ^= 1
    tampered.write_bytes(data)
    config = configure(tmp_path, mosquitto, tiny_bundle, 1)
    config = msgspec.structs.replace(
        config, device=msgspec.structs.replace(config.device, bundle=str(tampered))
    )
    with pytest.raises(BundleError):
        run_agent(config, until_answered=True)
    process = start_process(config, tmp_path)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2


def test_a_fleet_loses_nothing(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    config = FleetConfig(
        devices=3,
        frames=str(write_frames(tmp_path / "frames.npz", 31)),
        variants=("onnx-float32", "onnx-int8", "tflite-int8"),
        bundle=str(tiny_bundle.path),
        trusted_key=str(tiny_bundle.trusted_key),
        folder=str(tmp_path / "fleet"),
        broker=BrokerConfig(host=mosquitto.host, port=mosquitto.port),
        timeout_s=TIMEOUT_S,
    )
    with cloud_at(mosquitto):
        report = run_fleet(config)
    assert report.complete
    assert [one.frames for one in report.devices] == [11, 10, 10]
    assert [one.variant for one in report.devices] == list(config.variants)
    assert sum(one.results for one in report.devices) == 31
    assert (tmp_path / "fleet" / "device-1" / "state" / "secret").stat().st_mode & 0o777 == 0o600


def test_a_fleet_that_runs_again_reports_nothing_of_the_run_before(
    tmp_path: Path, mosquitto: Broker, tiny_bundle: Any
) -> None:
    config = FleetConfig(
        devices=1,
        frames=str(write_frames(tmp_path / "frames.npz", 5)),
        bundle=str(tiny_bundle.path),
        trusted_key=str(tiny_bundle.trusted_key),
        folder=str(tmp_path / "fleet"),
        broker=BrokerConfig(host=mosquitto.host, port=mosquitto.port),
        timeout_s=TIMEOUT_S,
    )
    with cloud_at(mosquitto) as cloud:
        for run in (1, 2):
            report = run_fleet(config)
            assert report.complete
            assert (report.devices[0].results, len(cloud.answers)) == (5, 5 * run)
    away = BrokerConfig(host=mosquitto.host, port=free_port())
    report = run_fleet(msgspec.structs.replace(config, broker=away, timeout_s=5.0))
    assert not report.complete
    (device,) = report.devices
    assert (device.results, device.lost, device.latency_p50_ms) == (0, 5, None)


def test_hundreds_of_light_devices_are_answered(tmp_path: Path, mosquitto: Broker, tiny_bundle: Any) -> None:
    from firmware_sim.load import LoadConfig, run_load

    model = read_bundle(tiny_bundle.path, read_trusted_key(tiny_bundle.trusted_key)).model.hex()
    (tmp_path / "weights").touch()
    nothing = hashlib.sha256().hexdigest()
    card = ServerCard(1, model, "tiny", ("no", "yes"), tiny_bundle.manifest.release, {}, "weights", nothing)
    write_server_card(tmp_path / "tiny.server.json", card)
    config = LoadConfig(
        card=str(tmp_path / "tiny.server.json"), devices=100, frames=500, rate_hz=500.0, port=mosquitto.port
    )
    with cloud_at(mosquitto) as cloud:
        report = run_load(config)
        assert report.complete
        assert (report.frames, report.results, report.lost) == (500, 500, 0)
        assert len(cloud.answers) == 500
        assert len({device for device, _, _ in cloud.answers}) == 100
