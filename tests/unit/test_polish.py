"""Likelihood polish: against exact maxima of Gaussian conditionals, and against quadrature on a double well."""

from functools import partial

import pytest
import torch
from scipy import optimize
from torch import Tensor

from genmodels.registry import ConfigError
from genmodels.rng import BatchNoise, generator
from genmodels.transforms import Identity
from genmodels.types import Batch
from genmodels.wavelet import polish as module
from genmodels.wavelet.bases import BSpline
from genmodels.wavelet.chains import MALA
from genmodels.wavelet.conditional import Conditional
from genmodels.wavelet.cslc import CSLC
from genmodels.wavelet.line import LineLaw
from genmodels.wavelet.polish import Moments, Polish, polish_chains, polish_line
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.score_matching import FitWarning
from genmodels.wavelet.terms import Quadratic
from genmodels.wavelet.tree import Tree
from genmodels.wavelet.tuning import Tuning

QUADRATIC = (partial(Quadratic, reach=1, own=True),)
SETTINGS = Polish(fields=700, burn=40, iterations=6, transitions=12, records=3)


def free_fields(count: int, size: int = 4, mass: float = 0.5, seed: int = 0) -> Tensor:
    """[B, H, W] float64 of the Gaussian free field, whose energy is ½ Σ (4 + m²) x_i² - Σ_<ij> x_i x_j."""
    k = 2 * torch.pi * torch.arange(size).double() / size
    spectrum = 1 / (mass + 4 - 2 * k.cos()[:, None] - 2 * k.cos())
    white = torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(white) * spectrum.sqrt()).real


def gaussian(count: int) -> tuple[Conditional, Tensor, Tensor]:
    """The finest level of 4 x 4 fields with a quadratic energy, its fields and their known parts."""
    tree = Tree((4, 4), "db2")
    y = free_fields(count)
    conditional = Conditional(tree.levels[-1], QUADRATIC)
    conditional.unit.copy_(y.std())
    conditional.scale.fill_(0.5)
    return conditional, y, tree.given(len(tree.levels) - 1, y)


def exact_maximum(conditional: Conditional, y: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """θ that maximises Σ log N(ζ; -A⁻¹ Ḡ K u_base, A⁻¹), A = Ḡ K(θ) Ḡᵀ, and the inverse Hessian's diagonal roots."""
    level, unit = conditional.level, conditional.unit
    z = level.detail(y) / unit
    eye = torch.eye(level.dim, dtype=torch.float64)
    matrices = conditional.terms[0].gradients(level.synthesize(eye))  # [dim, M, H, W] K_k Ḡᵀ
    a = level.detail(matrices).permute(1, 0, 2)
    b = torch.einsum("dmhw,bhw->bmd", matrices, base / unit)

    def loss(theta: Tensor) -> Tensor:
        matrix, slope = torch.einsum("m,mij->ij", theta, a), torch.einsum("m,bmd->bd", theta, b)
        residual = z + torch.linalg.solve(matrix, slope.T).T
        return 0.5 * torch.einsum("bi,ij,bj->b", residual, matrix, residual).mean() - 0.5 * torch.logdet(matrix)

    theta = torch.tensor([4.5, -1.0, 0.0], dtype=torch.float64) * unit**2
    for _ in range(8):
        slope = torch.autograd.functional.jacobian(loss, theta)
        hessian = torch.autograd.functional.hessian(loss, theta)
        theta = theta - torch.linalg.solve(hessian, slope)
    return theta, (hessian.inverse().diagonal() / len(y)).sqrt()


@pytest.fixture(scope="module")
def polished():
    """From a θ that is wrong by a quarter, and from the maximum itself."""
    found = {}
    conditional, y, base = gaussian(SETTINGS.fields)
    maximum, errors = exact_maximum(conditional, y, base)
    wrong = maximum * torch.tensor([1.25, 0.75, 1.0]) + torch.tensor([0, 0, 0.2])
    for name, theta in (("wrong", wrong), ("right", maximum)):
        conditional.theta.copy_(theta)
        mismatch = polish_chains(
            conditional, MALA(), y, base, SETTINGS, margin=0.1, generator=generator("test", name)
        )  # fmt: skip
        found[name] = conditional.theta.clone(), conditional.errors.clone(), mismatch
    return maximum, errors, conditional.unit, found


@pytest.mark.parametrize("start", ["wrong", "right"])
def test_ends_at_the_exact_maximum_of_a_gaussian_conditional(polished, start):
    """Two chains and three records in each of three averaged iterations: noise far below that of the B fields."""
    maximum, errors, _, found = polished
    theta, _, mismatch = found[start]
    assert ((theta - maximum).abs() < 0.6 * errors).all(), (theta - maximum) / errors
    assert mismatch.after < 2.5
    assert mismatch.before > 6 if start == "wrong" else mismatch.before < 3.5


def test_standard_errors_are_those_of_the_likelihood_and_hold_the_truth(polished):
    _, errors, unit, found = polished
    theta, reported, _ = found["wrong"]
    # the chains of one visit add to the spread of the data: at most half of it, √(3/2) in all
    assert (reported / errors).min() > 0.9 and (reported / errors).max() < 1.35
    truth = torch.tensor([4.5, -1.0, 0.0]) * unit**2
    assert ((theta - truth).abs() < 4 * reported).all()


def test_a_level_that_is_given_nothing_is_matched_to_the_moments_of_all_fields():
    """Of a whole Gaussian field: θᵀ E[Φ] - ½ log det K(θ) is least where the moments agree.

    Its long waves are correlated over an iteration: with 800 chains and three of them, chains add some 0.4 errors.
    """
    y = free_fields(500, seed=9)
    c = Conditional(Tree((4, 4), octaves=0).levels[0], QUADRATIC)
    c.unit.copy_(y.std())
    c.scale.fill_(0.5)
    moments = Moments(c)
    moments.update(y / c.unit)
    eye = torch.eye(16, dtype=torch.float64).unflatten(1, (4, 4))
    matrices = c.terms[0].gradients(eye).flatten(2).transpose(0, 1)
    theta = torch.tensor([4.5, -1.0, 0.0], dtype=torch.float64) * c.unit**2
    c.theta.copy_(theta * torch.tensor([1.08, 1.0, 1.0]))
    for _ in range(8):
        inverse = torch.einsum("m,mij->ij", theta, matrices).inverse() @ matrices
        slope = moments.mean - 0.5 * inverse.diagonal(dim1=1, dim2=2).sum(1)
        hessian = 0.5 * torch.einsum("kij,lji->kl", inverse, inverse)
        theta = theta - torch.linalg.solve(hessian, slope)
    errors = (hessian.inverse().diagonal() / 500).sqrt()
    settings = Polish(fields=500, burn=60, iterations=6, transitions=20, records=4)
    start = 1.3 * y[:400]  # chains begin there; no moments are taken of it
    given = polish_chains(
        c, MALA(), start, torch.zeros_like(start), settings, margin=0.1, generator=generator("whole"),
        moments=moments,
    )  # fmt: skip
    assert ((c.theta - theta).abs() < 1.2 * errors).all(), (c.theta - theta) / errors
    assert given.after < 2.5 < given.before
    assert (c.errors / errors).min() > 1.0 and (c.errors / errors).max() < 1.6  # of the fields and of the chains


def test_updates_that_break_the_chains_are_taken_back(monkeypatch):
    conditional, y, base = gaussian(200)
    conditional.theta.copy_(torch.tensor([4.5, -1.0, 0.0]) * conditional.unit**2)
    before = conditional.theta.clone()
    monkeypatch.setattr(module, "_newton", lambda seen, active, ridge: torch.tensor([-900.0, 0, 0]).double())
    settings = Polish(fields=200, burn=20, iterations=2, transitions=10)
    with pytest.warns(FitWarning, match=r"polish of 4x4: 2 of 2 updates were taken back"):
        polish_chains(conditional, MALA(), y, base, settings, margin=0.1, generator=generator("t"))
    torch.testing.assert_close(conditional.theta, before, rtol=1e-12, atol=0)


def test_updates_that_double_the_mismatch_to_above_noise_are_taken_back_whole(monkeypatch):
    """Mismatches by a script: an update stays below the larger of five standard errors and twice what was before it.

    Of one that is taken back θ, chains and their step return, and the rate is halved; one that stays doubles it, up to
    what it began with.
    """
    #         mismatch before, after the update, whether it stays, and the rate of the update in units of the first
    script = [(4.0, 7.9, True, 1), (7.9, 15.9, False, 1), (7.9, 15.9, False, 1 / 2), (7.9, 15.7, True, 1 / 4),
              (15.7, 1.0, True, 1 / 2), (1.0, 4.9, True, 1), (4.9, 1.5, True, 1), (1.5, 5.1, False, 1),
              (1.5, 4.9, True, 1 / 2), (4.9, 9.9, False, 1)]  # fmt: skip
    conditional, y, base = gaussian(40)
    conditional.theta.copy_(torch.tensor([4.5, -1.0, 0.0]) * conditional.unit**2)
    first, step = conditional.theta.clone(), torch.tensor([0.01, 0, 0]).double()
    settings = Polish(fields=40, burn=20, iterations=len(script), transitions=4, records=1)
    target = conditional.features(y / conditional.unit)
    chains = module.Chains(conditional, MALA(), y, base, target, settings, generator("scripted"))
    values, real = iter([script[0][0], *(new for _, new, _, _ in script)]), module._try
    states = []

    def seen(*arguments):
        before = chains.z, chains.step_size
        found = real(*arguments)
        states.append((before, (chains.z, chains.step_size)))
        return found

    monkeypatch.setattr(module, "_newton", lambda *_: step)
    monkeypatch.setattr(module, "_mismatch", lambda *_: next(values))
    monkeypatch.setattr(module, "_try", seen)
    thetas = module._ascend(chains, chains.visit(), torch.ones(3, dtype=torch.bool), 0.1, None)
    expected, ends = first, [*(before for before, _ in states[1:]), (chains.z, chains.step_size)]
    for (_, _, stays, rate), theta, (before, after), end in zip(script, thetas, states, ends, strict=True):
        expected = expected - stays * rate * settings.rate * step
        torch.testing.assert_close(theta, expected, rtol=0, atol=1e-14)
        assert not torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
        assert end[0] is (after if stays else before)[0] and end[1] is (after if stays else before)[1]
    torch.testing.assert_close(conditional.theta, expected, rtol=0, atol=1e-14)


def test_steps_of_chains_go_towards_the_target_of_acceptance():
    """Too long a step is refused mostly, and becomes shorter; too short a one longer."""
    conditional, y, base = gaussian(60)
    conditional.theta.copy_(torch.tensor([4.5, -1.0, 0.0]) * conditional.unit**2)
    target = conditional.features(y / conditional.unit)
    chains = module.Chains(conditional, MALA(), y, base, target, SETTINGS, generator("steps"))
    for begun, sign in ((4.0, -1), (0.02, 1)):
        chains.step_size = torch.tensor(begun, dtype=torch.float64)
        seen = chains.visit()
        assert sign * (seen.acceptance - MALA().target) > 0.2
        assert sign * (float(chains.step_size) / begun - 1) > 0.2


def test_tails_at_their_bound_are_free_to_rise_alone():
    conditional = Conditional(Tree((4, 4), "db2").levels[-1], (*QUADRATIC, Potential))
    conditional.held[-2:] = True
    gap = torch.zeros(len(conditional.theta)).double()
    gap[-2:] = torch.tensor([1.0, -1.0])  # the data have more beyond the lower end, and less beyond the upper one
    free = module._free(conditional, gap)
    assert free[:-2].all() and free[-2:].tolist() == [False, True]


def test_what_too_few_fields_tell_of_keeps_its_parameter():
    """A potential whose last interval holds a few pixels of all the fields together."""
    tree = Tree((4, 4), "db2")
    y = free_fields(400, seed=3)
    c = Conditional(tree.levels[-1], (*QUADRATIC, partial(Potential, basis=BSpline(24), even=True)))
    c.unit.copy_(y.std())
    c.terms[1].interval.copy_(torch.tensor([-6.0, 6.0]))
    c.theta[:3] = torch.tensor([4.5, -1.0, 0.0]) * c.unit**2
    c.scale.fill_(0.5)
    before = c.theta.clone()
    settings = Polish(fields=400, burn=20, iterations=1, transitions=10)
    polish_chains(c, MALA(), y, tree.given(2, y), settings, margin=0.1, generator=generator("few"))
    moved = (c.theta != before).tolist()
    assert not any(moved[3:7]) and all(moved[:3]) and all(moved[-5:-1])
    assert not moved[-1]  # of the tails, which no pixel reaches


def double_well(count: int) -> Tensor:
    grid = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    noise = BatchNoise(count, generator=generator("double well"))
    return LineLaw(grid, 4 * (grid**4 - 1.5 * grid**2)).sample(noise, dtype=torch.float64)[:, None, None]


def line(count: int) -> tuple[Conditional, Moments]:
    x = double_well(count)
    c = Conditional(Tree((1, 1)).levels[0], (partial(Potential, basis=BSpline(8), even=True),))
    c.terms[0].fit(x)
    c.guard(5.0)
    moments = Moments(c)
    moments.update(x)
    return c, moments


def test_a_single_pixel_reaches_the_maximum_by_quadrature():
    """Of scipy's minimiser over its own grid, the features given by their definition."""
    c, moments = line(3000)
    mismatch = polish_line(c, moments, margin=5.0)
    grid = torch.linspace(-4, 4, 6001, dtype=torch.float64)
    features = c.features(grid[:, None, None])

    def objective(theta):
        log_weight = -features @ torch.from_numpy(theta) + (grid[1] - grid[0]).log()
        gradient = moments.mean - log_weight.softmax(0) @ features
        return float(torch.from_numpy(theta) @ moments.mean + log_weight.logsumexp(0)), gradient.numpy()

    found = optimize.minimize(
        objective, [0.0] * 4 + [5.0], jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 500}
    )
    torch.testing.assert_close(c.theta, torch.from_numpy(found.x), rtol=1e-4, atol=1e-4)
    assert mismatch.after < 1e-3 < 20 < mismatch.before
    again = c.theta.clone()
    polish_line(c, moments, margin=5.0)
    torch.testing.assert_close(c.theta, again, rtol=1e-5, atol=1e-5)


def test_standard_errors_of_a_single_pixel_shrink_like_those_of_the_moments():
    """In a full exponential family Cov(θ) = Cov(Φ)⁻¹/n, close to that of the data where the family holds their law."""
    c, moments = line(3000)
    polish_line(c, moments, margin=5.0)
    expected = (moments.covariance.inverse().diagonal() / 3000).sqrt()
    assert ((c.errors / expected).log().abs() < 0.3).all()


def test_a_model_polishes_the_levels_it_is_told_and_reports_their_mismatch():
    batches = [Batch(free_fields(500, seed=5)[:, None].float())]
    tuning = Tuning(starts=8, adapt=20, record=20, least=10)
    models = {}
    for largest in (None, 2):
        polish = Polish(fields=400, burn=20, iterations=2, transitions=8, largest=2) if largest else None
        model = CSLC(
            QUADRATIC,
            "haar",
            polish=polish,
            tuning=tuning,
            octaves=2,
            periodic=True,
            shape=(1, 4, 4),
            transform=Identity(),
        )
        logs = model.prepare(batches, generator=generator("model"))
        models[largest] = model, logs
    plain, polished = (models[k][0].conditionals for k in (None, 2))
    same = [torch.equal(a.theta, b.theta) for a, b in zip(plain, polished, strict=True)]
    assert same == [True, False, True]  # of one Gaussian coefficient both find the inverse variance
    assert not any("mismatch" in key for key in models[None][1])
    expected = {f"mismatch_{when}/{size}" for when in ("before", "after") for size in ("1x1", "2x2")}
    assert {key for key in models[2][1] if "mismatch" in key} == expected


@pytest.mark.parametrize("bad", [{"fields": 1}, {"iterations": 0}, {"records": 50}, {"rate": 0.0}, {"ridge": -1.0}])
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(ConfigError, match="polish: fields >= 2"):
        Polish(**bad)
