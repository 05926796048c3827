from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitward.data.dataset import FRACTIONS, Split, as_float, split_by_patient, split_images, stack_images
from splitward.errors import DataError

rows = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=120)
shares = st.lists(st.floats(0.05, 1), min_size=1, max_size=4).map(lambda parts: [p / sum(parts) for p in parts])


@given(rows, shares, st.integers(0, 2**31))
def test_no_patient_is_ever_in_two_splits(pairs, fractions, seed):
    patients, labels = np.array(pairs, np.int64).T
    if len(set(patients.tolist())) < len(fractions):
        with pytest.raises(DataError, match="patients cannot fill"):
            split_by_patient(patients, labels, fractions, seed)
        return
    splits = split_by_patient(patients, labels, fractions, seed)
    assert sorted(np.concatenate(splits).tolist()) == list(range(len(pairs)))
    held = [set(patients[chosen].tolist()) for chosen in splits]
    assert all(held)
    assert sum(map(len, held)) == len(set(patients.tolist()))
    again = split_by_patient(patients, labels, fractions, seed)
    assert all(np.array_equal(a, b) for a, b in zip(splits, again, strict=True))


@given(st.lists(st.integers(20, 120), min_size=1, max_size=4), st.integers(0, 2**31))
def test_classes_keep_their_shares_where_each_patient_has_one_image(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    splits = split_by_patient(np.arange(len(labels)), labels, FRACTIONS, seed)
    for chosen, fraction in zip(splits, FRACTIONS, strict=True):
        found = np.bincount(labels[chosen], minlength=len(counts))
        assert np.abs(found - fraction * np.array(counts)).max() <= 1


def test_another_seed_deals_other_patients():
    patients, labels = np.arange(100), np.arange(100) % 2
    first, second = (split_by_patient(patients, labels, FRACTIONS, seed)[2].tolist() for seed in (1, 2))
    assert first != second


def test_identifiers_do_not_matter_only_who_is_who():
    names = np.array(["z", "a", "z", "m", "q", "a"])
    numbers = np.array([3, 0, 3, 1, 2, 0])
    labels = np.array([0, 1, 0, 1, 0, 1])
    by_name, by_number = (split_by_patient(ids, labels, FRACTIONS, 5) for ids in (names, numbers))
    assert all(np.array_equal(a, b) for a, b in zip(by_name, by_number, strict=True))


def test_no_image_at_all_is_a_data_error():
    none = np.zeros(0, np.int64)
    with pytest.raises(DataError, match="0 patients"):
        split_by_patient(none, none, FRACTIONS, 0)


def test_split_images_keeps_rows_together():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    for split in split_images(images, np.arange(40) % 2, np.arange(40) // 2, 0):
        assert np.array_equal(split.images[:, 0, 0, 0] % 2, split.labels)
        assert np.array_equal(split.images[:, 0, 0, 0] // 2, split.patients)
        assert len(split) == len(split.labels)


def test_stacking_widens_without_changing_what_a_model_sees():
    grey, deep, colour = (
        np.full((1, 2, 2), 51, np.uint8),
        np.full((1, 2, 2), 13107, np.uint16),
        np.full((3, 2, 2), 51, np.uint8),
    )
    assert stack_images([grey, grey]).dtype == np.uint8
    stacked = stack_images([grey, deep, colour])
    assert (stacked.dtype, stacked.shape) == (np.uint16, (3, 3, 2, 2))
    assert np.all(as_float(stacked) == as_float(grey).max())


def test_splits_are_frozen():
    split = Split(np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int64), np.zeros(1, np.int64))
    with pytest.raises(AttributeError):
        split.labels = np.ones(1, np.int64)
