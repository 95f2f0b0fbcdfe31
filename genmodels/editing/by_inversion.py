"""Methods that invert and come back: each is a solver up, a solver down, and what is shared between them."""

from ..registry import register
from ..solvers.runge_kutta import Euler
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
        super().__init__(num_steps, Euler(), Euler(), share)
