"""One training set dealt out to several sites by patient: alike, or each with its own mixture of classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from splitward.data.dataset import Split
from splitward.errors import DataError

ATTEMPTS = 1000


def partition(
    split: Split, sites: int, *, alpha: float | None = None, least: int = 64, seed: int = 0
) -> list[Split]:
    """Deal out the images of `split`; no two sites share a patient.

    Parameters
    ----------
    sites : int
    alpha : float, optional
        Concentration of the Dirichlet distribution from which each class's shares over the sites are drawn (Hsu,
        Qi and Brown 2019): the smaller, the less alike. Without it patients are dealt out evenly.
    least : int
        Images that every site has; the draw is made again until it is so.
    seed : int

    Raises
    ------
    DataError
        No draw gives every site so many images.
    """
    draw = np.random.default_rng(seed)
    patients, first = np.unique(split.patients, return_index=True)
    labels = split.labels[first]  # a patient's images go together, by the first one's class
    for _ in range(ATTEMPTS):
        owner = np.empty(len(patients), np.int64)
        for label in np.unique(labels):
            rows = draw.permutation(np.flatnonzero(labels == label))
            shares = np.full(sites, 1 / sites) if alpha is None else draw.dirichlet(np.full(sites, alpha))
            ends = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
            for site, part in enumerate(np.split(rows, ends)):
                owner[part] = site
        site_of = owner[np.searchsorted(patients, split.patients)]
        if np.bincount(site_of, minlength=sites).min() >= least:
            return [_rows(split, np.flatnonzero(site_of == site)) for site in range(sites)]
    raise DataError(
        f"{len(split)} images of {len(patients)} patients cannot be dealt out to {sites} sites with {least} each. "
        "Take fewer sites, or a greater alpha."
    )


def _rows(split: Split, rows: NDArray[np.int64]) -> Split:
    return Split(split.images[rows], split.labels[rows], split.patients[rows])
