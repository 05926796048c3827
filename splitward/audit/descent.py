"""What the attacks that optimise share: the way through the client half, the smoothness prior and the descent."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from splitward.method.split import SplitNetwork


def activation_of(network: SplitNetwork, frames: Tensor) -> Tensor:
    """Activation of frames [B, C, H, W], with a gradient through everything that a frame passes on the device.

    `SplitNetwork.attack` cuts the map's gradient off. On logits that gradient is 0 almost everywhere (alpha and beta
    change only where a unit of the local classifier switches), so going through the map and taking it as a constant
    of each step (BPDA, Athalye et al. 2018) are one and the same; on probabilities going through is the exact one.
    """
    return network.client(frames if network.saliency is None else network.saliency(frames))


def total_variation(frames: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, in both directions: [B]."""
    rows = (frames[..., 1:, :] - frames[..., :-1, :]).abs().flatten(1).mean(1)
    columns = (frames[..., 1:] - frames[..., :-1]).abs().flatten(1).mean(1)
    return rows + columns


def release_gap(network: SplitNetwork, released: Tensor, weight: float | Tensor) -> Callable[[Tensor], Tensor]:
    """Objective `|release(x) - released|^2 / variance + weight * TV(x)` of frames, [B]; the noise is drawn afresh at
    each call. `weight` may be one for each target, [B]."""
    variance = released.var(0).mean().clamp_min(1e-12)

    def objective(frames: Tensor) -> Tensor:
        gap = network.release(activation_of(network, frames)) - released
        return gap.square().flatten(1).mean(1) / variance + weight * total_variation(frames)

    return objective


def descend(
    objective: Callable[..., Tensor],
    *starts: Tensor,
    steps: int,
    rate: float,
    boxed: bool = True,
    signed: bool = False,
) -> tuple[Tensor, ...]:
    """Minimise the objective from `starts` by Adam, its rate falling to 0 along a cosine.

    Parameters
    ----------
    objective : callable
        Takes as many tensors as there are starts and gives a value for each target, [B]; their sum is minimised, so
        that targets do not touch one another.
    starts : Tensor, [B, ...]
    steps, rate : int, float
    boxed : bool
        Whether the first tensor holds frames, which stay in 0..1.
    signed : bool
        Step along the gradient's sign (Geiping et al. 2020, section 4).

    Returns
    -------
    tuple of Tensor
        Where the descent ended, detached.
    """
    variables = [start.detach().clone().requires_grad_() for start in starts]
    optimiser = torch.optim.Adam(variables, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps))
    for _ in range(steps):
        gradients = torch.autograd.grad(objective(*variables).sum(), variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient.sign() if signed else gradient
        optimiser.step()
        schedule.step()
        if boxed:
            with torch.no_grad():
                variables[0].clamp_(0, 1)
    return tuple(variable.detach() for variable in variables)
