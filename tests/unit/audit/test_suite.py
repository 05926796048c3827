"""Every cell is measured once, beside its own floors, and no failure passes in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitward.audit.floors import class_mean_image
from splitward.audit.ledger import Ledger
from splitward.audit.measure import draw_floors, measure
from splitward.audit.metrics import mse, ssim
from splitward.audit.suite import run_suite
from splitward.audit.summary import check_gates, summarise_attacks, worst_case

pytestmark = pytest.mark.usefixtures("quick_figures")


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl", {})


def test_figures_and_floors_are_those_of_the_targets_attacked(small_case, fake, ledger):
    case, originals = small_case
    cells = run_suite(case, originals, {"few": fake(limit=4)}, ledger, [3], progress=False)
    result, few = cells[0].result, case.first(4)
    guess = fake(limit=4).reconstruct(case, 3)
    assert result["targets"] == 4
    assert result["ssim"]["mean"] == pytest.approx(float(ssim(guess, originals[:4]).mean()))
    assert result["mse"]["p50"] == pytest.approx(float(mse(guess, originals[:4]).double().quantile(0.5)))
    floor = class_mean_image(few.auxiliary, few.auxiliary_labels, few.labels)
    assert result["floors"]["class_mean"]["mse"]["mean"] == pytest.approx(
        float(mse(floor, originals[:4]).mean())
    )
    assert load_file(cells[0].shown)["images"].shape == (4, 1, 28, 28)


def test_a_finished_cell_is_never_done_again(small_case, fake, ledger):
    case, originals = small_case
    calls: list[int] = []
    attacks = {"one": fake(calls)}
    first = run_suite(case, originals, attacks, ledger, [0, 1], progress=False)
    again = run_suite(case, originals, attacks, Ledger(ledger.path, {}), [0, 1, 2], progress=False)
    assert calls == [0, 1, 2]
    assert [cell.result for cell in again[:2]] == [cell.result for cell in first]


def test_another_budget_or_path_is_another_cell(small_case, fake, ledger):
    case, originals = small_case
    calls: list[int] = []
    run_suite(case, originals, {"one": fake(calls)}, ledger, [0], progress=False)
    run_suite(case, originals, {"one": fake(calls, grey=0.4)}, ledger, [0], progress=False)
    run_suite(case, originals, {"one": fake(calls)}, ledger, [0], attacked="map off", progress=False)
    assert len(calls) == 3


def test_a_failure_is_recorded_and_tried_again(small_case, fake, ledger, capsys):
    case, originals = small_case
    calls: list[int] = []
    attacks = {"broken": fake(calls, error="no memory"), "whole": fake()}
    for _ in range(2):
        broken, whole = run_suite(case, originals, attacks, Ledger(ledger.path, {}), [0], progress=False)
    assert calls == [0, 0]
    assert (broken.status, whole.status) == ("failed", "done")
    assert broken.result == {"reason": "RuntimeError: no memory"}
    assert "failed: RuntimeError: no memory" in capsys.readouterr().out
    assert "no memory" in ledger.path.read_text()


def test_an_interrupt_keeps_what_is_done(small_case, fake, ledger):
    case, originals = small_case

    calls: list[int] = []
    attacks = {"one": fake(calls), "two": fake(error="interrupt")}
    with pytest.raises(KeyboardInterrupt):
        run_suite(case, originals, attacks, ledger, [0], progress=False)
    run_suite(case, originals, {"one": fake(calls)}, Ledger(ledger.path, {}), [0], progress=False)
    assert calls == [0]


@pytest.mark.parametrize("knowledge", ["client weights", "architecture of the client half"])
def test_what_needs_weights_is_not_run_on_a_bundle(small_case, fake, ledger, knowledge):
    case, originals = small_case
    calls: list[int] = []
    cells = run_suite(case, originals, {"white": fake(calls, knows=(knowledge,))}, ledger, [0], progress=False)
    assert calls == []
    assert cells[0].status == "not run"
    assert "needs the run folder" in cells[0].result["reason"]


@pytest.mark.parametrize(
    "guess", [torch.full((6, 1, 28, 28), float("nan")), torch.full((6, 1, 28, 28), 2.0), torch.rand(6, 28, 28)]
)
def test_what_is_no_reconstruction_is_refused(small_case, guess):
    case, originals = small_case
    with pytest.raises(ValueError, match="reconstructions"):
        measure(guess, originals, case.labels, draw_floors(case))


def test_the_worst_case_is_the_strongest_attack_at_inference(small_case, fake, ledger):
    case, originals = small_case
    attacks = {
        "weak": fake(grey=0.9),
        "strong": fake(grey=0.5),
        "training": fake(grey=0.5, phase="training"),
        "broken": fake(error="x"),
    }
    rows = summarise_attacks(run_suite(case, originals, attacks, ledger, [0, 1], progress=False))
    worst = worst_case(rows)
    strong = next(row for row in rows if row["name"] == "strong")
    assert worst["mse"]["attack"] == "strong"
    assert worst["mse"]["value"] == pytest.approx(sum(strong["mse_by_seed"]) / 2)
    assert [row["status"] for row in rows] == ["done", "done", "done", "failed"]
    held, broken = check_gates(rows, 0.99, 0.5)
    assert (held["broken"], broken["broken"], broken["attack"]) == (False, True, "strong")
    assert check_gates(rows, None, None) == []


def test_the_worst_case_is_held_against_the_floor_of_its_own_targets():
    def row(name: str, mse: float, floor: float) -> dict[str, Any]:
        floors = {"class_mean": {"mse": {"mean": floor}, "ssim": {"mean": 0.0}}}
        figures = {
            "ssim": {"mean": 0.1},
            "ssim_over_floor": 0.1,
            "mse": {"mean": mse},
            "mse_of_floor": mse / floor,
        }
        return {"name": name, "phase": "inference", "targets": 4, "floors": floors, **figures}

    rows = [row("on easy targets", 0.0143, 0.0140), row("leader", 0.0144, 0.0154)]
    assert worst_case(rows)["mse"]["attack"] == "leader"
    (gate,) = check_gates(rows, None, 0.01435)  # a limit is a limit, whoever goes below it
    assert (gate["attack"], gate["broken"]) == ("on easy targets", True)


def test_without_a_finished_attack_there_is_no_worst_case(small_case, fake, ledger):
    case, originals = small_case
    rows = summarise_attacks(run_suite(case, originals, {"x": fake(error="x")}, ledger, [0], progress=False))
    assert worst_case(rows) is None
