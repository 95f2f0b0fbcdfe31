"""The scores that `evals.studies.physics` compares with, of grids, in closed form, or of both."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genmodels.processes.fokker_planck import Density, FokkerPlanck
from genmodels.processes.physics import DoubleWell, Kuramoto, Swimmer, TrappedParticles
from genmodels.processes.process import Process

TIMES = (0.1, 0.3, 0.5, 1.0)
SHAPES = {"double_well": (1,), "trapped_particles": (4, 1), "kuramoto": (3,), "swimmer": (2,)}
START = {  # mean and deviation of every component
    "double_well": (0.5, 0.3),
    "trapped_particles": (1.0, 0.5),
    "kuramoto": (0.5, 1.0),  # a pair of rotors in forty begins more than half a turn apart
    "swimmer": (0.5, 0.3),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "double_well": {},
    "trapped_particles": {},
    "kuramoto": {"frequency": 1.0},
    "swimmer": {"friction": 1.0},  # at 0.1 hardly any noise comes in by t = 1
}
LEAST = 1e-8  # of the largest density: below it cells say nothing
NODES = 5  # of the Gauss-Hermite rule by which the mean angle is integrated over


@dataclass(frozen=True)
class Reference:
    """The score of a process at a time, float64.

    Args:
        process: whose clock is t itself.
        t: the time.
        points: [N, *shape] states.
        weights: [N] probability that they stand for.
        score: [N, *shape] ∇ log p, of components that noise reaches; others are of no account.
    """

    process: Process
    t: float
    points: Tensor
    weights: Tensor
    score: Tensor

    def error(self, score: Callable[[float, Tensor], Tensor]) -> float:
        """E|Gᵀ(s - ∇ log p)|²/E|Gᵀ∇ log p|² of a function (t, points) -> [N, *shape]."""
        u = torch.tensor(self.t, dtype=torch.float64)
        wrong = score(self.t, self.points).double() - self.score
        apart, size = (self.process.noised(u, v).square().sum(1) @ self.weights for v in (wrong, self.score))
        return float(apart / size)


def made(name: str) -> Process:
    kinds = {"double_well": DoubleWell, "trapped_particles": TrappedParticles, "kuramoto": Kuramoto, "swimmer": Swimmer}
    return kinds[name](**SETTINGS[name], shape=SHAPES[name])


def bell(name: str, mean: float | None = None) -> Callable[[Tensor], Tensor]:
    """The law of the start, of components apart, up to a factor."""
    centre, deviation = START[name]
    centre = centre if mean is None else mean
    return lambda y: torch.exp(-0.5 * ((y - centre) / deviation).square().sum(1))


def of_cells(process: Process, t: float, points: Tensor, values: Tensor, score: Tensor) -> Reference:
    """Cells [N, *shape] of density values [N] and score [N, *shape], without those that say nothing."""
    kept = (values >= LEAST * values.max()) & score.flatten(1).isfinite().all(1)
    weights = values[kept] / values[kept].sum()
    return Reference(process, t, points[kept], weights, score[kept])


def double_well(process: Process | None = None, cells: int = 1600) -> list[Reference]:
    """Of a grid."""
    process = process or made("double_well")
    q = float(process.covariance_rate(torch.zeros(())))
    equation = FokkerPlanck(process.force, [q], low=[-4.0], high=[4.0], cells=[cells])
    solved = equation.solve(bell("double_well"), (0.0, *TIMES))
    return [of_cells(process, t, p.points, p.values, p.score()) for t, p in zip(TIMES, solved, strict=True)]


def trapped_particles() -> list[Reference]:
    """4,000 draws of the exact Gaussian law."""
    name = "trapped_particles"
    process, (mean, deviation) = made(name), START[name]
    size, found = process.size, []
    for t in TIMES:
        zero, end = torch.zeros(1, dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
        basis = torch.eye(size, dtype=torch.float64).reshape(size, *process.shape)
        origin = process.kernel(zero, end, torch.zeros(1, *process.shape, dtype=torch.float64))
        moved = (process.kernel(zero, end, basis).mean - origin.mean).reshape(size, size).mT  # affine in the start
        covariance = origin.covariance[0] + deviation**2 * moved @ moved.mT
        law = torch.distributions.MultivariateNormal(origin.mean.flatten() + moved.sum(1) * mean, covariance)
        z = torch.randn(4000, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = law.mean + z @ torch.linalg.cholesky(covariance).mT
        exact = -torch.linalg.solve(covariance, (y - law.mean).mT).mT
        shape, weights = (-1, *process.shape), torch.full((len(y),), 1 / len(y), dtype=torch.float64)
        found.append(Reference(process, t, y.reshape(shape), weights, exact.reshape(shape)))
    return found


def kuramoto(process: Kuramoto | None = None, cells: int = 120) -> list[Reference]:
    """Of a grid for what three rotors are apart, times a Gaussian law of their mean.

    Forces are of differences alone, and noise is as strong in all directions: with θ = a r + A w, a = (1, 1, 1)/√3 and
    the columns of A orthonormal to it, dr = √3 ω du + √(2T) dW and dw = Aᵀ F(A w) du + √(2T) dW are independent.
    """
    process, (mean, deviation) = process or made("kuramoto"), START["kuramoto"]
    along = torch.full((3,), 3**-0.5, dtype=torch.float64)
    apart = torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64).mT
    apart = apart / apart.norm(dim=0)
    q = float(process.covariance_rate(torch.zeros(())))
    equation = FokkerPlanck(
        lambda t, w: process.force(t, w @ apart.mT) @ apart, [q, q], low=[-8.0] * 2, high=[8.0] * 2, cells=[cells] * 2
    )
    nodes, shares = hermite(NODES)
    found = []
    for t, p in zip(TIMES, equation.solve(bell("kuramoto", 0.0), (0.0, *TIMES), steps=40), strict=True):
        variance = deviation**2 + q * t
        r = 3**0.5 * (mean + process.frequency * t) + variance**0.5 * nodes
        pulled = -nodes / variance**0.5  # ∂ log p/∂r
        points = (p.points @ apart.mT)[:, None] + r[:, None] * along
        score = (p.score().flatten(0, 1) @ apart.mT)[:, None] + pulled[:, None] * along
        values = p.values.flatten()
        kept = values >= LEAST * values.max()
        joint = values[kept, None] * shares
        found.append(of_cells(process, t, points[kept].flatten(0, 1), joint.flatten(), score[kept].flatten(0, 1)))
    return found


def hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and shares of a rule for the standard normal law."""
    import numpy as np

    nodes, shares = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(count))
    return nodes, shares / math.sqrt(2 * math.pi)


def swimmer(process: Process | None = None, cells: tuple[int, int] = (210, 90)) -> list[Reference]:
    """Of two grids, one with three times the cells along x.

    No noise reaches x, whose flux is upwind and of order 1 in the width of cells: ∂ log p/∂v is extrapolated to a width
    of 0, at the centres that both grids share.
    """
    process = process or made("swimmer")
    q = process.covariance_rate(torch.zeros(())).diagonal().tolist()

    def solved(along: int) -> list[Density]:
        box = {"low": [-2.2, -5.0], "high": [2.4, 5.5]}
        equation = FokkerPlanck(process.force, q, **box, cells=[along, cells[1]])
        return equation.solve(bell("swimmer"), (0.0, *TIMES), steps=60)

    found = []
    for t, coarse, fine in zip(TIMES, solved(cells[0]), solved(3 * cells[0]), strict=True):
        score = 1.5 * fine.score()[1::3] - 0.5 * coarse.score()
        score[..., 0] = 0.0  # next to a wall of the density nothing holds along x, and nothing asks for it
        found.append(of_cells(process, t, coarse.points, fine.values[1::3].flatten(), score.flatten(0, 1)))
    return found


REFERENCES: dict[str, Callable[[], list[Reference]]] = {
    "double_well": double_well,
    "trapped_particles": trapped_particles,
    "kuramoto": kuramoto,
    "swimmer": swimmer,
}
