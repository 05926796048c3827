"""Single trainings between a site and the cloud, put to the test: kills, a long line, a cloud that hijacks."""

from __future__ import annotations

import multiprocessing
import random
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firmware_sim.broker import start_broker
from firmware_sim.proxy import FaultProxy, Toxics
from splitward.audit.hijack import HijackingServer, HijackSettings
from splitward.audit.hijack_trial import BATCH, HIJACK_SEEDS, HONEST_SEEDS, TARGETS, class_mean_ssim
from splitward.audit.label_leakage import infer_labels
from splitward.audit.metrics import ssim
from splitward.data import Dataset, open_dataset, phantom
from splitward.data.dataset import Split
from splitward.errors import HijackError
from splitward.method.split import SplitNetwork
from splitward.training.guard import GuardSettings
from splitward.training.loop import frames_of, reproducible, to_unit, train
from splitward.training.remote.carrier import Broker, run_client, run_server
from splitward.training.remote.client import Client
from splitward.training.remote.halves import Exchange, Taken
from splitward.training.remote.plan import Plan, Precision
from splitward.training.remote.precision import Stored
from splitward.training.remote.server import Replies, Server
from splitward.training.remote.site import whole_network
from splitward.training.remote.together import run_together
from splitward.training.settings import RunSettings, split_settings
from splitward.wire.training import Phase, decode_training

LEAKAGE_STEPS = 10


def measure_kills(steps: int, kills: int, seed: int = 0) -> dict[str, Any]:
    """One site, float32, no noise: both sides killed at random moments, against training in one process."""
    dataset = phantom.load("mass", 28, seed=0, count=800)
    batch = 16
    epochs = -(-steps // (len(dataset.train) // batch))
    settings = RunSettings(
        "phantom", None, 28, split_settings(dataset, "none"), epochs=epochs, batch=batch, seed=seed
    )
    draw, struck, requests = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = train(dataset, settings, folder / "run", progress=False).load_network().state_dict()

        def open_server() -> Server:
            return Server(Plan(settings), bytes(16), folder / "server")

        def open_client() -> Client:
            site = ("site-0", bytes(16), dataset.train, settings.split)
            return Client(*site, folder=folder / "site", guard=None, repeatable=True)

        server, client = open_server(), open_client()
        chance = kills / (epochs * len(dataset.train) / batch)
        while client.request is not None:
            requests += 1
            ((_, reply),) = server.handle(client.device, client.request)
            if draw.random() < chance and struck < kills:
                struck += 1
                if struck % 2:
                    server.close()
                    server = open_server()
                else:
                    client.close()
                    client = open_client()
                ((_, reply),) = server.handle(client.device, client.request or b"")
            client.meanwhile()
            client.take(reply)
        found, (member,) = whole_network(client).state_dict(), server.session.members.values()
    differing = [key for key in wanted if key != "server.weights" and not torch.equal(found[key], wanted[key])]
    expected = 0 if client.course.trainer is None else client.course.trainer.schedule.steps
    return {
        "kills": struck,
        "steps": expected,
        "steps_lost": max(0, expected - member.steps),
        "steps_twice": max(0, member.steps - expected),
        "weights_equal_in_process": not differing,
    }


class TimedClient(Client):
    """Notes when each step was done."""

    def __init__(self, *site: Any, **more: Any) -> None:
        self.done_s: list[float] = []
        super().__init__(*site, **more)

    def take(self, answer: bytes) -> bool:
        """As the client's own."""
        before = 0 if self.course.trainer is None else self.course.trainer.steps_done
        taken = super().take(answer)
        if self.course.trainer is not None and self.course.trainer.steps_done > before:
            self.done_s.append(time.monotonic())
        return taken


def serve_training(plan: Plan, folder: Path, port: int) -> None:
    """The cloud's side of one training, with a thread of its own, as on a machine of its own."""
    torch.set_num_threads(1)
    server = Server(plan, bytes(16), folder)
    run_server({bytes(16): server}, Broker(port=port))
    server.close()


def take_part(plan: Plan, data: Dataset, folder: Path, port: int, done: Connection) -> None:
    """The site's side likewise; tells when each step was done."""
    torch.set_num_threads(1)
    site = ("site-0", bytes(16), data.train, plan.run.split)
    client = TimedClient(*site, folder=folder, guard=GuardSettings())
    run_client(client, "bench", Broker(port=port))
    client.close()
    done.send(client.done_s)


def measure_throughput(rtt_ms: float = 20.0, repeats: int = 3, batch: int = 128) -> dict[str, Any]:
    """Steps a second of one site over MQTT, journals on disk, beside one process; a thread for each side."""
    dataset = phantom.load("mass", 28, seed=0, count=4000)
    dataset = replace(dataset, validation=take(dataset.validation, 64), test=take(dataset.test, 64))
    settings = RunSettings("phantom", None, 28, split_settings(dataset, "sealed"), epochs=2, batch=batch)
    plan, steps = Plan(settings), -(-len(dataset.train) // batch)
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = {"in_process": [], "over_mqtt": []}
    for _ in range(repeats):
        with (
            tempfile.TemporaryDirectory() as name,
            start_broker() as broker,
            FaultProxy(broker.port) as proxy,
        ):
            folder = Path(name)
            lines = train(dataset, settings, folder / "run", progress=False).read_metrics()
            rates["in_process"].append(steps / lines[1]["seconds"])
            proxy.toxics = Toxics(latency_ms=rtt_ms / 2)
            context = multiprocessing.get_context("spawn")
            told, done = context.Pipe(duplex=False)
            sides = (
                context.Process(target=serve_training, args=(plan, folder / "server", broker.port)),
                context.Process(target=take_part, args=(plan, dataset, folder / "site", proxy.port, done)),
            )
            for side in sides:
                side.start()
            done_s = told.recv()
            for side in sides:
                side.join(60)
            last = done_s[-steps:]
            rates["over_mqtt"].append((len(last) - 1) / (last[-1] - last[0]))
    medians = {name: round(statistics.median(found), 2) for name, found in rates.items()}
    return {
        "throughput_fraction_20ms": round(medians["over_mqtt"] / medians["in_process"], 3),
        "throughput": {"steps_per_s": medians, "rtt_ms": rtt_ms, "batch": batch, "repeats": repeats},
    }


class Hijacker:
    """Answers as the server half would, with gradients of its own (`splitward.audit.hijack`)."""

    def __init__(self, server: HijackingServer) -> None:
        self.server = server

    def take(self, sent: Exchange) -> Taken:
        """A gradient to the server's own ends, and a loss that tells nothing."""
        return Taken(self.server.answer(sent.released, sent.labels), 0.0, 0)


def measure_hijack(precision: Precision = "float32", steps: int = 150) -> dict[str, Any]:
    """A hijacking cloud on 3 seeds, and honest ones of equal length on 20, against the client's guard: sealed MNIST."""
    torch.set_num_threads(1)
    whole = open_dataset("mnist")
    dataset = replace(whole, train=take(whole.train, steps * BATCH))
    split, alarms = split_settings(dataset, "sealed"), 0
    found: list[dict[str, Any]] = []
    targets = to_unit(frames_of(dataset.test)[:TARGETS])

    def course(seed: int, stand_in: Hijacker | None = None) -> tuple[Client, bool]:
        """A training until its end, or until the guard stops it."""
        settings = RunSettings("mnist", None, None, split, epochs=1, batch=BATCH, seed=seed)
        client = Client("site-0", bytes(16), dataset.train, split, guard=GuardSettings())
        try:
            run_together(Server(Plan(settings, precision=precision), bytes(16), steps=stand_in), [client])
        except HijackError:
            return client, True
        return client, False

    for seed in HIJACK_SEEDS:
        with reproducible(seed):
            shadow, labels = to_unit(frames_of(dataset.validation)), torch.from_numpy(dataset.validation.labels)
            server = HijackingServer(split, shadow, labels, HijackSettings())
        client, stopped = course(seed, Hijacker(server))
        trainer = client.course.trainer
        if not stopped or trainer is None:
            found.append({"seed": seed, "step": None})
            continue
        network = SplitNetwork(split)
        network.client.load_state_dict(trainer.modules["client"].state_dict())
        if network.saliency is not None:
            network.saliency.classifier.load_state_dict(trainer.modules["local"].state_dict())
        with torch.no_grad():
            released = network.eval().release(network.client(network.attack(targets)))
            seen = float(ssim(server.reconstruct(released), targets).mean())
        found.append({"seed": seed, "step": trainer.steps_done + 1, "ssim": round(seen, 4)})
    for seed in HONEST_SEEDS:
        alarms += course(seed)[1]
    floor = class_mean_ssim(dataset)
    return {
        "ssim_at_detection": max((one["ssim"] for one in found if one["step"]), default=None),
        "detected": all(one["step"] for one in found),
        "floor_ssim": round(floor, 4),
        "trainings": found,
        "honest_trainings": len(HONEST_SEEDS),
        "false_alarms": alarms,
        "steps": steps,
    }


class _Reader(Server):
    """An honest but curious cloud: it keeps the gradients that the client sends back."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan, bytes(16))
        self.read: list[tuple[Tensor, Tensor]] = []
        self.client: Client | None = None

    def handle(self, device: str, payload: bytes) -> Replies:
        """As the server's own."""
        message = decode_training(payload)
        if message.phase is Phase.BACK and self.client is not None and self.client.course.trainer is not None:
            self.read.append((Stored.of(message).real(), self.client.course.trainer.wanted.clone()))
        return super().handle(device, payload)


def measure_label_leakage(path: str, epochs: int = 10, seed: int = 0) -> dict[str, Any]:
    """Labels at the client, PneumoniaMNIST, sealed: what the gradient at the last layers tells of them.

    In the first, a middle and the last `LEAKAGE_STEPS` steps, by precision. It is the client's training data, so there
    is nothing to be split.
    """
    torch.set_num_threads(1)
    dataset = open_dataset(path)
    split, found = split_settings(dataset, "sealed"), []
    settings = RunSettings(path, None, None, split, epochs=epochs, batch=64, shift=2, seed=seed)
    for precision in ("float32", "int8", "int4"):
        reader = _Reader(Plan(settings, labels="client", precision=precision))
        reader.client = Client("site-0", bytes(16), dataset.train, split, guard=None, repeatable=True)
        run_together(reader, [reader.client])
        middle = len(reader.read) // 2
        for when, steps in (
            ("first", reader.read[:LEAKAGE_STEPS]),
            ("middle", reader.read[middle : middle + LEAKAGE_STEPS]),
            ("last", reader.read[-LEAKAGE_STEPS:]),
        ):
            gradients, labels = (torch.cat(parts) for parts in zip(*steps, strict=True))
            leaked = asdict(infer_labels(gradients, labels, len(dataset.classes), seed=seed))
            rounded = {
                key: round(value, 4) if isinstance(value, float) else value for key, value in leaked.items()
            }
            found.append({"precision": precision, "steps": when} | rounded)
    return {"label_leakage": {"epochs": epochs, "steps": LEAKAGE_STEPS, "seed": seed, "found": found}}


def take(split: Split, count: int) -> Split:
    """The first frames of a split."""
    return Split(split.images[:count], split.labels[:count], split.patients[:count])
