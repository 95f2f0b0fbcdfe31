"""Densities of diffusions of one or two components on a grid: the reference for learnt scores."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Drift = Callable[[Tensor, Tensor], Tensor]
AT_WALL = 1e-6  # share of the mass in the outermost cells beyond which the box counts as too small
NEGATIVE = 1e-9  # of the largest density: what rounding may leave below 0
GAMMA = 1 - 0.5**0.5  # of Alexander's method: both stages solve with I - γ h L, and it is L-stable


@dataclass(frozen=True)
class Density:
    """A density on the cells of a grid, all float64.

    Args:
        points: [N, n] centres of the cells, the last component fastest.
        values: [*cells] density at the centres, of mass 1.
        volume: of a cell.
        periodic: whether a component is an angle, by component.
    """

    points: Tensor
    values: Tensor
    volume: float
    periodic: tuple[bool, ...]

    def expect(self, f: Tensor | Callable[[Tensor], Tensor]) -> Tensor:
        """∫ f p dx, of a function of points [N, n] or of its values [N, …]."""
        given = f(self.points) if callable(f) else f
        return torch.einsum("n,n...->...", self.values.flatten() * self.volume, given.double())

    def moments(self) -> tuple[Tensor, Tensor]:
        """[n] mean and [n, n] covariance (of angles as numbers within the box)."""
        mean = self.expect(self.points)
        apart = self.points - mean
        return mean, self.expect(apart[:, :, None] * apart[:, None, :])

    def score(self) -> Tensor:
        """[*cells, n] ∇ log p by central differences, exact where log p is quadratic; one-sided at walls.

        Where the density is 0 to the last digit it is NaN.
        """
        log = self.values.clamp(min=0).log()
        slopes = []
        for axis, (count, angle) in enumerate(zip(self.values.shape, self.periodic, strict=True)):
            width = self._width(axis)
            along = log.movedim(axis, 0)
            padded = torch.cat((along[-1:], along, along[:1])) if angle else along
            slope = torch.gradient(padded, spacing=width, dim=0, edge_order=1)[0]
            slopes.append((slope[1 : count + 1] if angle else slope).movedim(0, axis))
        found = torch.stack(slopes, -1)
        return torch.where(found.isfinite(), found, math.nan)

    def score_error(self, score: Callable[[Tensor], Tensor], least: float = 1e-8) -> tuple[float, float]:
        """E|s - ∇ log p|² and E|∇ log p|², over cells with at least a share `least` of the largest density.

        Args:
            score: of points [N, n], in any floating dtype.
        Raises:
            ValueError: if the score has another shape.
        """
        given = score(self.points)
        if given.shape != self.points.shape:
            raise ValueError(
                f"score_error: the score of points {list(self.points.shape)} has the shape {list(given.shape)}; both "
                "must be [N, n]."
            )
        exact = self.score().reshape(self.points.shape)
        kept = (self.values.flatten() >= least * self.values.max()) & exact.isfinite().all(-1)
        weight = torch.where(kept, self.values.flatten(), 0.0) * self.volume
        exact = torch.where(kept[:, None], exact, 0.0)
        apart = torch.where(kept[:, None], given.double() - exact, 0.0)
        return tuple(float((weight * v.square().sum(-1)).sum()) for v in (apart, exact))

    def _width(self, axis: int) -> float:
        values = self.points.reshape(*self.values.shape, -1)[..., axis]
        return float(values.select(axis, 1).flatten()[0] - values.select(axis, 0).flatten()[0])


class FokkerPlanck:
    """∂p/∂t = -Σ_i ∂_i (f_i p) + ½ Σ_i ∂_i² (q_i p) of dy = f dt + √q dW (Itô, q diagonal), by finite volumes.

    The flux between neighbours a distance h apart is ½ (B(-z) q p - B(z) q' p')/h with z = 2 h f/q and the Bernoulli
    function B(z) = z/(eᶻ - 1), which is exact for a constant f (Scharfetter and Gummel; Chang and Cooper): cells lose
    what neighbours gain, so that mass is kept to rounding, and the matrix has no negative entries off its diagonal.
    Space is of order 2; a component without noise has the upwind flux, which is of order 1.

    Args:
        drift: f(t, y) [N, n] of float64 y [N, n] and t [], as that of a `Process`.
        noise: q(t, y) [N, n], or numbers, one for each component: the squared noise rate; 0 for no noise.
        low, high: corners of the box, one number for each component.
        cells: how many along each component.
        periodic: whether a component is an angle; else nothing passes the walls.
        walls: whether they are meant; if not, a density that reaches them is an error.
    Raises:
        ValueError: if the box is none, has not 1 or 2 components, or too few cells.
    Source: Scharfetter & Gummel 1969; Chang & Cooper 1970.
    """

    def __init__(
        self,
        drift: Drift,
        noise: Drift | Sequence[float],
        *,
        low: Sequence[float],
        high: Sequence[float],
        cells: Sequence[int],
        periodic: Sequence[bool] | None = None,
        walls: bool = False,
    ) -> None:
        n = len(low)
        self.periodic = tuple(periodic) if periodic is not None else (False,) * n
        if n not in (1, 2) or {len(high), len(cells), len(self.periodic)} != {n}:
            raise ValueError(
                f"FokkerPlanck: 1 or 2 components are needed, with low, high, cells and periodic of one length, found "
                f"{n}, {len(high)}, {len(cells)} and {len(self.periodic)}. For more, compare with simulated paths."
            )
        if not all(-math.inf < a < b < math.inf and c >= 4 for a, b, c in zip(low, high, cells, strict=True)):
            raise ValueError(
                f"FokkerPlanck: low < high and at least 4 cells are needed along each component, found low={low}, "
                f"high={high}, cells={cells}."
            )
        self.drift, self.noise, self.walls = drift, noise, walls
        self.cells = tuple(cells)
        self.low = torch.tensor(low, dtype=torch.float64)
        self.width = (torch.tensor(high, dtype=torch.float64) - self.low) / torch.tensor(cells, dtype=torch.float64)
        self.volume = float(self.width.prod())

    @property
    def points(self) -> Tensor:
        """[N, n] centres of the cells."""
        return self._at(None)

    def _at(self, axis: int | None) -> Tensor:
        """Centres of the cells, or of the faces above them along a component."""
        shift = torch.full((len(self.cells),), 0.5, dtype=torch.float64)
        if axis is not None:
            shift[axis] = 1.0
        places = [torch.arange(c, dtype=torch.float64) for c in self.cells]
        return self.low + self.width * (torch.cartesian_prod(*places).reshape(-1, len(self.cells)) + shift)

    def operator(self, t: float = 0.0) -> Any:
        """The sparse matrix L [N, N] of dp/dt = L p at a time, whose columns sum to 0.

        Raises:
            ValueError: if f or q has another shape, is not finite, or q is negative.
        """
        import numpy as np
        from scipy import sparse

        numbers = torch.arange(math.prod(self.cells)).reshape(self.cells)
        inside = self._rates(self.noise, t, self.points, "noise")
        out = sparse.csc_matrix((numbers.numel(), numbers.numel()))
        for axis, angle in enumerate(self.periodic):
            faces = self._at(axis)
            f = self._rates(self.drift, t, faces, "drift")[:, axis]
            q = self._rates(self.noise, t, faces, "noise")[:, axis]
            after = numbers.roll(-1, axis).flatten()
            kept = torch.ones(self.cells, dtype=torch.bool)
            if not angle:
                kept.select(axis, self.cells[axis] - 1).fill_(False)
            kept = kept.flatten()
            up, down = _exchange(f, q, inside[:, axis], inside[after, axis], float(self.width[axis]))
            i, j = numbers.flatten()[kept].numpy(), after[kept].numpy()
            up, down = (v[kept].numpy() / float(self.width[axis]) for v in (up, down))
            entries = np.concatenate((-up, down, up, -down))
            where = (np.concatenate((i, i, j, j)), np.concatenate((i, j, i, j)))
            out = out + sparse.csc_matrix((entries, where), shape=out.shape)
        return out

    def _rates(self, given: Drift | Sequence[float], t: float, y: Tensor, what: str) -> Tensor:
        if callable(given):
            found = given(torch.tensor(t, dtype=torch.float64), y)
        else:
            found = torch.tensor(list(given), dtype=torch.float64).expand(len(y), -1)
        if found.shape != y.shape or not found.isfinite().all() or (what == "noise" and bool((found < 0).any())):
            raise ValueError(
                f"FokkerPlanck: the {what} at {list(y.shape)} points must be of the same shape and finite"
                f"{', and at least 0' if what == 'noise' else ''}; found {list(found.shape)}, from "
                f"{float(found.min()):g} to {float(found.max()):g}."
            )
        return found.double()

    def density(self, values: Tensor | Callable[[Tensor], Tensor]) -> Density:
        """A density from its values at the centres, or from a function of them [N, n] -> [N], made to have mass 1.

        Raises:
            ValueError: if the values are negative, not finite, all 0, or reach the walls of the box.
        """
        given = (values(self.points) if callable(values) else values).double()
        if given.numel() != math.prod(self.cells) or not (given >= 0).all() or not 0 < float(given.sum()) < math.inf:
            raise ValueError(
                f"FokkerPlanck: a density needs {math.prod(self.cells)} finite values >= 0, one for each cell, not all "
                f"0; found {given.numel()}, of sum {float(given.sum()):g}."
            )
        given = given.reshape(self.cells) / (given.sum() * self.volume)
        self._check_walls(given)
        return Density(self.points, given, self.volume, self.periodic)

    def _check_walls(self, values: Tensor) -> None:
        for axis, angle in enumerate(self.periodic):
            ends = values.movedim(axis, 0)[[0, -1]]
            if not (angle or self.walls) and float(ends.sum()) * self.volume > AT_WALL:
                raise ValueError(
                    f"FokkerPlanck: {float(ends.sum()) * self.volume:.2g} of the mass is in the outermost cells along "
                    f"component {axis}: the box is too small. Widen low and high, or say walls=True if they are meant."
                )

    def solve(
        self,
        start: Tensor | Callable[[Tensor], Tensor] | Density,
        times: Sequence[float],
        *,
        steps: int = 200,
        order: Literal[1, 2] = 2,
        autonomous: bool = True,
    ) -> list[Density]:
        """Densities at times[1:], from the density at times[0].

        Order 1 (implicit Euler) keeps densities positive whatever the step. Order 2 (Alexander's L-stable method)
        cannot promise that, and says if they are not.

        Args:
            start: as in `density`.
            times: increasing.
            steps: equal ones, in every interval of the times.
            autonomous: whether f and q do not depend on time, and one factorisation serves for all steps of a length.
        Raises:
            ValueError: if times do not increase, a density is negative, or the box is too small.
        Source: Alexander 1977 (Diagonally implicit Runge-Kutta methods for stiff O.D.E.'s).
        """
        times = [float(v) for v in times]
        if len(times) < 2 or not all(a < b for a, b in itertools.pairwise(times)) or steps < 1 or order not in (1, 2):
            raise ValueError(
                f"FokkerPlanck.solve: at least two increasing times, steps >= 1 and order 1 or 2 are needed, found "
                f"{times}, {steps} and {order}."
            )
        begun = start if isinstance(start, Density) else self.density(start)
        p, found = begun.values.flatten().numpy(), []
        fixed = self.operator(times[0]) if autonomous else None
        for t, s in itertools.pairwise(times):
            h = (s - t) / steps
            solve = _factorised(fixed, h, order) if autonomous else None
            for k in range(steps):
                p = self._step(p, t + k * h, h, order, fixed, solve)
            found.append(self._checked(torch.from_numpy(p), s))
        return found

    def _step(self, p: Any, t: float, h: float, order: int, fixed: Any, solve: Callable | None) -> Any:
        if order == 1:
            return (solve or _factorised(self.operator(t + h), h, 1))(p)
        # k = L (p + …) of each stage by k = (stage - what it stands on)/(γ h), which needs no product with L
        first = (solve or _factorised(self.operator(t + GAMMA * h), h, 2))(p)
        base = p + (1 - GAMMA) / GAMMA * (first - p)
        return (solve or _factorised(self.operator(t + h), h, 2))(base)

    def _checked(self, values: Tensor, t: float) -> Density:
        if float(values.min()) < -NEGATIVE * float(values.max()):
            raise ValueError(
                f"FokkerPlanck.solve: the density at t = {t:g} falls to {float(values.min()):.3g}, below 0. Take more "
                "steps, or order=1, which keeps it positive."
            )
        values = values.clamp(min=0).reshape(self.cells)
        self._check_walls(values)
        return Density(self.points, values, self.volume, self.periodic)

    def stationary(self, t: float = 0.0) -> Density:
        """The density that L at a time leaves as it is."""
        import numpy as np
        from scipy.sparse.linalg import splu

        # inverse iteration at a shift that is small beside the gap: one solve would do, three are to rounding
        matrix = self.operator(t)
        shift = 1e-10 * float(abs(matrix.diagonal()).max())
        solve = splu((matrix - shift * _identity(matrix)).tocsc()).solve
        p = np.ones(matrix.shape[0])
        for _ in range(3):
            p = solve(p)
            p = p / p.sum()
        return self._checked(torch.from_numpy(p / self.volume), t)

    def gap(self, t: float = 0.0) -> float:
        """The rate at which the law comes to rest: -Re λ of the second eigenvalue of L at a time."""
        import numpy as np
        from scipy.sparse.linalg import eigs

        matrix = self.operator(t)
        size = matrix.shape[0]
        if size <= 64:
            values = np.linalg.eigvals(matrix.toarray())
        else:
            # every eigenvalue lies left of a shift > 0, the nearest ones are those of the slowest modes
            shift = 1e-3 * float(abs(matrix.diagonal()).max()) / size
            values = eigs(matrix, k=4, sigma=shift, v0=np.linspace(1.0, 2.0, size), return_eigenvectors=False)
        return float(np.sort(-values.real)[1])


def _exchange(f: Tensor, q: Tensor, here: Tensor, there: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """Rates at which a face passes the density of the cell below it up, and that of the cell above it down."""
    z = torch.where(q > 0, 2 * h * f / torch.where(q > 0, q, 1.0), 0.0)
    up, down = _bernoulli(-z) * here / (2 * h), _bernoulli(z) * there / (2 * h)
    return torch.where(q > 0, up, f.clamp(min=0)), torch.where(q > 0, down, (-f).clamp(min=0))


def _bernoulli(z: Tensor) -> Tensor:
    """z/(eᶻ - 1), 1 at 0."""
    near = z.abs() < 1e-5
    return torch.where(near, 1 - z / 2, z / torch.expm1(torch.where(near, 1.0, z).clamp(max=700.0)))


def _identity(matrix: Any) -> Any:
    from scipy import sparse

    return sparse.identity(matrix.shape[0], format="csc")


def _factorised(matrix: Any, h: float, order: int) -> Callable:
    """Solves (I - h L) or (I - γ h L)."""
    from scipy.sparse.linalg import splu

    return splu((_identity(matrix) - (h if order == 1 else GAMMA * h) * matrix).tocsc()).solve
