"""The two halves of the network (sections IV-B to IV-E), small and residual.

Client half: frame (and map) -> activation. Server half: activation -> attacked, recovered and fused stream ->
three classifiers -> decision. Only the fused stream's gradient reaches the client half.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.method.downsample import FACTOR, fold_stem, space_to_depth, with_map
from splitward.method.fusion import INITIAL_WEIGHTS, ConvolutionSum, decision_fusion
from splitward.method.recovery import MU, Recovery
from splitward.method.sealing import Bottleneck

Size = Literal["small", "residual"]
Kind = Literal["sealed", "projection", "channels", "label", "scores"]
CONTROLS: tuple[Kind, ...] = ("label", "scores")
"""Bottlenecks of no defence: a device that classifies by itself, and sends its label or its scores."""


@dataclass(frozen=True)
class NetworkSettings:
    """Everything from which both halves are built; stored beside the weights.

    Attributes
    ----------
    size : "small" or "residual"
        The paper's small network (three convolutions and one dense layer a stream, cut after the second
        convolution) for 28x28, or a residual one for 64 to 224 pixels whose server half is much heavier.
    channels, side, classes : int
        Frames are [channels, side, side]; `side` is a multiple of 4.
    mapped : bool
        Whether the client half takes the map.
    values : int
        Values of the bottleneck (channels of it, for "channels"); 0 releases the whole activation.
    bottleneck : "sealed", "projection", "channels", "label" or "scores"
        What makes these values. All but "sealed" belong to compared defences (`splitward.method.compared`).
    recovery : "svt" or "low_rank_sparse"
    mu : float
        Relaxation of the recovery.
    """

    size: Size
    channels: int
    side: int
    classes: int
    mapped: bool
    values: int = 0
    bottleneck: Kind = "sealed"
    recovery: str = "low_rank_sparse"
    mu: float = MU

    def __post_init__(self) -> None:
        if self.side % 4 or self.side < 8:
            raise ValueError(f"frames of {self.side} pixels: the side must be a multiple of 4, at least 8.")

    @property
    def activation_shape(self) -> tuple[int, int, int]:
        """Shape of the activation at the cut, before any bottleneck: [K, h, w]."""
        return (
            (16, self.side // 2, self.side // 2)
            if self.size == "small"
            else (32, self.side // 4, self.side // 4)
        )

    @property
    def flat(self) -> bool:
        """Whether a vector is released, without a place in the frame."""
        return self.values > 0 and self.bottleneck != "channels"

    @property
    def release_shape(self) -> tuple[int, ...]:
        """Shape of what is released."""
        if not self.values:
            return self.activation_shape
        return (self.values, *self.activation_shape[1:]) if self.bottleneck == "channels" else (self.values,)

    @property
    def server_shape(self) -> tuple[int, int, int]:
        """Shape on which the server half works: the activation, or what it expands few values to."""
        if not self.flat:
            return self.activation_shape
        return (8, 7, 7) if self.size == "small" else (16, self.side // 8, self.side // 8)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, inputs, h, w] to [B, outputs, h/stride, w/stride]."""
        return F.relu(self.body(hidden) + self.shortcut(hidden))


class ClientHalf(nn.Module):
    """The half on the device: [B, C, H, W], or [B, 2C, H, W] with the map, to [B, *release_shape].

    With a bottleneck its output is bounded to -1..1; noise and quantisation follow outside.
    """

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        self.folded: nn.Conv2d | None = None
        cells = FACTOR * FACTOR * settings.channels + (1 if settings.mapped else 0)
        self.stem = nn.Conv2d(cells, 16, 3, padding=1)
        self.body: nn.Module = (
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
            if settings.size == "small"
            else ResidualBlock(16, 32, stride=2)
        )
        self.bottleneck = build_bottleneck(settings) if settings.values else None

    def forward(self, frame: Tensor) -> Tensor:
        """Activation of the (attacked) frame."""
        hidden = self.body(F.relu(self._stem(frame)))
        return self.bottleneck(hidden) if self.bottleneck is not None else hidden

    def _stem(self, frame: Tensor) -> Tensor:
        if self.folded is not None:
            return self.folded(frame)
        if not self.settings.mapped:
            return self.stem(space_to_depth(frame))
        attacked, saliency_map = frame.chunk(2, dim=1)
        return self.stem(with_map(attacked, saliency_map))

    def fold(self) -> None:
        """Fold space to depth, map and stem into one strided convolution, for export."""
        self.folded = fold_stem(self.stem, self.settings.channels, self.settings.mapped)


def build_bottleneck(settings: NetworkSettings) -> nn.Module:
    """The client half's last step, by `settings.bottleneck`."""
    if settings.bottleneck == "channels":
        return nn.Conv2d(settings.activation_shape[0], settings.values, 3, padding=1)
    made = Bottleneck(settings.activation_shape, settings.values, bounded=settings.bottleneck == "sealed")
    if settings.bottleneck == "projection":
        nn.init.orthogonal_(made.dense.weight).requires_grad_(False)
        nn.init.zeros_(made.dense.bias).requires_grad_(False)
    return made


class StreamOutputs(NamedTuple):
    """Logits of the three streams and the decision's scores, which sum to 1: [B, classes] each."""

    attacked: Tensor
    recovered: Tensor
    fused: Tensor
    decision: Tensor


class ServerHalf(nn.Module):
    """The half in the cloud: [B, *release_shape] to `StreamOutputs`."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings
        channels, height, width = settings.server_shape
        self.expand: nn.Module | None = None
        if settings.flat:
            self.expand = nn.Linear(settings.values, channels * height * width)
        elif settings.values:
            self.expand = nn.Conv2d(settings.values, channels, 3, padding=1)
        self.recovery = Recovery(settings.recovery, settings.mu)
        self.fusion = ConvolutionSum(channels)
        self.attacked = _stream(settings)
        self.recovered = _stream(settings)
        self.fused = _stream(settings)
        self.register_buffer("weights", torch.tensor(_dealt(INITIAL_WEIGHTS)))

    def forward(self, released: Tensor) -> StreamOutputs:
        """All three streams and their decision.

        The attacked and the recovered stream read detached activations: in training, only the fused stream's
        gradient passes the cut (section IV).
        """
        return self.decide(*self.features(released))

    def features(self, released: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the last layer of each stream: attacked, recovered, fused, [B, F] each."""
        u = released
        if self.expand is not None:
            u = self.expand(released).view(-1, *self.settings.server_shape)
        v = self.recovery(u)
        streams = ((self.attacked, u.detach()), (self.recovered, v.detach()), (self.fused, self.fusion(u, v)))
        attacked, recovered, fused = (stream[:-1](entering) for stream, entering in streams)
        return attacked, recovered, fused

    def decide(self, attacked: Tensor, recovered: Tensor, fused: Tensor) -> StreamOutputs:
        """Logits and decision by the last layers, from `features`."""
        logits = (self.attacked[-1](attacked), self.recovered[-1](recovered), self.fused[-1](fused))
        scores = torch.stack([stream.softmax(1) for stream in logits], dim=1)
        return StreamOutputs(*logits, decision_fusion(scores, self.get_buffer("weights")))


def _dealt(weights: tuple[float, ...]) -> tuple[float, ...]:
    """The paper's weights are ordered recovered, fused, attacked; our streams attacked, recovered, fused."""
    recovered, fused, attacked = weights
    return (attacked, recovered, fused)


def _stream(settings: NetworkSettings) -> nn.Sequential:
    """One stream's classifier."""
    channels, height, _ = settings.server_shape
    if settings.size == "small":
        stride = 1 if settings.flat else 2
        side = -(-height // stride)
        return nn.Sequential(
            nn.Conv2d(channels, 64, 3, stride, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * side * side, settings.classes),
        )
    blocks: list[nn.Module] = []
    inputs = channels
    for outputs, stride in ((64, 1), (128, 2), (256, 2)):
        blocks += [ResidualBlock(inputs, outputs, stride), ResidualBlock(outputs, outputs)]
        inputs = outputs
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, settings.classes))


def build_server(network: dict[str, Any]) -> ServerHalf:
    """Server half from the fields of `NetworkSettings`; `ValueError` or `TypeError` when they do not fit."""
    return ServerHalf(NetworkSettings(**network))
