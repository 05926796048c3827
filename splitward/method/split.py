"""The whole network in one process, as it is trained, audited and compared with what was deployed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from splitward.method.halves import ClientHalf, NetworkSettings, ServerHalf, StreamOutputs
from splitward.method.saliency import LocalClassifier, MapSettings, Saliency
from splitward.method.sealing import Seal

Profile = Literal["none", "psgl", "sealed"]


@dataclass(frozen=True)
class DefenceSettings:
    """A defence profile with its settings (method.md, section 4).

    Attributes
    ----------
    profile : "none", "psgl" or "sealed"
        Plain split learning; the paper; the paper with a bounded, noised and quantised bottleneck.
    map : MapSettings or None
        The intentional attack; None for `none`.
    values, sigma, entropy_weight : int, float, float
        Bottleneck, noise and entropy term of `sealed`; 0 otherwise.
    """

    profile: Profile
    map: MapSettings | None = None
    values: int = 0
    sigma: float = 0.0
    entropy_weight: float = 0.0


DEFENCES: dict[str, DefenceSettings] = {
    "none": DefenceSettings("none"),
    "psgl": DefenceSettings("psgl", MapSettings()),
    "sealed": DefenceSettings("sealed", MapSettings(), values=16, sigma=0.3, entropy_weight=0.3),
}


@dataclass(frozen=True)
class SplitSettings:
    """Network and defence; `bound` and `scale` are those of the release (`splitward.wire.release`)."""

    network: NetworkSettings
    defence: DefenceSettings
    bound: float = 1.0
    scale: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> SplitSettings:
        """Inverse of `to_dict`; `TypeError` or `KeyError` when the values do not fit."""
        defence = dict(values["defence"])
        if defence["map"] is not None:
            defence["map"] = MapSettings(**defence["map"])
        return SplitSettings(
            NetworkSettings(**values["network"]), DefenceSettings(**defence), values["bound"], values["scale"]
        )


@dataclass
class Pass:
    """One forward pass: the client half's output, what was released, and what the server made of it."""

    activation: Tensor
    released: Tensor
    outputs: StreamOutputs
    local_logits: Tensor | None = field(default=None)


class SplitNetwork(nn.Module):
    """Local classifier, client half, seal and server half."""

    def __init__(self, settings: SplitSettings) -> None:
        super().__init__()
        self.settings = settings
        network, defence = settings.network, settings.defence
        self.client = ClientHalf(network)
        self.server = ServerHalf(network)
        self.saliency = (
            Saliency(LocalClassifier(network.channels, network.side, network.classes), defence.map)
            if defence.map is not None
            else None
        )
        self.seal = Seal(defence.sigma, settings.bound, settings.scale) if defence.values else None

    def attack(self, frames: Tensor) -> Tensor:
        """What enters the client half: [B, 2C, H, W] attacked frame and map, or the frame itself.

        The map is a constant to training: no gradient flows through it.
        """
        if self.saliency is None:
            return frames
        with torch.no_grad():
            return self.saliency(frames)

    def release(self, activation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Released tensor in real units; fresh noise unless standard normal `noise` is given."""
        return activation if self.seal is None else self.seal(activation, noise)

    def forward(self, frames: Tensor, noise: Tensor | None = None) -> Pass:
        """All of it, from frames [B, C, H, W] in 0..1."""
        activation = self.client(self.attack(frames))
        released = self.release(activation, noise)
        local = self.saliency.classifier(frames) if self.saliency is not None and self.training else None
        return Pass(activation, released, self.server(released), local)
