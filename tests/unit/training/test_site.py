"""A site's run folder: what it refuses before anything is sent, and that its key and journal are never given up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from splitward.data import Dataset, phantom
from splitward.errors import TrainingError
from splitward.training.loop import train
from splitward.training.remote.client import Client
from splitward.training.remote.plan import Plan
from splitward.training.remote.server import Server
from splitward.training.remote.site import Membership, train_at_site
from splitward.training.run import Run
from splitward.training.settings import RunSettings, split_settings

TRAINING = bytes(range(16))
Site = Callable[..., Run]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return phantom.load("mass", 28, seed=0, count=82)


@pytest.fixture(scope="module")
def settings(dataset: Dataset) -> RunSettings:
    return RunSettings("phantom", None, 28, split_settings(dataset, "none"), epochs=1, batch=32, seed=3)


@pytest.fixture
def asked() -> list[int]:
    """Length of each request that was sent."""
    return []


@pytest.fixture
def site(
    dataset: Dataset, settings: RunSettings, tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> Site:
    """A site that takes part without a broker, until `requests` of this start are answered."""
    server, limit = Server(Plan(settings), TRAINING), [0]

    def ask(client: Client, *_: object) -> None:
        left = limit[0]
        while client.request is not None:
            if not left:
                raise KeyboardInterrupt
            left -= 1
            asked.append(len(client.request))
            ((_, answer),) = server.handle("site-0", client.request)
            client.take(answer)

    monkeypatch.setattr("splitward.training.remote.site.run_client", ask)

    def take_part(
        data: Dataset = dataset,
        training: bytes = TRAINING,
        requests: int = -1,
        own: RunSettings = settings,
    ) -> Run:
        limit[0] = requests
        member = Membership("ward", "site-0", training, guarded=False)
        return train_at_site(data, own, settings.split, tmp_path / "run", member, lambda _: None)

    return take_part


def changed(dataset: Dataset) -> Dataset:
    """The same data, but for one pixel of one training image."""
    images = dataset.train.images.copy()
    images[0, 0, 0, 0] ^= 1
    return replace(dataset, train=replace(dataset.train, images=images))


def test_a_folder_with_another_run_is_refused_before_anything_is_sent(dataset, settings, site, asked, tmp_path):
    train(dataset, replace(settings, seed=4), tmp_path / "run", progress=False)
    with pytest.raises(TrainingError, match="a run that is not of this training"):
        site()
    assert asked == []
    assert not (tmp_path / "run" / "remote").exists(), "nothing was begun"


def test_a_run_beside_a_training_is_told_at_the_start_and_the_training_goes_on_without_it(
    dataset, settings, site, asked, tmp_path
):
    """Where an earlier version had let the training begin."""
    with pytest.raises(KeyboardInterrupt):
        site(requests=3)
    train(dataset, replace(settings, seed=4), tmp_path / "other", progress=False)
    for path in (tmp_path / "other").iterdir():
        shutil.move(path, tmp_path / "run")
    with pytest.raises(TrainingError, match=r"run\.json: is not this training's.*elsewhere, all but remote/"):
        site()
    assert len(asked) == 3
    for path in (tmp_path / "run").iterdir():
        if path.name != "remote":
            path.rename(tmp_path / "other" / path.name)
    assert site().finished
    assert site().finished, "the same call again finds the run"


def test_data_that_has_changed_is_refused_before_anything_is_sent(dataset, site, asked, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        site(requests=3)
    with pytest.raises(TrainingError, match="the data is not what this site began the training with"):
        site(changed(dataset))
    assert len(asked) == 3
    run = site()
    assert run.card["digest"] == dataset.digest()
    with pytest.raises(TrainingError, match="the data is not what"):
        site(changed(dataset))


def test_the_data_is_noted_before_anything_is_sent(dataset, site, asked, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        site(requests=0)
    assert asked == []
    assert json.loads((tmp_path / "run/remote/site.json").read_text()) == {
        "training": TRAINING.hex(),
        "device": "site-0",
        "data": dataset.digest(),
    }


def test_a_journal_of_earlier_versions_is_taken(dataset, site, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        site(requests=3)
    (tmp_path / "run/remote/site.json").unlink()
    assert site().finished


def test_another_training_in_the_folder_is_refused(site, asked):
    with pytest.raises(KeyboardInterrupt):
        site(requests=3)
    with pytest.raises(TrainingError, match="of another training or device"):
        site(training=bytes(16))
    assert len(asked) == 3


def test_a_damaged_card_of_a_site_is_explained(site, tmp_path):
    card = tmp_path / "run" / "remote" / "site.json"
    card.parent.mkdir(parents=True)
    card.write_text("{")
    with pytest.raises(TrainingError, match=r"site\.json: cannot be used: .*Delete it"):
        site()
