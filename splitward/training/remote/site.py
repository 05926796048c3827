"""What people start: a site that takes part in a training, and the one who coordinates it, over MQTT."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from splitward.data import Dataset
from splitward.errors import TrainingError
from splitward.method.split import SplitNetwork, SplitSettings
from splitward.training.guard import GuardSettings
from splitward.training.loop import describe, finish_run
from splitward.training.remote.carrier import Broker, run_client, run_server
from splitward.training.remote.client import Client
from splitward.training.remote.plan import Plan
from splitward.training.remote.server import Server
from splitward.training.run import Run, create_run, write_atomically
from splitward.training.settings import RunSettings

ANSWERING_S = 15.0
"""How long a training that is over is answered: who lost the last answer, or is to be told of a failure, asks again."""


@dataclass(frozen=True)
class Membership:
    """Who a site is in which training.

    `peers` are the fingerprints of the others' keys, if they are to be checked; `guarded`: stop at a hijacking cloud;
    `keep_labels`: take no part where the cloud has the labels.
    """

    site: str
    device: str
    training: bytes
    peers: frozenset[str] = frozenset()
    guarded: bool = True
    keep_labels: bool = False
    broker: Broker = field(default_factory=Broker)


def train_at_site(
    dataset: Dataset,
    own: RunSettings,
    split: SplitSettings,
    folder: Path,
    member: Membership,
    told: Callable[[str], object],
) -> Run:
    """Take part until the training is over; the run folder is that of a training on one machine.

    Parameters
    ----------
    own : RunSettings
        What this site calls its data, and the most epochs that it agrees to; the schedule is the plan's.
    split : SplitSettings
        Network and defence that this site agrees to.
    folder : Path
        The run; the same call again goes on with it. Its `remote/` holds the training's key and journal.
    told : callable
        Takes the fingerprint of this site's key, by which the other sites can check it.

    Raises
    ------
    TrainingError, HijackError
        As `Client`; or `folder` holds another run or another training, or this one was begun with other data.
    """
    described = describe(dataset)
    _claim(folder, member, described["digest"])
    client = Client(
        *(member.device, member.training, dataset.train, split),
        validation=dataset.validation,
        folder=folder / "remote",
        guard=GuardSettings() if member.guarded else None,
        peers=member.peers or None,
        most_epochs=own.epochs,
        keep_labels=member.keep_labels,
    )
    try:
        if (folder / "run.json").exists():
            _run_of(client, folder, own, described)  # which could not be made after hours of training
        told(client.fingerprint)
        run_client(client, member.site, member.broker)
        run = _run_of(client, folder, own, described)
        if not run.finished:
            lines = "".join(json.dumps(line) + "\n" for line in client.course.place.metrics)
            run.metrics.write_text(lines, encoding="utf-8")
            finish_run(run, whole_network(client), dataset)
    finally:
        client.close()
    return run


def _claim(folder: Path, member: Membership, digest: str) -> None:
    """Note who takes part in which training with which data; where that is noted, refuse any other."""
    remote = folder / "remote"
    if (folder / "run.json").exists() and not remote.exists():
        raise TrainingError(f"{folder}: holds a run that is not of this training. Give another --out.")
    card = remote / "site.json"
    claimed = {"training": member.training.hex(), "device": member.device, "data": digest}
    if not card.exists():  # the first start, or one of earlier versions
        write_atomically(card, json.dumps(claimed, indent=2) + "\n")
        return
    try:
        noted = dict(json.loads(card.read_bytes()))
    except (ValueError, TypeError) as error:
        raise TrainingError(
            f"{card}: cannot be used: {error!r}. Delete it to go on with the data that is there."
        ) from error
    if noted.pop("data", None) != claimed.pop("data"):
        raise TrainingError(
            f"{folder}: the data is not what this site began the training with: it has changed since, or other "
            f"versions read it otherwise. Put it back and keep {remote}, or begin a new training with another --out."
        )
    if noted != claimed:
        raise TrainingError(f"{folder}: is of another training or device: {noted}. Give another --out.")


def _run_of(client: Client, folder: Path, own: RunSettings, described: dict[str, Any]) -> Run:
    """The run that the training ends with, made or found."""
    plan = client.course.plan
    try:
        if plan is None:
            raise TrainingError("the training has not begun.")
        return create_run(folder, replace(plan.run, data=own.data, task=own.task, size=own.size), described)
    except TrainingError as error:
        raise TrainingError(
            f"{folder / 'run.json'}: is not this training's, or --data, --task or --size are written otherwise now. "
            "Write them as before; or move what is in the folder elsewhere, all but remote/ (the training's key and "
            "journal: without it this site cannot go on), and give the same command again."
        ) from error


def whole_network(client: Client) -> SplitNetwork:
    """Client half and server half of a training that is over, as one network."""
    course = client.course
    if course.plan is None or course.trainer is None or course.server_half is None:
        raise TrainingError("the training is not over: the server half has not come down yet.")
    network = SplitNetwork(course.plan.run.split)
    try:
        network.server.load_state_dict(course.server_half | course.trainer.tail_weights())
    except RuntimeError as error:
        raise TrainingError(f"the server half that came down does not fit the plan: {error}") from error
    network.client.load_state_dict(course.trainer.modules["client"].state_dict())
    if network.saliency is not None and "local" in course.trainer.modules:
        network.saliency.classifier.load_state_dict(course.trainer.modules["local"].state_dict())
    return network.eval()


def open_training(plan: Plan, folder: Path) -> bytes:
    """The id of the training of `plan` that `folder` holds, or of a new one there: 16 bytes.

    Raises
    ------
    TrainingError
        The folder holds a training with another plan, or one that cannot be read.
    """
    card = folder / "training.json"
    if card.exists():
        try:
            kept = json.loads(card.read_bytes())
            begun, training = Plan.from_dict(kept["plan"]), bytes.fromhex(kept["training"])
        except (OSError, ValueError, KeyError, TypeError, TrainingError) as error:
            raise TrainingError(f"{card}: cannot be used: {error!r}. Give another --out.") from error
        if begun.digest != plan.digest:
            raise TrainingError(f"{folder}: holds a training with another plan. Give another --out.")
        return training
    training = secrets.token_bytes(16)
    about = {"training": training.hex(), "plan": plan.to_dict()}
    write_atomically(card, json.dumps(about, indent=2) + "\n")
    return training


def coordinate(plan: Plan, folder: Path, broker: Broker, told: Callable[[str], object]) -> None:
    """Be the cloud's side of one training until every site has what it came for; called again, go on.

    A training that is over is answered a while longer, for a site that lost the last answer.

    Parameters
    ----------
    folder : Path
        Of the plan, the training's id and the journal.
    told : callable
        Takes the id that the sites have to give.

    Raises
    ------
    TrainingError
        As `open_training`, or the training has failed.
    """
    training = open_training(plan, folder)
    told(training.hex())
    server = Server(plan, training, folder / "journal")
    try:
        run_server({training: server}, broker, _until_over(server))
        if server.failure:
            raise TrainingError(server.failure)
    finally:
        server.close()


def _until_over(server: Server) -> Callable[[], bool]:
    """Whether to answer on: until a while after every site has what it came for, or after a failure."""
    over_s = math.inf

    def goes_on() -> bool:
        nonlocal over_s
        if not server.failure and not server.finished:
            return True
        over_s = min(over_s, time.monotonic())
        return time.monotonic() - over_s < ANSWERING_S

    return goes_on
