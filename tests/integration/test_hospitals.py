"""Hospitals train together, each a process of its own, while sites, cloud and broker are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from firmware_sim.errors import ScenarioError
from firmware_sim.hospitals import Training, run_hospitals
from firmware_sim.scenario import Counts, Event, Scenario

pytest.importorskip("torch", reason="torch is not installed: pip install 'splitward[train]'")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_step_is_taken_once_whoever_is_killed(tmp_path: Path, mosquitto: Any) -> None:
    mosquitto.stop()  # only to skip without one: the hospitals start their own
    scenario = Scenario(
        name="hospitals",
        devices=2,
        duration_s=1.0,
        heal_s=300.0,
        events=(
            Event(at_s=0.0, at_request=8, kind="kill_agent", device=0),
            Event(at_s=0.1, at_request=16, kind="cut"),
            Event(at_s=0.2, at_request=24, kind="kill_cloud", lasts_s=1.0),
            Event(at_s=0.3, at_request=32, kind="kill_broker", lasts_s=1.0),
        ),
    )
    training = Training(epochs=2, rounds=2, batch=32, alpha=1.0)
    report = run_hospitals(scenario, training, tmp_path)
    assert (report.steps_lost, report.steps_twice, report.skipped) == (0, 0, 0)
    assert report.complete
    assert report.steps > 0
    assert report.kills == {"agent": 1, "cloud": 1, "broker": 1}
    assert report.faults == {"cut": 1}
    assert len(set(report.accuracy)) == 1, "every site has the same network"
    assert (tmp_path / "run-0" / "metrics.jsonl").exists()


def test_what_cannot_befall_a_training_is_refused() -> None:
    with pytest.raises(ScenarioError, match="disk_full"):
        run_hospitals(Scenario(counts=Counts(disk_full=1)), Training())


@pytest.mark.slow
def test_a_process_that_explains_an_error_ends_the_whole(
    tmp_path: Path, mosquitto: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    mosquitto.stop()
    (tmp_path / "run-0").mkdir()
    (tmp_path / "run-0" / "run.json").write_text("{}")
    with pytest.raises(ScenarioError, match="ended with the error above"):
        run_hospitals(Scenario(devices=1, duration_s=1.0), Training(), tmp_path)
    assert "holds a run that is not of this training" in capfd.readouterr().err
