"""Methods that invert and come back: each is a solver up, a solver down, and what is shared between them.

In sizes of steps h, a state comes back from the round trip under one prompt to O(h) by Euler's method, O(h²) by Uni-Inv
and AB2, O(h³) by RF-Solver, Heun's method and FireFlow, and to rounding by a fixed point.

Solvers that ask at other places of a step up than down (Euler's and Heun's method and AB2 at its ends, RF-Solver of
order 3 at its thirds) pair shared features by time, the others by interval.
"""

from typing import Literal

from torch import Tensor

from ..registry import register
from ..solvers.base import Solver
from ..solvers.inverse import Inverse
from ..solvers.multistep import AB2, FireFlow, UniInv
from ..solvers.rf_solver import RFSolver
from ..solvers.runge_kutta import Euler, Heun
from .editor import Editor, Prompt, Walk
from .method import ByInversion, EditMethod
from .sharing import Sharing


@register(EditMethod, "vanilla")
class Vanilla(ByInversion):
    """Euler's method up and down: the inversion of rectified flows before solvers of higher order.

    Args:
        num_steps: steps each way, of one evaluation.
        share: what the way down takes over from the way up; null for nothing.
    """

    def __init__(self, num_steps: int = 30, share: Sharing | None = None) -> None:
        super().__init__(num_steps, Euler(), Euler(), share, "time", amid=False)


@register(EditMethod, "rf_edit")
class RFEdit(ByInversion):
    """RF-Edit: RF-Solver up and down, the values of late attention layers near noise taken over from the way up.

    The published settings are 15 steps with 2 shared and guidance 2 for what is added or replaced, and 25 steps with 3
    to 5 shared for style; more sharing keeps more of the source.

    Args:
        num_steps: steps each way, of as many evaluations as the order.
        share: what the way down takes over from the way up; null for nothing, as flows without attention need.
        order: of the solver, 2 or 3.
        probe: of the solver of order 2, in units of the step. Between 1/2 and 1, or below 1/2, probes up and down are
            at different times, and what is shared is one of another time.
    Source: Wang et al. 2025 (Taming rectified flow for inversion and editing), algorithm 1 and section 3 (RF-Edit).
    """

    def __init__(
        self, num_steps: int = 15, share: Sharing | None = Sharing(), order: Literal[2, 3] = 2, probe: float = 0.5
    ) -> None:
        pairing = "time" if order == 3 or probe == 1 else "interval"
        super().__init__(num_steps, RFSolver(order, probe), RFSolver(order, probe), share, pairing, amid=probe < 1)


@register(EditMethod, "heun")
class HeunBack(ByInversion):
    """Heun's method up and down: RF-Solver with its probe at the end of the step.

    Args:
        num_steps: steps each way, of two evaluations.
        share: what the way down takes over from the way up; null for nothing.
    """

    def __init__(self, num_steps: int = 15, share: Sharing | None = None) -> None:
        super().__init__(num_steps, Heun(), Heun(), share, "time", amid=False)


@register(EditMethod, "ab2")
class AB2Back(ByInversion):
    """The Adams-Bashforth method of order 2 up and down.

    Args:
        num_steps: steps each way, of one evaluation.
        share: what the way down takes over from the way up; null for nothing.
    """

    def __init__(self, num_steps: int = 30, share: Sharing | None = None) -> None:
        super().__init__(num_steps, AB2(), AB2(), share, "time", amid=False)


@register(EditMethod, "fireflow")
class FireFlowEdit(ByInversion):
    """FireFlow up and down, the values of every attention layer in the step next to noise taken over from the way up.

    Args:
        num_steps: steps each way, of one evaluation, with one more before the first.
        share: what the way down takes over from the way up; null for nothing, as flows without attention need.
    Source: Deng et al. 2024 (FireFlow), algorithm 1.
    """

    def __init__(self, num_steps: int = 8, share: Sharing | None = Sharing(steps=1, blocks="all")) -> None:
        super().__init__(num_steps, FireFlow(), FireFlow(), share)


@register(EditMethod, "uni_inv")
class UniInvEuler(ByInversion):
    """Uni-Inv up, Euler's method down, which then takes nearly the velocities of the way up.

    A step down begins where the one up was evaluated, at its end: their features are shared.

    Args:
        num_steps: steps each way, of one evaluation, with one more before the first up.
        share: what the way down takes over from the way up; null for nothing.
        zero_start: predict the end of the first step by its beginning, an evaluation less.
    Source: Jiao et al. 2025 (UniEdit-Flow), section 4 (Uni-Inv).
    """

    def __init__(self, num_steps: int = 15, share: Sharing | None = None, zero_start: bool = False) -> None:
        super().__init__(num_steps, UniInv(zero_start), Euler(), share, amid=False)

    def way_up(self, editor: Editor, source: Prompt, times: Tensor) -> Walk:
        return _Repeating(editor, source, times, 1)


@register(EditMethod, "fixed_point")
class FixedPoint(ByInversion):
    """Up by the exact inverse of the solver down, step by step: a round trip under one prompt returns to rounding.

    It does if the iterations of a step get there: each shrinks what is left by about |h λ|, λ the largest eigenvalue of
    ∂v/∂x, so that long steps through steep flows need more of them, or shorter ones.

    Features are shared as the last iteration of a step saw them.

    Args:
        num_steps: steps each way.
        share: what the way down takes over from the way up; null for nothing.
        solver: of the way down, explicit and without memory between steps.
        iterations: of every step up, each of as many evaluations as a step down, and as many before the first; at most
            so many if a tolerance is given.
        tolerance: relative size of an update at which a row is done; null to make every iteration.
    Raises:
        ConfigError: if the solver cannot be inverted, or the numbers are not positive.
    """

    def __init__(
        self,
        num_steps: int = 25,
        share: Sharing | None = None,
        solver: Solver = RFSolver(),
        iterations: int = 20,
        tolerance: float | None = None,
    ) -> None:
        super().__init__(num_steps, Inverse(solver, iterations, tolerance), solver, share)

    def way_up(self, editor: Editor, source: Prompt, times: Tensor) -> Walk:
        return _Repeating(editor, source, times, self.down.stages)


class _Repeating(Walk):
    """A walk on which evaluations count from 0 in every try of a step, and of those of one place the last one holds.

    Args:
        stages: evaluations of a try.
    """

    def __init__(self, editor: Editor, prompt: Prompt, times: Tensor, stages: int) -> None:
        super().__init__(editor, prompt, times)
        self.stages = stages

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self._evaluation %= self.stages
        return super().__call__(t, x)
