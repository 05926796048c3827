"""The trainings of a cloud service, led by a process beside it: torch and its steps stay out of the service's own.

`python -m splitward.training.remote.lead FOLDER TRAINING ...` leads these trainings until SIGTERM. FOLDER/broker.json
says where the broker is, FOLDER/TRAINING/wanted.json what the operator asked for; journal and progress.json, which
tells how it goes, come to lie beside it.

A training that is over is led on: whoever lost the last answer asks for it again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from splitward.errors import SplitwardError, TrainingError
from splitward.method.sealing import Spread
from splitward.training.remote.carrier import TICK_S, Broker, run_server
from splitward.training.remote.halves import Schedule
from splitward.training.remote.journal import take_lock
from splitward.training.remote.plan import Arrangement, Labels, Plan, Precision
from splitward.training.remote.server import Server
from splitward.training.remote.session import Member
from splitward.training.run import write_atomically
from splitward.training.settings import RunSettings, frame_settings

NICENESS = 10
"""The service's own work comes first."""
LOCK_S = 60.0
TELL_S = 1.0


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator asks for: the frames, the defence, and `Plan`'s own values."""

    channels: int
    side: int
    classes: int
    defence: str = "sealed"
    values: int | None = None
    sigma: float | None = None
    entropy_weight: float | None = None
    spread: Spread | None = None
    captures: int | None = None
    steps: int | None = None
    training_sigma: float | None = None
    epochs: int = 5
    batch: int = 128
    learning_rate: float = 3e-3
    shift: int = 0
    seed: int = 0
    sites: int = 1
    arrangement: Arrangement | None = None
    rounds: int = 1
    labels: Labels = "cloud"
    precision: Precision = "float32"
    clip: float = 0.0
    noise: float = 0.0
    silence_s: float = 60.0

    def plan(self) -> Plan:
        """The plan; `TrainingError` where there is none."""
        seal: dict[str, Any] = {
            "values": self.values, "sigma": self.sigma, "entropy_weight": self.entropy_weight,
            "spread": self.spread, "captures": self.captures, "steps": self.steps,
            "training_sigma": self.training_sigma,
        }  # fmt: skip
        try:
            split = frame_settings(self.channels, self.side, self.classes, self.defence, seal=seal)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        arrangement = self.arrangement or ("single" if self.sites == 1 else "splitfed-v2")
        run = RunSettings(
            *("", None, None, split, self.epochs, self.batch, self.learning_rate),
            shift=self.shift,
            seed=self.seed,
        )
        return Plan(
            *(run, arrangement, self.sites, self.rounds, self.labels, self.precision),
            *(self.clip, self.noise, self.silence_s),
        )


class Lead:
    """Leads the trainings in `folder`, and writes their progress."""

    def __init__(self, folder: Path, trainings: list[str]) -> None:
        self._folder, self._parent = folder, os.getppid()
        self._stop = threading.Event()
        self._told: dict[str, str] = {}
        self._due_s = 0.0
        self.servers: dict[bytes, Server] = {}
        for name in trainings:
            self._open(name)

    def run(self, broker: Broker) -> None:
        """Lead until SIGTERM, or until the service is gone."""
        signal.signal(signal.SIGTERM, lambda *_: self._stop.set())
        try:
            if self.servers:
                run_server(self.servers, broker, self._goes_on)
            while self._goes_on():
                self._stop.wait(TICK_S)
        finally:
            self._tell()
            for server in self.servers.values():
                server.close()

    def _open(self, name: str) -> None:
        folder, training = self._folder / name, bytes.fromhex(name)
        try:
            wanted = msgspec.json.decode((folder / "wanted.json").read_bytes(), type=Wanted)
            self.servers[training] = Server(wanted.plan(), training, folder / "journal")
        except (SplitwardError, msgspec.DecodeError, OSError) as error:
            self._write(name, {"failure": f"it cannot be led: {error}"})

    def _goes_on(self) -> bool:
        if time.monotonic() >= self._due_s:
            self._tell()
            self._due_s = time.monotonic() + TELL_S
        return not self._stop.is_set() and os.getppid() == self._parent

    def _tell(self) -> None:
        for training, server in self.servers.items():
            self._write(training.hex(), progress_of(server))

    def _write(self, name: str, progress: dict[str, Any]) -> None:
        text = json.dumps(progress)
        if self._told.get(name) != text:
            self._told[name] = text
            write_atomically(self._folder / name / "progress.json", text)


def progress_of(server: Server) -> dict[str, Any]:
    """How far a training is, as plain values; `curve` has each epoch's mean loss and, where known, accuracy."""
    session, plan = server.session, server.plan
    return {
        "failure": server.failure,
        "finished": server.finished,
        "round": min(session.round, plan.turns),
        "rounds": plan.turns,
        "bytes_up": session.bytes_up,
        "bytes_down": session.bytes_down,
        "sites": [_site(member, plan) for _, member in sorted(session.members.items())],
    }


def _site(member: Member, plan: Plan) -> dict[str, Any]:
    state = "has left" if member.left else "training" if member.live else "left out"
    told = plan.labels == "cloud"  # at the client, it tells the loss alone
    return {
        "device": member.name,
        "state": state,
        "frames": member.frames,
        "steps": member.steps,
        "of": Schedule(plan.run, member.frames).steps,
        "curve": [
            {
                "epoch": epoch + 1,
                "loss": sums.loss / max(sums.seen, 1),
                "accuracy": sums.right / max(sums.seen, 1) if told else None,
            }
            for epoch, sums in sorted(member.curve.items())
        ],
    }


def _take_folder(folder: Path) -> int:
    """Wait until nobody else leads here: the process before this one may still be at its end."""
    due_s = time.monotonic() + LOCK_S
    while (descriptor := take_lock(folder / "lock")) is None:
        if time.monotonic() > due_s:
            raise TrainingError(f"{folder}: another process leads these trainings.")
        time.sleep(TICK_S)
    return descriptor


def main(arguments: list[str]) -> int:
    """Run the command; 2 after an error that it explains on standard error."""
    try:
        os.nice(NICENESS)
        torch.set_num_threads(1)
        folder = Path(arguments[0])
        held = _take_folder(folder)
        broker = msgspec.json.decode((folder / "broker.json").read_bytes(), type=Broker)
        Lead(folder, arguments[1:]).run(broker)
        os.close(held)
    except (SplitwardError, msgspec.DecodeError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
