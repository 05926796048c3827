"""Error of the recovery against mu, as in the paper's Fig. 3.

The paper gives no formula for its MSE. Ours: the mean squared difference, on the server, of the activation recovered
from the attacked frame and the clean one, which the client half makes of the frame as it is, with a map of zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitward.audit.target import switch_map_off
from splitward.method.recovery import MU, low_rank_sparse, svt
from splitward.method.split import SplitNetwork

MUS = (*(round(0.05 * step, 2) for step in range(1, 21)), 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
NOISES = (0.0, 0.5)
"""Noise on the attacked activation, in standard deviations of the clean one; 0 is the paper's case."""
_STEPS, _TOLERANCE = 200, 1e-5


@torch.no_grad()
def sweep_mu(network: SplitNetwork, frames: Tensor, *, seed: int = 0) -> list[dict[str, Any]]:
    """One curve for each recovery and noise: `method`, `noise`, `mse` by mu, `unrecovered_mse` and `best_mu`.

    Parameters
    ----------
    network : SplitNetwork
        Trained, with a map and without a bottleneck.
    frames : Tensor, [B, C, H, W] in 0..1
        Not from the training data.
    """
    clean = switch_map_off(network).eval()
    wanted = clean.client(clean.attack(frames)).flatten(2)
    attacked = network.client(network.attack(frames)).flatten(2)
    drawn = torch.randn(attacked.shape, generator=torch.Generator().manual_seed(seed))
    curves = []
    for noise in NOISES:
        Z = attacked + noise * wanted.std() * drawn
        for method in ("svt", "low_rank_sparse"):
            errors = {mu: float((_recover(Z, method, mu) - wanted).square().mean()) for mu in MUS}
            curves.append(
                {
                    "method": method,
                    "noise": noise,
                    "unrecovered_mse": float((Z - wanted).square().mean()),
                    "mse": {f"{mu:g}": error for mu, error in errors.items()},
                    "best_mu": min(errors, key=lambda mu: errors[mu]),
                }
            )
    return curves


def _recover(Z: Tensor, method: str, mu: float) -> Tensor:
    if method == "svt":
        return svt(Z, mu)
    return low_rank_sparse(Z, mu, steps=_STEPS, tolerance=_TOLERANCE)[0]


def draw_errors(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel for each data set and noise, as a PNG."""
    from matplotlib.figure import Figure  # here, so that only drawing loads matplotlib

    panels = [(data, noise) for data in curves for noise in NOISES]
    figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
    for axes, (data, noise) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for curve in (curve for curve in curves[data] if curve["noise"] == noise):
            axes.plot([float(mu) for mu in curve["mse"]], list(curve["mse"].values()), label=curve["method"])
        axes.axhline(curve["unrecovered_mse"], color="black", linestyle=":", label="not recovered")
        axes.axvline(MU, color="grey", linewidth=0.8, label=f"the paper's {MU}")
        case = f"with noise of {noise:g} deviations" if noise else "without noise"
        axes.set(title=f"{data}, {case}", xlabel="mu", ylabel="MSE", xscale="log", yscale="log")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
