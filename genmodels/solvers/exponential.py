"""Solvers for denoisers: the exponential integrators of Gaussian paths, from DDIM to DPM-Solver++ of any order.

With λ = log(α/σ) and the estimates x̂, ε̂ of a denoiser (x_t = α x̂ + σ ε̂), the probability-flow ODE is linear but for x̂:
x_s = (σ_s/σ_t) x_t + σ_s ∫ e^λ x̂ dλ from λ_t to λ_s, or with the roles of signal and noise exchanged
x_s = (α_s/α_t) x_t - α_s ∫ e^{-λ} ε̂ dλ. The linear part is solved exactly; a polynomial takes the place of x̂ or ε̂. Held
constant, both give x_s = α_s x̂ + σ_s ε̂ (DDIM), which is right also where σ or α is 0. All coefficients are float64.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..types import expand_like
from .base import Solver, State, Step
from .brownian import Brownian
from .fields import DenoisingField

SERIES = 20  # terms of φ functions: for |h| <= 1 the first one left out is below 1/20! = 4e-19


class Level(NamedTuple):
    """Scales of a Gaussian path at a time: α, σ and λ = log(α/σ), which may be infinite; float64, in its shape."""

    alpha: Tensor
    sigma: Tensor
    half: Tensor

    @classmethod
    def of(cls, field: DenoisingField, t: Tensor) -> "Level":
        return cls(*field.schedule.scales(t), 0.5 * field.schedule.log_snr(t))


class DenoisingSolver(Solver):
    """A rule for one step along a Gaussian path, from a denoiser's estimates of clean item and noise."""

    needs = DenoisingField
    counts = "predict"

    @classmethod
    def wanted(cls) -> str:
        return "a denoiser (`predict`, which estimates clean item and noise, and the `schedule` of its path)"

    def velocity(self, field: DenoisingField, t: Tensor, x: Tensor) -> Tensor:
        clean, eps = estimates(field, t, x)
        scales = field.schedule(t)
        return wide(scales.dalpha, x) * clean + wide(scales.dsigma, x) * eps


def wide(c: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient ([] or [B]) in the dtype of the state x, to be multiplied with it."""
    return expand_like(c, x).to(x.dtype)


def estimates(field: DenoisingField, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """x̂ and ε̂ in the dtype of the state x.

    Raises:
        ValueError: if they do not have its shape.
    """
    clean, eps = field.predict(t, x)
    if clean.shape != x.shape or eps.shape != x.shape:
        raise ValueError(
            f"integrate: the denoiser turned a state of shape {list(x.shape)} into a clean item of shape "
            f"{list(clean.shape)} and noise of shape {list(eps.shape)}; all must have one shape."
        )
    return clean.to(x.dtype), eps.to(x.dtype)


def mixed(level: Level, clean: Tensor, eps: Tensor) -> Tensor:
    """[B, *shape] α x̂ + σ ε̂: DDIM's step to a level, exact at its ends."""
    return wide(level.alpha, clean) * clean + wide(level.sigma, clean) * eps


def white(noise: Any, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """[B, *shape] standard normal of a step: (W(s) - W(t))/√|s - t|, so that finer grids see the same path.

    Raises:
        ValueError: without a Brownian path.
    """
    length = (s - t).abs()
    return wide(torch.where(length > 0, length, 1.0).rsqrt(), x) * path(noise).increment(t, s).w.to(x.dtype)


def path(noise: Any) -> Brownian:
    """The Brownian path that a step was given.

    Raises:
        ValueError: if it was given none.
    """
    if not isinstance(noise, Brownian):
        raise ValueError(
            f"integrate: this solver draws noise and needs a Brownian path such as BrownianTree, found "
            f"{type(noise).__name__}. `sample` makes one of its seeds; encode and decode are deterministic, and take "
            "solvers without noise (eta: 0, s_churn: 0)."
        )
    return noise


def check_direction(h: Tensor, noise: Any, name: str) -> None:
    """Raises ValueError where a step with noise would run from data to noise, or without a path."""
    path(noise)
    if h.device.type == "cpu" and bool((h < 0).any()):
        raise ValueError(
            f"integrate: '{name}' with noise runs from noise to data only, and these times increase. Give them in "
            "decreasing order, or turn the noise off (eta: 0)."
        )


@register(Solver, "ddim")
class DDIM(DenoisingSolver):
    """x⁺ = α_s x̂ + √(σ_s² - v) ε̂ + √v z with v = η² σ_s² (1 - e^{-2h}), h = λ_s - λ_t; order 1, one evaluation.

    η = 0 is the ODE's exponential Euler method, which is Euler's in t where α and σ are linear in t, and only there;
    η = 1 is ancestral sampling. e^{-2h} = α_t² σ_s²/(α_s² σ_t²), so that v is the paper's σ_τ² on every Gaussian path.

    Args:
        eta: η, 0 for no noise to 1.
    Raises:
        ConfigError: unless 0 <= eta <= 1.
    Source: Song et al. 2021 (Denoising diffusion implicit models), equations 12 and 16.
    """

    order, stages = 1, 1

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ConfigError(f"ddim: 0 <= eta <= 1 is needed, found {eta}.")
        self.eta = eta

    @property
    def draws(self) -> bool:
        return self.eta > 0

    def step(self, field: DenoisingField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        clean, eps = estimates(field, t, x)
        now, then = Level.of(field, t), Level.of(field, s)
        if self.eta == 0:
            return Step(mixed(then, clean, eps), None, ())
        h = then.half - now.half
        check_direction(h, noise, "ddim")
        share = self.eta**2 * -torch.expm1(-2 * h)
        less = then._replace(sigma=then.sigma * (1 - share).sqrt())
        return Step(mixed(less, clean, eps) + wide(then.sigma * share.sqrt(), x) * white(noise, t, s, x), None, ())


@register(Solver, "ddpm")
class DDPM(DenoisingSolver):
    """Ancestral sampling x⁺ = α_s x̂ + σ_s e^{-h} ε̂ + √v z, h = λ_s - λ_t: the mean of p(x_s | x_t, x̂); one call.

    The variance "small" is that of p(x_s | x_t, x): v = σ_s² (1 - e^{-2h}), right for data that are one point; "large"
    that of p(x_t | x_s): v = σ_t² (1 - e^{-2h}), without noise in a step to σ = 0.

    Args:
        variance: which of them.
    Source: Ho et al. 2020 (Denoising diffusion probabilistic models), algorithm 2 and section 3.2.
    """

    order, stages = 1, 1

    def __init__(self, variance: Literal["small", "large"] = "small") -> None:
        self.variance = variance

    @property
    def draws(self) -> bool:
        return True

    def step(self, field: DenoisingField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        clean, eps = estimates(field, t, x)
        now, then = Level.of(field, t), Level.of(field, s)
        h = then.half - now.half
        check_direction(h, noise, "ddpm")
        share, spread = -torch.expm1(-2 * h), then.sigma
        if self.variance == "large":
            spread = torch.where(then.sigma > 0, now.sigma, 0.0)
        mean = mixed(then._replace(sigma=then.sigma * torch.exp(-h)), clean, eps)
        return Step(mean + wide(spread * share.sqrt(), x) * white(noise, t, s, x), None, ())


# ---- polynomials in λ ------------------------------------------------------------------------------------------------


def moments(h: Tensor, count: int) -> list[Tensor]:
    """m_k = h ∫ e^{-h(1-θ)} θ^k dθ over [0, 1] for k = 0 … count - 1, float64 in the shape of h, of either sign.

    m_0 = 1 - e^{-h} and m_k = 1 - (k/h) m_{k-1}; near 0, where that cancels, the series h Σ_j (-h)^j k!/(j + k + 1)!.
    """
    near = h.abs() < 1
    small, large = torch.where(near, h, 1.0), torch.where(near, 1.0, h)
    found = [-torch.expm1(-h)]
    for k in range(1, count):
        term = small / (k + 1)
        total = term
        for j in range(1, SERIES):
            term = term * -small / (j + k + 1)
            total = total + term
        found.append(torch.where(near, total, 1 - k / large * found[-1]))
    return found


def polynomial(c: list[Tensor], m: list[Tensor]) -> list[Tensor]:
    """M_k = ∫ ω_k with Newton's ω_k = θ (θ - c_1) … (θ - c_{k-1}), k = 1 … len(c), from the moments m."""
    found, powers = [], [torch.ones_like(m[0])]  # coefficients of ω_k/θ in rising powers
    for k, node in enumerate(c):
        found.append(sum((a * m[i + 1] for i, a in enumerate(powers)), torch.zeros_like(m[0])))
        if k + 1 < len(c):
            powers = [
                (powers[i - 1] if i else 0) - (node * powers[i] if i < len(powers) else 0)
                for i in range(len(powers) + 1)
            ]
    return found


def lagrange(c: list[Tensor], newton: list[Tensor]) -> list[Tensor]:
    """Weights of the values at θ = 0, c_1, …, c_n in Σ_k M_k f[0, …, k]; a row whose c_k is not finite ends before."""
    usable, weights = torch.ones_like(newton[0], dtype=torch.bool), [torch.zeros_like(newton[0])] * (len(c) + 1)
    nodes = [torch.zeros_like(newton[0])]
    for node, share in zip(c, newton, strict=True):
        usable = usable & node.isfinite()
        nodes.append(torch.where(usable, node, float(len(nodes))))  # ahead, where no other node is; its weight is 0
        share = torch.where(usable, share, 0.0)
        for j in range(len(nodes)):
            apart = [nodes[j] - other for i, other in enumerate(nodes) if i != j]
            weights[j] = weights[j] + share / math.prod(apart[1:], start=apart[0])
    return weights


class Multistep(DenoisingSolver):
    """x⁺ = α_s x̂ + σ_s e^{-ηh} ε̂ + κ Σ_k M_k f[0, …, k] + σ_s √(1 - e^{-2ηh}) z with the history of f = x̂ or ε̂.

    M_k = ∫ of Newton's polynomials (exact), κ = α_s for x̂ and σ_s for ε̂. Steps with too little history, and those from
    or to an infinite λ, use the lower order that they can. History lies in `state`: values, then their λ; nan where
    there is none yet.
    """

    stages = 1
    target: Literal["x", "eps"] = "x"
    eta: float = 0.0
    history: int

    @property
    def draws(self) -> bool:
        return self.eta > 0

    @property
    def moments(self) -> int:
        """How many of m_0, m_1, … `integrals` looks at."""
        return self.history + 1

    def along(self, steps: int) -> "Multistep":
        if steps < self.history + 1:
            raise ValueError(
                f"integrate: '{self.registered_name}' of order {self.history + 1} needs at least that many steps, "
                f"found {steps}. Raise num_steps, or lower its order."
            )
        return self

    def start(self, field: DenoisingField, t: Tensor, x: Tensor) -> State:
        nothing = torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)
        return (torch.zeros_like(x),) * self.history + (nothing,) * self.history

    def integrals(self, c: list[Tensor], m: list[Tensor]) -> list[Tensor]:
        """M_1, M_2, … for the nodes c (in units of the step; nan where there is none) and the moments m_0, m_1, …"""
        return polynomial(c, m)

    def step(self, field: DenoisingField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        clean, eps = estimates(field, t, x)
        now, then = Level.of(field, t), Level.of(field, s)
        h = then.half - now.half
        less = then if self.eta == 0 else then._replace(sigma=then.sigma * torch.exp(-self.eta * h))
        new = mixed(less, clean, eps)
        value, sign = (clean, 1.0) if self.target == "x" else (eps, -1.0)
        if self.history:
            values, levels = state[: self.history], state[self.history :]
            gain, run = then.alpha if self.target == "x" else then.sigma, sign * h
            c = [torch.where(run.isfinite(), (sign * level - sign * now.half) / run, torch.nan) for level in levels]
            newton = self.integrals(c, moments((1 + self.eta) * run, self.moments))
            for w, f in zip(lagrange(c, newton), (value, *values), strict=True):
                new = new + wide(gain * w, x) * f
            moves = h != 0  # a step of length 0 must not fill the history with copies
            state = tuple(
                torch.where(expand_like(moves, old), latest, old)
                for old, latest in (
                    *zip(values, (value, *values), strict=False),
                    *zip(levels, (now.half.expand(len(x)), *levels), strict=False),
                )
            )
        if self.eta:
            check_direction(h, noise, self.registered_name)
            spread = then.sigma * (-torch.expm1(-2 * self.eta * h)).sqrt()
            new = new + wide(spread, x) * white(noise, t, s, x)
        return Step(new, None, state)


@register(Solver, "exponential_adams")
class ExponentialAdams(Multistep):
    """Adams-Bashforth in λ = log(α/σ): the exact integral of the polynomial through the last n x̂ or ε̂; one evaluation.

    A step's own error is O(h^{n+1}). The first n - 1 steps have less to go by, the first one being DDIM's: over a fixed
    interval orders above 2 show where the estimates hardly change at first, as they do near pure noise.

    Args:
        order: n, 1 to 4: how many estimates the polynomial goes through.
        target: which estimate, "x" or "eps".
    Raises:
        ConfigError: unless 1 <= order <= 4.
    Source: Hochbruck & Ostermann 2010 (Exponential integrators); Zhang & Chen 2023 (Fast sampling of diffusion models
        with exponential integrator), for ε̂; Lu et al. 2022 (DPM-Solver++), for x̂.
    """

    order: ClassVar[float] = 2

    def __init__(self, order: int = 2, target: Literal["x", "eps"] = "x") -> None:
        if not 1 <= order <= 4:
            raise ConfigError(f"exponential_adams: 1 <= order <= 4 is needed, found {order}.")
        self.history, self.target, self.order = order - 1, target, min(order, 2)


@register(Solver, "dpmpp")
class DPMpp(Multistep):
    """DPM-Solver++ multistep (2M, 3M) and its SDE variants: x̂ by a polynomial in λ, with the published coefficients.

    Published, 2M has (1 - e^{-h})/2 for the integral of θ, which is 1 - (1 - e^{-h})/h, and 3M half the integral of θ²:
    they differ from the exact ones by terms of the local order 3, so that both have order 2. With "exact" a step is
    that of `exponential_adams`. The first steps, and one to σ = 0, have less history and a lower order: the first is
    DDIM's.

    With η > 0 it solves the reverse SDE with e² = η g²: h becomes (1 + η) h in the coefficients; strong order 1.

    Args:
        order: 1 (DDIM), 2 or 3: how many x̂ the polynomial goes through.
        eta: η of the SDE; 0 is the ODE, 1 the variance of the path ("SDE-DPM-Solver++").
        coefficients: "published", or "exact" integrals.
    Raises:
        ConfigError: if the order is another, or eta < 0.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2.
    """

    order: ClassVar[float] = 2

    def __init__(
        self, order: int = 2, eta: float = 0.0, coefficients: Literal["published", "exact"] = "published"
    ) -> None:
        if order not in (1, 2, 3):
            raise ConfigError(f"dpmpp: order 1, 2 or 3 is needed, found {order}.")
        if not eta >= 0:
            raise ConfigError(f"dpmpp: eta >= 0 is needed, found {eta}.")
        self.history, self.eta, self.coefficients = order - 1, eta, coefficients
        self.order = 1 if eta else min(order, 2)

    @property
    def moments(self) -> int:
        return 1 if self.coefficients == "published" and self.history == 1 else super().moments

    def integrals(self, c: list[Tensor], m: list[Tensor]) -> list[Tensor]:
        if self.coefficients == "exact":
            return polynomial(c, m)
        if len(c) == 1:
            return [m[0] / 2]
        # while it has one node of history, 3M takes a step of 2M
        return [torch.where(c[1].isfinite(), m[1], m[0] / 2), m[2] / 2 - c[0] * m[1]]


@register(Solver, "dpmpp_2s")
class DPMpp2S(DenoisingSolver):
    """DPM-Solver++(2S): x⁺ = α_s x̂ + σ_s ε̂ + α_s (1 - e^{-h}) (x̂_u - x̂)/(2r), x̂_u at λ_t + r h; order 2, two calls.

    Its error estimate is the difference from DDIM, which goes with h². A step from or to an infinite λ is two steps of
    DDIM, halves in t, and its error is their difference from one.

    Args:
        ratio: r, between 0 and 1.
    Raises:
        ConfigError: unless 0 < ratio < 1.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 1.
    """

    order, stages, adaptive = 2, 2, True

    def __init__(self, ratio: float = 0.5) -> None:
        if not 0 < ratio < 1:
            raise ConfigError(f"dpmpp_2s: 0 < ratio < 1 is needed, found {ratio}.")
        self.ratio = ratio

    def step(self, field: DenoisingField, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Any) -> Step:
        clean, eps = estimates(field, t, x)
        now, then = Level.of(field, t), Level.of(field, s)
        h = then.half - now.half
        inner = h.isfinite()
        inside = field.schedule.time(2 * torch.where(inner, now.half + self.ratio * h, 0.0))
        between = torch.where(inner, inside, 0.5 * (t + s))
        ahead, noise_ahead = estimates(field, between, mixed(Level.of(field, between), clean, eps))
        plain = mixed(then, clean, eps)
        gain = torch.where(inner, then.alpha * -torch.expm1(-torch.where(inner, h, 0.0)) / (2 * self.ratio), 0.0)
        halves = mixed(then, ahead, noise_ahead) - plain
        error = torch.where(expand_like(inner, x), wide(gain, x) * (ahead - clean), halves)
        return Step(plain + error, error, ())
