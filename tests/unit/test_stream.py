"""The training stream is a function of (seed, step), and what is seen does not depend on the number of processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels.data.dataset import Dataset
from genmodels.data.stream import check_batch, indices, share, stream
from genmodels.registry import ConfigError
from genmodels.types import Batch

SEEDS = st.integers(0, 2**40)


@st.composite
def sizes(draw):
    size = draw(st.integers(1, 60))
    return size, draw(st.integers(1, size))


class Numbers(Dataset):
    """Items that are their own index."""

    shape = ()
    registered_name = "numbers"

    def __init__(self, n: int) -> None:
        self.n = n

    def size(self, split):
        return self.n if split == "train" else 1

    def take(self, split, rows):
        assert split == "train"
        return Batch(rows.float())


@settings(max_examples=30, deadline=None)
@given(SEEDS, sizes(), st.integers(1, 4))
def test_every_epoch_covers_the_data_exactly_once(seed, shape, epochs):
    size, batch = shape
    steps = -(-epochs * size // batch)
    seen = torch.cat([indices(seed, k, batch, size) for k in range(steps)])
    for epoch in seen[: epochs * size].reshape(epochs, size):
        assert epoch.sort().values.tolist() == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [indices(seed, k, 50, 50).tolist() for seed in (0, 1) for k in range(3)]
    assert len({tuple(order) for order in orders}) == 6


def test_the_order_of_a_seed_is_fixed():
    # a change of these numbers is a change of every run's data order, and belongs in the changelog
    assert indices(0, 0, 8, 10).tolist() == [3, 9, 2, 6, 4, 0, 8, 7]
    assert indices(0, 1, 8, 10).tolist() == [5, 1, 0, 5, 1, 7, 8, 6]


@settings(max_examples=30, deadline=None)
@given(SEEDS, sizes(), st.integers(0, 30), st.integers(0, 30))
def test_resuming_gives_the_identical_remainder(seed, shape, start, more):
    size, batch = shape
    whole = [rows[0].x.tolist() for _, rows in stream(Numbers(size), seed, batch, 0, start + more)]
    rest = [(k, rows[0].x.tolist()) for k, rows in stream(Numbers(size), seed, batch, start, start + more)]
    assert [k for k, _ in rest] == list(range(start, start + more))
    assert [rows for _, rows in rest] == whole[start:]


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 40), st.integers(0, 5))
def test_what_is_seen_does_not_depend_on_the_number_of_processes(seed, world, parts, each, extra, step):
    batch = world * parts * each
    data = Numbers(batch + extra)

    def micro_batches(world):
        ranks = [next(stream(data, seed, batch, step, step + 1, r, world, parts))[1] for r in range(world)]
        return [torch.cat([rank[part].x for rank in ranks]) for part in range(parts)]

    for alone, together in zip(micro_batches(1), micro_batches(world), strict=True):
        assert sorted(alone.tolist()) == sorted(together.tolist())
    rows = indices(seed, step, batch, data.n)
    shares = [share(rows, r, world, part, parts) for r in range(world) for part in range(parts)]
    assert {len(s) for s in shares} == {each}
    assert sorted(torch.cat(shares).tolist()) == sorted(rows.tolist())


def test_accumulation_splits_a_step_in_order():
    rows = indices(3, 2, 12, 30)
    parts = [share(rows, 0, 1, part, 3) for part in range(3)]
    assert torch.equal(torch.cat(parts), rows)


def test_impossible_batches_say_what_to_change():
    with pytest.raises(ConfigError, match=r"batch of 11 items.*split of 10.*at most 10"):
        indices(0, 0, 11, 10)
    with pytest.raises(ConfigError, match=r"batch of 0 items"):
        indices(0, 0, 0, 10)
    with pytest.raises(ConfigError, match=r"12 items.*2 processes times 4 micro-batches.*multiple of 8"):
        share(torch.arange(12), 0, 2, 0, 4)
    with pytest.raises(ConfigError, match="multiple of 3"):
        next(stream(Numbers(10), 0, 10, 0, 1, world=3))
    with pytest.raises(ConfigError, match="at most 10"):
        check_batch(20, 1, 1, 10)
    check_batch(10, 5, 2, 10)
