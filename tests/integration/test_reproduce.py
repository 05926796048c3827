"""The paper's experiments at a tiny effort, on phantoms in place of its data."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from splitward.data import Dataset, phantom
from splitward.errors import TrainingError
from splitward.reproduce import paper
from splitward.reproduce.paper_page import own_gains, write_page
from splitward.reproduce.protocols import augment, augment_first, shared_patients, split_by_patient_first
from splitward.reproduce.recovery_error import MUS, NOISES, draw_errors

EFFORT = 0.01


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return phantom.load("mass", 28, seed=0, count=150)


def test_augmenting_makes_eight_different_images_of_each(dataset):
    first = replace(dataset.test, images=dataset.test.images[:1], labels=dataset.test.labels[:1])
    first = replace(first, patients=dataset.test.patients[:1])
    made = augment(first)
    assert len(made) == 8
    assert len(np.unique(made.images.reshape(8, -1), axis=0)) == 8
    assert {int(image.sum()) for image in made.images} == {int(first.images.sum())}
    assert set(made.labels.tolist()) == set(first.labels.tolist())


def test_only_augmenting_first_puts_patients_on_both_sides(dataset):
    by_patient, leaking = split_by_patient_first(dataset), augment_first(dataset, seed=0)
    assert shared_patients(by_patient) == 0
    assert len(by_patient.test) == len(dataset.test)
    assert shared_patients(leaking) > 0.95
    assert sum(len(split) for split in (leaking.train, leaking.validation, leaking.test)) == 8 * 150


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_nothing_to_do_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="at least one data set"):
        paper.reproduce_paper(tmp_path, mnist=False)
    with pytest.raises(TrainingError, match="positive effort"):
        paper.reproduce_paper(tmp_path, effort=0)


@pytest.mark.slow
def test_every_experiment_runs_and_its_page_holds_the_figures(one_thread, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "open_dataset", lambda *spec, **settings: dataset)
    found = paper.reproduce_paper(tmp_path, mias=tmp_path, effort=EFFORT, command="splitward reproduce paper")
    assert json.loads((tmp_path / "paper.json").read_text()) == found
    assert (tmp_path / "fig3.png").read_bytes().startswith(b"\x89PNG")
    assert set(found["fig3"]) == {"mnist", "mias"}
    for curve in found["fig3"]["mnist"]:
        assert len(curve["mse"]) == len(MUS)
        assert curve["mse"][f"{curve['best_mu']:g}"] == min(curve["mse"].values())
    assert len(found["fig3"]["mnist"]) == 2 * len(NOISES)
    names = [row["images"] for row in found["robustness"]["mnist"]]
    assert names[0] == "clean"
    assert {"decoder, from none", "DLG at the cut, from psgl", "PGD 0.1, on psgl"} <= set(names)
    assert set(own_gains(found["robustness"]["mnist"])) == {
        "decoder", "DLG at the cut", "inverting gradients", "FGSM 0.1", "PGD 0.1", "FGSM 0.3", "PGD 0.3",
    }  # fmt: skip
    assert [(row["task"], row["protocol"]) for row in found["protocols"]][:2] == [
        ("mass", "by patient"),
        ("mass", "augmented first"),
    ]
    text = (tmp_path / "paper.md").read_text()
    assert "14.0, 17.9, 36.9" in text
    assert f"{100 * found['robustness']['mnist'][0]['none']:.1f}" in text
    again = tmp_path / "again.md"
    write_page(found, again)
    draw_errors(found["fig3"], tmp_path / "again.png")
    assert again.read_text() == text
