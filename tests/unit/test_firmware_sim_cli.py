"""The simulation's command line: an error is one line, and says what to do."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from firmware_sim.broker import free_port
from firmware_sim.cli import main
from splitward.wire.release import ReleaseLaw
from splitward.wire.server import ServerCard, write_server_card


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """What the command says when it refuses, in an empty folder: one line, and 2."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert said.err.startswith("firmware_sim: ")
        assert said.err.count("\n") == 1
        return said.err

    return run


def test_chaos_without_the_demo_says_how_to_get_it(refused):
    Path("calm.toml").write_text('name = "calm"\n')
    assert "demo/frames.npz is not there: `make demo` makes it" in refused("chaos", "calm.toml")
    Path("own.npz").touch()
    assert "--bundle" in refused("chaos", "calm.toml", "--frames", "own.npz")


def test_a_load_without_a_broker_is_refused_at_once(refused):
    Path("weights").touch()
    card, nothing = Path("tiny.server.json"), hashlib.sha256().hexdigest()
    law = ReleaseLaw((2, 4, 4), "int8", bound=1.0, sigma=0.3)
    write_server_card(card, ServerCard(1, "0f" * 16, "tiny", ("no", "yes"), law, {}, "weights", nothing))
    assert "Is the broker there?" in refused("load", "--card", str(card), "--port", str(free_port()))


def test_a_load_without_a_card_says_what_makes_one(refused):
    assert "`splitward export` writes it" in refused("load")


def test_a_fleet_without_frames_names_the_file(refused):
    assert "nope.npz" in refused("fleet", "--frames", "nope.npz", "--devices", "1")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--sites", "0"), "with 0 clients"),
        (("--sites", "9", "--alpha", "0.001"), "cannot be dealt out to 9 sites"),
        (("--data", "/nope.npz"), "/nope.npz"),
        (("--epochs", "0"), "epochs 0"),
        (("--defence", "nope"), "nope"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_anything_starts(refused, monkeypatch, given, said):
    pytest.importorskip("torch", reason="torch is not installed: pip install 'splitward[train]'")
    monkeypatch.setattr("firmware_sim.hospitals.start_broker", lambda: pytest.fail("a broker was started"))
    assert said in refused("hospitals", "--sites", "2", "--folder", "there", *given)
    assert not Path("there").exists()


def test_hospitals_in_the_folder_of_an_earlier_training_are_refused(refused):
    pytest.importorskip("torch", reason="torch is not installed: pip install 'splitward[train]'")
    Path("there/cloud").mkdir(parents=True)
    assert "there: holds a training" in refused("hospitals", "--sites", "2", "--folder", "there")


def test_an_interrupt_is_not_a_traceback(monkeypatch, capsys):
    def interrupted(_config):
        raise KeyboardInterrupt

    monkeypatch.setattr("firmware_sim.cli.run_fleet", interrupted)
    assert main(["fleet"]) == 130
    assert capsys.readouterr().err == "firmware_sim: interrupted.\n"
