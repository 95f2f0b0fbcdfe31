"""Fokker-Planck equations on grids: against closed forms, matrix exponentials and another finite-volume program."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import expm

from genmodels.processes.fokker_planck import FokkerPlanck


def normal(mean: float, std: float):
    return lambda y: torch.exp(-0.5 * ((y - mean) / std).square().sum(-1))


def double_well(cells: int = 800) -> FokkerPlanck:
    return FokkerPlanck(lambda t, y: y - y**3, [1.0], low=[-4.0], high=[4.0], cells=[cells])


def test_double_well_has_the_moments_and_scores_of_an_independent_solver():
    """dy = (y - y³) dt + dW from N(.5, .3²) at t = .5; the reference is good to 5e-3 in the score."""
    (found,) = double_well().solve(normal(0.5, 0.3), [0, 0.5])
    mean, covariance = found.moments()
    assert float(mean) == pytest.approx(0.49485, abs=2e-5)
    assert float(covariance) == pytest.approx(0.47689, abs=2e-5)
    score = found.score()[:, 0]
    at = np.interp([-1, 0, 0.5, 1, 1.5], found.points[:, 0], score)
    assert at == pytest.approx([2.0965, 0.9452, 0.7485, -0.4008, -4.1229], abs=2e-3)
    assert found.score_error(lambda y: torch.zeros_like(y))[1] == pytest.approx(3.2052, abs=2e-3)
    assert abs(float(found.values.sum()) * found.volume - 1) < 1e-11


def test_ornstein_uhlenbeck_in_the_plane_at_second_order():
    """Spiralling, so that the drift is no gradient: mean and covariance are of matrix exponentials."""
    a, start = torch.tensor([[-1.0, 2.0], [-2.0, -1.0]]).double(), torch.tensor([1.0, 0.0]).double()
    moved = torch.tensor(expm(0.5 * a.numpy()))
    covariance = 0.25 * moved @ moved.mT + 0.5 * (1 - math.exp(-1)) * torch.eye(2)
    errors = []
    for cells in (36, 72):
        equation = FokkerPlanck(lambda t, y: y @ a.mT, [1, 1], low=[-4, -4], high=[4, 4], cells=[cells] * 2)
        (found,) = equation.solve(normal(0, 0.5)(equation.points - start), [0, 0.5], steps=cells)
        mean, spread = found.moments()
        errors.append(max(float((mean - moved @ start).abs().max()), float((spread - covariance).abs().max())))
    assert errors[1] < 4e-3 and 3.5 < errors[0] / errors[1] < 4.6


@pytest.mark.parametrize(("order", "low", "high"), [(1, 1.8, 2.2), (2, 3.6, 4.5)])
def test_time_steps_have_their_order(order, low, high):
    """Against the exponential of the very operator."""
    equation = double_well(60)
    start = equation.density(normal(0.5, 0.6))
    exact = expm(0.5 * equation.operator().toarray()) @ start.values.numpy()
    errors = [
        np.abs(equation.solve(start, [0, 0.5], steps=n, order=order)[0].values.numpy() - exact).max() for n in (16, 32)
    ]
    assert low < errors[0] / errors[1] < high


def test_gaps_are_those_of_the_closed_forms():
    """½ (∂² + (log π)' ∂): ½ for N(0, 1); the mixtures' are of another finite-volume program, to four digits."""
    forces = {0.5: lambda t, y: -0.5 * y}
    for m, gap in ((1.0, 0.2425), (1.5, 0.1286), (2.0, 0.0595), (3.0, 0.0072)):
        forces[gap] = lambda t, y, m=m: 0.5 * (-y + m * torch.tanh(m * y))
    for gap, force in forces.items():
        equation = FokkerPlanck(force, [1.0], low=[-10.0], high=[10.0], cells=[800])
        assert equation.gap() == pytest.approx(gap, abs=2e-4)
    small = FokkerPlanck(lambda t, y: -0.5 * y, [1.0], low=[-6.0], high=[6.0], cells=[60])
    assert small.gap() == pytest.approx(0.5, abs=5e-3)  # the dense way


def test_stationary_laws_with_noise_of_the_state_and_of_angles():
    """dy = -y dt + √(1 + y²) dW rests at (1 + y²)⁻² · 2/π; dθ = -sin θ dt + √(2T) dW at von Mises' law."""
    equation = FokkerPlanck(lambda t, y: -y, lambda t, y: 1 + y**2, low=[-30.0], high=[30.0], cells=[3000], walls=True)
    found, y = equation.stationary(), equation.points[:, 0]
    near = y.abs() < 5
    torch.testing.assert_close(found.values[near], 2 / math.pi * (1 + y[near] ** 2) ** -2, rtol=2e-3, atol=0)
    angle = FokkerPlanck(lambda t, y: -y.sin(), [1.0], low=[-math.pi], high=[math.pi], cells=[200], periodic=[True])
    exact = stats.vonmises(2.0).pdf(angle.points[:, 0].numpy())
    rest = angle.stationary()
    assert rest.values.numpy() == pytest.approx(exact, rel=1e-3)
    score, theta = rest.score()[:, 0], angle.points[:, 0]
    torch.testing.assert_close(score, -2 * theta.sin(), rtol=0, atol=2e-3)  # round the circle, without an edge


def test_a_component_without_noise_is_carried_at_first_order():
    """dx = v dt, dv = -v dt + √2 dW: the covariance is of a matrix exponential (Van Loan)."""
    a, q = np.array([[0.0, 1.0], [0.0, -1.0]]), np.diag([0.0, 2.0])
    e = expm(np.block([[-a, q], [np.zeros((2, 2)), a.T]]) * 0.5)
    moved = e[2:, 2:].T
    exact = moved @ (0.25 * np.eye(2)) @ moved.T + moved @ e[:2, 2:]
    errors = []
    for cells in (50, 100):
        equation = FokkerPlanck(
            lambda t, y: torch.stack((y[:, 1], -y[:, 1]), 1), [0, 2], low=[-5, -6], high=[5, 6], cells=[cells] * 2
        )
        (found,) = equation.solve(normal(0, 0.5), [0, 0.5], steps=50)
        errors.append(np.abs(found.moments()[1].numpy() - exact).max())
    assert errors[1] < 0.06 and 1.7 < errors[0] / errors[1] < 2.6


def test_a_drift_of_time_and_several_times():
    """dy = (sin 3t - y) dt + dW: the mean solves an ODE, the variance is ½ everywhere from a start at rest."""
    equation = FokkerPlanck(lambda t, y: torch.sin(3 * t) - y, [1.0], low=[-5.0], high=[5.0], cells=[300])
    found = equation.solve(normal(0, 0.5**0.5), [0, 0.4, 1.0], steps=40, autonomous=False)
    for t, density in zip((0.4, 1.0), found, strict=True):
        mean, covariance = density.moments()
        exact = (math.sin(3 * t) - 3 * math.cos(3 * t) + 3 * math.exp(-t)) / 10
        assert float(mean) == pytest.approx(exact, abs=5e-4)
        assert float(covariance) == pytest.approx(0.5, abs=1e-3)


def test_the_error_of_a_score():
    """Exact for the score of a normal law, (c²) for one that is off by c."""
    equation = double_well(200)
    density = equation.density(normal(0.3, 0.5))
    wrong, size = density.score_error(lambda y: -(y - 0.3) / 0.25)
    assert wrong < 1e-20 and size == pytest.approx(4.0, rel=1e-5)
    assert density.score_error(lambda y: (0.5 - (y - 0.3) / 0.25).float())[0] == pytest.approx(0.25, rel=1e-5)
    with pytest.raises(ValueError, match=r"both must be \[N, n\]"):
        density.score_error(lambda y: y[:, 0])


def test_first_order_keeps_densities_positive_and_second_says_if_it_does_not():
    """One step that is 1e4 times the fastest decay, from a single cell."""
    equation = double_well(400)
    spike = torch.zeros(400, dtype=torch.float64)
    spike[220] = 1.0
    (found,) = equation.solve(spike, [0, 0.5], steps=1, order=1)
    assert float(found.values.min()) > 0
    with pytest.raises(ValueError, match=r"below 0\. Take more steps, or order=1"):
        equation.solve(spike, [0, 0.5], steps=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FokkerPlanck(lambda t, y: y, [1] * 3, low=[0] * 3, high=[1] * 3, cells=[9] * 3), "1 or 2 components"),
        (lambda: FokkerPlanck(lambda t, y: y, [1], low=[0.0], high=[1.0], cells=[3]), "at least 4 cells"),
        (lambda: FokkerPlanck(lambda t, y: y, [1], low=[1.0], high=[0.0], cells=[9]), "low < high"),
        (lambda: double_well().density(normal(3.9, 0.2)), "the box is too small"),
        (lambda: double_well().density(torch.zeros(800)), "not all 0"),
        (lambda: double_well().density(-torch.ones(800)), "finite values >= 0"),
        (lambda: double_well().density(torch.ones(10)), "needs 800 finite values"),
        (lambda: double_well().solve(normal(0, 1), [0.5, 0.1]), "increasing times"),
        (lambda: FokkerPlanck(lambda t, y: y[:, 0], [1], low=[0], high=[1], cells=[9]).operator(), "the drift at"),
        (lambda: FokkerPlanck(lambda t, y: y / 0, [1], low=[0], high=[1], cells=[9]).operator(), "finite"),
        (lambda: FokkerPlanck(lambda t, y: y, [-1], low=[0], high=[1], cells=[9]).operator(), "at least 0"),
    ],
)
def test_what_cannot_be_solved_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
