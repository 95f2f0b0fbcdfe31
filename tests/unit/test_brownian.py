"""Brownian trees: the law of increments and areas, their consistency, and what a path depends on."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from genmodels.rng import BatchNoise, SeedNoise, generator
from genmodels.solvers.brownian import BrownianTree, path_seeds

PATHS = 40_000
PLACES = (0.0, 0.2, 0.37, 0.625, 0.99, 1.0)


def time(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def tree(seeds: int | Tensor, *shape: int, end: float = 1.0, tolerance: float = 2**-14) -> BrownianTree:
    return BrownianTree(seeds, shape, start=0.0, end=end, tolerance=tolerance, dtype=torch.float64)


def test_increments_and_areas_have_their_variances_and_no_correlation():
    path = tree(PATHS, 2, tolerance=2**-9)
    drawn, variances = [], []
    for t, s in pairwise(PLACES):
        w, h = path.increment(time(t), time(s))
        drawn += [*w.unbind(1), *h.unbind(1)]
        variances += [s - t] * 2 + [(s - t) / 12] * 2
    table = torch.stack(drawn) / torch.tensor(variances, dtype=torch.float64).sqrt()[:, None]
    correlation = table @ table.T / PATHS
    # each entry has a standard error of 1/√n (√2/√n on the diagonal); 210 entries stay within 4.5 of them. Where steps
    # are short the parabolas of the last level, 1/512 long, lack up to 2^-9/(8 · 0.01) = 2.4 % of the variance
    assert (correlation - torch.eye(20)).abs().max() < 4.5 * math.sqrt(2 / PATHS) + 0.025
    assert table.mean(1).abs().max() < 4.5 / math.sqrt(PATHS)
    kurtosis = table.pow(4).mean(1)  # normal: 3, with a standard error of √(96/n)
    assert (kurtosis - 3).abs().max() < 4.5 * math.sqrt(96 / PATHS) + 0.08


def test_the_law_is_exact_at_dyadic_times_and_nearly_so_elsewhere():
    """Var and covariance of (W, ∫W) from the weights of the independent normals that they are sums of."""
    path = tree(1, 1, tolerance=2**-12)
    names, times = path.depth + 1, [0.125, 0.375, 0.3, 0.77777]
    counts: list[int] = []
    weights = []
    for at in times:
        seen = {}

        def record(nodes: Tensor, seen: dict = seen) -> tuple[Tensor, Tensor]:
            seen["nodes"] = nodes.flatten().tolist()
            eye = torch.eye(names, dtype=torch.float64)  # one item for each normal
            return eye[None], torch.zeros_like(eye)[None]

        def swapped(nodes: Tensor, seen: dict = seen) -> tuple[Tensor, Tensor]:
            first, second = record(nodes, seen)
            return second, first

        rows = {}
        for which, normals in (("first", record), ("second", swapped)):
            path.shape, path._normals = (names,), normals
            w, integral = path._query(time(at))
            found = zip(seen["nodes"], w[0].tolist(), integral[0].tolist(), strict=True)
            rows |= {(which, node): (a, b) for node, a, b in found}
        weights.append(rows)
        counts.append(len(rows))
    assert counts == [2 * names] * 4
    for i, t in enumerate(times):
        for j, s in enumerate(times[: i + 1]):
            shared = weights[i].keys() & weights[j].keys()
            w = sum(weights[i][k][0] * weights[j][k][0] for k in shared)
            integral = sum(weights[i][k][1] * weights[j][k][1] for k in shared)
            low, high = min(t, s), max(t, s)
            dyadic = {t, s} <= {0.125, 0.375}
            assert w == pytest.approx(low, abs=1e-14 if dyadic else 2**-12 / 8)
            assert integral == pytest.approx(low**2 * (3 * high - low) / 6, abs=1e-14 if dyadic else 2**-12)


@pytest.mark.parametrize("places", [(0.1, 0.33, 0.9), (0.9, 0.33, 0.1), (0.3, 0.8, 0.5), (0.25, 0.250001, 0.7)])
def test_increments_add_up_and_areas_by_chens_relation(places):
    path = tree(5, 3, 2)
    t, u, s = map(time, places)
    first, second, whole = path.increment(t, u), path.increment(u, s), path.increment(t, s)
    torch.testing.assert_close(first.w + second.w, whole.w, rtol=0, atol=1e-10)
    a, b = u - t, s - u
    area = (a * first.h + b * second.h + (b * first.w - a * second.w) / 2) / (a + b)
    torch.testing.assert_close(area, whole.h, rtol=0, atol=1e-10)


def test_the_area_is_the_average_of_the_path_less_that_of_its_ends():
    grid = torch.linspace(0.2, 0.7, 2001, dtype=torch.float64)
    path = tree(torch.full((len(grid),), 17), 3, tolerance=2**-6)  # one path at many times
    w, h = path.increment(time(0.2), grid)
    average = (w[1:] + w[:-1]).mean(0) / 2
    torch.testing.assert_close(h[-1], average - w[-1] / 2, rtol=0, atol=1e-5)


def test_against_time_the_increment_turns_and_the_area_stays():
    path = tree(3, 2)
    ahead, back = path.increment(time(0.2), time(0.5)), path.increment(time(0.5), time(0.2))
    torch.testing.assert_close(ahead.w, -back.w, rtol=0, atol=0)
    torch.testing.assert_close(ahead.h, back.h, rtol=0, atol=1e-15)
    still = path.increment(time(0.4), time(0.4))
    assert not still.w.any() and not still.h.any()


def test_the_order_of_questions_does_not_matter():
    grid = torch.rand(20, generator=generator("grid"), dtype=torch.float64)
    ask = lambda path, order: {i: path.increment(time(0.1), grid[i]) for i in order}  # noqa: E731
    one, two = ask(tree(3, 2), range(20)), ask(tree(3, 2), reversed(range(20)))
    assert all(torch.equal(one[i].w, two[i].w) and torch.equal(one[i].h, two[i].h) for i in range(20))


def test_a_row_depends_on_its_seed_alone():
    seeds = torch.tensor([7, 123456789012, 3, 2**48 - 1])
    whole = tree(seeds, 2).increment(time(0.2), time(0.6))
    for i, seed in enumerate(seeds):
        alone = tree(seed[None], 2).increment(time(0.2), time(0.6))
        torch.testing.assert_close(alone.w[0], whole.w[i], rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(alone.h[0], whole.h[i], rtol=1e-12, atol=1e-15)
    chosen = tree(seeds, 2).select(torch.tensor([2, 0])).increment(time(0.2), time(0.6))
    torch.testing.assert_close(chosen.w, whole.w[[2, 0]])
    assert (whole.w[:, None] - whole.w[None]).abs().flatten(2).amin(2)[~torch.eye(4, dtype=torch.bool)].min() > 1e-3


def test_rows_may_have_times_of_their_own():
    path, t, s = tree(3, 2), torch.tensor([0.0, 0.3, 0.9]).double(), torch.tensor([0.5, 0.2, 0.9]).double()
    together = path.increment(t, s)
    for i in range(3):
        alone = tree(3, 2).increment(t[i], s[i])
        torch.testing.assert_close(together.w[i], alone.w[i], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(together.h[i], alone.h[i], rtol=1e-12, atol=1e-15)
    mixed = path.increment(time(0.0), s)
    torch.testing.assert_close(mixed.w[0], together.w[0])


def test_rows_may_have_ends_of_their_own():
    ends = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    path = BrownianTree(3, (2,), start=torch.tensor([0.0, 1.5, 0.2]), end=ends, dtype=torch.float64)
    t, s = torch.tensor([[0.1, 1.6, 0.3], [0.4, 1.9, 1.0]], dtype=torch.float64)
    together = path.increment(t, s)
    for i, start in enumerate((0.0, 1.5, float(torch.tensor(0.2)))):
        alone = BrownianTree(torch.tensor([i]), (2,), start=start, end=float(ends[i]), dtype=torch.float64)
        torch.testing.assert_close(together.w[i], alone.increment(t[i], s[i]).w[0], rtol=1e-12, atol=1e-15)
    chosen = path.select(torch.tensor([2, 0])).increment(t[[2, 0]], s[[2, 0]])
    torch.testing.assert_close(chosen.h, together.h[[2, 0]])
    with pytest.raises(ValueError, match=r"between 0\.1 and 0\.6.*made for \[0, 0\.5\]"):
        path.increment(t, torch.tensor([0.6, 1.9, 1.0], dtype=torch.float64))


def test_seeds_of_paths_come_from_the_noise_of_each_item():
    one, two = (path_seeds(SeedNoise(s), 4) for s in ([5, 9], [9]))
    assert torch.equal(one[1:], two) and len(one.unique()) == 8
    drawn = path_seeds(BatchNoise(10_000, generator=generator("paths")))
    assert len(drawn.unique()) == 10_000 and drawn.min() >= 0 and drawn.max() < 2**48
    assert torch.equal(drawn, path_seeds(BatchNoise(10_000, generator=generator("paths"))))
    noise, path = SeedNoise([5, 9]), tree(3, 2)
    fresh = path.another(noise)
    assert torch.equal(fresh.seeds, path_seeds(SeedNoise([5, 9]))) and (float(fresh.end), fresh.shape) == (1.0, (2,))


def test_dtypes_and_shapes():
    path = BrownianTree(range(3), (), start=1.0, end=-1.0)
    w, h = path.increment(time(-0.5), time(0.5))
    assert w.shape == h.shape == (3,) and w.dtype == torch.float32
    assert tree(torch.zeros(0, dtype=torch.int64), 2).increment(time(0.0), time(1.0)).w.shape == (0, 2)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"two different finite times.*start=1.0, end=1.0"):
        BrownianTree(3, (2,), start=1.0, end=1.0)
    with pytest.raises(ValueError, match="0 < tolerance <= 1"):
        BrownianTree(3, (2,), start=0.0, end=1.0, tolerance=0.0)
    with pytest.raises(ValueError, match=r"between 0\.5 and 1\.25.*made for \[0, 1\]"):
        tree(3, 2).increment(time(0.5), time(1.25))
