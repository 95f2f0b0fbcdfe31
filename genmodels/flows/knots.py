"""Monotonic rational-quadratic splines: how raw parameters become widths, heights and slopes, and their derivatives."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tails = Literal["linear", "bounded", "circular"]
Parametrization = Literal["durkan", "bounded"]

FLOOR = 1e-3  # least width and height (as a fraction of the interval) and least derivative of `durkan`
SLOPE = 1e-3  # limit of the derivatives of `bounded`, and of the ratio of two of its widths
LIMIT = -math.log(SLOPE)
FREE_ENDS = {"linear": -1, "circular": 0, "bounded": 1}  # derivatives with parameters of their own, less the bins


class Knots(NamedTuple):
    """A spline from (-bound, -bound) to (bound, bound).

    Args:
        widths: [K, ...] > 0, summing to 2 bound over axis 0.
        heights: [K, ...] > 0, summing to 2 bound over axis 0.
        derivatives: [K+1, ...] > 0, the slopes at all knots.
    """

    widths: Tensor
    heights: Tensor
    derivatives: Tensor


@dataclass(frozen=True)
class Form:
    """How raw parameters become knots.

    Raw parameters [P, ...] are u_w (K) | u_h (K) | u_d; with linear tails u_d has K-1 of them, and the slope at both
    ends is 1, that outside; `bounded` splines have K+1; `circular` ones K, the last knot being the first.

    `durkan`: w = 2B (ε + (1 - Kε) softmax(c u_w)), the same for heights, d = ε + softplus(u_d + b), with ε = 1e-3.
    `bounded`: w = 2B softmax(v_w), d = exp(v_d), from softly limited v = u/(1 + |u/ℓ|) for derivatives and
    u/(1 + |2u/ℓ|) for c u_w and c u_h, with ℓ = -log 1e-3: derivatives stay within (1e-3, 1e3), and two widths within
    that ratio of each other. It conditions better in float32 and allows less sharp densities.

    Args:
        bound: B, half the width of the interval, in the units of x.
        tails: what happens outside; see `rational_quadratic`.
        parametrization: "durkan" or "bounded".
        identity: b = log(exp(1 - ε) - 1), so that zero parameters give the identity; False is the paper's b = 0.
            `bounded` has the identity there in any case.
        scale: c; the paper divides by the root of the conditioner's width, so that training starts from even bins.
    Source: Durkan et al. 2019 (Neural Spline Flows), section 3.1, and constants of its published code; `bounded` is
        that of the zuko library (MonotonicRQSTransform).
    """

    bound: float = 3.0
    tails: Tails = "linear"
    parametrization: Parametrization = "durkan"
    identity: bool = True
    scale: float = 1.0

    def parameters(self, bins: int) -> int:
        """P for K bins.

        Raises:
            ValueError: if the floors leave no room for so many bins.
        """
        check_spline("spline", bins, self.bound, self.floor)
        return 3 * bins + FREE_ENDS[self.tails]

    def bins(self, parameters: int) -> int:
        """K of P raw parameters.

        Raises:
            ValueError: if no K gives P.
        """
        bins = (parameters - FREE_ENDS[self.tails]) // 3
        if bins < 1 or self.parameters(bins) != parameters:
            formula = {-1: "3K-1", 0: "3K", 1: "3K+1"}[FREE_ENDS[self.tails]]
            raise ValueError(
                f"spline: {self.tails} tails need {formula} raw parameters (K >= 1 bins) on axis 0, found {parameters}."
            )
        return bins

    @property
    def floor(self) -> float:
        return FLOOR if self.parametrization == "durkan" else 0.0

    @property
    def shift(self) -> float:
        return math.log(math.expm1(1 - FLOOR)) if self.identity else 0.0

    def shares(self, raw: Tensor, bins: int) -> Tensor:
        """[2, K, ...] what the softmaxes make of u_w and u_h."""
        u = raw[: 2 * bins].reshape(2, bins, *raw.shape[1:])
        u = u * self.scale if self.scale != 1 else u
        return (u if self.floor else u / (1 + (2 / LIMIT * u).abs())).softmax(1)

    def sizes(self, shares: Tensor, bins: int) -> Tensor:
        """Widths and heights of bins with these shares."""
        least = shares.new_full((), 2 * self.bound * self.floor)
        return torch.add(least, shares, alpha=self.stretch(bins))

    def edges(self, sums: Tensor) -> Tensor:
        """[2, K, ...] where bins end, in place of the running sums of their shares."""
        bins = sums.shape[1]
        number = torch.arange(1, bins + 1, device=sums.device, dtype=sums.dtype).reshape(bins, *(1,) * (sums.ndim - 2))
        return sums.mul_(self.stretch(bins)).add_(number, alpha=2 * self.bound * self.floor)

    def stretch(self, bins: int) -> float:
        """∂w/∂share."""
        return 2 * self.bound * (1 - bins * self.floor)

    def slopes(self, u: Tensor) -> Tensor:
        """Derivatives d of raw ones."""
        if self.parametrization == "durkan":
            return F.softplus(u + self.shift) + FLOOR
        return (u / (1 + (u / LIMIT).abs())).exp()

    def slopes_gradient(self, d: Tensor) -> Tensor:
        """∂d/∂u as a function of d: σ(u + b) = 1 - exp(ε - d), or d (1 - |log d|/ℓ)²."""
        if self.parametrization == "durkan":
            return -torch.expm1(FLOOR - d)
        return d * (1 - d.log().abs() / LIMIT) ** 2

    def ends(self, index: Tensor, bins: int) -> tuple[Tensor, Tensor]:
        """[2, ...] rows of u_d that steer both ends of each bin, and 1.0 where they do, 0.0 where the slope is 1."""
        rows = torch.cat((index, index + 1))
        if self.tails == "circular":
            return torch.where(rows == bins, 0, rows), torch.ones_like(rows, dtype=torch.float32)
        if self.tails == "bounded":
            return rows, torch.ones_like(rows, dtype=torch.float32)
        near = index.float()  # arithmetic of floats is many times faster than comparisons of integers
        return rows.sub_(1).clamp_(0, bins - 2), torch.cat((near, bins - 1 - near)).clamp_(max=1)


def check_spline(name: str, bins: int, bound: float, floor: float = 0.0, least: int = 1) -> None:
    """Raises ValueError unless there are at least so many bins, and an interval that holds them."""
    if bins < least or not 0 < bound < math.inf:
        raise ValueError(
            f"{name}: at least {least} bin{'s' if least > 1 else ''} and a bound > 0 are needed, found bins={bins} and "
            f"bound={bound}."
        )
    if not 0 <= bins * floor <= 1:
        raise ValueError(
            f"{name}: at most {int(1 / abs(floor))} bins leave room for the floor {floor}, which must be at least 0, "
            f"found {bins}."
        )


def knots(raw: Tensor, form: Form) -> Knots:
    """The knots of raw parameters [P, ...], in at least float32."""
    bins = form.bins(len(raw))
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    widths, heights = form.sizes(form.shares(raw, bins), bins)
    inner = form.slopes(raw[2 * bins :])
    if form.tails == "linear":
        edge = torch.ones_like(raw[:1])
        inner = torch.cat((edge, inner, edge))
    return Knots(widths, heights, torch.cat((inner, inner[:1])) if form.tails == "circular" else inner)
