"""The comparison of server halves on a small synthetic data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from splitward.data import open_dataset
from splitward.errors import AuditError
from splitward.method.halves import NetworkSettings
from splitward.reproduce import streams
from splitward.reproduce.plan import Plan
from splitward.reproduce.streams import STREAMS, VARIANTS, Server, coarse, compare_streams
from splitward.training.loop import train
from splitward.training.settings import RunSettings, split_settings


def network(profile: str, folder: Path) -> Path:
    dataset = open_dataset("phantom", task="mass", size=28)
    settings = RunSettings("phantom", "mass", 28, split_settings(dataset, profile), epochs=1, batch=64)
    return train(dataset, settings, folder, progress=False).folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("phantom", "phantom", "mass", 28, epochs=1, batch=64, shift=0)
    monkeypatch.setattr(streams, "PLANS", {"phantom": plan})
    monkeypatch.setattr(streams, "SETS", {"phantom": 1})
    monkeypatch.setattr(streams, "SEEDS", (0, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_three_streams_and_trains(variant: str) -> None:
    torch.manual_seed(0)
    server = Server(NetworkSettings("small", 1, 28, 3, mapped=True, values=16), variant)
    logits = server(torch.randn(5, 16))
    assert [stream.shape for stream in logits] == [(5, 3)] * 3
    sum(stream.sum() for stream in logits).backward()
    recovery = [weight.grad for weight in server.server.recovery.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in recovery)


def test_all_variants_are_compared_and_a_finished_one_is_not_done_again(small, tmp_path, monkeypatch) -> None:
    network("sealed", tmp_path / "runs" / "privacy" / "phantom-sealed-0")
    found = compare_streams(["phantom"], tmp_path, tmp_path / "runs", tmp_path, command="splitward")
    assert json.loads((tmp_path / "streams.json").read_text()) == found
    assert found["phantom"].keys() == VARIANTS.keys()
    for row in found["phantom"].values():
        assert all(0 <= row[name] <= 1 for name in (*STREAMS, "decision"))
        assert row["decision_by_bits"].keys() == {"8", "6", "4", "3", "2"}
    alone = found["phantom"]["attacked alone"]
    assert alone["attacked"] == alone["fused"] == alone["decision"]
    monkeypatch.setattr(streams, "_try", None)
    again = compare_streams(["phantom"], tmp_path, tmp_path / "runs", tmp_path, command="splitward")
    assert again == found


def test_without_noise_there_is_nothing_to_compare(small, tmp_path) -> None:
    network("none", tmp_path / "runs" / "privacy" / "phantom-sealed-0")
    with pytest.raises(AuditError, match="is not sealed"):
        compare_streams(["phantom"], tmp_path, tmp_path / "runs", tmp_path, command="splitward")


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_fewer_bits_leave_as_many_values_and_no_more(bits: int) -> None:
    values = torch.linspace(-2, 2, 4001)
    rounded = coarse(values, bits, 2.0)
    assert len(rounded.unique()) == 2**bits - 1
    assert (rounded - values).abs().max() <= 2.0 / (2 ** (bits - 1) - 0.5) / 2 + 1e-6
