"""Laws that can be sampled per seed and whose density is known: bases of flows, and exact references for diffusion."""

import math
from abc import ABC, abstractmethod

import torch
from einops import einsum
from torch import Tensor, nn

from .registry import kind, register
from .rng import Noise
from .types import Shape, expand_like, sum_items

Scalar = float | Tensor


@kind
class Distribution(nn.Module, ABC):
    """A law of items of a given shape.

    Attributes:
        shape: shape of one item, without the batch axis.
    """

    shape: Shape

    @abstractmethod
    def sample(self, noise: Noise, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """[n, *shape] one item per row of the noise; row i is a function of row i of the noise alone."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """[B] float64 log density of x [B, *shape], in nats; -inf outside the support."""

    def check_items(self, x: Tensor) -> None:
        """Raises ValueError unless x is [B, *shape]."""
        if x.ndim == 0 or tuple(x.shape[1:]) != tuple(self.shape):
            wanted = ", ".join(["B", *map(str, self.shape)])
            raise ValueError(
                f"{type(self).__name__}: x has shape {list(x.shape)}, but the law is of [{wanted}]. "
                "Add the batch axis, or build it with shape=x.shape[1:]."
            )


@register(Distribution, "standard_normal")
class StandardNormal(Distribution):
    """N(0, I): log p(x) = -|x|²/2 - D/2 log 2π."""

    def __init__(self, *, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def sample(self, noise: Noise, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return noise.normal(*self.shape, dtype=dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        self.check_items(x)
        return -0.5 * (sum_items(x**2) + math.prod(self.shape) * math.log(2 * math.pi))


@register(Distribution, "diagonal_normal")
class DiagonalNormal(Distribution):
    """N(loc, diag(scale²)) with a learnable location and scale per component, started at N(0, I).

    log p(x) = -Σ (((x - loc)/scale)²/2 + log scale) - D/2 log 2π, with scale = exp(log_scale).
    """

    def __init__(self, *, shape: Shape) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.loc = nn.Parameter(torch.zeros(self.shape))
        self.log_scale = nn.Parameter(torch.zeros(self.shape))

    def sample(self, noise: Noise, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.loc.to(dtype) + self.log_scale.to(dtype).exp() * noise.normal(*self.shape, dtype=dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        self.check_items(x)
        standard = (x - self.loc.to(x.dtype)) * (-self.log_scale.to(x.dtype)).exp()
        normalizer = self.log_scale.sum(dtype=torch.float64) + 0.5 * math.prod(self.shape) * math.log(2 * math.pi)
        return -0.5 * sum_items(standard**2) - normalizer


@register(Distribution, "box")
class Box(Distribution):
    """Uniform on [low, high]^D: log p(x) = -D log(high - low) inside (bounds included), -inf outside.

    Args:
        low, high: bounds, the same for every component.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, *, shape: Shape) -> None:
        super().__init__()
        if not high > low:
            raise ValueError(f"box: high must be greater than low, found low={low} and high={high}.")
        self.low, self.high, self.shape = low, high, tuple(shape)

    def sample(self, noise: Noise, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.low + (self.high - self.low) * noise.uniform(*self.shape, dtype=dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        self.check_items(x)
        inside = ((x >= self.low) & (x <= self.high)).reshape(len(x), math.prod(self.shape)).all(1)
        density = x.new_full((len(x),), -math.prod(self.shape) * math.log(self.high - self.low), dtype=torch.float64)
        return density.where(inside, -math.inf)


@register(Distribution, "gaussian_mixture")
class GaussianMixture(Distribution):
    """Σ_k w_k N(m_k, Σ_k), and every conditional expectation that diffusion asks of it, in closed form and float64.

    With x_t = α x + σ ε the law stays a mixture: x_t ~ Σ_k w_k N(α m_k, C_k), C_k = α² Σ_k + σ² I. With the
    responsibilities r_k(x_t) ∝ w_k N(x_t; α m_k, C_k):

        score      ∇ log p_t(x_t) = -Σ_k r_k C_k⁻¹ (x_t - α m_k)
        denoiser   E[x | x_t]     =  Σ_k r_k (m_k + α Σ_k C_k⁻¹ (x_t - α m_k))
        noise      E[ε | x_t]     = -σ ∇ log p_t(x_t)
        velocity   E[dx_t/dt | x_t] = α' E[x | x_t] + σ' E[ε | x_t]

    α, σ and their derivatives are numbers or [] or [B] tensors. Covariances are kept as U diag(λ) Uᵀ, so that C_k costs
    no decomposition; diagonal ones store no U.

    Args:
        means: K rows of D = prod(shape) numbers.
        covariances: K rows of D variances, or of D·D numbers (a full covariance, row by row).
        weights: K numbers >= 0, normalised here; equal if not given.
    Raises:
        ValueError: if the lengths disagree, a covariance is not symmetric positive definite, or a weight is negative.
    Source: Bishop 2006 (Pattern Recognition and Machine Learning), equations 2.113-2.117, for each component.
    """

    def __init__(
        self,
        means: tuple[tuple[float, ...], ...],
        covariances: tuple[tuple[float, ...], ...],
        weights: tuple[float, ...] | None = None,
        *,
        shape: Shape,
    ) -> None:
        super().__init__()
        d = math.prod(shape)
        for name, rows, lengths in (("means", means, (d,)), ("covariances", covariances, (d, d * d))):
            found = sorted({len(row) for row in rows})
            if len(found) != 1 or found[0] not in lengths:
                raise ValueError(
                    f"gaussian_mixture: {name} must be rows of {' or '.join(map(str, lengths))} numbers for items of "
                    f"shape {tuple(shape)}, all of one length, found {len(rows)} rows with lengths {found}."
                )
        m = torch.tensor(means, dtype=torch.float64)
        c = torch.tensor(covariances, dtype=torch.float64)
        w = torch.ones(len(m), dtype=torch.float64) if weights is None else torch.tensor(weights, dtype=torch.float64)
        self._set(w, m, c if c.shape[1] == d else c.reshape(-1, d, d), tuple(shape))

    @classmethod
    def from_tensors(
        cls, weights: Tensor, means: Tensor, covariances: Tensor, *, shape: Shape | None = None
    ) -> "GaussianMixture":
        """The mixture of weights [K], means [K, D], and variances [K, D] or covariances [K, D, D]; shape is (D,) if not
        given."""
        mixture = cls.__new__(cls)
        nn.Module.__init__(mixture)
        mixture._set(weights.double(), means.double(), covariances.double(), tuple(shape or means.shape[1:]))
        return mixture

    def _set(self, weights: Tensor, means: Tensor, covariances: Tensor, shape: Shape) -> None:
        k, d = means.shape
        if weights.shape != (k,) or covariances.shape not in ((k, d), (k, d, d)) or math.prod(shape) != d:
            raise ValueError(
                f"gaussian_mixture: weights [K], means [K, D] and covariances [K, D] or [K, D, D] with D = "
                f"prod(shape) = {math.prod(shape)} are needed, found {list(weights.shape)}, {list(means.shape)}, "
                f"{list(covariances.shape)}."
            )
        if (weights < 0).any() or not weights.sum() > 0:
            raise ValueError(f"gaussian_mixture: weights must be >= 0 and not all 0, found {weights.tolist()}.")
        if covariances.ndim == 3 and not torch.allclose(covariances, covariances.mT, rtol=1e-10, atol=0):
            raise ValueError("gaussian_mixture: a covariance is not symmetric. Use (C + Cᵀ)/2.")
        variances, axes = torch.linalg.eigh(covariances) if covariances.ndim == 3 else (covariances, None)
        if not (variances > 0).all():
            raise ValueError(
                f"gaussian_mixture: every covariance must be positive definite, found the variance "
                f"{variances.min():.3g}. Add a small multiple of the identity."
            )
        self._store(weights / weights.sum(), means, variances, axes, shape)

    def _store(self, weights: Tensor, means: Tensor, variances: Tensor, axes: Tensor | None, shape: Shape) -> None:
        self.shape = shape
        for name, value in (("weights", weights), ("means", means), ("variances", variances), ("axes", axes)):
            self.register_buffer(name, value)

    def noised(self, alpha: Scalar, sigma: Scalar) -> "GaussianMixture":
        """The law of α x + σ ε, for one time."""
        mixture = type(self).__new__(type(self))
        nn.Module.__init__(mixture)
        variances = alpha**2 * self.variances + sigma**2
        mixture._store(self.weights, alpha * self.means, variances, self.axes, self.shape)
        return mixture

    def mean(self) -> Tensor:
        """[D] float64 E[x]."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """[D, D] float64 Cov[x] = Σ_k w_k (Σ_k + m_k m_kᵀ) - E[x] E[x]ᵀ."""
        axes = torch.eye(self.means.shape[1], device=self.means.device).double() if self.axes is None else self.axes
        inner = (axes * self.variances[:, None, :]) @ axes.mT
        centred = self.means - self.mean()
        return einsum(self.weights, inner, "k, k d e -> d e") + (self.weights * centred.T) @ centred

    def sample(self, noise: Noise, *, dtype: torch.dtype = torch.float32) -> Tensor:
        # the inverse CDF of one uniform number per item chooses its component; zero weights are never chosen
        u = noise.uniform(dtype=torch.float64)
        k = torch.searchsorted(self.weights.cumsum(0), u, right=True)
        y = noise.normal(self.means.shape[1], dtype=torch.float64) * self.variances[k].sqrt()
        y = y if self.axes is None else einsum(self.axes[k], y, "n d e, n e -> n d")
        return (self.means[k] + y).to(dtype).reshape(-1, *self.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.noised_log_prob(x, 1.0, 0.0)

    def noised_log_prob(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """[B] log density of the law of α x + σ ε at x [B, *shape]."""
        return self._joint(x, alpha, sigma)[0].logsumexp(1)

    def responsibilities(self, x: Tensor, alpha: Scalar = 1.0, sigma: Scalar = 0.0) -> Tensor:
        """[B, K] probability of each component given α x + σ ε."""
        return self._joint(x, alpha, sigma)[0].softmax(1)

    def score(self, x: Tensor, alpha: Scalar = 1.0, sigma: Scalar = 0.0) -> Tensor:
        """[B, *shape] ∇ log p_t(x); at α = 1, σ = 0 the score of the data law itself."""
        joint, y, variances = self._joint(x, alpha, sigma)
        return self._combine(joint, -y / variances).reshape(x.shape)

    def denoiser(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """[B, *shape] E[x_0 | α x_0 + σ ε = x]."""
        joint, y, variances = self._joint(x, alpha, sigma)
        shift = self._combine(joint, _wide(alpha, y) * self.variances * y / variances)
        return (joint.softmax(1) @ self.means + shift).reshape(x.shape)

    def eps(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
        """[B, *shape] E[ε | α x_0 + σ ε = x]."""
        joint, y, variances = self._joint(x, alpha, sigma)
        return self._combine(joint, _wide(sigma, y) * y / variances).reshape(x.shape)

    def velocity(self, x: Tensor, alpha: Scalar, sigma: Scalar, dalpha: Scalar, dsigma: Scalar) -> Tensor:
        """[B, *shape] α' E[x_0 | x] + σ' E[ε | x]: the vector field of the probability-flow ODE."""
        joint, y, variances = self._joint(x, alpha, sigma)
        slope = _wide(dalpha, y) * _wide(alpha, y) * self.variances + _wide(dsigma, y) * _wide(sigma, y)
        centre = joint.softmax(1) @ self.means
        return (_wide(dalpha, centre) * centre + self._combine(joint, slope * y / variances)).reshape(x.shape)

    def _joint(self, x: Tensor, alpha: Scalar, sigma: Scalar) -> tuple[Tensor, Tensor, Tensor]:
        """log(w_k N(x; α m_k, C_k)) [B, K], x - α m_k in the axes of C_k [B, K, D], and the variances there."""
        self.check_items(x)
        y = x.double().reshape(len(x), 1, self.means.shape[1])
        a, s = _wide(alpha, y), _wide(sigma, y)
        y = y - a * self.means
        y = y if self.axes is None else einsum(y, self.axes, "b k d, k d e -> b k e")
        variances = a**2 * self.variances + s**2
        terms = y**2 / variances + variances.log() + math.log(2 * math.pi)
        return self.weights.log() - 0.5 * terms.sum(-1), y, variances

    def _combine(self, joint: Tensor, y: Tensor) -> Tensor:
        """[B, D] Σ_k r_k U_k y_k."""
        y = y * joint.softmax(1)[..., None]
        return y.sum(1) if self.axes is None else einsum(y, self.axes, "b k e, k d e -> b d")


def _wide(value: Scalar, like: Tensor) -> Scalar:
    """A number or [] or [B] tensor in float64 that broadcasts against [B, *]."""
    return expand_like(value.double(), like) if isinstance(value, Tensor) else value


def inverse_cdf(edges: Tensor, ends: Tensor, u: Tensor) -> Tensor:
    """Where a law of N cells, uniform within each, has the distribution function u.

    Args:
        edges: [N + 1] rising.
        ends: [N] distribution function at the upper edges; the last is 1.
        u: [*] in [0, 1], float64.
    """
    edges, ends = edges.to(u.device), ends.to(u.device)
    cell = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)
    begin = torch.where(cell > 0, ends[(cell - 1).clamp(min=0)], 0.0)
    inside = ((u - begin) / (ends[cell] - begin).clamp(min=1e-300)).clamp(0, 1)
    return torch.lerp(edges[cell], edges[cell + 1], inside)
