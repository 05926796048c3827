"""Labelled images for training and audits: one loader per format behind `open_dataset`."""

from __future__ import annotations

from splitward.data.catalogue import open_dataset
from splitward.data.dataset import Dataset, Split, as_float, split_by_patient

__all__ = ["Dataset", "Split", "as_float", "open_dataset", "split_by_patient"]
