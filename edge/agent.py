"""The device agent: capture -> perturb -> client half -> seal -> spool -> publish; drop on result."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from msgspec import Struct

from edge.capture import Capture, Frame, Source, open_source
from edge.config import EdgeConfig
from edge.delivery import Answer, Delivery
from edge.errors import BackendError
from edge.model import ClientModel
from edge.results import ResultsFile
from edge.secret import load_secret
from edge.spool import Entry, Spool
from splitward import __version__
from splitward.errors import DataError
from splitward.imaging.inputs import to_frame
from splitward.wire.bundle import read_bundle, read_trusted_key
from splitward.wire.message import Activation, encode

BOOT_BYTES = 16
log = logging.getLogger(__name__)


class AgentReport(Struct, frozen=True):
    """What one start of the agent did.

    `sent` counts messages, repeats included; `queued` frames still wait in the spool for their result;
    `dropped` counts the frames lost by reason, since the spool was made.
    """

    boot: str
    captured: int
    sent: int
    results: int
    queued: int
    dropped: dict[str, int]


def run_agent(
    config: EdgeConfig,
    source: Callable[[Capture], Source] | None = None,
    on_answer: Callable[[Answer], None] | None = None,
    stop: threading.Event | None = None,
    until_answered: bool = False,
) -> AgentReport:
    """Run the agent until `stop` is set.

    Parameters
    ----------
    config : EdgeConfig
    source : callable, optional
        Makes the source of frames; the one that `config.capture` names by default.
    on_answer : callable, optional
        Takes every `Answer`, on the delivery's thread.
    stop : Event, optional
        Ends the agent; what is in the spool waits there for the next start.
    until_answered : bool
        End as well when the source has no more frames and every frame is answered.

    Raises
    ------
    BundleError
        The bundle is refused; `.reason` says why.
    ConfigError, EdgeError
        The agent cannot start, or its spool cannot be written any more.
    """
    stop = stop or threading.Event()
    boot = secrets.token_bytes(BOOT_BYTES)
    bundle = read_bundle(Path(config.device.bundle), read_trusted_key(Path(config.device.trusted_key)))
    model = ClientModel(bundle, config.runtime, load_secret(config.device.secret_path))
    identity = {
        "version": __version__,
        "model": model.id.hex(),
        "model_name": model.name,
        "runtime": model.runtime,
    }
    with ExitStack() as stack:
        spool = stack.enter_context(
            closing(Spool(Path(config.device.state_dir) / "spool.sqlite", config.spool))
        )
        answered = _answer_to(config, on_answer, stack)
        delivery = stack.enter_context(Delivery(config, boot, spool, identity, answered, stop))
        capture = Capture(config.capture.rate_hz, stop, spool.known, delivery.drop)
        frames = open_source(config.capture, capture) if source is None else source(capture)
        log.info("device %s runs %s as %s, boot %s", config.device.id, model.name, model.runtime, boot.hex())
        _release_all(frames, model, delivery, config.device.id, boot)
        if until_answered:
            delivery.wait_until_answered()
        else:
            stop.wait()
    return AgentReport(
        boot.hex(), delivery.captured, delivery.sent, delivery.results, delivery.unanswered, spool.dropped
    )


def _release_all(frames: Source, model: ClientModel, delivery: Delivery, device: str, boot: bytes) -> None:
    """Hand every frame's released tensor to the delivery."""
    sequence = 0
    for frame in frames:  # capture
        message = _release_one(frame, model, delivery, device, boot, sequence)
        if message is None:
            continue
        entry = Entry(
            *(0, boot, sequence, frame.name, frame.captured_at_ns, frame.captured_tick_ns), message=message
        )
        delivery.put(entry, frame.digest)  # spool, publish, drop on result
        sequence += 1
        if not frames.real_time:
            delivery.wait_for_room(len(message))


def _release_one(
    frame: Frame, model: ClientModel, delivery: Delivery, device: str, boot: bytes, sequence: int
) -> bytes | None:
    """Message of one frame, or None when it was dropped: one bad frame does not stop a device."""
    try:
        released = model.release(to_frame(frame.pixels, model.input))  # perturb, client half, seal
    except DataError as error:
        log.warning("%s: dropped: %s", frame.name, error)
        delivery.drop("unreadable")
    except BackendError as error:
        log.error("%s: dropped: %s", frame.name, error)
        delivery.drop("not_released")
    else:
        return encode(
            Activation(device, boot, sequence, frame.captured_at_ns, model.id, released, model.law.scale)
        )
    return None


def _answer_to(
    config: EdgeConfig, on_answer: Callable[[Answer], None] | None, stack: ExitStack
) -> Callable[[Answer], None]:
    """Everyone who wants to know of an answer, as one callable."""
    takers = [] if on_answer is None else [on_answer]
    if config.device.results_file is not None:
        takers.append(stack.enter_context(closing(ResultsFile(Path(config.device.results_file)))).write)

    def tell(answer: Answer) -> None:
        for taker in takers:
            taker(answer)

    return tell
