"""Lower bounds on the error of any reconstruction from what a device releases (docs/method.md, section 4).

Three bounds on the mean squared error of a pixel, from the strongest statement to the weakest:

`candidates`
    No assumption on images or network, and none on the attacker's method or computing; what it must not have besides
    the release is said in `ASSUMPTIONS`. The attacker is told the label and handed the list of the N frames, and must
    only find out which one of that class was captured. Its best estimate is then the posterior mean over the class's
    frames, which the known Gaussian noise law gives in closed form; nobody without list or label does better on average
    over these N frames. Averaged over lists it is also a bound for the population that they were drawn from, because a
    list can only help. This is what a bundle certifies.
`trace`
    Van Trees: `(1/d) tr((E[I_e] + S)^-1)` with `I_e = J^T J / sigma^2` and S the inverse covariance of the frames
    within a class. For an attacker who knows the label, under a Gaussian prior for each class: real images are not
    Gaussian, so this one is a model and not a promise.
`unbiased`
    Cramer-Rao: `d / E[tr(I_e)]`, the inverse of diagonal Fisher information leakage (Maeng et al. 2023) averaged over
    the frames. For unbiased estimators only, which no decoder is, and so often far above any attack's error.

`candidates` is given for several captures of each scene, too: for captures that are alike before the noise, each with
noise of its own; and for captures that differ by a camera's noise and a movement (`recaptures_bound`). In that one the
attacker is also told, of every scene in the list, what its captures would have been before the noise.

All of them leave out the quantisation after the noise, which can only raise the error. `candidates` counts the
rounding before the noise; the two with a Jacobian take it for the identity, and are given only where its step is at
most a tenth of sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from splitward.method.split import SplitNetwork
from splitward.training.loop import reproducible, shifted


@dataclass(frozen=True)
class Movement:
    """How captures of one scene differ.

    Attributes
    ----------
    noise : float
        Standard deviation of the camera's noise, of the range of a pixel.
    pixels : int
        By how much the scene moves at most in each direction, at random.
    """

    noise: float
    pixels: int

    def capture(self, scenes: Tensor) -> Tensor:
        """A capture of each scene, [N, C, H, W], in the steps of a camera's eight bits; torch's generator draws."""
        seen = shifted(scenes, self.pixels) + self.noise * torch.randn_like(scenes)
        return (seen.clamp(0, 1) * 255).round() / 255


CAPTURES = (1, 8)
"""Numbers of captures of one scene for which the candidates bound is given."""
MOVEMENT = Movement(noise=0.05, pixels=1)
"""How captures differ for which the candidates bound is given (our choice)."""
FISHER_FRAMES = 200
FINE = 10
"""So many steps of the grid before the noise are in a sigma, or it is no small thing beside it (our choice)."""
_CHUNK = 250
_DRAWS, _SAMPLES, _SCENES = 4, 20_000, 1000
_CERTAIN = 100
"""A noise of so small a part of the grid's step hides nothing, and is more than the rounding of a distance."""
_APART = 1e3
"""So many sigma lie between frames whose captures do not coincide alike: as good as infinitely many."""
ASSUMPTIONS = (
    "The noise is Gaussian, independent between captures and unknown to the attacker (keyed by the device's "
    "secret).",
    "The error is averaged over the frames certified; a single frame that is unlike all others can leak more.",
    "The frames are drawn as the certified ones were; a bound on these says nothing of another hospital's.",
    "An attacker has as many captures of one scene as stated, no more. They are alike before the noise, each with its "
    "own noise; or they differ as stated, each at random. Captures that differ by more can tell more together: which "
    "values they round to, and how often, says where between them the frame lies.",
    "Each frame is drawn independently of the others, and the attacker does not know how often each is sent.",
    "The attacker sees no releases of this device's other scenes. The noise is a function of the values that it hides, "
    "so that how often releases are equal tells how common their values are, and in the end which they are. For "
    "whoever knows the values before the noise there is a bound of its own.",
    "The attacker has no release of a frame of its choice from this very device: the noise is a function of the "
    "frame's values, keyed by the device, so that whoever can feed it a frame and sees the release confirms a guess.",
)


@dataclass(frozen=True)
class Certificate:
    """Bounds for one network under its release law, on given frames.

    Attributes
    ----------
    bound_mse : float
        The candidates bound for one capture, for an attacker who knows the label.
    captures_mse : dict of int to float
        The candidates bound for so many captures of each scene that are alike before the noise.
    recaptures_mse : float
        The candidates bound for the most of these captures where they differ by `movement`.
    movement : Movement
    values_mse : float
        The candidates bound for an attacker who knows the values before the noise, as from all that a device ever
        releases: what rounding and training have made one and the same. 0 where no two frames are.
    identified : float
        How often the attacker with the list and the label picks the right frame at best, from one capture; an
        estimate.
    class_mean_mse : float
        Error of each class's mean over the same frames: what the label alone allows.
    trace_mse, unbiased_mse : float or None
        The two bounds with a Jacobian; None where the rounding before the noise is no small thing beside it.
    frames, sigma, seed : int, float, int
    assumptions : tuple of str
    """

    bound_mse: float
    captures_mse: dict[int, float]
    recaptures_mse: float
    movement: Movement
    values_mse: float
    identified: float
    class_mean_mse: float
    trace_mse: float | None
    unbiased_mse: float | None
    frames: int
    sigma: float
    seed: int
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"captures_mse": {str(n): bound for n, bound in self.captures_mse.items()}}


def certify(network: SplitNetwork, frames: Tensor, labels: Tensor, *, seed: int = 0) -> Certificate | None:
    """Certificate of a `sealed` network on held-out frames; None where the release carries no noise.

    Parameters
    ----------
    frames, labels : Tensor, [N, C, H, W] in 0..1, int64 [N]
        Not from the training data.
    """
    sigma = network.settings.defence.sigma
    if network.seal is None or sigma == 0:
        return None
    seal = network.seal

    @torch.no_grad()
    def clean(frames: Tensor) -> Tensor:
        bounded = [network.client(network.attack(chunk)) for chunk in torch.split(frames, _CHUNK)]
        return seal.round_clean(torch.cat(bounded))

    values = clean(frames)
    bounds = {n: candidates_bound(values, frames, labels, sigma / n**0.5, seed=seed) for n in CAPTURES}
    step = seal.bound / seal.steps
    fine = step <= sigma / FINE
    trace, unbiased = fisher_bounds(network, frames, labels) if fine else (None, None)
    return Certificate(
        bound_mse=bounds[1][0],
        captures_mse={n: bound for n, (bound, _) in bounds.items()},
        recaptures_mse=recaptures_bound(clean, frames, labels, sigma, seed=seed),
        movement=MOVEMENT,
        values_mse=candidates_bound(values, frames, labels, step / _CERTAIN, draws=2, seed=seed)[0],
        identified=bounds[1][1],
        class_mean_mse=_class_mean_error(frames, labels),
        trace_mse=trace,
        unbiased_mse=unbiased,
        frames=len(frames),
        sigma=sigma,
        seed=seed,
    )


def candidates_bound(
    clean: Tensor, frames: Tensor, labels: Tensor, sigma: float, *, draws: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """Least mean squared error for an attacker who knows that the frame is one of these, and how often it is found.

    The attacker knows the label, too: it chooses among the frames of the class. For `z = clean_i + sigma * n` the best
    estimate is `sum_j w_j x_j` over those, `w = softmax_j(-||z - clean_j||^2 / (2 sigma^2))`. The expectation over the
    noise is estimated by `draws` draws for each frame, at least 2 (default: 4, and more for few frames, 20,000 in all).
    So as not to certify more than there is, the error is the mean less two of its standard errors over these draws.

    Parameters
    ----------
    clean : Tensor, [N, k]
        Values before the noise.
    frames : Tensor, [N, C, H, W]
    labels : Tensor, int64 [N]
    """
    generator = torch.Generator().manual_seed(seed)
    values, pixels = clean.double().flatten(1), frames.double().flatten(1)
    draws = draws or max(_DRAWS, _SAMPLES // len(frames))
    found = []
    for some in torch.arange(draws).split(max(1, _SCENES // len(frames))):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        noise = torch.randn(len(some), *values.shape, generator=generator, dtype=torch.float64)
        found.append(_choose(values, sigma * noise, pixels, labels, sigma))
    squared, surest = (torch.cat(one) for one in zip(*found, strict=True))
    # The frames are given: what is random is each one's noise.
    deviation = float((squared.var(0).sum() / draws).sqrt()) / len(frames)
    return max(0.0, float(squared.mean()) - 2 * deviation), float(surest.mean())


def recaptures_bound(
    clean: Callable[[Tensor], Tensor],
    frames: Tensor,
    labels: Tensor,
    sigma: float,
    movement: Movement = MOVEMENT,
    *,
    captures: int = CAPTURES[-1],
    seed: int = 0,
) -> float:
    """Least mean squared error for an attacker of `candidates_bound` with captures of each frame that differ.

    What several captures tell depends on which values each of them rounds to, of which the attacker knows but the law.
    Here it is told that outright: for every frame of the list, the values before the noise of all captures that would
    have been, had it been that one. Nobody with less can do better, and the best estimate is in closed form again. As
    the noise is a function of the values, captures that round alike carry the same noise: of those one counts, and a
    frame whose captures would coincide otherwise than the released ones is ruled out.

    The expectation is estimated by draws of captures and noise, 4 for each frame and 1,000 in all at least; the result
    is two standard errors lower.

    Parameters
    ----------
    clean : callable
        Frames [N, C, H, W] to their values before the noise, [N, k].
    frames, labels : Tensor, [N, C, H, W] in 0..1, int64 [N]
    """
    pixels = frames.double().flatten(1)
    errors = []
    with reproducible(seed):
        for _ in range(max(_DRAWS, _SCENES // len(frames))):
            seen = movement.capture(frames.repeat(captures, 1, 1, 1))
            codes = clean(seen).double().view(captures, len(frames), -1).transpose(0, 1)
            alike = (codes[:, :, None] == codes[:, None]).all(3)
            first = alike.int().argmax(2)  # for each capture, the first that rounds as it does
            new = (first == torch.arange(captures))[:, :, None]
            values = torch.cat(((codes * new).flatten(1), _APART * sigma * first), 1)
            noise = torch.cat(((torch.randn_like(codes) * new).flatten(1), torch.zeros(first.shape)), 1)
            errors.append(_choose(values, sigma * noise[None], pixels, labels, sigma)[0].mean())
    means = torch.stack(errors)
    return max(0.0, float(means.mean() - 2 * means.std() / len(means) ** 0.5))


def _choose(
    values: Tensor, noise: Tensor, pixels: Tensor, labels: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """Posterior means over each frame's class from `values + noise`: squared error, and the likeliest frame's share.

    Both [D, N], for `values` [N, k] and `noise` [D, N, k].
    """
    squared, surest = torch.empty(2, *noise.shape[:2], dtype=torch.float64)
    for label in labels.unique():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        own = (labels == label).nonzero().flatten()
        for rows in own.split(_CHUNK):
            gaps = torch.cdist(values[rows] + noise[:, rows], values[own]).square()
            weights = (-gaps / (2 * sigma**2)).softmax(-1)
            squared[:, rows] = (weights @ pixels[own] - pixels[rows]).square().mean(-1)
            surest[:, rows] = weights.amax(-1)
    return squared, surest


def fisher_bounds(network: SplitNetwork, frames: Tensor, labels: Tensor) -> tuple[float, float]:
    """The trace bound, within classes, and the bound for unbiased estimators; at most `FISHER_FRAMES` a class."""
    sigma, pixels = network.settings.defence.sigma, frames[0].numel()
    trace, traces, counted = 0.0, 0.0, 0
    for label in labels.unique():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        own = frames[labels == label]
        rows = own.flatten(1).double()
        # Directions without variance within the class have nothing to estimate: the trace is over the others.
        _, spread, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        kept = spread > 1e-6 * spread[0].clamp_min(1e-12)
        variance, directions = spread[kept].square() / len(rows), directions[kept]
        information = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        sample = own[:FISHER_FRAMES]
        for chunk in sample.split(50):  # type: ignore[no-untyped-call]  # torch leaves it untyped
            jacobian = _jacobian(network, chunk).double()
            traces += float(jacobian.square().sum()) / sigma**2
            along = (jacobian @ directions.T).flatten(0, 1)
            information += along.T @ along / sigma**2
        counted += len(sample)
        precision = information / len(sample) + torch.diag(1 / variance)
        trace += len(own) / len(frames) * float(torch.linalg.inv(precision).diagonal().sum()) / pixels
    return trace, pixels * counted / max(traces, 1e-300)


def _jacobian(network: SplitNetwork, frames: Tensor) -> Tensor:
    """Derivative of the bounded values by the frame, through the saliency map too: [B, k, C*H*W]."""
    frames = frames.clone().requires_grad_()
    bounded = network.client(frames if network.saliency is None else network.saliency(frames)).flatten(1)
    rows = [
        torch.autograd.grad(bounded[:, value].sum(), frames, retain_graph=True)[0].flatten(1)
        for value in range(bounded.shape[1])
    ]
    return torch.stack(rows, dim=1)


def _class_mean_error(frames: Tensor, labels: Tensor) -> float:
    errors = [
        (own - own.mean(0)).square().mean() * len(own)
        for own in (frames[labels == label] for label in labels.unique())  # type: ignore[no-untyped-call]  # torch leaves it untyped
    ]
    return float(sum(errors) / len(frames))
