"""The cloud's side of one training: a state machine of messages in and replies out, over a journal.

Every message that is accepted is on the disk before it has an effect. What a message does depends on the messages
before it and on nothing else, so to take the journal's messages again gives the state that a kill took away. A client's
requests are numbered without gaps: the same number again is answered with the same reply, and has no other effect.

Some requests are answered later, when others have come: the messages to send are whatever `handle` returns.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from splitward.errors import MessageError, TrainingError
from splitward.training.loop import reproducible
from splitward.training.remote.answers import Agreement, RoundStart
from splitward.training.remote.halves import (
    Exchange,
    Schedule,
    ServerTrainer,
    StepServer,
    Taken,
    end_round,
)
from splitward.training.remote.journal import Journal
from splitward.training.remote.plan import Plan
from splitward.training.remote.precision import Feedback, Stored, store
from splitward.training.remote.privacy import add_noise, clip_rows, draw_noise
from splitward.training.remote.session import EpochSums, Join, Member, Session, check_request
from splitward.training.remote.state import TURN, average, from_tensor, restore, state_of, to_tensor
from splitward.wire.training import MAX_PART, Phase, TrainingMessage, decode_training, encode_training

SNAPSHOT_EVERY = 100
"""Messages between snapshots: a kill costs at most the time to take so many again, and those of a step that is half
done."""
NO_LABELS = np.empty(0, np.uint16)
Replies = list[tuple[str, bytes]]


class Server:
    """The cloud's side of one training.

    Parameters
    ----------
    plan : Plan
    training : bytes
        16 bytes that name the training.
    folder : Path, optional
        Of the journal; without one nothing outlives the process.
    steps : StepServer, optional
        Other than the honest server half, for trials.

    Raises
    ------
    TrainingError
        The journal is damaged, or another process's.
    """

    def __init__(
        self,
        plan: Plan,
        training: bytes,
        folder: Path | None = None,
        *,
        steps: StepServer | None = None,
        every: int = SNAPSHOT_EVERY,
    ) -> None:
        self.plan, self.training = plan, training
        self._every, self._stand_in = every, steps
        self.session = Session({})
        self.trainers: dict[str, ServerTrainer] = {}
        self._feedback: dict[str, Feedback] = {}
        with reproducible(plan.run.seed):
            self._first = ServerTrainer(plan.run, tails=plan.labels == "cloud", pooled=plan.pooled)
        self._journal = None if folder is None else Journal(folder)
        if self._journal is not None:
            try:
                self._recover(self._journal)
            except BaseException:
                self.close()
                raise

    @property
    def finished(self) -> bool:
        """Whether every client has what it came for."""
        members = self.session.members.values()
        return len(members) == self.plan.clients and all(member.left for member in members)

    @property
    def failure(self) -> str:
        """Why the training cannot go on; empty while it can."""
        return self.session.failure

    def awaited(self) -> set[str]:
        """Clients whom others wait for: of the round, live, and not finished with it."""
        session = self.session
        waiting = any(member.request is not None for member in session.members.values())
        if not waiting or len(session.members) < self.plan.clients or session.round >= self.plan.turns:
            return set()
        return {name for name in self._cohort() if not session.members[name].finished}

    def handle(self, device: str, payload: bytes) -> Replies:
        """Take one message; the replies to send, each with its client.

        A message that this training cannot take is answered with `REFUSED` and changes nothing.
        """
        try:
            message = decode_training(payload)
        except MessageError:
            return []  # it names no request that could be answered
        if message.device != device or message.training != self.training:
            return []
        member = self.session.members.get(device)
        if member is not None and message.sequence == member.sequence:
            return [] if member.reply is None else [(device, member.reply)]
        if self.session.failure:
            return [(device, self._refusal(message, self.session.failure))]
        try:
            check_request(message, self.plan, self.session, self._awaiting(message))
        except TrainingError as error:
            return [(device, self._refusal(message, str(error)))]
        with TURN:
            self._note(payload)
            replies = self._take(message, payload)
            self._snapshot()
            self._take_queue(replies)
        return replies

    def drop(self, device: str) -> Replies:
        """Leave a silent client out of the round; it may come back at any time."""
        record = b"drop " + device.encode()
        with TURN:
            self._note(record)
            replies = self._drop(device)
            self._snapshot()
            self._take_queue(replies)
        return replies

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            self._journal.close()

    def server_half(self) -> dict[str, Tensor]:
        """Weights of the server half; of v1, the mean of the clients' own."""
        with torch.no_grad():
            state = state_of(self._mean_trainer(), optimisers=False)
        return {name.removeprefix("server/module/"): tensor for name, tensor in state.items()}

    # --- what a message does ------------------------------------------------------------------------------------

    def _awaiting(self, message: TrainingMessage) -> tuple[int, ...] | None:
        """Shape of the gradient that this client owes its step, where one waits for it."""
        return tuple(self._trainer(message.device).awaiting) if self.session.busy == message.device else None

    def _take(self, message: TrainingMessage, payload: bytes) -> Replies:
        session = self.session
        session.handled += 1
        session.bytes_up += len(payload)
        if message.phase is Phase.JOIN:
            join = msgspec.json.decode(message.values.tobytes(), type=Join)
            session.members[message.device] = Member(
                message.device, base64.b64decode(join.key), join.frames, parts=[], curve={}
            )
        member = session.members[message.device]
        member.sequence, member.reply, member.request = message.sequence, None, payload
        replies: Replies = []
        self._answer(message, member, replies)
        self._go_on(replies)
        return replies

    def _answer(self, message: TrainingMessage, member: Member, replies: Replies) -> None:
        """Answer a request, or leave it waiting; an error of the arithmetic ends this training and no other."""
        try:
            with torch.random.fork_rng(), reproducible_kernels():
                self._answer_phase(message, member, replies)
        except (TrainingError, MessageError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]  # torch does not type it
            self.session.failure = (
                f"{error}: the training diverged; make a new one with a smaller learning rate."
            )
            member.request, member.reply = None, self._refusal(message, self.session.failure)
            replies.append((member.name, member.reply))

    def _answer_phase(self, message: TrainingMessage, member: Member, replies: Replies) -> None:
        phase = message.phase
        if phase in (Phase.STEP, Phase.BACK, Phase.HALF, Phase.FETCH) and not self._current(message, member):
            member.parts = []
            member.superseded += 1
            self._reply(member, message, np.zeros(1, np.int8), replies, phase=Phase.SUPERSEDED)
        elif phase is Phase.STEP:
            self._answer_step(message, member, replies)
        elif phase is Phase.BACK:
            self._answer_back(message, member, replies)
        elif phase is Phase.HALF:
            self._keep_half(message, member)
            self._reply(member, message, np.zeros(1, np.int8), replies)
        elif phase is Phase.FETCH:
            name = sorted(self.session.halves)[message.epoch]
            self._reply(member, message, _vector(self.session.halves[name][message.step]), replies)
        elif phase is Phase.EVALUATE:
            self._reply(member, message, self._evaluate(message, member), replies)
        elif phase is Phase.WEIGHTS:
            values, count = self._weights_part(message.step)
            self._reply(member, message, values, replies, epoch=count)
        elif phase is Phase.LEAVE:
            member.left, member.live = True, False
            self._reply(member, message, np.zeros(1, np.int8), replies)

    def _current(self, message: TrainingMessage, member: Member) -> bool:
        """Whether the client is where the training is."""
        if message.phase is Phase.FETCH:
            names = sorted(self.session.halves)
            known = message.epoch < len(names) and message.step < len(self.session.halves[names[message.epoch]])
            return message.round == self.session.round and known
        inside = member.name in self._cohort() and not member.finished
        return message.round == self.session.round and inside

    def _answer_step(self, message: TrainingMessage, member: Member, replies: Replies) -> None:
        if self.plan.labels == "client" and self.session.busy:
            self.session.queue.append(member.name)  # one half holds one step at a time
            return
        real = Stored.of(message).real()
        labels = torch.from_numpy(message.labels.astype(np.int64))
        at = Schedule(self.plan.run, member.frames).at(message.step)
        sent = Exchange(message.step, at, real, labels)
        if self.plan.labels == "client":
            self.session.busy = member.name
            stored = store(self._trainer(member.name).features(sent), self.plan.precision)
            self._reply_stored(member, message, stored, replies)
            return
        taken = (self._stand_in or self._trainer(member.name)).take(sent)
        if not np.isfinite(taken.loss):
            raise TrainingError("the loss is not finite")
        self._count(member, message, taken)
        stored = self._lower(taken.gradient, member)
        self._reply_stored(member, message, stored, replies, loss=taken.loss, right=taken.right)

    def _answer_back(self, message: TrainingMessage, member: Member, replies: Replies) -> None:
        gradient = self._trainer(member.name).back(Stored.of(message).real())
        self.session.busy = ""
        size = len(message.values)
        self._count(member, message, Taken(gradient, message.loss, message.right), size)
        self._reply_stored(member, message, self._lower(gradient, member), replies)

    def _count(self, member: Member, message: TrainingMessage, taken: Taken, size: int | None = None) -> None:
        member.steps += 1
        epoch = message.step // Schedule(self.plan.run, member.frames).per_epoch
        sums = member.curve.setdefault(epoch, EpochSums())
        frames = len(message.values) if size is None else size
        sums.loss += taken.loss * frames
        sums.right += taken.right
        sums.seen += frames

    def _lower(self, gradient: Tensor, member: Member) -> Stored:
        """The gradient as it goes down: clipped, noised, and in the plan's precision."""
        plan = self.plan
        if plan.clip:
            gradient = clip_rows(gradient, plan.clip)
        if plan.noise:
            about = member.sequence.to_bytes(8, "little") + member.name.encode()  # no two answers share noise
            drawn = draw_noise(self.session.secret, about, gradient.shape)
            gradient = add_noise(gradient, plan.clip, plan.noise, drawn)
        return self._feedback.setdefault(member.name, Feedback()).store(gradient, plan.precision)

    def _keep_half(self, message: TrainingMessage, member: Member) -> None:
        member.parts.append(message.values.tobytes())
        member.finished = len(member.parts) == message.epoch

    @torch.no_grad()
    def _evaluate(self, message: TrainingMessage, member: Member) -> np.ndarray[Any, Any]:
        """Class of each stream and of the decision: int8 [B, 4, 2], low and high byte."""
        half = self._trainer(member.name).half
        half.eval()
        outputs = half(Stored.of(message).real())
        half.train()
        chosen = torch.stack([stream.argmax(1) for stream in outputs], dim=1).numpy().astype("<u2")
        return chosen.view(np.int8).reshape(len(chosen), 4, 2)

    def _weights_part(self, part: int) -> tuple[np.ndarray[Any, Any], int]:
        from safetensors.torch import save

        whole = save({name: tensor.contiguous() for name, tensor in sorted(self.server_half().items())})
        parts = _parts(whole)
        return _vector(parts[min(part, len(parts) - 1)]), len(parts)

    # --- rounds -------------------------------------------------------------------------------------------------

    def _cohort(self) -> list[str]:
        """Who trains in this round: live members, or the one whose turn it is."""
        session = self.session
        live = sorted(name for name, member in session.members.items() if member.live)
        if self.plan.arrangement != "turn":
            return live
        order = sorted(session.members)
        turn = session.round % len(order) if order else 0
        return next(([name] for name in order[turn:] + order[:turn] if name in live), [])

    def _go_on(self, replies: Replies) -> None:
        """End the round where it is complete, then answer whoever waited for that."""
        session = self.session
        if len(session.members) < self.plan.clients:
            return
        cohort = self._cohort()
        if (
            session.round < self.plan.turns
            and cohort
            and all(session.members[name].finished for name in cohort)
        ):
            self._end_round()
        for member in session.members.values():
            if member.request is None:
                continue
            message = decode_training(member.request)
            if message.phase is Phase.JOIN:
                self._reply(member, message, _vector(self._agreement()), replies)
            elif message.phase is Phase.ROUND:
                member.live = True  # whoever asks for the round is back
                if session.round >= self.plan.turns or (member.name in self._cohort() and not member.finished):
                    self._reply(member, message, _vector(self._round()), replies)

    def _take_queue(self, replies: Replies) -> None:
        """Take the steps that waited for another's; after the snapshot, which is due when none is half done."""
        while self.session.queue and not self.session.busy:
            member = self.session.members[self.session.queue.pop(0)]
            assert member.request is not None  # noqa: S101  # it waits in the queue
            self._answer(decode_training(member.request), member, replies)

    def _end_round(self) -> None:
        session = self.session
        finished = {name: member for name, member in session.members.items() if member.finished}
        session.halves = {name: member.parts for name, member in finished.items()}
        if self.plan.arrangement == "splitfed-v1":
            mean = self._mean_of(list(finished))
            for name in session.members:
                restore(self._trainer(name), mean)
        elif self.plan.pooled:
            end_round(self._first)
        for member in session.members.values():
            member.finished, member.parts = False, []
        session.round += 1

    def _drop(self, device: str) -> Replies:
        session, replies = self.session, Replies()
        member = session.members[device]
        member.live, member.parts, member.finished = False, [], False
        session.drops += 1
        if session.busy == device:
            session.busy = ""
        self._go_on(replies)
        return replies

    def _agreement(self) -> bytes:
        members = sorted(self.session.members.items())
        keys = {name: base64.b64encode(member.key).decode() for name, member in members}
        frames = {name: member.frames for name, member in members}
        return msgspec.json.encode(Agreement(self.plan.to_dict(), keys, frames))

    def _round(self) -> bytes:
        halves = {name: len(parts) for name, parts in sorted(self.session.halves.items())}
        return msgspec.json.encode(RoundStart(self.session.round, halves))

    # --- server halves ------------------------------------------------------------------------------------------

    def _trainer(self, name: str) -> ServerTrainer:
        """The server half that answers a client."""
        if self.plan.arrangement != "splitfed-v1":
            return self._first
        if name not in self.trainers:
            with reproducible(self.plan.run.seed):
                self.trainers[name] = ServerTrainer(self.plan.run, tails=self.plan.labels == "cloud")
        return self.trainers[name]

    def _mean_of(self, names: list[str]) -> dict[str, Tensor]:
        states = [state_of(self._trainer(name), optimisers=False) for name in names]
        return average(states, [self.session.members[name].frames for name in names])

    def _mean_trainer(self) -> ServerTrainer:
        """After the last round all of v1's server halves are equal."""
        return self._trainer(min(self.session.members)) if self.session.members else self._first

    # --- replies ------------------------------------------------------------------------------------------------

    def _reply(
        self,
        member: Member,
        message: TrainingMessage,
        values: np.ndarray[Any, Any],
        replies: Replies,
        *,
        phase: Phase | None = None,
        **more: Any,
    ) -> None:
        answer = replace(
            message, phase=phase or message.phase, values=values, labels=NO_LABELS, loss=0.0, right=0,
            round=self.session.round, scale=1.0, nibbles=False, exponents=None,
            plan=self.plan.digest,
        )  # fmt: skip
        member.reply, member.request = encode_training(replace(answer, **more)), None
        self.session.bytes_down += len(member.reply)
        replies.append((member.name, member.reply))

    def _reply_stored(
        self, member: Member, message: TrainingMessage, stored: Stored, replies: Replies, **more: Any
    ) -> None:
        self._reply(member, message, replies=replies, **stored._asdict(), **more)

    def _refusal(self, message: TrainingMessage, why: str) -> bytes:
        plain = Stored(_vector(why.encode()[:4096]))._asdict()
        refused = replace(
            message, phase=Phase.REFUSED, plan=self.plan.digest, labels=NO_LABELS, loss=0.0, right=0
        )
        return encode_training(replace(refused, **plain))

    # --- journal ------------------------------------------------------------------------------------------------

    def _note(self, record: bytes) -> None:
        if self._journal is not None:
            self._journal.append(record)

    def _snapshot(self) -> None:
        journal = self._journal
        if journal is None or journal.since_snapshot < self._every or self.session.busy:
            return  # what a step holds between its two exchanges is no tensor to be kept
        tensors = {"session": to_tensor(self.session)}
        for name, trainer in ({"": self._first} | self.trainers).items():
            tensors |= {f"trainer/{name}/{key}": tensor for key, tensor in state_of(trainer).items()}
        tensors |= {f"feedback/{name}": feedback.left for name, feedback in self._feedback.items()}
        journal.save(self.session.handled + self.session.drops, tensors)

    def _recover(self, journal: Journal) -> None:
        tensors = journal.snapshot()
        if tensors is None:
            # So that the noise that is drawn after a kill is the one that was drawn before.
            journal.save(0, {"session": to_tensor(self.session)})
        else:
            self.session = from_tensor(tensors["session"], Session)
            for name in ("", *self.session.members):
                head = f"trainer/{name}/"
                own = {key.removeprefix(head): t for key, t in tensors.items() if key.startswith(head)}
                if own:
                    restore(self._first if not name else self._trainer(name), own)
            for key, tensor in tensors.items():
                if key.startswith("feedback/"):
                    self._feedback.setdefault(key.removeprefix("feedback/"), Feedback()).left = tensor
        self._take_queue([])
        for record in journal.messages():
            if record.startswith(b"drop "):
                self._drop(record[5:].decode())
            else:
                self._take(decode_training(record), record)
            self._take_queue([])


@contextmanager
def reproducible_kernels() -> Iterator[None]:
    """Deterministic kernels within the block, as in a training on one machine."""
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic  # torch does not type it
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled


def _vector(content: bytes) -> np.ndarray[Any, Any]:
    """Bytes as a vector of int8; at least one."""
    return np.frombuffer(content or b"\0", np.int8)


def _parts(content: bytes) -> list[bytes]:
    return [content[at : at + MAX_PART] for at in range(0, max(len(content), 1), MAX_PART)]
