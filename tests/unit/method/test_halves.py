"""Both halves: shapes, what crosses the cut backwards, and where the work is done."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from splitward.method.halves import ClientHalf, NetworkSettings, ServerHalf, StreamOutputs, build_server


def settings_for(size: str, side: int, **changes) -> NetworkSettings:
    return replace(NetworkSettings(size, 1, side, 4, mapped=True, recovery="svt"), **changes)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("values", [0, 16])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("size", "side"), [("small", 28), ("small", 64), ("residual", 28), ("residual", 64)])
@torch.no_grad()
def test_shapes(size, side, mapped, values, channels):
    check_shapes(settings_for(size, side, channels=channels, mapped=mapped, values=values), batch=2)


@pytest.mark.parametrize("values", [0, 64])
@torch.no_grad()
def test_shapes_at_224_pixels(values):
    check_shapes(settings_for("residual", 224, channels=3, values=values), batch=1)


def check_shapes(settings: NetworkSettings, batch: int) -> None:
    client, server = ClientHalf(settings).eval(), ServerHalf(settings).eval()
    entering = settings.channels * (2 if settings.mapped else 1)
    released = client(torch.rand(batch, entering, settings.side, settings.side))
    assert released.shape == (batch, *settings.release_shape)
    if settings.values:
        assert released.shape == (batch, settings.values)
        assert released.abs().max() <= 1
    outputs = server(released)
    assert isinstance(outputs, StreamOutputs)
    assert all(scores.shape == (batch, settings.classes) for scores in outputs)
    torch.testing.assert_close(outputs.decision.sum(1), torch.ones(batch))


@pytest.mark.parametrize("side", [4, 30, 29])
def test_sides_that_do_not_fit_are_refused(side):
    with pytest.raises(ValueError, match="multiple of 4"):
        settings_for("small", side)


@pytest.mark.parametrize("size", ["small", "residual"])
@pytest.mark.parametrize("recovery", ["svt", "low_rank_sparse"])
@pytest.mark.parametrize("values", [0, 16])
def test_only_the_fused_stream_reaches_the_client(size, recovery, values):
    settings = settings_for(size, 8, recovery=recovery, values=values)
    server = ServerHalf(settings)
    released = torch.randn(4, *settings.release_shape, requires_grad=True)
    outputs = server(released)

    def at_the_cut(scores: torch.Tensor) -> torch.Tensor | None:
        return torch.autograd.grad(scores[:, 0].sum(), released, allow_unused=True, retain_graph=True)[0]

    assert at_the_cut(outputs.attacked) is None
    assert at_the_cut(outputs.recovered) is None
    assert at_the_cut(outputs.fused).abs().max() > 0


def test_the_fused_stream_learns_through_the_recovery():
    """The recovery is not cut off: what reaches the cut differs from a path through the attacked copy alone."""
    settings = settings_for("small", 8)
    server = ServerHalf(settings)
    released = torch.randn(2, *settings.release_shape, requires_grad=True)
    v = server.recovery(released)
    (whole,) = torch.autograd.grad(server.fused(server.fusion(released, v)).sum(), released)
    (without,) = torch.autograd.grad(server.fused(server.fusion(released, v.detach())).sum(), released)
    (found,) = torch.autograd.grad(server(released).fused.sum(), released)
    torch.testing.assert_close(found, whole)
    assert (whole - without).abs().max() > 1e-6


@pytest.mark.parametrize(("values", "times"), [(0, 20), (64, 10)])
@pytest.mark.parametrize("side", [64, 224])
def test_the_residual_server_half_does_most_of_the_work(side, values, times):
    settings = settings_for("residual", side, values=values)
    client, server = ClientHalf(settings), ServerHalf(settings)
    assert parameters(server) >= times * parameters(client)
    frame = torch.rand(1, 2, side, side)
    on_device = multiply_adds(client, frame)
    on_server = multiply_adds(server, torch.rand(1, *settings.release_shape))
    assert on_server >= times * on_device


def parameters(half: nn.Module) -> int:
    return sum(parameter.numel() for parameter in half.parameters())


@torch.no_grad()
def multiply_adds(half: nn.Module, value: torch.Tensor) -> int:
    """Multiply-adds of the convolutions and dense layers in one forward pass."""
    counted = 0

    def count(module: nn.Module, _: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal counted
        counted += module.weight[0].numel() * output[0].numel()

    for module in half.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    half.eval()(value)
    return counted


@pytest.mark.parametrize("size", ["small", "residual"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mapped", [False, True])
@torch.no_grad()
def test_the_folded_client_equals_the_unfolded(size, channels, mapped):
    settings = settings_for(size, 28, channels=channels, mapped=mapped, values=16)
    client = ClientHalf(settings).double().eval()
    frame = torch.rand(2, channels * (2 if mapped else 1), 28, 28, dtype=torch.float64)
    plain = client(frame)
    client.fold()
    torch.testing.assert_close(client(frame), plain, rtol=0, atol=1e-12)


def test_a_server_half_is_built_from_a_cards_fields():
    fields = {"size": "small", "channels": 1, "side": 8, "classes": 3, "mapped": False, "values": 4}
    assert build_server(fields).settings == NetworkSettings(**fields)
    with pytest.raises(TypeError):
        build_server(fields | {"depth": 3})
    with pytest.raises(ValueError, match="multiple of 4"):
        build_server(fields | {"side": 9})
