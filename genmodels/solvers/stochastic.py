"""Solvers of stochastic differential equations, and the equations that they take.

A step takes its noise from a `Brownian` path: it asks for the increment from t to s, so that any steps see the same
path. Times may run backwards: with s < t an Itô equation is solved in reverse, its integral being Itô's with respect to
the path as it is met, as for reverse-time diffusions; a Stratonovich one retraces its own solution.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import register
from ..types import Condition, expand_like
from . import stochastic_tableaux as tableaux
from .base import Solver, State, Step
from .brownian import Brownian, Increment
from .fields import SDE, narrow, tensors_of
from .norms import rms
from .runge_kutta import combination
from .stochastic_tableaux import StochasticTableau

NoiseType = Literal["additive", "diagonal", "general"]
Calculus = Literal["ito", "stratonovich"]


class RowSDE:
    """dx = f(t, x, *arguments) dt + g(t, x, *arguments) dW, where each argument has a row for every item or is None.

    Args:
        drift: f, [B, *shape].
        diffusion: g, [B, *shape] for additive noise (g does not depend on x) and diagonal noise (component i of g
            depends on component i of x alone, and multiplies component i of W), [B, *shape, M] for general noise.
        calculus: how the integral over W is meant; both mean the same where noise is additive.
    """

    def __init__(
        self,
        drift: Callable[..., Tensor],
        diffusion: Callable[..., Tensor],
        *arguments: Condition | None,
        noise_type: NoiseType = "diagonal",
        calculus: Calculus = "ito",
    ) -> None:
        self.f, self.g, self.arguments = drift, diffusion, arguments
        self.noise_type, self.calculus = noise_type, calculus

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        return self.f(t, x, *self.arguments)

    def diffusion(self, t: Tensor, x: Tensor) -> Tensor:
        return self.g(t, x, *self.arguments)

    def select(self, rows: Tensor) -> "RowSDE":
        kinds = {"noise_type": self.noise_type, "calculus": self.calculus}
        return RowSDE(self.f, self.g, *narrow(self.arguments, rows), **kinds)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the equation depends on and gradients are wanted of."""
        given = [v for v in self.arguments if isinstance(v, Tensor) and v.requires_grad]
        found = [*tensors_of(self.f), *tensors_of(self.g), *given]
        return tuple({id(v): v for v in found}.values())


class StochasticSolver(Solver):
    """A rule for one step of an SDE.

    Attributes:
        noise_types: of the equations that it solves.
        calculi: of the equations that it solves; where noise is additive, both are the same.
        stages: evaluations of the drift per step.
    """

    needs = SDE
    counts = "drift"
    noise_types: ClassVar[tuple[NoiseType, ...]] = ("additive", "diagonal", "general")
    calculi: ClassVar[tuple[Calculus, ...]]

    @classmethod
    def serves(cls, field: Any) -> bool:
        """Whether it solves an equation, by the equation's kind of noise and calculus."""
        if not isinstance(field, SDE):
            return False
        return field.noise_type in cls.noise_types and (field.noise_type == "additive" or field.calculus in cls.calculi)

    @classmethod
    def wanted(cls) -> str:
        return f"an SDE with {' or '.join(cls.noise_types)} noise and {' or '.join(cls.calculi)} calculus"

    def velocity(self, field: SDE, t: Tensor, x: Tensor) -> Tensor:
        return drift(field, t, x)


def drift(field: SDE, t: Tensor, x: Tensor) -> Tensor:
    """[B, *shape] f at (t, x), in the dtype of x.

    Raises:
        ValueError: if it does not have the state's shape.
    """
    f = field.drift(t, x)
    if f.shape != x.shape or not f.is_floating_point():
        when = f"t = {float(t.detach().flatten()[0]):.9g}" if t.numel() else "no time"
        raise ValueError(
            f"integrate: the drift of the SDE turned a state of shape {list(x.shape)} into {f.dtype} of shape "
            f"{list(f.shape)} at {when}; state and drift must have one shape, and be of floating point."
        )
    return f.to(x.dtype)


def diffusion(field: SDE, t: Tensor, x: Tensor) -> Tensor:
    """g at (t, x), in the dtype of x; `times_noise` checks its shape."""
    return field.diffusion(t, x).to(x.dtype)


def times_noise(field: SDE, g: Tensor, w: Tensor, x: Tensor) -> Tensor:
    """[B, *shape] g w: component by component, or for general noise [B, *shape, M] as a product over M.

    Raises:
        ValueError: if g or w does not fit the state x and the equation's kind of noise.
    """
    if field.noise_type != "general" and g.shape == w.shape == x.shape:
        return g * w
    if field.noise_type == "general" and g.shape == (*x.shape, g.shape[-1]) and w.shape == (len(x), g.shape[-1]):
        return torch.einsum("b...m,bm->b...", g, w)
    shape = [*x.shape, "M"] if field.noise_type == "general" else [*x.shape]
    path = [len(x), "M"] if field.noise_type == "general" else [*x.shape]
    raise ValueError(
        f"integrate: SDE noise shape mismatch: the diffusion has shape {list(g.shape)} and the Brownian increment "
        f"{list(w.shape)}, for a state of shape {list(x.shape)} with {field.noise_type} noise. The diffusion must be "
        f"[{', '.join(map(str, shape))}] and the path [{', '.join(map(str, path))}]: build the path with the shape of "
        "one item's noise, or change the equation's noise_type."
    )


def _increment(noise: Brownian, t: Tensor, s: Tensor, x: Tensor) -> Increment:
    """The path from t to s, in the dtype of the state x."""
    if not isinstance(noise, Brownian):
        raise ValueError(
            f"integrate: an SDE needs noise, a Brownian path such as BrownianTree, found {type(noise).__name__}."
        )
    increment = noise.increment(t, s)
    return increment if increment.w.dtype == x.dtype else Increment(*(part.to(x.dtype) for part in increment))


@register(Solver, "euler_maruyama")
class EulerMaruyama(StochasticSolver):
    """x⁺ = x + f h + g ΔW for Itô equations with any noise: strong order 1/2, and 1 where noise is additive.

    Source: Kloeden & Platen 1992 (Numerical solution of stochastic differential equations), section 10.2.
    """

    order, stages, calculi = 0.5, 1, ("ito",)

    def step(self, field: SDE, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Brownian) -> Step:
        h, w = expand_like(s - t, x).to(x.dtype), _increment(noise, t, s, x).w
        f, g = drift(field, t, x), diffusion(field, t, x)
        return Step(x + h * f + times_noise(field, g, w, x), None, (), (f, g))


@register(Solver, "milstein")
class Milstein(StochasticSolver):
    """x⁺ = x + f h + g ΔW + ½ g g' (ΔW² - |h|), without |h| for Stratonovich equations: strong order 1.

    For diagonal noise; g g' ≈ (g(x + δ g) - g(x))/δ costs one more evaluation of g and no derivative. Its error, which
    goes with δ, multiplies ΔW² - |h| of mean 0, and δ = √|h| is short enough; or ΔW² of mean |h|, which needs δ = |h|.
    For additive noise, where it is 0, this is Euler and Maruyama's method.

    Source: Kloeden & Platen 1992 (Numerical solution of stochastic differential equations), sections 10.3 and 11.1.
    """

    order, stages, calculi = 1.0, 1, ("ito", "stratonovich")
    noise_types = ("additive", "diagonal")

    def step(self, field: SDE, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Brownian) -> Step:
        h, w = expand_like(s - t, x).to(x.dtype), _increment(noise, t, s, x).w
        f, g = drift(field, t, x), diffusion(field, t, x)
        new = x + h * f + times_noise(field, g, w, x)
        if field.noise_type == "diagonal":
            ito = field.calculus == "ito"
            reach = h.abs().sqrt() if ito else h.abs()
            correction = diffusion(field, t, x + reach * g) - g
            square = w.square() - h.abs() if ito else w.square()
            new = new + correction * square / (2 * torch.where(reach > 0, reach, 1.0))
        return Step(new, None, (), (f, g))


@register(Solver, "stochastic_heun")
class StochasticHeun(StochasticSolver):
    """x⁺ = x + ½ (f + f̂) h + ½ (g + ĝ) ΔW with f̂, ĝ at x + f h + g ΔW, for Stratonovich equations with any noise.

    Strong order 1 where noise is diagonal or additive, 1/2 where it is general. Its error estimate, the difference from
    x + f h + g ΔW, goes with h.

    Source: Kloeden & Platen 1992 (Numerical solution of stochastic differential equations), section 15.5.
    """

    order, stages, calculi = 1.0, 2, ("stratonovich",)
    adaptive = True

    def step(self, field: SDE, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Brownian) -> Step:
        h, w = expand_like(s - t, x).to(x.dtype), _increment(noise, t, s, x).w
        f, g = drift(field, t, x), diffusion(field, t, x)
        ahead = x + h * f + times_noise(field, g, w, x)
        f_end, g_end = drift(field, s, ahead), diffusion(field, s, ahead)
        error = 0.5 * (h * (f_end - f) + times_noise(field, g_end - g, w, x))
        return Step(ahead + error, error, (), (f, g, f_end, g_end))


@register(Solver, "reversible_heun")
class ReversibleHeun(StochasticSolver):
    """ẑ⁺ = 2x - ẑ + f h + g ΔW, x⁺ = x + ½ (f + f⁺) h + ½ (g + g⁺) ΔW with f, g at ẑ and f⁺, g⁺ at ẑ⁺, ẑ = x at first.

    For Stratonovich equations with any noise; one evaluation per step. Strong order 1/2, and 1 where noise is additive.
    A step back from s to t on the same path with the memory of the step forth undoes it exactly.

    Source: Kidger et al. 2021 (Efficient and accurate gradients for neural SDEs), section 3.
    """

    order, stages, calculi = 0.5, 1, ("stratonovich",)

    def start(self, field: SDE, t: Tensor, x: Tensor) -> State:
        return x, drift(field, t, x), diffusion(field, t, x)

    def slope(self, field: SDE, t: Tensor, x: Tensor, state: State) -> Tensor:
        return state[1]

    def step(self, field: SDE, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Brownian) -> Step:
        h, w = expand_like(s - t, x).to(x.dtype), _increment(noise, t, s, x).w
        z, f, g = state
        ahead = 2 * x - z + h * f + times_noise(field, g, w, x)
        z = torch.where(h == 0, z, ahead)  # a step of length 0 must not turn x - ẑ around
        f_end, g_end = drift(field, s, z), diffusion(field, s, z)
        new = x + 0.5 * (h * (f + f_end) + times_noise(field, g + g_end, w, x))
        return Step(new, None, (z, f_end, g_end), (f, g, f_end, g_end))


class Iterated(NamedTuple):
    """The iterated integrals of an increment over a step of length |h|, [B, *shape] each.

    Args:
        w: ΔW.
        second: (ΔW² - |h|)/(2 √|h|).
        area: ∫W/|h| = ΔW/2 + H.
        third: (ΔW³ - 3 |h| ΔW)/(6 |h|).
    """

    w: Tensor
    second: Tensor
    area: Tensor
    third: Tensor

    @classmethod
    def of(cls, increment: Increment, length: Tensor) -> "Iterated":
        w, safe = increment.w, torch.where(length > 0, length, 1.0)
        second = (w.square() - length) / (2 * safe.sqrt())
        return cls(w, second, 0.5 * w + increment.h, w * (w.square() - 3 * length) / (6 * safe))


class StochasticRungeKutta(StochasticSolver):
    """A method of strong order 1.5 for Itô equations with diagonal (or additive) noise, driven by a tableau.

    Drift stages k_i = f(t + c0_i h, x + h Σ a0_ij k_j + I Σ b0_ij g_j), with I = ∫W/|h|, and diffusion stages
    g_i = g(t + c1_i h, x + h Σ a1_ij k_j + √|h| Σ b1_ij g_j); x⁺ = x + h Σ α_i k_i + Σ_i (ΔW β1_i +
    (ΔW² - |h|)/(2 √|h|) β2_i + I β3_i + (ΔW³ - 3 |h| ΔW)/(6 |h|) β4_i) g_i.

    The error estimate, δ h Σ k_i + Σ_i (I β3_i + (ΔW³ - 3 |h| ΔW)/(6 |h|) β4_i) g_i, goes with h, and bounds the whole
    change by the drift where δ = 1: tolerances of 0.1 are as usual here as 1e-5 for ODEs. If the last two drift stages
    share their time, stiffness = rms(k_4 - k_3)/rms(H_4 - H_3) with their states H, 0 where these coincide.

    Source: Rössler 2010 (Runge-Kutta methods for the strong approximation of solutions of stochastic differential
        equations), section 6; Rackauckas & Nie 2017 (Adaptive methods for stochastic differential equations), section 2
        (error estimates).
    """

    order, calculi = 1.5, ("ito",)
    noise_types = ("additive", "diagonal")
    adaptive = True
    tableau: ClassVar[StochasticTableau]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.stages = len(cls.tableau.drift_stages)

    @property
    def error_order(self) -> float:
        return 1.0

    def step(self, field: SDE, t: Tensor, s: Tensor, x: Tensor, state: State, noise: Brownian) -> Step:
        tableau = self.tableau
        wide = expand_like(s - t, x).to(x.dtype)
        integrals = Iterated.of(_increment(noise, t, s, x), wide.abs())
        root = wide.abs().sqrt()
        drifts: list[Tensor] = []
        diffusions: list[Tensor] = []
        for i in range(len(tableau.alpha)):
            if i in tableau.drift_stages:
                y = self._moved(x, wide, tableau.a0[i], drifts, integrals.area, tableau.b0[i], diffusions)
                drifts.append(drift(field, _between(t, s, tableau.c0[i]), y))
            else:
                drifts.append(torch.zeros_like(x))
            y = self._moved(x, wide, tableau.a1[i], drifts, root, tableau.b1[i], diffusions)
            diffusions.append(diffusion(field, _between(t, s, tableau.c1[i]), y))
            times_noise(field, diffusions[-1], integrals.w, x)
        parts = [part * combination(row, diffusions) for part, row in zip(integrals, tableau.beta, strict=True)]
        advance = wide * combination(tableau.alpha, drifts)
        estimate = parts[2] + parts[3]
        every = combination(tuple(float(i in tableau.drift_stages) for i in range(len(drifts))), drifts)
        new = x + advance + estimate + parts[0] + parts[1]
        slopes = (*drifts, *diffusions, integrals.area)
        return Step(new, tableau.error * wide * every + estimate, (), slopes)

    @staticmethod
    def _moved(
        x: Tensor,
        h: Tensor,
        a: tuple[float, ...],
        drifts: list[Tensor],
        scale: Tensor,
        b: tuple[float, ...],
        diffusions: list[Tensor],
    ) -> Tensor:
        """x + h Σ a_j k_j + scale Σ b_j g_j."""
        for factor, row, values in ((h, a, drifts), (scale, b, diffusions)):
            total = combination(row, values)
            x = x if total is None else torch.addcmul(x, factor.expand_as(x), total)
        return x

    def stiffness(self, t: Tensor, s: Tensor, x: Tensor, step: Step) -> Tensor | None:
        tableau, count = self.tableau, len(self.tableau.alpha)
        if not tableau.paired:
            return None
        drifts, diffusions, area = step.slopes[:count], step.slopes[count:-1], step.slopes[-1]
        h = expand_like(s - t, x).to(x.dtype)
        a, b = (
            tuple(p - q for p, q in zip(rows[-1], (*rows[-2], 0.0), strict=True)) for rows in (tableau.a0, tableau.b0)
        )
        # the states' own difference would cancel: it is taken from the slopes
        apart = rms(h * combination(a, list(drifts)) + area * combination(b, list(diffusions)))
        return torch.where(apart > 0, rms(drifts[-1] - drifts[-2]) / torch.where(apart > 0, apart, 1.0), 0.0)


def _between(t: Tensor, s: Tensor, c: float) -> Tensor:
    """t + c (s - t), and s itself for c = 1; some methods look beyond the step."""
    return s if c == 1 else torch.add(t, s - t, alpha=c)


@register(Solver, "sriw1")
class SRIW1(StochasticRungeKutta):
    """Rössler's SRIW1: strong order 1.5 for diagonal Itô noise; two drifts and four diffusions per step.

    Source: Rössler 2010 (Runge-Kutta methods for the strong approximation of solutions of stochastic differential
        equations), table 6.1.
    """

    tableau = tableaux.SRIW1


@register(Solver, "sosri")
class SOSRI(StochasticRungeKutta):
    """SOSRI: strong order 1.5 for diagonal Itô noise, stable for large drift and noise; four of each per step.

    It looks beyond the step, up to 3.75 of its length, so the equation must be defined there.

    Source: Rackauckas & Nie 2020 (Stability-optimized high order methods and stiffness detection for pathwise stiff
        stochastic differential equations), section IV.
    """

    tableau = tableaux.SOSRI


@register(Solver, "sosri2")
class SOSRI2(StochasticRungeKutta):
    """SOSRI2: as SOSRI, with stages within the step and a stiffness estimate; four drifts and diffusions per step.

    Source: Rackauckas & Nie 2020 (Stability-optimized high order methods and stiffness detection for pathwise stiff
        stochastic differential equations), sections IV and V.
    """

    tableau, stability = tableaux.SOSRI2, 10.6
