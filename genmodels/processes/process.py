"""Diffusions with any drift: what a forward process is, and what local kernels need to know of its drift."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from ..registry import ConfigError, kind, register
from ..types import Shape, expand_like
from .clocks import Clock, Constant, Linear, inside
from .gaussian_kernels import Kernel
from .priors import Logistic, Prior

Structure = Literal["elementwise", "dense"]


@kind
class Process(nn.Module, ABC):
    """A diffusion dy = F(u, y) du + G(u) dW from data at u = 0 to its prior at u = U, in a time u of its own.

    A clock u(t) puts it on the time t of models, from 0 (data) to 1 (noise): dy = β(t) F dt + √β(t) G dW, β = du/dt.
    A member gives `force` (F) and, unless it is 1, `amplitude` (G); derivatives of F are taken by automatic
    differentiation unless it knows them.

    Args:
        clock: u(t).
        shape: of one item.
    Attributes:
        structure: of ∂F/∂y: "elementwise" if component i of F depends on component i of y alone, else "dense", whose
            kernels cost O(n³) for items of n components.
        autonomous: whether F and G do not depend on u.
        prior: law that the state at U is to have; None if it has no closed form (scores can then be learnt, and
            nothing sampled).
    """

    structure: Structure = "dense"
    autonomous: bool = True
    prior: Prior | None

    def __init__(self, clock: Clock, *, shape: Shape) -> None:
        super().__init__()
        self.clock, self.shape, self.prior = clock, tuple(shape), None

    @property
    def size(self) -> int:
        """n, the number of components of an item."""
        return math.prod(self.shape)

    # ---- in the process's own time u -------------------------------------------------------------------------------

    @abstractmethod
    def force(self, u: Tensor, y: Tensor) -> Tensor:
        """[B, *shape] F per unit of u, at u ([] or [B], float64) in state y [B, *shape]."""

    def amplitude(self, u: Tensor) -> Tensor:
        """G at u, per root of a unit of u: [] or [B] a scale, or an [n, m] matrix of a dense process."""
        return torch.ones((), dtype=torch.float64, device=u.device)

    def check_noise(self) -> None:
        """Whether G can be noise: then Q = G Gᵀ is positive semidefinite, whatever G is.

        Raises:
            ValueError: unless G is a finite number, or for dense processes a finite matrix of a row for each component.
        """
        u = torch.tensor(0.5 * self.clock.total, dtype=torch.float64)
        for given in (u, u.expand(3)):
            g = self.amplitude(given)
            matrix = g.ndim == 2 and len(g) == self.size and self.structure == "dense"
            if not (matrix or g.shape in ((), given.shape)) or not bool(g.isfinite().all()):
                found = g.tolist() if g.numel() < 9 else list(g.shape)
                raise ValueError(
                    f"process: the amplitude of {type(self).__name__} must be a finite number at every u, or for a "
                    f"dense process a finite matrix of {self.size} rows, found {found} where the structure is "
                    f"{self.structure}. Noise that differs between components is a diagonal matrix."
                )

    def covariance_rate(self, u: Tensor) -> Tensor:
        """Q = G Gᵀ at u, per unit of u: [] or [B] if G is a scale, or [n, n]."""
        g = self.amplitude(u)
        return g @ g.mT if g.ndim == 2 else g.square()

    def spread(self, u: Tensor, v: Tensor) -> Tensor:
        """[B, *shape] Q v."""
        q = self.covariance_rate(u).to(v.dtype)
        return (v.flatten(1) @ q).reshape(v.shape) if q.ndim == 2 else expand_like(q, v) * v

    def noised(self, u: Tensor, v: Tensor) -> Tensor:
        """[B, m] Gᵀ v, flat: the part of a score that noise acts on."""
        g = self.amplitude(u).to(v.dtype)
        return v.flatten(1) @ g if g.ndim == 2 else (expand_like(g, v) * v).flatten(1)

    def transition(self, start: Tensor, end: Tensor, y: Tensor) -> Kernel | None:
        """The exact kernel of the state at u = end given y at u = start, where it is known; else None.

        A process that answers for any increment is trained with kernels that start at the data.
        """
        return None

    def jacobian(self, u: Tensor, y: Tensor) -> Tensor:
        """∂F/∂y: [B, *shape] its diagonal if it is elementwise, or [B, n, n]."""
        if self.structure == "elementwise":
            return jvp(lambda v: self.force(u, v), (y,), (torch.ones_like(y),))[1]
        columns = vmap(lambda e: jvp(lambda v: self.force(u, v), (y,), (e.expand_as(y),))[1])(self._basis(y))
        return columns.reshape(self.size, len(y), self.size).permute(1, 2, 0)

    def force_rate(self, u: Tensor, y: Tensor) -> Tensor:
        """[B, *shape] ∂F/∂u."""
        if self.autonomous:
            return torch.zeros_like(y)
        u = torch.as_tensor(u, dtype=torch.float64, device=y.device)
        return jvp(lambda v: self.force(v, y), (u,), (torch.ones_like(u),))[1].to(y.dtype)

    def ito(self, u: Tensor, y: Tensor) -> Tensor:
        """[B, *shape] ½ Σ_kl Q_kl ∂²F/∂y_k ∂y_l: how fast noise bends the mean force."""
        g = self.amplitude(u).to(y.dtype)
        if self.structure == "elementwise":
            return 0.5 * expand_like(g, y).square() * self._second(u, y, torch.ones_like(y))
        if g.ndim < 2:
            bent = vmap(lambda e: self._second(u, y, e.expand_as(y)))(self._basis(y)).sum(0)
            return 0.5 * expand_like(g, y).square() * bent
        columns = g.mT.reshape(-1, 1, *self.shape)
        return 0.5 * vmap(lambda e: self._second(u, y, e.expand_as(y)))(columns).sum(0)

    def taylor(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`force`, `jacobian` and `ito` at once, for members whose derivatives share their work."""
        force = checked(self, u, y, self.force(u, y))  # before derivatives of what may be no force
        return force, self.jacobian(u, y), self.ito(u, y)

    def force_derivatives(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, *shape] F, ∂F_i/∂y_i and ∂²F_i/∂y_i² of an elementwise force."""
        force, slope, ito = self.taylor(u, y)
        return force, slope, 2 * ito / expand_like(self.amplitude(u).to(y.dtype), y).square()

    def _second(self, u: Tensor, y: Tensor, direction: Tensor) -> Tensor:
        """d²F(y + ε direction)/dε² at ε = 0."""

        def first(v: Tensor) -> Tensor:
            return jvp(lambda w: self.force(u, w), (v,), (direction,))[1]

        return jvp(first, (y,), (direction,))[1]

    def _basis(self, y: Tensor) -> Tensor:
        return torch.eye(self.size, dtype=y.dtype, device=y.device).reshape(self.size, 1, *self.shape)

    def divergence(self, u: Tensor, y: Tensor) -> Tensor:
        """[B] float64 ∇·F per unit of u."""
        j = self.jacobian(u, y)
        if self.structure == "elementwise":
            return j.double().reshape(len(y), self.size).sum(1)
        return j.double().diagonal(dim1=-2, dim2=-1).sum(-1)

    # ---- in the time t of models -----------------------------------------------------------------------------------

    def drift(self, t: Tensor, y: Tensor) -> Tensor:
        """[B, *shape] β(t) F per unit of t."""
        t = inside(t, 1.0, "t").to(y.device)
        return expand_like(self.clock.rate(t), y).to(y.dtype) * self.force(self.clock(t), y)

    def noise(self, t: Tensor) -> Tensor:
        """√β(t) G per root of a unit of t: as `amplitude`."""
        t = inside(t, 1.0, "t")
        g, rate = self.amplitude(self.clock(t)), self.clock.rate(t).sqrt()
        return rate * g


def checked(process: Process, u: Tensor, y: Tensor, force: Tensor) -> Tensor:
    """The force that a process answered with at u in states y.

    Raises:
        ValueError: if it has another shape than the state, or is not finite.
    """
    if not isinstance(force, Tensor) or force.shape != y.shape:
        found = list(force.shape) if isinstance(force, Tensor) else type(force).__name__
        raise ValueError(
            f"process: the force of {type(process).__name__} turned a state of shape {list(y.shape)} into {found}; "
            "state and force must have one shape."
        )
    # a sum is the cheapest question; on a device asking would wait for it
    suspect = y.device.type == "cpu" and not math.isfinite(force.sum(dtype=torch.float64).item())
    if suspect and not bool(force.isfinite().all()):
        bad = int((~force.isfinite()).flatten(1).any(1).nonzero()[0])
        when = float(torch.as_tensor(u).double().expand(len(y))[bad])
        raise ValueError(
            f"process: the force of {type(process).__name__} is not finite at u = {when:.6g}, where the state has "
            f"entries up to {float(y[bad].abs().max()):.3g} in size. Take shorter steps, or mend the force."
        )
    return force.to(y.dtype)


@register(Process, "langevin")
class Langevin(Process):
    """F = ½ ∇ log π(y), G = 1: whatever the data, their law approaches the prior π.

    How fast is a matter of π: see `mixing`.

    Args:
        prior: π.
        clock: u(t).
    Raises:
        ConfigError: if the prior cannot be sampled.
    Source: Singhal, Goldstein & Ranganath 2024 (Automated denoising score matching for nonlinear diffusions).
    """

    def __init__(self, prior: Prior = Logistic(), clock: Clock = Linear(), *, shape: Shape) -> None:
        super().__init__(clock, shape=shape)
        if not prior.samples:
            raise ConfigError(
                f"langevin.prior: {type(prior).__name__} has a density and no sampler, so that nothing could be "
                "generated from it. Give it a method sample(noise, shape, dtype=…), or choose another prior."
            )
        self.prior, self.structure = prior, prior.structure

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        return 0.5 * self.prior.score(y)

    def transition(self, start: Tensor, end: Tensor, y: Tensor) -> Kernel | None:
        return self.prior.relaxation(end - start, y)

    def jacobian(self, u: Tensor, y: Tensor) -> Tensor:
        if self.structure == "elementwise":
            return 0.5 * self.prior.slope(y)
        return super().jacobian(u, y)

    def ito(self, u: Tensor, y: Tensor) -> Tensor:
        if self.structure == "elementwise":
            return 0.25 * self.prior.curvature(y)
        return super().ito(u, y)

    def taylor(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.structure != "elementwise":
            return super().taylor(u, y)
        score, slope, curvature = self.prior.derivatives(y)
        return 0.5 * score, 0.5 * slope, 0.25 * curvature

    def force_derivatives(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(0.5 * v for v in self.prior.derivatives(y))


class GivenProcess(Process):
    """A process whose force is a function.

    Args:
        force: F(u, y), [B, *shape] from u [] or [B] and y [B, *shape]; differentiable by torch.
        amplitude: G, a number or an [n, m] matrix.
        structure, autonomous: what is known of F; a force that depends on u is not autonomous.
        prior: law at the end, if it is known.
        clock: u(t).
    Raises:
        ValueError: if the amplitude is neither a positive number nor a finite [n, m] matrix of a dense process.
    """

    def __init__(
        self,
        force: Callable[[Tensor, Tensor], Tensor],
        amplitude: float | Tensor = 1.0,
        *,
        shape: Shape,
        structure: Structure = "dense",
        autonomous: bool = True,
        prior: Prior | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(clock or Constant(), shape=shape)
        g = torch.as_tensor(amplitude, dtype=torch.float64)
        if g.ndim == 0 and not g > 0:
            raise ValueError(f"process: the amplitude must be a number > 0, or a matrix, found {float(g):g}.")
        self.given, self.structure, self.autonomous, self.prior = force, structure, autonomous, prior
        self.register_buffer("matrix", g)
        self.check_noise()

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        return self.given(u, y)

    def amplitude(self, u: Tensor) -> Tensor:
        return self.matrix
