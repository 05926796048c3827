"""The releaser: capture -> perturb -> client half -> seal, in a process of its own.

It alone sees pixels, and it has neither network nor spool: a decoder that crashes on a hostile file, or a runtime
that hangs, takes down this process and nothing else. The agent (agent.py) starts it, again if need be
(supervisor.py), and takes its messages.

Started as `python -m edge.releaser SOCKET PAGE` with the descriptors of one end of a socket pair and of a page of
memory (pipe.py).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from edge.capture import Capture, Digests, Frame, merge, open_source, printable
from edge.config import CaptureConfig
from edge.errors import BackendError, CaptureError
from edge.logs import is_told
from edge.model import ClientModel
from edge.pipe import (
    Beat,
    Ended,
    Logged,
    Lost,
    Opened,
    Page,
    Pipe,
    Progress,
    Ready,
    Released,
    Start,
    ToReleaser,
    Unfit,
)
from edge.secret import leave_no_core, load_secret
from edge.verify import TrustedKey
from splitward.errors import DataError, SplitwardError, WireError
from splitward.imaging.inputs import to_frame
from splitward.wire.bundle import read_bundle
from splitward.wire.message import Activation, encode

BOOT_BYTES = 16
BEAT_S = 2.0
OOM_SCORE = "500"
"""Where memory runs out, the kernel ends this process before the agent, which keeps the spool."""
log = logging.getLogger(__name__)


class Releaser:
    """One run of the releaser over `pipe`, as `start` says; `page` tells what it is at."""

    def __init__(self, pipe: Pipe, page: Page, start: Start) -> None:
        self._pipe = pipe
        self._page = page
        self._config = start.config
        self._poison = start.poison
        self._known = Digests(start.known)
        self._deadline_s = start.config.runtime.deadline_s
        self._model = _load_model(start)
        self._boot = secrets.token_bytes(BOOT_BYTES)
        self._stop = threading.Event()
        self._progress = threading.Condition()
        self._room = self._admitted = self._sequence = self._superseded = 0
        self._unsettled: deque[tuple[int, Callable[[], None]]] = deque()
        self._timing = threading.RLock()  # there is one interval timer; reading and releasing take turns
        self._opening = _Opening(self._timing)
        self._openings = 0
        self._own = _Own()

    def run(self) -> None:
        """Release every frame of every source, until they end or the agent closes the pipe."""
        sources = [open_source(self._capture(config)) for config in self._config.every_source]
        self._pipe.send(Ready(self._boot, self._model.id.hex(), self._model.name, self._model.runtime))
        for target in (self._listen, self._beat):
            threading.Thread(target=target, daemon=True).start()
        for frame in merge(sources, self._stop):
            self._release(frame)
        self._pipe.send(Ended())
        with self._progress:
            self._progress.wait_for(lambda: self._stop.is_set() or not self._unsettled)

    def _release(self, frame: Frame) -> None:
        """Send one frame's message, or count why there is none: one bad frame does not stop a device."""
        started_ns = time.perf_counter_ns()
        try:
            with self._open(frame.name, frame.can_wait):
                released = self._model.release(to_frame(frame.pixels, self._model.input))
        except (DataError, BackendError) as error:
            reason = "unreadable" if isinstance(error, DataError) else "not_released"
            log.warning("a frame is dropped: %s", reason, extra={"frame": frame.name, "error": str(error)})
            # Before it is known as lost: what is known is filed as done at the next start.
            if frame.fail is not None:
                frame.fail(reason, f"{frame.name}: {error}")
            self._lose(reason, frame.digest, frame.name)
            if frame.can_wait:
                self._give_back()
            return
        message = encode(
            Activation(
                *(self._config.device.id, self._boot, self._sequence, frame.captured_at_ns),
                *(self._model.id, released, self._model.law.scale),
            )
        )
        runtime_us = self._model.runtime_ns // 1000
        self._sequence += 1
        with self._progress:
            if not frame.can_wait:
                self._admitted += 1
            if frame.settle is not None:
                self._unsettled.append((self._sequence, frame.settle))
        self._pipe.send(
            Released(
                *(self._boot, self._sequence - 1, frame.name, frame.captured_at_ns, frame.captured_tick_ns),
                *(frame.priority, frame.digest, message, runtime_us),
                (time.perf_counter_ns() - started_ns) // 1000 - runtime_us,
                self._own.opening,
            )
        )

    def _open(self, name: str, can_wait: bool = True) -> _Opening:
        """Within, the kernel ends this process after the deadline, whatever holds it, and the agent knows why."""
        self._timing.acquire()
        self._openings += 1
        self._own.opening = self._openings
        self._page.write(Opened(self._openings, name, can_wait))
        signal.setitimer(signal.ITIMER_REAL, self._deadline_s)
        return self._opening

    def _capture(self, config: CaptureConfig) -> Capture:
        return Capture(
            config=config,
            stop=self._stop,
            known=self._known,
            poison=self._poison,
            admit=self._admit,
            give_back=self._give_back,
            open=self._open,
            lose=self._lose,
            supersede=self._supersede,
        )

    def _admit(self) -> bool:
        with self._progress:
            self._progress.wait_for(lambda: self._stop.is_set() or self._admitted < self._room)
            self._admitted += 1
            return not self._stop.is_set()

    def _give_back(self) -> None:
        with self._progress:
            self._admitted -= 1
            self._progress.notify_all()

    def _lose(self, reason: str, digest: int | None, name: str) -> None:
        self._pipe.send(Lost(reason, digest, name, self._own.opening))

    def _supersede(self) -> None:
        self._superseded += 1

    def _listen(self) -> None:
        """Follow the agent's progress; stop when it has gone, or wants no more."""
        while (progress := self._pipe.receive()) is not None:
            if isinstance(progress, Progress):
                with self._progress:
                    self._room = progress.room
                    safe = [settle for end, settle in self._unsettled if end <= progress.safe]
                for settle in safe:
                    settle()
                with self._progress:  # only now: whoever waits for the last of them ends the process
                    for _ in safe:
                        self._unsettled.popleft()
                    self._progress.notify_all()
        with self._progress:
            self._stop.set()
            self._progress.notify_all()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._pipe.send(Beat(self._superseded))


class _Opening:
    """The time in which a deadline runs. A class: a generator costs a frame, whose caches are cold, a third more."""

    def __init__(self, timing: threading.RLock) -> None:
        self._timing = timing

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        self._timing.release()


class _Own(threading.local):
    """Number of what this thread has opened last."""

    opening = 0


class PipeHandler(logging.Handler):
    """Hands log records to the agent."""

    def __init__(self, pipe: Pipe) -> None:
        super().__init__()
        self._pipe = pipe
        self.addFilter(is_told)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record; the fields given as `extra` go along."""
        given: tuple[str, ...] = ("file", "frame", "error")
        fields = {key: printable(str(record.__dict__[key])) for key in given if key in record.__dict__}
        self._pipe.send(Logged(record.levelno, record.name, printable(record.getMessage()), fields))


def main(arguments: list[str]) -> int:
    """Run over the descriptors given as arguments; 0, or 2 when the releaser cannot start."""
    leave_no_core()
    for number in (signal.SIGINT, signal.SIGTERM):  # the agent says when; a terminal's go to both
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
    pipe = Pipe(socket.socket(fileno=int(arguments[0])), ToReleaser)
    start = pipe.receive()
    if not isinstance(start, Start):
        return 0  # the agent has gone
    logging.basicConfig(level=start.config.health.log_level.upper(), handlers=[PipeHandler(pipe)])
    try:
        Releaser(pipe, Page(int(arguments[1])), start).run()
    except SplitwardError as error:
        reason = error.reason if isinstance(error, WireError) else ""
        pipe.send(Unfit(type(error).__name__, reason, str(error)))
        return 2
    return 0


def _load_model(start: Start) -> ClientModel:
    config = start.config
    for first in config.every_source:
        if sum(first.name == other.name for other in config.every_source) > 1:
            raise CaptureError(
                f"two sources are named {first.name!r}. Give each of `sources` a `name` of its own."
            )
    bundle = read_bundle(Path(start.bundle), TrustedKey(Path(config.device.trusted_key)))
    return ClientModel(bundle, config.runtime, load_secret(config.device.secret_path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
