"""Recovery of the activation on the server by proximal methods (section IV-C).

Every matrix is one sample's own: K x N, K channels by N = h*w positions. A result never depends on the rest of
the batch. Gradients are exact, through the spectrum too, and finite when singular values repeat.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MU = 0.55
"""Relaxation with the lowest MSE on both of the paper's data sets (its Fig. 3)."""


class _Shrinkage(torch.autograd.Function):
    """`G -> Q diag(f(w)) Q^T` for the Gram matrix `G = Q diag(w) Q^T`, with `f(w) = max(1 - mu/sqrt(w), 0)`.

    Multiplying Z by it soft-thresholds Z's singular values by mu. The gradient is the Daleckii-Krein formula
    with the divided differences of f in closed form, so that equal eigenvalues need no special case.
    """

    @staticmethod
    def forward(ctx: Any, gram: Tensor, mu: Tensor) -> Tensor:
        eigenvalues, Q = torch.linalg.eigh(gram)
        singular = eigenvalues.clamp_min(0).sqrt()
        kept = singular > mu
        factor = torch.where(kept, 1 - mu / singular.clamp_min(torch.finfo(gram.dtype).tiny), 0.0)
        ctx.save_for_backward(singular, Q, factor, kept, mu)
        return (Q * factor.unsqueeze(-2)) @ Q.mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        singular, Q, factor, kept, mu = ctx.saved_tensors
        inner = Q.mT @ grad @ Q
        grad_gram = None
        if ctx.needs_input_grad[0]:
            grad_gram = Q @ (inner * _divided_differences(singular, factor, kept, mu)) @ Q.mT
        grad_mu = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(kept, -1 / singular.clamp_min(torch.finfo(singular.dtype).tiny), 0.0)
            grad_mu = (inner.diagonal(dim1=-2, dim2=-1) * slope).sum().reshape(mu.shape)
        return grad_gram, grad_mu


def _divided_differences(singular: Tensor, factor: Tensor, kept: Tensor, mu: Tensor) -> Tensor:
    """`(f(a^2) - f(b^2)) / (a^2 - b^2)` for all pairs of singular values a, b; f' on the diagonal."""
    a, b = singular.unsqueeze(-1), singular.unsqueeze(-2)
    kept_a, kept_b = kept.unsqueeze(-1), kept.unsqueeze(-2)
    tiny = torch.finfo(singular.dtype).tiny
    both = mu / (a * b * (a + b)).clamp_min(tiny)
    # One kept, one not: f of the other is 0, and a^2 - b^2 >= a^2 - mu^2 > 0.
    square_gap = (a * a - b * b).abs().clamp_min(tiny)
    one = (factor.unsqueeze(-1) + factor.unsqueeze(-2)) / square_gap
    return torch.where(kept_a & kept_b, both, torch.where(kept_a | kept_b, one, 0.0))


def svt(Z: Tensor, mu: Tensor | float = MU) -> Tensor:
    """Singular value thresholding: the closed-form solution of Eq. 4 and 5.

    `argmin_L mu*||L||_* + 1/2*||Z - L||_F^2`, by the eigendecomposition of the Gram matrix on Z's smaller side.

    Parameters
    ----------
    Z : Tensor, [..., K, N], float32 or float64
    mu : float or scalar Tensor
        Threshold on the singular values, at least 0. A tensor receives a gradient.
    """
    threshold = torch.as_tensor(mu, dtype=Z.dtype, device=Z.device)
    if Z.shape[-2] <= Z.shape[-1]:
        return _shrink(Z @ Z.mT, threshold) @ Z
    return Z @ _shrink(Z.mT @ Z, threshold)


def _shrink(gram: Tensor, mu: Tensor) -> Tensor:
    out: Tensor = _Shrinkage.apply(gram, mu)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out


def sparse_weight(rows: int, columns: int) -> float:
    """`lam = 1/sqrt(max(K, N))`, the weight of robust PCA (Candes et al. 2011); the paper gives none."""
    return float(max(rows, columns) ** -0.5)


def low_rank_sparse(
    Z: Tensor, mu: Tensor | float = MU, lam: float | None = None, *, steps: int = 200, tolerance: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Low rank + sparse recovery by accelerated proximal gradient (FISTA; Beck and Teboulle 2009).

    `min_{L,S} ||L||_* + lam*||S||_1 + 1/(2*mu)*||Z - L - S||_F^2`. The minimum over S is a soft threshold, so
    S is eliminated: what remains is `min_L ||L||_* + H(Z - L)` with H the Huber function, whose gradient
    `-clip(Z - L, -lam*mu, lam*mu)/mu` has Lipschitz constant 1/mu. A step of length mu is then
    `L <- SVT(Y + clip(Z - Y, -lam*mu, lam*mu), mu)`.

    Parameters
    ----------
    Z : Tensor, [..., K, N]
    mu : float or scalar Tensor
        Noise level; also the singular value threshold.
    lam : float, optional
        Weight of the sparse part; `sparse_weight(K, N)` by default.
    steps : int
        Most iterations.
    tolerance : float
        Each matrix stops at `||L_new - L||_F <= tolerance * max(1, ||L||_F)`, on its own: a stopped matrix
        is frozen, so that its result does not depend on its batch. 0 runs all the steps.

    Returns
    -------
    L, S : Tensor, [..., K, N]
    """
    threshold = torch.as_tensor(mu, dtype=Z.dtype, device=Z.device)
    reach = threshold * (sparse_weight(*Z.shape[-2:]) if lam is None else lam)
    L = Y = torch.zeros_like(Z)
    momentum = 1.0
    running = torch.ones((*Z.shape[:-2], 1, 1), dtype=torch.bool, device=Z.device)
    for _ in range(steps):
        stepped = svt(Y + _clip(Z - Y, reach), threshold)
        following = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2
        ahead = stepped + ((momentum - 1) / following) * (stepped - L)
        if tolerance:
            moved = torch.linalg.matrix_norm((stepped - L).detach(), keepdim=True)
            size = torch.linalg.matrix_norm(L.detach(), keepdim=True).clamp_min(1)
            L, Y = torch.where(running, stepped, L), torch.where(running, ahead, Y)
            running = running & (moved > tolerance * size)
            if not running.any():
                break
        else:
            L, Y = stepped, ahead
        momentum = following
    rest = Z - L
    return L, rest - _clip(rest, reach)


def _clip(Z: Tensor, reach: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(Z, -reach), reach)


class Recovery(nn.Module):
    """The recovery step of the server half: [B, K, h, w] to [B, K, h, w].

    Parameters
    ----------
    method : "svt" or "low_rank_sparse"
        The published recovery, or the default: the low rank part of the low rank + sparse problem.
    mu : float
        Relaxation; the paper's 0.55.
    steps, tolerance : int, float
        Stopping rule of "low_rank_sparse".
    """

    def __init__(
        self, method: str = "low_rank_sparse", mu: float = MU, steps: int = 8, tolerance: float = 1e-4
    ) -> None:
        super().__init__()
        if method not in ("svt", "low_rank_sparse"):
            raise ValueError(f"recovery {method!r} is not known; choose svt or low_rank_sparse.")
        self.method, self.mu, self.steps, self.tolerance = method, mu, steps, tolerance

    def forward(self, activation: Tensor) -> Tensor:
        """Recovered activation, of the same shape."""
        Z = activation.flatten(2)
        if self.method == "svt":
            return svt(Z, self.mu).view_as(activation)
        L, _ = low_rank_sparse(Z, self.mu, steps=self.steps, tolerance=self.tolerance)
        return L.view_as(activation)
