"""Each step exactly once, whatever is killed: the two halves over their journals.

The server notes a step's message, takes the step, and answers. The same message again is answered with the same
gradient. The client notes the gradient and takes its step. Whoever comes back does the messages of its journal again
and goes on at the step where it was.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from splitward.data import Split
from splitward.errors import TrainingError
from splitward.training.remote.halves import ClientTrainer, Exchange, ServerTrainer
from splitward.training.remote.journal import Journal
from splitward.training.settings import RunSettings

SNAPSHOT_EVERY = 50
"""Steps between snapshots: what a kill costs at most."""


class DurableServer:
    """The server half of one training, for one client.

    Parameters
    ----------
    settings : RunSettings
    folder : Path
        Of its journal.

    Raises
    ------
    TrainingError
        The journal is damaged.
    """

    def __init__(self, settings: RunSettings, folder: Path, *, every: int = SNAPSHOT_EVERY) -> None:
        torch.manual_seed(settings.seed)
        self.trainer = ServerTrainer(settings)
        self._every, self._journal = every, Journal(folder)
        self._last: tuple[int, bytes] = (-1, b"")
        if (tensors := self._journal.snapshot()) is not None:
            _restore(self.trainer, tensors)
            self._last = int(tensors["last"]), tensors["reply"].numpy().tobytes()
        for message in self._journal.messages():
            self._take(unpack(message))

    def handle(self, message: bytes) -> bytes:
        """The gradient that answers a step's message.

        Raises
        ------
        TrainingError
            The step is neither the next nor the last one: the client's journal belongs to another training.
        """
        sent = unpack(message)
        if sent.step == self._last[0]:
            return self._last[1]
        if sent.step != self.trainer.steps_done:
            raise TrainingError(
                f"step {sent.step}: the server is at step {self.trainer.steps_done}. Begin this training again, or "
                "bring back the folders of both sides."
            )
        self._journal.append(message)
        reply = self._take(sent)
        if self._journal.since_snapshot >= self._every:
            held = torch.frombuffer(bytearray(reply), dtype=torch.uint8)
            kept = {"last": torch.tensor(sent.step), "reply": held}
            self._journal.save(self.trainer.steps_done, _state(self.trainer) | kept)
        return reply

    def close(self) -> None:
        """Let go of the journal."""
        self._journal.close()

    def _take(self, sent: Exchange) -> bytes:
        self._last = sent.step, save({"gradient": self.trainer.take(sent)})
        return self._last[1]


class DurableClient:
    """The client half of one training.

    Parameters
    ----------
    settings : RunSettings
    split : Split
        The client's own training images.
    folder : Path
        Of its journal.

    Raises
    ------
    TrainingError
        The journal is damaged.
    """

    def __init__(
        self, settings: RunSettings, split: Split, folder: Path, *, every: int = SNAPSHOT_EVERY
    ) -> None:
        torch.manual_seed(settings.seed)
        self.trainer = ClientTrainer(settings, split)
        self._every, self._journal = every, Journal(folder)
        if (tensors := self._journal.snapshot()) is not None:
            _restore(self.trainer, tensors)
            torch.set_rng_state(tensors["random_state"])
        for message in self._journal.messages():
            self.trainer.begin()
            self.trainer.meanwhile()
            self.trainer.end(_load(message)["gradient"])

    def begin(self) -> bytes:
        """The message of the step that is next; to be sent until it is answered."""
        return pack(self.trainer.begin())

    def meanwhile(self) -> None:
        """What needs no answer; once between `begin` and `end`."""
        self.trainer.meanwhile()

    def end(self, reply: bytes) -> None:
        """Take the step with the server's answer."""
        self._journal.append(reply)
        self.trainer.end(_load(reply)["gradient"])
        if self._journal.since_snapshot >= self._every:
            kept = {"random_state": self.trainer.random_state}
            self._journal.save(self.trainer.steps_done, _state(self.trainer) | kept)

    def close(self) -> None:
        """Let go of the journal."""
        self._journal.close()


def pack(sent: Exchange) -> bytes:
    """A step as bytes."""
    step, at = torch.tensor(sent.step), torch.tensor(sent.at, dtype=torch.float64)
    return save({"step": step, "at": at, "released": sent.released.contiguous(), "labels": sent.labels})


def unpack(message: bytes) -> Exchange:
    """Inverse of `pack`."""
    tensors = _load(message)
    return Exchange(int(tensors["step"]), float(tensors["at"]), tensors["released"], tensors["labels"])


def _load(message: bytes) -> dict[str, Tensor]:
    """Tensors in memory of their own: where they lie in a message, torch adds in another order, to other bits."""
    return {name: tensor.clone() for name, tensor in load(message).items()}


def _state(trainer: ServerTrainer | ClientTrainer) -> dict[str, Tensor]:
    tensors = {"steps_done": torch.tensor(trainer.steps_done)}
    for name, module in trainer.modules.items():
        tensors |= {f"{name}/module/{key}": tensor for key, tensor in module.state_dict().items()}
        for index, state in trainer.optimisers[name].state_dict()["state"].items():
            tensors |= {f"{name}/optimiser/{index}/{key}": tensor for key, tensor in state.items()}
    return tensors


def _restore(trainer: ServerTrainer | ClientTrainer, tensors: dict[str, Tensor]) -> None:
    trainer.steps_done = int(tensors["steps_done"])
    for name, module in trainer.modules.items():
        head = f"{name}/module/"
        module.load_state_dict({k.removeprefix(head): t for k, t in tensors.items() if k.startswith(head)})
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{name}/optimiser/"):
                _, _, index, field = key.split("/")
                states.setdefault(int(index), {})[field] = tensor
        optimiser = trainer.optimisers[name]
        optimiser.load_state_dict(optimiser.state_dict() | {"state": states})
