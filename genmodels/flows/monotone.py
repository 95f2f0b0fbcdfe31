"""Strictly increasing maps of one number, steered by raw parameters: what couplings and autoregressive layers apply.

Parameters lie on axis 0 and everything else follows ([P, …, N] beside inputs [..., N], see `splines`).
"""

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from ..registry import kind, register
from .splines import bounded, durkan, rational_quadratic

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


@register(Monotone, "rational_quadratic")
class RationalQuadratic(Monotone):
    """Rational-quadratic spline of K bins on [-bound, bound], the identity outside: P = 3K - 1.

    Args:
        bins: K.
        bound: half the width of the interval, in model units.
        parametrization: how parameters become knots, see `splines.durkan` and `splines.bounded`.
        identity: shift the raw derivatives (durkan) so that zero parameters give the identity; False is the paper's.
    Raises:
        ValueError: if there is no bin, or more than the floors leave room for; if the bound is not positive.
    Source: Durkan et al. 2019 (Neural Spline Flows), section 3.1.
    """

    def __init__(
        self,
        bins: int = 8,
        bound: float = 3.0,
        parametrization: Literal["durkan", "bounded"] = "durkan",
        identity: bool = True,
    ) -> None:
        if bins < 1 or not 0 < bound < math.inf:
            raise ValueError(
                f"rational_quadratic: at least one bin and a bound > 0 are needed, found bins={bins} and bound={bound}."
            )
        self.parameters, self.identity = 3 * bins - 1, identity
        self.bound, self.parametrization = bound, parametrization
        self(torch.zeros(1), torch.zeros(self.parameters, 1))  # refuses more bins than there is room for

    def __call__(self, x: Tensor, raw: Tensor, *, inverse: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        if self.parametrization == "bounded":
            knots = bounded(raw, self.bound, scale=scale)
        else:
            knots = durkan(raw, self.bound, identity=self.identity, scale=scale)
        return rational_quadratic(x, knots, self.bound, inverse=inverse)


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
        shift, a = raw.to(torch.promote_types(raw.dtype, torch.float32))
        log_scale = self._log_scale(a)
        factor = log_scale.exp()
        if self.form == "glow":
            shift = shift * factor
        y = (x - shift) / factor if inverse else x * factor + shift
        shape = torch.broadcast_shapes(x.shape, log_scale.shape)
        return y.to(x.dtype), (-log_scale if inverse else log_scale).expand(shape)

    def _log_scale(self, a: Tensor) -> Tensor:
        if self.form == "exp":
            return a
        if self.form == "glow":
            return torch.nn.functional.logsigmoid(a + 2)
        if self.form == "softplus":
            shift = math.log(math.expm1(1 - FLOOR))
            return (torch.nn.functional.softplus(a + shift) + FLOOR).log()
        return (torch.sigmoid(a + 2) + FLOOR).log()
