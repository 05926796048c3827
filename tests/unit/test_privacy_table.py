"""The privacy grid on a small synthetic data set: resumable, and its table has the keys that readers rely on."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from splitward.audit.attack import Case
from splitward.audit.ridge import Ridge
from splitward.errors import AuditError
from splitward.reproduce import privacy, table
from splitward.reproduce.plan import PLANS, Plan, attacker_seeds
from splitward.reproduce.privacy import Grid, run_grid
from splitward.reproduce.table import make_table, write_table

DEFENCES = ("none", "sealed", "label")


@dataclass(frozen=True)
class Cheat:
    """An attack that knows the targets: it must break every certificate."""

    card = replace(Ridge().card, name="cheat", phase="training", knows=("released tensor", "client weights"))

    def reconstruct(self, case: Case, seed: int) -> torch.Tensor:
        assert case.frames is not None, f"attacker {seed} was not given the traffic"
        return case.frames


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """A finished grid of one target seed, attacked by ridge regression and by a cheat."""
    folder = tmp_path_factory.mktemp("grid")
    plan = Plan("phantom", "phantom", "mass", 28, epochs=1, batch=64, shift=1, auxiliary=120, targets=20)
    attacks = {"ridge": Ridge(), "cheat": Cheat()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PLANS, "phantom", plan)
        for module in (privacy, table):
            patch.setattr(module, "FULL", attacks)
        patch.setattr(privacy, "MAP_OFF", ("ridge",))
        made = Grid(folder, folder / "runs", folder, ("phantom",), DEFENCES, (0,))
        run_grid(made)
        first = {path.name: path.read_bytes() for path in (folder / "privacy").iterdir()}
        patch.setattr(privacy, "train", None)  # a finished cell needs no network again
        run_grid(made)
        assert {path.name: path.read_bytes() for path in (folder / "privacy").iterdir()} == first
        write_table(folder)
    return made


def test_the_table_has_the_keys_that_readers_rely_on(grid):
    found = json.loads((grid.out / "privacy.json").read_text())["phantom"]
    assert found["floors"].keys() == {"mean_image", "class_mean", "class_template"}
    assert found["floors"]["class_mean"].keys() == {"ssim", "mse"}
    assert found["defences"].keys() == set(DEFENCES)
    assert found["undefended_accuracy"] == found["defences"]["none"]["accuracy"]
    sealed = found["defences"]["sealed"]
    assert sealed["released_bytes"] == 16
    assert 0 < sealed["auc"] <= 1
    # Attacks on training are reported apart.
    assert sealed["worst_attack"] == sealed["min_mse_attack"] == "ridge"
    assert sealed["worst_ssim"] == sealed["attacks"]["ridge"]["ssim"]
    assert sealed["attacks"]["cheat"]["ssim"] == pytest.approx(1, abs=1e-4)
    assert sealed["attacks"]["ridge"]["cells"] == 3
    assert sealed["map_off"].keys() == {"ridge"}
    assert (grid.out / "privacy-phantom.png").read_bytes().startswith(b"\x89PNG")


def test_an_attack_below_the_bound_is_named(grid):
    certificate = json.loads((grid.out / "privacy.json").read_text())["phantom"]["certificate"]
    assert certificate["broken_by"] == ["cheat"]
    assert 0 < certificate["captures_mse"]["8"] <= certificate["bound_mse"]
    assert certificate["assumptions"]


def test_attacks_that_need_a_gradient_leave_the_control_out(grid):
    rows = json.loads((grid.out / "privacy.json").read_text())["phantom"]["defences"]
    assert rows["label"]["attacks"].keys() == {"ridge"}
    assert rows["none"]["attacks"].keys() == {"ridge", "cheat"}


def test_no_two_targets_share_an_attacker():
    seeds = [seed for target in range(3) for seed in attacker_seeds("sealed", target)]
    assert len(set(seeds)) == 9
    assert len(attacker_seeds("gaussian", 0)) == 1


def test_a_damaged_ledger_is_said_so(tmp_path: Path):
    (tmp_path / "mnist-none-0.jsonl").write_text('{"settings": {}}\n{"key"\n')
    with pytest.raises(AuditError, match=r"mnist-none-0\.jsonl: a line is damaged"):
        make_table(tmp_path)
