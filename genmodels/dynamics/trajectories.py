"""Penalties on the path that a solution takes, and a random end of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..rng import Noise
from ..solvers.base import Solver, title
from ..solvers.divergence import ProbeLaw, Sketched, draw_probes
from ..solvers.fields import VectorField
from .augmented import Rate
from .regularization import Regularizer, Solve

Function = Callable[[Tensor, Tensor], Tensor]


@register(Regularizer, "kinetic_jacobian")
class KineticJacobian(Regularizer):
    """RNODE: ∫ (kinetic |f|² + jacobian |εᵀ ∂f/∂x|²)/D |dt| along the solution, with one probe ε for the solve.

    The second term estimates the squared Frobenius norm of the Jacobian, E |εᵀ J|² = |J|². Both are more components of
    the state, which error norms do not see; they work with every gradient method. In a continuous flow the Jacobian is
    that of its divergence, exact or with the probes of that, at no further cost. D is the number of components of an
    item, so that a coefficient does not depend on it.

    Args:
        coefficient, end: see `Regularizer`.
        kinetic: weight of the kinetic energy.
        jacobian: weight of the Jacobian; 0 saves the backward pass in every evaluation.
        law: of the probe.
    Raises:
        ConfigError: if a weight is negative, or both are 0.
    Source: Finlay et al. 2020 (How to train your neural ODE), section 3.
    """

    differentiates = True

    def __init__(
        self,
        coefficient: float = 0.01,
        end: float | None = None,
        kinetic: float = 1.0,
        jacobian: float = 1.0,
        law: ProbeLaw = "rademacher",
    ) -> None:
        super().__init__(coefficient, end)
        if min(kinetic, jacobian) < 0 or kinetic + jacobian == 0:
            raise ConfigError(
                "kinetic_jacobian: weights of at least 0, not both 0, are needed, found "
                f"kinetic={kinetic}, jacobian={jacobian}."
            )
        self.kinetic, self.jacobian, self.law = kinetic, jacobian, law

    def rate(self, x: Tensor, noise: Noise | None) -> Rate:
        if self.jacobian == 0:
            return Rate(self._kinetic)
        return Rate(self._both, (draw_probes(noise, 1, tuple(x.shape[1:]), law=self.law, dtype=x.dtype)[0],))

    def value(self, solve: Solve) -> Tensor | None:
        return solve.integral

    def _kinetic(self, field: Function, t: Tensor, x: Tensor, v: Tensor) -> Tensor:
        return self.kinetic * _mean_square(field.velocity if isinstance(field, Sketched) else v)

    def _both(self, field: Function, t: Tensor, x: Tensor, v: Tensor, probe: Tensor) -> Tensor:
        if isinstance(field, Sketched):  # has differentiated itself for its divergence already
            v = field.velocity
            return self.kinetic * _mean_square(v) + self.jacobian * field.frobenius * (len(v) / v.numel())
        (pulled,) = torch.autograd.grad(v, x, probe.to(v), create_graph=True, materialize_grads=True, allow_unused=True)
        return self.kinetic * _mean_square(v) + self.jacobian * _mean_square(pulled)


@register(Regularizer, "taylor")
class Taylor(Regularizer):
    """TayNODE: ∫ |d^K x/dt^K|²/D |dt| along the solution, by nested forward-mode differentiation.

    With D_f g = ∂g/∂t + (∂g/∂x) f the derivative along the solution, d^K x/dt^K = D_f^{K-1} f. The integral is one more
    component of the state, which error norms do not see, and works with every gradient method. D is the number of
    components of an item; an evaluation costs about 2^K of the field.

    Args:
        coefficient, end: see `Regularizer`.
        order: K; a solver of order K - 1 makes errors that grow with this derivative.
    Raises:
        ConfigError: if the order is below 1.
    Source: Kelly et al. 2020 (Learning differential equations that are easy to solve), section 4.
    """

    differentiates = True

    def __init__(self, coefficient: float = 0.01, end: float | None = None, order: int = 2) -> None:
        super().__init__(coefficient, end)
        if order < 1:
            raise ConfigError(f"taylor.order: at least 1 is needed, found {order}.")
        self.order = order

    def rate(self, x: Tensor, noise: Noise | None) -> Rate:
        return Rate(self._rate)

    def value(self, solve: Solve) -> Tensor | None:
        return solve.integral

    def _rate(self, field: Function, t: Tensor, x: Tensor, v: Tensor) -> Tensor:
        if isinstance(field, Sketched):  # of points alone, without their log-determinants
            field, x, v = field.field, field.split(x)[0], field.velocity
        return _mean_square(v if self.order == 1 else derivative(field, self.order)(t, x))


def derivative(field: Function, order: int) -> Function:
    """d^order x/dt^order along the solutions of dx/dt = field(t, x), as a function of (t, x)."""
    if order == 1:
        return field
    lower = derivative(field, order - 1)
    return lambda t, x: torch.func.jvp(lower, (t, x), (torch.ones_like(t), field(t, x)))[1]


@register(Regularizer, "steer")
class Steer(Regularizer):
    """STEER: in training every time but the first is drawn anew, t_i + U(-width, width) times its smaller gap.

    The gaps are those to its neighbours, so the order of a series is kept; the end of a solve over [t₀, t₁] is drawn
    from t₁ ± width (t₁ - t₀). A grid [L] moves as one for all rows, a grid [L, B] row by row; times that repeat stay
    together. It adds nothing to the loss, and serves ODEs alone.

    Args:
        width: share of the gap, at most 1/2.
    Raises:
        ConfigError: if the width is outside (0, 1/2].
    Source: Ghosh et al. 2020 (STEER), section 3.
    """

    def __init__(self, width: float = 0.5) -> None:
        super().__init__(0.0)
        if not 0 < width <= 0.5:
            raise ConfigError(f"steer.width: a number above 0 and at most 0.5 is needed, found {width}.")
        self.width = width

    def check(self, solver: Solver) -> None:
        if solver.needs is not VectorField:
            raise ConfigError(
                f"regularizer 'steer' moves the times of an ODE, and solver '{title(solver)}' solves for a "
                f"{solver.needs.__name__}, whose noise is made for given times. Use error_estimate, stiffness or local."
            )

    def times(self, times: Tensor, noise: Noise | None) -> Tensor:
        grid = times.double() if times.ndim == 2 else times.double()[:, None]
        draws = noise.uniform(len(grid) - 1, dtype=torch.float64).to(grid.device)
        u = (draws if times.ndim == 2 else draws[:1]).T
        gaps = grid.diff(dim=0)
        right = _following(gaps)
        room = torch.where(gaps.abs() < right.abs(), gaps, right)
        moved = torch.cat((grid[:1], grid[1:] + self.width * (2 * u - 1) * room))
        places = torch.arange(len(grid), device=grid.device)[:, None].expand_as(grid)
        moves = torch.cat((torch.ones_like(gaps[:1], dtype=torch.bool), gaps != 0))
        moved = moved.gather(0, torch.where(moves, places, 0).cummax(0).values)
        return moved if times.ndim == 2 else moved[:, 0]

    def value(self, solve: Solve) -> None:
        return None


def _following(gaps: Tensor) -> Tensor:
    """[N, *] for each of the gaps [N, *] the next one after it that is not 0; itself where there is none."""
    n, places = len(gaps), torch.arange(len(gaps), device=gaps.device)[:, None].expand_as(gaps)
    after = torch.where(gaps != 0, places, n)[1:]
    after = torch.cat((after, torch.full_like(places[:1], n))).flip(0).cummin(0).values.flip(0)
    return torch.where(after < n, gaps.gather(0, after.clamp(max=n - 1)), gaps)


def _mean_square(y: Tensor) -> Tensor:
    """[B] mean over the components of each row of y [B, *]."""
    return y.reshape(len(y), -1).square().mean(1) if y.ndim > 1 else y.square()
