"""What the cloud remembers of a training, tensors apart, and which requests it takes by that."""

from __future__ import annotations

import base64
import secrets

import msgspec

from splitward.errors import TrainingError
from splitward.training.remote.envelope import check_key
from splitward.training.remote.halves import Schedule
from splitward.training.remote.plan import Plan
from splitward.wire.release import SECRET_BYTES
from splitward.wire.training import Phase, TrainingMessage

EVALUATION_BATCH = 256
"""Most frames that are evaluated at once."""
MAX_HALF_PARTS = 256
MAX_VALUE = 1e6
"""Nothing honest comes near it. Under values near the end of float32 the loss is infinite, which ends a training for
all; under these it is finite (our choice, between the two)."""


class Join(msgspec.Struct, frozen=True):
    """What a client says of itself: its public key in base64, and how many frames it trains on."""

    key: str
    frames: int


class EpochSums(msgspec.Struct):
    """Of a site's epoch: sum of the losses, frames decided right, and frames seen."""

    loss: float = 0.0
    right: int = 0
    seen: int = 0


class Member(msgspec.Struct):
    """What the cloud knows of one client.

    `sequence` is of its last request, `reply` the answer to it; None while it waits. `live` members are waited for;
    a member is `finished` with the round when its half is here, and with the training when it has left.
    """

    name: str
    key: bytes
    frames: int
    sequence: int = -1
    reply: bytes | None = None
    request: bytes | None = None
    live: bool = True
    finished: bool = False
    left: bool = False
    parts: list[bytes] = []
    steps: int = 0
    superseded: int = 0
    curve: dict[int, EpochSums] = {}


class Session(msgspec.Struct):
    """All but the tensors, as a snapshot keeps it; `secret` keys the noise on gradients."""

    members: dict[str, Member]
    secret: bytes = msgspec.field(default_factory=lambda: secrets.token_bytes(SECRET_BYTES))
    round: int = 0
    halves: dict[str, list[bytes]] = {}
    busy: str = ""
    queue: list[str] = []
    failure: str = ""
    drops: int = 0
    handled: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


def check_request(
    message: TrainingMessage, plan: Plan, session: Session, awaiting: tuple[int, ...] | None
) -> None:
    """Refuse what must not enter the journal.

    Parameters
    ----------
    awaiting : tuple of int, optional
        Shape of the gradient that a client owes the step which the cloud holds; None where it holds none of its steps.

    Raises
    ------
    TrainingError
        With what the client is told.
    """
    member = session.members.get(message.device)
    if message.phase is Phase.JOIN:
        _check_join(message, plan, session)
        return
    if member is None:
        raise TrainingError("this training does not know this client: it has to join first.")
    if message.sequence != member.sequence + 1:
        raise TrainingError(
            f"request {message.sequence}: the cloud is at request {member.sequence} of this client. One side has "
            "lost its folder: begin this training again, or bring back the folders of both sides."
        )
    if member.request is not None:
        raise TrainingError("the request before this one waits for its answer.")
    if message.plan != plan.digest:
        raise TrainingError("the plan is not this training's.")
    if message.phase in (Phase.STEP, Phase.BACK, Phase.EVALUATE):
        _check_values(message)
    if message.phase is Phase.STEP:
        _check_step(message, plan, member)
    elif message.phase is Phase.BACK:
        if awaiting is None and not member.live:
            return  # the round has gone on without it in mid-step: the answer is SUPERSEDED
        shape = message.values.shape
        if awaiting is None or len(shape) != 3 or shape[1] != 3:
            raise TrainingError("a gradient of features without the step that it answers.")
        if shape != awaiting:
            raise TrainingError(f"a gradient of {shape} for features of another shape.")
    elif message.phase is Phase.HALF:
        if not 1 <= message.epoch <= MAX_HALF_PARTS or message.step != len(member.parts):
            raise TrainingError(f"part {message.step} of {message.epoch} of a client half is out of turn.")
    elif message.phase is Phase.EVALUATE:
        shape = message.values.shape
        if shape[1:] != tuple(plan.run.split.network.release_shape) or plan.labels != "cloud":
            raise TrainingError("only released tensors are evaluated, where the cloud has the last layers.")
        if shape[0] > EVALUATION_BATCH:
            raise TrainingError(f"{shape[0]} frames: at most {EVALUATION_BATCH} are evaluated at once.")
    elif message.phase not in (Phase.ROUND, Phase.FETCH, Phase.WEIGHTS, Phase.LEAVE):
        raise TrainingError(f"{message.phase.name} is no request.")


def _check_join(message: TrainingMessage, plan: Plan, session: Session) -> None:
    if message.device in session.members or message.sequence != 0:
        raise TrainingError(
            f"{message.device} has joined already: a client that lost its folder cannot go on with this training."
        )
    if len(session.members) >= plan.clients:
        raise TrainingError(f"this training has its {plan.clients} clients.")
    try:
        join = msgspec.json.decode(message.values.tobytes(), type=Join)
        check_key(base64.b64decode(join.key, validate=True))
    except (msgspec.DecodeError, ValueError) as error:
        raise TrainingError(f"this is no request to join: {error}.") from error
    if not 2 <= join.frames <= 1 << 31:
        raise TrainingError("a client joins with at least 2 frames.")


def _check_values(message: TrainingMessage) -> None:
    largest = max((abs(float(end)) for end in (message.values.min(), message.values.max())), default=0.0)
    if largest * message.scale > MAX_VALUE:
        raise TrainingError(
            f"values up to {largest * message.scale:.3g}: over {MAX_VALUE:g} is refused. If the training diverged, "
            "make a new one with a smaller learning rate."
        )


def _check_step(message: TrainingMessage, plan: Plan, member: Member) -> None:
    network, count, shape = plan.run.split.network, len(message.labels), message.values.shape
    labelled = shape[0] if plan.labels == "cloud" else 0
    if shape[1:] != tuple(network.release_shape) or count != labelled or not 2 <= shape[0] <= plan.run.batch:
        raise TrainingError(f"released tensors {shape} with {count} labels do not fit the plan.")
    if count and int(message.labels.max()) >= network.classes:
        raise TrainingError(f"label {message.labels.max()}: there are {network.classes} classes.")
    if message.step >= Schedule(plan.run, member.frames).steps:
        raise TrainingError(f"step {message.step} is beyond this client's training.")
