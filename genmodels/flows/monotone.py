"""Strictly increasing maps of one number, steered by raw parameters: what couplings and autoregressive layers apply.

Parameters lie on axis 0 and everything else follows ([P, …, N] beside inputs [..., N], see `splines`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..registry import kind, register
from .knots import Form, check_spline
from .splines import rational_quadratic

FLOOR = 1e-3  # least scale of the published affine map


@kind
class Monotone(ABC):
    """A strictly increasing map of one number, with parameters given at every call.

    Attributes:
        parameters: P, how many raw (unconstrained) parameters a number has.
        identity: whether zero raw parameters give the identity, or what is nearest to it; layers then start there.
    """

    parameters: int
    identity: bool

    @abstractmethod
    def __call__(self, x: Tensor, raw: Tensor, *, inverse: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """The mapped numbers in the dtype of x, and log|dy/dx| (log|dx/dy| if inverse) in at least float32, both [...].

        Args:
            x: [...] inputs (outputs y if inverse).
            raw: [P, ...] what broadcasts against x after axis 0.
            scale: factor on raw parameters that are logits of shares (widths and heights of bins).
        """


def aligned(x: Tensor, raw: Tensor, parameters: int) -> tuple[Tensor, Tensor]:
    """x [...] and raw [P, ...] in a common type of at least float32, x of the shape of both, raw with as many axes.

    Raises:
        ValueError: if raw does not hold P parameters.
    """
    if len(raw) != parameters:
        raise ValueError(f"this map takes {parameters} raw parameters on axis 0, found {len(raw)}.")
    dtype = torch.promote_types(torch.promote_types(x.dtype, raw.dtype), torch.float32)
    shape = torch.broadcast_shapes(x.shape, raw.shape[1:])
    raw = raw.to(dtype).reshape(len(raw), *(1,) * (len(shape) + 1 - raw.ndim), *raw.shape[1:])
    return x.to(dtype).expand(shape), raw


def follow(root: Tensor, residual: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Tensor:
    """A root of residual(·) found without a graph, given the derivatives of the implicit function.

    Newton steps of which only the derivatives are kept: one makes those of the first order right, two also those of the
    second and third.

    Args:
        root: [...] where the residual vanishes.
        residual, slope: elementwise; the slope is the derivative of the residual, and is not zero.
    """
    if torch.is_grad_enabled():
        for _ in range(2):
            step = residual(root) / slope(root)
            root = root - (step - step.detach())
    return root


@register(Monotone, "rational_quadratic")
class RationalQuadratic(Monotone):
    """Rational-quadratic spline of K bins on [-B, B]: P = 3K - 1 (linear tails), 3K + 1 (bounded) or 3K (circular).

    Args:
        bins: K.
        bound: B, half the width of the interval, in model units.
        tails: "linear" is the identity outside; "bounded" refuses what lies outside, and its slopes at the ends are
            free; "circular" is a map of the circle [-B, B) with period 2B, of which -B is a fixed point.
        parametrization: how parameters become knots, see `knots.Form`.
        identity: shift the raw derivatives (durkan) so that zero parameters give the identity; False is the paper's.
    Raises:
        ValueError: if there is no bin, or more than the floors leave room for; if the bound is not positive.
    Source: Durkan et al. 2019 (Neural Spline Flows), section 3.1; circular: Rezende et al. 2020 (Normalizing Flows on
        Tori and Spheres), section 2.1.
    """

    def __init__(
        self,
        bins: int = 8,
        bound: float = 3.0,
        tails: Literal["linear", "bounded", "circular"] = "linear",
        parametrization: Literal["durkan", "bounded"] = "durkan",
        identity: bool = True,
    ) -> None:
        check_spline("rational_quadratic", bins, bound)
        self.identity, self.form = identity, Form(bound, tails, parametrization, identity)
        self.parameters = self.form.parameters(bins)

    def __call__(self, x: Tensor, raw: Tensor, *, inverse: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return rational_quadratic(x, raw, replace(self.form, scale=scale), inverse=inverse)


@register(Monotone, "affine")
class Affine(Monotone):
    """y = s x + t with raw parameters t | a: P = 2.

    Args:
        form: how a gives s. "sigmoid": s = sigmoid(a + 2) + 1e-3, which can only shrink (Neural Spline Flows);
            "exp": s = exp(a) (Masked Autoregressive Flow, WaveFlow); "softplus": s = softplus(a + log(e - 1)) + 1e-3,
            which grows no faster than a; "glow": y = s (x + t) with s = sigmoid(a + 2).
        identity: start layers at zero raw parameters (of "sigmoid" and "glow" that is y = 0.88 x).
    Source: Dinh et al. 2017 (Real NVP), section 3.2; Durkan et al. 2019 (Neural Spline Flows), appendix B.
    """

    def __init__(self, form: Literal["sigmoid", "exp", "softplus", "glow"] = "sigmoid", identity: bool = True) -> None:
        self.form, self.identity, self.parameters = form, identity, 2

    def __call__(self, x: Tensor, raw: Tensor, *, inverse: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        v, (shift, a) = aligned(x, raw, self.parameters)
        log_scale = self._log_scale(a)
        factor = log_scale.exp()
        if self.form == "glow":
            shift = shift * factor
        y = (v - shift) / factor if inverse else v * factor + shift
        return y.to(x.dtype), (-log_scale if inverse else log_scale).expand(v.shape)

    def _log_scale(self, a: Tensor) -> Tensor:
        if self.form == "exp":
            return a
        if self.form == "glow":
            return torch.nn.functional.logsigmoid(a + 2)
        if self.form == "softplus":
            shift = math.log(math.expm1(1 - FLOOR))
            return (torch.nn.functional.softplus(a + shift) + FLOOR).log()
        return (torch.sigmoid(a + 2) + FLOOR).log()
