"""The separation λ(s) of data: exact sums against brute force, estimates against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch import Tensor

from genmodels.diffusion import observed
from genmodels.diffusion.denoiser import Denoiser
from genmodels.diffusion.observed import Moments, _posterior, finite_set
from genmodels.diffusion.schedules import Linear, VariancePreserving
from genmodels.diffusion.separation import (
    Curve,
    NotMonotone,
    Separation,
    Spectrum,
    at_least,
    default_ratios,
    of_covariance,
    of_denoiser,
    of_items,
    of_mixture,
    warn_of,
)
from genmodels.distributions import GaussianMixture
from genmodels.networks.network import Network
from genmodels.rng import SeedNoise
from tests.oracles import MIXTURE

SOME = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)


class TwoPoints(Separation):
    """±1: 1 - λ(s) = E sech²(s² + s Z), an integral over u = s² + s z of a function as smooth as sech.

    Trapezoids converge spectrally where the Gaussian is wide beside the spacing of u, and Gauss-Hermite quadrature
    where tanh is far from its poles.
    """

    mean_square, variance, span = 1.0, 1.0, (0.05, 1000.0)

    def residual(self, s: Tensor) -> Tensor:
        found = torch.zeros_like(s, dtype=torch.float64)  # beyond 6 it is below 1e-7
        few, some = s < 0.25, (s >= 0.25) & (s < 6)
        z, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(40))
        low, high = s[few].double()[:, None], s[some].double()[:, None]
        found[few] = ((1 - torch.tanh(low**2 + low * z) ** 2) * w / w.sum()).sum(1)
        u = torch.linspace(-24, 24, 321, dtype=torch.float64)
        kernel = torch.exp(-((u - high**2) ** 2) / (2 * high**2)) / (high * math.sqrt(2 * math.pi))
        found[some] = (kernel / torch.cosh(u) ** 2).sum(1) * float(u[1] - u[0])
        return (found * (1 + s.double() ** 2).where(s < 6, 0.0)).clamp(0, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def test_closed_forms():
    """Two points by quadrature, a Gaussian by its eigenvalues; both bounds hold."""
    expected = torch.tensor([0.20405427, 0.55040049, 0.80275750, 0.93140259], dtype=torch.float64)
    torch.testing.assert_close(TwoPoints()(SOME), expected, rtol=0, atol=1e-8)
    mu, s = torch.tensor([0.1, 1.9], dtype=torch.float64), default_ratios(2)
    direct = (mu**2 * s[:, None] ** 2 / (1 + mu * s[:, None] ** 2)).mean(1)
    torch.testing.assert_close(Spectrum(4 * mu)(s), direct, rtol=1e-12, atol=1e-12)
    ends = Spectrum(torch.tensor([0.0, 2.0, 1.0])).residual(torch.tensor([0.0, math.inf]))
    torch.testing.assert_close(ends, torch.tensor([1.0, 2 / 3], dtype=torch.float64))
    for data in (TwoPoints(), Spectrum(mu), Spectrum(torch.ones(3))):
        assert (data(s) >= s**2 / (1 + s**2) - 1e-12).all() and (data(s) <= 1).all() and (data(s).diff() >= 0).all()
    torch.testing.assert_close(Spectrum(torch.ones(3))(s), s**2 / (1 + s**2))


@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_streamed_sums_are_the_softmax_over_all_items(left_out, dtype):
    x, rows, ratios = randn(23, 3, seed=1), torch.tensor([4, 0, 22, 9]), torch.tensor([0.05, 0.7, 3.0, 300.0]).double()
    z = randn(4, 3, seed=2)
    blocks = [part.to(dtype) for part in x.split([1, 10, 12])]
    own = rows if left_out else None
    found = _posterior(x[rows].to(dtype), z.to(dtype), blocks, ratios.to(dtype), own)
    for k, s in enumerate(ratios.tolist()):
        for i, row in enumerate(rows.tolist()):
            exponent = -(s**2) * (x[row] + z[i] / s - x).square().sum(1).numpy() / 2
            if left_out:
                exponent[row] = -math.inf
            clean = torch.from_numpy(softmax(exponent)) @ x
            wanted = [clean.square().mean(), (x[row] * clean).mean(), (x[row] - clean).square().mean()]
            tolerance = 2e-4 if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(
                torch.stack([part[i, k] for part in found]), torch.stack(wanted), rtol=tolerance, atol=tolerance
            )


def test_batches_and_passes_do_not_matter(monkeypatch):
    x = 3 * randn(40, 2, seed=3) + 1
    whole = of_items([x], ratios=SOME, queries=70, generator=seeded())
    monkeypatch.setattr(observed, "BLOCK", 7)
    monkeypatch.setattr(observed, "BUDGET", 8 * 4 * 2 * 70)  # all queries still fit into one pass
    parts = of_items(x.split(3), ratios=SOME, queries=70, generator=seeded())
    torch.testing.assert_close(torch.stack((parts.values, parts.stderr)), torch.stack((whole.values, whole.stderr)))
    monkeypatch.setattr(observed, "BUDGET", 8 * 4 * 2 * 9)
    several = of_items(x.split(11), ratios=SOME, queries=70, generator=seeded())
    # other noise, the same law
    gap = (several.values - whole.values).abs()
    assert (gap > 0).any() and (gap < 4 * torch.hypot(several.stderr, whole.stderr)).all()


def test_two_points_are_told_apart_as_their_closed_form_says():
    """Within four standard errors at every ratio, which are small; the other form agrees as well."""
    found = of_items([torch.tensor([[1.0], [-1.0]])], ratios=SOME, queries=20_000, generator=seeded())
    assert (found.stderr < 0.004).all() and found.mean_square == found.variance == 1.0
    assert ((found.values - TwoPoints()(SOME)).abs() < 4 * found.stderr).all()
    assert ((found.inner - TwoPoints()(SOME)).abs() < 4 * 0.9 / math.sqrt(20_000)).all()  # sd of <x, x̂> is below 0.9


def test_mean_and_scale_of_the_items_are_told_and_divided_out():
    x = randn(60, 2, 2, seed=4) * torch.tensor([[1.0, 2.0], [0.5, 1.0]])
    x = x - x.mean(0)
    x = x / x.square().mean().sqrt()
    plain = of_items([x], ratios=SOME, queries=200, generator=seeded())
    moved = of_items([0.3 * x + torch.tensor([[2.0, -1.0], [0.0, 0.5]])], ratios=SOME, queries=200, generator=seeded())
    torch.testing.assert_close(moved.values, plain.values, rtol=1e-10, atol=1e-12)
    assert moved.variance == pytest.approx(0.09, rel=1e-12)
    assert moved.mean_square == pytest.approx(0.09 + (4 + 1 + 0.25) / 4, rel=1e-12)


def test_standard_errors_are_those_of_repetitions_and_small_at_both_ends():
    """40 independent estimates from 200 queries of a fixed set: their spread is what each of them says."""
    x, s = randn(500, 2, seed=5), torch.tensor([0.1, 0.7, 5.0, 1000.0], dtype=torch.float64)
    curves = [of_items([x], ratios=s, queries=200, generator=seeded(k)) for k in range(40)]
    spread, said = torch.stack([c.values for c in curves]).std(0), torch.stack([c.stderr for c in curves]).mean(0)
    ratio = spread / said  # the standard error of a standard deviation of 40 is 11 %
    assert (ratio[:3] > 0.6).all() and (ratio[:3] < 1.4).all(), ratio
    assert said[3] < 1e-6, "where all are told apart the error is what is averaged, not the spread of |x|²"


def test_leaving_an_item_out_is_below_the_law_and_above_nothing():
    """N(0, diag(0.4, 1.6)) from 2000 draws: λ of the law lies between leaving out and the set itself.

    Left out, a kernel estimate with its own bias remains, which shows where items are sparse on the scale 1/s.
    """
    x = randn(2000, 2, seed=6) * torch.tensor([0.4, 1.6]).sqrt()
    s = torch.tensor([0.3, 1.0, 2.0, 20.0, 100.0], dtype=torch.float64)
    law = Spectrum(torch.tensor([0.4, 1.6]))(s)
    out = of_items([x], ratios=s, queries=500, leave_one_out=True, generator=seeded())
    whole = of_items([x], ratios=s, queries=500, generator=seeded())
    assert (out.values < law + 4 * out.stderr + 0.01).all() and (whole.values > law - 4 * whole.stderr - 0.01).all()
    assert ((out.values - law).abs()[:3] < 4 * out.stderr[:3] + 0.01).all()
    assert whole.values[-1] > law[-1] > out.values[-1] + 4 * out.stderr[-1] and out.values[-1] > 0.9
    assert 1 - whole.values[-1] < 0.5 * (1 - law[-1]), "items that are remembered"
    mended = at_least(out, of_covariance([x]))
    assert (mended.values >= s**2 / (1 + s**2)).all() and mended.stderr[-1] == 0
    assert ((mended.values - law).abs() < 4 * out.stderr + 0.01).all()


def test_covariance_of_the_items():
    x = randn(300, 3, seed=7) @ randn(3, 3, seed=8) + 2
    found = of_covariance(x.split(64))
    exact = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    torch.testing.assert_close(found.variances, exact, rtol=1e-10, atol=1e-12)
    assert found.mean_square == pytest.approx(float(x.square().mean()), rel=1e-12)
    # W2² between Gaussians: |m|² + tr(C + I - 2 √C), for each component
    roots = exact.sqrt()
    wanted = (x.mean(0).square().sum() + exact.sum() + 3 - 2 * roots.sum()) / 3
    assert found.distance() == pytest.approx(float(wanted), rel=1e-10)


class Exact(Network):
    """The clean item of a law, spoilt by a factor."""

    def __init__(self, law: GaussianMixture, path, factor: float = 1.0) -> None:
        super().__init__()
        self.law, self.path, self.factor = law, path, factor

    def forward(self, t, x, condition=None):
        alpha, sigma = self.path.scales(t)
        return self.factor * self.law.denoiser(x, alpha, sigma).to(x.dtype)


@pytest.mark.parametrize("path", [Linear(), VariancePreserving()], ids=["linear", "vp"])
def test_an_exact_denoiser_knows_lambda_and_a_worse_one_less(path):
    law = GaussianMixture(((0.0, 0.0),), ((0.1, 0.4),), shape=(2,))
    x = randn(6000, 2, seed=9) * law.variances[0].sqrt()
    s = torch.tensor([1e-6, 0.3, 1.0, 3.0, 1e6], dtype=torch.float64)
    exact = of_denoiser(Denoiser(Exact(law, path), path, "x"), x.split(1500), ratios=s, generator=seeded())
    reached = s[1:4] if path.t_min else s[:4]  # noise of linear is without signal, and x is asked for at σ/α >= 1e-3
    assert torch.equal(exact.ratios, reached)
    assert ((exact.values - Spectrum(law.variances[0])(reached)).abs() < 4 * exact.stderr + 0.02).all()
    worse = of_denoiser(Denoiser(Exact(law, path, 0.7), path, "x"), x.split(1500), ratios=s, generator=seeded())
    assert (worse.values[-3:] < exact.values[-3:] - 0.005).all()


def test_a_mixture_of_narrow_parts_is_its_points_and_one_part_a_gaussian():
    narrow = GaussianMixture(((1.0,), (-1.0,)), ((1e-6,), (1e-6,)), shape=(1,))
    found = of_mixture(narrow, ratios=SOME)
    assert ((found.values - TwoPoints()(SOME)).abs() < 4 * found.stderr).all() and (found.stderr < 0.01).all()
    found = of_mixture(MIXTURE, ratios=SOME, seeds=1500)  # of another mean and scale, and correlated
    assert found.variance == pytest.approx(float(MIXTURE.covariance().trace()) / 2)
    assert ((found.inner - found.values).abs() < 5 * found.stderr).all()
    drawn = MIXTURE.sample(SeedNoise(1500), dtype=torch.float64)
    of_set = of_items([drawn], ratios=SOME[:2], queries=1500, generator=seeded())
    assert ((of_set.values - found.values[:2]).abs() < 5 * torch.hypot(of_set.stderr, found.stderr[:2]) + 0.02).all()


def curve(values: list[float], ratios: list[float], stderr: float = 0.01, **moments) -> Curve:
    s, v = torch.tensor(ratios, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    given = {"mean_square": 1.0, "variance": 1.0, **moments}
    return Curve(s, v, torch.full_like(v, stderr), v, **given)


def test_a_curve_keeps_its_nodes_and_bounds():
    s = default_ratios(1)
    for data in (TwoPoints(), Spectrum(torch.tensor([0.1, 1.9]))):
        table = Curve(s, data(s), torch.full_like(s, 1e-9), data(s), 1.0, 1.0)
        assert table.problems() == []
        torch.testing.assert_close(table(s), data(s), rtol=1e-9, atol=1e-9)
        fine = torch.logspace(-2, 4, 500, dtype=torch.float64)
        torch.testing.assert_close(table(fine), data(fine), rtol=0, atol=2e-3)
        assert (table.residual(fine) >= 0).all() and (table.residual(fine) <= 1).all()
        # below the first node γ ~ s², as it does for every centred law
        low = torch.tensor([1e-3, 2e-3], dtype=torch.float64)
        gamma = 1 - table.residual(low)
        assert float(gamma[1] / gamma[0]) == pytest.approx(4, rel=1e-3)


def test_what_no_data_do_is_mended_and_said():
    noisy = curve([0.30, 0.295, 0.6, 0.9], [0.6, 0.7, 1.0, 2.0])
    assert noisy.problems() == [] and (noisy.mended().diff() >= 0).all()
    fallen = curve([0.5, 0.4, 0.7, 0.9], [0.6, 0.7, 1.0, 2.0])
    assert fallen.mended()[:2].tolist() == pytest.approx([0.45, 0.45])
    with pytest.warns(NotMonotone, match=r"here: λ falls by more than its noise near s = 0\.6 \(by 0\.05"):
        warn_of(fallen, "here")
    low = curve([0.2, 0.3, 0.35, 0.5], [0.5, 0.7, 1.0, 2.0])
    (said,) = low.problems()
    assert "0.5 at s = 2 is below" in said
    torch.testing.assert_close(low.mended(), (low.ratios**2 / (1 + low.ratios**2)).maximum(low.values))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (torch.ones(0, 2), "at least 2 items are needed, found 0"),
        (torch.ones(1, 2), "at least 2 items are needed, found 1"),
        (torch.full((9, 2), 0.1), "have the variance 0, so that there is nothing to tell apart"),
        (torch.tensor([[1.0], [math.nan]]), "NaN or infinity"),
    ],
)
def test_items_that_say_nothing_are_refused(items, message):
    for estimate in (lambda: of_items([items], generator=seeded()), lambda: of_covariance([items])):
        with pytest.raises(ValueError, match=message):
            estimate()


def test_too_few_queries_and_ratios_out_of_reach_are_refused():
    x = randn(5, 1)
    with pytest.raises(ValueError, match="at least 2 queries"):
        finite_set([x], Moments.of([x]), SOME, 1, False, torch.float64, seeded())
    law = GaussianMixture(((0.0,),), ((1.0,),), shape=(1,))
    denoiser = Denoiser(Exact(law, Linear()), Linear(), "edm")
    with pytest.raises(ValueError, match="reaches none"):
        of_denoiser(denoiser, [x], ratios=torch.tensor([1e9]), generator=seeded())
