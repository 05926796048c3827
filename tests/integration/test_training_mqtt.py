"""Sites train with the cloud over a real broker that is killed on the way: the bits of one process."""

from __future__ import annotations

import contextlib
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from paho.mqtt.client import Client as Mqtt
from paho.mqtt.client import MQTTMessageInfo

from export.exporter import export_run
from firmware_sim.broker import Broker as SimulatedBroker
from firmware_sim.broker import free_port
from splitward.data import open_dataset, phantom
from splitward.data.partition import partition
from splitward.errors import TrainingError
from splitward.training.remote.carrier import Broker, run_client, run_server
from splitward.training.remote.client import Client
from splitward.training.remote.halves import Exchange, ServerTrainer, Taken
from splitward.training.remote.plan import Plan
from splitward.training.remote.server import Server
from splitward.training.remote.site import coordinate
from splitward.training.remote.state import state_of
from splitward.training.remote.together import run_together
from splitward.training.run import open_run
from splitward.training.settings import RunSettings, frame_settings, split_settings
from splitward.wire.bundle import create_signing_key

TRAINING = bytes(range(16))
JOIN_S = 240.0
ANSWERING = "splitward.training.remote.site.ANSWERING_S"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitward.training.remote.carrier.RETRY_S", 0.5)


def test_sites_train_over_a_broker_that_is_killed(tmp_path: Path, mosquitto: SimulatedBroker) -> None:
    dataset = phantom.load("mass", 28, seed=0, count=240)
    parts = partition(dataset.train, 2, least=16)
    settings = RunSettings(
        "phantom", None, 28, split_settings(dataset, "sealed"), epochs=2, batch=8, shift=1, seed=3
    )
    plan = Plan(settings, "turn", 2, rounds=2)  # one after the other: the order of steps is that of one process

    def client_of(number: int, **more: Any) -> Client:
        return Client(
            f"site-{number}", TRAINING, parts[number], settings.split, repeatable=True, guard=None, **more
        )

    alone = [client_of(number) for number in range(2)]
    run_together(Server(plan, TRAINING), alone)
    wanted = state_of(alone[0].course._active, optimisers=False)

    broker = Broker(mosquitto.host, mosquitto.port)
    server = Server(plan, TRAINING, tmp_path / "server")
    clients = [client_of(number, folder=tmp_path / f"site-{number}") for number in range(2)]
    threads = [threading.Thread(target=run_server, args=({TRAINING: server}, broker), daemon=True)]
    threads += [
        threading.Thread(target=run_client, args=(client, "ward", broker), daemon=True) for client in clients
    ]
    for thread in threads:
        thread.start()
    for handled in (15, 30):
        while server.session.handled < handled and threads[0].is_alive():
            threads[0].join(0.02)
        mosquitto.stop()
        mosquitto.start()
    for thread in threads:
        thread.join(JOIN_S)
        assert not thread.is_alive()
    assert server.finished
    for client in clients:
        found = state_of(client.course._active, optimisers=False)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert client.course.place.skipped == 0


def test_a_broker_that_is_away_or_none_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """On standard error, where warnings go as long as nothing else was set up."""
    plan = Plan(RunSettings("", None, None, frame_settings(1, 8, 2, "none"), epochs=1))
    servers = {TRAINING: Server(plan, TRAINING)}

    def serve(port: int, said: str) -> None:
        due_s = time.monotonic() + JOIN_S
        run_server(servers, Broker(port=port), lambda: said not in caplog.text and time.monotonic() < due_s)
        assert f"broker 127.0.0.1:{port}: {said}" in caplog.text

    serve(free_port(), "cannot be reached ([Errno 111] Connection refused); trying again")
    with socket.create_server(("127.0.0.1", 0)) as other:
        hanging_up = threading.Thread(target=lambda: other.accept()[0].close(), daemon=True)
        hanging_up.start()
        serve(other.getsockname()[1], "the connection has ended")


def test_a_request_waits_once_while_the_broker_is_away_and_is_asked_again_when_it_was_lost(
    mosquitto: SimulatedBroker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitward.training.remote.carrier.TICK_S", 0.01)
    monkeypatch.setattr("splitward.training.remote.carrier.RETRY_S", 0.01)
    published: list[MQTTMessageInfo] = []
    publish = Mqtt.publish

    def counted(self: Mqtt, *arguments: Any, **options: Any) -> MQTTMessageInfo:
        published.append(publish(self, *arguments, **options))
        return published[-1]

    monkeypatch.setattr(Mqtt, "publish", counted)
    dataset = phantom.load("mass", 28, seed=0, count=60)
    settings = RunSettings("phantom", None, 28, split_settings(dataset, "none"), epochs=1, batch=64, seed=3)
    client = Client("site-0", TRAINING, dataset.train, settings.split, guard=None)
    broker, due_s = Broker(mosquitto.host, mosquitto.port), time.monotonic() + JOIN_S
    mosquitto.stop()
    going = threading.Thread(target=run_client, args=(client, "ward", broker), daemon=True)
    going.start()
    while caplog.text.count("cannot be reached") < 2 and time.monotonic() < due_s:
        going.join(0.02)
    assert len(published) == 1
    mosquitto.start()
    while len(published) < 3 and time.monotonic() < due_s:  # the broker had it, and nobody was there to answer
        going.join(0.02)
    assert published[0]._published
    run_server({TRAINING: Server(Plan(settings), TRAINING)}, broker)
    going.join(JOIN_S)
    assert not going.is_alive()
    assert client.course.server_half is not None


def test_a_silent_site_is_left_out(tmp_path: Path, mosquitto: SimulatedBroker) -> None:
    dataset = phantom.load("mass", 28, seed=0, count=240)
    parts = partition(dataset.train, 2, least=16)
    settings = RunSettings("phantom", None, 28, split_settings(dataset, "none"), epochs=1, batch=8, seed=3)
    plan = replace(Plan(settings, "splitfed-v2", 2, rounds=2), silence_s=1.0)
    broker, server = Broker(mosquitto.host, mosquitto.port), Server(plan, TRAINING)
    clients = [Client(f"site-{n}", TRAINING, part, settings.split, guard=None) for n, part in enumerate(parts)]
    stop, silent = threading.Event(), threading.Event()
    serving = threading.Thread(
        target=run_server, args=({TRAINING: server}, broker, lambda: not stop.is_set()), daemon=True
    )
    going = threading.Thread(target=run_client, args=(clients[0], "ward", broker), daemon=True)
    leaving = threading.Thread(target=run_client, args=(clients[1], "ward", broker, silent), daemon=True)
    for thread in (serving, going, leaving):
        thread.start()
    while len(server.session.members) < 2:
        going.join(0.02)
    silent.set()
    leaving.join(JOIN_S)
    going.join(JOIN_S)
    assert clients[0].course.server_half is not None
    assert server.session.drops >= 1
    stop.set()
    serving.join(JOIN_S)


def deliver(server: Server, clients: dict[str, Client], name: str) -> None:
    """One exchange of a client with the cloud, without a broker."""
    for to, reply in server.handle(name, clients[name].request or b""):
        clients[to].take(reply)


def test_a_cloud_that_was_started_again_leaves_a_silent_site_out(
    tmp_path: Path, mosquitto: SimulatedBroker
) -> None:
    """Whoever waits for the silent one has not been heard since the start either, so where it is is not known."""
    dataset = phantom.load("mass", 28, seed=0, count=240)
    parts = partition(dataset.train, 2, least=16)
    settings = RunSettings("phantom", None, 28, split_settings(dataset, "none"), epochs=1, batch=64, seed=3)
    plan = Plan(settings, "splitfed-v2", 2, rounds=2, silence_s=0.3)
    server = Server(plan, TRAINING, tmp_path)
    clients = {
        f"site-{n}": Client(f"site-{n}", TRAINING, part, settings.split, guard=None)
        for n, part in enumerate(parts)
    }
    for name in clients:
        deliver(server, clients, name)  # both have joined, and one goes through its first round
    while server.session.members["site-0"].request is None:
        deliver(server, clients, "site-0")
    server.close()
    server = Server(plan, TRAINING, tmp_path)
    assert server.awaited() == {"site-1"}
    run_server({TRAINING: server}, Broker(mosquitto.host, mosquitto.port), lambda: not server.session.drops)
    assert server.session.round == 1
    server.close()


def test_a_site_that_lost_the_last_answer_is_told_when_the_coordinator_is_started_again(
    tmp_path: Path, mosquitto: SimulatedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ANSWERING, JOIN_S)
    dataset = phantom.load("mass", 28, seed=0, count=60)
    settings = RunSettings("phantom", None, 28, split_settings(dataset, "none"), epochs=1, batch=64, seed=3)
    plan, broker = Plan(settings), Broker(mosquitto.host, mosquitto.port)
    asking: list[threading.Thread] = []

    def ask_again(client: Client) -> None:
        run_client(client, "ward", broker)
        monkeypatch.setattr(ANSWERING, 0.0)  # nobody is left to ask

    def go_through_it(training: str) -> None:
        client = Client("site-0", bytes.fromhex(training), dataset.train, settings.split, guard=None)
        server = Server(plan, client.training, tmp_path / "journal")
        while not server.finished:
            ((_, answer),) = server.handle("site-0", client.request or b"")
            if not server.finished:
                client.take(answer)
        server.close()
        asking.append(threading.Thread(target=ask_again, args=(client,), daemon=True))
        asking[0].start()

    coordinate(plan, tmp_path, broker, go_through_it)
    asking[0].join(JOIN_S)
    assert not asking[0].is_alive()


def test_a_training_that_diverges_ends_and_every_site_is_told(
    tmp_path: Path, mosquitto: SimulatedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ANSWERING, JOIN_S)
    steps = []

    def take(trainer: ServerTrainer, sent: Exchange) -> Taken:
        steps.append(sent.step)
        return Taken(torch.zeros_like(sent.released), math.nan if len(steps) > 3 else 1.0, 0)

    monkeypatch.setattr(ServerTrainer, "take", take)
    dataset = phantom.load("mass", 28, seed=0, count=240)
    parts = partition(dataset.train, 2, least=16)
    split = split_settings(dataset, "none")
    plan = Plan(RunSettings("phantom", None, 28, split, epochs=9, batch=8), "splitfed-v2", 2)
    broker, said = Broker(mosquitto.host, mosquitto.port), []

    def take_part(number: int, training: bytes) -> None:
        client = Client(f"site-{number}", training, parts[number], split, guard=None)
        try:
            run_client(client, "ward", broker)
        except TrainingError as error:
            said.append(str(error))
            if len(said) == 2:
                monkeypatch.setattr(ANSWERING, 0.0)  # nobody is left to tell

    sites: list[threading.Thread] = []

    def begin(training: str) -> None:
        for number in range(2):
            sites.append(
                threading.Thread(target=take_part, args=(number, bytes.fromhex(training)), daemon=True)
            )
            sites[-1].start()

    with pytest.raises(TrainingError, match="diverged"):
        coordinate(plan, tmp_path / "lead", broker, begin)
    for site in sites:
        site.join(JOIN_S)
    assert len(said) == 2
    assert all("diverged" in one for one in said)


@pytest.mark.slow
def test_two_sites_and_a_coordinator_by_their_commands(tmp_path: Path, mosquitto: SimulatedBroker) -> None:
    """Each a process of its own; what they end with is a run like any other, and can be exported."""
    broker = f"127.0.0.1:{mosquitto.port}"
    about = ["--data", "phantom", "--size", "28", "--defence", "sealed"]
    schedule = ["--sites", "2", "--rounds", "2", "--epochs", "1", "--batch", "32", "--precision", "int8"]
    command = [sys.executable, "-m", "splitward.cli"]
    leading = subprocess.Popen(
        [*command, "coordinate", *about, *schedule, "--broker", broker, "--out", str(tmp_path / "cloud")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert leading.stdout is not None
    training = leading.stdout.readline().rsplit(None, 1)[-1]
    sites = [
        subprocess.Popen(
            [
                *(
                    *command,
                    "train",
                    *about,
                    "--over",
                    "mqtt",
                    "--training",
                    training,
                    "--device",
                    f"site-{number}",
                ),
                *("--broker", broker, "--out", str(tmp_path / f"run-{number}"), "--no-guard"),
            ]
        )
        for number in range(2)
    ]
    assert [site.wait(JOIN_S) for site in sites] == [0, 0]
    assert leading.wait(JOIN_S) == 0
    leading.stdout.close()
    runs = [open_run(tmp_path / f"run-{number}") for number in range(2)]
    first, second = (run.load_network().client.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert runs[0].read_metrics()[0]["epoch"] == 1
    assert runs[0].read_metrics()[-1]["final"]
    dataset = open_dataset("phantom", size=28)
    export_run(runs[0], dataset, tmp_path / "out.bundle", create_signing_key(tmp_path / "signing.key"))
    assert (tmp_path / "out.bundle").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_devices_take_part_in_a_training_of_the_service(tmp_path: Path, mosquitto: SimulatedBroker) -> None:
    """Made over the API, led by the service's process, which is killed on the way; devices come by `edge train`."""
    broker, port = f"port = {mosquitto.port}", free_port()
    config = tmp_path / "cloud.toml"
    config.write_text(
        f"models = []\n[broker]\n{broker}\n[api]\nport = {port}\nrequire_token = false\n[store]\n"
        f'url = "sqlite+aiosqlite:///{tmp_path}/cloud.db"\n[fleet]\nstate_dir = "{tmp_path}/fleet"\n'
    )
    url = f"http://127.0.0.1:{port}"
    asked = {"name": "mass", "channels": 1, "side": 28, "classes": 2, "sites": 2, "rounds": 4}

    def start_service() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "cloud", "--config", str(config)])

    def ask(path: str, condition: Callable[[Any], bool]) -> Any:
        due_s = time.monotonic() + JOIN_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                found = httpx.get(f"{url}{path}").json()
                if condition(found):
                    return found
            assert time.monotonic() < due_s, found
            time.sleep(0.1)

    service, devices = start_service(), []
    try:
        ask("/healthz", bool)
        training = httpx.post(f"{url}/v1/trainings", json=asked | {"epochs": 2, "batch": 32}).json()["id"]
        for number in range(2):
            settings = tmp_path / f"edge-{number}.toml"
            settings.write_text(f'[device]\nid = "pi-{number}"\nsite = "ward"\n[broker]\n{broker}\n')
            about = ["--data", "phantom", "--size", "28", "--out", str(tmp_path / f"run-{number}")]
            command = [sys.executable, "-m", "edge", "train", "--config", str(settings), "--training", training]
            devices.append(subprocess.Popen([*command, *about]))
        ask(f"/v1/trainings/{training}", lambda found: found["progress"].get("round", 0) >= 1)
        service.kill()
        service.wait()
        service = start_service()
        assert [device.wait(JOIN_S) for device in devices] == [0, 0]
        found = ask(f"/v1/trainings/{training}", lambda found: found["state"] == "done")
    finally:
        for process in (service, *devices):
            process.terminate()
            process.wait()
    assert found["progress"]["round"] == 4
    sites = found["progress"]["sites"]
    assert [site["device"] for site in sites] == ["pi-0", "pi-1"]
    assert all(site["steps"] == site["of"] and len(site["curve"]) == 2 for site in sites)
    run = open_run(tmp_path / "run-0")
    assert run.read_metrics()[-1]["final"]
    losses = [line["loss"] for line in run.read_metrics()[:2]]
    assert losses == pytest.approx([one["loss"] for one in sites[0]["curve"]], rel=1e-4)
