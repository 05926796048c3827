"""The halves apart give the bits of the loop in one process, whatever is killed on the way."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from splitward.data import Dataset, phantom
from splitward.errors import TrainingError
from splitward.training.loop import reproducible, train
from splitward.training.remote.durable import DurableClient, DurableServer, pack, unpack
from splitward.training.remote.journal import Journal
from splitward.training.settings import RunSettings, split_settings


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


def weights_of(client: DurableClient, server: DurableServer) -> dict[str, Tensor]:
    found = {f"server.{name}": tensor for name, tensor in server.trainer.modules["server"].state_dict().items()}
    for name, module in client.trainer.modules.items():
        prefix = "saliency.classifier" if name == "local" else name
        found |= {f"{prefix}.{key}": tensor for key, tensor in module.state_dict().items()}
    return found


@pytest.mark.parametrize("profile", ["none", "psgl", "sealed", "ressfl"])
def test_halves_apart_end_with_the_bits_of_one_process(dataset, tmp_path, profile):
    settings = settings_for(dataset, profile)
    wanted = load_file(train(dataset, settings, tmp_path / "run", progress=False).weights)
    chance, kills = random.Random(1), 0
    with reproducible(settings.seed):

        def open_client() -> DurableClient:
            return DurableClient(settings, dataset.train, tmp_path / "client", every=4)

        def open_server() -> DurableServer:
            return DurableServer(settings, tmp_path / "server", every=3)

        server, client = open_server(), open_client()
        while not client.trainer.finished:
            message = client.begin()
            state = torch.get_rng_state()  # the server is another process
            reply = server.handle(message)
            if chance.random() < 0.3:  # the answer, or the server with it, is lost
                server.close()
                server, kills = open_server(), kills + 1
                assert server.handle(message) == reply, "the same step is answered, and not taken again"
            torch.set_rng_state(state)
            client.meanwhile()
            if chance.random() < 0.3:  # the client dies with the answer in hand, before it is noted
                client.close()
                client, kills = open_client(), kills + 1
                assert client.begin() == message
                client.meanwhile()
            client.end(reply)
            if chance.random() < 0.2:
                client.close()
                client, kills = open_client(), kills + 1
        assert kills >= 5
        assert server.trainer.steps_done == client.trainer.steps_done == 2 * (len(dataset.train) // 3)
        found = weights_of(client, server)
    ranked = {"server.weights"}  # set by the accuracies on validation data, after the training
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if name not in ranked and not torch.equal(found[name], wanted[name])] == []


def test_another_trainings_step_is_refused(dataset, tmp_path):
    settings = settings_for(dataset, "none")
    with reproducible(settings.seed):
        server = DurableServer(settings, tmp_path / "server")
        client = DurableClient(settings, dataset.train, tmp_path / "client")
        for _ in range(3):
            message = client.begin()
            reply = server.handle(message)
            client.meanwhile()
            client.end(reply)
        with pytest.raises(TrainingError, match="step 4: the server is at step 3"):
            server.handle(pack(replace(unpack(message), step=4)))  # its journal lost a step that the client has
        fresh = DurableClient(settings, dataset.train, tmp_path / "other")
        with pytest.raises(TrainingError, match="step 0: the server is at step 3"):
            server.handle(fresh.begin())


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
    again = Journal(tmp_path)
    found = (float((again.snapshot() or {})["weights"]), list(again.messages()))
    assert found == ((2.0, []) if step == "log" else (1.0, [b"one"]))


def test_a_damaged_snapshot_is_an_error(tmp_path):
    journal = Journal(tmp_path)
    journal.save(7, {"weights": torch.zeros(8)})
    (tmp_path / "snapshot-7.safetensors").write_bytes(b"damage")
    with pytest.raises(TrainingError, match=r"snapshot-7.*Begin this training again"):
        Journal(tmp_path).snapshot()
