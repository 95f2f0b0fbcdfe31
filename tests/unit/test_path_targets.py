"""Targets from paths: exact for affine forces, scores in the mean, and less scatter than those of local kernels."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genmodels.processes.clocks import Constant
from genmodels.processes.fokker_planck import FokkerPlanck
from genmodels.processes.increments import TimesOfClock
from genmodels.processes.local_bound import Bound
from genmodels.processes.local_kernels import local_kernel, simulate
from genmodels.processes.local_objective import Objective
from genmodels.processes.local_score import LocalScore, reverse_kernel
from genmodels.processes.path_targets import Silence, measured_rates, moved, simulate_path
from genmodels.processes.physics import DoubleWell, Phi4
from genmodels.processes.priors import Gaussian, Logistic, Mixture, StudentT
from genmodels.processes.process import GivenProcess, Langevin, Process
from genmodels.registry import ConfigError
from genmodels.rng import BatchNoise
from genmodels.types import Batch
from tests.contracts.test_denoiser import randn
from tests.unit.test_local_dsm import Exact, made


def draws(n: int, seed: int = 0) -> BatchNoise:
    return BatchNoise(n, generator=torch.Generator().manual_seed(seed))


def pulled(u: Tensor, y: Tensor) -> Tensor:
    """A force that depends on time."""
    return torch.sin(2 * y) * (1 + u.reshape(-1, 1)) - y


@pytest.mark.parametrize("steps", [1, 7])
def test_an_affine_force_has_the_target_of_its_exact_kernel(steps):
    """-(y - e^{-ru} x)/v of N(e^{-ru} x, v), v = g² (1 - e^{-2ru})/2r, whatever the noise."""
    r, g = 0.8, 1.3
    process = GivenProcess(lambda u, y: -r * y, g, shape=(2,), structure="elementwise", clock=Constant(3.0))
    x, u = randn(50, 2), torch.logspace(-3, 0.4, 50, dtype=torch.float64)
    found = simulate_path(process, x, u, steps, r, draws(50))
    mean, variance = torch.exp(-r * u)[:, None] * x, (g**2 * -torch.expm1(-2 * r * u) / (2 * r))[:, None]
    torch.testing.assert_close(found.target, -(found.state - mean) / variance, rtol=1e-10, atol=1e-10)
    z = (found.state - mean) / variance.sqrt()
    assert abs(z.mean()) < 0.4 and 0.7 < z.std() < 1.3  # 4 standard errors of 100 draws
    wrong = simulate_path(process, x, u, steps, r, draws(50), forgetting=3.0).target
    assert steps == 1 or (wrong - found.target).abs().max() > 0.1


def test_steps_know_their_derivatives():
    """T' and T'' of forces of every kind, against automatic differentiation of T."""
    made_of = [Langevin(prior, shape=(1,)) for prior in (Logistic(), Mixture((-1.0, 1.0), (0.7,)), StudentT())]
    given = GivenProcess(pulled, 0.7, shape=(1,), structure="elementwise", autonomous=False, clock=Constant(2.0))
    u, y = torch.linspace(0.1, 1.0, 9, dtype=torch.float64), randn(9, 1)
    for process in (*made_of, DoubleWell(0.5, 0.8, 0.6, shape=(1,)), given):
        rate = torch.tensor(0.6, dtype=torch.float64)
        start = y.clone().requires_grad_()
        end, slope, bend, ordered = moved(process, u, start, 0.1 * u + 0.1, rate)
        assert ordered.any()
        (first,) = torch.autograd.grad(end.sum(), start, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), start)
        torch.testing.assert_close(slope, first)
        torch.testing.assert_close(bend, second)


def test_the_mean_of_a_target_is_the_score():
    """E[ψ'(y) + ψ(y) τ] = 0 for any ψ (integration by parts), whatever steps and weights; to 4 standard errors."""
    n = 40_000
    u = torch.full((n,), 0.9, dtype=torch.float64)
    for process in (Langevin(Logistic(), shape=(1,)), Langevin(Mixture((-1.0, 1.0), (0.7,)), shape=(1,))):
        for forgetting in (0.3, 1.5):
            y, target, kept = simulate_path(process, 0.8 + 0.3 * randn(n, 1), u, 6, 0.5, draws(n), forgetting)
            assert kept.all()
            pairs = (
                (torch.ones_like(y), 0 * y),
                (y, 1 + 0 * y),
                (y**2, 2 * y),
                (torch.sin(2 * y), 2 * torch.cos(2 * y)),
            )
            for value, slope in pairs:
                found = slope + value * target
                assert abs(found.mean()) < 4 * found.std() / n**0.5


def test_targets_of_a_double_well_follow_the_fokker_planck_score():
    """Means over cells of the state at t = ½, against the score that a grid has there (P11)."""
    process, n = DoubleWell(shape=(1,)), 100_000
    equation = FokkerPlanck(process.force, [1.0], low=[-4.0], high=[4.0], cells=[800])
    (law,) = equation.solve(lambda y: torch.exp(-0.5 * ((y[:, 0] - 0.5) / 0.3).square()), (0.0, 0.5))
    u = torch.full((n,), 0.5, dtype=torch.float64)
    y, target, _ = simulate_path(process, 0.5 + 0.3 * randn(n, 1), u, 12, 1.0, draws(n), 3.0)
    score, points = law.score()[:, 0], law.points[:, 0]
    known = (2.0965, 0.9452, 0.7485, -0.4008, -4.1229)
    assert np.interp((-1.0, 0.0, 0.5, 1.0, 1.5), points, score) == pytest.approx(known, abs=5e-3)
    off = []
    for low in torch.arange(-1.2, 1.8, 0.2):
        inside = (y[:, 0] >= low) & (y[:, 0] < low + 0.2)
        cells = (points >= low) & (points < low + 0.2)
        weight = law.values[cells] / law.values[cells].sum()
        drawn = target[inside, 0]
        off.append(float((drawn.mean() - (weight * score[cells]).sum()) / (drawn.std() / len(drawn) ** 0.5)))
    assert max(map(abs, off)) < 4 and sum(v * v for v in off) < 35  # χ² of 15 cells: 30.6 in 1 of 100 cases


def test_targets_scatter_less_than_those_of_local_kernels():
    """E τ² is 1/δ of a kernel over δ, and stays near that of the exact kernel, 1/(1 - e^{-u}), along a path."""
    process, n = Langevin(Logistic(), shape=(1,)), 4000
    for u in (0.02, 0.3, 2.0):
        end = torch.full((n,), u, dtype=torch.float64)
        path = simulate_path(process, randn(n, 1), end, 10, 0.5, draws(n))
        assert path.target.square().mean() < 1.6 / -math.expm1(-u)
    y = simulate(process, randn(n, 1), torch.zeros(n), end - 0.05, 10, draws(n), "ito")
    kernel = local_kernel(process, end - 0.05, end, y)
    assert kernel.solve_transposed(randn(n, 1)).square().mean() > 10 * path.target.square().mean()


@pytest.mark.parametrize("weight", ["whitened", "likelihood"])
def test_the_objective_of_paths_is_least_at_the_score_and_weighs_as_it_says(weight):
    """E|s - s*|² = c²/V for s = (1 + c) s*: ½ of it over the law 1/3.96 of u, or (1 - e^{-u}) of it."""
    process = Langevin(Gaussian(), Constant(4.0), shape=(1,))
    score, times, n = Exact(process), TimesOfClock("clock", process.clock, 0.01), 50_000
    objective = Objective(score, times, 4, "ito", True, "plain", weight, "exact")
    rates = torch.full((2,), 0.5, dtype=torch.float64)
    x, u = 1.5 + 0.5 * randn(n, 1), times.sample(draws(n, 1))
    value, lost = objective.path(x, u, tuple(rates), None, draws(n, 2))
    (slope,) = torch.autograd.grad(value.mean(), score.factor)
    v = 1 - 0.75 * torch.exp(-u)
    scale = 0.5 * 3.96 if weight == "likelihood" else -torch.expm1(-u)
    # the gradient at s* is a mean of 2 · scale · s (s - τ), of variance at most 4 · scale² · (1/V) · 1/(1 - e^{-u})
    error = (4 * (scale**2 / v / -torch.expm1(-u)).mean() / n) ** 0.5
    assert abs(slope) < 4 * error and lost == 0
    with torch.no_grad():
        score.factor.fill_(1.5)
        more = objective.path(x, u, tuple(rates), None, draws(n, 2))[0] - value
    assert more.mean().item() == pytest.approx(float((0.25 * scale / v).mean()), abs=4 * float(more.std()) / n**0.5)
    assert more.mean() > 8 * more.std() / n**0.5


def test_the_bound_of_paths_is_that_of_the_item():
    """log p(x) at the exact score, to 4 standard errors; with less scatter than that of local kernels."""
    process = Langevin(Gaussian(), Constant(8.0), shape=(1,))
    score, times, n = Exact(process), TimesOfClock("importance", process.clock, 1e-4), 20_000
    bound = Bound(process, score, times, 8, "ito", False)
    x, increment = torch.full((n, 1), 2.0, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    with torch.no_grad():
        path, local = (bound(x, increment, None, draws(n), method) for method in ("path", "local"))
    # N(0, 1) in place of the law at u = 8 costs (1.5 e^{-4})²/2 at most
    assert abs(path.mean() + 0.72579135) < 4 * path.std() / n**0.5 + 4e-4
    assert path.std() < 0.3 * local.std()
    with torch.no_grad():  # both forms have one mean
        u = times.sample(draws(n, 5))
        rates = [bound.path(u, x, None, draws(n, 6), relative) / times.density(u) for relative in (False, True)]
    rest = rates[1] - rates[0]  # E log π(y_U) - log π(x), with E y_U² = 1 + 3 e^{-8}
    assert abs(rest.mean() - (2 - 0.5 * (1 + 3 * math.exp(-8)))) < 4 * rest.std() / n**0.5 + 4e-3


def test_rates_are_measured_and_steps_that_are_too_long_are_told():
    g = torch.Generator().manual_seed(0)
    times = TimesOfClock("importance", Constant(4.0), 1e-3)
    affine = GivenProcess(lambda u, y: -1.2 * y, shape=(1,), structure="elementwise", clock=Constant(4.0))
    rate, forgetting = measured_rates(affine, randn(500, 1), times, 10, g).tolist()
    assert rate == pytest.approx(1.2) and forgetting in (pytest.approx(1.2), pytest.approx(1.8))
    torn = Langevin(Mixture((-1.0, 1.0), (0.7,)), Constant(15.0), shape=(1,))  # where late noise tells more of a score
    rate, forgetting = measured_rates(torn, randn(500, 1), times, 20, g).tolist()
    assert 0.3 < rate < 0.6 and round(forgetting / rate, 6) in (2.0, 3.0, 4.0)
    model = made(process={"name": "double_well", "clock": {"name": "constant", "total": 4.0}}, simulation_steps=6)
    assert model.objective == "path"
    with pytest.warns(UserWarning, match=r"of paths are left out, whose 6 steps were too long") as told:
        logs = model.prepare([Batch(randn(400, 1))], generator=g)
    assert all("genmodels" in warning.filename for warning in told)  # whose place commands do not print
    assert logs["relaxation"] > 0.5 and logs["forgetting"] >= logs["relaxation"]
    loss = model.loss(Batch(randn(400, 1)), generator=g)
    assert 0.01 < loss.logs["lost"] < 1 and loss.value.isfinite().all()
    assert float((loss.value == 0).double().mean()) == pytest.approx(float(loss.logs["lost"]))
    with pytest.raises(ValueError, match="paths took steps too long for the force"):
        model.likelihood(randn(50, 1), method="path")


def test_forces_of_many_components_have_none():
    with pytest.raises(ConfigError, match=r"model.objective: targets from paths need a force of one component"):
        made(process={"name": "swimmer"}, shape=(2,), objective="path")
    assert made(process={"name": "swimmer"}, shape=(2,)).objective == "local"
    assert made(variance="antithetic").objective == "local" and made().objective == "path"
    with pytest.raises(ConfigError, match=r"only the objective local has variates to control, found objective path"):
        made(objective="path", variance="control")
    lattice = Phi4(shape=(4,))
    with pytest.raises(ConfigError, match="Use local kernels"):
        Bound(lattice, LocalScore(None, lattice), TimesOfClock("clock", lattice.clock, 0.1), 2, "ito", False).path(
            torch.ones(1, dtype=torch.float64), randn(1, 4), None, draws(1)
        )


def test_times_of_a_path_are_those_of_its_steps():
    """Force 3 u and noise Q = 1 + 2 u: y_u = x + 3 u²/2 on the mean, of variance u + u², exactly for the middles."""

    class Forced(Process):
        structure, autonomous = "elementwise", False

        def force(self, u: Tensor, y: Tensor) -> Tensor:
            return 3 * u.reshape(-1, 1).to(y) + 0 * y

        def amplitude(self, u: Tensor) -> Tensor:
            return (1 + 2 * u).sqrt()

    process, n = Forced(Constant(2.0), shape=(1,)), 20_000
    u = torch.full((n,), 0.8, dtype=torch.float64)
    for steps in (1, 2):
        y = simulate_path(process, torch.zeros(n, 1, dtype=torch.float64), u, steps, 0.0, draws(n)).state
        still = simulate_path(process, torch.zeros(1, 1).double(), u[:1], steps, 0.0, Silence(1, device=u.device)).state
        assert still.item() == pytest.approx(1.5 * 0.8**2, rel=1e-12)
        assert y.var().item() == pytest.approx(0.8 + 0.8**2, rel=5 * (2 / n) ** 0.5)


def test_draws_of_a_bound_have_times_of_their_own_stratum():
    process = Langevin(Gaussian(), Constant(4.0), shape=(1,))
    score, times, seen = Exact(process), TimesOfClock("clock", process.clock, 0.01), []
    bound, x = Bound(process, score, times, 1, "ito", True), randn(40, 1)
    score.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for k in range(4):
        seen.clear()
        bound(x, torch.tensor(0.02), None, draws(40), "local", (k, 4))
        share = (seen[0] - times.first) / (times.last - times.first)
        assert k / 4 <= share.min() and share.max() <= (k + 1) / 4 and share.std() > 0.04


def test_bounds_by_local_kernels_keep_their_scatter_at_any_increment():
    process, n = Langevin(Gaussian(), Constant(4.0), shape=(1,)), 2000
    bound = Bound(process, Exact(process), TimesOfClock("clock", process.clock, 0.01), 1, "ito", False)
    u, y, z = torch.full((n,), 1.0, dtype=torch.float64), randn(n, 1), randn(n, 1, seed=1)
    with torch.no_grad():
        wide, narrow = (bound.local(u - d, u, y, z, None).std() for d in (1e-2, 1e-5))
    assert narrow < 1.2 * wide  # without control it grows with the root of the ratio, 30


def test_reverse_kernels_and_decoders_have_closed_forms():
    """F = -k y, score s held: m = y + (g² s + k y) (e^{kh} - 1)/k and v = g² (e^{2kh} - 1)/2k from u to u - h."""
    k, g, h = 0.7, 1.3, 0.4
    process = GivenProcess(lambda u, y: -k * y, g, shape=(2,), structure="elementwise", clock=Constant(2.0))
    u, y, s = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64), randn(3, 2), randn(3, 2, seed=1)
    found = reverse_kernel(process, u, u - h, y, s)
    torch.testing.assert_close(found.mean, y + (g**2 * s + k * y) * math.expm1(k * h) / k)
    torch.testing.assert_close(found.variance, torch.full_like(y, g**2 * math.expm1(2 * k * h) / (2 * k)))
    times = TimesOfClock("clock", process.clock, 0.2)  # u₀ = 0.4
    bound = Bound(process, lambda u, y, condition: -y, times, 1, "ito", False)
    x, z = randn(3, 2, seed=2), randn(3, 2, seed=3)
    there = torch.distributions.Normal(math.exp(-k * h) * x, g * (-math.expm1(-2 * k * h) / (2 * k)) ** 0.5)
    y0 = there.mean + there.stddev * z
    back = torch.distributions.Normal(y0 + (k - g**2) * y0 * math.expm1(k * h) / k, found.variance.sqrt())
    torch.testing.assert_close(bound.decoder(x, z, None), (back.log_prob(x) - there.log_prob(y0)).sum(1))
