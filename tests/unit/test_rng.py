"""Randomness as a function of keys: pinned values, independence of order and batch, moments."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator

from genmodels.rng import BatchNoise, SeedNoise, as_seeds, fold, generator, stream

KEYS = st.lists(st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=4)


def test_fold_is_pinned():
    # the first 63 bits of `printf "(1, 'loss', 2)" | b2sum -l 64`, and so on
    assert fold(0) == 0xC8238C97D6320A49 >> 1
    assert fold(1, "loss", 2) == 0x92CA960AE56A2760 >> 1
    assert fold("sample", 12345678901234567890) == 0xDB2CF0FB60408963 >> 1


@given(KEYS, KEYS)
def test_fold_tells_all_keys_and_orders_apart(one, two):
    assert (fold(*one) == fold(*two)) == (one == two)
    assert 0 <= fold(*one) < 2**63


def test_fold_tells_types_and_borders_apart():
    keys = [(1, 2), (2, 1), (12,), ("1", "2"), ("1, 2",), ("12",), (1, "2"), ((1 << 64) + 1, 2), ()]
    assert len({fold(*key) for key in keys}) == len(keys)


def test_fold_takes_integers_of_any_kind_and_nothing_else():
    assert fold(3) == fold(np.int64(3)) == fold(torch.tensor(3)) and fold(1) == fold(True)
    for key in (1.0, None, (1,), b"x"):
        with pytest.raises(TypeError):
            fold(key)


def test_a_generator_depends_on_its_keys_alone():
    before = torch.random.get_rng_state()
    one, other = (torch.rand(5, generator=generator("a", 1)) for _ in range(2))
    assert torch.equal(one, other) and torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(one, torch.rand(5, generator=generator(1, "a")))
    assert torch.equal(one, torch.rand(5, generator=Generator().manual_seed(fold("a", 1))))


def test_no_two_seeds_share_a_stream():
    # a bijection of 32 bits; a 63-bit hash of which the generator reads 32 bits would collide for about 2.6 pairs here
    assert len({stream("sample", seed) for seed in range(150_000)}) == 150_000
    assert len({stream("sample", seed) for seed in range(2**32 - 1000, 2**32)}) == 1000
    assert all(0 <= stream("x", seed) < 2**32 for seed in (0, 2**31, 2**40, 2**63 - 1))
    assert stream("sample", 5) != stream("sample", 5 + 2**32)  # the generator itself would not tell these apart
    assert stream("sample", 5) != stream("dequantize", 5)


def test_stream_is_the_murmur3_finaliser():
    # known answers of the published finaliser: fmix32(1) = 0x514e28b7, fmix32(0xdeadbeef) = 0x0de5c6a9
    mask = fold("p", 0) & 0xFFFFFFFF
    assert stream("p", 1 ^ mask) == 0x514E28B7
    assert stream("p", 0xDEADBEEF ^ mask) == 0x0DE5C6A9


@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (15,), (16,), (3, 4, 4), (0,)])
def test_item_i_depends_on_seed_i_alone(draw, shape):
    seeds = [5, 0, 7, 2**40, 5, 1]
    whole = SeedNoise(seeds)
    first, second = getattr(whole, draw)(*shape), getattr(whole, draw)(*shape)
    assert first.shape == (6, *shape) and torch.equal(first[0], first[4])
    for parts in ([[0, 1], [2, 3, 4, 5]], [[5, 3], [1], [0, 2, 4]]):
        for rows in parts:
            alone = SeedNoise([seeds[i] for i in rows])
            assert torch.equal(getattr(alone, draw)(*shape), first[rows])
            assert torch.equal(getattr(alone, draw)(*shape), second[rows])
    assert math.prod(shape) == 0 or not torch.equal(first, second)


def test_seed_noise_is_pinned_to_its_stream():
    noise = SeedNoise([3, 9], purpose="p")
    rows = [torch.empty(4).normal_(generator=Generator().manual_seed(stream("p", s))) for s in (3, 9)]
    assert torch.equal(noise.normal(4), torch.stack(rows))


def test_purposes_differ():
    assert not torch.equal(SeedNoise(4, purpose="sample").normal(3), SeedNoise(4, purpose="dequantize").normal(3))
    assert torch.equal(SeedNoise(4).normal(3), SeedNoise(4, purpose="sample").normal(3))


@pytest.mark.parametrize("draw", ["normal", "uniform"])
@pytest.mark.parametrize("make", [lambda: SeedNoise(5), lambda: BatchNoise(5, generator=generator("b"))])
def test_double_precision_sees_the_same_noise(draw, make):
    single, double = getattr(make(), draw)(7), getattr(make(), draw)(7, dtype=torch.float64)
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert torch.equal(single.double(), double)


@pytest.mark.parametrize("make", [lambda n: SeedNoise(n), lambda n: BatchNoise(n, generator=generator("moments"))])
def test_moments(make):
    noise, n = make(20_000), 20_000
    z, u = noise.normal(3).double(), noise.uniform(3).double()
    # five standard errors of independent draws; the seeds are fixed, so this either holds or it does not
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean(0) - mean).max() < 5 * math.sqrt(variance / n)
    for power in (1, 2, 3):
        mean = 1 / (power + 1)
        variance = 1 / (2 * power + 1) - mean**2
        assert abs((u**power).mean(0) - mean).max() < 5 * math.sqrt(variance / n)
    both = torch.cat([z, (u - 0.5) * math.sqrt(12)], 1)  # six columns of unit variance, uncorrelated
    assert abs(both.T @ both / n - torch.eye(6)).max() < 5 * math.sqrt(2 / n)
    neighbours = (both[1:] * both[:-1]).mean(0)  # consecutive seeds are as good as independent
    assert abs(neighbours).max() < 5 / math.sqrt(n)


def test_uniform_draws_lie_in_the_half_open_interval():
    for noise in (SeedNoise(20), BatchNoise(20, generator=generator("u"))):
        for dtype in (torch.float32, torch.float64):
            u = noise.uniform(20_000, dtype=dtype)
            assert u.min() >= 0 and u.max() < 1


def test_batch_noise_is_a_function_of_its_generator():
    one, two = (BatchNoise(3, generator=generator("b", 1)) for _ in range(2))
    assert torch.equal(one.normal(2, 2), two.normal(2, 2)) and torch.equal(one.uniform(), two.uniform())
    state = torch.random.get_rng_state()
    BatchNoise(3, generator=generator("b", 1)).normal(4)
    assert torch.equal(state, torch.random.get_rng_state())
    BatchNoise(3).normal(4)  # torch's own generator, where none is given
    assert not torch.equal(state, torch.random.get_rng_state())
    torch.random.set_rng_state(state)


@pytest.mark.parametrize("given", [range(3), [0, 1, 2], (0, 1, 2), np.arange(3), torch.arange(3), iter([0, 1, 2]), 3])
def test_seeds_in_every_form(given):
    assert torch.equal(as_seeds(given), torch.arange(3)) and as_seeds(given).dtype == torch.int64


def test_no_seeds_are_seeds_too():
    for none in (0, [], torch.tensor([]), range(0)):
        assert as_seeds(none).shape == (0,) and SeedNoise(none).normal(2).shape == (0, 2)
    assert as_seeds(torch.arange(3, dtype=torch.int32)).dtype == torch.int64


@pytest.mark.parametrize(
    "given",
    [
        *(-1, 2.0, "0-3", "", None, True, SimpleNamespace(), {"a": 1}),
        *([-1], [0, 1.0], [True], [[0, 1]], [[0], [1, 2]], ["a"], [None], [2**70]),
        *(torch.tensor(3), torch.tensor([1.0]), torch.zeros(2, 2, dtype=torch.int64), torch.tensor([True])),
    ],
)
def test_other_seeds_are_refused(given):
    with pytest.raises(ValueError, match=r"seeds: a (count|count or a flat list of integers)"):
        as_seeds(given)


def test_noise_lands_on_the_device_asked_for():
    for noise in (SeedNoise(2, device="meta"), BatchNoise(2, generator=generator("d"), device="meta")):
        assert noise.normal(3).device.type == "meta" and noise.uniform(3).device.type == "meta"
