"""Space to depth hides nothing, and the folded stem equals what it folds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import pixel_shuffle

from splitward.method.downsample import FACTOR, fold_stem, space_to_depth, with_map


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 28, 28), (1, 2, 6, 10)])
def test_downsampling_is_a_bijection(shape):
    frame = torch.randn(shape)
    cells = space_to_depth(frame)
    assert cells.shape == (shape[0], 4 * shape[1], shape[2] // 2, shape[3] // 2)
    assert torch.equal(pixel_shuffle(cells, FACTOR), frame)
    assert torch.equal(space_to_depth(pixel_shuffle(cells, FACTOR)), cells)
    assert sorted(cells.flatten().tolist()) == sorted(frame.flatten().tolist())


def test_channels_are_the_four_pixels_of_each_cell():
    frame = torch.arange(16.0).view(1, 1, 4, 4)
    assert space_to_depth(frame)[0, :, 0, 0].tolist() == [0, 1, 4, 5]


def test_the_map_is_appended_as_one_channel_of_cell_means():
    frame, unit_map = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)
    unit_map[0, :, :2, 2:] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    unit_map[0, 1, 0, 3] = 4
    entered = with_map(frame, unit_map)
    assert entered.shape == (1, 9, 2, 2)
    assert entered[0, 8].tolist() == [[0, 1.0], [0, 0]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_folded_stem_equals_what_it_folds(channels, mapped, bias):
    torch.manual_seed(channels)
    stem = nn.Conv2d(4 * channels + mapped, 16, 3, padding=1, bias=bias, dtype=torch.float64)
    frame = torch.randn(2, channels, 12, 20, dtype=torch.float64)
    unit_map = torch.rand_like(frame)
    entered = with_map(frame, unit_map) if mapped else space_to_depth(frame)
    folded = fold_stem(stem, channels, mapped)
    output = folded(torch.cat((frame, unit_map), dim=1) if mapped else frame)
    torch.testing.assert_close(output, stem(entered), rtol=0, atol=1e-12)


@pytest.mark.parametrize("changed", [{"kernel_size": 5}, {"stride": 2}, {"padding": 0}, {"groups": 2}])
def test_another_stem_is_refused(changed):
    with pytest.raises(ValueError, match="3x3 convolution"):
        fold_stem(
            nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1} | changed),
            1,
            False,
        )
