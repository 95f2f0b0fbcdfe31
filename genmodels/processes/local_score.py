"""A network as the score of a diffusion with any drift, and the reverse and bound that it defines."""

import math

import torch
from torch import Tensor, nn

from ..conditions import GuidedNetwork
from ..networks.network import Network
from ..registry import ConfigError
from ..solvers.divergence import exact_divergence, hutchinson
from ..types import expand_like, sum_items
from .gaussian_kernels import Kernel
from .local_kernels import kernel_of
from .mixing import spectral_gap
from .process import Langevin, Process

FLOOR = 1e-5  # of s̄²: below it a state is data, and float32 has no digits left for its noise


class LocalScore(nn.Module):
    """s(u, y) = -ε(t, y)/√(s̄² + g² ℓ²) with a network ε whose answers are of size 1 at every time.

    s̄² = g² (1 - e^{-u}), at least 1e-5: the variance that a process of unit relaxation has added by u, g² the mean of
    Q over the components that noise reaches. The network sees t, which the clock makes of u, and y/ℓ.

    Args:
        network: ε.
        process: whose score it is; its clock and its noise set the scale.
        residual: s = ∇ log π - e^{-λu} ε/√(s̄² + g² ℓ²), under which an ε of 0 stands for a process at rest; λ is the
            spectral gap of a Langevin process, at which the first term is approached, or 0 if it is not known.
        length: ℓ, of the finest detail of the data: their score is of size 1/ℓ, and for y in units much larger than
            their details networks learn these last. Null leaves y as it is, and ℓ = 0 elsewhere.
    Raises:
        ConfigError: if the score of a prior is to be added where there is none, or the length is not positive.
    Source: Singhal, Goldstein & Ranganath 2024 (Automated denoising score matching for nonlinear diffusions).
    """

    def __init__(self, network: Network, process: Process, residual: bool = False, length: float | None = None) -> None:
        super().__init__()
        if residual and process.prior is None:
            raise ConfigError(f"model.residual: {type(process).__name__} has no prior. Use residual: false.")
        if length is not None and not 0 < length < math.inf:
            raise ConfigError(f"model.length: a number > 0, or null, is needed, found {length}.")
        self.network, self.process, self.residual, self.length = network, process, residual, length
        known = residual and isinstance(process, Langevin)
        self.decay = (spectral_gap(process.prior) or 0.0) if known else 0.0

    def scale(self, u: Tensor) -> Tensor:
        """[] or [B] float64 s̄."""
        return (self.strength(u).square() * -torch.expm1(-u.double())).clamp(min=FLOOR).sqrt()

    def reach(self, u: Tensor) -> Tensor:
        """[] or [B] float64 √(s̄² + g² ℓ²)."""
        return (self.scale(u).square() + (self.strength(u) * (self.length or 0.0)).square()).sqrt()

    def strength(self, u: Tensor) -> Tensor:
        """[] or [B] g, the root mean square of the noise of the components that have any."""
        q = self.process.covariance_rate(u)
        if q.ndim < 2:
            return q.sqrt()
        diagonal = q.diagonal()
        return diagonal[diagonal > 0].mean().sqrt()

    def forward(self, u: Tensor, y: Tensor, condition: Tensor | None = None) -> Tensor:
        """[B, *shape] score at u [] or [B] in states y."""
        seen = y if self.length is None else y / self.length
        eps = self.network(self.process.clock.inverse(u), seen, condition).to(y.dtype)
        size = torch.exp(-self.decay * u) / self.reach(u)
        score = -expand_like(size, y).to(y.dtype) * eps
        return score + self.process.prior.score(y) if self.residual else score

    def guided(self, scale: float, null: Tensor) -> "LocalScore":
        """s_null + w (s - s_null), which is s with ε guided so.

        Args:
            scale: w; 1 is off.
            null: [*] the label or embedding that stands for "no condition".
        """
        return LocalScore(GuidedNetwork(self.network, scale, null), self.process, self.residual, self.length)


def flow_velocity(process: Process, u: Tensor, y: Tensor, score: Tensor) -> Tensor:
    """[B, *shape] dy/du = F - Q s/2 of the probability-flow ODE.

    Source: Song et al. 2021 (Score-based generative modeling through SDEs), equation 13.
    """
    return process.force(u, y) - 0.5 * process.spread(u, score)


def reverse_kernel(process: Process, u: Tensor, to: Tensor, y: Tensor, score: Tensor) -> Kernel:
    """The kernel of the reverse SDE from u down to `to` < u, with the score held fixed and the force linearised.

    The reverse of dy = F du + G dW is dy = (Q s - F) dr + G dW in r = -u, whose Jacobian is taken for -∂F/∂y: exact for
    the stiff part that the prior has far out, and Euler and Maruyama's step in the score.

    Args:
        u, to: [] or [B] float64.
        score: [B, *shape] s(u, y).
    Source: Anderson 1982 (Reverse-time diffusion equation models), for the reverse SDE.
    """
    force = process.spread(u, score) - process.force(u, y)
    return kernel_of(process, y, force, -process.jacobian(u, y), None, 0.5 * (u + to), u - to)


def implicit_rate(
    process: Process,
    score: nn.Module,
    u: Tensor,
    y: Tensor,
    condition: Tensor | None = None,
    probes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """½ sᵀQs and ∇·(Q s), [B] float64 each, per unit of u: of implicit score matching and its likelihood bound.

    Args:
        probes: [P, B, *shape] for Hutchinson's estimate of the divergence; None for its exact value.
    Source: Hyvärinen 2005 (Estimation of non-normalized statistical models by score matching), theorem 1, for Q = 1.
    """
    kept: list[Tensor] = []

    def field(t: Tensor, x: Tensor) -> Tensor:
        kept.append(score(t, x, condition))
        return process.spread(t, kept[-1])

    if probes is None:
        divergence = exact_divergence(field, u, y)[1]
    else:
        divergence = hutchinson(field, u, y, probes)[1].mean(0)
    return 0.5 * sum_items(process.noised(u, kept[-1]).square()), divergence
