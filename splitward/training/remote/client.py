"""A site's side of one training: a state machine that asks, and goes on with each answer, over a journal.

`Client.request` is the message to send until it is answered; `Client.take` takes the answer. Answers are on the disk
before they have an effect; who comes back does the answers of its journal again and asks what it asked before. What is
asked, and when, is the course's (`splitward.training.remote.course`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from splitward.data import Split
from splitward.disk import write_whole
from splitward.errors import MessageError, TrainingError
from splitward.method.split import SplitSettings
from splitward.training.guard import GradientGuard, GuardSettings
from splitward.training.remote.answers import check_answer
from splitward.training.remote.course import Course
from splitward.training.remote.envelope import fingerprint
from splitward.training.remote.evidence import refuse_evidence
from splitward.training.remote.journal import Journal
from splitward.training.remote.server import NO_LABELS, reproducible_kernels
from splitward.training.remote.state import TURN
from splitward.wire.training import Phase, TrainingMessage, decode_training, encode_training

SNAPSHOT_EVERY = 100
"""Answers between snapshots: a kill costs at most the time to take so many again."""
NO_PLAN = bytes(16)


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
    most_epochs : int, optional
        A plan with more, each of which shows the cloud every frame, is refused.
    keep_labels : bool
        A plan by which the cloud has the labels is refused.
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
        most_epochs: int | None = None,
        keep_labels: bool = False,
        repeatable: bool = False,
        every: int = SNAPSHOT_EVERY,
    ) -> None:
        self.device, self.training = device, training
        refuse_evidence(folder)
        self._every = every
        self._random = torch.get_rng_state()
        self._replaying = False
        self._journal = None if folder is None else Journal(folder)
        self._key = _own_key(folder)
        self.course = Course(
            *(device, training, train, split, self._key, self._keep),
            validation=validation,
            folder=folder,
            guard=None if guard is None else GradientGuard(guard),
            peers=peers,
            most_epochs=most_epochs,
            keep_labels=keep_labels,
            repeatable=repeatable,
        )
        self._running = self.course.requests()
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
        with self._own_random():
            self.course.meanwhile()

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
        awaited = (self.device, self.training, self.course.place.sequence)
        if self._request is None or (message.device, message.training, message.sequence) != awaited:
            return False
        if message.phase is Phase.REFUSED:
            raise TrainingError(f"the cloud refuses: {message.values.tobytes().decode(errors='replace')}")
        features = 0 if self.course.trainer is None else self.course.trainer.features
        released, place = tuple(self.course.agreed.network.release_shape), self.course.place
        check_answer(message, decode_training(self._request), released, features, place.keys, place.next_round)
        if self._journal is not None:
            self._journal.append(answer)
        self._apply(answer, message)
        return True

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            self._journal.close()

    # --- requests and answers -----------------------------------------------------------------------------------

    def _ask(self, answer: TrainingMessage | None) -> None:
        """Let the course run to its next request."""
        try:
            with reproducible_kernels():
                wanted = next(self._running) if answer is None else self._running.send(answer)
        except StopIteration:
            self._request = None
            return
        self.course.place.sequence += 1
        message = TrainingMessage(
            device=self.device,
            training=self.training,
            sequence=self.course.place.sequence,
            plan=NO_PLAN if self.course.plan is None else self.course.plan.digest,
            labels=wanted.pop("labels", NO_LABELS),
            round=self.course.place.round,
            **wanted,
        )
        self._request = encode_training(message)
        self.course.place.bytes_up += len(self._request)

    def _apply(self, answer: bytes, message: TrainingMessage) -> None:
        self.meanwhile()
        self.course.place.bytes_down += len(answer)
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
        if journal is not None and not self._replaying and journal.since_snapshot >= self._every:
            journal.save(self.course.place.sequence + 1, self.course.state())

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
            journal.save(0, self.course.state())
            return
        with self._own_random():
            self.course.resume(tensors)


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
