"""A site's side of one training: a state machine that asks, and goes on with each answer, over a journal.

`Client.request` is the message to send until it is answered; `Client.take` takes the answer. Answers are on the disk
before they have an effect; who comes back does the answers of its journal again and asks what it asked before. What the
site asks depends on its images, its answers and its own random state, and on nothing else.

The course of a training reads in `Client._course`: join; for each round fetch the others' halves and go on with their
mean, take steps, seal the own half for the members; at the end fetch the server half.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors.torch import save
from torch import Tensor

from splitward.data import Split
from splitward.disk import write_whole
from splitward.errors import HijackError, MessageError, TrainingError
from splitward.method.split import SplitSettings
from splitward.training.guard import GradientGuard, GuardSettings
from splitward.training.loop import frames_of, reproducible, to_unit
from splitward.training.remote.answers import Agreement, RoundStart, check_answer, read, read_tensors
from splitward.training.remote.envelope import fingerprint, open_envelope, seal
from splitward.training.remote.halves import ClientTrainer, end_round, forget_gradients
from splitward.training.remote.journal import Journal
from splitward.training.remote.plan import Plan
from splitward.training.remote.precision import Feedback, Stored, store
from splitward.training.remote.server import NO_LABELS, reproducible_kernels
from splitward.training.remote.session import EVALUATION_BATCH, Join
from splitward.training.remote.state import TURN, average, from_tensor, restore, state_of, to_tensor
from splitward.wire.training import MAX_PART, Phase, TrainingMessage, decode_training, encode_training

SNAPSHOT_EVERY = 100
"""Answers between snapshots: a kill costs at most the time to take so many again."""
NO_PLAN = bytes(16)
NOTHING = np.zeros(1, np.int8)
Course = Generator[dict[str, Any], TrainingMessage, None]


class Totals(msgspec.Struct):
    """Sums of the epoch that is under way."""

    loss: float = 0.0
    right: int = 0
    seen: int = 0
    began_s: float = 0.0


class Place(msgspec.Struct):
    """Where in its course a client is: all but the tensors, as a snapshot keeps it."""

    secret: int
    sequence: int = -1
    plan: dict[str, Any] | None = None
    keys: dict[str, str] = {}
    frames: dict[str, int] = {}
    round: int = 0
    inside: bool = False
    steps_done: int = 0
    epochs_told: int = 0
    totals: Totals = msgspec.field(default_factory=Totals)
    metrics: list[dict[str, Any]] = []
    skipped: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class Client:
    """A site's side of one training.

    Parameters
    ----------
    device : str
        The site's device id.
    training : bytes
        16 bytes that name the training.
    train, validation : Split
        The site's own images; those of `validation` are decided by the cloud after each epoch. None leaves that out.
    split : SplitSettings
        Network and defence that this site agrees to; a plan with any other is refused.
    folder : Path, optional
        Of key and journal; without one nothing outlives the process.
    guard : GuardSettings or None
        When the guard against a hijacking cloud gives the alarm; None switches it off.
    peers : frozenset of str, optional
        Fingerprints of the keys to which client halves may be sealed; any by default.
    repeatable : bool
        Draw noise from the plan's seed, as a training on one machine does, and not from a secret: for tests. The cloud
        knows that seed and could take the noise away.

    Raises
    ------
    TrainingError
        The journal is damaged, or another process's.
    HijackError
        This training was stopped by the guard.
    """

    def __init__(
        self,
        device: str,
        training: bytes,
        train: Split,
        split: SplitSettings,
        *,
        validation: Split | None = None,
        folder: Path | None = None,
        guard: GuardSettings | None = GuardSettings(),  # noqa: B008  # frozen
        peers: frozenset[str] | None = None,
        repeatable: bool = False,
        every: int = SNAPSHOT_EVERY,
    ) -> None:
        self.device, self.training = device, training
        self._split, self._validation, self._agreed = train, validation, split
        self._folder, self._peers, self._repeatable, self._every = folder, peers, repeatable, every
        self._guard = None if guard is None else GradientGuard(guard)
        self.place = Place(secrets.randbits(63), keys={}, frames={}, metrics=[])
        self.plan: Plan | None = None
        self.trainer: ClientTrainer | None = None
        self.server_half: dict[str, Tensor] | None = None
        self._feedback = Feedback()
        self._random = torch.get_rng_state()
        self._meanwhile_due = self._replaying = False
        self._check_evidence()
        self._journal = None if folder is None else Journal(folder)
        self._key = _own_key(folder)
        self._running = self._course()
        self._request: bytes | None = None
        try:
            self._come_back()
        except BaseException:
            self.close()
            raise

    @property
    def request(self) -> bytes | None:
        """The message to send until it is answered; None when the training is over."""
        return self._request

    @property
    def fingerprint(self) -> str:
        """Of this client's key, for the others' `peers`."""
        return fingerprint(self._key.public_key().public_bytes_raw())

    def meanwhile(self) -> None:
        """Do what needs no answer; to be called while one is on its way."""
        if self._meanwhile_due:
            self._meanwhile_due = False
            with self._own_random():
                self._active.meanwhile()

    def take(self, answer: bytes) -> bool:
        """Go on with an answer; whether it was one to the request.

        Raises
        ------
        TrainingError
            The cloud refuses the request, or answers what cannot be.
        HijackError
            The gradients do not serve the task; the evidence lies in `folder`.
        """
        try:
            message = decode_training(answer)
        except MessageError:
            return False
        awaited = (self.device, self.training, self.place.sequence)
        if self._request is None or (message.device, message.training, message.sequence) != awaited:
            return False
        if message.phase is Phase.REFUSED:
            raise TrainingError(f"the cloud refuses: {message.values.tobytes().decode(errors='replace')}")
        features = 0 if self.trainer is None else self.trainer.features
        released = tuple(self._agreed.network.release_shape)
        check_answer(message, decode_training(self._request), released, features, self.place.keys)
        if self._journal is not None:
            self._journal.append(answer)
        self._apply(answer, message)
        return True

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            self._journal.close()

    # --- the course ---------------------------------------------------------------------------------------------

    def _course(self) -> Course:
        """Requests in their order; each `yield` is answered."""
        place = self.place
        if self.plan is None:
            key = base64.b64encode(self._key.public_key().public_bytes_raw()).decode()
            join = msgspec.json.encode(Join(key, len(self._split)))
            self._agree((yield {"phase": Phase.JOIN, "values": _vector(join)}))
        while place.inside or (yield from self._enter()):
            place.inside = True
            superseded = False
            while self._active.steps_done < self._round_end() and not superseded:
                self._keep()
                superseded = not (yield from self._step())
                if not superseded:
                    yield from self._tell_epoch()
            place.inside = False
            if superseded:
                place.skipped += 1
            else:
                yield from self._hand_over()
        yield from self._fetch_server_half()
        yield {"phase": Phase.LEAVE, "values": NOTHING}

    def _enter(self) -> Generator[dict[str, Any], TrainingMessage, bool]:
        """Wait for the next round and go on from its client half; False after the last round."""
        while True:
            answer = yield {"phase": Phase.ROUND, "values": NOTHING}
            told = read(answer, RoundStart)
            self.place.round = told.round
            if (yield from self._adopt(told.halves)):
                break
        plan, trainer = self._plan, self._active
        if self.place.round >= plan.turns:
            return False
        trainer.steps_done = max(trainer.steps_done, self._round_end(-1))
        return True

    def _adopt(self, halves: dict[str, int]) -> Generator[dict[str, Any], TrainingMessage, bool]:
        """Fetch the halves of the round before and take their mean; False where the round has moved on."""
        plan = self._plan
        if plan.clients == 1 or not halves:
            return True
        opened = []
        for index, (name, parts) in enumerate(sorted(halves.items())):
            envelope = b""
            for part in range(parts):
                answer = yield {"phase": Phase.FETCH, "values": NOTHING, "step": part, "epoch": index}
                if answer.phase is Phase.SUPERSEDED:
                    return False
                envelope += answer.values.tobytes()
            sender = base64.b64decode(self.place.keys[name])
            about = self._about(self.place.round - 1, name)
            content = open_envelope(envelope, self._key, self.device, sender, about)
            opened.append((name, read_tensors(content, f"the client half of {name}")))
        try:
            self._restore_mean(opened)
        except (KeyError, RuntimeError, ValueError) as error:
            raise TrainingError(
                f"a member's client half does not fit the plan: {error}. Begin a new training."
            ) from error
        if plan.pooled:
            forget_gradients(self._active)  # of a round that has gone on without this client
        self._active.forget_ready()
        return True

    def _restore_mean(self, halves: list[tuple[str, dict[str, Tensor]]]) -> None:
        """Go on from the mean of these, by frames."""
        pooled = self._active.pooled
        weights = [int(state.pop("seen")) if pooled else self.place.frames[name] for name, state in halves]
        if sum(weights):  # a pooled round may have had no frame
            states = [(state, weight) for (_, state), weight in zip(halves, weights, strict=True) if weight]
            restore(self._active, average(*zip(*states, strict=True)))

    def _step(self) -> Generator[dict[str, Any], TrainingMessage, bool]:
        """One step; False where the round has gone on without this client."""
        plan, trainer, place = self._plan, self._active, self.place
        sent = trainer.begin()
        kept = plan.labels == "client"
        defence = self._agreed.defence
        # The seal's own int8 lose nothing, unless the noise of the training goes beyond their range.
        within = self._sealed and defence.noise_of(training=True) <= defence.sigma
        seal = self._agreed.scale if within and plan.precision == "int8" else None
        stored = store(sent.released, plan.precision, seal)
        labels = NO_LABELS if kept else sent.labels.numpy().astype(np.uint16)
        self._meanwhile_due = not kept
        answer = yield self._about_step(Phase.STEP, stored, labels=labels)
        if answer.phase is Phase.SUPERSEDED:
            return False
        loss, right = answer.loss, answer.right
        if kept:
            gradient, loss = trainer.answer(Stored.of(answer).real())
            self._meanwhile_due = True
            stored = self._feedback.store(gradient, plan.precision)
            answer = yield self._about_step(Phase.BACK, stored, loss=loss)
            if answer.phase is Phase.SUPERSEDED:
                return False
        down = Stored.of(answer).real()
        self._watch(down, trainer.wanted)
        trainer.end(down)
        place.totals.loss += loss * len(down)
        place.totals.right += right
        place.totals.seen += len(down)
        return True

    def _tell_epoch(self) -> Course:
        """At the end of an epoch, its line of metrics."""
        trainer, place = self._active, self.place
        if trainer.steps_done % trainer.schedule.per_epoch:
            return
        totals = place.totals
        line: dict[str, Any] = {
            "epoch": trainer.steps_done // trainer.schedule.per_epoch,
            "loss": totals.loss / max(totals.seen, 1),
            "accuracy": totals.right / max(totals.seen, 1),
            "seconds": round(time.monotonic() - totals.began_s, 3) if totals.began_s else 0.0,
        }
        if self._validation is not None and self._plan.labels == "cloud":
            line["validation"] = yield from self._validate(self._validation, line["epoch"])
        place.metrics.append(line)
        place.totals = Totals(began_s=time.monotonic())

    def _validate(
        self, split: Split, epoch: int
    ) -> Generator[dict[str, Any], TrainingMessage, dict[str, float]]:
        """Accuracy of each stream and of the decision; the labels stay here."""
        network, plan = self._active.network, self._plan
        right = torch.zeros(4, dtype=torch.int64)
        # Noise that the cloud cannot draw again, and none that the training would miss.
        generator = torch.Generator().manual_seed(self.place.secret ^ epoch)
        for at in range(0, len(split), EVALUATION_BATCH):
            frames = to_unit(frames_of(split)[at : at + EVALUATION_BATCH])
            noise = torch.randn(len(frames), *plan.run.split.network.release_shape, generator=generator)
            network.eval()
            with torch.no_grad():
                released = network.release(network.client(network.attack(frames)), noise)
            network.train()
            scale = self._agreed.scale if self._sealed and plan.precision != "float32" else None
            stored = store(released, "float32" if plan.precision == "float32" else "int8", scale)
            answer = yield {"phase": Phase.EVALUATE, "values": stored.values, "scale": stored.scale}
            chosen = torch.from_numpy(answer.values.reshape(-1).view("<u2").astype(np.int64)).view(-1, 4)
            right += (chosen == torch.from_numpy(split.labels[at : at + EVALUATION_BATCH])[:, None]).sum(0)
        return dict(
            zip(("attacked", "recovered", "fused", "decision"), (right / len(split)).tolist(), strict=True)
        )

    def _hand_over(self) -> Course:
        """Seal the own half to the members and leave it with the cloud."""
        plan = self._plan
        sealed = b"\0"
        if plan.clients > 1:
            seen = {"seen": torch.tensor(end_round(self._active))} if plan.pooled else {}
            state = state_of(self._active, optimisers=plan.arrangement == "turn" or plan.pooled) | seen
            content = save({name: tensor.contiguous() for name, tensor in state.items()})
            keys = {name: base64.b64decode(key) for name, key in self.place.keys.items()}
            sealed = seal(content, self._key, keys, self._about(self.place.round, self.device))
        parts = [sealed[at : at + MAX_PART] for at in range(0, len(sealed), MAX_PART)]
        for index, part in enumerate(parts):
            answer = yield {"phase": Phase.HALF, "values": _vector(part), "step": index, "epoch": len(parts)}
            if answer.phase is Phase.SUPERSEDED:
                self.place.skipped += 1
                return

    def _fetch_server_half(self) -> Course:
        whole, part, parts = b"", 0, 1
        while part < parts:
            answer = yield {"phase": Phase.WEIGHTS, "values": NOTHING, "step": part}
            whole, part, parts = whole + answer.values.tobytes(), part + 1, answer.epoch
        self.server_half = read_tensors(whole, "the server half")

    # --- parts of the course ------------------------------------------------------------------------------------

    @property
    def _plan(self) -> Plan:
        assert self.plan is not None  # noqa: S101  # the client has joined
        return self.plan

    @property
    def _active(self) -> ClientTrainer:
        assert self.trainer is not None  # noqa: S101  # the client has joined
        return self.trainer

    @property
    def _sealed(self) -> bool:
        return self._agreed.defence.sealed

    def _agree(self, answer: TrainingMessage) -> None:
        """Take the cloud's plan, or refuse it."""
        told = read(answer, Agreement)
        plan = Plan.from_dict(told.plan)
        if plan.digest != answer.plan:
            raise TrainingError("the plan's digest is not the one in the message's header.")
        if plan.run.split != self._agreed:
            raise TrainingError(
                "the cloud's plan has another network or defence than this site agrees to: "
                f"{_difference(plan.run.split, self._agreed)}. Give the same --defence, --values, --sigma and so on "
                "as the training's maker, or refuse to take part."
            )
        if self._guard is not None and plan.noise:
            raise TrainingError(
                "the plan has noise on gradients: the guard takes it for a hijacking in the end. "
                "Take part without the guard (--no-guard) if you trust the cloud, or have the training made without."
            )
        self.place.keys, self.place.frames = told.keys, told.frames
        own = base64.b64encode(self._key.public_key().public_bytes_raw()).decode()
        if self.place.keys.get(self.device) != own:
            raise TrainingError(
                "the cloud tells the others another key than this client's own: trust it no more."
            )
        self._check_peers()
        self.place.plan = told.plan
        self._begin(plan)

    def _check_peers(self) -> None:
        prints = {name: fingerprint(base64.b64decode(key)) for name, key in self.place.keys.items()}
        strangers = [
            name for name, one in prints.items() if name != self.device and one not in (self._peers or {one})
        ]
        if strangers:
            raise TrainingError(f"the keys of {', '.join(strangers)} are not among the --peer fingerprints.")

    def _begin(self, plan: Plan) -> None:
        with reproducible(plan.run.seed):
            kept = plan.labels == "client"
            self.trainer = ClientTrainer(plan.run, self._split, tails=kept, pooled=plan.pooled)
            if not self._repeatable:
                torch.manual_seed(self.place.secret)
            self.trainer.random_state = self._random = torch.get_rng_state()
        torch.set_rng_state(self._random)
        self.plan = plan
        self.place.totals.began_s = time.monotonic()

    def _round_end(self, ahead: int = 0) -> int:
        """Own steps that are done when the present round is; `ahead` -1: when it begins."""
        plan = self._plan
        passed = self.place.round // (plan.clients if plan.arrangement == "turn" else 1) + 1 + ahead
        return passed * self._active.schedule.steps // plan.rounds

    def _about(self, round_: int, name: str) -> bytes:
        return self.training + round_.to_bytes(4, "little") + name.encode()

    def _about_step(self, phase: Phase, stored: Stored, **more: Any) -> dict[str, Any]:
        step = self._active.steps_done
        about = {"step": step, "epoch": step // self._active.schedule.per_epoch}
        return {"phase": phase} | stored._asdict() | about | more

    def _watch(self, gradient: Tensor, labels: Tensor) -> None:
        """Judge a gradient before it is applied; the evidence is on the disk before the error."""
        guard = self._guard
        if guard is None:
            return
        try:
            guard.observe(gradient.numpy(), labels.numpy())
        except HijackError as error:
            self._write_evidence(guard, gradient, labels, str(error))
            raise

    # --- requests and answers -----------------------------------------------------------------------------------

    def _ask(self, answer: TrainingMessage | None) -> None:
        """Let the course run to its next request."""
        try:
            with reproducible_kernels():
                wanted = next(self._running) if answer is None else self._running.send(answer)
        except StopIteration:
            self._request = None
            return
        self.place.sequence += 1
        message = TrainingMessage(
            device=self.device,
            training=self.training,
            sequence=self.place.sequence,
            plan=NO_PLAN if self.plan is None else self.plan.digest,
            labels=wanted.pop("labels", NO_LABELS),
            round=self.place.round,
            **wanted,
        )
        self._request = encode_training(message)
        self.place.bytes_up += len(self._request)

    def _apply(self, answer: bytes, message: TrainingMessage) -> None:
        self.meanwhile()
        self.place.bytes_down += len(answer)
        with self._own_random():
            self._ask(message)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Draw from this client's own random state, also where several share a process."""
        with TURN:
            before = torch.get_rng_state()
            torch.set_rng_state(self._random)
            try:
                yield
            finally:
                self._random = torch.get_rng_state()
                torch.set_rng_state(before)

    # --- what is kept -------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """A snapshot, when one is due; only ever between two steps."""
        journal = self._journal
        if journal is None or self._replaying or journal.since_snapshot < self._every:
            return
        trainer = self._active
        self.place.steps_done = trainer.steps_done
        tensors = state_of(trainer) | {
            "random_state": trainer.random_state,
            "feedback": self._feedback.left,
            "place": to_tensor(self.place),
        }
        if self._guard is not None:
            tensors |= {f"guard/{name}": torch.from_numpy(kept) for name, kept in self._guard.state().items()}
        journal.save(self.place.sequence + 1, tensors)

    def _come_back(self) -> None:
        """Go to the request that was under way, or the first."""
        if self._journal is not None:
            self._restore(self._journal)
        self._replaying = True  # a snapshot of what is behind the journal would throw the journal away
        with self._own_random():
            self._ask(None)
        if self._journal is not None:
            for answer in self._journal.messages():
                self._apply(answer, decode_training(answer))
        self._replaying = False

    def _restore(self, journal: Journal) -> None:
        tensors = journal.snapshot()
        if tensors is None:
            # The secret draws the noise: after a kill the same noise must be drawn again.
            journal.save(0, {"place": to_tensor(self.place)})
            return
        self.place = from_tensor(tensors["place"], Place)
        if self.place.plan is None:
            return
        self._check_peers()  # which may have been given since
        place = self.place
        self._begin(Plan.from_dict(place.plan or {}))
        restore(self._active, tensors)
        self._active.steps_done = place.steps_done
        self._active.random_state = tensors["random_state"]
        self._feedback.left = tensors["feedback"]
        if self._guard is not None and "guard/means" in tensors:
            kept = {name: tensors.get(f"guard/{name}") for name in self._guard.state()}
            self._guard.resume({name: one.numpy() for name, one in kept.items() if one is not None})

    def _check_evidence(self) -> None:
        if self._folder is not None and (self._folder / "evidence.json").exists():
            raise HijackError(
                f"{self._folder / 'evidence.json'}: the guard stopped this training; its folder is evidence and cannot "
                "go on. Take part in another training with another folder."
            )

    def _write_evidence(self, guard: GradientGuard, gradient: Tensor, labels: Tensor, what: str) -> None:
        if self._folder is None:
            return
        evidence = {
            "what": what,
            "training": self.training.hex(),
            "plan": self.place.plan,
            "step": self._active.steps_done,
            "separation": guard.separation,
            "threshold": guard.settings.threshold,
            "at_ns": time.time_ns(),
            "gradients": "evidence.npz: of the last batch, with labels; and each class's mean directions",
        }
        last = {"gradient": gradient.numpy(), "labels": labels.numpy()}
        np.savez(self._folder / "evidence.npz", allow_pickle=False, **last, **guard.state())
        write_whole(self._folder / "evidence.json", json.dumps(evidence, indent=2).encode() + b"\n")


def _own_key(folder: Path | None) -> X25519PrivateKey:
    """The client's key, made at the first start."""
    if folder is None:
        return X25519PrivateKey.generate()
    path = folder / "key"
    if not path.exists():
        write_whole(path, X25519PrivateKey.generate().private_bytes_raw())
    try:
        return X25519PrivateKey.from_private_bytes(path.read_bytes())
    except ValueError as error:
        raise TrainingError(f"{path}: is damaged ({error}). Begin this training again.") from error


def _vector(content: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(content, np.int8)


def _difference(theirs: SplitSettings, ours: SplitSettings) -> str:
    pairs = [
        (f"{part}.{name}", value, getattr(getattr(ours, part), name))
        for part in ("network", "defence")
        for name, value in vars(getattr(theirs, part)).items()
    ]
    return ", ".join(f"{name} {theirs} instead of {own}" for name, theirs, own in pairs if theirs != own)
