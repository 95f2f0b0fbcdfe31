"""Splits cover every row once, and discrete values are told from others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels.data.partition import check_levels, off_levels, partition, proposal_for
from genmodels.registry import ConfigError, build
from genmodels.rng import BatchNoise, generator
from genmodels.transforms import Transform


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 400), val=st.floats(0, 0.45), test=st.floats(0, 0.45), order=st.sampled_from(["file", "shuffled"])
)
def test_every_row_is_in_one_split_whose_size_is_the_stated_one(n, val, test, order):
    rows = partition(n, val, test, order, 0, "here")
    n_test = int(test * n)
    assert [len(rows[split]) for split in ("val", "test")] == [int(val * (n - n_test)), n_test]
    together = torch.cat([rows["train"], rows["val"], rows["test"]])
    assert sorted(together.tolist()) == list(range(n))
    if order == "file":
        assert torch.equal(together, torch.arange(n))


def test_the_default_shares_are_those_of_the_literature():
    """The rows that the splits of POWER and GAS have wherever these data are used."""
    for n, sizes in ((2_049_280, (1_659_917, 184_435, 204_928)), (1_052_065, (852_174, 94_685, 105_206))):
        assert tuple(map(len, partition(n, 0.1, 0.1, "file", 0, "here").values())) == sizes


def test_values_beside_the_levels_are_found():
    x = torch.tensor(
        [
            [0.0, 0.25],
            [0.5, 0.75],
            [0.5, 1.0],
            [-0.25, 0.0],
            [0.125, 0.5],
            [0.25001, 0.0],
            [torch.nan, 0.0],
            [0.26, 0.0],
        ]
    )
    assert off_levels(x, 4, 0.25).tolist() == [False, False, True, True, True, False, True, True]
    eighths = torch.arange(256).reshape(-1, 1) / 255  # as images are stored that were divided by 255
    assert not off_levels(eighths, 256, 1 / 255).any() and off_levels(eighths, 255, 1 / 255).sum() == 1


def test_the_proposal_for_levels_fills_the_interval():
    x = torch.arange(4).reshape(-1, 1) * 0.25
    transform = build(Transform, proposal_for(4, 0.25), shape=(1,))
    y, _ = transform(x.repeat(500, 1), BatchNoise(2000, generator=generator("y")))
    assert -1 <= y.min() < -0.99 and 0.99 < y.max() < 1
    # half a bin at the middle of each of four bins of [-1, 1)
    torch.testing.assert_close(transform(x)[0].ravel(), torch.tensor([-0.75, -0.25, 0.25, 0.75]))
    assert proposal_for(None, 1.0) == {"name": "standardize"}


@pytest.mark.parametrize(("levels", "width"), [(1, 1.0), (None, 0.0), (256, -1.0)])
def test_impossible_levels_are_refused(levels, width):
    with pytest.raises(ConfigError, match=rf"here: at least 2 levels .*levels={levels} and bin_width={width:g}"):
        check_levels(levels, width, "here")
