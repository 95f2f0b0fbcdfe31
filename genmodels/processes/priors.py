"""Laws that nonlinear diffusions end in: density, sampler, score and the derivatives that local kernels take."""

import math
from abc import ABC
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad

from ..distributions import Distribution
from ..registry import ConfigError, kind, register
from ..rng import Noise
from ..types import Shape, sum_items
from .gaussian_kernels import DiagonalKernel, Kernel

HALF_STEP = 2.0**-25  # uniform draws are multiples of 2^-24: their midpoints never reach 0 or 1
UNIT_LOGISTIC = math.sqrt(3) / math.pi


@kind
class Prior(nn.Module, ABC):
    """A law π of items. A member gives `log_density` of one component (a product law) or `log_prob` of whole items.

    Derivatives are taken by automatic differentiation unless a member knows them. Without a method `sample` it has a
    score, and no process that generates can end in it.

    Attributes:
        structure: "elementwise" for a product of one law over all components.
    """

    structure = "elementwise"

    @property
    def samples(self) -> bool:
        """Whether it can be sampled."""
        return type(self).sample is not Prior.sample

    def sample(self, noise: Noise, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, *shape] one item per row of the noise; row i is a function of row i of the noise alone."""
        raise ConfigError(f"{type(self).__name__}: this prior cannot be sampled. Give it a method sample.")

    def log_density(self, y: Tensor) -> Tensor:
        """[*] log density of each component, in nats."""
        raise ConfigError(f"{type(self).__name__}: a prior needs a method log_density, or log_prob and a structure.")

    def log_prob(self, y: Tensor) -> Tensor:
        """[B] float64 log density of items [B, *shape], in nats."""
        return sum_items(self.log_density(y.double()))

    def score(self, y: Tensor) -> Tensor:
        """[B, *shape] ∇ log π."""
        total = self.log_density if self.structure == "elementwise" else self.log_prob
        return grad(lambda v: total(v).sum())(y).to(y.dtype)

    def slope(self, y: Tensor) -> Tensor:
        """[B, *shape] (log π)'' of each component, for product laws."""
        return grad(lambda v: self.score(v).sum())(y)

    def curvature(self, y: Tensor) -> Tensor:
        """[B, *shape] (log π)''' of each component, for product laws."""
        return grad(lambda v: self.slope(v).sum())(y)

    def derivatives(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`score`, `slope` and `curvature` at once, for laws whose derivatives share their work."""
        return self.score(y), self.slope(y), self.curvature(y)

    def relaxation(self, span: Tensor, y: Tensor) -> Kernel | None:
        """The exact kernel of dy = ½ ∇ log π du + dW over a span of u, where it is known."""
        return None

    def gap(self) -> float | None:
        """Spectral gap of ½ (∂² + (log π)' ∂) for one component, per unit of u; None if it has no closed form."""
        return None

    def interval(self) -> tuple[float, float]:
        """Where a component's law has all but a mass of about 1e-9: a grid on it resolves the law."""
        return -12.0, 12.0


@register(Prior, "gaussian")
class Gaussian(Prior):
    """N(0, s²) in every component: its Langevin process is the Ornstein-Uhlenbeck process of variance-preserving SDEs.

    Args:
        scale: s > 0.
    Raises:
        ConfigError: unless scale > 0.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = positive("gaussian", scale=scale)

    def sample(self, noise: Noise, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.scale * noise.normal(*shape, dtype=dtype)

    def log_density(self, y: Tensor) -> Tensor:
        return -0.5 * (y / self.scale).square() - math.log(self.scale) - 0.5 * math.log(2 * math.pi)

    def score(self, y: Tensor) -> Tensor:
        return -y / self.scale**2

    def slope(self, y: Tensor) -> Tensor:
        return torch.full_like(y, -(self.scale**-2))

    def curvature(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def relaxation(self, span: Tensor, y: Tensor) -> Kernel:
        """N(e^{-span/2s²} y, s² (1 - e^{-span/s²}))."""
        rate = span.reshape(span.shape + (1,) * (y.ndim - span.ndim)) if span.ndim else span
        rate = rate / self.scale**2
        decay, variance = torch.exp(-rate / 2), -(self.scale**2) * torch.expm1(-rate)
        return DiagonalKernel(decay.to(y.dtype) * y, variance.to(y.dtype))

    def gap(self) -> float:
        return 0.5 / self.scale**2

    def interval(self) -> tuple[float, float]:
        return -7.0 * self.scale, 7.0 * self.scale


@register(Prior, "logistic")
class Logistic(Prior):
    """The logistic law of scale a in every component: exponential tails, and forces that never exceed 1/(2a).

    log π = -|y|/a - log a - 2 log(1 + e^{-|y|/a}), variance a² π²/3.

    Args:
        scale: a > 0; the default gives unit variance.
    Raises:
        ConfigError: unless scale > 0.
    """

    def __init__(self, scale: float = UNIT_LOGISTIC) -> None:
        super().__init__()
        self.scale = positive("logistic", scale=scale)

    def sample(self, noise: Noise, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.scale * torch.logit(noise.uniform(*shape, dtype=torch.float64) + HALF_STEP)).to(dtype)

    def log_density(self, y: Tensor) -> Tensor:
        y = (y / self.scale).abs()
        return -y - math.log(self.scale) - 2 * torch.nn.functional.softplus(-y)

    def score(self, y: Tensor) -> Tensor:
        return -torch.tanh(y / (2 * self.scale)) / self.scale

    def slope(self, y: Tensor) -> Tensor:
        return -(1 - torch.tanh(y / (2 * self.scale)).square()) / (2 * self.scale**2)

    def curvature(self, y: Tensor) -> Tensor:
        tanh = torch.tanh(y / (2 * self.scale))
        return tanh * (1 - tanh.square()) / (2 * self.scale**3)

    def derivatives(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tanh = torch.tanh(y / (2 * self.scale))
        slope = (tanh.square() - 1) / (2 * self.scale**2)
        return -tanh / self.scale, slope, -tanh * slope / self.scale

    def gap(self) -> float:
        """1/(8a²), where the continuous spectrum begins: the force is ±1/(2a) far out."""
        return 1 / (8 * self.scale**2)

    def interval(self) -> tuple[float, float]:
        return -21.0 * self.scale, 21.0 * self.scale


@register(Prior, "student_t")
class StudentT(Prior):
    """Student's t of ν degrees of freedom and scale s in every component: polynomial tails.

    log π = -(ν + 1)/2 · log(1 + y²/(ν s²)) + constant. Its Langevin process has no spectral gap: far out the force goes
    to 0, and tails fill slower than exponentially.

    Args:
        df: ν > 0.
        scale: s > 0.
    Raises:
        ConfigError: unless both are > 0.
    Source: Bailey 1994 (Polar generation of random variates with the t-distribution).
    """

    def __init__(self, df: float = 5.0, scale: float = 1.0) -> None:
        super().__init__()
        self.df, self.scale = positive("student_t", df=df), positive("student_t", scale=scale)

    def sample(self, noise: Noise, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
        u, v = (noise.uniform(*shape, dtype=torch.float64) + HALF_STEP for _ in range(2))
        # √(ν (u^{-2/ν} - 1)) cos 2πv, the polar method of Box and Muller for t
        radius = (self.df * torch.expm1(-2 / self.df * u.log())).sqrt()
        return (self.scale * radius * torch.cos(2 * math.pi * v)).to(dtype)

    def log_density(self, y: Tensor) -> Tensor:
        nu = self.df
        constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi) - math.log(self.scale)
        return constant - (nu + 1) / 2 * torch.log1p((y / self.scale).square() / nu)

    def score(self, y: Tensor) -> Tensor:
        return -(self.df + 1) * y / (self.df * self.scale**2 + y.square())

    def slope(self, y: Tensor) -> Tensor:
        c = self.df * self.scale**2
        return -(self.df + 1) * (c - y.square()) / (c + y.square()).square()

    def curvature(self, y: Tensor) -> Tensor:
        c, square = self.df * self.scale**2, y.square()
        return 2 * (self.df + 1) * y * (3 * c - square) / (c + square) ** 3

    def gap(self) -> float:
        """0."""
        return 0.0

    def interval(self) -> tuple[float, float]:
        reach = self.scale * max(10.0, 1e6 ** (1 / self.df) * 10)  # a mass of 1e-6 or less lies beyond
        return -reach, reach


@register(Prior, "mixture")
class Mixture(Prior):
    """Σ_k w_k N(m_k, s_k²) in every component.

    Modes far apart are reached from each other at a rate that falls exponentially: see `mixing`.

    Args:
        means, scales: m_k and s_k; one scale serves all.
        weights: w_k >= 0, normalised here; equal if not given.
    Raises:
        ConfigError: if lengths disagree, a scale is not > 0, or weights are negative or all 0.
    """

    def __init__(
        self,
        means: tuple[float, ...] = (-1.0, 1.0),
        scales: tuple[float, ...] = (1.0,),
        weights: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        scales = scales * len(means) if len(scales) == 1 else scales
        weights = (1.0,) * len(means) if weights is None else weights
        if not means or not len(means) == len(scales) == len(weights):
            raise ConfigError(
                f"mixture: as many scales (or one) and weights as means are needed, found {len(means)} means, "
                f"{len(scales)} scales and {len(weights)} weights."
            )
        if not all(s > 0 for s in scales) or not all(w >= 0 for w in weights) or not sum(weights) > 0:
            raise ConfigError(
                f"mixture: scales > 0 and weights >= 0, not all 0, are needed, found {list(scales)} and "
                f"{list(weights)}."
            )
        total = sum(weights)
        parts = (means, scales, tuple(w / total for w in weights))
        for name, value in zip(("means", "scales", "weights"), parts, strict=True):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float64), persistent=False)

    def sample(self, noise: Noise, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
        u = noise.uniform(*shape, dtype=torch.float64)
        k = torch.searchsorted(self.weights.cumsum(0)[:-1].to(u.device), u, right=True)
        z = noise.normal(*shape, dtype=torch.float64)
        return (self.means.to(u.device)[k] + self.scales.to(u.device)[k] * z).to(dtype)

    def _joint(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N(y), the score of each component, and 1/s_k², with k last."""
        m, s, w = (v.to(y.device, y.dtype) for v in (self.means, self.scales, self.weights))
        z = (y[..., None] - m) / s
        return w.log() - 0.5 * z.square() - s.log() - 0.5 * math.log(2 * math.pi), -z / s, s**-2

    def log_density(self, y: Tensor) -> Tensor:
        return self._joint(y)[0].logsumexp(-1)

    def score(self, y: Tensor) -> Tensor:
        log, a, _ = self._joint(y)
        return (log.softmax(-1) * a).sum(-1)

    def slope(self, y: Tensor) -> Tensor:
        return self.derivatives(y)[1]

    def curvature(self, y: Tensor) -> Tensor:
        return self.derivatives(y)[2]

    def derivatives(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E a, Var a - E b and E (a - E a)³ - 3 Cov(a, b) over the components: far out, powers of a would cancel."""
        log, a, b = self._joint(y)
        r = log.softmax(-1)
        score = (r * a).sum(-1)
        apart = a - score[..., None]
        square = apart.square()
        return score, (r * (square - b)).sum(-1), (r * apart * (square - 3 * b)).sum(-1)

    def interval(self) -> tuple[float, float]:
        reach = 7 * float(self.scales.max())
        return float(self.means.min()) - reach, float(self.means.max()) + reach


@register(Prior, "joint")
class Joint(Prior):
    """A law of whole items, such as a mixture in the plane: its score by automatic differentiation.

    Args:
        law: with a density that is smooth everywhere.
    """

    structure = "dense"

    def __init__(self, law: Distribution) -> None:
        super().__init__()
        self.law = law.requires_grad_(False)

    def sample(self, noise: Noise, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.law.sample(noise, dtype=dtype)

    def log_prob(self, y: Tensor) -> Tensor:
        return self.law.log_prob(y)


class GivenPrior(Prior):
    """A prior whose density, and sampler if it has one, are functions.

    Args:
        log_density: log π of each component, [*] from y [*]; or of whole items, [B] from y [B, *shape], if dense.
        sampler: (noise, shape) -> [n, *shape]; None for a prior that cannot be sampled.
        structure: "elementwise" for a product law.
        interval: where a component's law has nearly all its mass.
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        sampler: Callable[[Noise, Shape], Tensor] | None = None,
        *,
        structure: str = "elementwise",
        interval: tuple[float, float] = (-12.0, 12.0),
    ) -> None:
        super().__init__()
        self.given, self.sampler, self.structure, self.ends = log_density, sampler, structure, interval

    @property
    def samples(self) -> bool:
        return self.sampler is not None

    def sample(self, noise: Noise, shape: Shape, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().sample(noise, shape) if self.sampler is None else self.sampler(noise, shape).to(dtype)

    def log_density(self, y: Tensor) -> Tensor:
        return self.given(y)

    def log_prob(self, y: Tensor) -> Tensor:
        return super().log_prob(y) if self.structure == "elementwise" else self.given(y).double()

    def interval(self) -> tuple[float, float]:
        return self.ends


def positive(owner: str, **values: float) -> float:
    """The value, if it is a finite number > 0; else ConfigError."""
    ((name, value),) = values.items()
    if not 0 < value < math.inf:
        raise ConfigError(f"{owner}: {name} must be > 0, found {value}.")
    return value
