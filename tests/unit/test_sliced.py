"""Sliced Wasserstein: exact numbers, closed forms, a linear program, and standard errors against simulation."""

import math

import pytest
import torch

from genmodels.metrics.features import Pixels
from genmodels.metrics.metric import Subject
from genmodels.metrics.sliced import SlicedWasserstein, merged_grid, sliced_wasserstein, unit_vectors
from genmodels.rng import generator
from genmodels.types import Samples
from tests.evaluation_fakes import Points, UniformLevels

ONE = torch.ones(1, 1, dtype=torch.float64)


def line(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)[:, None]


def normal(n, dim, *key):
    return torch.randn(n, dim, generator=generator("sliced", *key), dtype=torch.float64)


@pytest.mark.parametrize(
    ("x", "y", "exact"),
    [
        ((0, 1, 2), (1, 1, 5), 10 / 3),
        ((0, 1), (0, 1, 2), 1 / 2),  # 0 goes to 0 (2/3) and 1 (1/3); 1 to 1 (1/3) and 2 (2/3)
        ((2, 0, 1), (5, 1, 1), 10 / 3),
        ((3,), (0, 1, 2), (9 + 4 + 1) / 3),
    ],
)
def test_distance_of_a_few_numbers(x, y, exact):
    assert sliced_wasserstein(line(*x), line(*y), ONE).value == pytest.approx(exact, rel=1e-14)
    assert sliced_wasserstein(line(*y), line(*x), -ONE).value == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (12, 8), (13, 29), (1, 30)])
def test_merged_grid_is_where_both_quantile_functions_are_constant(n, m):
    lengths, ranks, others = merged_grid(n, m)
    assert lengths.min() > 0 and lengths.sum() == pytest.approx(1, rel=1e-14)
    middles = lengths.cumsum(0) - lengths / 2
    assert torch.equal(ranks, (middles * n).floor().long()) and torch.equal(others, (middles * m).floor().long())
    assert len(lengths) == n + m - math.gcd(n, m)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 60), (37, 101)])
def test_agrees_with_quantile_functions_on_a_fine_grid_along_every_direction(n, m):
    x, y, directions = normal(n, 3, 0), 2 * normal(m, 3, 1) + 1, unit_vectors(5, 3)
    found = sliced_wasserstein(x, y, directions).per_direction
    q = (torch.arange(n * m, dtype=torch.float64) + 0.5) / (n * m)  # one point in each of n·m equal cells: exact
    quantiles = [(directions @ z.T).sort(1).values[:, (q * len(z)).long()] for z in (x, y)]
    torch.testing.assert_close(found, (quantiles[0] - quantiles[1]).square().mean(1), rtol=1e-12, atol=0)


def test_value_and_influence_agree_with_a_linear_program():
    """The optimal plan and its dual; 5 and 8 have no common divisor, so that the dual is unique up to a constant."""
    from scipy.optimize import linprog

    n, m = 5, 8
    x, y, u = normal(n, 2, 4), normal(m, 2, 5), unit_vectors(1, 2)
    cost = ((x @ u.T) - (y @ u.T).T).square()
    rows = torch.kron(torch.eye(n).double(), torch.ones(1, m).double())
    columns = torch.kron(torch.ones(1, n).double(), torch.eye(m).double())
    margins = torch.cat([torch.ones(n).double() / n, torch.ones(m).double() / m])
    solved = linprog(cost.flatten().numpy(), A_eq=torch.cat([rows, columns]).numpy(), b_eq=margins.numpy())
    found = sliced_wasserstein(x, y, u)
    assert found.value == pytest.approx(solved.fun, rel=1e-9)
    potential = torch.tensor(solved.eqlin.marginals[:n])
    torch.testing.assert_close(found.influence, potential - potential.mean(), rtol=1e-9, atol=1e-9)


def test_isotropic_gaussians_have_the_closed_form():
    """SW₂² = |m|²/D + (a - b)²: 2 for D = 8, m = (1, …, 1), a = 1, b = 2."""
    value = sliced_wasserstein(normal(4000, 8, 6), 1 + 2 * normal(4000, 8, 7), unit_vectors(500, 8))
    stderr = value.per_direction.std().item() / 500**0.5
    assert abs(value.value - 2.0) < 3 * stderr + 0.02  # the bias is 7(1 + 4)/2/4000 < 0.01
    assert 0.04 < stderr < 0.07


def test_properties():
    x, y, u = normal(50, 4, 8), normal(70, 4, 9) + 0.5, unit_vectors(300, 4)
    base = sliced_wasserstein(x, y, u)
    assert sliced_wasserstein(x, x, u).value == 0
    assert sliced_wasserstein(x[torch.randperm(50)], y.flip(0), u).value == pytest.approx(base.value, rel=1e-12)
    assert sliced_wasserstein(3 * x, 3 * y, u).value == pytest.approx(9 * base.value, rel=1e-12)
    assert sliced_wasserstein(x + 7, y + 7, u).value == pytest.approx(base.value, rel=1e-10)
    assert sliced_wasserstein(x.repeat(3, 1), y, u).value == pytest.approx(base.value, rel=1e-12)
    turn = torch.linalg.qr(normal(4, 4, 10)).Q
    assert sliced_wasserstein(x @ turn, y @ turn, u @ turn).value == pytest.approx(base.value, rel=1e-12)
    # other directions of the same law: within the error that the spread over directions tells
    stderr = base.per_direction.std().item() / 300**0.5
    assert 0 < abs(sliced_wasserstein(x @ turn, y @ turn, u).value - base.value) < 3 * 2**0.5 * stderr
    flipped = sliced_wasserstein(x.flip(0), y, u)
    torch.testing.assert_close(flipped.influence.flip(0), base.influence)
    # 50 and 70 have common jumps, where the potential is not unique; its middle knows no left and right
    torch.testing.assert_close(sliced_wasserstein(-x, -y, u).influence, base.influence)


def test_chunks_change_nothing(monkeypatch):
    x, y, u = normal(50, 4, 8), normal(70, 4, 9), unit_vectors(30, 4)
    whole = sliced_wasserstein(x, y, u)
    monkeypatch.setattr("genmodels.metrics.sliced.CHUNK", 7 * 120)
    parts = sliced_wasserstein(x, y, u)
    torch.testing.assert_close(parts.per_direction, whole.per_direction, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.influence, whole.influence, rtol=1e-10, atol=1e-12)


def test_influence_is_the_derivative_of_the_distance_in_the_weight_of_an_item():
    """Doubling one row of 400 moves the distance by influence/400, to second order in 1/400."""
    x, y, u = normal(400, 2, 11) + 1, normal(300, 2, 12), unit_vectors(50, 2)
    base = sliced_wasserstein(x, y, u)
    for i in (0, 17, 200):
        moved = sliced_wasserstein(torch.cat([x, x[i : i + 1]]), y, u).value - base.value
        assert moved * 401 == pytest.approx(base.influence[i].item(), rel=0.02, abs=0.02)


# shift, scale of the samples: far, wider, and the reference's own law, where the first order vanishes
@pytest.mark.parametrize(("shift", "scale"), [(0.5, 1.0), (0.0, 1.3), (0.0, 1.0)])
def test_standard_error_of_the_samples_is_their_spread(shift, scale):
    y, u, values, stderrs = normal(1000, 3, 13), unit_vectors(30, 3), [], []
    for k in range(100):
        found = sliced_wasserstein(shift + scale * normal(200, 3, 14, k), y, u)
        values.append(found.value)
        stderrs.append(found.influence.std().item() / 200**0.5)
    spread = torch.tensor(values).std().item()
    mean_square = torch.tensor(stderrs).square().mean().item() ** 0.5
    assert 0.8 < mean_square / spread < 1.3  # the spread of 100 draws is known to 7 %; of a χ² mixture, to about 10 %


def scored(metric, x, dataset):
    metric.start(Subject(UniformLevels((2,)), dataset, torch.device("cpu"), 64))
    metric.update(Samples(torch.arange(len(x)), x=x, features={metric.features.identity: metric.features(x)}), None)
    return metric.compute()


def test_metric_reports_value_floor_items_and_both_parts_of_its_error():
    dataset = Points()
    x = 0.5 + torch.randn(500, 2, generator=generator("sliced"))
    (name, found), *rest = scored(SlicedWasserstein(projections=200), x, dataset).items()
    assert (name, rest, found.detail, found.unit) == ("SW2-pixels", [], "200 projections", "squared feature units")
    train, test = (dataset.all(split).x for split in ("train", "test"))
    u = unit_vectors(200, 2)
    exact = sliced_wasserstein(x, train, u)
    assert found.value == pytest.approx(exact.value, rel=1e-12)
    parts = exact.influence.std().item() / 500**0.5, exact.per_direction.std().item() / 200**0.5
    assert found.stderr == pytest.approx(math.hypot(*parts), rel=1e-12)
    assert found.items.mean().item() == pytest.approx(found.value, rel=1e-12)
    fresh = sliced_wasserstein(test, train, u).value
    assert found.references["test set"] == pytest.approx(fresh, rel=1e-12)
    # 200 test against 300 training items, brought to 500 against 300
    assert found.references["floor"] == pytest.approx(fresh * (1 / 500 + 1 / 300) / (1 / 200 + 1 / 300), rel=1e-12)
    assert found.value > 3 * found.references["floor"]


def test_floor_is_the_mean_of_a_perfect_sampler():
    """E SW₂² = c(1/n + 1/m) to first order: 20 draws of 400 against 300 agree with the law from 200 against 300."""
    u = unit_vectors(100, 4)
    real, fresh, drawn = ([normal(n, 4, key, k) for k in range(20)] for key, n in (("r", 300), ("f", 200), ("d", 400)))
    law = sum(sliced_wasserstein(f, r, u).value for f, r in zip(fresh, real, strict=True)) / 20
    law *= (1 / 400 + 1 / 300) / (1 / 200 + 1 / 300)
    seen = sum(sliced_wasserstein(d, r, u).value for d, r in zip(drawn, real, strict=True)) / 20
    assert abs(seen / law - 1) < 0.25  # one draw varies by about a quarter, so the ratio of means by 8 %


@pytest.mark.parametrize("reference", ["test", "val"])
def test_other_references_are_named(reference):
    metric = SlicedWasserstein(Pixels(2.0), reference=reference, projections=20)
    (name,) = scored(metric, torch.randn(50, 2, generator=generator("sliced")), Points())
    assert name == f"SW2-pixels-{reference}"
    assert set(metric.splits) == {reference, "train" if reference == "test" else "test"}


def test_an_empty_split_gives_no_floor_or_an_error():
    x = torch.randn(50, 2, generator=generator("sliced"))
    (found,) = scored(SlicedWasserstein(projections=20), x, Points((300, 0, 0))).values()
    assert found.references is None
    with pytest.raises(ValueError, match="'val' is empty"):
        scored(SlicedWasserstein(reference="val"), x, Points((300, 0, 0)))


def test_errors():
    with pytest.raises(ValueError, match="one dimension"):
        sliced_wasserstein(normal(3, 2), normal(3, 3), unit_vectors(4, 2))
    with pytest.raises(ValueError, match="at least 2"):
        SlicedWasserstein(projections=1)
    with pytest.raises(ValueError, match="at least 2 samples"):
        scored(SlicedWasserstein(), torch.zeros(1, 2), Points())
