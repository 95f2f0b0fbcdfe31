"""Processes of statistical physics: forces against actions, kernels against closed forms and published figures."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad, solve_ivp
from torch import Tensor, nn

from genmodels.processes.clocks import Constant
from genmodels.processes.fokker_planck import FokkerPlanck
from genmodels.processes.increments import TimesOfClock
from genmodels.processes.local_kernels import local_kernel, simulate
from genmodels.processes.local_objective import Objective
from genmodels.processes.local_score import LocalScore, flow_velocity
from genmodels.processes.physics import DoubleWell, Kuramoto, Phi4, Quartic, Swimmer, TrappedParticles
from genmodels.processes.priors import Prior
from genmodels.processes.process import Process
from genmodels.registry import ConfigError
from genmodels.rng import BatchNoise, generator

ZERO = torch.zeros((), dtype=torch.float64)
PROCESSES = {
    "double_well": DoubleWell(1.5, 0.7, 0.6, shape=(3,)),
    "phi4": Phi4(-0.5, 1.2, 0.7, shape=(1, 3, 4)),
    "kuramoto": Kuramoto(0.8, 0.3, 0.4, shape=(5,)),
    "swimmer": Swimmer(shape=(2,)),
    "trapped_particles": TrappedParticles(shape=(3, 2)),
}


def states(process: Process, count: int = 3) -> Tensor:
    return torch.randn(count, *process.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradient(f, y: Tensor) -> Tensor:
    y = y.clone().requires_grad_()
    return torch.autograd.grad(f(y).sum(), y)[0]


@pytest.mark.parametrize("name", PROCESSES)
def test_derivatives_of_forces_are_those_of_automatic_differentiation(name):
    process, u = PROCESSES[name], torch.tensor(0.3).double()
    y = states(process)
    torch.testing.assert_close(process.ito(u, y), Process.ito(process, u, y))
    torch.testing.assert_close(process.jacobian(u, y), Process.jacobian(process, u, y))


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_has_a_probability_flow(name):
    """F - Q s/2, with Q of G alone: in a swimmer the score moves the velocity, and no position."""
    process = PROCESSES[name]
    u, y = torch.tensor(0.3, dtype=torch.float64), torch.ones(2, *process.shape, dtype=torch.float64)
    s = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).reshape(y.shape)
    g = process.amplitude(u)
    pulled = s @ (g @ g.mT) if g.ndim == 2 else g.square() * s
    found = flow_velocity(process, u, y, s)
    torch.testing.assert_close(found, process.force(u, y) - 0.5 * pulled, rtol=1e-12, atol=1e-12)


def test_forces_are_the_gradients_of_what_is_at_rest():
    """F = T ∇ log π for noise √(2T): the action of the lattice, the energy of the rotors, ½ ∇ log π of the wells."""
    lattice, rotors, wells = (PROCESSES[k] for k in ("phi4", "kuramoto", "double_well"))
    y = states(lattice)
    torch.testing.assert_close(lattice.force(ZERO, y), -gradient(lattice.action, y))
    angles = states(rotors)
    energy = lambda v: 0.8 * torch.cos(v - v.roll(1, 1)).sum(1)  # noqa: E731
    torch.testing.assert_close(rotors.force(ZERO, angles) - 0.3, gradient(energy, angles))
    z = states(wells)
    q = float(wells.amplitude(ZERO)) ** 2
    torch.testing.assert_close(wells.force(ZERO, z), 0.5 * q * gradient(wells.prior.log_prob, z))


@pytest.mark.parametrize("a", [1.5, 0.0, -1.0])
def test_the_quartic_law_is_a_density_and_its_samples_are_of_it(a):
    prior = Quartic(a, 0.7, 0.4)
    y = torch.linspace(-3, 3, 7, dtype=torch.float64)
    unnormalised = lambda v: math.exp((a * v**2 - 0.35 * v**4) / 0.4)  # noqa: E731
    mass = quad(unnormalised, -8, 8, points=[-1.5, 0, 1.5], limit=200)[0]
    exact = torch.tensor([math.log(unnormalised(float(v)) / mass) for v in y], dtype=torch.float64)
    torch.testing.assert_close(prior.log_density(y), exact, rtol=0, atol=1e-5)
    for own, generic in ((prior.score, Prior.score), (prior.slope, Prior.slope), (prior.curvature, Prior.curvature)):
        torch.testing.assert_close(own(y), generic(prior, y))
    drawn = prior.sample(BatchNoise(4000, generator=generator("quartic")), (1,), dtype=torch.float64)[:, 0]
    grid = np.linspace(-4, 4, 4001)
    cdf = np.cumsum([unnormalised(v) for v in grid]) * (grid[1] - grid[0]) / mass
    assert stats.kstest(drawn.numpy(), lambda v: np.interp(v, grid, cdf)).pvalue > 0.01


def test_the_table_of_the_quartic_law_ends_where_its_density_does():
    """Not later: cells beyond are lost to the wells. At the ends it is e^{-40} of that at the wells, for any a."""
    for a in (20.0, 1.5, 0.0, -1.0, -1e5):
        prior = Quartic(a, 0.7, 0.4)
        peak = (max(a, 0.0) / 0.7) ** 0.5
        y = torch.tensor([*prior.interval(), peak], dtype=torch.float64)
        low, high, top = prior.log_density(y).tolist()
        assert top - high == pytest.approx(40, rel=1e-9) == top - low


def test_the_double_well_rests_at_its_prior_and_has_the_kernels_of_the_notes():
    process = DoubleWell(shape=(1,))
    equation = FokkerPlanck(
        lambda t, y: process.drift(t, y), [float(process.noise(ZERO)) ** 2], low=[-4.0], high=[4.0], cells=[800]
    )
    rest, y = equation.stationary(), equation.points
    kept = rest.values > 1e-6
    torch.testing.assert_close(rest.values[kept], process.prior.log_prob(y)[kept].exp(), rtol=3e-3, atol=0)
    y, end = torch.tensor([[0.8], [-0.2]], dtype=torch.float64), torch.tensor([0.1, 0.1], dtype=torch.float64)
    first, ito = (local_kernel(process, torch.zeros(2).double(), end, y, order) for order in (1, "ito"))
    expected = torch.tensor([[0.82751491], [-0.22007014]], dtype=torch.float64)
    torch.testing.assert_close(first.mean, expected, rtol=0, atol=1e-8)
    expected = torch.tensor([[0.81587460], [-0.21698017]], dtype=torch.float64)
    torch.testing.assert_close(ito.mean, expected, rtol=0, atol=1e-8)
    expected = torch.tensor([[0.09133924], [0.10933981]], dtype=torch.float64)
    torch.testing.assert_close(ito.variance, expected, rtol=0, atol=1e-8)


def test_the_free_field_relaxes_mode_by_mode():
    """λ = 0: the local kernel is exact over any span, and diagonal in Fourier space with the rates of the docstring."""
    process, span = Phi4(0.5, 0.0, 0.7, shape=(1, 4, 3)), torch.tensor([0.8], dtype=torch.float64)
    y = states(process, 1)
    kernel = local_kernel(process, torch.zeros(1).double(), span, y, 1)
    k = [2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64) for n in (4, 3)]
    rate = 0.5 + 4 * torch.sin(k[0] / 2)[:, None] ** 2 + 4 * torch.sin(k[1] / 2) ** 2
    mean = torch.fft.ifft2(torch.fft.fft2(y) * torch.exp(-0.8 * rate)).real
    torch.testing.assert_close(kernel.mean, mean)
    variance = 0.7 * -torch.expm1(-1.6 * rate) / rate
    torch.testing.assert_close(
        torch.linalg.eigvalsh(kernel.covariance[0]), variance.flatten().sort().values, rtol=1e-9, atol=0
    )


def test_the_swimmer_has_the_kernel_of_the_notes_and_noise_must_spread():
    process = Swimmer(shape=(2,))
    y, start = torch.tensor([[0.5, 1.0]], dtype=torch.float64), torch.zeros(1).double()
    kernel = local_kernel(process, start, torch.tensor([0.1]).double(), y, 1)
    mean = torch.tensor([[0.58381317, 0.99004983]], dtype=torch.float64)
    torch.testing.assert_close(kernel.mean, mean, rtol=0, atol=1e-8)
    covariance = torch.tensor([[6.25709e-5, 9.65764e-4], [9.65764e-4, 1.980133e-2]], dtype=torch.float64)
    torch.testing.assert_close(kernel.covariance[0], covariance, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="noise does not reach every coordinate"):
        local_kernel(process, start, torch.tensor([0.1]).double(), y, 0)


@pytest.mark.parametrize("process", [DoubleWell(shape=(1,)), Kuramoto(shape=(3,)), Swimmer(shape=(2,))])
@pytest.mark.parametrize("weight", ["whitened", "likelihood"])
def test_the_score_is_where_training_stops_though_kernels_differ_in_width(process, weight):
    """For y_s one of six points, q(y) ∝ Σ N(y; m_i, P_i) and the score is known; P_i depends on y_s as J does.

    Of all pairs (y_s, z) that lead to one y the gradient of the loss by s(y) is Q times what s is off the score. It is
    not for |Lᵀ s + z|², which serves kernels of one width.
    """
    g = torch.Generator().manual_seed(4)
    y_s, y = torch.randn(6, *process.shape, generator=g, dtype=torch.float64), torch.zeros(1, *process.shape).double()
    start, end = torch.full((6,), 0.4, dtype=torch.float64), torch.full((6,), 0.7, dtype=torch.float64)
    kernel = local_kernel(process, start, end, y_s, "ito")
    here, z = y.expand_as(y_s), kernel.solve(y - kernel.mean)
    share = (kernel.log_prob(here) - kernel.log_prob(here).logsumexp(0)).exp()
    exact = torch.einsum("i,i...->...", share, kernel.score(here))

    class Everywhere(LocalScore):
        def __init__(self) -> None:
            super().__init__(None, process)
            self.value = nn.Parameter(exact.clone())

        def forward(self, u, y, condition=None):
            return self.value.expand_as(y)

    score, times = Everywhere(), TimesOfClock("clock", process.clock, 0.1)
    objective = Objective(score, times, 1, "ito", False, "plain", weight, "exact")
    slopes = []
    for off in (0.0, 0.1):
        score.value.data.copy_(exact + off)
        value = (share * objective.denoising(start, end, y_s, z)).sum()
        slopes.append(torch.autograd.grad(value, score.value)[0].flatten())
    rate = {"whitened": 2 * 0.3, "likelihood": 1 / float(times.density(end)[0])}[weight]
    assert slopes[0].abs().max() < 1e-12
    wanted = rate * process.spread(end[:1], torch.full_like(y, 0.1)).flatten()
    torch.testing.assert_close(slopes[1], wanted)


@pytest.mark.parametrize("shape", [(3, 2), (2, 1)])
def test_particles_in_a_moving_trap_have_the_law_of_its_moment_equations(shape):
    """m' = F(u, m) and P' = J P + P Jᵀ + 2T by scipy; two spans make one; and local kernels converge to it."""
    process, y = TrappedParticles(1.3, 0.7, 0.9, 2.0, 0.25, shape=shape), None
    y, size = states(process, 1), math.prod(shape)
    start, middle, end = (torch.tensor([v], dtype=torch.float64) for v in (0.2, 0.5, 1.1))

    def right(u: float, v: np.ndarray) -> np.ndarray:
        t, state = torch.tensor(u, dtype=torch.float64), torch.tensor(v[:size]).reshape(1, *shape)
        j, p = Process.jacobian(process, t, state)[0].numpy(), v[size:].reshape(size, size)
        grown = j @ p + p @ j.T + 0.5 * np.eye(size)
        return np.concatenate((process.force(t, state).flatten().numpy(), grown.flatten()))

    begun = np.concatenate((y.flatten().numpy(), np.zeros(size**2)))
    solved = solve_ivp(right, (0.2, 1.1), begun, rtol=1e-7, atol=1e-9).y[:, -1]
    exact = process.transition(start, end, y)
    np.testing.assert_allclose(exact.mean.flatten(), solved[:size], atol=1e-6)
    np.testing.assert_allclose(exact.covariance[0].flatten(), solved[size:], atol=1e-6)
    half = process.transition(middle, end, process.transition(start, middle, y).mean)
    torch.testing.assert_close(half.mean, exact.mean)
    local = TrappedParticles(1.3, 0.7, 0.9, 2.0, 0.25, exact=False, shape=shape)
    errors = []
    for span in (0.1, 0.05):
        found, wanted = (local_kernel(p, start, start + span, y, 1) for p in (local, process))
        errors.append(float((found.mean - wanted.mean).abs().max()))
    assert 7 < errors[0] / errors[1] < 9  # the force's second derivative in time is left out: order 3 of a step


def test_rows_that_stay_are_no_zero_covariance_for_an_exact_kernel():
    """Of a batch the rows with equal times stay; the others are one draw of the law, for noise that is known."""
    process = TrappedParticles(shape=(2, 1))
    y, start, end = states(process, 2), torch.zeros(2).double(), torch.tensor([0.0, 0.7], dtype=torch.float64)
    moved = simulate(process, y, start, end, 50, BatchNoise(2, generator=generator("stay")), "ito")
    z = BatchNoise(2, generator=generator("stay")).normal(2, 1, dtype=torch.float64)
    torch.testing.assert_close(moved[0], y[0])
    torch.testing.assert_close(moved[1:], process.kernel(start[1:], end[1:], y[1:]).sample(z[1:]))


def test_clocks_stretch_processes_and_rows_may_have_times_of_their_own():
    process = TrappedParticles(clock=Constant(4.0), shape=(2, 2))
    y, t = states(process, 2), torch.tensor([0.1, 0.25], dtype=torch.float64)
    both = process.drift(t, y)
    for row in range(2):
        alone = 4 * process.force(4 * t[row], y[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone)
    assert float(process.noise(t[0])) == pytest.approx((2 * 0.25 * 4) ** 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DoubleWell(quartic=0.0, shape=(1,)), "quartic must be > 0"),
        (lambda: DoubleWell(temperature=-1.0, shape=(1,)), "temperature must be > 0"),
        (lambda: Phi4(coupling=-1.0, shape=(4,)), "phi4: coupling >= 0"),
        (lambda: Phi4(-1.0, 0.0, shape=(4,)), "a law at rest"),
        (lambda: Phi4(shape=(2,)), "at least 3 sites"),
        (lambda: Kuramoto(shape=(1, 2, 4)), "at least 3 sites"),
        (lambda: Kuramoto(temperature=0.0, shape=(4,)), "kuramoto: temperature must be > 0"),
        (lambda: Swimmer(shape=(3,)), r"items \(x, v\) of shape \[2\]"),
        (lambda: Swimmer(friction=0.0, shape=(2,)), "friction must be > 0"),
        (lambda: TrappedParticles(shape=(4,)), r"items \[N, 1\] or \[N, 2\]"),
        (lambda: TrappedParticles(attraction=-2.0, shape=(4, 1)), "particles fly apart"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
