"""Linear diffusions of an item together with auxiliary variables, and their moments by matrix exponentials."""

import math
from abc import ABC
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register
from .clocks import Clock, Constant

Matrix = tuple[tuple[float, ...], ...]
ASYMMETRY = 1e-9  # of the largest entry: what rounding of a matrix in a file may leave
EIGHT = Constant(8.0)  # unless one is given: critically damped dynamics forget their start by (1 + 8) e⁻⁸ = 3e-3
RANK = 1e-10  # eigenvalues below this share of the largest count as 0


class Moments(NamedTuple):
    """The transition u_t | u_s ~ N(mean u_s, covariance), float64 [..., n, n] in the shape of the times."""

    mean: Tensor
    covariance: Tensor


@kind
class LinearDiffusion(ABC):  # noqa: B024 - members are constructors of matrices
    """du = β(t) A u dt + √β(t) G dW for u = (x, v_1, …, v_k): each component of an item with auxiliary variables.

    Everything depends on the clock B(t) = ∫ β alone, and every component of an item has the same moments, of n = k + 1
    by n matrices. A clock of constant rate suits auxiliary variables: given the item the noise of x is of the order B³
    or higher, which a clock that begins slowly loses to rounding.

    Args:
        matrix: [n, n] A.
        rate: [n, n] G Gᵀ.
        clock: B(t); constant of the total 8 if None.
        spread: variance of the auxiliary variables at t = 0, where they are N(0, spread) beside the data.
    Attributes:
        factor: [n, r] G of full column rank; r is the number of noises.
        stationary: [n, n] the covariance at which A Σ + Σ Aᵀ + G Gᵀ = 0; None if A lets something grow or stay.
    Raises:
        ConfigError: if the matrices are not square and of one size, the rate is not symmetric and positive
            semidefinite, the spread is not positive, or the noise does not reach every variable.
    """

    def __init__(self, matrix: Tensor, rate: Tensor, clock: Clock | None, spread: float) -> None:
        where = self.registered_name
        if not spread > 0:
            raise ConfigError(
                f"{where}: spread must be > 0, found {spread}: auxiliary variables that are 0 have no density."
            )
        check_semidefinite(rate, f"{where}: the rate of noise")
        self.matrix, self.rate, self.factor = matrix, rate, _factor(rate)
        self.clock, self.spread = clock or EIGHT, spread
        self._check_reached()
        self.stationary = _lyapunov(matrix, rate)

    @property
    def size(self) -> int:
        """n: variables for each component of an item."""
        return len(self.matrix)

    @property
    def noises(self) -> int:
        """r: of them, how many are noised by themselves."""
        return self.factor.shape[1]

    def _check_reached(self) -> None:
        """Raises ConfigError if (A, G) is not controllable: P would be singular at every time."""
        columns, scale = [self.factor], max(1.0, float(self.matrix.abs().max()))
        for _ in range(self.size - 1):
            columns.append(self.matrix @ columns[-1] / scale)
        rank = int(torch.linalg.matrix_rank(torch.cat(columns, 1), rtol=RANK))
        if rank < self.size:
            raise ConfigError(
                f"{self.registered_name}: the noise reaches {rank} of {self.size} directions of (x, v_1, …), so that "
                "given the data the rest is known for certain and has no score. Let the matrix couple every variable, "
                "directly or through others, to one with noise."
            )

    # ---- moments -----------------------------------------------------------------------------------------------------

    def transition(self, s: Tensor, t: Tensor) -> Moments:
        """From time s to time t ≥ s.

        Raises:
            ValueError: if times are outside [0, 1], or s > t.
        """
        passed = self.clock(t) - self.clock(s)
        if passed.numel() and passed.device.type == "cpu" and bool((passed < 0).any()):
            raise ValueError(f"{self.registered_name}: a transition runs from s to t ≥ s, found s = {s} and t = {t}.")
        return moments(self.matrix.to(passed), self.rate.to(passed), passed)

    def marginal(self, t: Tensor, variance: float | Tensor) -> Tensor:
        """[..., n, n] covariance at t of data of this variance around 0; 0 gives that of u_t given the item alone.

        The auxiliary variables at 0, of variance `spread`, are integrated out.

        Source: Dockhorn et al. 2022 (Critically-damped Langevin diffusion), section 3 (hybrid score matching).
        """
        mean, covariance = self.transition(torch.zeros_like(t), t)
        start = torch.full((self.size,), self.spread, dtype=mean.dtype, device=mean.device)
        start[0] = torch.as_tensor(variance).to(start)
        return mean @ (start[:, None] * mean.mT) + covariance


def moments(matrix: Tensor, rate: Tensor, clock: Tensor) -> Moments:
    """e^{AB} and P(B) = ∫_0^B e^{As} G Gᵀ e^{Aᵀs} ds, float64 [..., n, n] for clocks [...].

    Van Loan's block exponential on a step of |A| B/2ᵐ < 1/2, then m doublings P(2B) = P(B) + e^{AB} P(B) e^{AᵀB}: sums
    of positive matrices, in which nothing cancels. A long block exponential would lose e^{2|A|B} of its precision.

    Source: van Loan 1978 (Computing integrals involving the matrix exponential).
    """
    n, longest = len(matrix), float(torch.linalg.matrix_norm(matrix, 1)) * float(clock.max()) if clock.numel() else 0.0
    doublings = max(0, math.ceil(math.log2(2 * longest))) if longest > 0 else 0
    block = torch.cat((torch.cat((-matrix, rate), 1), torch.cat((torch.zeros_like(rate), matrix.mT), 1)))
    e = torch.matrix_exp(block * (clock / 2**doublings)[..., None, None])
    mean = e[..., n:, n:].mT
    covariance = mean @ e[..., :n, n:]
    for _ in range(doublings):
        covariance = covariance + mean @ covariance @ mean.mT
        mean = mean @ mean
    return Moments(mean, (covariance + covariance.mT) / 2)


@register(LinearDiffusion, "mdm")
class Multivariate(LinearDiffusion):
    """A = -(S + D) M⁻¹ and G Gᵀ = 2 D, S skew and D semidefinite: at rest u is N(0, diag(M)), whatever S and D.

    Every linear diffusion that comes to rest at N(0, diag(M)) is of this form, with H(u) = ½ uᵀ M⁻¹ u. S = [[0]],
    D = [[1/2]] is the variance-preserving one, without auxiliary variables.

    Args:
        skew: [n, n] S.
        diffusion: [n, n] D.
        mass: [n] the variances at rest, of x first; null for 1.
        clock, spread: as of every linear diffusion.
    Raises:
        ConfigError: if S is not skew, a mass is not positive, sizes differ, or as for every linear diffusion.
    Source: Singhal et al. 2023 (Where to diffuse, how to diffuse, and how to get back); Ma et al. 2015 (A complete
        recipe for stochastic gradient MCMC).
    """

    def __init__(
        self,
        skew: Matrix = ((0.0, -1.0), (1.0, 0.0)),
        diffusion: Matrix = ((0.0, 0.0), (0.0, 2.0)),
        mass: tuple[float, ...] | None = None,
        clock: Clock | None = None,
        spread: float = 0.01,
    ) -> None:
        s, d = as_matrix(skew, "mdm.skew"), as_matrix(diffusion, "mdm.diffusion")
        masses = torch.ones(len(s), dtype=torch.float64) if mass is None else torch.tensor(mass, dtype=torch.float64)
        if not len(s) == len(d) == len(masses):
            raise ConfigError(
                f"mdm: skew, diffusion and mass must be of one size, found {len(s)}, {len(d)} and {len(masses)}."
            )
        if not bool((masses > 0).all()):
            raise ConfigError(f"mdm.mass: variances > 0 are needed, found {list(mass)}.")
        if float((s + s.mT).abs().max()) > ASYMMETRY * max(1.0, float(s.abs().max())):
            raise ConfigError(
                f"mdm.skew: a matrix with S + Sᵀ = 0 is needed, found {s.tolist()}. Its symmetric part belongs to "
                "`diffusion`, where noise balances it."
            )
        check_semidefinite(d, "mdm.diffusion")
        super().__init__(-(s + d) / masses, 2 * d, clock, spread)


@register(LinearDiffusion, "cld")
class CriticallyDamped(Multivariate):
    """Langevin dynamics with a velocity that alone is noised: dx = v/M β dt, dv = -(x + Γ v/M) β dt + √(2Γβ) dW.

    Γ² = 4M, critical damping, comes to rest soonest without oscillating; N(0, 1) x N(0, M) is at rest.

    Args:
        mass: M.
        friction: Γ; null for critical damping.
        clock: B(t); constant of the total 8 if null.
        spread: variance of v at t = 0.
    Raises:
        ConfigError: if the mass or the friction is not positive, or as for every linear diffusion.
    Source: Dockhorn et al. 2022 (Critically-damped Langevin diffusion), section 3.
    """

    def __init__(
        self,
        mass: float = 1.0,
        friction: float | None = None,
        clock: Clock | None = None,
        spread: float = 0.01,
    ) -> None:
        if not mass > 0 or not (friction is None or friction > 0):
            raise ConfigError(f"cld: mass > 0 and friction > 0 (or null) are needed, found {mass} and {friction}.")
        damping = 2 * math.sqrt(mass) if friction is None else friction
        super().__init__(((0.0, -1.0), (1.0, 0.0)), ((0.0, 0.0), (0.0, damping)), (1.0, mass), clock, spread)


@register(LinearDiffusion, "linear_sde")
class LinearSDE(LinearDiffusion):
    """Any A and G Gᵀ of one's own; where nothing comes to rest, sampling starts from the moments at t = 1.

    Args:
        matrix: [n, n] A.
        rate: [n, n] G Gᵀ.
        clock, spread: as of every linear diffusion.
    Raises:
        ConfigError: as for every linear diffusion.
    Source: Singhal et al. 2023 (Where to diffuse, how to diffuse, and how to get back).
    """

    def __init__(
        self,
        matrix: Matrix = ((-0.5,),),
        rate: Matrix = ((1.0,),),
        clock: Clock | None = None,
        spread: float = 0.01,
    ) -> None:
        a, q = as_matrix(matrix, "linear_sde.matrix"), as_matrix(rate, "linear_sde.rate")
        if len(a) != len(q):
            raise ConfigError(f"linear_sde: matrix and rate must be of one size, found {len(a)} and {len(q)}.")
        super().__init__(a, q, clock, spread)


def as_matrix(rows: Matrix, where: str) -> Tensor:
    """[n, n] float64.

    Raises:
        ConfigError: if the rows do not make a square matrix of finite numbers.
    """
    if not rows or any(len(row) != len(rows) for row in rows) or not all(math.isfinite(v) for row in rows for v in row):
        raise ConfigError(
            f"{where}: a square matrix of finite numbers is needed, [[…], …], found rows of {[len(r) for r in rows]}."
        )
    return torch.tensor(rows, dtype=torch.float64)


def check_semidefinite(matrix: Tensor, where: str) -> None:
    """Raises ConfigError unless a matrix is symmetric and positive semidefinite, to rounding, and not 0."""
    scale = float(matrix.abs().max())
    lowest = float(torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[0])
    symmetric = float((matrix - matrix.mT).abs().max()) <= ASYMMETRY * scale
    if not (scale > 0 and symmetric and lowest >= -RANK * scale):
        raise ConfigError(
            f"{where} must be symmetric, positive semidefinite and not 0, found {matrix.tolist()}, whose symmetric "
            f"part has the lowest eigenvalue {lowest:.3g}."
        )


def _factor(rate: Tensor) -> Tensor:
    """[n, r] G with G Gᵀ = rate, of full column rank, in the order of the variables."""
    values, vectors = torch.linalg.eigh(rate)
    kept = values > RANK * values.max()
    columns = vectors[:, kept] * values[kept].sqrt()
    largest = columns.abs().argmax(0)
    columns = columns * columns.gather(0, largest[None]).sign()
    return columns[:, largest.argsort(stable=True)]


def _lyapunov(matrix: Tensor, rate: Tensor) -> Tensor | None:
    """Σ with A Σ + Σ Aᵀ + rate = 0, if every eigenvalue of A has a negative real part."""
    if float(torch.linalg.eigvals(matrix).real.max()) >= -1e-12:
        return None
    n = len(matrix)
    eye = torch.eye(n, dtype=matrix.dtype)
    found = torch.linalg.solve(torch.kron(matrix, eye) + torch.kron(eye, matrix), -rate.flatten())
    return found.reshape(n, n)
