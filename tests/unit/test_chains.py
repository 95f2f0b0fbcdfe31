"""Markov chains: closed forms of proposals and acceptance, laws that they leave invariant, randomness, step sizes."""

import math

import pytest
import torch

from genmodels.registry import ConfigError, build, names
from genmodels.rng import BatchNoise, SeedNoise, generator
from genmodels.wavelet import chains
from genmodels.wavelet.chains import HMC, MALA, Kernel, adapt, advance, begin, record, restart, walk
from genmodels.wavelet.line import LineLaw

KERNELS = pytest.mark.parametrize("name", names(Kernel))


def normal(precision=1.0):
    """½ Σ precision z²."""
    return lambda z: (0.5 * (precision * z.double().square()).flatten(1).sum(1), (precision * z).to(z.dtype))


def correlated(precision):
    """½ zᵀ P z."""
    return lambda z: (0.5 * ((z @ precision) * z).sum(1), z @ precision)


def wells(z):
    """2 (z² - 1)² + 0.3 z, summed over components."""
    return (2 * (z**2 - 1) ** 2 + 0.3 * z).flatten(1).sum(1), 8 * z * (z**2 - 1) + 0.3


class Counted:
    def __init__(self, potential):
        self.potential, self.calls, self.seen = potential, 0, []

    def __call__(self, z):
        self.calls += 1
        self.seen.append(z)
        return self.potential(z)


def noise(n, *key):
    return BatchNoise(n, generator=generator("chains", *key))


def double(*shape):
    return noise(shape[0], "start").normal(*shape[1:], dtype=torch.float64)


def kernel(name):
    return build(Kernel, name)


# ---- proposals and their acceptance ---


def test_mala_on_a_standard_normal_has_its_log_ratio_in_closed_form():
    """log α = -ε/4 (|z'|² - |z|²), with ε = h²/2."""
    z, momentum, eps = double(6, 2, 3), double(12, 2, 3)[6:], 0.3
    step = torch.tensor(math.sqrt(2 * eps), dtype=torch.float64)
    new = MALA().propose(normal(), begin(normal(), z), momentum, step, 1.0)
    torch.testing.assert_close(new.z, (1 - eps) * z + math.sqrt(2 * eps) * momentum, rtol=1e-13, atol=1e-13)
    expected = -eps / 4 * (new.z.square() - z.square()).sum((1, 2))
    torch.testing.assert_close(new.log_ratio, expected, rtol=1e-12, atol=1e-12)


def test_mala_is_a_langevin_step_with_the_ratio_of_its_transition_densities():
    """z' = z - ε P ∇E + √(2εP) ξ; log α = E - E' + log q(z | z') - log q(z' | z), P = s²; steps of each chain's own."""
    z, xi = 0.8 * double(7, 4), double(14, 4)[7:]
    eps = torch.linspace(0.01, 0.2, 7, dtype=torch.float64)
    scale = torch.tensor([0.3, 1.0, 0.5, 0.7], dtype=torch.float64)
    new = MALA().propose(wells, begin(wells, z), xi, (2 * eps).sqrt(), scale)
    variance = 2 * eps[:, None] * scale**2
    drifted = lambda v: v - variance / 2 * wells(v)[1]  # noqa: E731
    torch.testing.assert_close(new.z, drifted(z) + variance.sqrt() * xi, rtol=1e-12, atol=1e-12)
    density = lambda to, at: -((to - drifted(at)).square() / (2 * variance)).sum(1)  # noqa: E731
    expected = wells(z)[0] - wells(new.z)[0] + density(z, new.z) - density(new.z, z)
    torch.testing.assert_close(new.log_ratio, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("d", "eps"), [(100, 0.2), (1000, 0.1), (1000, 0.05)])
def test_mala_is_accepted_as_often_as_many_dimensions_predict(d, eps):
    """2 Φ(-½ √(ε³ d/2)) = .7518, .7237, .9005: within 4 standard errors, and 1/(5 d) for a finite d."""
    n = 10_000 if d == 100 else 2000
    drawn = noise(n, d, int(100 * eps))
    state = begin(normal(), drawn.normal(d))
    state = advance(MALA(), normal(), state, 1, step_size=math.sqrt(2 * eps), scale=1.0, noise=drawn)
    theory = math.erfc(0.5 * math.sqrt(eps**3 * d / 2) / math.sqrt(2))
    assert theory == pytest.approx({0.2: 0.7518, 0.1: 0.7237, 0.05: 0.9005}[eps], abs=5e-5)
    p = state.probability
    assert float(p.mean()) == pytest.approx(theory, abs=4 * float(p.std()) / n**0.5 + 0.2 / d)
    assert float(state.acceptance.mean()) == pytest.approx(
        theory, abs=4 * math.sqrt(theory * (1 - theory) / n) + 0.2 / d
    )


@pytest.mark.parametrize("leapfrog", [1, 2, 5])
def test_hmc_of_a_harmonic_oscillator_is_a_power_of_the_leapfrog_matrix(leapfrog):
    h = 0.7
    matrix = torch.tensor([[1 - h**2 / 2, h], [-h * (1 - h**2 / 4), 1 - h**2 / 2]], dtype=torch.float64)
    scale = torch.tensor([0.2, 3.0, 1.0], dtype=torch.float64)
    potential = normal(1 / scale**2)
    w, p = double(5, 3), double(10, 3)[5:]
    new = HMC(leapfrog).propose(potential, begin(potential, scale * w), p, torch.tensor(h), scale)
    far, fast = torch.einsum("ij,jbd->ibd", torch.linalg.matrix_power(matrix, leapfrog), torch.stack((w, p)))
    torch.testing.assert_close(new.z, scale * far, rtol=1e-6, atol=1e-6)
    lost = 0.5 * (w.square() + p.square() - far.square() - fast.square()).sum(1)
    torch.testing.assert_close(new.log_ratio, lost, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("made", "each"), [(MALA(), 1), (HMC(4), 4)])
def test_a_transition_costs_its_leapfrog_steps(made, each):
    """The gradient at its start is that at the end of the last one, also where that was refused."""
    potential = Counted(wells)
    state = begin(potential, double(3, 2))
    state = advance(made, potential, state, 30, step_size=0.6, scale=1.0, noise=noise(3))
    assert potential.calls == 1 + 30 * each == 1 + 30 * made.evaluations
    assert state.transitions == 30 and 0 < int(state.accepted.sum()) < 90 and state.failed.tolist() == [0, 0, 0]
    energy, gradient = wells(state.z)
    torch.testing.assert_close(state.energy, energy)
    torch.testing.assert_close(state.gradient, gradient)


# ---- laws ---


@KERNELS
@pytest.mark.parametrize("settled", [True, False])
def test_the_covariance_of_a_normal_law_is_reproduced(name, settled):
    """From its draws, which it must leave as they are, and from far away; with steps that are often refused."""
    n = 6000
    spread = torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64)
    correlation = torch.tensor([[1, 0.5, -0.3], [0.5, 1, 0.2], [-0.3, 0.2, 1]], dtype=torch.float64)
    covariance = spread[:, None] * correlation * spread
    potential = correlated(torch.linalg.inv(covariance))
    z = noise(n, name).normal(3, dtype=torch.float64)
    z = z @ torch.linalg.cholesky(covariance).mT if settled else 2 * spread.expand(n, 3)
    step = {"mala": 1.3, "hmc": 0.75}[name]
    state = begin(potential, z)
    state = advance(kernel(name), potential, state, 40, step_size=step, scale=spread, noise=noise(n, name, 1))
    assert 0.3 < float(state.acceptance.mean()) < 0.9
    variance = covariance.diag()
    error = ((variance[:, None] * variance + covariance**2) / n).sqrt()
    assert ((torch.cov(state.z.mT) - covariance).abs() < 4 * error).all()
    assert (state.z.mean(0).abs() < 4 * (variance / n).sqrt()).all()


@KERNELS
def test_a_double_well_has_the_shares_and_moments_of_quadrature(name):
    n = 4000
    grid = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    law = LineLaw(grid, wells(grid[:, None])[0])
    state = begin(wells, torch.zeros(n, 1, dtype=torch.float64))
    step = {"mala": 0.5, "hmc": 0.3}[name]
    state = advance(kernel(name), wells, state, 150, step_size=step, scale=1.0, noise=noise(n, name))
    assert 0.3 < float(state.acceptance.mean()) < 0.9
    for f in (lambda z: (z > 0.002).double(), lambda z: z, lambda z: z**2, lambda z: z**4):
        mean, second = float(law.mean(f(grid))), float(law.mean(f(grid) ** 2))
        assert float(f(state.z).mean()) == pytest.approx(mean, abs=4 * math.sqrt((second - mean**2) / n))


def test_jitter_lets_a_mode_forget_whose_period_is_the_length_of_a_trajectory():
    """Ten steps that turn leapfrog's oscillator by 2π: with one length of them z stays, with 1 ± 0.2 it mixes."""
    n, h = 3000, math.sqrt(2 - 2 * math.cos(math.pi / 5))
    left = {}
    for jitter in (0.0, 0.2):
        state = begin(normal(), torch.full((n, 1), 3.0, dtype=torch.float64))
        made = HMC(10, jitter=jitter)
        state = advance(made, normal(), state, 30, step_size=h, scale=1.0, noise=noise(n))
        left[jitter] = (float(state.z.mean()), float(state.z.var()), float(state.acceptance.mean()))
    assert left[0.0] == pytest.approx((3, 0, 1), abs=1e-9)
    mean, variance, _ = left[0.2]
    assert mean == pytest.approx(0, abs=4 / n**0.5) and variance == pytest.approx(1, abs=4 * (2 / n) ** 0.5)


def test_the_jitter_is_uniform_and_independent_of_the_rest():
    """A free particle moves by h p: h² is (1 + j²/3) of that without jitter, h⁴ its fourth moment."""
    n, free = 40_000, lambda z: (torch.zeros(len(z), dtype=torch.float64), torch.zeros_like(z))
    for shape in (1, 13):
        state = begin(free, torch.zeros(n, shape, dtype=torch.float64))
        moved = advance(HMC(1, jitter=0.6), free, state, 1, step_size=2.0, scale=0.5, noise=noise(n, shape)).z[:, 0]
        j = 0.6
        second, fourth = 1 + j**2 / 3, 1 + 2 * j**2 + j**4 / 5
        eighth = sum(math.comb(8, k) * j**k / (k + 1) for k in range(0, 9, 2))
        assert float((moved**2).mean()) == pytest.approx(second, abs=4 * ((3 * fourth - second**2) / n) ** 0.5)
        assert float((moved**4).mean()) == pytest.approx(
            3 * fourth, abs=4 * ((105 * eighth - 9 * fourth**2) / n) ** 0.5
        )


def test_a_large_energy_does_not_hide_its_differences():
    """Energies are kept and compared in float64, also for states in float32."""
    shifted = lambda z: (wells(z.double())[0] + 2.0**32, wells(z)[1])  # noqa: E731
    z = double(200, 2).float()
    runs = [
        advance(MALA(), p, begin(p, z), 20, step_size=0.5, scale=1.0, noise=noise(200))
        for p in (lambda z: (wells(z.double())[0], wells(z)[1]), shifted)
    ]
    assert torch.equal(runs[0].z, runs[1].z) and runs[1].z.dtype == torch.float32


# ---- randomness ---


@KERNELS
@pytest.mark.parametrize("shape", [(1,), (3, 5), (1, 8, 8)])
def test_a_chain_depends_on_its_seed_alone(name, shape, monkeypatch):
    """Not on the batch, on how many transitions a call makes, nor on how many draws are made at once."""
    starts = double(5, *shape)
    arguments = {"step_size": 0.4, "scale": 0.4 if len(shape) < 3 else 0.25}

    def run(rows, *steps):
        state, drawn = begin(wells, starts[rows]), SeedNoise([10 + k for k in rows], purpose="chain")
        for count in steps:
            state = advance(kernel(name), wells, state, count, noise=drawn, **arguments)
        return state

    whole = run([0, 1, 2, 3, 4], 50)
    assert 0 < float(whole.acceptance.mean()) < 1 and len(set(whole.z.flatten(1)[:, 0].tolist())) == 5
    assert torch.equal(run([3], 50).z[0], whole.z[3]) and torch.equal(run([4, 1], 50).z, whole.z[[4, 1]])
    assert torch.equal(run([0, 1, 2, 3, 4], 17, 1, 32).z, whole.z)
    monkeypatch.setattr(chains, "BUFFER", 200)
    assert torch.equal(run([0, 1, 2, 3, 4], 50).z, whole.z)


def test_every_chain_can_have_its_own_step():
    steps = torch.tensor([0.1, 0.9, 0.4])
    z = double(3, 4)
    together = advance(MALA(), wells, begin(wells, z), 25, step_size=steps, scale=1.0, noise=SeedNoise(3))
    for k in range(3):
        alone = begin(wells, z[k : k + 1])
        alone = advance(MALA(), wells, alone, 25, step_size=steps[k], scale=1.0, noise=SeedNoise([k]))
        assert torch.equal(alone.z[0], together.z[k])


def test_a_record_is_of_every_transition():
    z = double(4, 2)
    arguments = {"step_size": 0.5, "scale": 1.0}
    last, seen = record(
        MALA(), wells, begin(wells, z), 12, observe=lambda s: s.z[:, 0], noise=SeedNoise(4), **arguments
    )
    walked = [s.z[:, 0] for s in walk(MALA(), wells, begin(wells, z), 12, noise=SeedNoise(4), **arguments)]
    assert torch.equal(seen, torch.stack(walked)) and torch.equal(seen[-1], last.z[:, 0]) and seen.shape == (12, 4)
    assert last.transitions == 12 and restart(last).transitions == 0 and int(restart(last).accepted.sum()) == 0
    assert torch.equal(last.accepted, (torch.cat((z[None, :, 0], seen)).diff(dim=0) != 0).sum(0))


# ---- what is not finite ---


@KERNELS
@pytest.mark.parametrize("bad", ["energy", "gradient", "minus infinity"])
def test_proposals_that_are_not_finite_are_refused_and_counted(name, bad):
    """Beyond a wall at 0.5 the potential is undefined; chains keep the normal law within it."""

    def walled(z):
        energy, gradient = normal()(z)
        beyond = z[:, 0] > 0.5
        if bad == "gradient":
            return energy, gradient.masked_fill(beyond[:, None], math.nan)
        return energy.masked_fill(beyond, math.nan if bad == "energy" else -math.inf), gradient

    n = 3000
    state = begin(walled, torch.zeros(n, 1, dtype=torch.float64))
    state = advance(
        kernel(name), walled, state, 60, step_size={"mala": 0.7, "hmc": 0.3}[name], scale=1.0, noise=noise(n)
    )
    assert (state.z <= 0.5).all() and state.energy.isfinite().all() and state.gradient.isfinite().all()
    assert 0 < int(state.failed.sum()) <= int((60 - state.accepted).sum())
    cut = math.exp(-0.125) / math.sqrt(2 * math.pi) / 0.6914624612740131  # φ(½)/Φ(½)
    spread = math.sqrt(1 - 0.5 * cut - cut**2)
    assert float(state.z.mean()) == pytest.approx(-cut, abs=4 * spread / n**0.5)


def test_a_potential_is_never_asked_where_a_state_is_not_finite():
    """z⁴ with a step by which leapfrog overflows, which tables of energies could not look up."""
    steep = Counted(lambda z: ((z**4).sum(1), 4 * z**3))
    state = begin(steep, torch.full((8, 2), 3.0))
    state = advance(HMC(12), steep, state, 3, step_size=1.0, scale=1.0, noise=noise(8))
    assert all(z.isfinite().all() for z in steep.seen) and state.failed.tolist() == [3] * 8
    assert state.accepted.tolist() == [0] * 8 and (state.z == 3).all() and (state.probability == 0).all()


def test_a_trajectory_that_overflows_on_the_way_is_refused():
    """Without a force its momentum stays finite; it must not come back as the start, accepted."""
    free = lambda z: (torch.zeros(len(z), dtype=torch.float64), torch.zeros_like(z))  # noqa: E731
    state = begin(free, torch.ones(8, 40))
    state = advance(HMC(3), free, state, 2, step_size=3e38, scale=1.0, noise=noise(8))
    assert state.failed.tolist() == [2] * 8 and state.accepted.tolist() == [0] * 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_chains_do_not_start_where_nothing_is_finite(value):
    z = double(3, 2)
    z[1, 0] = value
    with pytest.raises(ValueError, match=r"level 3, ring 2: 1 of 3 chains .*the first is item 1.*regulari|ridge"):
        begin(normal(), z, where="level 3, ring 2")
    for potential in (lambda z: (z[:, 0] * value, z), lambda z: (z[:, 0], z * value)):
        with pytest.raises(ValueError, match="ring 2: 3 of 3 chains start where the energy, or its gradient"):
            begin(potential, double(3, 2), where="ring 2")


def test_potentials_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must give energies \[3\] and gradients \[3, 2\], found \[\] and \[3, 2\]"):
        begin(lambda z: (z.sum(), z), double(3, 2))


BAD = [{"leapfrog": 0}, {"target": 0.0}, {"target": 1.0}, {"jitter": 1.0}, {"jitter": -0.1}]


@pytest.mark.parametrize("arguments", BAD)
def test_kernels_say_what_they_need(arguments):
    with pytest.raises(ConfigError, match="hmc: leapfrog >= 1, a target between 0 and 1 and a jitter"):
        build(Kernel, {"name": "hmc", **arguments})


# ---- step size ---


@pytest.mark.parametrize("made", [MALA(), MALA(0.8), HMC(3), HMC(5, 0.85)], ids=["mala", "mala-0.8", "hmc", "hmc-0.85"])
@pytest.mark.parametrize("unit", [1e-2, 1.0])
def test_the_step_size_reaches_the_target_and_is_frozen(made, unit):
    """For a scale that is right, and one a hundred times too small; the acceptance is of the frozen step alone."""
    n, spread = 100, torch.tensor([0.1, 0.4, 1.0, 3.0, 10.0, 0.7], dtype=torch.float64)
    potential, drawn = normal(1 / spread**2), noise(n, "adapt", made.evaluations)
    start = spread * drawn.normal(6, dtype=torch.float64)
    found = adapt(made, potential, begin(potential, start), scale=unit * spread, noise=drawn, steps=120, measured=40)
    assert found.state.transitions == 40 and found.step_size.shape == () and found.step_size.dtype == torch.float64
    assert found.acceptance == pytest.approx(float(found.state.accepted.sum()) / (40 * n))
    # 4000 transitions have a standard error below 0.008; the mean of log h below 0.02
    assert found.acceptance == pytest.approx(made.target, abs=0.04)
    again = restart(found.state)
    again = advance(made, potential, again, 40, step_size=found.step_size, scale=unit * spread, noise=drawn)
    assert float(again.acceptance.mean()) == pytest.approx(found.acceptance, abs=0.04)


COLLAPSE = {
    "stiff": (normal(1e14), 1e-7, "have collapsed"),
    "flat": (normal(1e-12), 1.0, "have escaped"),
    "falling": (lambda z: (z.sum(1).double(), torch.ones_like(z)), 1.0, "have escaped"),
    "concave": (normal(-1.0), 1.0, "have not settled"),
    "unbounded": (lambda z: (-(z.double() ** 4).sum(1) / 4, -(z**3)), 1.0, "have not settled"),
}


@pytest.mark.parametrize("case", COLLAPSE)
def test_energies_without_a_law_of_this_scale_are_named(case):
    potential, unit, said = COLLAPSE[case]
    drawn = noise(20, case)
    state = begin(potential, unit * drawn.normal(4))
    with pytest.raises(ConfigError, match=rf"level 2, ring 3: the chains {said} \(step size .*larger ridge"):
        adapt(MALA(), potential, state, scale=1.0, noise=drawn, steps=250, where="level 2, ring 3")


def test_chains_that_hardly_move_have_collapsed():
    """A law within walls that every proposal leaves, whatever the step."""
    walled = lambda z: (torch.where(z.abs().sum(1) > 0, math.inf, 0.0), torch.zeros_like(z))  # noqa: E731
    with pytest.raises(ConfigError, match=r"band: .*collapsed .*acceptance 0 for 0.574, 600 of 600 proposals"):
        adapt(
            MALA(),
            walled,
            begin(walled, torch.zeros(30, 2)),
            scale=1.0,
            noise=noise(30),
            steps=6,
            measured=20,
            where="band",
        )
