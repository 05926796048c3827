"""Experiments that can be repeated: the paper's own, and the privacy table."""
