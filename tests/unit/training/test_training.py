"""The training loop on a tiny data set: the same bits every time, after interruptions too."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splitward.data import Dataset, Split, phantom
from splitward.errors import TrainingError
from splitward.method.split import COMPARED, DEFENCES, SplitNetwork, SplitSettings
from splitward.training import loop
from splitward.training.loop import train
from splitward.training.run import Run, open_run, save_tensors
from splitward.training.settings import RunSettings, release_law, split_settings

PROFILES = tuple(DEFENCES | COMPARED)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """56 training images of 28x28, the last batch a single one."""
    return phantom.load("mass", 28, seed=0, count=82)


def settings_for(dataset: Dataset, profile: str = "sealed", **changes) -> RunSettings:
    split = split_settings(dataset, profile)
    return replace(RunSettings("phantom", None, 28, split, epochs=3, batch=len(dataset.train) // 2), **changes)


def run_of(dataset: Dataset, folder: Path, profile: str = "sealed", **changes) -> Run:
    return train(dataset, settings_for(dataset, profile, **changes), folder, progress=False)


def same(one: Run, other: Run) -> bool:
    """Whether two runs ended with the same bits and the same metrics, times apart."""
    ours, theirs = load_file(one.weights), load_file(other.weights)
    assert ours.keys() == theirs.keys()
    timeless = [[line | {"seconds": 0} for line in run.read_metrics()] for run in (one, other)]
    return timeless[0] == timeless[1] and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_of(dataset, tmp_path_factory.mktemp("run"))


def test_one_seed_gives_the_same_bits_and_another_does_not(dataset, finished, tmp_path):
    torch.manual_seed(99)  # the state outside does not matter
    again = run_of(dataset, tmp_path / "again")
    assert same(again, finished)
    other = run_of(dataset, tmp_path / "other", seed=1)
    assert not same(other, finished)


def test_training_leaves_torch_as_it_was(dataset, tmp_path):
    torch.manual_seed(5)
    before, expected = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    run_of(dataset, tmp_path, epochs=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.are_deterministic_algorithms_enabled() == expected


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_trains_and_its_run_folder_is_whole(dataset, profile, tmp_path):
    run = run_of(dataset, tmp_path, profile, epochs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curve.png", "metrics.jsonl", "run.json", "weights.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    epoch, final = run.read_metrics()
    streams = {"attacked", "recovered", "fused", "decision"}
    assert epoch["epoch"] == 1
    assert epoch["loss"] > 0
    assert set(epoch["validation"]) == set(final["test"]) == streams
    assert sorted(final["weights"]) == [0.2, 0.3, 0.5]
    reopened = open_run(tmp_path)
    assert reopened == run
    assert reopened.card["images"]["train"] == len(dataset.train)
    network = reopened.load_network()
    assert not network.training
    assert loop.evaluate(network, dataset.test) == final["test"]


def test_no_pickle_is_written_and_none_is_read(finished):
    for path in finished.folder.iterdir():
        assert path.suffix in {".json", ".jsonl", ".png", ".safetensors"}
        assert not path.read_bytes().startswith((b"PK", b"\x80"))


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Let the loop's `name` raise at its `call`th call."""
    original, calls = getattr(loop, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, name, interrupted)


@pytest.mark.parametrize(
    ("name", "call", "epochs_kept"),
    [
        ("_train_epoch", 1, 0),  # in the first epoch: no checkpoint yet
        ("evaluate", 2, 1),  # after the second epoch's steps
        ("save_checkpoint", 2, 1),  # after its line of metrics
        ("evaluate", 5, 3),  # while the test metrics are made
        ("save_tensors", 1, 3),  # after their line was written
    ],
)
def test_an_interrupted_training_ends_with_the_same_bits(
    dataset, finished, tmp_path, monkeypatch, name, call, epochs_kept
):
    with monkeypatch.context() as patch:
        interrupt(patch, name, call)
        with pytest.raises(KeyboardInterrupt):
            run_of(dataset, tmp_path)
    stopped = open_run(tmp_path)
    assert not stopped.finished
    with pytest.raises(TrainingError, match="has not finished"):
        stopped.load_network()
    done = []
    original = loop._train_epoch
    monkeypatch.setattr(loop, "_train_epoch", lambda *a: done.append(a[4]) or original(*a))
    resumed = run_of(dataset, tmp_path)
    assert done == list(range(epochs_kept, 3))
    assert same(resumed, finished)
    assert [line.get("epoch") for line in resumed.read_metrics()] == [1, 2, 3, None]
    assert not resumed.checkpoint.exists()


def test_a_line_of_metrics_that_a_kill_cut_off_is_done_again(dataset, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, "save_checkpoint", 2)  # the second epoch's line is written, its checkpoint is not
        with pytest.raises(KeyboardInterrupt):
            run_of(dataset, tmp_path)
    metrics = open_run(tmp_path).metrics
    metrics.write_bytes(metrics.read_bytes()[:-20])
    assert [line["epoch"] for line in open_run(tmp_path).read_metrics()] == [1]
    assert same(run_of(dataset, tmp_path), finished)


def test_damaged_metrics_are_explained(dataset, finished, tmp_path):
    (tmp_path / "run.json").write_bytes((finished.folder / "run.json").read_bytes())
    for damage in (b"{\n", b"\xff\n"):
        (tmp_path / "metrics.jsonl").write_bytes(damage)
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: is damaged"):
            run_of(dataset, tmp_path)
    (tmp_path / "weights.safetensors").touch()
    for lost in (b"", b'{"epoch": 1}\n'):
        (tmp_path / "metrics.jsonl").write_bytes(lost)
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: is damaged \(the test metrics"):
            open_run(tmp_path).read_metrics()


def test_damaged_weights_are_explained(finished, tmp_path):
    (tmp_path / "run.json").write_bytes((finished.folder / "run.json").read_bytes())
    for damage in (b"", b"hello", finished.weights.read_bytes()[:-1]):
        (tmp_path / "weights.safetensors").write_bytes(damage)
        with pytest.raises(TrainingError, match=r"weights\.safetensors: is damaged"):
            open_run(tmp_path).load_network()
    save_tensors(tmp_path / "weights.safetensors", {"one": torch.zeros(1)})
    with pytest.raises(TrainingError, match="another network's"):
        open_run(tmp_path).load_network()


def other_than(dataset: Dataset) -> list[Dataset]:
    """Data sets that differ in one pixel, one label or one name."""
    images, labels = dataset.train.images.copy(), dataset.test.labels.copy()
    images[-1, 0, 0, 0] ^= 1
    labels[-1] ^= 1
    return [
        replace(dataset, train=replace(dataset.train, images=images)),
        replace(dataset, test=replace(dataset.test, labels=labels)),
        replace(dataset, classes=("normal", "other")),
    ]


def test_a_run_does_not_go_on_with_other_data(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", 2)
        with pytest.raises(KeyboardInterrupt):
            run_of(dataset, tmp_path)
    for other in other_than(dataset):
        with pytest.raises(TrainingError, match="phantom is not what this run was trained on"):
            run_of(other, tmp_path)
    assert run_of(dataset, tmp_path).finished
    with pytest.raises(TrainingError, match="is not what this run was trained on"):
        run_of(other_than(dataset)[0], tmp_path)


def test_a_run_of_an_earlier_version_goes_on(dataset, tmp_path):
    run = run_of(dataset, tmp_path, "none", epochs=1)
    values = json.loads((tmp_path / "run.json").read_text())
    del values["card"]["digest"]
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert run_of(dataset, tmp_path, "none", epochs=1).weights == run.weights


def test_a_run_whose_defence_does_not_defend_is_not_opened(finished, tmp_path):
    values = json.loads((finished.folder / "run.json").read_text())
    values["settings"]["split"]["defence"]["values"] = 0
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(TrainingError, match=r"run\.json: values 0: give 1"):
        open_run(tmp_path)


@pytest.mark.parametrize("rows", [slice(1), [0, 0, 0]])
def test_one_image_or_one_class_is_nothing_to_train_on(dataset, tmp_path, rows):
    few = Split(dataset.train.images[rows], dataset.train.labels[rows], dataset.train.patients[rows])
    with pytest.raises(TrainingError, match=r"[13] training image\(s\) of one class"):
        train(replace(dataset, train=few), settings_for(dataset), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_weights_that_cannot_be_written_are_explained(tmp_path):
    (tmp_path / "weights.safetensors.partial").mkdir()
    with pytest.raises(TrainingError, match=r"weights\.safetensors: cannot be written: .*goes on"):
        save_tensors(tmp_path / "weights.safetensors", {"one": torch.zeros(1)})


def test_a_finished_run_is_returned_untouched(dataset, tmp_path):
    run = run_of(dataset, tmp_path, "none", epochs=1)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    assert run_of(dataset, tmp_path, "none", epochs=1) == run
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_a_folder_with_another_run_is_refused(dataset, finished):
    with pytest.raises(TrainingError, match="other settings"):
        run_of(dataset, finished.folder, seed=7)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"settings": {}}', '{"settings": {"depth": 3}, "card": {}}']
)
def test_a_damaged_run_file_is_explained(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(TrainingError, match="cannot be used"):
        open_run(tmp_path)


def test_a_folder_without_a_run_is_explained(tmp_path):
    with pytest.raises(TrainingError, match="not a run folder"):
        open_run(tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_explained(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, "evaluate", 2)
        with pytest.raises(KeyboardInterrupt):
            run_of(dataset, tmp_path)
    checkpoint = open_run(tmp_path).checkpoint
    whole = checkpoint.read_bytes()
    for kept in (0, 7, 4096, -1):
        checkpoint.write_bytes(whole[:kept])
        with pytest.raises(TrainingError, match=r"damaged .* Delete it"):
            run_of(dataset, tmp_path)
    checkpoint.unlink()
    assert run_of(dataset, tmp_path).finished


@pytest.mark.parametrize("profile", PROFILES)
def test_a_training_that_diverges_is_stopped(dataset, tmp_path, profile):
    with pytest.raises(TrainingError, match=r"not finite in epoch [12]; give a smaller --learning-rate"):
        run_of(dataset, tmp_path, profile, learning_rate=1e12)
    assert not (tmp_path / "weights.safetensors").exists()


def test_the_learning_rate_rises_and_falls(dataset):
    settings = settings_for(dataset, learning_rate=1.0)
    rates = [loop.one_cycle(settings, at / 1000) for at in range(1001)]
    assert max(rates) == pytest.approx(1, abs=1e-6)
    assert rates.index(max(rates)) == 200
    assert rates[0] > 0
    assert rates[-1] == 0


@pytest.mark.parametrize("profile", PROFILES)
def test_settings_survive_json(dataset, profile):
    settings = settings_for(dataset, profile)
    assert RunSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert SplitSettings.from_dict(json.loads(json.dumps(settings.split.to_dict()))) == settings.split


def test_the_entropy_term_reckons_with_an_attacker_who_averages(dataset):
    """What one noisy capture hides well enough, the mean of many does not: the term draws it together further."""
    frames, labels = loop.to_unit(loop.frames_of(dataset.train)), torch.from_numpy(dataset.train.labels)
    pulls = []
    for captures in (1, 64):
        network = SplitNetwork(split_settings(dataset, "sealed", seal={"captures": captures}))
        activation = (
            0.01 * torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(0))
        ).requires_grad_()
        loop.client_loss(network, activation, activation.detach(), None, frames, labels).backward()
        pulls.append(activation.grad.norm())
    assert 10 < pulls[1] / pulls[0] < 64


@pytest.mark.parametrize("profile", ["sealed", "gaussian"])
def test_noise_of_the_training_is_not_that_of_the_release(dataset, profile):
    network = SplitNetwork(split_settings(dataset, profile, seal={"sigma": 0.1, "training_sigma": 0.3}))
    activation = torch.zeros(64, *network.settings.network.release_shape)
    assert network.release(activation).std() == pytest.approx(0.3, rel=0.1)
    assert network.eval().release(activation).std() == pytest.approx(0.1, rel=0.1)
    assert release_law(network.settings.network, network.settings.defence).sigma in (0.1, 0.0)


def test_settings_follow_profile_and_frames(dataset):
    sealed = split_settings(dataset, "sealed", seal={"values": 8, "sigma": None}, saliency={"eps": 0.2})
    assert sealed.defence.values == sealed.network.values == 8
    assert sealed.defence.sigma == DEFENCES["sealed"].sigma
    assert sealed.defence.map.eps == 0.2
    assert (sealed.network.size, sealed.network.recovery) == ("small", "low_rank_sparse")
    law = release_law(sealed.network, sealed.defence)
    assert (law.dtype, law.shape, law.scale) == ("int8", (8,), sealed.scale)
    large = split_settings(phantom.load("mass", 64, seed=0, count=10), "sealed")
    assert (large.network.size, large.network.values) == ("residual", 64)
    plain = split_settings(dataset, "none")
    assert not plain.network.mapped
    assert release_law(plain.network, plain.defence).dtype == "float32"
    assert split_settings(dataset, "psgl").network.recovery == "svt"


@pytest.mark.parametrize(
    ("profile", "changes", "message"),
    [
        ("secret", {}, "choose none, psgl, sealed"),
        ("none", {"seal": {"values": 8}}, "has no seal"),
        ("psgl", {"seal": {"sigma": 0.1}}, "has no seal"),
        ("gaussian", {"seal": {"captures": 8}}, "has no seal: captures"),
        ("gaussian", {"seal": {"values": 8}}, "has no seal: values"),
        ("ressfl", {"seal": {"training_sigma": 0.3}}, "has no seal: training_sigma"),
        ("cem", {"seal": {"steps": 2}}, "has no seal: steps"),
        ("label", {"seal": {"values": 8}}, "a value for each class"),
        ("none", {"saliency": {"eps": 0.1}}, "has no map"),
    ],
)
def test_what_a_profile_does_not_have_is_refused(dataset, profile, changes, message):
    with pytest.raises(TrainingError, match=message):
        split_settings(dataset, profile, **changes)


@pytest.mark.parametrize(
    ("profile", "name", "value"),
    [
        ("sealed", "values", 0), ("sealed", "values", -3), ("sealed", "values", 10**9), ("ressfl", "values", 0),
        ("sealed", "sigma", 0.0), ("sealed", "sigma", -1.0), ("sealed", "sigma", math.nan),
        ("sealed", "sigma", math.inf), ("gaussian", "sigma", 0.0), ("sealed", "entropy_weight", -5.0),
        ("sealed", "entropy_weight", math.nan), ("sealed", "captures", 0), ("sealed", "spread", "all"),
        ("sealed", "steps", 0), ("sealed", "steps", 128), ("sealed", "training_sigma", -1.0),
        ("gaussian", "training_sigma", math.inf),
        ("psgl", "eps", -1.0), ("psgl", "eps", math.nan), ("psgl", "gamma", 3.0),
    ],
)  # fmt: skip
def test_a_defence_that_does_not_defend_is_refused(dataset, profile, name, value):
    """By the options of a command, and in a run or a plan from outside."""
    said = f"^{name.replace('_', ' ')} {value}: give|^sigma 0: gaussian|^sigma 0: sealed"
    part = "saliency" if name in ("eps", "gamma") else "seal"
    with pytest.raises(TrainingError, match=said):
        split_settings(dataset, profile, **{part: {name: value}})
    settings = settings_for(dataset, profile)
    defence = settings.split.defence
    held = defence.map if part == "saliency" else defence
    changed = replace(held, **{name: value})
    defence = replace(defence, map=changed) if part == "saliency" else changed
    with pytest.raises(TrainingError, match=said):
        replace(settings, split=replace(settings.split, defence=defence))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs 0: give 1"),
        ("batch", 1, "batch 1: give 2"),
        ("batch", 10**30, "batch 1000"),
        ("shift", -1, "shift -1: give 0 to 28"),
        ("shift", 29, "shift 29: give 0 to 28"),
        ("seed", -1, "seed -1"),
        ("seed", 10**30, "seed 1000"),
        ("learning_rate", math.nan, "learning rate nan"),
        ("learning_rate", math.inf, "learning rate inf"),
        ("learning_rate", 1e308, r"learning rate 1e\+308"),
        ("learning_rate", 0.0, r"learning rate 0\.0"),
    ],
)
def test_a_schedule_outside_its_ranges_is_refused(dataset, name, value, message):
    with pytest.raises(TrainingError, match=message):
        settings_for(dataset, **{name: value})


def test_frames_that_fit_no_network_are_refused(dataset):
    odd = phantom.load("mass", 30, seed=0, count=10)
    with pytest.raises(TrainingError, match="Give another --size"):
        split_settings(odd, "none")
    flat = replace(dataset, train=replace(dataset.train, images=dataset.train.images[:, :, :14]))
    with pytest.raises(TrainingError, match="--size"):
        split_settings(flat, "none")
