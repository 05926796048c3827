"""What captures of one scene that differ tell an attacker together, beside what the certificate says of them.

The noise of a release is a function of the rounded values, so captures that round alike carry the same noise, and their
mean tells no more than one of them. Captures that differ, by the camera's noise or by a movement, round to several
codes; which ones come, and how often, says where between the steps of the grid the scene lies. The certificate has a
bound for those (`splitward.audit.certificate.recaptures_bound`); here an attacker tries to get below it.

The attacker knows the label and the list of the scenes, as the certificate's does, and simulates the captures of each.
Of the captures released under the device's key it sees each code with its noise once, and how often. Its estimate is
the posterior mean over the scenes of the class: one attack, so that a better one may have a lower error. Another has no
list but images of its own: the suite's decoder of the mean of several captures, which here differ
(`decode_recaptures`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from splitward.audit.attacks import QUICK
from splitward.audit.case import make_case
from splitward.audit.certificate import MOVEMENT, Movement, candidates_bound, recaptures_bound
from splitward.audit.measure import draw_floors, measure
from splitward.audit.target import Target
from splitward.data import Dataset
from splitward.errors import AuditError
from splitward.reproduce.plan import CAPTURES, Plan
from splitward.training.loop import reproducible

VIEWS = 200
"""Captures of each scene that the attacker simulates (our choice)."""
_LEAST = 1e-12
"""Likelihood of a code that no simulated capture had."""


MOVEMENTS = (Movement(0.02, 0), Movement(0.05, 0), Movement(0.02, 1), MOVEMENT)


def attack_recaptures(
    target: Target, dataset: Dataset, *, targets: int, movement: Movement, seed: int = 0, views: int = VIEWS
) -> dict[str, Any]:
    """The attacker's error with `CAPTURES` captures that differ, beside the bounds for these and for as many alike.

    Parameters
    ----------
    targets : int
        Scenes at most, of the test split's half that no attacker has images of.
    """
    if target.clean is None or target.law.sigma == 0:
        raise AuditError(f"{target.name}: releases no noise that could tell captures apart.")
    case, scenes = make_case(target, dataset, auxiliary=1, targets=targets, captures=1, seed=seed)
    clean, sigma = target.clean, target.law.sigma
    with reproducible(seed):
        simulated = torch.stack([clean(movement.capture(scenes)).double() for _ in range(views)], 1)
        captured = torch.stack([clean(movement.capture(scenes)).double() for _ in range(CAPTURES)], 1)
        errors = torch.empty(len(scenes), dtype=torch.float64)
        codes = 0
        for label in case.labels.unique():  # type: ignore[no-untyped-call]  # torch leaves it untyped
            own = (case.labels == label).nonzero().flatten()
            pixels = scenes[own].double().flatten(1)
            known = _Codes(simulated[own])
            for row, index in enumerate(own.tolist()):
                seen, times = captured[index].unique(dim=0, return_counts=True)  # type: ignore[no-untyped-call]  # likewise
                codes += len(seen)
                released = seen + sigma * torch.randn_like(
                    seen
                )  # one noise for each code: it is keyed by the code
                weights = known.score(released, times, sigma).softmax(0)
                errors[index] = (weights @ pixels - pixels[row]).square().mean()
    law, mse = (scenes, case.labels, sigma), float(errors.mean())
    bound = recaptures_bound(clean, *law, movement, captures=CAPTURES, seed=seed)
    alike, _ = candidates_bound(clean(scenes), scenes, case.labels, sigma / CAPTURES**0.5, seed=seed)
    return {
        "noise": movement.noise,
        "pixels": movement.pixels,
        "captures": CAPTURES,
        "targets": len(scenes),
        "codes": codes / len(scenes),
        "mse": mse,
        "mse_error": float(errors.std() / len(errors) ** 0.5),
        "bound_mse": bound,
        "bound_alike_mse": alike,
        "broken": mse < bound,
    }


def decode_recaptures(
    target: Target, dataset: Dataset, plan: Plan, movement: Movement = MOVEMENT, *, seed: int = 0
) -> dict[str, Any]:
    """What `averaging-residual` gets from the mean of `CAPTURES` captures that differ, each with noise of its own.

    The case is the grid's for the same target and seed, so that the figures can be laid beside its.
    """
    case, scenes = make_case(
        target, dataset, auxiliary=plan.auxiliary, targets=plan.targets, captures=CAPTURES, seed=seed
    )

    def release(frames: Tensor, generator: torch.Generator) -> Tensor:
        return target.release(movement.capture(frames), generator)

    generator = torch.Generator().manual_seed(seed)
    with reproducible(seed):
        captures = torch.stack([release(scenes, generator) for _ in range(CAPTURES)])
    moved = replace(case, released=captures[0], captures=captures, release=release)
    reconstructed = QUICK["averaging-residual"].reconstruct(moved, 0)
    found = measure(reconstructed, scenes, case.labels, draw_floors(case))
    return {what: found[what]["mean"] for what in ("ssim", "mse")}


class _Codes:
    """Which codes the captures of each scene of a class have, and how often: from simulated ones, [N, views, k]."""

    def __init__(self, simulated: Tensor) -> None:
        self._scenes, views = simulated.shape[:2]
        found = [one.unique(dim=0, return_counts=True) for one in simulated]
        self._codes = torch.cat([codes for codes, _ in found])
        self._shares = torch.cat([counts for _, counts in found]).double() / views
        self._scene = torch.cat([torch.full((len(codes),), row) for row, (codes, _) in enumerate(found)])

    def score(self, released: Tensor, times: Tensor, sigma: float) -> Tensor:
        """Log likelihood of each scene, [N], for what was released, [codes, k], each so many `times`."""
        total = torch.zeros(self._scenes, dtype=torch.float64)
        for one, count in zip(released, times.tolist(), strict=True):
            gaps = (self._codes - one).square().sum(1)
            logs = count * self._shares.log() - gaps / (2 * sigma**2)
            highest = logs.max()
            summed = torch.zeros(self._scenes, dtype=torch.float64)
            summed.index_add_(0, self._scene, (logs - highest).exp())
            total += (summed + _LEAST).log()
        return total
