"""Closed forms that the tests measure the package against; everything in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genmodels.distributions import GaussianMixture

# a full covariance, an anisotropic one and unequal weights: no symmetry hides a wrong axis, sign or weight
MIXTURE = GaussianMixture.from_tensors(
    torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    torch.tensor([[1.5, 0.5], [-1.0, 1.2], [0.2, -1.4]], dtype=torch.float64),
    torch.tensor(
        [[[0.30, 0.10], [0.10, 0.20]], [[0.10, 0.0], [0.0, 0.40]], [[0.20, -0.12], [-0.12, 0.25]]], dtype=torch.float64
    ),
)


# in two dimensions a matrix of eigenvectors can be its own transpose; in three these are not
MIXTURE_3D = GaussianMixture.from_tensors(
    torch.tensor([0.6, 0.4], dtype=torch.float64),
    torch.tensor([[0.5, -0.3, 0.8], [-0.9, 0.4, 0.1]], dtype=torch.float64),
    torch.tensor(
        [
            [[0.9, 0.3, -0.2], [0.3, 0.5, 0.1], [-0.2, 0.1, 0.4]],
            [[0.2, 0.1, 0.05], [0.1, 0.6, -0.3], [0.05, -0.3, 0.7]],
        ],
        dtype=torch.float64,
    ),
)


# schedules that cannot be built without being told their path
SCHEDULES = {
    "tabulated": {
        "name": "tabulated",
        "times": (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0),
        "alpha": (1.0, 0.98, 0.85, 0.6, 0.3, 0.1, 0.0),
        "sigma": (0.0, 0.1, 0.35, 0.7, 0.9, 1.0, 1.0),
    }
}


def gaussian(mean: Tensor, covariance: Tensor) -> GaussianMixture:
    """N(mean [D], covariance [D] or [D, D]) with the diffusion oracles of a mixture of one component."""
    mean, covariance = mean.double(), covariance.double()
    return GaussianMixture.from_tensors(torch.ones(1), mean[None], covariance[None])


GAUSSIAN = gaussian(
    torch.tensor([0.7, -0.4], dtype=torch.float64), torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
)


def probability_flow(law: GaussianMixture, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """Where the probability-flow ODE of one Gaussian takes x [B, D] from the scales (α, σ) `start` to `end`.

    In the axes of the covariance y = x - α m obeys dy/dt = V'/(2V) y with V = α² λ + σ², hence y ∝ √V: the map depends
    on the two ends of the path alone, not on the schedule between them.
    """
    (alpha, sigma), (alpha_end, sigma_end) = start, end
    mean, variances = law.means[0], law.variances[0]
    axes = torch.eye(len(mean), dtype=torch.float64) if law.axes is None else law.axes[0]
    stretch = ((alpha_end**2 * variances + sigma_end**2) / (alpha**2 * variances + sigma**2)).sqrt()
    return alpha_end * mean + ((x.double() - alpha * mean) @ axes * stretch) @ axes.T


def probability_flow_log_det(law: GaussianMixture, start: tuple[float, float], end: tuple[float, float]) -> float:
    """log|det| of the Jacobian of `probability_flow`."""
    (alpha, sigma), (alpha_end, sigma_end) = start, end
    variances = law.variances[0]
    ratio = (alpha_end**2 * variances + sigma_end**2) / (alpha**2 * variances + sigma**2)
    return float(0.5 * ratio.log().sum())


@dataclass(frozen=True)
class OrnsteinUhlenbeck:
    """dX = -rate (X - mean) dt + diffusion dW, componentwise."""

    rate: float = 1.3
    mean: float = 0.5
    diffusion: float = 0.8

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        return -self.rate * (x - self.mean)

    def moments(self, t: float, x: Tensor) -> tuple[Tensor, float]:
        """E[X_t | X_0 = x] and the variance of each component."""
        decay = math.exp(-self.rate * t)
        return self.mean + (x - self.mean) * decay, -(self.diffusion**2) / (2 * self.rate) * math.expm1(
            -2 * self.rate * t
        )

    def stationary_variance(self) -> float:
        return self.diffusion**2 / (2 * self.rate)

    def log_transition(self, t: float, x: Tensor, y: Tensor) -> Tensor:
        """[B] log p(X_t = y | X_0 = x) for x, y [B, D]."""
        mean, variance = self.moments(t, x.double())
        return -0.5 * ((y - mean) ** 2 / variance + math.log(2 * math.pi * variance)).sum(1)

    def pathwise(self, x: Tensor, times: Tensor, increments: Tensor) -> Tensor:
        """X at times[-1] on the Brownian path with the given increments [L-1, B, D], up to its piecewise-linear error.

        Variation of constants: X_T = mean + (x - mean) e^{-rate T} + diffusion ∫ e^{-rate (T-s)} dW_s, with the
        average of the kernel over each interval; the mean-square error is O(h²) for steps h.
        """
        h, rest = times.diff(), times[-1] - times[1:]
        kernel = (-self.rate * rest).exp() * -torch.expm1(-self.rate * h) / (self.rate * h)
        decay = math.exp(-self.rate * float(times[-1] - times[0]))
        return self.mean + (x - self.mean) * decay + self.diffusion * torch.einsum("l,lbd->bd", kernel, increments)


@dataclass(frozen=True)
class GeometricBrownianMotion:
    """dX = drift X dt + volatility X dW (Itô): X_t = x exp((drift - volatility²/2) t + volatility W_t)."""

    drift: float = 0.4
    volatility: float = 0.6

    def pathwise(self, t: float, x: Tensor, w: Tensor) -> Tensor:
        """X_t from X_0 = x on the path with W_t = w."""
        return x * ((self.drift - self.volatility**2 / 2) * t + self.volatility * w).exp()

    def mean(self, t: float, x: Tensor) -> Tensor:
        return x * math.exp(self.drift * t)


@dataclass(frozen=True)
class LinearODE:
    """dy/dt = A y + b: y(t) from the exponential of the matrix [[A, b], [0, 0]]."""

    matrix: Tensor
    offset: Tensor

    def field(self, t: Tensor | float, y: Tensor) -> Tensor:
        return y @ self.matrix.to(y.dtype).T + self.offset.to(y.dtype)

    def solution(self, t: float, y: Tensor) -> Tensor:
        """[B, D] y(t) from y(0) = y."""
        d = len(self.offset)
        block = torch.zeros(d + 1, d + 1, dtype=torch.float64)
        block[:d, :d], block[:d, d] = self.matrix, self.offset
        flow = torch.linalg.matrix_exp(t * block)
        return y.double() @ flow[:d, :d].T + flow[:d, d]

    def log_det(self, t: float) -> float:
        """log|det ∂y(t)/∂y(0)| = t tr A (Liouville)."""
        return t * float(self.matrix.trace())


# a damped rotation with a drift: complex eigenvalues, not normal
LINEAR = LinearODE(
    torch.tensor([[-0.3, 2.0], [-1.0, 0.1]], dtype=torch.float64), torch.tensor([0.5, -0.2], dtype=torch.float64)
)


def jacobian_log_det(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[B] log|det ∂f(x)/∂x| by automatic differentiation, one item at a time, for f: [B, *] -> [B, *] row by row."""

    def single(item: Tensor) -> Tensor:
        return f(item.reshape(1, *x.shape[1:])).flatten()

    jacobians = [torch.autograd.functional.jacobian(single, item.flatten()) for item in x]
    return torch.stack([torch.linalg.slogdet(j)[1] for j in jacobians])


def grid(low: float, high: float, steps: int) -> tuple[Tensor, float]:
    """[steps², 2] midpoints of a square grid on [low, high]² and the area of a cell."""
    width = (high - low) / steps
    axis = low + width * (torch.arange(steps, dtype=torch.float64) + 0.5)
    return torch.cartesian_prod(axis, axis), width**2
