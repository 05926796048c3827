"""What the sites of a training and the cloud agree on before the first step."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from splitward.errors import TrainingError
from splitward.method.halves import CONTROLS
from splitward.training.settings import RunSettings

Arrangement = Literal["single", "turn", "splitfed-v1", "splitfed-v2", "fedsgd"]
Labels = Literal["cloud", "client"]
Precision = Literal["float32", "int8", "int4"]


@dataclass(frozen=True)
class Plan:
    """One training over the wire.

    Attributes
    ----------
    run : RunSettings
        Network, defence and schedule, as for a training on one machine.
    arrangement : "single", "turn", "splitfed-v1", "splitfed-v2" or "fedsgd"
        One client; clients one after the other, each going on with the half of the one before; or all at once, with
        client halves averaged after each round. v1 also keeps a server half for each client and averages those; v2
        has one server half, which takes the clients' steps as they come (Thapa et al. 2022). With fedsgd a round is
        one step of both halves, along the mean gradient of all its frames (McMahan et al. 2017): for sites whose
        images are unlike.
    clients : int
        The training begins when so many have joined.
    rounds : int
        Into which each client's steps are divided. Client halves are exchanged after each round.
    labels : "cloud" or "client"
        Who has the labels. At the client, the last layer of each stream lives there too (U-shaped).
    precision : "float32", "int8" or "int4"
        Of activations and gradients on the wire.
    clip : float
        Largest norm of one frame's gradient at the cut, before the batch's mean; 0 for no limit. Like `noise` it acts
        on what the cloud sends down, and hides nothing from the cloud itself.
    noise : float
        Standard deviation of the noise on these gradients, in units of `clip`.
    silence_s : float
        A client that says nothing for so long while others wait is left out of the round.
    """

    run: RunSettings
    arrangement: Arrangement = "single"
    clients: int = 1
    rounds: int = 1
    labels: Labels = "cloud"
    precision: Precision = "float32"
    clip: float = 0.0
    noise: float = 0.0
    silence_s: float = 60.0

    def __post_init__(self) -> None:
        if (self.clients == 1) != (self.arrangement == "single") or self.clients < 1:
            raise TrainingError(
                f"arrangement {self.arrangement} with {self.clients} clients: single is for one client, the others "
                "are for two or more."
            )
        scales = 0 <= self.clip < math.inf and 0 <= self.noise < math.inf
        if self.rounds < 1 or not scales or not self.silence_s > 0:
            raise TrainingError(
                f"rounds {self.rounds}, clip {self.clip}, noise {self.noise}, silence_s {self.silence_s}: give at "
                "least one round, no negative or endless clip or noise, and a silence over 0."
            )
        if self.noise and not self.clip:
            raise TrainingError("noise without clip has no scale: give clip, the norm to which it relates.")
        if (profile := self.run.split.defence.profile) in CONTROLS:
            raise TrainingError(f"the profile {profile} has no server half to train: choose another defence.")

    @property
    def pooled(self) -> bool:
        """Whether a round is one step of both halves."""
        return self.arrangement == "fedsgd"

    @property
    def turns(self) -> int:
        """Rounds of the whole training: in turn, every client has `rounds` of its own."""
        return self.rounds * (self.clients if self.arrangement == "turn" else 1)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that name this plan, whatever each site calls its data."""
        values = self.to_dict()
        values["run"]["data"] = ""
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Plan:
        """Inverse of `to_dict`; `TrainingError` when the values do not fit."""
        try:
            return Plan(**{**values, "run": RunSettings.from_dict(values["run"])})
        except (TypeError, KeyError, ValueError) as error:
            raise TrainingError(f"this plan of a training cannot be read: {error!r}.") from error
