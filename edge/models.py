"""The bundles that are installed on this device, which of them runs, and which ran before.

They lie in `state_dir/models`, one file each, named by model id. `active.json` says which one runs; it is replaced
atomically, so that a power cut at any moment leaves either the old bundle or the new one. Without it the bundle of
the configuration runs; where it cannot be read, or names a bundle that is gone, none does, until a person has looked.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from edge.config import EdgeConfig
from edge.errors import UpdateError
from splitward.disk import make_folder, move_whole, write_whole
from splitward.errors import ConfigError


class Trial(Struct, frozen=True):
    """A bundle that has not proved itself yet: the order that brought it, and how often it was started."""

    order: str
    starts: int


class Active(Struct, frozen=True):
    """`active.json`. An empty id stands for the configuration's bundle."""

    model: str = ""
    previous: str = ""
    trial: Trial | None = None


class InstalledModel(Struct, frozen=True):
    """One line of `edge model list`."""

    model: str
    path: str
    state: str


class ModelStore:
    """The installed bundles of one device.

    Raises
    ------
    ConfigError
        `active.json` is there and cannot be read, or what it names is gone and was not on trial.
    """

    def __init__(self, config: EdgeConfig) -> None:
        self._folder = Path(config.device.state_dir) / "models"
        self._configured = config.device.bundle
        self._keep = config.update.keep
        self.active = self._load()

    @property
    def staging(self) -> Path:
        """Folder for what is being fetched."""
        return self._folder / "staging"

    def path(self, model: str | None = None) -> Path:
        """File of a model; of the one that runs by default."""
        model = self.active.model if model is None else model
        return self._folder / f"{model}.bundle" if model else Path(self._configured)

    def take(self, file: Path, model: str) -> None:
        """Move a verified bundle's file in."""
        make_folder(self._folder, 0o700)
        move_whole(file, self.path(model))

    def activate(self, model: str, order: str = "") -> None:
        """Let `model` run, on trial, until `accept` or `roll_back`. Only what has proved itself is gone back to."""
        active = self.active
        proven = active.trial is None and active.model != model
        previous = active.model if proven else active.previous
        self._save(Active(model, "" if previous == model else previous, Trial(order, 0)))

    def note_start(self) -> Trial | None:
        """Count a start under trial, before the bundle is touched; the trial, if there is one."""
        trial = self.active.trial
        if trial is not None:
            trial = Trial(trial.order, trial.starts + 1)
            self._save(msgspec.structs.replace(self.active, trial=trial))
        return trial

    def accept(self) -> None:
        """End the trial well, and remove the oldest bundles."""
        self._save(msgspec.structs.replace(self.active, trial=None))
        needed = {self.active.model, self.active.previous}
        others = [path for path in self._folder.glob("*.bundle") if path.stem not in needed]
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in others[max(0, self._keep - 1) :]:
            path.unlink(missing_ok=True)

    def roll_back(self) -> str:
        """Let the bundle run that ran before; its model id, empty for the configuration's bundle.

        Raises
        ------
        UpdateError
            `no_previous`: there is none.
        """
        active = self.active
        if active.model == active.previous:
            raise UpdateError("no_previous", "no bundle was installed, so there is none to go back to.")
        if not self.path(active.previous).exists():
            raise UpdateError("no_previous", f"{self.path(active.previous)}: the bundle before is gone.")
        # Back and forth: after an ordered roll back the newer one is the one before. A failed one is forgotten.
        previous = "" if active.trial is not None else active.model
        self._save(Active(active.previous, previous))
        return active.previous

    def installed(self) -> list[InstalledModel]:
        """Every bundle on the device; the one that runs, and the one before, are marked."""
        active = self.active
        states = {active.previous: "previous", active.model: "trial" if active.trial else "active"}
        names = sorted({"", *(path.stem for path in self._folder.glob("*.bundle"))})
        return [
            InstalledModel(name or "configured", str(self.path(name)), states.get(name, "installed"))
            for name in names
        ]

    def _load(self) -> Active:
        path = self._folder / "active.json"
        try:
            active = msgspec.json.decode(path.read_bytes(), type=Active)
        except FileNotFoundError:
            return Active()
        except (OSError, msgspec.DecodeError) as error:
            # The configured bundle may be older, and release more: nobody has ordered to go back to it.
            raise ConfigError(
                f"{path}: cannot be read ({error}), and it alone says which bundle runs. Let the agent's user read it, "
                "or remove it to run the configured bundle."
            ) from error
        file = self.path(active.model)
        # One on trial may be gone: it cannot be read then, and is rolled back as such.
        if active.model and active.trial is None and not file.exists():
            raise ConfigError(
                f"{file}: is gone, and {path} says that it runs. Put the file back, "
                f"or remove {path} to run the configured bundle, which may be older."
            )
        return active

    def _save(self, active: Active) -> None:
        write_whole(self._folder / "active.json", msgspec.json.encode(active))
        self.active = active
