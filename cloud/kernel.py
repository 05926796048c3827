"""Low rank + sparse recovery of a batch, compiled: the twin of `splitward.method.recovery` for serving.

The method's own file reads like the paper and runs on any matrix; its cost is thousands of small tensor operations
for a batch. Here one frame is one lane of a vector register: every loop ends in `LANES` neighbouring floats, so the
compiler turns it into vector instructions. A lane never looks at another one, and each does the same arithmetic in
the same order, so that a frame's result is the same bits alone and in any company.

The eigendecomposition of the Gram matrices is cyclic Jacobi (Golub and Van Loan, 8.5): for 8 to 32 rows it is
accurate to rounding, and it has no branch that differs by lane: a rotation that is not needed is one by zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

LANES = 64
"""Frames in one pass; a batch is filled up to a multiple of it."""
MAX_ROWS = 32
MAX_SWEEPS = 15
TURNED = np.float32(1e-14)
"""Square of the cosine between two rows under which they count as orthogonal: float32's rounding."""
_f32 = np.float32
_options: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nnan", "nsz"},  # no reordering: a sum has one order
    "nogil": True,
}
Array = NDArray[np.float32]


@njit(**_options)
def _add_product(total: Array, a: Array, b: Array) -> None:
    for lane in range(LANES):
        total[lane] += a[lane] * b[lane]


@njit(**_options)
def _turn(a: Array, b: Array, cosine: Array, sine: Array) -> None:
    for lane in range(LANES):
        x, y = a[lane], b[lane]
        a[lane] = cosine[lane] * x - sine[lane] * y
        b[lane] = sine[lane] * x + cosine[lane] * y


@njit(**_options)
def _find_rotation(app: Array, aqq: Array, apq: Array, cosine: Array, sine: Array) -> int:
    """Rotation that brings `apq` to 0; how many lanes need one."""
    turned = 0
    for lane in range(LANES):
        needed = apq[lane] * apq[lane] > TURNED * abs(app[lane] * aqq[lane])
        safe = apq[lane] if needed else _f32(1)
        tau = (aqq[lane] - app[lane]) * _f32(0.5) / safe
        tangent = math.copysign(_f32(1) / (abs(tau) + math.sqrt(_f32(1) + tau * tau)), tau)
        tangent = tangent if needed else _f32(0)
        cosine[lane] = _f32(1) / math.sqrt(_f32(1) + tangent * tangent)
        sine[lane] = tangent * cosine[lane]
        turned += 1 if needed else 0
    return turned


@njit(**_options)
def _diagonalise(gram: Array, basis: Array, cosine: Array, sine: Array) -> None:
    """Eigenvalues on the diagonal of `gram` [K, K, LANES], eigenvectors in the rows of `basis`."""
    rows = gram.shape[0]
    basis[:] = 0
    for i in range(rows):
        basis[i, i, :] = 1
    for _ in range(MAX_SWEEPS):
        turned = 0
        for p in range(rows - 1):
            for q in range(p + 1, rows):
                needed = _find_rotation(gram[p, p], gram[q, q], gram[p, q], cosine, sine)
                if needed == 0:
                    continue
                turned += needed
                for k in range(rows):
                    _turn(gram[k, p], gram[k, q], cosine, sine)
                for k in range(rows):
                    _turn(gram[p, k], gram[q, k], cosine, sine)
                for k in range(rows):
                    _turn(basis[p, k], basis[q, k], cosine, sine)
        if turned == 0:
            break


@njit(**_options)
def _multiply_gram(W: Array, gram: Array, total: Array) -> None:
    """`W W^T`."""
    rows, columns, _ = W.shape
    for i in range(rows):
        for j in range(i + 1):
            total[:] = 0
            for n in range(columns):
                _add_product(total, W[i, n], W[j, n])
            gram[i, j, :] = total
            gram[j, i, :] = total


@njit(**_options)
def _shrink(gram: Array, basis: Array, factor: Array, out: Array, total: Array, mu: np.float32) -> None:
    """`Q^T diag(f) Q` with `f(w) = max(1 - mu/sqrt(w), 0)`: what multiplies W to threshold its spectrum."""
    rows = gram.shape[0]
    for i in range(rows):
        for lane in range(LANES):
            singular = math.sqrt(max(gram[i, i, lane], _f32(0)))
            factor[i, lane] = _f32(1) - mu / singular if singular > mu else _f32(0)
    for i in range(rows):
        for j in range(i + 1):
            total[:] = 0
            for k in range(rows):
                for lane in range(LANES):
                    total[lane] += basis[k, i, lane] * factor[k, lane] * basis[k, j, lane]
            out[i, j, :] = total
            out[j, i, :] = total


@njit(**_options)
def _look_ahead(W: Array, Y: Array, Z: Array, reach: np.float32) -> None:
    """`W = Y + clip(Z - Y)`, all flat."""
    for index in range(W.size):
        W[index] = Y[index] + min(max(Z[index] - Y[index], -reach), reach)


@njit(**_options)
def _advance(
    step: Array, L: Array, Y: Array, running: Array, moved: Array, size: Array, momentum: np.float32
) -> None:
    for lane in range(LANES):
        before = L[lane]
        change = step[lane] - before
        moved[lane] += change * change
        size[lane] += before * before
        go = running[lane] > 0
        Y[lane] = step[lane] + momentum * change if go else Y[lane]
        L[lane] = step[lane] if go else before


@njit(**_options)
def _stop(running: Array, moved: Array, size: Array, tolerance: np.float32) -> int:
    """Freeze the lanes that moved little; how many still run."""
    left = 0
    for lane in range(LANES):
        limit = tolerance * max(math.sqrt(size[lane]), _f32(1))
        running[lane] = running[lane] if math.sqrt(moved[lane]) > limit else _f32(0)
        left += 1 if running[lane] > 0 else 0
    return left


@njit(**_options)
def recover(Z: Array, out: Array, mu: np.float32, reach: np.float32, steps: int, tolerance: np.float32) -> None:
    """Low rank part of each matrix, as `low_rank_sparse` finds it; `reach = 0, steps = 1` is `svt`.

    Parameters
    ----------
    Z, out : ndarray, float32 [B, K, N], K at most `MAX_ROWS` and N
    mu, reach : float32
        Threshold of the singular values, and of the sparse part (`lam * mu`); infinity for plain `svt`.
    """
    batch, rows, columns = Z.shape
    z = np.empty((rows, columns, LANES), _f32)
    L, Y, W = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    gram = np.empty((rows, rows, LANES), _f32)
    basis, shrinkage = np.empty_like(gram), np.empty_like(gram)
    factor = np.empty((rows, LANES), _f32)
    running, moved, size = np.empty(LANES, _f32), np.empty(LANES, _f32), np.empty(LANES, _f32)
    total, cosine, sine = np.empty(LANES, _f32), np.empty(LANES, _f32), np.empty(LANES, _f32)
    for first in range(0, batch, LANES):
        for lane in range(LANES):
            frame = min(first + lane, batch - 1)
            for i in range(rows):
                for n in range(columns):
                    z[i, n, lane] = Z[frame, i, n]
        Y[:] = 0
        L[:] = 0
        running[:] = 1
        momentum = 1.0
        for _ in range(steps):
            _look_ahead(W.reshape(-1), Y.reshape(-1), z.reshape(-1), reach)
            _multiply_gram(W, gram, total)
            _diagonalise(gram, basis, cosine, sine)
            _shrink(gram, basis, factor, shrinkage, total, mu)
            following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
            ahead = _f32((momentum - 1) / following)
            moved[:] = 0
            size[:] = 0
            for i in range(rows):
                for n in range(columns):
                    total[:] = 0
                    for k in range(rows):
                        _add_product(total, shrinkage[i, k], W[k, n])
                    _advance(total, L[i, n], Y[i, n], running, moved, size, ahead)
            if tolerance > 0 and _stop(running, moved, size, tolerance) == 0:
                break
            momentum = following
        for lane in range(min(LANES, batch - first)):
            for i in range(rows):
                for n in range(columns):
                    out[first + lane, i, n] = L[i, n, lane]
