"""The privacy grid on a small synthetic data set: resumable, and its table has the keys that readers rely on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from splitward.audit.attack import Case
from splitward.audit.case import make_case
from splitward.audit.ridge import Ridge
from splitward.data import phantom
from splitward.errors import AuditError
from splitward.reproduce import plan as plan_module
from splitward.reproduce import privacy, table
from splitward.reproduce.plan import PLANS, TIMES, Plan, attacker_seeds
from splitward.reproduce.privacy import Grid, open_plan, run_grid, without_test
from splitward.reproduce.privacy_page import privacy_page
from splitward.reproduce.table import make_table, write_table

DEFENCES = ("none", "sealed", "label", "scores")


def told(detected: bool, at: list[int | None], ssim: float | None) -> dict[str, object]:
    return {
        "detected": detected,
        "detected_in_time": detected and at != [51],
        "step_at_detection": at,
        "ssim_at_detection": ssim,
        "ssim_final_without_guard": 0.5,
        "curves": [],
    }


FSHA = {
    "command": "splitward reproduce hijack",
    "profiles": {
        "sealed": {
            **told(True, [8, 9], 0.2),
            "conditional": told(False, [40, None], None),
            "turning": {"turns_at": 40, **told(True, [48], 0.1), "conditional": told(True, [50], 0.11)},
            "blended": told(True, [51], 0.12),
            "by_few_frames": told(True, [8], 0.13),
            "floor_ssim": 0.318,
            "false_alarms": 0,
            "honest_trainings": 20,
        }
    },
}


@dataclass(frozen=True)
class Cheat:
    """An attack that knows the targets, found where no attack may look: it must break every certificate."""

    card = replace(Ridge().card, name="cheat", knows=("released tensor", "client weights"))
    originals: ClassVar[list[torch.Tensor]] = []

    def reconstruct(self, case: Case, seed: int) -> torch.Tensor:
        assert case.frames is None, f"attacker {seed} was given the targets"
        return self.originals[-1]


@dataclass(frozen=True)
class OnTraining:
    """An attack on the training: it is given the frames, from which the gradients are computed."""

    card = replace(Ridge().card, name="on-training", phase="training", knows=("gradients of the client half",))

    def reconstruct(self, case: Case, seed: int) -> torch.Tensor:
        assert case.frames is not None, f"attacker {seed} was not given the traffic"
        return case.frames


@dataclass(frozen=True)
class Scaled:
    """Ridge regression that could be given more steps, if it had any; weaker than plain ridge regression."""

    effort: float = 0.5
    card = replace(Ridge().card, name="scaled")

    def reconstruct(self, case: Case, seed: int) -> torch.Tensor:
        return 0.5 * Ridge().reconstruct(case, seed)


def spied(*arguments: Any, **settings: Any) -> tuple[Case, torch.Tensor]:
    case, originals = make_case(*arguments, **settings)
    Cheat.originals.append(originals)
    return case, originals


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """A finished grid of one target seed, attacked by ridge regression and by a cheat."""
    folder = tmp_path_factory.mktemp("grid")
    plan = Plan("phantom", "phantom", "mass", 28, epochs=1, batch=64, shift=1, auxiliary=120, targets=20)
    attacks = {"ridge": Ridge(), "scaled": Scaled(), "cheat": Cheat(), "on-training": OnTraining()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANS, "phantom", plan)
        for module in (privacy, table, plan_module):
            patch.setattr(module, "QUICK", attacks)
        patch.setattr(plan_module, "CORE", ("ridge",))
        patch.setattr(privacy, "MAP_OFF", ("ridge",))
        patch.setattr(privacy, "make_case", spied)
        made = Grid(folder, folder / "runs", folder, ("phantom",), DEFENCES, (0,))
        run_grid(made)
        first = {path.name: path.read_bytes() for path in (folder / "privacy").iterdir()}
        patch.setattr(privacy, "train", None)  # a finished cell needs no network again
        run_grid(made)
        assert {path.name: path.read_bytes() for path in (folder / "privacy").iterdir()} == first
        write_table(folder)
    return made


def test_cells_of_another_network_are_not_joined(grid, tmp_path, monkeypatch):
    """A ledger is kept, and the run folder is not: what is trained anew elsewhere may be another network."""
    monkeypatch.setitem(
        PLANS, "phantom", Plan("phantom", "phantom", "mass", 28, 1, 64, 1, auxiliary=120, targets=20)
    )
    monkeypatch.setattr(plan_module, "CORE", ("ridge",))
    for module in (privacy, plan_module):
        monkeypatch.setattr(module, "QUICK", {"ridge": Ridge()})
    name = "privacy/phantom-label-0.jsonl"
    (tmp_path / "privacy").mkdir()
    lines = [json.loads(line) for line in (grid.out / name).read_text().splitlines()]
    training = next(line for line in lines if line.get("key") == privacy.TRAINING)
    training["result"]["weights"] = "0" * 64
    (tmp_path / name).write_text(
        "".join(json.dumps(line) + "\n" for line in lines if line is training or "key" not in line)
    )
    with pytest.raises(
        AuditError, match=r"phantom-label-0.jsonl: its cells are of another network .*\(weights\)"
    ):
        run_grid(replace(grid, out=tmp_path, defences=("label",)))


def test_the_table_has_the_keys_that_readers_rely_on(grid):
    found = json.loads((grid.out / "privacy.json").read_text())["phantom"]
    assert found["floors"].keys() == {"mean_image", "class_mean", "class_template"}
    assert found["floors"]["class_mean"].keys() == {"ssim", "mse"}
    assert found["defences"].keys() == set(DEFENCES)
    assert found["undefended_accuracy"] == found["defences"]["none"]["accuracy"]
    sealed = found["defences"]["sealed"]
    assert sealed["released_bytes"] == 16
    assert 0 < sealed["auc"] <= 1
    assert sealed["worst_attack"] == sealed["min_mse_attack"] == "cheat"
    assert sealed["worst_ssim"] == sealed["attacks"]["cheat"]["ssim"] == pytest.approx(1, abs=1e-4)
    # Attacks on training are reported apart.
    label = found["defences"]["label"]
    assert label["worst_attack"] == label["min_mse_attack"] == "ridge"
    assert sealed["attacks"]["on-training"]["phase"] == "training"
    assert sealed["attacks"]["ridge"]["cells"] == 3
    assert sealed["map_off"].keys() == {"ridge"}
    assert (grid.out / "privacy-phantom.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_tables_figures(grid, monkeypatch):
    monkeypatch.setitem(PLANS, "phantom", Plan("phantom", "phantom", "mass", 28, 1, 64, 1))
    found = json.loads((grid.out / "privacy.json").read_text())
    row = found["phantom"]["defences"]["sealed"]
    page = privacy_page({**found, "fsha": FSHA})
    assert f"| sealed | {100 * row['accuracy']:.2f}" in page
    assert f"| {row['worst_ssim']:.3f} ({row['worst_ssim_floor']:.3f}) | cheat |" in page
    assert f"{row['auxiliary']} auxiliary images, 20 targets" in page
    assert "Not complete: label, none, scores, sealed" in page
    assert "it is broken by cheat" in page
    assert "| sealed | critic told the labels | no | 40, - |  | 0.500 | 0.318 | 0 of 20 |" in page
    assert "| sealed | critic told the labels, serves the task as well | late | 51 |" in page
    turned = "critic told the labels, turns after 40"
    assert f"| sealed | {turned} | yes | 50 | 0.110 | 0.500 | 0.318 | 0 of 20 |" in page
    assert (
        "| sealed | by one frame of each class in a batch | yes | 8 | 0.130 | 0.500 | 0.318 | 0 of 20 |" in page
    )
    assert "by the frames of one class" not in page, "what was not measured has no line"


def test_the_hijacking_trial_is_taken_into_the_table(grid, tmp_path):
    for profile, name in (("sealed", "hijack.json"), ("none", "hijack-none.json")):
        trial = {profile: FSHA["profiles"]["sealed"], "command": f"splitward reproduce {profile}"}
        (tmp_path / name).write_text(json.dumps(trial))
    found = write_table(tmp_path)["fsha"]
    assert found["profiles"].keys() == {"none", "sealed"}
    assert found["command"] == "splitward reproduce none; splitward reproduce sealed"
    assert (found["detected"], found["ssim_at_detection"], found["false_alarms"]) == (True, 0.2, 0)
    assert "curves" not in json.dumps(found)


def test_an_attack_below_the_bound_is_named(grid):
    certificate = json.loads((grid.out / "privacy.json").read_text())["phantom"]["certificate"]
    assert certificate["broken_by"] == ["cheat"]
    assert 0 < certificate["captures_mse"]["8"] <= certificate["bound_mse"]
    assert certificate["assumptions"]


def test_attacks_that_need_a_gradient_leave_the_controls_out(grid):
    rows = json.loads((grid.out / "privacy.json").read_text())["phantom"]["defences"]
    for control in ("label", "scores"):
        assert rows[control]["attacks"].keys() == {"ridge"}
    assert (rows["label"]["released_bytes"], rows["scores"]["released_bytes"]) == (8, 2)
    assert rows["none"]["attacks"].keys() == {"ridge", "scaled", "cheat", "on-training"}


def test_a_cell_of_an_attack_that_was_changed_since_waits_to_be_made_again(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(privacy, "QUICK", {"ridge": Ridge()})
    assert privacy.is_current({"cell": "training"})
    key = json.loads(json.dumps(privacy.cell_key("ridge", Ridge(), 100, "deployed")))
    assert privacy.is_current(key)
    for changed in ({"budget": {**key["budget"], "effort": 9}}, {"attack": "gone"}):
        assert not privacy.is_current({**key, **changed})
    (old := tmp_path / "privacy").mkdir()
    for path in (grid.out / "privacy").glob("*.jsonl"):
        (old / path.name).write_text(path.read_text())
    monkeypatch.setattr(table, "QUICK", {"ridge": Ridge()})
    rows = table.make_table(old)["phantom"]["defences"]
    assert {name for row in rows.values() for name in row["attacks"]} == {"ridge"}


def test_more_of_the_strongest_attack_is_tried_on_sealed(grid):
    rows = json.loads((grid.out / "privacy.json").read_text())["phantom"]["defences"]
    assert {name for name, row in rows.items() if "more_budget" in row} == {"sealed"}
    more = rows["sealed"]["more_budget"]
    assert (more["attack"], more["times"]) == ("scaled", TIMES)
    assert more["moved"] == pytest.approx(more["ssim_with_more"] - more["ssim"], abs=2e-5)


def test_a_search_never_sees_a_test_image():
    dataset = phantom.load("mass", 28, seed=0, count=120)
    plan = Plan("phantom", "phantom", "mass", 28, 1, 64, 0, variants={"k4": {"values": 4}})
    searched = without_test(dataset)
    shown = {
        split.tobytes() for name in ("train", "validation", "test") for split in getattr(searched, name).images
    }
    assert not shown & {image.tobytes() for image in dataset.test.images}
    assert searched.test is dataset.validation
    assert not set(searched.train.patients) & set(searched.validation.patients)
    assert (
        open_plan(plan, Path(), 0).test.images.shape
        == open_plan(replace(plan, variants={}), Path(), 0).validation.images.shape
    )


def test_no_two_targets_share_an_attacker():
    seeds = [seed for target in range(3) for seed in attacker_seeds("sealed", target)]
    assert len(set(seeds)) == 9
    assert len(attacker_seeds("gaussian", 0)) == 1


def test_a_damaged_ledger_is_said_so(tmp_path: Path):
    (tmp_path / "mnist-none-0.jsonl").write_text('{"settings": {}}\n{"key"\n')
    with pytest.raises(AuditError, match=r"mnist-none-0\.jsonl: a line is damaged"):
        make_table(tmp_path)
