"""Padding, thinning and scaling of series of unequal lengths."""

import math

import pytest
import torch

from genmodels.data.padded import rescaled, scales, stack, thinned
from genmodels.rng import SeedNoise


def test_shorter_series_repeat_their_last_time_unseen():
    short = (torch.tensor([[1.0], [9.0]]), torch.tensor([0.25, 0.5]).double(), torch.tensor([[True], [False]]))
    long = (torch.ones(4, 1), torch.arange(4).double(), torch.ones(4, 1, dtype=torch.bool))
    x, times, mask = stack([short, long])
    assert times.tolist() == [[0.25, 0.5, 0.5, 0.5], [0, 1, 2, 3]]
    assert x[..., 0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]  # the unseen 9 is gone
    assert mask[..., 0].tolist() == [[True, False, False, False], [True] * 4]


def test_whole_steps_are_lost_of_those_that_were_seen():
    mask = torch.zeros(3000, 10, 2, dtype=torch.bool)
    mask[:, :8, 0] = mask[:, 2:8, 1] = True
    mask[0] = False
    mask[0, 9, 1] = True
    left = thinned(mask, 0.5, SeedNoise(3000))
    steps = left.any(2)
    assert (steps[1:].sum(1) == 4).all() and torch.equal(left[0], mask[0])  # one at least is left
    assert torch.equal(left, mask & steps[..., None])
    assert ((steps[1:, :8].double().mean(0) - 0.5).abs() < 4.5 * 0.5 / math.sqrt(3000)).all()
    assert torch.equal(thinned(mask, 0.0, SeedNoise(3000)), mask)


@pytest.mark.parametrize("kind", ["standard", "minmax"])
def test_scales_are_of_observed_values_alone(kind):
    x = torch.tensor([[[2.0, 0.1, 3.0], [4.0, 0.1, 7.0]], [[9.0, 0.1, 0.0], [99.0, -99.0, 0.0]]]).double()
    mask = torch.tensor([[[1, 1, 0], [1, 1, 0]], [[1, 1, 0], [0, 0, 0]]]).bool()
    offset, scale = scales(x, mask, kind)
    y = rescaled(x, mask, offset, scale)
    assert y.dtype == torch.float32 and (y[~mask] == 0).all() and (y[..., 1:].abs() < 1e-9).all()
    if kind == "standard":  # of 2, 4, 9: mean 5, variance (9 + 1 + 16)/3
        assert offset.tolist() == pytest.approx([5, 0.1, 0])
        assert scale.tolist() == pytest.approx([math.sqrt(26 / 3), 1, 1])
    else:
        assert offset.tolist() == pytest.approx([2, 0.1, 0]) and scale.tolist() == [7, 1, 1]
        assert y[mask[..., 0], 0].tolist() == pytest.approx([0, 2 / 7, 1])
