"""The client attacks its own frame: reversed, non-targeted JSMA (section IV-A).

With f_y the local classifier's output for class y: `alpha = df_y/dx`, `beta = sum over y' != y of df_y'/dx`,
and `Map = -alpha*beta` where `alpha < 0` and `beta > 0`, else 0 (Eq. 1). The attacked frame is `x + eps*Map`,
with the map scaled to 1 at its largest pixel: eps is its L-infinity budget (our choice; the paper gives none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Outputs = Literal["logits", "probabilities"]


@dataclass(frozen=True)
class MapSettings:
    """How the map is made.

    Attributes
    ----------
    outputs : "logits" or "probabilities"
        What f is. On probabilities `beta == -alpha`, the map is alpha squared and, without a budget, tiny
        (134 dB below the image): it is offered to reproduce public code. Logits are the default.
    eps : float
        L-infinity budget in units of the frame (0 black, 1 white).
    gamma : float
        Fraction of the pixels that keep their map, as JSMA does; 1 keeps all.
    """

    outputs: Outputs = "logits"
    eps: float = 0.1
    gamma: float = 1.0


class LocalClassifier(nn.Module):
    """The small classifier on the device whose gradient is the map.

    Stride-2 convolutions rather than max-pooling, whose ties would make the map depend on rounding. The
    backward pass is written out as a forward graph, so that it exports to ONNX and TFLite.

    Parameters
    ----------
    channels, size : int
        The frame is [channels, size, size].
    classes : int
    width : int
        Channels of the first convolution; each further one doubles them, up to 4 times `width`.
    """

    def __init__(self, channels: int, size: int, classes: int, width: int = 8) -> None:
        super().__init__()
        convolutions: list[nn.Conv2d] = []
        depth, side = channels, size
        while side > 8:
            grown = min(width * 2 ** len(convolutions), 4 * width)
            convolutions.append(nn.Conv2d(depth, grown, 3, stride=2, padding=1))
            depth, side = grown, (side + 1) // 2
        self.convolutions = nn.Sequential(*convolutions)
        self.flat_shape = (depth, side, side)
        self.dense = nn.Linear(depth * side * side, classes)

    def forward(self, frame: Tensor) -> Tensor:
        """Logits [B, classes] of frames [B, C, H, W]."""
        return self._forward(frame)[0]

    def _forward(self, frame: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden, activations = frame, []
        for convolution in self.convolutions:
            hidden = F.relu(convolution(hidden))
            activations.append(hidden)
        return self.dense(hidden.flatten(1)), activations

    def products(self, frame: Tensor, outputs: Outputs, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """alpha and beta, each [B, C, H, W], by vector-Jacobian products: never one for each class.

        Parameters
        ----------
        frame : Tensor, [B, C, H, W]
        outputs : "logits" or "probabilities"
            Logits need two products (`beta = d(sum of logits)/dx - alpha`); probabilities one
            (`beta = -alpha`, because probabilities sum to 1).
        y : Tensor, [B], optional
            Classes; the predicted ones by default, as on the device.
        """
        logits, activations = self._forward(frame)
        if y is None:
            # Not argmax and gather: this form exports everywhere.
            chosen = (logits >= logits.amax(1, keepdim=True)).to(logits.dtype)
        else:
            chosen = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        if outputs == "probabilities":
            probabilities = logits.softmax(1)
            own = (chosen * probabilities).sum(1, keepdim=True)
            alpha = self._pull_back(own * (chosen - probabilities), activations, frame)
            return alpha, -alpha
        alpha = self._pull_back(chosen, activations, frame)
        return alpha, self._pull_back(torch.ones_like(logits), activations, frame) - alpha

    def _pull_back(self, cotangent: Tensor, activations: list[Tensor], frame: Tensor) -> Tensor:
        """Vector-Jacobian product of the logits with `cotangent` [B, classes]: [B, C, H, W]."""
        gradient = (cotangent @ self.dense.weight).view(-1, *self.flat_shape)
        below = [frame, *activations][:-1]
        for convolution, output, source in zip(
            reversed(list(self.convolutions)), reversed(activations), reversed(below), strict=True
        ):
            gradient = gradient * (output > 0).to(gradient.dtype)
            gradient = _pull_back_stride_2(gradient, convolution.get_parameter("weight"))
            gradient = gradient[..., : source.shape[-2], : source.shape[-1]]
        return gradient


def _pull_back_stride_2(gradient: Tensor, weight: Tensor) -> Tensor:
    """Backward of a 3x3, stride 2, padding 1 convolution: [B, O, h, w] to [B, I, 2h, 2w].

    Pixel 2i is seen by tap 1 of output i; pixel 2i + 1 by tap 2 of output i and tap 0 of output i + 1. So each
    of the four pixels of a cell is a 2x2 convolution of the gradient, followed by depth to space. Unlike a
    transposed convolution with output padding, every converter takes this.
    """
    taps = F.pad(weight, (0, 1, 0, 1))  # index 3 is a tap of zeros
    seen = torch.tensor(((1, 3), (2, 0)), device=weight.device)
    kernel = taps[:, :, seen][..., seen]  # [O, I, row phase, row tap, column phase, column tap]
    kernel = kernel.permute(1, 2, 4, 0, 3, 5).flatten(0, 2)
    return F.pixel_shuffle(F.conv2d(F.pad(gradient, (0, 1, 0, 1)), kernel), 2)


def saliency_map(alpha: Tensor, beta: Tensor, gamma: float = 1.0) -> Tensor:
    """Eq. 1, scaled to 1 at each frame's largest pixel: [B, C, H, W] in 0..1; all 0 where Eq. 1 is."""
    raw = F.relu(-alpha) * F.relu(beta)
    flat = raw.flatten(1)
    # The floor only guards 0/0; it is far below any map of a trained classifier.
    unit = flat / flat.amax(1, keepdim=True).clamp_min(1e-30)
    if gamma < 1:
        kept = max(1, round(gamma * flat.shape[1]))
        unit = unit * (unit >= _threshold(unit, kept)).to(unit.dtype)
    return unit.view_as(raw)


def _threshold(unit: Tensor, kept: int) -> Tensor:
    """Where the `kept` largest of each row's values in 0..1 begin, to 20 bits: [B, 1].

    By bisection: LiteRT has no kernel for the sort that topk becomes.
    """
    threshold = torch.zeros_like(unit[:, :1])
    for bit in range(1, 21):
        higher = threshold + 2.0**-bit
        enough = (unit >= higher).to(unit.dtype).sum(1, keepdim=True) >= kept
        threshold = torch.where(enough, higher, threshold)
    return threshold


class Saliency(nn.Module):
    """Frame to attacked frame and map, the graph that the device runs: [B, C, H, W] to [B, 2C, H, W]."""

    def __init__(self, classifier: LocalClassifier, settings: MapSettings) -> None:
        super().__init__()
        self.classifier, self.settings = classifier, settings

    def forward(self, frame: Tensor, y: Tensor | None = None) -> Tensor:
        """`x_hat = x + eps*Map` in the first C channels, the map in the last C."""
        alpha, beta = self.classifier.products(frame, self.settings.outputs, y)
        unit_map = saliency_map(alpha, beta, self.settings.gamma)
        return torch.cat((frame + self.settings.eps * unit_map, unit_map), dim=1)
