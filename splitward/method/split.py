"""The whole network in one process, as it is trained, audited and compared with what was deployed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.method.compared import Adversary, LabelServer
from splitward.method.halves import CONTROLS, ClientHalf, Kind, NetworkSettings, ServerHalf, StreamOutputs
from splitward.method.saliency import LocalClassifier, MapSettings, Saliency
from splitward.method.sealing import FINEST, Seal, Spread


@dataclass(frozen=True)
class DefenceSettings:
    """A defence with its settings (docs/method.md, section 4).

    Attributes
    ----------
    profile : str
        Its key in `DEFENCES` or `COMPARED`.
    map : MapSettings or None
        The intentional attack; None for plain split learning.
    values, bottleneck : int, str
        As in `NetworkSettings`.
    sigma : float
        Standard deviation of the noise on the released tensor.
    entropy_weight, correlation_weight, adversary_weight : float
        Of the conditional-entropy term, of NoPeek's distance correlation and of ResSFL's adversary.
    spread : "class" or "frame"
        Whose spread the entropy term takes: the variance of a class, after CEM, or each frame's distance from its mean.
    captures : int
        Of one scene, over whose noise the attacker that the entropy term reckons with averages.
    steps : int
        Of the grid to which a seal rounds before the noise, from 0 to the bound (`splitward.wire.law`).
    training_sigma : float or None
        Standard deviation of the noise in training; None: `sigma`. Where it is more, it holds the classes apart.
    """

    profile: str
    map: MapSettings | None = None
    values: int = 0
    bottleneck: Kind = "sealed"
    sigma: float = 0.0
    entropy_weight: float = 0.0
    correlation_weight: float = 0.0
    adversary_weight: float = 0.0
    spread: Spread = "class"
    captures: int = 1
    steps: int = FINEST
    training_sigma: float | None = None

    @property
    def sealed(self) -> bool:
        """Whether few bounded values are released, which a seal rounds and noises."""
        return self.values > 0 and self.bottleneck == "sealed"

    def noise_of(self, *, training: bool) -> float:
        """Standard deviation of the noise, in training or as a device releases."""
        return self.sigma if self.training_sigma is None or not training else self.training_sigma


DEFENCES: dict[str, DefenceSettings] = {
    "none": DefenceSettings("none"),
    "psgl": DefenceSettings("psgl", MapSettings()),
    "sealed": DefenceSettings("sealed", MapSettings(), values=16, sigma=0.3, entropy_weight=0.1),
}
"""The profiles that ship: plain split learning; the paper; the paper with a bounded, noised, quantised bottleneck."""

COMPARED: dict[str, DefenceSettings] = {
    "gaussian": DefenceSettings("gaussian", sigma=1.0),
    "nopeek": DefenceSettings("nopeek", correlation_weight=1.0),
    "ressfl": DefenceSettings("ressfl", values=4, bottleneck="channels", adversary_weight=0.3),
    "cem": DefenceSettings("cem", values=4, bottleneck="channels", sigma=0.5, entropy_weight=0.3),
    "projection": DefenceSettings("projection", values=64, bottleneck="projection"),
    "psgl-published": DefenceSettings("psgl-published", MapSettings(outputs="probabilities", eps=0.0)),
    "label": DefenceSettings("label", values=1, bottleneck="label"),
    "scores": DefenceSettings("scores", values=1, bottleneck="scores"),
}
"""What `sealed` is compared with, in one harness; `label` and `scores` are the controls, which send the label or the
scores of a classifier of their own."""
SCORE_BOUND = 16.0
"""Of the logits that `scores` sends, a byte each (our choice)."""


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
        self.server: nn.Module = LabelServer() if network.bottleneck in CONTROLS else ServerHalf(network)
        self.saliency = (
            Saliency(LocalClassifier(network.channels, network.side, network.classes), defence.map)
            if defence.map is not None
            else None
        )
        self.seal = (
            Seal(defence.sigma, settings.bound, settings.scale, defence.steps, defence.training_sigma)
            if defence.sealed
            else None
        )
        self.adversary = Adversary(network, defence.adversary_weight) if defence.adversary_weight else None

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
        if self.seal is not None:
            released: Tensor = self.seal(activation, noise)
            return released
        if self.settings.network.bottleneck == "label" and not self.training:
            return F.one_hot(activation.argmax(1), activation.shape[1]).to(activation.dtype)
        if self.settings.network.bottleneck == "scores" and not self.training:
            return (activation / self.settings.scale).round().clamp(-127, 127) * self.settings.scale
        if sigma := self.settings.defence.noise_of(training=self.training):
            return activation + sigma * (torch.randn_like(activation) if noise is None else noise)
        return activation

    def forward(self, frames: Tensor, noise: Tensor | None = None) -> Pass:
        """All of it, from frames [B, C, H, W] in 0..1."""
        activation = self.client(self.attack(frames))
        # In C order, as on the wire: in another layout the server half adds up to other last bits.
        released = self.release(activation, noise).contiguous()
        local = self.saliency.classifier(frames) if self.saliency is not None and self.training else None
        return Pass(activation, released, self.server(released), local)
