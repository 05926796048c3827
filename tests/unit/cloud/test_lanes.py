"""Vectors of compiled code do what NumPy does to arrays."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit

from cloud.lanes import WIDTH, anywhere, choose, fill, load, magnitude, root, store

FORMULAS = {
    "sum": (lambda a, b: a + b, np.add),
    "difference": (lambda a, b: a - b, np.subtract),
    "product": (lambda a, b: a * b, np.multiply),
    "quotient": (lambda a, b: a / b, np.divide),
    "magnitude": (lambda a, b: magnitude(a - b), lambda a, b: np.abs(a - b)),
    "root": (lambda a, b: root(a * a), lambda a, b: np.sqrt(a * a)),
    "larger": (lambda a, b: choose(a > b, a, b), np.maximum),
    "at least": (lambda a, b: choose(a >= b, a, b), np.maximum),
    "filled": (lambda a, b: a * fill(np.float32(3)), lambda a, b: a * np.float32(3)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_of_vectors_is_the_formula_of_their_lanes(name: str) -> None:
    formula, expected = FORMULAS[name]
    compiled = njit(formula)

    @njit
    def apply(a, b, out):
        for index in range(a.size // WIDTH):
            store(out, index, compiled(load(a, index), load(b, index)))

    a, b = np.random.default_rng(0).standard_normal((2, 3 * WIDTH), np.float32)
    b[5] = a[5]
    out = np.empty_like(a)
    apply(a, b, out)
    np.testing.assert_array_equal(out, expected(a, b))


def test_anywhere_sees_each_lane() -> None:
    @njit
    def exceeds(a, limit):
        return anywhere(load(a, 0) > fill(limit))

    values = np.zeros(WIDTH, np.float32)
    assert not exceeds(values, np.float32(0))
    for lane in range(WIDTH):
        values[:] = 0
        values[lane] = 1
        assert exceeds(values, np.float32(0))
