"""What searches for fixed points have found, and how those that failed ended."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

TAMING = (
    "Where f stretches differences, plain iteration cannot be trusted: damp it, use 'anderson' or 'broyden', or make f "
    "a contraction (spectral normalisation, a Jacobian penalty, the subhomogeneous cell)."
)


class Outcome(IntEnum):
    """How the iteration of a row ended; `words` says it."""

    def __new__(cls, value: int, words: str) -> "Outcome":
        member = int.__new__(cls, value)
        member._value_, member.words = value, words
        return member

    converged = 0, "converged"
    exhausted = 1, "did not converge in the evaluations that it was given"
    diverged = 2, "diverged"
    non_finite = 3, "met an infinite or undefined state"


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """What a search for fixed points z = f(z) has found.

    Args:
        z: [B, *shape] the iterate of each row that converged, or else the one with the least residual.
        residual: [B] float64 rms(f(z) - z) there; infinite where no iterate had a finite one.
        iterations: [B] int64 iterations of each row: evaluations, or accepted steps of the infinite-time flow.
        nfe: [B] int64 evaluations of f for each row.
        outcome: [B] int64 `Outcome`.
        lipschitz: [B] float64 the largest |f(z') - f(z)|/|z' - z| over consecutive iterates, a lower bound of the
            Lipschitz constant up to rounding; nan where there were none.
        history: [N, B] float64 residuals of the iterates in their order, nan beyond a row's last.
    """

    z: Tensor
    residual: Tensor
    iterations: Tensor
    nfe: Tensor
    outcome: Tensor
    lipschitz: Tensor
    history: Tensor

    @property
    def converged(self) -> Tensor:
        """[B] bool."""
        return self.outcome == Outcome.converged


class EquilibriumError(RuntimeError):
    """A fixed point that was not found.

    Attributes:
        outcome: of the first row that failed.
        row: which that is.
    """

    def __init__(self, found: Equilibrium, solver: str) -> None:
        self.row = int((found.outcome > 0).nonzero()[0])
        self.outcome = Outcome(int(found.outcome[self.row]))
        residuals = [f"{v:.2g}" for v in found.history[:, self.row].tolist() if v == v]
        shown = residuals if len(residuals) <= 6 else [*residuals[:3], "…", *residuals[-2:]]
        slope = float(found.lipschitz[self.row])
        steep = f"; f stretched differences by up to {slope:.3g}" if slope == slope else ""
        advice = {
            Outcome.exhausted: "Raise max_iterations (of a flow max_steps or its horizon) or the tolerances, or "
            "use 'anderson' or 'broyden'." + (f" {TAMING}" if slope >= 1 else ""),
            Outcome.diverged: TAMING,
            Outcome.non_finite: "Look at f (divisions, logarithms, exponentials, weights that are not finite).",
        }[self.outcome]
        super().__init__(
            f"fixed point: row {self.row} of {len(found.z)} {self.outcome.words} ({solver}, "
            f"{int(found.nfe[self.row])} evaluations, residuals {', '.join(shown)}{steep}). {advice} "
            'on_failure="return" gives the best iterate instead of this error.'
        )
