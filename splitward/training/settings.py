"""What a training run is: data, defence and schedule; `run.json` stores it, so that a run can be repeated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from splitward.data import Dataset
from splitward.errors import TrainingError
from splitward.method.halves import CONTROLS, NetworkSettings
from splitward.method.sealing import FINEST, Spread
from splitward.method.split import COMPARED, DEFENCES, SCORE_BOUND, DefenceSettings, SplitSettings
from splitward.wire.release import ReleaseLaw

SMALL_SIDE = 32
"""Frames up to this side get the paper's small network, larger ones the residual one."""
RESIDUAL_VALUES = 64
"""Bottleneck of `sealed` for the residual network, whose frames and tasks are larger."""
_SEAL = {
    "values": "values",
    "sigma": "sigma",
    "entropy_weight": "entropy_weight",
    "spread": "entropy_weight",
    "captures": "entropy_weight",
    "steps": "sealed",
    "training_sigma": "sigma",
}
"""What of a seal may be changed, and that without which there is none of it."""
MAX_VALUES = 65_536
MAX_WEIGHT = 100
"""Of a sigma and of a loss term."""
MAX_CAPTURES = 1_000
MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1
MAX_RATE = 1e30
"""More is no float32 after a step or two."""


@dataclass(frozen=True)
class RunSettings:
    """One training run.

    Attributes
    ----------
    data, task, size : str, str or None, int or None
        As `splitward.data.open_dataset` takes them.
    split : SplitSettings
    epochs, batch : int
    learning_rate, weight_decay : float
        Of AdamW under a one-cycle schedule.
    shift : int
        Training frames are moved by up to so many pixels at random.
    seed : int
    """

    data: str
    task: str | None
    size: int | None
    split: SplitSettings
    epochs: int
    batch: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    shift: int = 0
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __post_init__(self) -> None:
        side = self.split.network.side
        _refuse_outside(
            ("epochs", self.epochs, 1, MAX_COUNT),
            ("batch", self.batch, 2, MAX_COUNT),  # batch normalisation needs two
            ("shift", self.shift, 0, side),
            ("seed", self.seed, 0, MAX_SEED),
        )
        if not 0 < self.learning_rate <= MAX_RATE:
            raise TrainingError(f"learning rate {self.learning_rate}: give one over 0, to {MAX_RATE:g}.")
        _check_defence(self.split.defence)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> RunSettings:
        """Inverse of `to_dict`; `TypeError` or `KeyError` when the values do not fit."""
        return RunSettings(**{**values, "split": SplitSettings.from_dict(values["split"])})


def split_settings(
    dataset: Dataset,
    profile: str,
    *,
    seal: dict[str, Any] | None = None,
    saliency: dict[str, Any] | None = None,
) -> SplitSettings:
    """Network and defence for `dataset` under the profile.

    `seal` replaces fields of `DefenceSettings` (of defences with noise or a bottleneck), `saliency` those of
    `MapSettings` (of profiles with a map); a value of None leaves the profile's own.

    Raises
    ------
    TrainingError
        The profile is not known or does not have what is to be changed, or the frames do not fit a network.
    """
    _, channels, height, width = dataset.train.images.shape
    if height != width:
        raise TrainingError(f"{dataset.name}: frames of {height}x{width}; give --size to make them square.")
    try:
        return frame_settings(channels, height, len(dataset.classes), profile, seal=seal, saliency=saliency)
    except ValueError as error:
        raise TrainingError(f"{dataset.name}: {error} Give another --size.") from error


def frame_settings(
    channels: int,
    side: int,
    classes: int,
    profile: str,
    *,
    seal: dict[str, Any] | None = None,
    saliency: dict[str, Any] | None = None,
) -> SplitSettings:
    """As `split_settings`, for frames of [channels, side, side]; also `ValueError` where no network takes them."""
    known = DEFENCES | COMPARED
    if profile not in known:
        raise TrainingError(f"defence {profile!r} is not known; choose {', '.join(known)}.")
    small = side <= SMALL_SIDE
    defence = known[profile]
    if profile == "sealed" and not small:
        defence = replace(defence, values=RESIDUAL_VALUES)
    if defence.bottleneck in CONTROLS:
        defence = replace(defence, values=classes)
    defence = _changed(defence, seal or {}, saliency or {})
    network = NetworkSettings(
        size="small" if small else "residual",
        channels=channels,
        side=side,
        classes=classes,
        mapped=defence.map is not None,
        values=defence.values,
        bottleneck=defence.bottleneck,
        recovery="low_rank_sparse" if profile == "sealed" else "svt",
    )
    law = release_law(network, defence)
    return SplitSettings(network, defence, law.bound, law.scale)


def _check_defence(defence: DefenceSettings) -> None:
    """Refuse a defence that would not be what its profile promises, or that nothing can be trained under.

    Raises
    ------
    TrainingError
        A value is not in its range. Whatever has a bottleneck or noise by its profile keeps some: `sealed` without
        a value would release the whole activation, and without noise.
    """
    own = (DEFENCES | COMPARED).get(defence.profile, defence)
    _refuse_outside(("values", defence.values, 1 if own.values else 0, MAX_VALUES))
    for name in ("sigma", "entropy_weight", "correlation_weight", "adversary_weight"):
        _refuse_outside((name.replace("_", " "), getattr(defence, name), 0, MAX_WEIGHT))
    _refuse_outside(("training sigma", defence.noise_of(training=True), 0, MAX_WEIGHT))
    _refuse_outside(("captures", defence.captures, 1, MAX_CAPTURES), ("steps", defence.steps, 1, FINEST))
    if defence.spread not in get_args(Spread):
        raise TrainingError(f"spread {defence.spread}: give class or frame.")
    if own.sigma and not defence.sigma:
        raise TrainingError(f"sigma 0: {defence.profile} protects by noise. Give a sigma over 0.")
    if defence.map is not None:
        _refuse_outside(("eps", defence.map.eps, 0, 1), ("gamma", defence.map.gamma, 0, 1))


def _refuse_outside(*values: tuple[str, float, float, float]) -> None:
    """`TrainingError` for the first of these (name, value, least, most) that is outside, or no number."""
    for name, value, least, most in values:
        if not least <= value <= most:
            raise TrainingError(f"{name} {value}: give {least:g} to {most:,}.")


def _changed(defence: DefenceSettings, seal: dict[str, Any], saliency: dict[str, Any]) -> DefenceSettings:
    seal = {name: value for name, value in seal.items() if value is not None}
    saliency = {name: value for name, value in saliency.items() if value is not None}
    if lacking := [name for name, own in _SEAL.items() if name in seal and not getattr(defence, own)]:
        raise TrainingError(f"{defence.profile} has no seal: {', '.join(lacking)} cannot be given. Use sealed.")
    if "values" in seal and defence.bottleneck in CONTROLS:
        raise TrainingError(f"{defence.profile} releases a value for each class: values cannot be given.")
    if saliency and defence.map is None:
        raise TrainingError(f"{defence.profile} has no map: {', '.join(saliency)} cannot be given. Use psgl.")
    changed = replace(defence, **seal, map=replace(defence.map, **saliency) if defence.map else None)
    _check_defence(changed)
    return changed


def release_law(network: NetworkSettings, defence: DefenceSettings) -> ReleaseLaw:
    """The law under which a device releases what this network makes."""
    if defence.sealed:
        return ReleaseLaw(network.release_shape, "int8", 1.0, defence.sigma, defence.steps)
    if network.bottleneck == "scores":
        return ReleaseLaw(network.release_shape, "int8", SCORE_BOUND)
    return ReleaseLaw(network.release_shape, "float32")
