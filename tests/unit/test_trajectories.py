"""Integrals along solutions, and random ends, against closed forms of linear fields."""

import math
from itertools import product

import pytest
import torch

from genmodels.dynamics.regularization import evolve
from genmodels.dynamics.solver_heuristics import Local
from genmodels.dynamics.trajectories import KineticJacobian, Steer, Taylor, derivative
from genmodels.rng import BatchNoise, generator
from genmodels.solvers.runge_kutta import Tsit5
from genmodels.solvers.step_size import PI
from genmodels.types import expand_like
from tests.linear_fields import SPIRAL, START, TIGHT, Given, Linear, line, penalty


@pytest.mark.parametrize("times", [line(0, 1.5), line(0, 0.4, 1.5)])
def test_kinetic_energy_and_jacobian_of_a_spiral_in_closed_form(times):
    """|Ax|² = 4.01 |x|² and |x|² = 4 e^{-t/5}; |εᵀA|² = 4.01 |ε|² = 8.02 since A is normal; halved by D = 2."""
    energy = 4.01 * 4 * 5 * (1 - math.exp(-0.3)) / 2
    for kinetic, jacobian, expected in ((1.0, 0.0, energy), (0.0, 1.0, 4.01 * 1.5), (2.0, 3.0, 2 * energy + 18.045)):
        found = penalty(
            KineticJacobian(kinetic=kinetic, jacobian=jacobian), Linear(SPIRAL), times=times, controller=TIGHT
        )
        torch.testing.assert_close(found[0].detach(), line(expected)[0], rtol=1e-7, atol=0)


def test_probes_give_the_frobenius_norm_in_expectation():
    """Over all four signs, for a matrix that is not normal; each row keeps its probe during the solve."""
    matrix = torch.tensor([[0.3, -1.2], [0.5, 0.1]], dtype=torch.float64)
    signs = torch.tensor(list(product((0.0, 0.9), repeat=2)))
    found = penalty(KineticJacobian(kinetic=0.0), Linear(matrix), START.expand(4, 2), line(0, 2), Given(signs))
    probes = torch.where(signs < 0.5, -1.0, 1.0).double()
    torch.testing.assert_close(found.detach(), (probes @ matrix).square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.detach().mean(), matrix.square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.slow_for("3")
def test_taylor_of_a_spiral_in_closed_form(order):
    """d^K x/dt^K = A^K x, of squared norm 4.01^K |x|²; backwards in time the same as forwards from the other end."""
    expected = 4.01**order * 4 * 5 * (1 - math.exp(-0.3)) / 2
    found = penalty(Taylor(order=order), Linear(SPIRAL), times=line(0, 1.5), controller=TIGHT)
    torch.testing.assert_close(found[0].detach(), line(expected)[0], rtol=1e-7, atol=0)
    end = START @ torch.linalg.matrix_exp(1.5 * SPIRAL).T
    back = penalty(Taylor(order=order), Linear(SPIRAL), end, line(1.5, 0), controller=TIGHT)
    torch.testing.assert_close(back, found, rtol=1e-6, atol=0)


def test_derivatives_along_a_solution_see_the_time():
    """x' = cos(t) x² (x = 1/(c - sin t)): x'' = -sin(t) x² + 2 cos²(t) x³, and x''' of the closed form."""
    t, x = torch.tensor([0.3, 1.1], dtype=torch.float64), torch.tensor([[0.7], [-0.4]], dtype=torch.float64)
    s, c = expand_like(t.sin(), x), expand_like(t.cos(), x)
    field = lambda t, x: expand_like(t.cos(), x) * x.square()  # noqa: E731
    second = -s * x**2 + 2 * c**2 * x**3
    third = -c * x**2 - 6 * s * c * x**3 + 6 * c**3 * x**4
    torch.testing.assert_close(derivative(field, 2)(t, x), second, rtol=1e-12, atol=0)
    torch.testing.assert_close(derivative(field, 3)(t, x), third, rtol=1e-12, atol=0)


@pytest.mark.parametrize("regularizer", [KineticJacobian(), Taylor()], ids=["kinetic_jacobian", "taylor"])
@pytest.mark.parametrize("save", ["last", "all", "dense"])
def test_integrals_leave_the_solution_alone(regularizer, save):
    """Steps, states, paths and dense output are bit for bit those of the field by itself."""
    field, x, times = Linear(SPIRAL, squashed=True), torch.randn(4, 2, generator=generator("x")).double(), line(0, 1, 2)
    options = {"solver": Tsit5(), "controller": PI(), "save": save}
    alone = evolve(field, x, times, **options).solution
    both = evolve(field, x, times, **options, regularizers=(regularizer, Local()), noise=BatchNoise(4)).solution
    assert torch.equal(alone.nfe, both.nfe)
    torch.testing.assert_close(both.x, alone.x, rtol=0, atol=1e-14)
    assert (both.path is None) == (save != "all")
    if save == "all":
        torch.testing.assert_close(both.path, alone.path, rtol=0, atol=1e-14)
    if save == "dense":
        torch.testing.assert_close(both.dense(line(0.3, 1.7)), alone.dense(line(0.3, 1.7)), rtol=0, atol=1e-13)


class Flow:
    """Points and log-determinants as one state, as continuous flows solve for them; knows its latest parts."""

    sketch = True

    def __init__(self, field):
        self.field = field

    def __call__(self, t, y):
        self.velocity = self.field(t, y[:, :2])
        self.frobenius = self.field.matrix.square().sum().expand(len(y))
        return torch.cat((self.velocity, self.field.matrix.trace().expand(len(y), 1)), 1)

    def split(self, y):
        return y[:, :2], y[:, 2]


@pytest.mark.parametrize("regularizer", [KineticJacobian(), KineticJacobian(jacobian=0.0), Taylor(order=2)])
def test_penalties_on_a_flow_are_those_on_its_points(regularizer):
    """Log-determinants add nothing; of the Jacobian a flow has its own norm, here without an estimate."""
    start = torch.cat((START, torch.ones(1, 1, dtype=torch.float64)), 1)
    whole = penalty(regularizer, Flow(Linear(SPIRAL)), start)
    alone = penalty(regularizer, Linear(SPIRAL))  # |εᵀA|² is |A|² for the spiral's A and signs ε
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=0)


def test_steer_draws_the_end_uniformly_around_it():
    noise = BatchNoise(1, generator=generator("steer"))
    ends = torch.stack([Steer(width=0.25).times(line(1, 3), noise) for _ in range(2000)])
    assert (ends[:, 0] == 1).all()
    assert 2.5 <= ends[:, 1].min() < 2.505 and 3.495 < ends[:, 1].max() <= 3.5
    # mean and variance of U(2.5, 3.5), to four standard errors
    assert abs(ends[:, 1].mean() - 3) < 4 * (1 / 12 / 2000) ** 0.5
    assert abs(ends[:, 1].var() - 1 / 12) < 4 * (1 / 180 / 2000) ** 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_steer_moves_a_series_row_by_row_and_keeps_its_order(sign):
    """Within half of the smaller gap; padding stays with the last time."""
    grid = [[0.0, 1, 2, 6, 6], [0.0, 0.5, 4, 4, 4], [1.0, 1, 1, 1, 1], [0.0, 0, 5, 5, 6]]
    room = [[1.0, 1, 4, 4], [0.5, 3.5, 3.5, 3.5], [0, 0, 0, 0], [0, 1, 1, 1]]
    grid, room = (torch.tensor(each, dtype=torch.float64).T for each in (grid, room))
    grid, noise, seen = sign * grid, BatchNoise(4, generator=generator("series")), []
    for _ in range(200):
        moved = Steer().times(grid, noise)
        assert torch.equal(moved[0], grid[0])
        assert ((sign * moved.diff(dim=0) > 0) == (grid.diff(dim=0) != 0)).all()
        assert ((moved[1:] - grid[1:]).abs() <= room / 2 + 1e-12).all()
        seen.append((moved[1:] - grid[1:]).abs())
    widest = torch.stack(seen).amax(0)
    assert (widest >= 0.45 * room).all()
    assert (widest[0, 0] != widest[0, 1]) and torch.equal(moved[2:, 1], moved[2, 1].expand(3))
