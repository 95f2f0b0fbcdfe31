"""Couplings of noise and items: optimal transport against other solvers, labels, and what stays true of a model."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from genmodels.diffusion.couplings import Coupling, Independent, MinibatchOT, Sinkhorn, squared_distances
from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build, names
from genmodels.rng import BatchNoise
from genmodels.solvers.base import Solver
from genmodels.types import Batch, NotApplicable, expand_like
from tests.contracts.test_denoiser import randn
from tests.oracles import GAUSSIAN
from tests.unit.test_diffusion import hermite, make, oracle, seeded, wide

LABELS = torch.arange(24) % 3


def noise(n: int = 24, seed: int = 0) -> BatchNoise:
    return BatchNoise(n, generator=seeded(seed))


def shifted(n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Items far from their noise by label, and the noise."""
    return randn(n, 2) + 3 * (torch.arange(n) % 3 - 1)[:, None].double(), randn(n, 2, seed=1)


# ---- every coupling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names(Coupling))
def test_pairs_are_rows_of_the_noise_and_the_generator_decides(name):
    coupling, (x, eps) = build(Coupling, name), shifted()
    state = torch.random.get_rng_state()
    for condition in (None, LABELS):
        rows = coupling.pair(x, eps, condition, noise())
        assert rows.dtype == torch.int64 and rows.shape == (24,) and 0 <= rows.min() and rows.max() < 24
        assert torch.equal(coupling(x, eps, condition, noise()), eps[rows])
        if condition is not None:  # noise stays with its label, so that its law under each is N(0, I)
            assert torch.equal(LABELS[rows], LABELS)
        if name != "sinkhorn":
            assert torch.equal(rows.sort()[0], torch.arange(24))
        if name != "independent":
            assert (x - eps[rows]).square().sum() < 0.95 * (x - eps).square().sum()
    assert torch.equal(torch.random.get_rng_state(), state)
    single = coupling(x[:1], eps[:1], None, noise(1))
    assert torch.equal(single, eps[:1])
    for options in ({}, {"conditions": "ignore"}, {"conditions": "cost"}) if name != "independent" else ({},):
        nothing = build(Coupling, {"name": name, **options})
        assert nothing(x[:0], eps[:0], LABELS[:0], noise(0)).shape == (0, 2)


@pytest.mark.parametrize("name", names(Coupling))
def test_a_model_is_trained_with_its_pairs(name):
    """The loss recomputed with the noise reordered by the items in model space."""
    model = make((2,), num_classes=3, coupling=name, condition_dropout=0.0)
    x, labels = shifted()[0], LABELS
    found = model.loss(Batch(x, condition=labels), generator=seeded(5)).value
    source = noise(24, 5)
    t = torch.sigmoid(torch.special.ndtri(source.uniform(dtype=torch.float64) + 2.0**-25))
    eps = source.normal(2, dtype=torch.float64)
    eps = model.coupling(x, eps, labels, source)
    wide_t = expand_like(t, x)
    answer = model.denoiser.network(t, (1 - wide_t) * x + wide_t * eps, labels)
    torch.testing.assert_close(found, (answer - (eps - x)).square().mean(1))


def test_a_model_without_conditions_pairs_all():
    model = make((2,), num_classes=3, conditional=False, coupling="minibatch_ot")
    seen = []
    model.coupling.match = lambda cost, u: seen.append(len(cost)) or torch.arange(len(cost))
    model.loss(Batch(shifted()[0], condition=LABELS), generator=seeded())
    assert seen == [24]


# ---- exact transport -------------------------------------------------------------------------------------------------


def test_minibatch_ot_is_the_best_permutation():
    x, eps = randn(6, 3), randn(6, 3, seed=1)
    rows = MinibatchOT().pair(x, eps, None, noise(6))
    every = torch.tensor(list(itertools.permutations(range(6))))
    costs = (x - eps[every]).square().sum((1, 2))
    assert torch.equal(rows, every[costs.argmin()])
    # on the line the pairs are those of equal rank
    x, eps = randn(40, 1), randn(40, 1, seed=1)
    rows = MinibatchOT().pair(x, eps, None, noise(40))
    assert torch.equal(eps[rows][x[:, 0].argsort()], eps.sort(0)[0])


def transport(cost: torch.Tensor) -> float:
    """The least Σ P c over plans with even marginals, as a linear programme."""
    n = len(cost)
    rows, columns = np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))
    found = linprog(cost.flatten().numpy(), A_eq=np.vstack((rows, columns)), b_eq=np.full(2 * n, 1 / n))
    return found.fun


def test_sinkhorn_tends_to_the_linear_programme():
    x, eps = randn(5, 2), randn(5, 2, seed=1)
    cost, best = squared_distances(x, eps), transport(squared_distances(x, eps))
    rows = MinibatchOT().pair(x, eps, None, noise(5))
    assert abs((x - eps[rows]).square().sum().item() / 5 - best) < 1e-9
    gaps = []
    for r in (0.1, 0.03, 0.01):
        plan = Sinkhorn(r, iterations=2000, tolerance=1e-8).plan(cost)
        gaps.append((plan * cost).sum().item() - best)
        # the entropy of plans is between log n and 2 log n, which bounds the price of what it adds
        assert -1e-9 < gaps[-1] <= r * cost.mean().item() * np.log(5)
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-4
    assert torch.equal(plan.argmax(1), rows) and (5 * plan.max(1)[0] > 0.99).all()


def test_sinkhorn_solves_the_entropic_problem():
    """Even marginals, and log P + c/r a sum of a function of the row and one of the column: that is its optimum."""
    cost = squared_distances(randn(12, 3), randn(12, 3, seed=1))
    plan = Sinkhorn(0.2, iterations=5000, tolerance=1e-12).plan(cost)
    torch.testing.assert_close(plan.sum(1), torch.full((12,), 1 / 12, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((12,), 1 / 12, dtype=torch.float64), rtol=1e-10, atol=0)
    rest = plan.log() + cost / (0.2 * cost.mean())
    rest = rest - rest.mean(0) - rest.mean(1, keepdim=True) + rest.mean()
    assert rest.abs().max() < 1e-10
    # far costs do not underflow, and a large regularisation forgets them
    assert Sinkhorn(1e-3).plan(cost * 1e6).sum().isfinite()
    torch.testing.assert_close(
        Sinkhorn(1e9).plan(cost), torch.full((12, 12), 1 / 144, dtype=torch.float64), rtol=1e-6, atol=0
    )
    same = torch.zeros(4, 4, dtype=torch.float64)
    torch.testing.assert_close(Sinkhorn().plan(same), torch.full((4, 4), 1 / 16, dtype=torch.float64))


def test_noise_is_drawn_from_the_plan():
    cost, coupling = squared_distances(randn(6, 2), randn(6, 2, seed=1)), Sinkhorn(0.3)
    draws = torch.stack([coupling.match(cost, torch.full((6,), (k + 0.5) / 200).double()) for k in range(200)])
    share = torch.nn.functional.one_hot(draws, 6).double().mean(0)
    assert (share - 6 * coupling.plan(cost)).abs().max() <= 1 / 200 + 1e-9  # half a draw at either edge
    assert coupling.match(cost, torch.ones(6).double()).max() <= 5


# ---- conditions ------------------------------------------------------------------------------------------------------


def test_conditions_are_ignored_priced_or_kept_apart():
    x, eps = shifted()
    free = MinibatchOT(conditions="ignore").pair(x, eps, LABELS, noise())
    assert torch.equal(free, MinibatchOT().pair(x, eps, None, noise())) and (LABELS[free] != LABELS).any()
    within = MinibatchOT().pair(x, eps, LABELS, noise())
    dear, cheap = (MinibatchOT(conditions="cost", condition_cost=c).pair(x, eps, LABELS, noise()) for c in (1e4, 1e-9))
    assert torch.equal(dear, within) and torch.equal(cheap, free)
    some = MinibatchOT(conditions="cost", condition_cost=0.5).pair(x, eps, LABELS, noise())
    costs = [(x - eps[rows]).square().sum() for rows in (free, some, within)]
    assert costs[0] < costs[1] < costs[2]
    assert 0 < (LABELS[some] != LABELS).sum() < (LABELS[free] != LABELS).sum()


def test_vectors_as_conditions_take_a_cost():
    x, eps = shifted()
    c = LABELS[:, None].double().expand(24, 2) + 1e-3 * randn(24, 2, seed=2)
    near = MinibatchOT(conditions="cost", condition_cost=100.0).pair(x, eps, c, noise())
    assert torch.equal(LABELS[near], LABELS)  # swaps among near vectors alone
    assert not torch.equal(near, torch.arange(24))
    for name in ("minibatch_ot", "sinkhorn"):
        with pytest.raises(
            ValueError, match=rf"coupling '{name}': .*torch.float64 of shape \[24, 2\].*conditions: cost"
        ):
            build(Coupling, name).pair(x, eps, c, noise())
    model = make((2,), condition_shape=(2,), coupling={"name": "minibatch_ot", "conditions": "cost"})
    assert model.loss(Batch(x, condition=c), generator=seeded()).value.isfinite().all()


def test_impossible_couplings_are_refused():
    for node, message in (
        ({"name": "minibatch_ot", "condition_cost": 0.0}, "condition_cost"),
        ({"name": "sinkhorn", "regularization": 0.0}, "regularization > 0"),
        ({"name": "sinkhorn", "iterations": 0}, "iterations > 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(Coupling, node)
    x = randn(4, 2)
    x[1] = torch.nan
    for name in ("minibatch_ot", "sinkhorn"):
        with pytest.raises(ValueError, match="not finite"):
            build(Coupling, name).pair(x, randn(4, 2), None, noise(4))


# ---- what stays true -------------------------------------------------------------------------------------------------


class Correlated(Independent):
    """(x, ε) jointly normal with correlation ρ, x ~ N(1.5, .5²): both laws as they are."""

    def __init__(self, rho: float) -> None:
        self.rho = rho

    def __call__(self, x, eps, condition, noise):
        return self.rho * (x - 1.5) / 0.5 + (1 - self.rho**2) ** 0.5 * eps


class Regression(Network):
    """E[ε - x | x_t] on the linear path under `Correlated`: affine in x_t."""

    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho, self.lift = rho, torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, t, x, condition=None):
        t = expand_like(t.double(), x)
        a, s, cov = 1 - t, 0.5, 0.5 * self.rho
        variance = (a * s) ** 2 + t**2 + 2 * a * t * cov
        slope = (t - a * s**2 + (a - t) * cov) / variance  # of ε - x on x_t
        return (slope + self.lift[0]) * (x - 1.5 * a) - 1.5 + self.lift[1]


def test_the_flow_of_any_coupling_has_the_law_of_the_data(monkeypatch):
    """The exact minimiser of the loss, where its gradient is 0, takes N(0, 1) to N(1.5, .5²) whatever the coupling.

    On the line a flow keeps the order, so it is z -> 1.5 + .5 z. The gradient is a polynomial of degree 4 in the normal
    draws, which quadrature with 4 x 4 nodes integrates exactly at each time.
    """
    z, w = hermite(4)
    x, eps, weights = (1.5 + 0.5 * z).repeat_interleave(4), z.repeat(4), torch.outer(w, w).flatten()
    times = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    for rho in (0.0, 0.6, -0.5):
        model = make((1,), moved=0.0)
        model.denoiser.network, model.coupling = wide(Regression(rho)), Correlated(rho)
        with monkeypatch.context() as patched:
            patched.setattr(BatchNoise, "normal", lambda *a, **k: eps.repeat(3)[:, None])
            patched.setattr(type(model.times), "sample", lambda *a: times.repeat_interleave(16))
            loss = model.loss(Batch(x.repeat(3)[:, None])).value.reshape(3, 16) @ weights
        for one in loss:  # at each of the times
            (slope,) = torch.autograd.grad(one, model.denoiser.network.lift, retain_graph=True)
            assert slope.abs().max() < 1e-12
        starts = torch.tensor([[-1.0], [0.0], [1.7]], dtype=torch.float64)
        torch.testing.assert_close(model.decode(starts), 1.5 + 0.5 * starts, rtol=0, atol=1e-4)


def test_transport_makes_paths_straighter():
    """Pairs of the linear path leave the velocity less to guess: |ε - x|² itself is what falls."""
    x = GAUSSIAN.sample(noise(128), dtype=torch.float64)
    eps = randn(128, 2, seed=1)
    spread = [(x - build(Coupling, n)(x, eps, None, noise(128))).square().mean().item() for n in names(Coupling)]
    by_name = dict(zip(names(Coupling), spread, strict=True))
    assert by_name["minibatch_ot"] < by_name["sinkhorn"] < by_name["independent"]


def test_what_needs_a_score_is_refused():
    model = oracle(GAUSSIAN, coupling="minibatch_ot")
    t, x = torch.tensor(0.5), randn(3, 2)
    with pytest.raises(NotApplicable, match="score: under the coupling 'minibatch_ot'"):
        model.score(t, x)
    with pytest.raises(NotApplicable, match="method elbo: under the coupling"):
        model.likelihood(x, method="elbo")
    assert model.log_prob(x).isfinite().all() and model.velocity(t, x).isfinite().all()


@pytest.mark.parametrize(
    ("solver", "quiet"),
    [
        ("euler_maruyama", None),
        ("ddpm", None),
        ("predictor_corrector", None),
        ({"name": "ddim", "eta": 0.5}, "ddim"),
        ({"name": "dpmpp", "eta": 1.0}, "dpmpp"),
        ({"name": "edm_euler", "s_churn": 1.0}, "edm_euler"),
        ({"name": "edm_heun", "s_churn": 1.0}, "edm_heun"),
    ],
)
def test_noise_on_the_way_needs_a_score_too(solver, quiet):
    """Noise that is added leaves the law of x_t as it is only if as much is taken away along the score."""
    coupled, free = oracle(GAUSSIAN, coupling="minibatch_ot"), oracle(GAUSSIAN)
    with pytest.raises(NotApplicable, match=r"adds noise: under the coupling 'minibatch_ot'"):
        coupled.sample(2, num_steps=3, solver=build(Solver, solver))
    assert free.sample(2, num_steps=3, solver=build(Solver, solver)).isfinite().all()
    if quiet is not None:
        assert coupled.sample(2, num_steps=3, solver=build(Solver, quiet)).isfinite().all()
