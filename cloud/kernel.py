"""Low rank + sparse recovery of a batch, compiled: the twin of `splitward.method.recovery` for serving.

The method's own file reads like the paper and runs on any matrix; its cost is thousands of small tensor operations
for a batch. Here one frame is one lane of a vector register: a value of all frames is a row of `lanes` neighbouring
floats, every loop ends in such rows, and the compiler turns it into vector instructions. A lane never looks at
another one, and each does the same arithmetic in the same order, so that a frame's result is the same bits alone
and in any company.

The eigendecomposition of the Gram matrices is cyclic Jacobi (Golub and Van Loan, 8.5): for 8 to 32 rows it is
accurate to rounding, and it has no branch that differs by lane: a rotation that is not needed is one by zero.
Only the upper triangle of a Gram matrix is kept.

What calls `_find_rotation` is compiled with it apart: within a larger function its loop is no longer made of vector
instructions. All else is inlined: a call for a row of floats costs more than the row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

LANES = 64
"""Most frames in one pass; a pass is filled up to a multiple of `WIDTH`."""
WIDTH = 8
MAX_ROWS = 32
MAX_SWEEPS = 15
TURNED = np.float32(1e-13)
"""Square of the cosine between two rows under which they count as orthogonal: float32's rounding."""
_f32 = np.float32
_options: dict[str, Any] = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nnan", "nsz"},  # no reordering: a sum has one order
    "nogil": True,
}
_inline: dict[str, Any] = _options | {"inline": "always"}
Array = NDArray[np.float32]


@njit(**_inline)
def _at(i: int, j: int, rows: int) -> int:
    """Row of the entry (i, j) of a symmetric matrix whose upper triangle is kept."""
    return min(i, j) * rows + max(i, j)


@njit(**_inline)
def _add_product(total: Array, t: int, a: Array, i: int, b: Array, j: int) -> None:
    for lane in range(total.shape[1]):
        total[t, lane] += a[i, lane] * b[j, lane]


@njit(**_inline)
def _turn(matrix: Array, i: int, j: int, cosine: Array, sine: Array) -> None:
    for lane in range(matrix.shape[1]):
        x, y = matrix[i, lane], matrix[j, lane]
        matrix[i, lane] = cosine[lane] * x - sine[lane] * y
        matrix[j, lane] = sine[lane] * x + cosine[lane] * y


@njit(**_options)
def _count_unturned(app: Array, aqq: Array, apq: Array, floor: np.float32) -> int:
    """How many lanes need a rotation of p and q: two rows shorter than the threshold need none, both become 0."""
    count = np.int32(0)
    for lane in range(apq.size):
        count += np.int32(apq[lane] * apq[lane] > TURNED * max(app[lane] * aqq[lane], floor))
    return int(count)


@njit(**_options)
def _find_rotation(
    app: Array, aqq: Array, apq: Array, floor: np.float32, cosine: Array, sine: Array, tangent: Array
) -> None:
    """Rotation that brings `apq` to 0, or one by 0 where none is needed."""
    for lane in range(apq.size):
        x = apq[lane]
        needed = x * x > TURNED * max(app[lane] * aqq[lane], floor)
        safe = x if needed else _f32(1)
        tau = (aqq[lane] - app[lane]) * _f32(0.5) / safe
        length = _f32(1) / (abs(tau) + math.sqrt(_f32(1) + tau * tau))
        signed = length if tau >= _f32(0) else -length
        tangent[lane] = signed if needed else _f32(0)
        cosine[lane] = _f32(1) / math.sqrt(_f32(1) + tangent[lane] * tangent[lane])
        sine[lane] = tangent[lane] * cosine[lane]


@njit(**_options)
def _turn_pivot(app: Array, aqq: Array, apq: Array, tangent: Array) -> None:
    for lane in range(tangent.size):
        change = tangent[lane] * apq[lane]
        app[lane] -= change
        aqq[lane] += change
        apq[lane] = _f32(0) if tangent[lane] != 0 else apq[lane]


@njit(**_inline)
def _diagonalise(gram: Array, basis: Array, rows: int, floor: np.float32, scratch: Array) -> None:
    """Eigenvalues on the diagonal of `gram` [K * K, lanes], eigenvectors in the rows of `basis`, likewise."""
    cosine, sine, tangent = scratch[0], scratch[1], scratch[2]
    basis[:] = 0
    for i in range(rows):
        basis[i * rows + i, :] = 1
    for _ in range(MAX_SWEEPS):
        turned = 0
        for p in range(rows - 1):
            for q in range(p + 1, rows):
                app, aqq, apq = gram[_at(p, p, rows)], gram[_at(q, q, rows)], gram[_at(p, q, rows)]
                unturned = _count_unturned(app, aqq, apq, floor)
                if unturned == 0:
                    continue
                turned += unturned
                _find_rotation(app, aqq, apq, floor, cosine, sine, tangent)
                _turn_pivot(app, aqq, apq, tangent)
                for k in range(rows):
                    if k != p and k != q:  # a tuple would be made for each k
                        _turn(gram, _at(k, p, rows), _at(k, q, rows), cosine, sine)
                    _turn(basis, p * rows + k, q * rows + k, cosine, sine)
        if turned == 0:
            break


@njit(**_inline)
def _multiply_gram(W: Array, gram: Array, rows: int) -> None:
    """Upper triangle of `W W^T`."""
    gram[:] = 0
    for first in range(0, W.shape[0], rows):
        for i in range(rows):
            for j in range(i, rows):
                _add_product(gram, i * rows + j, W, first + i, W, first + j)


@njit(**_inline)
def _shrink(gram: Array, basis: Array, out: Array, mu: np.float32, scratch: Array, rows: int) -> None:
    """`Q^T diag(f) Q` with `f(w) = max(1 - mu/sqrt(w), 0)`: what multiplies W to threshold its spectrum."""
    out[:] = 0
    for k in range(rows):
        for lane in range(out.shape[1]):
            singular = math.sqrt(max(gram[k * rows + k, lane], _f32(0)))
            scratch[0, lane] = _f32(1) - mu / singular if singular > mu else _f32(0)
        for i in range(rows):
            for lane in range(out.shape[1]):
                scratch[1, lane] = basis[k * rows + i, lane] * scratch[0, lane]
            for j in range(rows):
                _add_product(out, i * rows + j, scratch, 1, basis, k * rows + j)


@njit(**_options)
def _look_ahead(W: Array, Y: Array, Z: Array, reach: np.float32) -> None:
    """`W = Y + clip(Z - Y)`, all flat."""
    for index in range(W.size):
        W[index] = Y[index] + min(max(Z[index] - Y[index], -reach), reach)


@njit(**_options)
def _advance(
    step: Array, L: Array, Y: Array, running: Array, moved: Array, size: Array, momentum: np.float32
) -> None:
    for lane in range(step.size):
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
    for lane in range(running.size):
        limit = tolerance * max(math.sqrt(size[lane]), _f32(1))
        running[lane] = running[lane] if math.sqrt(moved[lane]) > limit else _f32(0)
        left += 1 if running[lane] > 0 else 0
    return left


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
    lanes = min(LANES, (batch + WIDTH - 1) // WIDTH * WIDTH)
    z = np.empty((columns * rows, lanes), _f32)
    L, Y, W = np.empty_like(z), np.empty_like(z), np.empty_like(z)
    gram = np.empty((rows * rows, lanes), _f32)
    basis, shrinkage = np.empty_like(gram), np.empty_like(gram)
    step, scratch = np.empty((rows, lanes), _f32), np.empty((3, lanes), _f32)
    running, moved, size = np.empty(lanes, _f32), np.empty(lanes, _f32), np.empty(lanes, _f32)
    for first in range(0, batch, lanes):
        for lane in range(lanes):
            frame = min(first + lane, batch - 1)
            for i in range(rows):
                for n in range(columns):
                    z[n * rows + i, lane] = Z[frame, i, n]
        Y[:] = 0
        L[:] = 0
        running[:] = 1
        momentum = 1.0
        for _ in range(steps):
            _look_ahead(W.reshape(-1), Y.reshape(-1), z.reshape(-1), reach)
            _multiply_gram(W, gram, rows)
            _diagonalise(gram, basis, rows, mu * mu * mu * mu, scratch)
            _shrink(gram, basis, shrinkage, mu, scratch, rows)
            following = (1 + math.sqrt(1 + 4 * momentum * momentum)) / 2
            ahead = _f32((momentum - 1) / following)
            moved[:] = 0
            size[:] = 0
            for n in range(columns):
                step[:] = 0
                for k in range(rows):
                    for i in range(rows):
                        _add_product(step, i, shrinkage, k * rows + i, W, n * rows + k)
                for i in range(rows):
                    _advance(step[i], L[n * rows + i], Y[n * rows + i], running, moved, size, ahead)
            if tolerance > 0 and _stop(running, moved, size, tolerance) == 0:
                break
            momentum = following
        for lane in range(min(lanes, batch - first)):
            for i in range(rows):
                for n in range(columns):
                    out[first + lane, i, n] = L[n * rows + i, lane]
