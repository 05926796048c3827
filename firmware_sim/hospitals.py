"""Hospitals that train together: each a process with its own patients' images, the cloud another, a broker between.

The scenarios are those of the fleet, as far as they can befall a training: `kill_agent` kills a site, `kill_cloud` the
coordinator, `kill_broker` the broker, and the network's faults lie between the sites and the broker. What is killed is
started again and goes on from its journal. At the end every site must have its run, and every step its one place.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from msgspec import Struct

from firmware_sim.broker import Broker, start_broker
from firmware_sim.errors import ScenarioError
from firmware_sim.proxy import FaultProxy, Toxics
from firmware_sim.scenario import TOXIC, Event, Kind, Scenario, plan, toxics_of
from splitward.errors import SplitwardError

BLOWS: frozenset[Kind] = TOXIC | {"kill_agent", "kill_cloud", "kill_broker", "cut"}
RESTART_S = 0.5
TICK_S = 0.1
REFUSED = 2
"""Exit status of a process that has explained an error: another start would end the same way."""


@dataclass(frozen=True)
class Training:
    """What the hospitals train: the data set, dealt out by patient, and the schedule."""

    data: str = "phantom"
    task: str | None = None
    size: int | None = 28
    defence: str = "sealed"
    arrangement: str = "splitfed-v2"
    precision: str = "float32"
    alpha: float | None = None
    epochs: int = 2
    rounds: int = 4
    batch: int = 16
    seed: int = 0


class HospitalsReport(Struct, frozen=True, kw_only=True):
    """What became of a training under a scenario.

    Attributes
    ----------
    frames : list of int
        Training images of each site.
    steps, steps_lost, steps_twice : int
        Steps that the sites' schedules hold, and by how many the cloud took too few or too many.
    skipped : int
        Rounds that went on without a site; its steps of that round are neither lost nor taken.
    accuracy : list of float
        Of each site's finished run, on the test split.
    """

    scenario: str
    seed: int
    frames: list[int]
    steps: int
    steps_lost: int
    steps_twice: int
    skipped: int
    kills: dict[str, int]
    faults: dict[str, int]
    starts: int
    wall_s: float
    accuracy: list[float]

    @property
    def complete(self) -> bool:
        """Whether every site has its run and every step was taken once."""
        return not self.steps_lost and not self.steps_twice and len(self.accuracy) == len(self.frames)


class _Kept:
    """A process that is started again until it has done its work."""

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._target, self._arguments = target, arguments
        self._process: BaseProcess | None = None
        self._due_s = 0.0
        self.starts = 0
        self.done = False

    def supervise(self, now_s: float) -> None:
        if self._process is not None and self._process.exitcode is not None:
            if self._process.exitcode == REFUSED:
                raise ScenarioError("a process of the training has ended with the error above.")
            self.done = self._process.exitcode == 0
            self._process, self._due_s = None, max(self._due_s, now_s + RESTART_S)
        if self._process is None and not self.done and now_s >= self._due_s:
            context = multiprocessing.get_context("spawn")
            self._process = context.Process(target=_explained, args=(self._target, *self._arguments))
            self._process.start()
            self.starts += 1

    def kill(self, until_s: float = 0.0) -> bool:
        """Kill it, and leave it dead until then; whether it ran."""
        if self._process is None or self._process.exitcode is not None:
            return False
        self._process.kill()
        self._process.join()
        self._due_s = until_s
        return True


def _explained(target: Callable[..., None], *arguments: Any) -> None:
    """Do the work of a process; an explained error is one line, an interrupt none."""
    try:
        target(*arguments)
    except SplitwardError as error:
        sys.stderr.write(f"firmware_sim: {error}\n")
        sys.exit(REFUSED)
    except KeyboardInterrupt:
        sys.exit(130)


def run_hospitals(scenario: Scenario, training: Training, folder: Path | None = None) -> HospitalsReport:
    """Let `scenario.devices` sites train while the scenario happens, and then until they are done.

    Parameters
    ----------
    folder : Path, optional
        Of runs and journals, which then stay: a new one. A temporary one by default.

    Raises
    ------
    ScenarioError
        The scenario holds a blow that no training can be dealt, it was not done `heal_s` after the last one, or one of
        its processes ended with an explained error; or `folder` holds a training.
    TrainingError, DataError
        There is no such training, or no such data for so many sites.
    """
    from splitward.training.remote.site import open_training

    unknown = sorted({event.kind for event in plan(scenario)} - BLOWS)
    if unknown:
        raise ScenarioError(
            f"a training cannot be dealt {', '.join(unknown)}, only {', '.join(sorted(BLOWS))}."
        )
    if folder is not None and (folder / "cloud").exists():
        raise ScenarioError(f"{folder}: holds a training, which would be gone on with. Give a new --folder.")
    sites = scenario.devices
    the_plan = _plan_of(training, sites)
    _parts(training, sites)  # which a site could refuse only in a process of its own
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="splitward-hospitals-")))
        folder = folder.resolve()
        identifier = open_training(the_plan, folder / "cloud")
        broker = stack.enter_context(start_broker())
        proxy = stack.enter_context(FaultProxy(broker.port, seed=scenario.seed))
        cloud = _Kept(_coordinate, (training, sites, folder / "cloud", broker.port))
        hospitals = [
            _Kept(_train, (training, sites, number, identifier, folder, proxy.port)) for number in range(sites)
        ]
        for one in (cloud, *hospitals):
            stack.callback(one.kill)
        started_s = time.monotonic()
        course = _Course(scenario, broker, proxy, cloud, hospitals, folder / "cloud" / "journal")
        course.run(started_s)
        return _account(scenario, the_plan, identifier, folder, course, time.monotonic() - started_s)


class _Course:
    """The scenario under way."""

    def __init__(
        self,
        scenario: Scenario,
        broker: Broker,
        proxy: FaultProxy,
        cloud: _Kept,
        hospitals: list[_Kept],
        journal: Path,
    ) -> None:
        self._scenario, self._broker, self._proxy = scenario, broker, proxy
        self._cloud, self._hospitals, self._journal = cloud, hospitals, journal
        self._later: list[tuple[float, Callable[[], None]]] = []
        self.kills: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    @property
    def starts(self) -> int:
        return sum(one.starts for one in (self._cloud, *self._hospitals))

    def run(self, started_s: float) -> None:
        """Let every event happen in its time, until the training is over."""
        events, everyone = plan(self._scenario), (self._cloud, *self._hospitals)
        while not all(one.done for one in everyone):
            now_s = time.monotonic()
            while events and now_s - started_s >= events[0].at_s and self._reached(events[0].at_request):
                event = events.pop(0)
                if self._carry_out(event, now_s):
                    verb, _, what = event.kind.partition("_")
                    self.kills[what] += verb == "kill"
                    self.faults[event.kind] += verb != "kill"
            for due in [one for one in self._later if now_s >= one[0]]:
                self._later.remove(due)
                due[1]()
            for one in everyone:
                one.supervise(now_s)
            if now_s - started_s > self._scenario.duration_s + self._scenario.heal_s:
                raise ScenarioError(
                    f"the training was not over {self._scenario.heal_s:.0f} s after the last blow."
                )
            time.sleep(TICK_S)

    def _reached(self, request: int) -> bool:
        from splitward.training.remote.journal import count_messages

        return not request or count_messages(self._journal) >= request

    def _carry_out(self, event: Event, now_s: float) -> bool:
        until_s = now_s + event.lasts_s
        if event.kind == "kill_agent":
            return self._hospitals[event.device % len(self._hospitals)].kill()
        if event.kind == "kill_cloud":
            return self._cloud.kill(until_s)
        if event.kind == "kill_broker":
            self._broker.stop()
            self._later.append((until_s, self._broker.start))
        elif event.kind == "cut":
            self._proxy.cut()
        else:
            self._proxy.toxics = toxics_of(event)
            self._later.append((until_s, lambda: setattr(self._proxy, "toxics", Toxics())))
        return True


def _plan_of(training: Training, sites: int) -> Any:
    from splitward.data import open_dataset
    from splitward.training.remote.plan import Plan
    from splitward.training.settings import RunSettings, split_settings

    dataset = open_dataset(training.data, task=training.task, size=training.size)
    settings = RunSettings(
        *(training.data, training.task, training.size, split_settings(dataset, training.defence)),
        epochs=training.epochs,
        batch=training.batch,
        seed=training.seed,
    )
    arrangement: Any = training.arrangement if sites > 1 else "single"
    precision: Any = training.precision
    return Plan(settings, arrangement, sites, training.rounds if sites > 1 else 1, precision=precision)


def _parts(training: Training, sites: int) -> Any:
    """The whole data set, and each site's training images."""
    from splitward.data import open_dataset
    from splitward.data.partition import partition

    dataset = open_dataset(training.data, task=training.task, size=training.size)
    least = min(64, len(dataset.train) // (2 * sites))
    return dataset, partition(dataset.train, sites, alpha=training.alpha, least=least, seed=training.seed)


def _coordinate(training: Training, sites: int, folder: Path, port: int) -> None:
    from splitward.training.remote.carrier import Broker as Place
    from splitward.training.remote.site import coordinate

    coordinate(_plan_of(training, sites), folder, Place(port=port), print)


def _train(training: Training, sites: int, number: int, identifier: bytes, folder: Path, port: int) -> None:
    from splitward.training.remote.carrier import Broker as Place
    from splitward.training.remote.site import Membership, train_at_site

    dataset, parts = _parts(training, sites)
    settings = _plan_of(training, sites).run
    member = Membership("hospitals", f"site-{number}", identifier, broker=Place(port=port))
    own = replace(dataset, train=parts[number])
    train_at_site(own, settings, settings.split, folder / f"run-{number}", member, print)


def _account(
    scenario: Scenario, the_plan: Any, identifier: bytes, folder: Path, course: _Course, wall_s: float
) -> HospitalsReport:
    from splitward.training.remote.halves import Schedule
    from splitward.training.remote.server import Server
    from splitward.training.run import open_run

    server = Server(the_plan, identifier, folder / "cloud" / "journal")
    members = server.session.members
    server.close()
    frames = [members[name].frames for name in sorted(members)]
    steps = lost = twice = 0
    for member in members.values():
        expected = Schedule(the_plan.run, member.frames).steps
        steps += expected
        twice += max(0, member.steps - expected)
        lost += 0 if member.superseded else max(0, expected - member.steps)
    runs = [open_run(folder / f"run-{number}") for number in range(scenario.devices)]
    return HospitalsReport(
        scenario=scenario.name,
        seed=scenario.seed,
        frames=frames,
        steps=steps,
        steps_lost=lost,
        steps_twice=twice,
        skipped=sum(member.superseded for member in members.values()),
        kills=dict(+course.kills),
        faults=dict(+course.faults),
        starts=course.starts,
        wall_s=round(wall_s, 1),
        accuracy=[run.read_metrics()[-1]["test"]["decision"] for run in runs if run.finished],
    )


def format_report(report: HospitalsReport, training: Training) -> str:
    """Report and training as JSON."""
    values = {name: getattr(report, name) for name in report.__struct_fields__}
    return json.dumps({**values, "training": asdict(training)}, indent=2)
