"""Captures that differ tell more together than captures that are alike, and no more than the certificate allows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitward.audit.attack import Case
from splitward.audit.attacks import QUICK
from splitward.audit.case import make_case
from splitward.audit.certificate import Movement
from splitward.audit.target import Target, _of_network
from splitward.data import phantom
from splitward.errors import AuditError
from splitward.method.split import SplitNetwork
from splitward.reproduce.plan import CAPTURES, Plan
from splitward.reproduce.recaptures import _Codes, attack_recaptures, decode_recaptures
from splitward.training.settings import split_settings


@pytest.fixture(scope="module")
def dataset():
    return phantom.load("mass", 28, seed=0, count=200)


@pytest.fixture(scope="module")
def target(dataset) -> Target:
    """An untrained sealed network that rounds coarsely and makes little noise, so that a code tells much."""
    torch.manual_seed(0)
    settings = split_settings(dataset, "sealed", seal={"steps": 64, "sigma": 0.05})
    return _of_network("coarse", "run", SplitNetwork(settings).eval(), "seed 0", tuple(dataset.classes))


def test_captures_that_are_alike_tell_as_much_as_one(dataset, target):
    """Their noise is the same: the mean of as many as there are is still one release."""
    found = attack_recaptures(target, dataset, targets=40, movement=Movement(0, 0), views=3)
    assert found["codes"] == 1
    assert found["mse"] == pytest.approx(found["bound_mse"], abs=4 * found["mse_error"])


def test_captures_that_differ_have_several_codes(dataset, target):
    found = attack_recaptures(target, dataset, targets=40, movement=Movement(0.05, 1), views=20)
    assert 1 < found["codes"] <= 8
    assert found["mse"] >= found["bound_mse"] > 0
    assert not found["broken"]


def test_how_often_a_code_comes_tells_scenes_apart_that_have_the_same_codes():
    """Scene 0 rounds to the first code nine times in ten, scene 1 once in ten."""
    codes = torch.tensor([[0.0], [1.0]])
    often, seldom = codes[[0] * 9 + [1]], codes[[0] + [1] * 9]
    known = _Codes(torch.stack((often, seldom)))
    scores = known.score(codes, torch.tensor([6, 2]), sigma=0.01)
    assert scores.tolist()[0] - scores.tolist()[1] == pytest.approx(4 * torch.tensor(9.0).log().item())
    assert known.score(codes, torch.tensor([4, 4]), sigma=0.01).diff().abs() < 1e-6


def test_a_release_without_noise_is_refused(dataset, target):
    with pytest.raises(AuditError, match="releases no noise"):
        attack_recaptures(replace(target, clean=None), dataset, targets=10, movement=Movement(0, 0))


class Spy:
    """Keeps the case that it is given, and gives the mean image back."""

    def reconstruct(self, case: Case, _seed: int) -> torch.Tensor:
        self.case = case
        return case.auxiliary.mean(0, keepdim=True).expand(len(case.labels), -1, -1, -1)


def test_the_decoder_has_captures_that_differ_and_practises_on_such(dataset, target, monkeypatch):
    spy = Spy()
    monkeypatch.setitem(QUICK, "averaging-residual", spy)
    plan = Plan("phantom", "phantom", "mass", 28, epochs=1, batch=64, shift=1, auxiliary=30, targets=10)
    still, _ = make_case(target, dataset, auxiliary=30, targets=10, captures=CAPTURES, seed=0)
    found = decode_recaptures(target, dataset, plan, Movement(0, 0))
    assert 0 < found["ssim"] < 1
    assert found["mse"] > 0
    # Nothing moves: only a camera's eight bits are between these and the grid's own.
    assert (spy.case.captures - still.captures).abs().mean() < 0.1 * still.captures.std()
    decode_recaptures(target, dataset, plan, Movement(0.2, 2))
    assert (spy.case.captures - still.captures).abs().mean() > 0.1 * still.captures.std()
    frames, noise = spy.case.auxiliary, torch.Generator()
    released = [spy.case.release(frames, noise.manual_seed(0)) for _ in range(2)]
    assert not torch.equal(*released)  # of the same noise: the captures differ
