"""Diffusions of statistical physics as forward processes: their scores give currents and entropy production."""

import math

import torch
from torch import Tensor

from ..distributions import inverse_cdf
from ..registry import ConfigError, register
from ..rng import Noise
from ..types import Shape, expand_like
from .clocks import Clock, Constant
from .gaussian_kernels import DenseKernel, Kernel
from .priors import Prior, positive
from .process import Process

CELLS = 4096  # of the table by which a quartic law is sampled
BEYOND = 40.0  # nats below the largest density that the table leaves out


@register(Prior, "quartic")
class Quartic(Prior):
    """log π = (a y² - b y⁴/2)/T + constant in every component: two wells at ±√(a/b) if a > 0, one if a <= 0.

    Normaliser and sampler are of a table of 4096 cells.

    Args:
        quadratic: a; the barrier between wells has the height a²/(2b T) in log π.
        quartic: b > 0.
        temperature: T > 0.
    Raises:
        ConfigError: unless b > 0 and T > 0.
    """

    def __init__(self, quadratic: float = 1.0, quartic: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.a, self.b = quadratic, positive("quartic", quartic=quartic)
        self.temperature = positive("quartic", temperature=temperature)
        low, high = self.interval()
        edges = torch.linspace(low, high, CELLS + 1, dtype=torch.float64)
        mass = self._action((edges[1:] + edges[:-1]) / 2).exp() * edges.diff()
        self.log_normalizer = math.log(float(mass.sum()))
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("ends", (mass / mass.sum()).cumsum(0), persistent=False)

    def _action(self, y: Tensor) -> Tensor:
        """log π up to a constant, 0 at its largest."""
        square = y.square()
        return (
            self.a * square - self.b * square.square() / 2 - max(self.a, 0.0) ** 2 / (2 * self.b)
        ) / self.temperature

    def sample(self, noise: Noise, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return inverse_cdf(self.edges, self.ends, noise.uniform(*shape, dtype=torch.float64)).to(dtype)

    def log_density(self, y: Tensor) -> Tensor:
        return self._action(y) - self.log_normalizer

    def score(self, y: Tensor) -> Tensor:
        return 2 * (self.a * y - self.b * y**3) / self.temperature

    def slope(self, y: Tensor) -> Tensor:
        return 2 * (self.a - 3 * self.b * y.square()) / self.temperature

    def curvature(self, y: Tensor) -> Tensor:
        return -12 * self.b * y / self.temperature

    def interval(self) -> tuple[float, float]:
        # where a y² - b y⁴/2 is BEYOND nats (times T) below its largest value, which is a²/2b at the wells if a > 0
        depth = BEYOND * self.temperature
        if self.a > 0:
            square = (self.a + math.sqrt(2 * self.b * depth)) / self.b
        else:
            square = 2 * depth / (math.sqrt(self.a**2 + 2 * self.b * depth) - self.a)
        return -math.sqrt(square), math.sqrt(square)


@register(Process, "double_well")
class DoubleWell(Process):
    """dy = (a y - b y³) du + √T dW in every component: overdamped motion in the potential -a y²/2 + b y⁴/4.

    At rest it has the prior "quartic"; passing from well to well takes of the order e^{a²/(2bT)}.

    Args:
        quadratic, quartic: a and b > 0.
        temperature: T > 0.
        clock: u(t).
    Raises:
        ConfigError: unless b > 0 and T > 0.
    Source: Risken 1996 (The Fokker-Planck equation).
    """

    structure = "elementwise"

    def __init__(
        self,
        quadratic: float = 1.0,
        quartic: float = 1.0,
        temperature: float = 1.0,
        clock: Clock = Constant(),
        *,
        shape: Shape,
    ) -> None:
        super().__init__(clock, shape=shape)
        self.prior = Quartic(quadratic, quartic, temperature)

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        return self.prior.a * y - self.prior.b * y**3

    def amplitude(self, u: Tensor) -> Tensor:
        return torch.full((), self.prior.temperature**0.5, dtype=torch.float64, device=u.device)

    def jacobian(self, u: Tensor, y: Tensor) -> Tensor:
        return self.prior.a - 3 * self.prior.b * y.square()

    def ito(self, u: Tensor, y: Tensor) -> Tensor:
        return -3 * self.prior.b * self.prior.temperature * y


class _Lattice(Process):
    """A periodic lattice of real or angular variables, one at each site, whose neighbours act on each other.

    Items have the lattice as their last axes after the first, which counts fields, or a single axis, which is a ring.
    """

    def __init__(self, clock: Clock, temperature: float, shape: Shape) -> None:
        super().__init__(clock, shape=shape)
        self.temperature = positive(self.registered_name, temperature=temperature)
        self.axes = tuple(range(1, len(shape))) if len(shape) > 1 else (0,)
        if not shape or any(shape[k] < 3 for k in self.axes):
            raise ConfigError(
                f"{self.registered_name}: a ring [L], or fields on a lattice [C, L, …], of at least 3 sites along each "
                f"axis is needed, so that neighbours differ; found items of shape {list(shape)}."
            )

    def amplitude(self, u: Tensor) -> Tensor:
        return torch.full((), (2 * self.temperature) ** 0.5, dtype=torch.float64, device=u.device)

    def neighbours(self, y: Tensor) -> list[Tensor]:
        """[B, *shape] the value at every neighbour in turn."""
        return [y.roll(step, axis + 1) for axis in self.axes for step in (1, -1)]


@register(Process, "phi4")
class Phi4(_Lattice):
    """dφ = -∂S/∂φ du + √(2T) dW, S = Σ_x [½ Σ_μ (φ_{x+μ} - φ_x)² + ½ m² φ_x² + λ φ_x⁴/4]: a lattice field.

    At rest it has the law e^{-S/T}; with λ = 0 it is Gaussian, and a Fourier mode relaxes at m² + Σ_μ 4 sin²(k_μ/2).

    Args:
        mass_squared: m²; negative values break the symmetry.
        coupling: λ >= 0; > 0 if m² <= 0.
        temperature: T > 0.
        clock: u(t).
    Raises:
        ConfigError: if the action has no lower bound, a number is out of its range, or the lattice is too small.
    Source: Zinn-Justin 2002 (Quantum field theory and critical phenomena).
    """

    def __init__(
        self,
        mass_squared: float = 1.0,
        coupling: float = 1.0,
        temperature: float = 1.0,
        clock: Clock = Constant(),
        *,
        shape: Shape,
    ) -> None:
        super().__init__(clock, temperature, shape)
        if coupling < 0 or (coupling == 0 and mass_squared <= 0):
            raise ConfigError(
                f"phi4: coupling >= 0, and > 0 unless mass_squared > 0, is needed for a law at rest; found "
                f"mass_squared={mass_squared} and coupling={coupling}."
            )
        self.mass_squared, self.coupling = mass_squared, coupling

    def action(self, y: Tensor) -> Tensor:
        """[B] S."""
        ahead = sum(0.5 * (y.roll(-1, axis + 1) - y).square() for axis in self.axes)
        site = 0.5 * self.mass_squared * y.square() + 0.25 * self.coupling * y**4
        return (ahead + site).flatten(1).sum(1)

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        pull = sum(self.neighbours(y)) - 2 * len(self.axes) * y
        return pull - self.mass_squared * y - self.coupling * y**3

    def ito(self, u: Tensor, y: Tensor) -> Tensor:
        return -6 * self.coupling * self.temperature * y


@register(Process, "kuramoto")
class Kuramoto(_Lattice):
    """dθ_i = (ω + K Σ_j sin(θ_j - θ_i)) du + √(2T) dW over neighbours j: rotors on a ring or lattice, or the XY model.

    In the frame that turns at ω it has at rest the XY model's law exp(K/T Σ cos(θ_i - θ_j)) over pairs, of angles; what
    is simulated are angles on the line, whose mean diffuses for ever.

    Args:
        coupling: K.
        frequency: ω, of every rotor.
        temperature: T > 0.
        clock: u(t).
    Raises:
        ConfigError: if the temperature is not positive, or the lattice is too small.
    Source: Kuramoto 1984 (Chemical oscillations, waves, and turbulence).
    """

    def __init__(
        self,
        coupling: float = 1.0,
        frequency: float = 0.0,
        temperature: float = 0.5,
        clock: Clock = Constant(),
        *,
        shape: Shape,
    ) -> None:
        super().__init__(clock, temperature, shape)
        self.coupling, self.frequency = coupling, frequency

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        return self.frequency + self.coupling * sum((v - y).sin() for v in self.neighbours(y))

    def ito(self, u: Tensor, y: Tensor) -> Tensor:
        # both angles of a pair are noised alike, so that sin of their difference is damped by its variance 2 Q
        return -2 * self.temperature * self.coupling * sum((v - y).sin() for v in self.neighbours(y))


@register(Process, "swimmer")
class Swimmer(Process):
    """dx = (v - x³) du, dv = -γ v du + √(2γD) dW for items (x, v): a swimmer whose velocity remembers, in a trap.

    Noise reaches x through v alone, so kernels need order 1 or "ito". It never comes to equilibrium: the current in the
    plane of x and v does not vanish at rest.

    Args:
        friction: γ > 0, the rate at which velocity is forgotten.
        diffusion: D > 0, the variance of the velocity at rest.
        clock: u(t).
    Raises:
        ConfigError: unless both are > 0, and items have two components.
    Source: Boffi & Vanden-Eijnden 2023 (Probability flow solution of the Fokker-Planck equation).
    """

    def __init__(
        self, friction: float = 0.1, diffusion: float = 1.0, clock: Clock = Constant(), *, shape: Shape
    ) -> None:
        super().__init__(clock, shape=shape)
        if tuple(shape) != (2,):
            raise ConfigError(f"swimmer: items (x, v) of shape [2] are needed, found {list(shape)}.")
        self.friction = positive("swimmer", friction=friction)
        self.diffusion = positive("swimmer", diffusion=diffusion)

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack((v - x**3, -self.friction * v), -1)

    def amplitude(self, u: Tensor) -> Tensor:
        strength = (2 * self.friction * self.diffusion) ** 0.5
        return torch.tensor([[0.0], [strength]], dtype=torch.float64, device=u.device)


@register(Process, "trapped_particles")
class TrappedParticles(Process):
    """dx_i = [-k (x_i - c(u)) - κ/N Σ_j (x_i - x_j)] du + √(2T) dW: N particles in a moving trap.

    The trap's centre c(u) = R (cos ωu, sin ωu) circles, in one dimension R cos ωu. All of it is linear, so that the law
    from any start is known: about their mean particles relax at k + κ, and their mean follows the trap at k.

    Args:
        stiffness: k > 0.
        attraction: κ > -k; negative for repulsion.
        radius, frequency: R and ω, of the trap's path.
        temperature: T > 0.
        exact: whether training may use the exact kernel; without it, local ones can be tried against it.
        clock: u(t).
    Raises:
        ConfigError: if a number is out of its range, or items are not [N, 1] or [N, 2].
    Source: Boffi & Vanden-Eijnden 2023 (Probability flow solution of the Fokker-Planck equation).
    """

    autonomous = False

    def __init__(
        self,
        stiffness: float = 1.0,
        attraction: float = 1.0,
        radius: float = 1.0,
        frequency: float = 2.0,
        temperature: float = 0.25,
        exact: bool = True,
        clock: Clock = Constant(),
        *,
        shape: Shape,
    ) -> None:
        super().__init__(clock, shape=shape)
        if len(shape) != 2 or shape[1] not in (1, 2):
            raise ConfigError(f"trapped_particles: items [N, 1] or [N, 2] are needed, found {list(shape)}.")
        if not attraction > -stiffness:
            raise ConfigError(
                f"trapped_particles: attraction > -stiffness is needed, else particles fly apart; found {attraction} "
                f"and {stiffness}."
            )
        self.stiffness = positive("trapped_particles", stiffness=stiffness)
        self.temperature = positive("trapped_particles", temperature=temperature)
        self.attraction, self.radius, self.frequency, self.exact = attraction, radius, frequency, exact

    def centre(self, u: Tensor) -> Tensor:
        """[..., d] c(u)."""
        angle = self.frequency * u
        return self.radius * torch.stack((angle.cos(), angle.sin()), -1)[..., : self.shape[1]]

    def _followed(self, u: Tensor) -> Tensor:
        """[..., d] the motion without noise that never ends: m' = -k (m - c(u))."""
        k, w = self.stiffness, self.frequency
        turned = self.radius * torch.stack(
            ((k * (w * u).cos() + w * (w * u).sin()), (k * (w * u).sin() - w * (w * u).cos())), -1
        )
        return k / (k**2 + w**2) * turned[..., : self.shape[1]]

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        centre = self._rows(self.centre(u), y)
        return -self.stiffness * (y - centre) - self.attraction * (y - y.mean(1, keepdim=True))

    def amplitude(self, u: Tensor) -> Tensor:
        return torch.full((), (2 * self.temperature) ** 0.5, dtype=torch.float64, device=u.device)

    def ito(self, u: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def transition(self, start: Tensor, end: Tensor, y: Tensor) -> Kernel | None:
        return self.kernel(start, end, y) if self.exact else None

    def kernel(self, start: Tensor, end: Tensor, y: Tensor) -> DenseKernel:
        """The exact law at u = end given y [B, N, d] at u = start: ([] or [B] each)."""
        span = torch.as_tensor(end - start, dtype=torch.float64)
        slow, fast = self.stiffness, self.stiffness + self.attraction
        mean = y.mean(1, keepdim=True)
        along = mean - self._rows(self._followed(start), y)
        moved = self._rows(self._followed(end), y) + self._decay(slow * span, y) * along
        apart = self._decay(fast * span, y) * (y - mean)
        count, dims = self.shape
        shared = torch.full((count, count), 1 / count, dtype=torch.float64, device=y.device)
        own = torch.eye(count, dtype=torch.float64, device=y.device) - shared
        grown = [-self.temperature * torch.expm1(-2 * r * span)[..., None, None] / r for r in (slow, fast)]
        covariance = grown[0] * shared + grown[1] * own
        eye = torch.eye(dims, dtype=torch.float64, device=y.device)
        return DenseKernel(moved + apart, torch.kron(covariance, eye))

    @staticmethod
    def _rows(v: Tensor, y: Tensor) -> Tensor:
        """A point [d] or [B, d] beside particles [B, N, d]."""
        return v[..., None, :].to(y.dtype)

    @staticmethod
    def _decay(z: Tensor, y: Tensor) -> Tensor:
        return expand_like(torch.exp(-z), y).to(y.dtype)
