"""Defects of increments against hand-made kernels, and the scale of scores under noise of any strength."""

import math

import pytest
import torch
from torch import Tensor, nn

from genmodels.processes.clocks import Constant
from genmodels.processes.increments import TimesOfClock, defect, defects
from genmodels.processes.local_objective import Objective
from genmodels.processes.local_score import LocalScore
from genmodels.processes.process import GivenProcess
from genmodels.rng import BatchNoise
from tests.contracts.test_denoiser import randn

TIMES = torch.linspace(0.2, 0.9, 5, dtype=torch.float64)


class Sine(nn.Module):
    def forward(self, t: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.sin(2 * y)


def test_a_share_of_states_decides():
    """Of 100 states the worst four have the slope -12, and the rest nearly none."""
    process = GivenProcess(lambda u, y: -(y**3), shape=(1,), structure="elementwise", clock=Constant(2.0))
    y, u = torch.full((100, 1), 0.1, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)
    y[:4] = 2.0
    each = defects(process, u, y, 0.01)
    assert defect(process, u, y, 0.01) == pytest.approx(float(each[0])) and each[0] > 20 * each[10]


def test_dense_defects_are_of_mean_and_covariance():
    """In one dimension |m₁ - m_ito|/√P + ½ |P'/P - 1|, P = (e^{2JD} - 1)/2J, with P' of J at the mean m₁."""
    process = GivenProcess(lambda u, y: y - y**3, shape=(1,), clock=Constant(2.0))
    y, d = torch.tensor([[0.8], [-0.2], [1.7]], dtype=torch.float64), 0.1
    found = defects(process, torch.zeros(3, dtype=torch.float64), y, d)

    def variance(y: Tensor) -> Tensor:
        j = 1 - 3 * y**2
        return torch.expm1(2 * j * d) / (2 * j)

    j, bend = 1 - 3 * y**2, -3 * y
    mean = y + (y - y**3) * torch.expm1(j * d) / j
    off = (bend * (torch.expm1(j * d) - j * d) / j**2).abs() / variance(y).sqrt()
    torch.testing.assert_close(found, (off + 0.5 * (variance(mean) / variance(y) - 1).abs())[:, 0])


def test_the_strength_of_noise_is_that_of_the_components_it_reaches():
    matrix = torch.tensor([[0.0], [1.5]], dtype=torch.float64)
    process = GivenProcess(lambda u, y: -y, matrix, shape=(2,), clock=Constant(2.0))
    score = LocalScore(Sine(), process)
    assert float(score.strength(TIMES[0])) == pytest.approx(1.5)
    assert float(score.scale(TIMES[0])) == pytest.approx(1.5 * math.sqrt(-math.expm1(-0.2)))


def test_implicit_values_weigh_alike_under_noise_of_any_strength():
    """Whitened is 2 s̄²/g² = 2 (1 - e^{-u}) times the energy and divergence that the likelihood weighs by 1/q."""
    process = GivenProcess(lambda u, y: -y, 1.3, shape=(2,), structure="elementwise", clock=Constant(2.0))
    score, times = LocalScore(Sine(), process), TimesOfClock("clock", process.clock, 0.01)
    values = {}
    for weight in ("whitened", "likelihood"):
        noise = BatchNoise(5, generator=torch.Generator().manual_seed(0), device=torch.device("cpu"))
        objective = Objective(score, times, 2, "ito", False, "plain", weight, "exact")
        values[weight] = objective.implicit(randn(5, 2), TIMES, None, noise)
    ratio = 2 * -torch.expm1(-TIMES) * times.density(TIMES)
    torch.testing.assert_close(values["whitened"], values["likelihood"] * ratio)
