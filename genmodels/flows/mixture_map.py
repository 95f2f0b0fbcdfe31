"""A smooth monotone map built of the distribution function of a mixture of logistic laws."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register
from .monotone import Monotone, aligned, follow

FLOOR = 1e-3  # least slope
LIMIT = math.log(1e3)  # of |log s|
STEPS = {torch.float32: 40, torch.float64: 80}  # of the search for the inverse


@register(Monotone, "logistic_mixture")
class LogisticMixture(Monotone):
    """y = ε x + (1 - ε) logit Σ_k π_k σ((x - μ_k)/s_k) with K components and ε = 1e-3: P = 3K.

    Raw parameters are logits of π | μ | log s, the last softly limited, log s = v/(1 + |v|/ℓ) with ℓ = log 1e3. The
    slope is at least ε everywhere, also between components far apart, and all is computed from logarithms: values and
    slopes are finite for |x| up to 1e6 in float32.

    The inverse takes a fixed number of steps (40 in float32, 80 in float64; bisection and Newton's method by turns, in
    a bracket that holds the root). Its gradient is that of the implicit function.

    Args:
        components: K.
        identity: zero parameters are the identity in any case. True has layers start there, and multiplies the raw
            μ_k and log s_k by (2k + 1)/K, k = 0 … K-1, without which equal components would stay equal for ever.
    Raises:
        ValueError: if there is no component.
    Source: Ho et al. 2019 (Flow++), section 3.2; ε and the limit of log s are ours.
    """

    def __init__(self, components: int = 8, identity: bool = True) -> None:
        if components < 1:
            raise ValueError(f"logistic_mixture: at least one component is needed, found components={components}.")
        self.components, self.identity, self.parameters = components, identity, 3 * components

    def __call__(self, x: Tensor, raw: Tensor, *, inverse: bool = False, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        v, raw = aligned(x, raw, self.parameters)
        law = self._law(raw)
        if not inverse:
            y, log_slope = _map(v, *law)
            return y.to(x.dtype), log_slope
        with torch.no_grad():
            root = _search(v, *law)
        root = follow(root, lambda at: _map(at, *law)[0] - v, lambda at: _map(at, *law)[1].exp())
        return root.to(x.dtype), -_map(root, *law)[1]

    def _law(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π, μ and log s, each [K, ...]."""
        logits, centre, log_s = raw.reshape(3, self.components, *raw.shape[1:])
        if self.identity:
            gain = (2 * torch.arange(self.components, device=raw.device, dtype=raw.dtype) + 1) / self.components
            gain = gain.reshape(-1, *(1,) * (raw.ndim - 1))
            centre, log_s = gain * centre, gain * log_s
        return logits.log_softmax(0), centre, log_s / (1 + log_s.abs() / LIMIT)


def _map(x: Tensor, log_pi: Tensor, centre: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    """y and log dy/dx, with d/dx logit F = f/(F (1 - F)) and f = Σ π σ'(z)/s."""
    z = (x - centre) * (-log_s).exp()
    low, high = F.logsigmoid(z), F.logsigmoid(-z)
    below, above = (log_pi + low).logsumexp(0), (log_pi + high).logsumexp(0)
    log_density = (log_pi + low + high - log_s).logsumexp(0)
    log_slope = torch.logaddexp(log_density - below - above + math.log1p(-FLOOR), x.new_full((), math.log(FLOOR)))
    return FLOOR * x + (1 - FLOOR) * (below - above), log_slope


def _search(y: Tensor, log_pi: Tensor, centre: Tensor, log_s: Tensor) -> Tensor:
    """x with _map(x) = y.

    logit F lies between the least and the greatest of z_k = (x - μ_k)/s_k, so the root lies between those of
    ε x + (1 - ε) z_k = y.
    """
    law, rate = (log_pi, centre, log_s), (1 - FLOOR) * (-log_s).exp()
    ends = (y + rate * centre) / (FLOOR + rate)
    low, high = ends.amin(0), ends.amax(0)
    x = (low + high) / 2
    for step in range(STEPS[y.dtype]):
        value, log_slope = _map(x, *law)
        above = value > y
        low, high = torch.where(above, low, x), torch.where(above, x, high)
        newton = x - (value - y) * (-log_slope).exp()
        middle = low + (high - low) / 2
        # Newton's method may crawl where the slope jumps, so every third step halves the bracket
        x = middle if step % 3 == 2 else torch.where((newton >= low) & (newton <= high), newton, middle)
    return x
