"""Starts the releaser, notices when it dies or hangs, and starts it again within a budget."""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from edge.config import BrokerConfig, CloudConfig, EdgeConfig
from edge.errors import BackendError, CaptureError, EdgeError, ReleaserError
from edge.pipe import (
    Beat,
    Ended,
    FromReleaser,
    Logged,
    Lost,
    Opened,
    Page,
    Pipe,
    Progress,
    Ready,
    Released,
    Start,
    Unfit,
)
from splitward.errors import BundleError, ConfigError, SplitwardError

PERMITS = 8
"""Messages that may wait to be committed; then the releaser waits."""
READY_S = 60.0
"""Longest time from start to the first sign of life: importing a runtime on a slow card takes its time."""
SILENCE_S = 20.0
STOP_S = 2.0
STRIKES = 2
"""How often one file may end the releaser before it is not opened again."""
PAUSE_S = 0.5
_ERRORS = {kind.__name__: kind for kind in (BackendError, CaptureError, ConfigError)}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FromRun:
    """What the releaser's run of this number says; a `message` of None: it has ended."""

    run: int
    message: FromReleaser | None


@dataclass(frozen=True, slots=True)
class Launched:
    """A process that imports what the releaser needs, and then waits to be told what to run."""

    process: subprocess.Popen[bytes]
    pipe: Pipe
    page: Page


def launch() -> Launched:
    """Start the interpreter. Its imports take a while, so whoever needs one begins with this."""
    ours, theirs = socket.socketpair()
    page = Page()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge.releaser", str(theirs.fileno()), str(page.descriptor)],
        pass_fds=[theirs.fileno(), page.descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # Fewer of the allocator's arenas: a small board's memory counts more than a lock's speed.
        env={**os.environ, "MALLOC_ARENA_MAX": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    theirs.close()
    return Launched(process, Pipe(ours, FromReleaser), page)


class Supervisor:
    """The agent's side of the releaser. One thread uses it; `post` is called on others.

    Parameters
    ----------
    first : Launched
        What the first `start` uses.
    config : EdgeConfig
    post : callable
        Takes each `FromRun`.
    known : callable
        Digests of the frames that were taken, packed; asked for at each start.
    strikes : callable
        How often each file has ended a releaser; asked for at each start.
    on_strike : callable
        Takes the name of a file that has ended the releaser.
    on_loss : callable
        Counts a lost frame under a reason, with the digest that keeps it from being tried again, or None, and its
        name, whose strikes are then forgotten.

    Attributes
    ----------
    ready : Ready or None
        What the present run has said of its model.
    ended : bool
        Whether every source has given its last frame.
    unfit : SplitwardError or None
        Why the bundle, or the configuration, cannot be used; cleared by `start`.
    restarts : int
        How often a run has died since the agent's start.
    superseded : int
        Live frames that gave way to newer ones since the agent's start.
    runtime_us, other_us : deque of int
        Of the latest frames: microseconds within the runtime, and the releaser's own.
    """

    def __init__(
        self,
        first: Launched,
        config: EdgeConfig,
        post: Callable[[FromRun], None],
        known: Callable[[], bytes],
        strikes: Callable[[], Mapping[str, int]],
        on_strike: Callable[[str], None],
        on_loss: Callable[[str, int | None, str], None],
    ) -> None:
        self._config = config
        self._post = post
        self._known = known
        self._strikes = strikes
        self._on_strike = on_strike
        self._on_loss = on_loss
        self._run = 1
        self._launched: Launched | None = first
        self._permits = threading.Semaphore(PERMITS)
        self._held = self._received = self._safe_before = 0
        self._told = (-1, -1)
        self._settled = 0  # number of the opening that the latest message came of
        self._deaths: deque[float] = deque()
        self._start_at_s: float | None = None
        self._heard_s = 0.0
        self._retired = False
        self._superseded_before = self._superseded_now = 0
        self.bundle = config.device.bundle
        self.ready: Ready | None = None
        self.ended = False
        self.unfit: SplitwardError | None = None
        self.restarts = 0
        self.runtime_us: deque[int] = deque(maxlen=256)
        self.other_us: deque[int] = deque(maxlen=256)

    @property
    def superseded(self) -> int:
        """Live frames that gave way to newer ones since the agent's start."""
        return self._superseded_before + self._superseded_now

    @property
    def pid(self) -> int | None:
        """Process id of the present run."""
        return None if self._launched is None else self._launched.process.pid

    def start(self, config: EdgeConfig, bundle: str, captured: int) -> None:
        """Let a run begin with `bundle`; `captured` frames were taken by the agent before it."""
        if self._launched is None:
            self._launched = launch()
            self._run += 1
        self._config = config
        pipe, permits = self._launched.pipe, threading.Semaphore(PERMITS)
        self.bundle, self.ready, self.ended, self.unfit = bundle, None, False, None
        self._permits, self._held = permits, 0
        self._received, self._safe_before, self._told = 0, captured, (-1, -1)
        self._settled, self._start_at_s, self._retired = 0, None, False
        self._heard_s = time.monotonic() + READY_S - SILENCE_S
        poison = tuple(name for name, strikes in self._strikes().items() if strikes >= STRIKES)
        threading.Thread(
            target=self._read, args=(pipe, permits, self._run), name="releaser", daemon=True
        ).start()
        # What sees pixels need not know how to reach anybody.
        told = msgspec.structs.replace(config, broker=BrokerConfig(), cloud=CloudConfig())
        pipe.send(Start(told, bundle, self._known(), poison))

    def follow(self, message: FromReleaser, now_s: float) -> Released | None:
        """Note what the present run says; a frame's message is handed back."""
        self._heard_s = max(self._heard_s, now_s)
        if isinstance(message, (Released, Lost)):
            self._settled = max(self._settled, message.opening)
        if isinstance(message, Released):
            self._held += 1
            self._received += 1
            self.runtime_us.append(message.runtime_us)
            self.other_us.append(message.other_us)
            return message
        if isinstance(message, Lost):
            self._on_loss(message.reason, message.digest, message.name)
        elif isinstance(message, Beat):
            self._superseded_now = message.superseded
        elif isinstance(message, Logged):
            logging.getLogger(message.logger).log(message.level, message.message, extra=message.fields)
        elif isinstance(message, Ready):
            self.ready = message
        elif isinstance(message, Ended):
            self.ended = True
        elif isinstance(message, Unfit):
            self.unfit = _error_of(message)
        return None

    def is_current(self, event: FromRun) -> bool:
        """Whether an event is the present run's."""
        return event.run == self._run

    def turn(self, now_s: float, safe: int, room: int, stalled: bool) -> bool:
        """Tell the run how far its frames are, and look whether it lives; whether it is time to `start` another.

        Raises
        ------
        ReleaserError
            It died more often than the budget allows.
        """
        if self._launched is None:
            return self._start_at_s is not None and now_s >= self._start_at_s
        if stalled:
            self._heard_s = max(self._heard_s, now_s)  # it may be waiting for us
        elif self._held:
            self._permits.release(self._held)
            self._held = 0
        progress = (max(0, min(safe - self._safe_before, self._received)), self._received + room)
        if progress != self._told:
            self._told = progress
            self._launched.pipe.send(Progress(*progress))
        if now_s - self._heard_s > SILENCE_S:
            log.error("the releaser is silent; it is killed")
            self._launched.process.kill()
        return False

    def bury(self, now_s: float) -> None:
        """Take note of the end of the present run, and of why.

        Raises
        ------
        ReleaserError
            It died more often than the budget allows.
        """
        opened, code = self._cause(), self._reap()
        self._superseded_before, self._superseded_now = self.superseded, 0
        if self._retired:
            self._start_at_s = now_s
            return
        if self.ended or self.unfit is not None:
            return
        reason = "hung" if code in (-signal.SIGALRM, -signal.SIGKILL) else "crashed"
        log.error("the releaser %s (exit %s)", reason, code, extra=_frame_field(opened))
        if opened is not None:
            if opened.can_wait:
                self._on_strike(opened.name)
            else:  # it will not come again
                self._on_loss(reason, None, opened.name)
        self._deaths.append(now_s)
        while now_s - self._deaths[0] > self._config.runtime.restart_window_s:
            self._deaths.popleft()
        if len(self._deaths) > self._config.runtime.restarts:
            raise ReleaserError(
                f"the releaser ended {len(self._deaths)} times within "
                f"{self._config.runtime.restart_window_s:.0f} s, the last time as {reason}. The log says over "
                "which frames; `edge check` tries the runtime."
            )
        self.restarts += 1
        self._start_at_s = now_s + min(PAUSE_S * 2.0 ** (len(self._deaths) - 1), 30.0)

    def retire(self) -> None:
        """Let the run end and another be due; what it has released still comes."""
        now_s = time.monotonic()
        self._retired = True
        if self._launched is None:
            self._start_at_s = now_s
        else:
            self._launched.pipe.finish()
            self._heard_s = now_s - SILENCE_S + STOP_S
            self._permits.release(PERMITS)

    @property
    def is_running(self) -> bool:
        """Whether there is a run whose end was not seen yet."""
        return self._launched is not None

    def stop(self) -> None:
        """End the run now."""
        if self._launched is not None:
            self._reap()

    def _cause(self) -> Opened | None:
        """What the run was at when it ended."""
        opened = None if self._launched is None else self._launched.page.read()
        return None if opened is None or opened.number <= self._settled else opened

    def _reap(self) -> int:
        launched, self._launched = self._launched, None
        assert launched is not None  # noqa: S101  # a run ends once
        launched.pipe.close()
        launched.page.close()
        process = launched.process
        if not _ends_within(process, STOP_S):
            process.kill()
        return process.wait()

    def _read(self, pipe: Pipe, permits: threading.Semaphore, run: int) -> None:
        while True:
            message = pipe.receive()
            self._post(FromRun(run, message))
            if message is None:
                return
            if isinstance(message, Released):
                permits.acquire()


def _ends_within(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    """Wait for the end of a process without looking again and again, as `Popen.wait` with a limit would."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:  # it has ended, or the kernel is older than 5.3
        return process.poll() is not None
    try:
        return bool(select.select([handle], [], [], limit_s)[0])
    finally:
        os.close(handle)


def _error_of(unfit: Unfit) -> SplitwardError:
    if unfit.kind == "BundleError":
        return BundleError(unfit.reason, unfit.message)
    return _ERRORS.get(unfit.kind, EdgeError)(unfit.message)


def _frame_field(opened: Opened | None) -> dict[str, str]:
    return {} if opened is None else {"frame": opened.name}
