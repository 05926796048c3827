"""The course of one training at a site: what it asks of the cloud, in order, and what it does with each answer.

Join; for each round fetch the others' halves and go on with their mean, take steps, seal the own half for the members;
at the end fetch the server half. What is asked depends on the images, the answers, torch's random state and the secret
that keys noise and order alone.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from safetensors.torch import save
from torch import Tensor

from splitward.data import Split
from splitward.errors import HijackError, TrainingError
from splitward.method.split import SplitSettings
from splitward.training.guard import GradientGuard
from splitward.training.loop import frames_of, reproducible, to_unit
from splitward.training.remote.answers import Agreement, RoundStart, read, read_tensors
from splitward.training.remote.envelope import fingerprint, open_envelope, seal
from splitward.training.remote.evidence import write_evidence
from splitward.training.remote.halves import ClientTrainer, end_round, forget_gradients
from splitward.training.remote.plan import Plan
from splitward.training.remote.precision import Feedback, Stored, store
from splitward.training.remote.privacy import draw_noise, draw_order
from splitward.training.remote.server import NO_LABELS
from splitward.training.remote.session import EVALUATION_BATCH, Join
from splitward.training.remote.state import average, from_tensor, restore, state_of, to_tensor
from splitward.wire.release import SECRET_BYTES
from splitward.wire.training import MAX_PART, Phase, TrainingMessage

NOTHING = np.zeros(1, np.int8)
Requests = Generator[dict[str, Any], TrainingMessage, None]


class Totals(msgspec.Struct):
    """Sums of the epoch that is under way."""

    loss: float = 0.0
    right: int = 0
    seen: int = 0
    began_s: float = 0.0


class Place(msgspec.Struct):
    """Where in its course a client is: all but the tensors, as a snapshot keeps it.

    `secret` keys the noise. `next_round` is the earliest that the cloud may begin: the present one, as a client that it
    went on without may come back within it, until its own half is handed over or the halves before it are gone.
    """

    secret: bytes
    sequence: int = -1
    plan: dict[str, Any] | None = None
    keys: dict[str, str] = {}
    frames: dict[str, int] = {}
    round: int = 0
    next_round: int = 0
    inside: bool = False
    steps_done: int = 0
    epochs_told: int = 0
    totals: Totals = msgspec.field(default_factory=Totals)
    metrics: list[dict[str, Any]] = []
    skipped: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


class Course:
    """One site's course.

    Parameters
    ----------
    device, training, train, agreed, validation, folder, guard, peers, most_epochs, keep_labels, repeatable
        As `Client` takes them; `agreed` is its `split`.
    key : X25519PrivateKey
        The site's own.
    between_steps : callable
        Called where nothing is half done.
    """

    def __init__(
        self,
        device: str,
        training: bytes,
        train: Split,
        agreed: SplitSettings,
        key: X25519PrivateKey,
        between_steps: Callable[[], None],
        *,
        validation: Split | None = None,
        folder: Path | None = None,
        guard: GradientGuard | None = None,
        peers: frozenset[str] | None = None,
        most_epochs: int | None = None,
        keep_labels: bool = False,
        repeatable: bool = False,
    ) -> None:
        self.device, self.training, self.agreed = device, training, agreed
        self._split, self._validation, self._folder, self._guard = train, validation, folder, guard
        self._most_epochs, self._keep_labels = most_epochs, keep_labels
        self._key, self._peers, self._repeatable, self._between_steps = key, peers, repeatable, between_steps
        self.place = Place(secrets.token_bytes(SECRET_BYTES), keys={}, frames={}, metrics=[])
        self.plan: Plan | None = None
        self.trainer: ClientTrainer | None = None
        self.server_half: dict[str, Tensor] | None = None
        self._feedback = Feedback()
        self._meanwhile_due = False

    def meanwhile(self) -> None:
        """Do what needs no answer."""
        if self._meanwhile_due:
            self._meanwhile_due = False
            self._active.meanwhile()

    def state(self) -> dict[str, Tensor]:
        """All of this, between two steps."""
        if self.trainer is None:
            return {"place": to_tensor(self.place)}
        self.place.steps_done = self.trainer.steps_done
        tensors = state_of(self.trainer) | {
            "random_state": self.trainer.random_state,
            "feedback": self._feedback.left,
            "place": to_tensor(self.place),
        }
        if self._guard is not None:
            tensors |= {f"guard/{name}": torch.from_numpy(kept) for name, kept in self._guard.state().items()}
        return tensors

    def resume(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        try:
            place = self.place = from_tensor(tensors["place"], Place)
        except msgspec.ValidationError as error:
            raise TrainingError(
                "this training was begun by an earlier version, whose noise can be guessed. Begin a new training."
            ) from error
        if place.plan is None:
            return
        plan = Plan.from_dict(place.plan)
        self._check_terms(plan)  # which may be others than when it was agreed to
        self._check_peers()
        self._begin(plan)
        trainer = self._active
        restore(trainer, tensors)
        trainer.steps_done, trainer.random_state = place.steps_done, tensors["random_state"]
        self._feedback.left = tensors["feedback"]
        if self._guard is not None and "guard/means" in tensors:
            kept = {name: tensors.get(f"guard/{name}") for name in self._guard.state()}
            self._guard.resume({name: one.numpy() for name, one in kept.items() if one is not None})

    def requests(self) -> Requests:
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
                self._between_steps()
                superseded = not (yield from self._step())
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
            self.place.round = self.place.next_round = told.round
            if (yield from self._adopt(told.halves)):
                break
            self.place.next_round += 1  # its halves are gone, so it is over
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
        """One step; False where the round has gone on without this client.

        The cloud has seen the batch then, too, so the step counts as taken: nobody is shown a batch again by saying so.
        """
        plan, trainer, place = self._plan, self._active, self.place
        sent = trainer.begin(None if self._repeatable else self._noise)
        kept = plan.labels == "client"
        defence = self.agreed.defence
        # The seal's own int8 lose nothing, unless the noise of the training goes beyond their range.
        within = self._sealed and defence.noise_of(training=True) <= defence.sigma
        seal = self.agreed.scale if within and plan.precision == "int8" else None
        stored = store(sent.released, plan.precision, seal)
        labels = NO_LABELS if kept else sent.labels.numpy().astype(np.uint16)
        self._meanwhile_due = not kept
        answer = yield self._about_step(Phase.STEP, stored, labels=labels)
        if answer.phase is Phase.SUPERSEDED:
            self._meanwhile_due = kept
            return self._leave_out()
        loss, right = answer.loss, answer.right
        if kept:
            gradient, loss = trainer.answer(Stored.of(answer).real())
            self._meanwhile_due = True
            stored = self._feedback.store(gradient, plan.precision)
            answer = yield self._about_step(Phase.BACK, stored, loss=loss)
            if answer.phase is Phase.SUPERSEDED:
                return self._leave_out()
        down = Stored.of(answer).real()
        self._watch(down, trainer.wanted)
        trainer.end(down)
        place.totals.loss += loss * len(down)
        place.totals.right += right
        place.totals.seen += len(down)
        return True

    def _leave_out(self) -> bool:
        """Go on to the next batch without the gradient of this one."""
        self.meanwhile()
        self._active.steps_done += 1
        return False

    def _tell_epoch(self) -> Requests:
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
            line["validation"] = yield from self._validate(self._validation)
        place.metrics.append(line)
        place.totals = Totals(began_s=time.monotonic())

    def _validate(self, split: Split) -> Generator[dict[str, Any], TrainingMessage, dict[str, float]]:
        """Accuracy of each stream and of the decision; the labels stay here."""
        network, plan = self._active.network, self._plan
        right = torch.zeros(4, dtype=torch.int64)
        order = self._order(b"validation", len(split), self._active.steps_done)
        images, labels = frames_of(split), torch.from_numpy(split.labels)
        for at in range(0, len(split), EVALUATION_BATCH):
            rows = order[at : at + EVALUATION_BATCH]
            frames = to_unit(images[rows])
            shape = (len(frames), *plan.run.split.network.release_shape)
            noise = self._noise(shape) if self.agreed.defence.sigma else torch.zeros(shape)
            network.eval()
            with torch.no_grad():
                released = network.release(network.client(network.attack(frames)), noise)
            network.train()
            scale = self.agreed.scale if self._sealed and plan.precision != "float32" else None
            stored = store(released, "float32" if plan.precision == "float32" else "int8", scale)
            answer = yield {"phase": Phase.EVALUATE, "values": stored.values, "scale": stored.scale}
            chosen = torch.from_numpy(answer.values.reshape(-1).view("<u2").astype(np.int64)).view(-1, 4)
            right += (chosen == labels[rows][:, None]).sum(0)
        return dict(
            zip(("attacked", "recovered", "fused", "decision"), (right / len(split)).tolist(), strict=True)
        )

    def _hand_over(self) -> Requests:
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
        self.place.next_round = self.place.round + 1

    def _fetch_server_half(self) -> Requests:
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
        return self.agreed.defence.sealed

    def _agree(self, answer: TrainingMessage) -> None:
        """Take the cloud's plan, or refuse it."""
        told = read(answer, Agreement)
        plan = Plan.from_dict(told.plan)
        if plan.digest != answer.plan:
            raise TrainingError("the plan's digest is not the one in the message's header.")
        self._check_terms(plan)
        self.place.keys, self.place.frames = told.keys, told.frames
        own = base64.b64encode(self._key.public_key().public_bytes_raw()).decode()
        if self.place.keys.get(self.device) != own:
            raise TrainingError(
                "the cloud tells the others another key than this client's own: trust it no more."
            )
        self._check_peers()
        self.place.plan = told.plan
        self._begin(plan)

    def _check_terms(self, plan: Plan) -> None:
        """Refuse a plan that this site does not agree to."""
        if plan.run.split != self.agreed:
            raise TrainingError(
                "the cloud's plan has another network or defence than this site agrees to: "
                f"{_difference(plan.run.split, self.agreed)}. Give the same --defence, --values, --sigma and so on "
                "as the training's maker, or refuse to take part."
            )
        if self._guard is not None and plan.noise:
            raise TrainingError(
                "the plan has noise on gradients: the guard takes it for a hijacking in the end. "
                "Take part without the guard (--no-guard) if you trust the cloud, or have the training made without."
            )
        if self._most_epochs is not None and plan.run.epochs > self._most_epochs:
            raise TrainingError(
                f"the plan has {plan.run.epochs} epochs, each of which shows the cloud every frame, and this site "
                f"agrees to {self._most_epochs}. Give --epochs {plan.run.epochs} to agree, or refuse to take part."
            )
        if self._keep_labels and plan.labels == "cloud":
            raise TrainingError(
                "by the plan the cloud has the labels, and this site keeps its own. Have the training made with "
                "labels at the client, or take part without --labels client."
            )

    def _check_peers(self) -> None:
        prints = {name: fingerprint(base64.b64decode(key)) for name, key in self.place.keys.items()}
        strangers = [
            name for name, one in prints.items() if name != self.device and one not in (self._peers or {one})
        ]
        if strangers:
            raise TrainingError(f"the keys of {', '.join(strangers)} are not among the --peer fingerprints.")

    def _begin(self, plan: Plan) -> None:
        """Make the own half; torch's random state, which shifts the frames, is the site's own from here on."""
        with reproducible(plan.run.seed):
            kept = plan.labels == "client"
            order = None if self._repeatable else partial(self._order, b"training", len(self._split))
            self.trainer = ClientTrainer(plan.run, self._split, tails=kept, pooled=plan.pooled, order=order)
            if not self._repeatable:
                seed = blake2b(b"torch", key=self.place.secret, digest_size=4).digest()
                torch.manual_seed(int.from_bytes(seed, "little"))
            self.trainer.random_state = torch.get_rng_state()
        torch.set_rng_state(self.trainer.random_state)
        self.plan = plan
        self.place.totals.began_s = time.monotonic()

    def _round_end(self, ahead: int = 0) -> int:
        """Own steps that are done when the present round is; `ahead` -1: when it begins."""
        plan = self._plan
        passed = self.place.round // (plan.clients if plan.arrangement == "turn" else 1) + 1 + ahead
        return passed * self._active.schedule.steps // plan.rounds

    def _noise(self, shape: Sequence[int]) -> Tensor:
        """Noise of the request that is next: its number is no other's, so neither is its noise."""
        return draw_noise(self.place.secret, (self.place.sequence + 1).to_bytes(8, "little"), shape)

    def _order(self, about: bytes, count: int, epoch: int) -> Tensor:
        """Frames of an epoch in an order that tells nobody which of them were shown before, and when."""
        return draw_order(self.place.secret, about + epoch.to_bytes(8, "little"), count)

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
            if self._folder is not None:
                about = {
                    "training": self.training.hex(),
                    "plan": self.place.plan,
                    "step": self._active.steps_done,
                }
                write_evidence(self._folder, guard, gradient, labels, about | {"what": str(error)})
            raise


def _vector(content: bytes) -> np.ndarray[Any, Any]:
    return np.frombuffer(content, np.int8)


def _difference(theirs: SplitSettings, ours: SplitSettings) -> str:
    pairs = [
        (f"{part}.{name}", value, getattr(getattr(ours, part), name))
        for part in ("network", "defence")
        for name, value in vars(getattr(theirs, part)).items()
    ]
    return ", ".join(f"{name} {theirs} instead of {own}" for name, theirs, own in pairs if theirs != own)
