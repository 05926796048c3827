"""Orders carried out: a bundle installed, tried and kept or rolled back; settings, diagnostics, restart."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge.config import EdgeConfig
from edge.errors import UpdateError
from edge.models import ModelStore
from edge.orders import OrderBook, State, chooses_model
from edge.settings import change_remotely
from splitward.errors import ConfigError, SplitwardError
from splitward.wire.orders import Announcement, Command, Order

BAD_FRAMES = 5
"""Frames that fail before a bundle on trial is rolled back, where no frame succeeds."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """A job of its own thread has ended: the order's id, a reason where it failed, and a message."""

    order: str
    model: str
    reason: str
    message: str
    restart: bool = False


class Updates:
    """Carries out orders. One thread uses it; jobs run beside it and `post` a `Done`.

    Parameters
    ----------
    config : EdgeConfig
    models : ModelStore
    book : OrderBook
    post : callable
    change_model : callable
        Ends the releaser, to be started with what `models` says then.

    Attributes
    ----------
    restart : bool
        Whether the agent is to end and begin anew.
    """

    def __init__(
        self,
        config: EdgeConfig,
        models: ModelStore,
        book: OrderBook,
        post: Callable[[Done], None],
        change_model: Callable[[], None],
    ) -> None:
        self._config = config
        self._models = models
        self._book = book
        self._post = post
        self._change_model = change_model
        self._installing = ""
        self._installers: list[subprocess.Popen[bytes]] = []
        self._trial_ends_s: float | None = None
        self._good = self._bad = 0
        self.restart = False

    def resume(self) -> None:
        """Take up what a power cut interrupted. Call once, before anything else."""
        trial = self._models.active.trial
        for order in self._book.unfinished:
            if isinstance(order, Command):
                # It was being carried out; what it does is done or not, and a restart has just happened.
                if order.name == "restart":
                    self._book.settle(order.id, "done")
                else:
                    self._book.settle(order.id, "failed", "interrupted", "the agent ended in the middle of it.")
            elif trial is not None and trial.order == order.id:
                log.info("the bundle of order %s goes on being tried", order.id)
            elif self._models.active.model == order.model:
                self._book.settle(order.id, "done")
            else:
                self._install(order)

    def take(self, order: Order) -> None:
        """Begin to carry out an order."""
        if chooses_model(order):
            self.stop()
        if isinstance(order, Announcement):
            if order.model == self._models.active.model and self._models.active.trial is None:
                self._book.settle(order.id, "done", message="it runs already.")
            else:
                self._install(order)
        elif order.name == "configure":
            self._configure(order)
        elif order.name == "rollback":
            self._roll_back_as_ordered(order)
        elif order.name == "restart":
            self.restart = True  # `resume` settles it
        else:
            self._start_job(order.id, lambda: _collect(self._config))

    def stop(self) -> None:
        """End an installation that is under way; `resume` goes on with it, if its order still stands."""
        self._installing = ""
        for installer in self._installers:
            installer.kill()

    def follow(self, done: Done) -> None:
        """Note that a job has ended."""
        if not done.model:
            failed: State = "refused" if done.reason == "bad_setting" else "failed"
            self._book.settle(done.order, failed if done.reason else "done", done.reason, done.message)
            self.restart |= done.restart
            return
        if done.order != self._installing:
            return  # it was stopped
        self._installing = ""
        if done.reason:
            transient = done.reason in ("unreachable", "no_space", "timeout") or done.reason.startswith("http_")
            self._book.settle(done.order, "failed" if transient else "refused", done.reason, done.message)
            return
        try:
            self._models.activate(done.model, done.order)
        except OSError as error:
            self._book.settle(done.order, "failed", "no_space", f"{error.strerror}.")
            return
        self._change_model()

    def note_start(self, now_s: float) -> None:
        """Count a start of the releaser under trial; a bundle that is started too often is rolled back."""
        try:
            trial = self._models.note_start()
        except OSError as error:
            log.error("the trial's starts cannot be counted: %s", error.strerror)
            return
        if trial is None:
            self._trial_ends_s = None
        elif trial.starts > self._config.update.trial_starts:
            self.fail_trial("too_many_starts", f"it was started {trial.starts - 1} times within its trial.")
        else:
            self._trial_ends_s = now_s + self._config.update.trial_s
            self._good = self._bad = 0

    def judge(self, good: bool) -> None:
        """Count a frame of the running bundle that was answered, or refused, or could not be released."""
        self._good += good
        self._bad += not good

    def fail_trial(self, reason: str, message: str) -> bool:
        """Roll the bundle back that is on trial; False when none is."""
        trial = self._models.active.trial
        if trial is None:
            return False
        try:
            self._models.roll_back()
        except (UpdateError, OSError) as error:
            log.error("the roll back failed: %s", error)
            return False
        self._trial_ends_s = None
        self._book.settle(trial.order, "rolled_back", reason, message)
        return True

    def turn(self, now_s: float, healthy: bool) -> None:
        """End the trial: badly when frames fail and none is answered, well when its time is over."""
        if self._trial_ends_s is None:
            return
        if self._bad >= BAD_FRAMES and not self._good:
            if self.fail_trial("frames_fail", f"{self._bad} frames failed and none was answered."):
                self._change_model()
            return
        if now_s >= self._trial_ends_s and healthy:
            trial = self._models.active.trial
            self._trial_ends_s = None
            try:
                self._models.accept()
            except OSError as error:
                log.error("the trial's end cannot be noted: %s", error.strerror)
            if trial is not None:
                self._book.settle(trial.order, "done")

    def _install(self, order: Announcement) -> None:
        from edge.installation import InstallRequest, install_apart

        self._installing = order.id
        request = InstallRequest(
            config=self._config,
            url=order.url,
            sha256=order.sha256,
            size=order.size,
            model=order.model,
            allow_older=order.allow_older,
        )

        def started(installer: subprocess.Popen[bytes]) -> None:
            self._installers.append(installer)
            if self._installing != order.id:  # stopped before it began
                installer.kill()

        def run() -> Done:
            report = install_apart(request, started)
            return Done(order.id, order.model, report.reason, report.message)

        self._start_job(order.id, run, order.model)

    def _configure(self, order: Command) -> None:
        """Change settings, none of which can keep the device from starting."""

        def run() -> Done:
            try:
                change_remotely(self._config, order.arguments)
            except ConfigError as error:
                return Done(order.id, "", "bad_setting", str(error))
            return Done(order.id, "", "", "", restart=True)

        self._start_job(order.id, run)

    def _roll_back_as_ordered(self, order: Command) -> None:
        try:
            self._models.roll_back()
        except UpdateError as error:
            self._book.settle(order.id, "failed", error.reason, str(error))
            return
        except OSError as error:
            self._book.settle(order.id, "failed", "no_space", f"{error.strerror}.")
            return
        self._change_model()
        self._book.settle(order.id, "done")

    def _start_job(self, order: str, job: Callable[[], Done | str], model: str = "") -> None:
        def run() -> None:
            try:
                result = job()
                self._post(result if isinstance(result, Done) else Done(order, "", "", result))
            except (SplitwardError, OSError, ValueError) as error:
                self._post(Done(order, model, "failed", str(error)))

        threading.Thread(target=run, name="job", daemon=True).start()


def _collect(config: EdgeConfig) -> str:
    from edge.diagnostics import collect_apart

    return f"written to {collect_apart(config, Path(config.device.state_dir) / 'diagnostics')} on the device."
