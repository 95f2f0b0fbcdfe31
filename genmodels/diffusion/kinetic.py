"""The Gaussian path of least kinetic energy for some data, in closed form, and the energy of any path.

The marginal velocity v = E[dx_t/dt | x_t] of x_t = α x + σ ε has the kinetic energy, for each of D components,

    E = 1/D ∫ E|v|² dt = ∫ α'² c² + σ'² - (α' σ - α σ')² mmse(α/σ)/σ² dt,    c² = E|x|²/D

of which the data enter by their separation alone (see `separation`); E_c, without the last term, is that of the
conditional velocities. The source writes time from noise to data: its t is 1 - t here, its a_t and m_t are α and σ.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError
from .schedules import Schedule
from .separation import Separation
from .tabulated import knots_of

FINE = 4096  # cells in which √γ is integrated
POINTS = 3000  # of the double-exponential rule
REACH = 3.2  # beyond ±REACH its nodes are ends to the last digit


class Energy(NamedTuple):
    """Kinetic energies of a path for each component of the data: E of the marginal velocity, and E_c."""

    marginal: float
    conditional: float


def energy(schedule: Schedule, data: Separation, span: tuple[float, float] | None = None) -> Energy:
    """E and E_c of a path between two times, t_min to t_max if None.

    The last term is v (1 - γ)(α' σ - α σ')²/(σ² + v α²), finite where σ = 0. E_c of paths with σ ~ √t at the data grows
    without end as the first time falls to 0, and so does E of data without a density: their energies mean something
    only with the first time.

    Source: Shaul et al. 2023 (On kinetic optimal probability paths for generative models), section 3.1.
    """
    first, last = span or (schedule.t_min, schedule.t_max)
    u = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    w = math.pi / 2 * torch.sinh(u)
    # nodes crowd at both ends; measured from the nearer one, so that they keep their digits there
    share = torch.sigmoid(-2 * w.abs())
    t = torch.where(u < 0, first + (last - first) * share, last - (last - first) * share)
    weight = math.pi / 2 * torch.cosh(u) * 2 * share * (1 - share) * (last - first) * (2 * REACH / (POINTS - 1))
    s, v = schedule(t), data.variance
    conditional = data.mean_square * s.dalpha.square() + s.dsigma.square()
    turning = (s.dalpha * s.sigma - s.alpha * s.dsigma).square() / (s.sigma.square() + v * s.alpha.square())
    excess = v * data.residual(math.sqrt(v) * s.alpha / s.sigma.clamp(min=1e-300)) * turning
    return Energy(float((weight * (conditional - excess)).sum()), float((weight * conditional).sum()))


class KineticPath(NamedTuple):
    """The path of least energy.

    Attributes:
        knots: [5, K] of a `Table`.
        angle: Φ, what the plane measures between noise and data, at most π/2.
        least: the energy of the chord, 1 + c² - 2 c cos Φ: that of the path if γ is nowhere below its floor.
        floored: share of the angles at which it is.
    """

    knots: Tensor
    angle: float
    least: float
    floored: float


def gamma(data: Separation, theta: Tensor) -> Tensor:
    """γ(θ) = 1 - (1 - λ(s))(1 + s²) in [0, 1], s = tan θ, of the data divided by c (not centred).

    With w = v/c² and the residual 1 - γ₀ of centred data at √w s: 1 - γ = w (1 + s²)/(1 + w s²) (1 - γ₀).
    """
    w = data.variance / data.mean_square
    sin, cos = torch.sin(theta), torch.sin(math.pi / 2 - theta)
    ratio = math.sqrt(w) * sin / cos.clamp(min=1e-300)
    return 1 - w / (cos.square() + w * sin.square()) * data.residual(ratio)


def kinetic_path(data: Separation, floor: float = 0.05, count: int = 257) -> KineticPath:
    """The path from N(0, I) at t = 1 to the data at t = 0 that minimises E among all α and σ.

    In polar coordinates c α = r sin θ, σ = r cos θ the energy is ∫ r'² + r² θ'² γ(θ) dt. With φ(θ) = ∫ √γ it is that of
    a point in the flat plane at (r, φ): the best path is the straight chord from (1, 0) to (c, Φ), Φ = φ(π/2), at
    constant speed, and its energy the square of its length, 1 + c² - 2 c cos Φ.

    With τ = 1 - t: r² = |(1 - τ) + τ c e^{iΦ}|², and θ is reached at τ = sin φ/(sin φ + c sin(Φ - φ)). Where γ
    is 0 (towards the noise for centred data, towards the data for a smooth density) θ' is infinite: a floor bounds it.
    λ = 1 has γ = 1, Φ = π/2 and, for c = 1, the linear path.

    Args:
        floor: of γ; a larger one costs a little energy E, and keeps the derivatives of α and σ small.
        count: of the knots, at which scales and derivatives are exact.
    Raises:
        ConfigError: unless 0 < floor <= 1 and there are at least 9 knots.
    Source: Shaul et al. 2023 (On kinetic optimal probability paths for generative models), theorem 3.1.
    """
    if not 0 < floor <= 1:
        raise ConfigError(
            f"kinetic_optimal: 0 < floor <= 1 is needed, found {floor}. With 0 the path would start at infinite speed."
        )
    if count < 9:
        raise ConfigError(f"kinetic_optimal: at least 9 knots are needed, found {count}.")
    c = math.sqrt(data.mean_square)
    theta = _angles(data, FINE + 1)
    phi, below = _flat(data, theta, floor)
    picked = torch.linspace(0, FINE, count, dtype=torch.float64).round().long()
    theta, phi, whole = theta[picked], phi[picked], float(phi[-1])
    root = gamma(data, theta).clamp(min=floor).sqrt()
    ahead, behind = torch.sin(phi), c * torch.sin(whole - phi)
    tau = ahead / (ahead + behind)
    x, y = 1 - tau + tau * c * math.cos(whole), tau * c * math.sin(whole)
    r = torch.hypot(x, y)
    speed = c * math.sin(whole) / r.square() / root
    radial = (x * (c * math.cos(whole) - 1) + y * c * math.sin(whole)) / r
    sin, cos = torch.sin(theta), torch.sin(math.pi / 2 - theta)
    alpha, sigma = r * sin / c, r * cos
    dalpha, dsigma = (radial * sin + r * cos * speed) / c, radial * cos - r * sin * speed
    t = behind / (ahead + behind)
    ends = (part.flip(0) for part in (t, alpha, sigma, -dalpha, -dsigma))
    return KineticPath(knots_of(*ends), whole, 1 + c * c - 2 * c * math.cos(whole), below)


def _angles(data: Separation, count: int) -> Tensor:
    """[count] from 0 to π/2, half of them evenly spaced, half of them evenly in log tan θ where λ is not simple."""
    fine = torch.linspace(0, math.pi / 2, 8 * count, dtype=torch.float64)
    root = math.sqrt(data.variance / data.mean_square)
    low, high = (math.log(s / root) for s in data.span)
    inner = torch.atan(torch.linspace(low, high, 8 * count, dtype=torch.float64).exp())
    fine = torch.cat((fine, inner)).unique()
    ratio = torch.tan(fine).log()
    level = 2 / math.pi * fine + ((ratio - low) / (high - low)).clamp(0, 1)
    level[0], level[-1] = 0.0, 2.0
    wanted = torch.linspace(0, 2, count, dtype=torch.float64)
    k = torch.searchsorted(level, wanted).clamp(1, len(level) - 1)
    share = (wanted - level[k - 1]) / (level[k] - level[k - 1])
    found = fine[k - 1] + share * (fine[k] - fine[k - 1])
    found[0], found[-1] = 0.0, math.pi / 2
    return found


_NODES = (-0.9061798459386640, -0.5384693101056831, 0.0, 0.5384693101056831, 0.9061798459386640)
_WEIGHTS = (0.2369268850561891, 0.4786286704993665, 0.5688888888888889, 0.4786286704993665, 0.2369268850561891)


def _flat(data: Separation, theta: Tensor, floor: float) -> tuple[Tensor, float]:
    """φ = ∫_0^θ √max(γ, floor) at the angles by Gauss-Legendre quadrature, and the share of (0, π/2) with γ < floor."""
    half = theta.diff()[:, None] / 2
    nodes, weights = (torch.tensor(part, dtype=torch.float64) for part in (_NODES, _WEIGHTS))
    found = gamma(data, theta[:-1, None] + half * (1 + nodes))
    cells = (half * weights * found.clamp(min=floor).sqrt()).sum(1)
    below = (half * weights * (found < floor)).sum() / (math.pi / 2)
    return torch.cat((theta.new_zeros(1), cells.cumsum(0))), float(below)
