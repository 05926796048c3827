"""Singular value thresholding against the same by `torch.linalg.svd`, one thread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternate
from splitward.method.recovery import MU, svt

SHAPE = (64, 32, 196)


def by_svd(Z: Tensor) -> Tensor:
    """The peer: thresholds the singular values of a full decomposition."""
    U, singular, V = torch.linalg.svd(Z, full_matrices=False)
    recovered: Tensor = (U * (singular - MU).clamp_min(0).unsqueeze(-2)) @ V
    return recovered


def measure_recovery(repeats: int) -> dict[str, Any]:
    """Median seconds of both, their ratio, and how far their results are apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            ours_s, peer_s = alternate((lambda: svt(Z), lambda: by_svd(Z)), repeats)
            apart = float((svt(Z) - by_svd(Z)).abs().max() / Z.abs().max())
    finally:
        torch.set_num_threads(threads)
    return {
        "speedup": round(peer_s / ours_s, 2),
        "shape": list(SHAPE),
        "svt_ms": round(1e3 * ours_s, 3),
        "linalg_svd_ms": round(1e3 * peer_s, 3),
        "max_relative_difference": apart,
    }
