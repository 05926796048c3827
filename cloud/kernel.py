"""Low rank + sparse recovery of a batch, compiled: the twin of `splitward.method.recovery` for serving.

The method's own file reads like the paper and runs on any matrix; its cost is thousands of small tensor operations
for a batch. Here one frame is one lane of a vector (`cloud.lanes`), and as many as it has lanes pass through together:
the code below reads as if for one. A lane never looks at another one, and each does the same arithmetic in the same
order, so that a frame's result is the same bits alone and in any company.

The eigendecomposition of the Gram matrices is cyclic Jacobi (Golub and Van Loan, 8.5): for 8 to 32 rows it is
accurate to rounding, and it has no branch that differs by lane: a rotation that is not needed is one by zero.
Only the upper triangle of a Gram matrix is kept.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from cloud.lanes import WIDTH, anywhere, choose, fill, load, magnitude, root, store

MAX_ROWS = 32
MAX_SWEEPS = 15
TURNED = np.float32(1e-13)
"""Square of the cosine between two rows under which they count as orthogonal: float32's rounding."""
_f32 = np.float32
_options: dict[str, Any] = {"cache": True, "error_model": "numpy", "nogil": True}
_inline: dict[str, Any] = _options | {"inline": "always"}
Array = NDArray[np.float32]


@njit(**_inline)
def _at(i: int, j: int, rows: int) -> int:
    """Place of the entry (i, j) of a symmetric matrix whose upper triangle is kept."""
    return min(i, j) * rows + max(i, j)


@njit(**_inline)
def _larger(a: Any, b: Any) -> Any:
    return choose(a > b, a, b)


@njit(**_inline)
def _turn(matrix: Array, i: int, j: int, cosine: Any, sine: Any) -> None:
    x, y = load(matrix, i), load(matrix, j)
    store(matrix, i, cosine * x - sine * y)
    store(matrix, j, sine * x + cosine * y)


@njit(**_options)
def _diagonalise(gram: Array, basis: Array, rows: int, floor: np.float32) -> None:
    """Eigenvalues on the diagonal of `gram`, eigenvectors in the rows of `basis`, both [K * K] vectors.

    Two rows shorter than `floor` need no rotation: both become 0.
    """
    zero, half, one = fill(_f32(0)), fill(_f32(0.5)), fill(_f32(1))
    near, shortest = fill(TURNED), fill(floor)
    basis[:] = 0
    for i in range(rows):
        store(basis, i * rows + i, one)
    for _ in range(MAX_SWEEPS):
        turned = False
        for p in range(rows - 1):
            for q in range(p + 1, rows):
                pp, qq, pq = load(gram, p * rows + p), load(gram, q * rows + q), load(gram, p * rows + q)
                needed = pq * pq > near * _larger(pp * qq, shortest)
                if not anywhere(needed):
                    continue
                turned = True
                tau = (qq - pp) * half / choose(needed, pq, one)
                length = one / (magnitude(tau) + root(one + tau * tau))
                tangent = choose(needed, choose(tau >= zero, length, zero - length), zero)
                cosine = one / root(one + tangent * tangent)
                sine = tangent * cosine
                store(gram, p * rows + p, pp - tangent * pq)
                store(gram, q * rows + q, qq + tangent * pq)
                store(gram, p * rows + q, choose(needed, zero, pq))
                for k in range(rows):
                    if k != p and k != q:  # a tuple would be made for each k
                        _turn(gram, _at(k, p, rows), _at(k, q, rows), cosine, sine)
                    _turn(basis, p * rows + k, q * rows + k, cosine, sine)
        if not turned:
            break


@njit(**_options)
def _multiply_gram(W: Array, gram: Array, rows: int, columns: int) -> None:
    """Upper triangle of `W W^T`."""
    gram[:] = 0
    for n in range(columns):
        for i in range(rows):
            left = load(W, n * rows + i)
            for j in range(i, rows):
                at = i * rows + j
                store(gram, at, load(gram, at) + left * load(W, n * rows + j))


@njit(**_options)
def _shrink(gram: Array, basis: Array, out: Array, mu: np.float32, rows: int) -> None:
    """`Q^T diag(f) Q` with `f(w) = max(1 - mu/sqrt(w), 0)`: what multiplies W to threshold its spectrum."""
    zero, one, threshold = fill(_f32(0)), fill(_f32(1)), fill(mu)
    out[:] = 0
    for k in range(rows):
        singular = root(_larger(load(gram, k * rows + k), zero))
        kept = choose(singular > threshold, one - threshold / singular, zero)
        for i in range(rows):
            left = load(basis, k * rows + i) * kept
            for j in range(rows):
                at = i * rows + j
                store(out, at, load(out, at) + left * load(basis, k * rows + j))


@njit(**_options)
def _recover_lanes(
    z: Array,
    L: Array,
    rows: int,
    columns: int,
    mu: np.float32,
    reach: np.float32,
    steps: int,
    tolerance: np.float32,
) -> None:
    """Low rank part `L` of `z`, both [N * K] vectors: FISTA."""
    Y, W = np.zeros_like(z), np.empty_like(z)
    gram = np.empty(rows * rows * WIDTH, _f32)
    basis, shrinkage = np.empty_like(gram), np.empty_like(gram)
    zero, one, furthest, least = fill(_f32(0)), fill(_f32(1)), fill(reach), fill(-reach)
    L[:] = 0
    running, momentum = one, 1.0
    for _ in range(steps):
        for at in range(rows * columns):  # W = Y + clip(z - Y)
            y = load(Y, at)
            apart = _larger(load(z, at) - y, least)
            store(W, at, y + choose(apart > furthest, furthest, apart))
        _multiply_gram(W, gram, rows, columns)
        _diagonalise(gram, basis, rows, mu * mu * mu * mu)
        _shrink(gram, basis, shrinkage, mu, rows)
        following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
        ahead, moved, size = fill(_f32((momentum - 1) / following)), zero, zero
        for n in range(columns):
            for i in range(rows):
                at, step = n * rows + i, zero
                for k in range(rows):
                    step = step + load(shrinkage, k * rows + i) * load(W, n * rows + k)
                before = load(L, at)
                change = step - before
                moved = moved + change * change
                size = size + before * before
                store(Y, at, step + ahead * change)
                store(L, at, choose(running > zero, step, before))
        # A lane that moved little stays where it is, whatever the others do.
        running = choose(root(moved) > fill(tolerance) * _larger(root(size), one), running, zero)
        if tolerance > 0 and not anywhere(running > zero):
            break
        momentum = following


@njit(**_options)
def recover(Z: Array, out: Array, mu: np.float32, reach: np.float32, steps: int, tolerance: np.float32) -> None:
    """Low rank part of each matrix, as `low_rank_sparse` finds it; `reach = inf, steps = 1` is `svt`.

    Parameters
    ----------
    Z, out : ndarray, float32 [B, K, N], K at most `MAX_ROWS` and N
    mu, reach : float32
        Threshold of the singular values, and of the sparse part (`lam * mu`); infinity for plain `svt`.
    """
    batch, rows, columns = Z.shape
    z = np.empty(columns * rows * WIDTH, _f32)
    L = np.empty_like(z)
    for first in range(0, batch, WIDTH):
        for lane in range(WIDTH):
            frame = min(first + lane, batch - 1)
            for i in range(rows):
                for n in range(columns):
                    z[(n * rows + i) * WIDTH + lane] = Z[frame, i, n]
        _recover_lanes(z, L, rows, columns, mu, reach, steps, tolerance)
        for lane in range(min(WIDTH, batch - first)):
            for i in range(rows):
                for n in range(columns):
                    out[first + lane, i, n] = L[(n * rows + i) * WIDTH + lane]
