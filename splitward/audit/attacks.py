"""The attacks of an audit, as data: each by its name, with its budget. The quick budgets are ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from splitward.audit.attack import Attack
from splitward.audit.averaging import STRONGEST, Averaging
from splitward.audit.decoder import LABELLED, LARGE, MEDIUM, RESIDUAL, SMALL
from splitward.audit.dense import DenseGradient
from splitward.audit.gan import Gan
from splitward.audit.gradients import ClientGradient, CutGradient
from splitward.audit.neighbour import Neighbour
from splitward.audit.optimise import Optimise
from splitward.audit.prior import Prior
from splitward.audit.ridge import Ridge
from splitward.audit.unsplit import UnSplit

CEILING = "decoder-medium"
"""The attack that is also run on the undefended cut."""
MAP_OFF = ("ridge", CEILING)
"""Attacks that are also run with the intentional attack switched off."""


def _named(*attacks: Attack) -> dict[str, Attack]:
    return {attack.card.name: attack for attack in attacks}


def _at(effort: float, attack: Any) -> Attack:
    """The attack with this share of its steps; those without steps have nothing to save."""
    scaled: Attack = replace(attack, effort=effort) if hasattr(attack, "effort") else attack
    return scaled


_GRADIENTS = tuple(ClientGradient(method=method) for method in ("dlg", "idlg", "inverting"))

FULL = _named(
    Ridge(), Neighbour(), SMALL, MEDIUM, LARGE, RESIDUAL, LABELLED, Gan(), Averaging(), STRONGEST,
    Optimise(), Prior(), UnSplit(), CutGradient(), *_GRADIENTS, DenseGradient(),
)  # fmt: skip
QUICK = {name: _at(0.5, attack) for name, attack in FULL.items()}
