"""Whether recovery and fusion raise accuracy under noise: server halves trained anew on one trained client half.

What reaches the server is the same for all variants: the client half is frozen, its clean values are computed once, and
the noise of each step and of the evaluation is drawn from the same seeds. A difference is then the server's doing.

Variants differ in the recovered stream only, but for two controls: `attacked alone` is one stream whose own gradient
trains the expansion, and `three attacked` are three of them, which says how much of a gain three classifiers make by
being three. Figures are of validation data.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from splitward.audit.ledger import Ledger
from splitward.audit.target import open_target
from splitward.data import Dataset, Split
from splitward.errors import AuditError
from splitward.method.fusion import decision_fusion, rank_weights
from splitward.method.halves import NetworkSettings, ServerHalf, StreamOutputs
from splitward.method.recovery import MU, Recovery, svt
from splitward.method.sealing import Seal
from splitward.reproduce.plan import PLANS, TARGET_SEEDS
from splitward.reproduce.privacy import open_plan
from splitward.reproduce.privacy_page import streams_page
from splitward.training.loop import NOISE_SEED, frames_of, reproducible, to_unit
from splitward.training.run import open_run, write_atomically
from splitward.versions import versions

STREAMS = ("attacked", "recovered", "fused")
SEEDS = (0, 1, 2)
SETS = {"mnist": 2, "pneumoniamnist": 15}
"""Data sets, and passes over their training values for each server half."""
BITS = (8, 6, 4, 3, 2)
_BATCH, _RATE, _CHUNK = 128, 3e-3, 500


class LearnedThreshold(nn.Module):
    """SVT whose threshold is trained, from the paper's mu on."""

    def __init__(self, channels: int, height: int) -> None:
        super().__init__()
        del channels, height
        self.log_mu = nn.Parameter(torch.tensor(MU).log())

    def forward(self, activation: Tensor) -> Tensor:
        """[B, K, h, w] to the same shape."""
        return svt(activation.flatten(2), self.log_mu.exp()).view_as(activation)


class Unrolled(nn.Module):
    """Three proximal gradient steps with a step length, a threshold and a 1x1 convolution of their own (after LISTA,
    Gregor and LeCun, ICML 2010)."""

    STEPS = 3

    def __init__(self, channels: int, height: int) -> None:
        super().__init__()
        del height
        self.log_mu = nn.Parameter(torch.full((self.STEPS,), MU).log())
        self.mixes = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(self.STEPS))
        for mix in self.mixes:
            nn.init.dirac_(mix.weight)  # type: ignore[arg-type]  # a module's attribute
            nn.init.zeros_(mix.bias)  # type: ignore[arg-type]  # likewise

    def forward(self, activation: Tensor) -> Tensor:
        """[B, K, h, w] to the same shape."""
        recovered = torch.zeros_like(activation)
        for mix, log_mu in zip(self.mixes, self.log_mu, strict=True):
            ahead = recovered + mix(activation - recovered)
            recovered = svt(ahead.flatten(2), log_mu.exp()).view_as(activation)
        return recovered


class ByRows(nn.Module):
    """SVT with a trained threshold on the other unfolding: h rows of K*w values."""

    def __init__(self, channels: int, height: int) -> None:
        super().__init__()
        del channels, height
        self.log_mu = nn.Parameter(torch.tensor(MU).log())

    def forward(self, activation: Tensor) -> Tensor:
        """[B, K, h, w] to the same shape."""
        rows = activation.transpose(1, 2)
        return svt(rows.flatten(2), self.log_mu.exp()).view_as(rows).transpose(1, 2)


class Residual(nn.Module):
    """No proximal step at all, but as many weights: two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, height: int) -> None:
        super().__init__()
        del height
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, activation: Tensor) -> Tensor:
        """[B, K, h, w] to the same shape."""
        made: Tensor = activation + self.body(activation)
        return made


Made = Callable[[int, int], nn.Module]
VARIANTS: dict[str, Made | None] = {
    "attacked alone": None,
    "three attacked": None,
    "svt": lambda channels, height: Recovery("svt"),  # noqa: ARG005  # as the paper has it, whatever the shape
    "low rank + sparse": lambda channels, height: Recovery("low_rank_sparse"),  # noqa: ARG005  # likewise
    "svt, learned threshold": LearnedThreshold,
    "svt by rows, learned threshold": ByRows,
    "unrolled, learned": Unrolled,
    "convolutions instead": Residual,
}


class Server(nn.Module):
    """A server half of `settings` in a variant; forward gives the logits of its three streams."""

    def __init__(self, settings: NetworkSettings, variant: str) -> None:
        super().__init__()
        self.settings, self.variant, made = settings, variant, VARIANTS[variant]
        self.server = ServerHalf(settings)
        if made is not None:
            self.server.recovery = made(*settings.server_shape[:2])  # type: ignore[assignment]  # a variant

    def forward(self, released: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, values] to three times [B, classes]."""
        server = self.server
        if VARIANTS[self.variant] is not None:
            outputs: StreamOutputs = server(released)
            return outputs.attacked, outputs.recovered, outputs.fused
        u = server.expand(released).view(-1, *self.settings.server_shape) if server.expand else released
        first: Tensor = server.attacked(u)
        if self.variant == "attacked alone":
            return first, first, first
        return first, server.recovered(u.detach()), server.fused(u.detach())


def compare_streams(only: Sequence[str], out: Path, runs: Path, data: Path, *, command: str) -> dict[str, Any]:
    """Every variant on the first `sealed` network of each data set, in OUT/streams.json.

    Resumed from OUT/streams/NAME.jsonl. The networks are those of the privacy table, in RUNS/privacy.
    """
    found: dict[str, Any] = {}
    for name in only:
        folder = runs / "privacy" / f"{name}-sealed-{TARGET_SEEDS[0]}"
        ledger = Ledger(
            out / "streams" / f"{name}.jsonl",
            {"run": open_target(folder).fingerprint, "epochs": SETS[name], "batch": _BATCH, "rate": _RATE},
        )
        rows = _on_run(folder, open_plan(PLANS[name], data, TARGET_SEEDS[0]), SETS[name], ledger)
        found[name] = {variant: _summarise(results) for variant, results in rows.items()}
    results = {**found, "seeds": list(SEEDS), "command": command, "versions": versions()}
    write_atomically(out / "streams.json", json.dumps(results, indent=2) + "\n")
    write_atomically(out / "streams.md", streams_page(results))
    return results


def _on_run(folder: Path, dataset: Dataset, epochs: int, ledger: Ledger) -> dict[str, list[dict[str, Any]]]:
    missing = [(name, seed) for name in VARIANTS for seed in SEEDS if ledger.find(_key(name, seed)) is None]
    if missing:
        values, settings = _values(folder, dataset), open_run(folder).settings.split.network
        for name, seed in missing:
            result = _try(settings, name, values, epochs, seed)
            ledger.append(_key(name, seed), result)
            sys.stdout.write(f"{folder.name} {name} {seed}: decision {result['decision']:.4f}\n")
            sys.stdout.flush()
    return {name: [_found(ledger, name, seed) for seed in SEEDS] for name in VARIANTS}


def _key(variant: str, seed: int) -> dict[str, Any]:
    return {"variant": variant, "seed": seed}


def _found(ledger: Ledger, variant: str, seed: int) -> dict[str, Any]:
    result = ledger.find(_key(variant, seed))
    assert result is not None  # noqa: S101  # all are done by now
    return result


class _Values:
    """Clean values and labels of two splits, and how they are released."""

    def __init__(self, seal: Seal, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> None:
        self.seal, self.train, self.validation = seal, train, validation


@torch.no_grad()
def _values(folder: Path, dataset: Dataset) -> _Values:
    network = open_run(folder).load_network()
    if network.seal is None:
        raise AuditError(f"{folder}: is not sealed: without noise there is nothing to recover from.")

    def clean(split: Split) -> tuple[Tensor, Tensor]:
        chunks = to_unit(frames_of(split)).split(_CHUNK)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        values = torch.cat([network.client(network.attack(frames)) for frames in chunks])
        return values, torch.from_numpy(split.labels)

    return _Values(network.seal, clean(dataset.train), clean(dataset.validation))


def _try(settings: NetworkSettings, variant: str, values: _Values, epochs: int, seed: int) -> dict[str, Any]:
    """Validation accuracy of each stream and of the decision, and of the decision with fewer bits a value."""
    clean, labels = values.train
    with reproducible(seed):
        server = Server(settings, variant).train()
        optimiser = torch.optim.AdamW(server.parameters(), _RATE, weight_decay=1e-2)
        steps = epochs * (len(labels) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps + 1)
        for _ in range(steps):
            rows = torch.randint(len(labels), (_BATCH,))
            logits = server(values.seal(clean[rows]))
            loss = sum((F.cross_entropy(stream, labels[rows]) for stream in logits), torch.zeros(()))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimiser.step()
            schedule.step()
    return _evaluate(server.eval(), values)


@torch.no_grad()
def _evaluate(server: Server, values: _Values) -> dict[str, Any]:
    clean, labels = values.validation
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    released = values.seal(clean, noise)

    def logits_of(released: Tensor) -> list[Tensor]:
        chunks = [server(chunk) for chunk in released.split(_CHUNK)]  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return [torch.cat(stream) for stream in zip(*chunks, strict=True)]

    streams = logits_of(released)
    hits = [float((stream.argmax(1) == labels).double().mean()) for stream in streams]
    weights = torch.tensor(rank_weights(hits))

    def decision(streams: list[Tensor]) -> float:
        scores = torch.stack([stream.softmax(1) for stream in streams], dim=1)
        return float((decision_fusion(scores, weights).argmax(1) == labels).double().mean())

    reach = float(released.abs().max())
    return dict(zip(STREAMS, hits, strict=True)) | {
        "decision": decision(streams),
        "decision_by_bits": {str(bits): decision(logits_of(coarse(released, bits, reach))) for bits in BITS},
    }


def coarse(released: Tensor, bits: int, reach: float) -> Tensor:
    """Released values rounded to `2^bits - 1` steps within +-reach: what fewer bits on the wire would leave."""
    most: int = 2 ** (bits - 1) - 1
    step = reach / (most + 0.5)
    return (released / step).round().clamp(-most, most).mul(step)


def _summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    row: dict[str, Any] = {}
    for name in (*STREAMS, "decision"):
        accuracies = [result[name] for result in results]
        row[name] = round(fmean(accuracies), 5)
        row[f"{name}_std"] = round(stdev(accuracies), 5)
    row["decision_by_bits"] = {
        bits: round(fmean(result["decision_by_bits"][bits] for result in results), 5)
        for bits in results[0]["decision_by_bits"]
    }
    return row
