"""The recovery's mathematics: minimisers, exact gradients, and a result of one's own in any batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from splitward.method import recovery
from splitward.method.recovery import (
    MU,
    Recovery,
    low_rank_sparse,
    sparse_weight,
    svt,
)

SHAPES = [(8, 49), (49, 8), (16, 16), (32, 196)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def nuclear_norm(Z: torch.Tensor) -> torch.Tensor:
    """Sum of the singular values of each matrix: [...]."""
    return torch.linalg.matrix_norm(Z, ord="nuc")


def objective(Z: torch.Tensor, L: torch.Tensor, S: torch.Tensor, mu: float, lam: float) -> torch.Tensor:
    """Value of the low rank + sparse objective for each matrix: [...]."""
    misfit = (Z - L - S).square().sum((-2, -1)) / (2 * mu)
    return nuclear_norm(L) + lam * S.abs().sum((-2, -1)) + misfit


def duality_gap(Z: torch.Tensor, L: torch.Tensor, S: torch.Tensor, mu: float, lam: float) -> torch.Tensor:
    """Upper bound on how far (L, S) is from the optimum, for each matrix: [...], at least 0 up to rounding.

    The dual of the problem is `max_Y <Z, Y> - mu/2*||Y||_F^2` over `||Y||_2 <= 1` and `|Y| <= lam`; the dual
    point is the residual `(Z - L - S)/mu`, scaled into both sets.
    """
    Y = (Z - L - S) / mu
    spectral = torch.linalg.matrix_norm(Y, ord=2, keepdim=True)
    largest = Y.abs().amax((-2, -1), keepdim=True)
    Y = Y / torch.maximum(torch.maximum(spectral, largest / lam), torch.ones_like(spectral))
    dual = (Z * Y).sum((-2, -1)) - mu / 2 * Y.square().sum((-2, -1))
    return objective(Z, L, S, mu, lam) - dual


def with_spectrum(values: list[float], rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with the given singular values, float64."""
    count = min(rows, columns)
    Q = torch.linalg.qr(random(rows, count, seed=seed)).Q
    R = torch.linalg.qr(random(columns, count, seed=seed + 1)).Q
    spectrum = torch.zeros(count, dtype=torch.float64)
    spectrum[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return (Q * spectrum) @ R.mT


def planted(rows: int = 30, columns: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank 2 and 5 percent of large entries."""
    L = random(rows, 2, seed=1) @ random(2, columns, seed=2)
    marks = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) < 0.05
    return L, torch.where(marks, 8 * random(rows, columns, seed=4).sign(), 0.0)


def thresholded(Z: torch.Tensor, mu: float) -> torch.Tensor:
    """SVT by the definition."""
    U, singular, V = torch.linalg.svd(Z, full_matrices=False)
    return (U * (singular - mu).clamp_min(0).unsqueeze(-2)) @ V


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("mu", [0.0, MU, 4.0])
def test_svt_thresholds_the_singular_values(rows, columns, mu):
    Z = random(6, rows, columns)
    torch.testing.assert_close(svt(Z, mu), thresholded(Z, mu), rtol=0, atol=1e-10)
    single = Z.float()
    expected = thresholded(single, mu)
    error = torch.linalg.matrix_norm(svt(single, mu) - expected)
    assert (error <= 1e-5 * torch.linalg.matrix_norm(expected).clamp_min(1e-3)).all()


def test_svt_is_the_minimiser_of_eq_4():
    Z, mu = random(8, 20), 1.5

    def value(L: torch.Tensor) -> torch.Tensor:
        return mu * nuclear_norm(L) + (Z - L).square().sum((-2, -1)) / 2

    L = svt(Z, mu)
    for size in (1e-4, 1e-2, 1.0):
        assert (value(L + size * random(200, 8, 20, seed=9)) > value(L)).all()
    assert value(L) < value(Z)
    assert value(L) < value(torch.zeros_like(Z))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_larger_side_is_never_decomposed(rows, columns, monkeypatch):
    shapes = []
    original = torch.linalg.eigh

    def recorded(matrix):
        shapes.append(tuple(matrix.shape))
        return original(matrix)

    def forbidden(*arguments, **options):
        raise AssertionError("an SVD is slower, and not needed")

    monkeypatch.setattr(torch.linalg, "eigh", recorded)
    monkeypatch.setattr(torch.linalg, "svd", forbidden)
    Z = random(2, rows, columns)
    svt(Z)
    low_rank_sparse(Z, steps=3)
    smaller = min(rows, columns)
    assert shapes == [(2, smaller, smaller)] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("method", ["svt", "low_rank_sparse"])
def test_a_sample_does_not_depend_on_its_batch(method, rows, columns, dtype):
    """Bit for bit, in any company and at any position."""
    # The samples converge at different steps: their scales differ.
    Z = random(17, rows, columns, 1, dtype=dtype) * torch.logspace(-2, 1, 17, dtype=dtype).view(-1, 1, 1, 1)
    recover = Recovery(method, steps=20)
    together = recover(Z)
    reversed_ = recover(Z.flip(0)).flip(0)
    assert torch.equal(reversed_, together)
    for row in range(0, len(Z), 4):
        assert torch.equal(recover(Z[row : row + 1])[0], together[row])
        assert torch.equal(recover(Z[row : row + 5])[0], together[row])


@pytest.mark.parametrize("method", ["svt", "low_rank_sparse"])
def test_the_module_recovers_each_samples_channels_by_positions_matrix(method):
    activation = random(3, 8, 7, 7)
    Z = activation.flatten(2)
    expected = svt(Z) if method == "svt" else low_rank_sparse(Z, steps=8, tolerance=1e-4)[0]
    recovered = Recovery(method)(activation)
    assert torch.equal(recovered, expected.view(3, 8, 7, 7))


def test_an_unknown_recovery_is_refused():
    with pytest.raises(ValueError, match="choose svt or low_rank_sparse"):
        Recovery("median")


def test_fista_reaches_the_optimum_and_the_gap_says_how_near_it_is():
    Z = torch.stack([random(12, 30), with_spectrum([9.0, 3.0, 0.2], 12, 30)])
    mu, lam = MU, sparse_weight(12, 30)
    best = objective(Z, *low_rank_sparse(Z, steps=3000), mu, lam)
    values, gaps = [], []
    for steps in (1, 4, 16, 64, 256, 1024):
        L, S = low_rank_sparse(Z, steps=steps)
        values.append(objective(Z, L, S, mu, lam))
        gaps.append(duality_gap(Z, L, S, mu, lam))
        assert (values[-1] - best <= gaps[-1] + 1e-9).all()
    assert all((later <= earlier + 1e-9).all() for earlier, later in pairwise(values))
    assert (gaps[-1] < 1e-6 * values[-1]).all()
    assert (gaps[0] > 1000 * gaps[-1]).all()


def test_no_neighbour_of_the_optimum_is_better():
    Z, mu, lam = random(6, 15), MU, sparse_weight(6, 15)
    L, S = low_rank_sparse(Z, steps=3000)
    optimum = objective(Z, L, S, mu, lam)
    for size in (1e-3, 1e-1):
        moved = objective(
            Z, L + size * random(100, 6, 15, seed=5), S + size * random(100, 6, 15, seed=6), mu, lam
        )
        assert (moved > optimum).all()


def test_the_sparse_part_is_the_exact_minimiser_for_its_low_rank_part():
    Z = random(6, 15)
    lam = sparse_weight(6, 15)
    L, S = low_rank_sparse(Z, steps=5)
    rest = Z - L
    torch.testing.assert_close(S, rest.sign() * (rest.abs() - lam * MU).clamp_min(0))


def test_a_planted_low_rank_and_sparse_matrix_is_recovered():
    low_rank, sparse = planted()
    L, S = low_rank_sparse(low_rank + sparse, 0.02, steps=3000)
    assert torch.linalg.matrix_norm(L - low_rank) < 0.02 * torch.linalg.matrix_norm(low_rank)
    assert (S.abs() > 1).eq(sparse != 0).all()
    assert torch.linalg.matrix_rank(L, atol=1e-6) <= 3
    plain = svt(low_rank + sparse, 0.02)  # which has no place for the outliers
    assert torch.linalg.matrix_norm(plain - low_rank) > 0.5 * torch.linalg.matrix_norm(low_rank)


def test_the_stopping_rule_stops_early_and_freezes(monkeypatch):
    calls = []
    original = recovery.svt

    def counted(Z, mu):
        calls.append(len(Z))
        return original(Z, mu)

    monkeypatch.setattr(recovery, "svt", counted)

    def steps_for(Z: torch.Tensor) -> int:
        calls.clear()
        low_rank_sparse(Z, steps=500, tolerance=1e-4)
        return len(calls)

    quick, slow = 0.1 * random(1, 10, 20), random(1, 10, 20, seed=1)
    both = torch.cat((quick, slow))
    quick_steps, slow_steps = steps_for(quick), steps_for(slow)
    assert 2 < quick_steps < slow_steps < 500
    assert steps_for(both) == slow_steps
    L, S = low_rank_sparse(both, steps=500, tolerance=1e-4)
    for row, (alone, needed) in enumerate(((quick, quick_steps), (slow, slow_steps))):
        exact = low_rank_sparse(alone, steps=needed)
        assert torch.equal(L[row], exact[0][0])
        assert torch.equal(S[row], exact[1][0])


SPECTRA = {
    "distinct": [5.0, 3.0, 1.2, 0.3],
    "repeated": [3.0, 3.0, 3.0, 3.0],
    "repeated below the threshold": [3.0, 0.2, 0.2, 0.2],
    "on both sides of the threshold": [2.0, MU + 1e-3, MU - 1e-3, 0.1],
    "rank deficient": [4.0, 2.0],
}


@pytest.mark.parametrize(("rows", "columns"), [(4, 7), (7, 4), (4, 4)])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_gradients_of_svt_are_exact(rows, columns, spectrum):
    Z = with_spectrum(spectrum, rows, columns).requires_grad_()
    mu = torch.tensor(MU, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(svt, (Z, mu), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(3, 6), (6, 3)])
@pytest.mark.parametrize("tolerance", [0.0, 1e-4])
def test_gradients_of_the_low_rank_sparse_recovery_are_exact(rows, columns, tolerance):
    Z = (2 * random(2, rows, columns)).requires_grad_()
    mu = torch.tensor(MU, dtype=torch.float64, requires_grad=True)

    def recover(matrix: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return low_rank_sparse(matrix, threshold, steps=6, tolerance=tolerance)

    assert torch.autograd.gradcheck(recover, (Z, mu), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "matrix",
    [torch.zeros(4, 9), torch.eye(4, 9), MU * torch.eye(9, 4), torch.ones(4, 4), 1e-30 * torch.ones(4, 9)],
    ids=["zero", "repeated", "at the threshold", "rank 1", "nearly zero"],
)
@pytest.mark.parametrize("mu", [0.0, MU])
def test_gradients_are_finite_everywhere(matrix, mu, dtype):
    Z = matrix.to(dtype, copy=True).requires_grad_()
    threshold = torch.tensor(mu, dtype=dtype, requires_grad=True)
    low_rank, sparse = low_rank_sparse(Z, threshold, steps=4)
    (svt(Z, threshold).square().sum() + low_rank.sum() + sparse.square().sum()).backward()
    assert torch.isfinite(Z.grad).all()
    assert torch.isfinite(threshold.grad).all()
