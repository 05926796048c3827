"""A small case, and attacks that stand in for the real ones at their interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from splitward.audit.attack import Case, Knowledge, ThreatModel
from splitward.audit.floors import class_mean_image
from splitward.data import Dataset, phantom
from splitward.training.loop import train
from splitward.training.settings import RunSettings, split_settings

SIDE = 28


@dataclass(frozen=True)
class Fake:
    """Reconstructs grey with a little noise of its seed; `calls` counts how often."""

    calls: ClassVar[list[int]]
    name: str = "fake"
    knows: tuple[Knowledge, ...] = ("released tensor", "auxiliary images")
    phase: str = "inference"
    limit: int = 1000
    error: str = ""
    grey: float = 0.5

    @property
    def card(self) -> ThreatModel:
        return ThreatModel(self.name, f"a {self.name}", self.phase, self.knows, "It pretends.", "nowhere")

    def reconstruct(self, case: Case, seed: int) -> Tensor:
        self.calls.append(seed)
        if self.error == "interrupt":
            raise KeyboardInterrupt
        if self.error:
            raise RuntimeError(self.error)
        count = min(self.limit, len(case.labels))
        noise = torch.rand(count, *case.frame_shape, generator=torch.Generator().manual_seed(seed))
        return (self.grey + 0.1 * (noise - 0.5)).clamp(0, 1)


@pytest.fixture
def fake():
    """Makes a fake attack."""

    def make(calls: list[int] | None = None, **fields: object) -> Fake:
        kind = type("Counted", (Fake,), {"calls": [] if calls is None else calls})
        return kind(**fields)

    return make


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands beside the attacks takes seconds at its full budget."""
    monkeypatch.setattr("splitward.audit.inference._STEPS", 3)
    monkeypatch.setattr("splitward.audit.measure.class_template", class_mean_image)


@pytest.fixture(scope="package")
def phantoms() -> Dataset:
    """80 phantoms of two classes, two to a patient."""
    return phantom.load("mass", SIDE, seed=0, count=80)


@pytest.fixture(scope="package")
def run_folder(phantoms: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed run of two steps on them."""
    folder = tmp_path_factory.mktemp("run") / "sealed"
    settings = RunSettings("phantom", None, SIDE, split_settings(phantoms, "sealed"), epochs=1, batch=28)
    train(phantoms, settings, folder, progress=False)
    return folder


@pytest.fixture
def small_case() -> tuple[Case, Tensor]:
    """Six targets of two classes, and a release that is the frame itself."""
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(6, 1, SIDE, SIDE, generator=generator)
    auxiliary = torch.rand(8, 1, SIDE, SIDE, generator=generator)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    case = Case(
        released=originals,
        captures=torch.stack([originals, originals]),
        labels=labels,
        auxiliary=auxiliary,
        auxiliary_labels=torch.tensor([0, 1] * 4),
        classes=2,
        release=lambda frames, noise: frames,
        network=None,
    )
    return case, originals
