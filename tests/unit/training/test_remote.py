"""The halves apart give the bits of the loop in one process, whatever is killed on the way; and several sites."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from splitward.data import Dataset, Split, phantom
from splitward.data.partition import partition
from splitward.errors import HijackError, MessageError, TrainingError
from splitward.training.guard import GuardSettings
from splitward.training.loop import reproducible, train
from splitward.training.remote.carrier import Broker
from splitward.training.remote.client import Client
from splitward.training.remote.envelope import open_envelope, seal
from splitward.training.remote.halves import ClientTrainer, ServerTrainer, end_round
from splitward.training.remote.journal import Journal, count_messages
from splitward.training.remote.plan import Plan
from splitward.training.remote.precision import Feedback, Stored, store, store_rows
from splitward.training.remote.privacy import add_noise, clip_rows, draw_noise, draw_order
from splitward.training.remote.server import Server
from splitward.training.remote.site import coordinate
from splitward.training.remote.state import state_of, to_tensor
from splitward.training.remote.together import run_together
from splitward.training.settings import RunSettings, split_settings
from splitward.wire.training import Phase, TrainingMessage, decode_training, encode_training


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Training images of 28x28 whose last batch is a single one."""
    whole = phantom.load("mass", 28, seed=0, count=82)
    assert len(whole.train) % 3 == 1
    return whole


def settings_for(dataset: Dataset, profile: str) -> RunSettings:
    return RunSettings(
        "phantom", None, 28, split_settings(dataset, profile), epochs=2, batch=3, shift=1, seed=3
    )


TRAINING = bytes(range(16))


def open_client(dataset: Dataset, settings: RunSettings, folder: Path | None = None, **more: Any) -> Client:
    more = {"guard": None, "repeatable": True, "every": 4} | more
    train_split = more.pop("train", dataset.train)
    name = more.pop("name", "site-0")
    return Client(name, TRAINING, train_split, settings.split, folder=folder, **more)


def weights_of(client: Client) -> dict[str, Tensor]:
    assert client.course.server_half is not None
    found = {f"server.{name}": tensor for name, tensor in client.course.server_half.items()}
    for name, module in client.course._active.modules.items():
        if name == "tails":
            for stream, layer in client.course._active.tails.items():
                found |= {f"server.{stream}.3.{key}": tensor for key, tensor in layer.state_dict().items()}
            continue
        prefix = "saliency.classifier" if name == "local" else name
        found |= {f"{prefix}.{key}": tensor for key, tensor in module.state_dict().items()}
    return found


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    # The ranks of the streams are set by the accuracies on validation data, after the training.
    return [name for name in wanted if name != "server.weights" and not torch.equal(found[name], wanted[name])]


@pytest.mark.parametrize("labels", ["cloud", "client"])
@pytest.mark.parametrize("profile", ["none", "psgl", "sealed", "ressfl"])
def test_halves_apart_end_with_the_bits_of_one_process(dataset, tmp_path, profile, labels):
    """Either side is killed again and again, before and after its answer; the others' messages are lost."""
    settings = settings_for(dataset, profile)
    wanted = load_file(train(dataset, settings, tmp_path / "run", progress=False).weights)
    plan, chance, kills = Plan(settings, labels=labels), random.Random(1), 0

    def open_server() -> Server:
        return Server(plan, TRAINING, tmp_path / "server", every=3)

    server, client = open_server(), open_client(dataset, settings, tmp_path / "client")
    while client.request is not None:
        request = client.request
        replies = server.handle(client.device, request)
        if chance.random() < 0.2:  # the answer, or the server with it, is lost
            server.close()
            server, kills = open_server(), kills + 1
            assert server.handle(client.device, request) == replies, (
                "the same request has the same answer, once"
            )
        client.meanwhile()
        if chance.random() < 0.2:  # the client dies with the answer in hand, before it is noted
            client.close()
            client, kills = open_client(dataset, settings, tmp_path / "client"), kills + 1
            assert client.request == request
        for _, reply in replies:
            assert client.take(reply)
            assert not client.take(reply), "an answer that comes twice is taken once"
        if chance.random() < 0.1:
            client.close()
            client, kills = open_client(dataset, settings, tmp_path / "client"), kills + 1
    assert kills >= 5
    (member,) = server.session.members.values()
    assert member.steps == client.course._active.steps_done == 2 * (len(dataset.train) // 3)
    assert server.finished
    found = weights_of(client)
    assert found.keys() == wanted.keys()
    assert differing(found, wanted) == []


def test_another_trainings_message_and_a_lost_folder_are_refused(dataset, tmp_path):
    settings = settings_for(dataset, "none")
    server, client = Server(Plan(settings), TRAINING), open_client(dataset, settings)
    for _ in range(4):
        ((_, reply),) = server.handle(client.device, client.request or b"")
        client.take(reply)
    message = decode_training(client.request or b"")
    assert server.handle(client.device, encode_training(replace(message, training=bytes(16)))) == []
    assert server.handle("another", client.request or b"") == []
    for wrong, words in (
        ({"sequence": message.sequence + 1}, "lost its folder"),
        ({"plan": bytes(16)}, "not this training's"),
        ({"labels": message.labels[:1]}, "do not fit the plan"),
        ({"labels": message.labels[:0]}, "do not fit the plan"),
        ({"labels": np.full_like(message.labels, 99)}, "label 99"),
        ({"values": np.full_like(message.values, -3e38)}, "values up to 3e+38"),
        ({"values": np.repeat(message.values, 2, 0), "labels": np.repeat(message.labels, 2)}, "do not fit"),
        ({"phase": Phase.EVALUATE, "values": np.repeat(message.values, 90, 0)}, "at most 256"),
    ):
        ((_, refusal),) = server.handle(client.device, encode_training(replace(message, **wrong)))
        assert decode_training(refusal).phase is Phase.REFUSED
        assert words in decode_training(refusal).values.tobytes().decode()
    fresh = open_client(dataset, settings)
    ((_, refusal),) = server.handle(fresh.device, fresh.request or b"")
    with pytest.raises(TrainingError, match="joined already"):
        fresh.take(refusal)
    ((_, reply),) = server.handle(client.device, client.request or b"")  # and the training goes on
    assert client.take(reply)


@pytest.mark.parametrize(
    ("profile", "terms", "said"),
    [
        ("none", {}, "another network or defence"),
        ("sealed", {"most_epochs": 1}, "2 epochs, .*agrees to 1. Give --epochs 2"),
        ("sealed", {"keep_labels": True}, "the cloud has the labels"),
    ],
)
def test_a_site_takes_part_only_in_what_it_agreed_to(dataset, profile, terms, said):
    server = Server(Plan(settings_for(dataset, "sealed")), TRAINING)
    agreed = split_settings(dataset, profile)
    client = Client("site-0", TRAINING, dataset.train, agreed, guard=None, **terms)
    ((_, reply),) = server.handle(client.device, client.request or b"")
    with pytest.raises(TrainingError, match=said):
        client.take(reply)


def test_a_site_that_agrees_to_less_later_goes_on_with_no_more(dataset, tmp_path):
    settings = settings_for(dataset, "sealed")
    server = Server(Plan(settings, labels="client"), TRAINING)
    terms = {"most_epochs": settings.epochs, "keep_labels": True}
    client = open_client(dataset, settings, tmp_path, **terms)
    for _ in range(6):
        ((_, reply),) = server.handle(client.device, client.request or b"")
        assert client.take(reply)
    client.close()
    with pytest.raises(TrainingError, match="agrees to 1"):
        open_client(dataset, settings, tmp_path, most_epochs=1)
    open_client(dataset, settings, tmp_path, **terms).close()


UNLABELLED = {
    "phase": Phase.STEP,
    "values": (3, (16,)),
    "labels": 0,
    "step": 0,
    "epoch": 0,
    "round": 0,
    "huge": False,
}


@example(labels="cloud", asked_before=2, hostile=UNLABELLED)
@settings(max_examples=60)
@given(
    labels=st.sampled_from(["cloud", "client"]),
    asked_before=st.integers(1, 4),
    hostile=st.fixed_dictionaries(
        {
            "phase": st.sampled_from(Phase),
            "values": st.tuples(st.integers(0, 9), st.sampled_from([(16,), (3, 64), (3, 63), (), (2, 2, 2)])),
            "labels": st.integers(0, 9),
            "step": st.sampled_from([0, 1, 10**6]),
            "epoch": st.sampled_from([0, 1, 300]),
            "round": st.integers(0, 1),
            "huge": st.booleans(),
        }
    ),
)
def test_no_request_of_a_member_ends_the_cloud(dataset, labels, asked_before, hostile):
    """Whatever it asks out of turn or shape is answered, refused or left waiting; an error would come back with the
    journal at every start."""
    settings = settings_for(dataset, "sealed")
    server, client = Server(Plan(settings, labels=labels), TRAINING), open_client(dataset, settings)
    for _ in range(asked_before):
        for _, reply in server.handle(client.device, client.request or b""):
            client.take(reply)
    hostile = dict(hostile)
    count, shape = hostile.pop("values")
    drawn = np.random.default_rng(count).normal(size=(count, *shape)).astype(np.float32)
    drawn *= 1e30 if hostile.pop("huge") else 1
    codes = np.zeros(hostile.pop("labels"), np.uint16)
    message = replace(decode_training(client.request or b""), values=drawn, labels=codes, **hostile)
    with contextlib.suppress(MessageError):
        for device, reply in server.handle(client.device, encode_training(message)):
            assert device == client.device
            assert decode_training(reply).sequence == message.sequence
    assert server.failure == ""


def told_in_json(content: bytes) -> dict[str, Any]:
    return {"values": np.frombuffer(content, np.int8)}


TELLING, SHAPED = {Phase.JOIN, Phase.ROUND}, {Phase.STEP, Phase.BACK, Phase.EVALUATE}
WRONG = [
    (set(Phase) - {Phase.LEAVE}, {"phase": Phase.LEAVE}),
    ({Phase.JOIN, Phase.LEAVE}, {"phase": Phase.SUPERSEDED}),
    (TELLING | SHAPED, {"values": np.zeros((5, 7), np.float32)}),
    (
        TELLING,
        told_in_json(
            b'{"round": -1, "halves": {}, "plan": {}, "keys": {"site-0": "AA=="}, "frames": {"site-0": 9}}'
        ),
    ),
    (
        TELLING,
        told_in_json(
            b'{"round": 0, "halves": {"nobody": 1}, "plan": {}, "keys": {"site-0": "?"}, "frames": {}}'
        ),
    ),
    ({Phase.WEIGHTS}, {"epoch": 60_000}),
]
"""Changes to an answer, and the requests that they are no answer to."""


@pytest.mark.parametrize("labels", ["cloud", "client"])
def test_an_answer_that_cannot_be_is_explained_and_not_kept(dataset, labels, tmp_path):
    settings = settings_for(dataset, "sealed")

    def trained(folder: Path, wrong: list[tuple[set[Phase], dict[str, Any]]]) -> dict[str, Tensor]:
        server = Server(Plan(settings, labels=labels), TRAINING)
        client = open_client(dataset, settings, folder, validation=dataset.validation)
        while client.request is not None:
            ((_, right),) = server.handle(client.device, client.request)
            answer = decode_training(right)
            for change in (change for phases, change in wrong if answer.phase in phases):
                with pytest.raises(TrainingError, match=f"answer to {answer.phase.name} cannot be"):
                    client.take(encode_training(replace(answer, exponents=None, **change)))
            client.take(right)
        client.close()
        return weights_of(client)

    assert differing(trained(tmp_path / "disturbed", WRONG), trained(tmp_path / "calm", [])) == []


def test_a_key_that_gives_every_exchange_the_same_is_refused(dataset):
    """A member with such a key would make every other site's hand-over fail; nor may the cloud tell it."""
    settings = replace(settings_for(dataset, "none"), epochs=1)
    server = Server(Plan(settings, "turn", 2), TRAINING)
    clients = {name: open_client(dataset, settings, name=name) for name in ("site-0", "site-1")}
    asked = decode_training(clients["site-0"].request or b"")
    weak = base64.b64encode(bytes(32)).decode()
    ((_, refusal),) = server.handle(
        "site-0",
        encode_training(replace(asked, **told_in_json(f'{{"key": "{weak}", "frames": 9}}'.encode()))),
    )
    assert decode_training(refusal).phase is Phase.REFUSED
    assert server.session.members == {}
    server.handle("site-0", clients["site-0"].request or b"")
    for name, reply in server.handle("site-1", clients["site-1"].request or b""):
        told = decode_training(reply)
        agreement = json.loads(told.values.tobytes())
        agreement["keys"]["site-1" if name == "site-0" else "site-0"] = weak
        with pytest.raises(TrainingError, match="answer to JOIN cannot be: a key"):
            clients[name].take(encode_training(replace(told, **told_in_json(json.dumps(agreement).encode()))))
        assert clients[name].take(reply)


def test_a_strangers_key_is_refused_when_the_peers_are_told_later_too(dataset, tmp_path):
    settings = settings_for(dataset, "none")
    server = Server(Plan(settings, "turn", 2), TRAINING)
    clients = {
        name: open_client(dataset, settings, tmp_path / name, name=name, every=1)
        for name in ("site-0", "site-1")
    }
    while clients["site-0"].course.place.steps_done == 0:  # until its first snapshot
        for name in clients:
            for to, reply in server.handle(name, clients[name].request or b""):
                clients[to].take(reply)
    other = clients["site-1"].fingerprint
    clients["site-0"].close()
    again = partial(open_client, dataset, settings, tmp_path / "site-0")
    with pytest.raises(TrainingError, match="keys of site-1 are not among"):
        again(peers=frozenset({"0" * 32}))
    again(peers=frozenset({other})).close()


def test_a_guard_takes_no_part_where_gradients_are_noised(dataset):
    settings = settings_for(dataset, "sealed")
    server = Server(Plan(settings, clip=1.0, noise=0.5), TRAINING)
    client = open_client(dataset, settings, guard=GuardSettings())
    ((_, reply),) = server.handle(client.device, client.request or b"")
    with pytest.raises(TrainingError, match="--no-guard"):
        client.take(reply)


def flipped(secret: bytes, bit: int) -> bytes:
    return (int.from_bytes(secret, "little") ^ (1 << bit)).to_bytes(len(secret), "little")


def shown(
    dataset: Dataset, settings: RunSettings, secret: bytes, most: int, folder: Path | None = None
) -> list[bytes]:
    """The first steps and validation batches that a site of this secret shows; with a folder it is killed at each."""
    server = Server(Plan(settings, precision="int8"), TRAINING)
    options = {"validation": dataset.validation, "repeatable": False}
    client, found = open_client(dataset, settings, **options), []
    client.course.place.secret = secret
    if folder is not None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secrets.token_bytes", lambda count: secret[:count])
            client = open_client(dataset, settings, folder, **options)
    while client.request is not None and len(found) < most:
        request = client.request
        if decode_training(request).phase in (Phase.STEP, Phase.EVALUATE):
            found.append(request)
        if folder is not None:
            client.close()
            client = open_client(dataset, settings, folder, **options)
            assert client.request == request, "a site that was killed sends the same bytes"
        for _, reply in server.handle(client.device, request):
            client.take(reply)
    client.close()
    return found


def test_the_noise_of_a_training_hangs_on_every_bit_of_the_secret(dataset, tmp_path, monkeypatch):
    """torch's generator takes 32 bits of a seed: whoever tries them all had taken the noise of a training away."""
    settings = replace(settings_for(dataset, "sealed"), batch=16, shift=0)
    steps = len(dataset.train) // 16 + (len(dataset.train) % 16 > 1)
    secret, most = bytes(range(100, 132)), steps + 2
    plain = shown(dataset, settings, secret, most)
    assert [decode_training(one).phase for one in plain].index(Phase.EVALUATE) == steps
    assert shown(dataset, settings, secret, most, tmp_path / "killed") == plain
    monkeypatch.setattr("splitward.training.remote.course.draw_order", lambda _, __, count: torch.arange(count))
    first = Stored.of(decode_training(shown(dataset, settings, secret, 1)[0])).real()
    for bit in (0, 31, 32, 62, 255):
        other = Stored.of(decode_training(shown(dataset, settings, flipped(secret, bit), 1)[0])).real()
        drawn = (other - first) / settings.split.defence.sigma / 2**0.5
        assert abs(float(drawn.std()) - 1) < 5 / (2 * drawn.numel()) ** 0.5


def linked(dataset: Dataset, phase: Phase, secret: bytes) -> float:
    """How many frames of the second epoch lie, of all that nothing hides, nearest what had their place in the first."""
    settings = replace(settings_for(dataset, "none"), batch=16, shift=0, learning_rate=1e-30)
    few = Split(dataset.train.images[:160], dataset.train.labels[:160], dataset.train.patients[:160])
    client = open_client(dataset, settings, train=few, validation=few, repeatable=False)
    client.course.place.secret = secret
    server, found = Server(Plan(settings), TRAINING), []
    while client.request is not None:
        message = decode_training(client.request)
        if message.phase is phase:
            found.append(torch.from_numpy(message.values.copy()).flatten(1))
        for _, reply in server.handle(client.device, client.request):
            client.take(reply)
    client.close()
    first, second = torch.cat(found).chunk(2)
    assert len(first) == len(few)
    nearest = torch.cdist(second, first).argmin(1)
    return float((nearest == torch.arange(len(few))).float().mean())


@pytest.mark.parametrize("phase", [Phase.STEP, Phase.EVALUATE])
def test_frames_come_in_an_order_that_is_the_sites_own(dataset, monkeypatch, phase):
    """By their places the captures of a frame could be told, and what noise there is averaged away."""
    secret = bytes(32)
    assert linked(dataset, phase, secret) < 0.1
    orders = [draw_order(one, b"about", 160).tolist() for one in (secret, secret, flipped(secret, 255))]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(160))
    monkeypatch.setattr("splitward.training.remote.course.draw_order", lambda _, __, count: torch.arange(count))
    assert linked(dataset, phase, secret) > 0.9


def test_no_two_messages_of_a_site_share_noise(dataset, monkeypatch):
    settings, drawn = settings_for(dataset, "sealed"), []

    def draw(secret: bytes, about: bytes, shape: tuple[int, ...]) -> Tensor:
        drawn.append(draw_noise(secret, about, shape))
        return drawn[-1]

    monkeypatch.setattr("splitward.training.remote.course.draw_noise", draw)
    assert shown(dataset, settings, bytes(32), 10**6)
    assert len(drawn) == 2 * (len(dataset.train) // 3 + 1)
    assert len({float(value) for noise in drawn for value in noise.flatten()}) > 0.999 * sum(
        noise.numel() for noise in drawn
    )


def test_noise_on_gradients_is_the_clouds_own_and_the_same_after_a_kill(dataset, tmp_path):
    settings = settings_for(dataset, "none")

    def answered(folder: Path, secret: bytes, *, kill: bool) -> list[bytes]:
        def open_server() -> Server:
            return Server(Plan(settings, clip=1.0, noise=0.5), TRAINING, folder, every=3)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secrets.token_bytes", lambda count: secret[:count])
            server, found = open_server(), []
        client = open_client(dataset, settings)
        while client.request is not None and len(found) < 8:
            ((_, reply),) = server.handle(client.device, client.request)
            if kill:
                server.close()
                server = open_server()
                assert server.handle(client.device, client.request) == [(client.device, reply)]
            if decode_training(reply).phase is Phase.STEP:
                found.append(reply)
            client.take(reply)
        server.close()
        return found

    secret = bytes(range(100, 132))
    plain = answered(tmp_path / "plain", secret, kill=False)
    assert answered(tmp_path / "killed", secret, kill=True) == plain
    assert answered(tmp_path / "other", flipped(secret, 40), kill=False)[0] != plain[0]


def test_a_training_of_a_version_with_weak_noise_is_not_gone_on_with(dataset, tmp_path):
    settings = settings_for(dataset, "sealed")
    client = open_client(dataset, settings, tmp_path / "site")
    place = {**msgspec.to_builtins(client.course.place), "secret": 5}
    client.close()
    journal = Journal(tmp_path / "site")
    journal.save(0, {"place": to_tensor(place)})
    journal.close()
    with pytest.raises(TrainingError, match="Begin a new training"):
        open_client(dataset, settings, tmp_path / "site")


@pytest.fixture(scope="module")
def sites() -> tuple[Dataset, list[Split]]:
    whole = phantom.load("mass", 28, seed=0, count=240)
    return whole, partition(whole.train, 3, least=16)


@pytest.mark.parametrize("arrangement", ["turn", "splitfed-v1", "splitfed-v2", "fedsgd"])
def test_sites_end_with_one_client_half_that_the_cloud_cannot_read(sites, arrangement):
    dataset, parts = sites
    settings = replace(settings_for(dataset, "sealed"), batch=8)
    server = Server(Plan(settings, arrangement, len(parts), rounds=2), TRAINING)
    clients = [
        open_client(dataset, settings, train=part, name=f"site-{number}") for number, part in enumerate(parts)
    ]
    carried: list[bytes] = []
    real = server.handle
    server.handle = lambda device, payload: (carried.append(payload), real(device, payload))[1]  # type: ignore[method-assign]
    run_together(server, clients)
    first, *others = [state_of(client.course._active, optimisers=False) for client in clients]
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
    taken = {client.device: client.course._active.steps_done for client in clients}
    assert taken == {client.device: client.course._active.schedule.steps for client in clients}
    halves = [message for message in map(decode_training, carried) if message.phase is Phase.HALF]
    assert sum(half.step == 0 for half in halves) == 6
    weights = next(iter(first.values())).numpy().tobytes()
    assert all(weights[:64] not in half.values.tobytes() for half in halves)
    assert all(b"client/module" not in half.values.tobytes() for half in halves)


@pytest.mark.parametrize("batch", [7, 500])
def test_a_pooled_round_is_one_step_along_the_mean_gradient_of_all_sites_frames(batch):
    whole = phantom.load("mass", 28, seed=0, count=240)
    train_split = whole.train
    parts = [
        Split(train_split.images[rows], train_split.labels[rows], train_split.patients[rows])
        for rows in np.split(np.arange(len(train_split)), [20, 95])
    ]
    settings = replace(settings_for(whole, "none"), batch=batch, epochs=1, shift=0)
    assert all(len(part) % batch != 1 for part in parts), "a last batch of one frame would be left out"
    server = Server(Plan(settings, "fedsgd", 3, rounds=1), TRAINING)
    clients = [open_client(whole, settings, train=part, name=f"site-{n}") for n, part in enumerate(parts)]
    run_together(server, clients)
    with reproducible(settings.seed):
        client = ClientTrainer(replace(settings, batch=500), whole.train, pooled=True)
    with reproducible(settings.seed):
        cloud = ServerTrainer(settings, pooled=True)
    client.end(cloud.take(client.begin()).gradient)
    assert end_round(client) == end_round(cloud) == len(train_split)
    found, wanted = state_of(clients[0].course._active), state_of(client)
    # Momentum after the first step is the gradient itself.
    gradients = [name for name in wanted if name.endswith("momentum_buffer")]
    assert len(gradients) == len(list(client.network.client.parameters()))
    for name in gradients:
        assert wanted[name].abs().max() > 0
        torch.testing.assert_close(
            found[name], wanted[name], rtol=1e-3, atol=1e-3 * float(wanted[name].abs().max())
        )
    moved = {name: tensor for name, tensor in server.server_half().items() if tensor.is_floating_point()}
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, cloud.half.state_dict()[name], rtol=1e-3, atol=2e-4)


def test_a_pooled_training_is_the_same_whatever_is_killed(sites, tmp_path):
    """Kills in the middle of a round, whose gradients wait for its end."""
    dataset, parts = sites
    settings = replace(settings_for(dataset, "sealed"), batch=8, epochs=1)
    ended = []
    for kill in (False, True):
        folder, chance = tmp_path / str(kill), random.Random(2)
        open_server = partial(
            Server, Plan(settings, "fedsgd", len(parts), rounds=3), TRAINING, folder / "server", every=2
        )

        def open_site(number: int, folder: Path = folder) -> Client:
            where = folder / f"site-{number}"
            return open_client(dataset, settings, where, train=parts[number], name=where.name, every=2)

        server, clients = open_server(), {f"site-{n}": open_site(n) for n in range(len(parts))}
        pending, kills = deque(clients), 0
        while pending:
            name = pending.popleft()
            request = clients[name].request
            for to, reply in [] if request is None else server.handle(name, request):
                if kill and chance.random() < 0.15:
                    server.close()
                    clients[to].close()
                    server, clients[to], kills = open_server(), open_site(int(to[-1])), kills + 1
                clients[to].take(reply)
                pending.append(to)
        assert server.finished
        assert (kills > 5) == kill
        ended.append([weights_of(client) for client in clients.values()])
    plain, killed = ended
    assert all(differing(one, other) == [] for one, other in zip(plain, killed, strict=True))


@pytest.mark.parametrize(
    ("arrangement", "labels", "phase"),
    [
        ("splitfed-v2", "cloud", Phase.STEP),
        ("fedsgd", "cloud", Phase.STEP),
        ("splitfed-v2", "client", Phase.STEP),
        ("splitfed-v2", "client", Phase.BACK),
    ],
)
def test_the_round_goes_on_without_a_silent_site_which_may_come_back(sites, arrangement, labels, phase):
    """Silent between two steps, and in the middle of one, for which the others wait."""
    dataset, parts = sites
    settings = replace(settings_for(dataset, "none"), batch=8)
    server = Server(Plan(settings, arrangement, 3, rounds=2, labels=labels), TRAINING)
    clients = {
        f"site-{n}": open_client(dataset, settings, train=part, name=f"site-{n}")
        for n, part in enumerate(parts)
    }
    silent, heard, pending = "site-2", 0, deque((name, client.request) for name, client in clients.items())
    kept: bytes | None = None
    while pending:
        name, request = pending.popleft()
        if request is None:
            continue
        if name == silent and kept is None and decode_training(request).phase is phase:
            heard += 1
            kept = request if heard == 3 else None  # it goes silent in the middle of its round
        for to, reply in [] if request == kept and not server.session.drops else server.handle(name, request):
            if clients[to].take(reply):
                pending.append((to, clients[to].request))
        if not pending and kept is not None and not server.session.drops:
            others = set(clients) - {silent} if phase is Phase.BACK else set()
            assert server.awaited() == {silent} | others
            for to, reply in server.drop(silent):
                clients[to].take(reply)
                pending.append((to, clients[to].request))
            pending.append((silent, kept))
    assert server.finished
    assert clients[silent].course.place.skipped == 1
    assert server.session.members[silent].superseded == 1
    first, *others = [state_of(client.course._active, optimisers=False) for client in clients.values()]
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.parametrize(
    ("labels", "phase"), [("cloud", Phase.STEP), ("client", Phase.STEP), ("client", Phase.BACK)]
)
def test_a_cloud_that_says_superseded_is_shown_no_batch_again(dataset, labels, phase, tmp_path):
    """Each time with fresh noise, a batch that comes again and again would come without any."""
    settings = replace(settings_for(dataset, "sealed"), batch=16)
    plan, shown_of = Plan(settings, labels=labels), {Phase.STEP: [], Phase.EVALUATE: []}

    def open_site() -> Client:
        return open_client(dataset, settings, tmp_path, validation=dataset.validation, repeatable=False)

    def answer(asked: TrainingMessage, features: int) -> bytes:
        count, told = len(asked.values), {"values": np.zeros(1, np.int8)}
        if asked.phase is phase:
            told["phase"] = Phase.SUPERSEDED
        elif asked.phase is Phase.JOIN:
            key = json.loads(asked.values.tobytes())["key"]
            agreement = {
                "plan": plan.to_dict(),
                "keys": {"site-0": key},
                "frames": {"site-0": len(dataset.train)},
            }
            told = told_in_json(json.dumps(agreement).encode())
        elif asked.phase is Phase.ROUND:
            told = told_in_json(b'{"round": 0, "halves": {}}')
        elif asked.phase is Phase.STEP:
            told["values"] = np.zeros((count, 3, features), np.float32)
        elif asked.phase is Phase.EVALUATE:
            told["values"] = np.zeros((count, 4, 2), np.int8)
        return encode_training(replace(asked, plan=plan.digest, labels=np.empty(0, np.uint16), **told))

    client, refusal = open_site(), ""
    while not refusal:
        asked = decode_training(client.request or b"")
        if (steps := shown_of.get(asked.phase)) is not None:
            steps.append((asked.step, asked.epoch))
            assert len(steps) < 100, "without end"
            request = client.request
            client.close()
            client = open_site()
            assert client.request == request
        trainer = client.course.trainer
        try:
            client.take(answer(asked, 0 if trainer is None else trainer.features))
        except TrainingError as error:
            refusal = str(error)
    assert "round 0, which is over" in refusal
    per_epoch, every = client.course._active.schedule.per_epoch, client.course._active.schedule.steps
    assert shown_of[Phase.STEP] == [(step, step // per_epoch) for step in range(every)]
    assert len(shown_of[Phase.EVALUATE]) == (2 if labels == "cloud" else 0)
    assert [line["epoch"] for line in client.course.place.metrics] == [1, 2]
    client.close()


def test_a_site_that_was_left_out_while_its_step_waited_is_told(sites):
    dataset, parts = sites
    settings = replace(settings_for(dataset, "none"), batch=8)
    server = Server(Plan(settings, "splitfed-v2", 2, labels="client"), TRAINING)
    clients = {
        n: open_client(dataset, settings, train=part, name=n) for n, part in zip("ab", parts, strict=False)
    }

    def deliver(name: str) -> list[Phase]:
        replies = server.handle(name, clients[name].request or b"")
        for to, reply in replies:
            clients[to].take(reply)
        return [decode_training(reply).phase for _, reply in replies]

    joining = [deliver(name) for name in "abab"]
    assert joining == [[], [Phase.JOIN, Phase.JOIN], [Phase.ROUND], [Phase.ROUND]]
    assert [deliver(name) for name in "ab"] == [[Phase.STEP], []]
    assert server.drop("b") == []
    assert deliver("a") == [Phase.BACK, Phase.SUPERSEDED]
    assert deliver("b") == [Phase.ROUND]


def test_a_snapshot_is_never_far_behind(sites, tmp_path):
    """Also where one step follows the other without a pause: each is half done until its client's second message."""
    dataset, parts = sites
    settings = replace(settings_for(dataset, "none"), batch=8)
    server = Server(Plan(settings, "splitfed-v2", 2, labels="client"), TRAINING, tmp_path, every=10)
    clients = [open_client(dataset, settings, train=part, name=f"site-{n}") for n, part in enumerate(parts[:2])]
    journal, handle, behind = server._journal, server.handle, []
    assert journal is not None

    def handle_and_look(device: str, payload: bytes) -> list[tuple[str, bytes]]:
        replies = handle(device, payload)
        behind.append(journal.since_snapshot)
        return replies

    server.handle = handle_and_look  # type: ignore[method-assign]
    run_together(server, clients)
    assert len(behind) > 40
    assert max(behind) <= 10 + len(clients)


def test_a_training_is_the_same_whatever_is_killed_while_steps_wait_for_each_other(sites, tmp_path):
    dataset, parts = sites
    settings = replace(settings_for(dataset, "none"), batch=8, epochs=1)
    plan, ended = Plan(settings, "splitfed-v2", 2, labels="client"), []
    for kill in (False, True):
        open_server = partial(Server, plan, TRAINING, tmp_path / str(kill), every=3)
        server, waited = open_server(), 0
        clients = {
            f"site-{n}": open_client(dataset, settings, train=part, name=f"site-{n}")
            for n, part in enumerate(parts[:2])
        }
        pending = deque(clients)
        while pending:
            name = pending.popleft()
            for to, reply in server.handle(name, clients[name].request or b""):
                clients[to].take(reply)
                if clients[to].request is not None:
                    pending.append(to)
            if kill:
                waited += bool(server.session.queue)
                server.close()
                server = open_server()
        server.close()
        assert (waited > 5) == kill
        ended.append([weights_of(client) for client in clients.values()])
    plain, killed = ended
    assert all(differing(one, other) == [] for one, other in zip(plain, killed, strict=True))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_coarse_messages_are_small_and_train(dataset, precision):
    settings = settings_for(dataset, "sealed")
    sizes = {}
    for one in ("float32", precision):
        server = Server(Plan(settings, precision=one), TRAINING)
        client = open_client(dataset, settings)
        sent: list[int] = []
        while client.request is not None:
            for _, reply in server.handle(client.device, client.request):
                if decode_training(reply).phase is Phase.STEP:
                    sent.append(decode_training(reply).values.nbytes if one != "int4" else len(reply))
                client.take(reply)
        sizes[one] = sum(sent)
        assert client.course.place.metrics[-1]["accuracy"] > 0.3
    if precision == "int8":
        assert sizes["float32"] == 4 * sizes["int8"]


def test_noise_of_a_training_is_not_cut_off_at_the_range_of_the_release(dataset):
    seal = {"sigma": 0.05, "training_sigma": 0.5}
    settings = replace(settings_for(dataset, "sealed"), split=split_settings(dataset, "sealed", seal=seal))
    server, client = Server(Plan(settings, precision="int8"), TRAINING), open_client(dataset, settings)
    largest = 0.0
    while client.request is not None:
        asked = decode_training(client.request)
        if asked.phase is Phase.STEP:
            largest = max(largest, float(Stored.of(asked).real().abs().max()))
        for _, reply in server.handle(client.device, client.request):
            client.take(reply)
    assert largest > 1.2 > 127 * settings.split.scale


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_each_row_of_a_gradient_is_as_fine_as_the_largest(precision):
    rows = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(3))
    rows *= torch.tensor([1.0, 1e-2, 1e-9, 0.0, 37.0, 1e-30])[:, None, None]
    stored = store_rows(rows, precision)
    assert stored.exponents is not None
    largest = rows.abs().amax((1, 2))
    step = largest * 2 / (127 if precision == "int8" else 7)  # at worst twice as coarse as the row's own step
    assert ((stored.real() - rows).abs().amax((1, 2)) <= step / 2).all()
    assert (store(rows, precision).real()[1:3] == 0).all(), "one step for all would have left nothing of these"


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_guard_watches_rounded_gradients_and_still_knows_a_hijacking(dataset, precision):
    settings = replace(settings_for(dataset, "sealed"), batch=16, epochs=10)
    server = Server(Plan(settings, precision=precision), TRAINING)
    client = open_client(dataset, settings, guard=GuardSettings())
    while client.request is not None:
        for _, reply in server.handle(client.device, client.request):
            client.take(reply)
    assert client.course._guard is not None
    assert client.course._guard.batches > 20
    assert client.course._guard.separation > 0.9
    generator, labels = torch.Generator().manual_seed(5), torch.arange(16) % 2

    def hijack() -> None:
        for _ in range(client.course._guard.settings.window):
            blind = torch.randn(16, *settings.split.network.release_shape, generator=generator)
            client.course._watch(store_rows(blind, precision).real(), labels)

    with pytest.raises(HijackError):
        hijack()


def test_error_feedback_makes_up_for_what_rounding_kept():
    feedback, draw = Feedback(), torch.Generator().manual_seed(0)
    true = torch.zeros(4)
    told = torch.zeros(4)
    plain = torch.zeros(4)
    for _ in range(200):
        batch = torch.randn(8, 4, generator=draw) + torch.tensor([0.02, -0.01, 0.03, 0.0])
        true += batch.mean(0)
        told += feedback.store(batch, "int4").real().mean(0)
        plain += store(batch, "int4").real().mean(0)
    assert (told - true).abs().max() < 0.5 * (plain - true).abs().max()


def test_clipping_bounds_each_frame_and_noise_is_in_its_units():
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    clipped = clip_rows(gradient / 6, 0.5) * 6
    assert (clipped.norm(dim=1) <= 0.5 + 1e-6).all()
    small = gradient / gradient.norm(dim=1, keepdim=True) * 0.1 / 6
    assert torch.equal(clip_rows(small, 0.5), small)
    drawn = draw_noise(bytes(32), b"a test", (6, 4))
    torch.testing.assert_close((add_noise(gradient, 0.5, 2.0, drawn) - gradient) * 6, 2.0 * 0.5 * drawn)


def test_a_half_is_for_the_members_and_from_the_one_who_says_so():
    ours, theirs, stranger = (X25519PrivateKey.generate() for _ in range(3))
    public = lambda key: key.public_key().public_bytes_raw()  # noqa: E731  # three words
    sealed = seal(b"weights", ours, {"a": public(ours), "b": public(theirs)}, b"round 1")
    assert open_envelope(sealed, theirs, "b", public(ours), b"round 1") == b"weights"
    for key, name, sender, about in (
        (stranger, "b", public(ours), b"round 1"),
        (theirs, "a", public(ours), b"round 1"),
        (theirs, "b", public(stranger), b"round 1"),
        (theirs, "b", public(ours), b"round 2"),
    ):
        with pytest.raises(TrainingError, match="fingerprints"):
            open_envelope(sealed, key, name, sender, about)
    with pytest.raises(TrainingError):
        open_envelope(sealed[:-1] + b"x", theirs, "b", public(ours), b"round 1")


def test_a_message_that_was_cut_off_is_not_there(tmp_path):
    journal = Journal(tmp_path)
    journal.append(b"one")
    journal.append(b"two")
    journal.close()
    log = tmp_path / "log-0"
    whole = log.read_bytes()
    for cut in range(len(whole)):
        log.write_bytes(whole[:cut])
        again = Journal(tmp_path)
        assert list(again.messages()) == [b"one", b"two"][: cut // 11]
        again.append(b"three")
        assert list(again.messages())[-1] == b"three"
        again.close()


@pytest.mark.parametrize("step", ["write", "rename", "log"])
def test_a_kill_within_a_snapshot_leaves_the_one_before_or_the_new_one(tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    journal = Journal(tmp_path)
    journal.save(1, {"weights": torch.tensor([1.0])})
    journal.append(b"one")
    place = {
        "write": "splitward.training.remote.journal.save_file",
        "rename": "pathlib.Path.replace",
        "log": "splitward.training.remote.journal.Journal._open_log",
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(Killed):
            journal.save(2, {"weights": torch.tensor([2.0])})
    os.close(journal._lock)  # as a kill does
    again = Journal(tmp_path)
    found = (float((again.snapshot() or {})["weights"]), list(again.messages()))
    assert found == ((2.0, []) if step == "log" else (1.0, [b"one"]))


def test_a_journal_has_one_writer(dataset, tmp_path):
    settings = settings_for(dataset, "none")
    server, client = (
        Server(Plan(settings), TRAINING, tmp_path / "server"),
        open_client(dataset, settings, tmp_path / "client"),
    )
    with pytest.raises(TrainingError, match="server: another process"):
        Server(Plan(settings), TRAINING, tmp_path / "server")
    with pytest.raises(TrainingError, match="client: another process"):
        open_client(dataset, settings, tmp_path / "client")
    server.close()
    client.close()
    Server(Plan(settings), TRAINING, tmp_path / "server").close()
    open_client(dataset, settings, tmp_path / "client").close()


def test_nobody_else_reads_a_journal(tmp_path):
    """Its snapshots hold the secret that keys the noise, its log the answers."""
    journal = Journal(tmp_path / "journal")
    journal.save(1, {"weights": torch.ones(1)})
    journal.append(b"answer")
    files = [path for path in (tmp_path / "journal").iterdir() if path.stat().st_size]
    assert {path.name.split("-")[0] for path in files} == {"snapshot", "log"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_damaged_snapshot_is_an_error(tmp_path):
    journal = Journal(tmp_path)
    journal.save(7, {"weights": torch.zeros(8)})
    journal.close()
    (tmp_path / "snapshot-7.safetensors").write_bytes(b"damage")
    with pytest.raises(TrainingError, match=r"snapshot-7.*Begin this training again"):
        Journal(tmp_path).snapshot()


def test_another_process_can_count_the_messages_of_a_journal(tmp_path):
    assert count_messages(tmp_path) == 0
    journal = Journal(tmp_path)
    journal.save(0, {"one": torch.zeros(1)})
    for number in range(1, 4):
        journal.append(b"message")
        assert count_messages(tmp_path) == number
    journal.save(3, {"one": torch.zeros(1)})
    assert count_messages(tmp_path) == 3
    journal.append(b"message")
    assert count_messages(tmp_path) == 4
    journal.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff", b'{"plan": {}, "training": ""}', b'{"plan": 1, "training": 2}'],
)
def test_a_damaged_card_of_a_coordinator_is_explained(dataset, tmp_path, content):
    (tmp_path / "training.json").write_bytes(content)
    with pytest.raises(TrainingError, match=r"training\.json: cannot be used: .*Give another --out"):
        coordinate(Plan(settings_for(dataset, "none")), tmp_path, Broker("127.0.0.1", 1), print)
