"""What a network predicts, and one formula that turns any prediction into any other.

A prediction is p = a x + b ε with coefficients that depend on time. Together with x_t = α x + σ ε and Δ = α b - σ a:

    x̂ = (b x_t - σ p)/Δ,    ε̂ = (α p - a x_t)/Δ

Every prediction is an affine function of every other one at fixed x_t, so all describe the same denoiser.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..types import expand_like
from .schedules import Scales, Schedule

Target = Literal["x", "eps", "velocity", "v", "score", "edm"]
Pair = tuple[Tensor, Tensor]
# x says nothing about ε where σ = 0, and ε nothing about x where α = 0. Where one scale is this small beside the other,
# dividing by it costs float32 three digits, and what is cut off has 1e-6 of the variance.
SMALLEST_RATIO = 1e-3


class Prediction(NamedTuple):
    """A denoiser's estimates of the clean item E[x | x_t] and the noise E[ε | x_t], [B, *shape] each."""

    x: Tensor
    eps: Tensor


def _edm(s: Scales, sigma_data: float | Tensor) -> Pair:
    # c_skip and c_out inserted and cancelled by hand: the definition is 0/0 at both ends
    total = (s.sigma**2 + s.alpha**2 * sigma_data**2).sqrt()
    return s.sigma / (sigma_data * total), -s.alpha * sigma_data / total


_ROWS: dict[str, Callable[[Scales, float | Tensor], Pair]] = {
    "x": lambda s, _: (torch.ones_like(s.alpha), torch.zeros_like(s.alpha)),
    "eps": lambda s, _: (torch.zeros_like(s.alpha), torch.ones_like(s.alpha)),
    "velocity": lambda s, _: (s.dalpha, s.dsigma),
    "v": lambda s, _: (-s.sigma, s.alpha),
    "score": lambda s, _: (torch.zeros_like(s.alpha), -1 / s.sigma),
    "edm": _edm,
}
_SINGULAR = {"x": "σ = 0", "eps": "α = 0", "score": "α = 0 or σ = 0"}  # where Δ is 0, or a target infinite


def coefficients(prediction: Target, scales: Scales, sigma_data: float | Tensor = 1.0) -> Pair:
    """(a, b) float64 of p = a x + b ε, in the shape of t.

    x (1, 0); eps (0, 1); velocity dx_t/dt (α', σ'); v (-σ, α); score (0, -1/σ); and the output of EDM's network,
    edm (σ/(s N), -α s/N) with N² = σ² + α² s² and s the root mean square of the data: x̂ = c_skip x_t/α + c_out p. For
    s = 1 on a variance-preserving path it is -v.

    Raises:
        ValueError: if there is no prediction of that name.
    Source: Salimans & Ho 2022 (Progressive distillation), appendix D (v); Karras et al. 2022 (EDM), equation 7 and
        table 1, for x_t/α in place of their x.
    """
    if prediction not in _ROWS:
        raise ValueError(f"there is no prediction '{prediction}'. Use one of: {', '.join(_ROWS)}.")
    return _ROWS[prediction](scales, sigma_data)


def determinant(prediction: Target, scales: Scales, sigma_data: float | Tensor = 1.0) -> Tensor:
    """Δ = α b - σ a float64, in the shape of t: an error of p is -Δ/σ times the error of x̂, and Δ/α times that of ε̂.

    x -σ; eps α; velocity α σ' - σ α'; v α² + σ²; score -α/σ; edm -N/s.
    """
    a, b = coefficients(prediction, scales, sigma_data)
    return scales.alpha * b - scales.sigma * a


def target(prediction: Target, x: Tensor, eps: Tensor, scales: Scales, sigma_data: float | Tensor = 1.0) -> Tensor:
    """[B, *shape] a x + b ε: what the network should answer."""
    a, b = (expand_like(c, x).to(x.dtype) for c in coefficients(prediction, scales, sigma_data))
    return a * x + b * eps


def to_clean_and_noise(
    prediction: Target, p: Tensor, x_t: Tensor, scales: Scales, sigma_data: float | Tensor = 1.0
) -> Prediction:
    """x̂ and ε̂ from a prediction p [B, *shape] at x_t [B, *shape]; an x or ε that was predicted comes back as it is.

    Raises:
        ValueError: where the prediction does not determine both: x at σ = 0, eps at α = 0, score at either.
    """
    factors = conversion(prediction, scales, sigma_data)
    # Δ = 0 or infinite shows in one of the shares of x̂
    if prediction in _SINGULAR and not (factors[0] - factors[1]).isfinite().all():
        raise ValueError(
            f"a prediction of '{prediction}' does not determine x and ε where {_SINGULAR[prediction]}. Stay between "
            "the times t_min and t_max of the denoiser, or predict velocity or v."
        )
    xx, xp, ex, ep = (expand_like(c, x_t).to(x_t.dtype) for c in factors)
    return Prediction(xx * x_t + xp * p, ex * x_t + ep * p)


def conversion(
    prediction: Target, scales: Scales, sigma_data: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c of x̂ = c₀ x_t + c₁ p and ε̂ = c₂ x_t + c₃ p, float64 in the shape of t; not finite where p does not tell.

    The quotients are formed in float64: c = (0, 1) for an x̂ or ε̂ that was predicted is then exact.
    """
    a, b = coefficients(prediction, scales, sigma_data)
    delta = scales.alpha * b - scales.sigma * a
    return b / delta, -scales.sigma / delta, -a / delta, scales.alpha / delta


def domain(prediction: Target, schedule: Schedule) -> tuple[float, float]:
    """First and last time at which a denoiser with this prediction can be asked for x̂ and ε̂.

    Those of the schedule, but σ/α >= 1e-3 for x, score and edm, and α/σ >= 1e-3 for eps, score and edm (the network of
    edm is told log σ/α, which is infinite where one of them is 0).
    """
    limit = -2 * torch.tensor(SMALLEST_RATIO, dtype=torch.float64).log()
    low, high = schedule.t_min, schedule.t_max
    if prediction in ("x", "score", "edm"):
        low = max(low, float(schedule.time(limit)))
    if prediction in ("eps", "score", "edm"):
        high = min(high, float(schedule.time(-limit)))
    return low, high
