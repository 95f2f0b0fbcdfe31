"""Base laws that belong to a kind of flow."""

import math

import torch
from torch import Tensor

from ..distributions import Distribution
from ..networks.glow import ZeroConv
from ..registry import ConfigError, register
from ..rng import Noise
from ..types import Shape, sum_items


@register(Distribution, "glow_prior")
class GlowPrior(Distribution):
    """N(m, diag(exp(s)²)) of the last level, one m and s per channel, and N(0, I) of all that was done before it.

    m | s = exp(3 logs) ⊙ (W * 0 + b): the published prior is a 3x3 convolution from 2C to 2C channels that is given
    zeros, so its (2C)²·9 weights never matter and get gradients of zero; they are kept for the published number of
    parameters, 83,136 for C = 48. `act_norm` at the end of the last level is the same law with 2C parameters.

    Args:
        top: shape [C, H, W] of the last level, whose numbers are the last ones of an item; the whole item if not given.
    Raises:
        ConfigError: if the last level is no image, or larger than the item.
    Source: Kingma & Dhariwal 2018 (Glow), section 3.3.
    """

    def __init__(self, top: tuple[int, int, int] | None = None, *, shape: Shape) -> None:
        super().__init__()
        top = tuple(shape) if top is None else top
        self.shape, self.before = tuple(shape), math.prod(shape) - math.prod(top)
        if len(top) != 3 or min(top) < 1 or self.before < 0:
            raise ConfigError(
                f"glow_prior: the last level must be an image [C, H, W] with no more numbers than an item, found "
                f"top={list(top)} for items of shape {list(shape)}. Set top to what the last level of `multiscale` "
                "leaves."
            )
        self.top = top
        self.head = ZeroConv(2 * top[0], 2 * top[0], 3)

    def _mean_and_log_std(self) -> tuple[Tensor, Tensor]:
        """m and s of every number of an item, [*shape] each, in at least float32."""
        weight = self.head.weight
        out = self.head(weight.new_zeros(1, weight.shape[1], 1, 1))[0]
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        mean, log_std = (part.expand(self.top).reshape(-1) for part in out.chunk(2))
        zeros = mean.new_zeros(self.before)
        return torch.cat((zeros, mean)).reshape(self.shape), torch.cat((zeros, log_std)).reshape(self.shape)

    def sample(self, noise: Noise, *, dtype: torch.dtype = torch.float32) -> Tensor:
        mean, log_std = self._mean_and_log_std()
        return mean.to(dtype) + log_std.to(dtype).exp() * noise.normal(*self.shape, dtype=dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        self.check_items(x)
        mean, log_std = self._mean_and_log_std()
        standard = (x - mean.to(x.dtype)) * (-log_std.to(x.dtype)).exp()
        normalizer = log_std.sum(dtype=torch.float64) + 0.5 * math.prod(self.shape) * math.log(2 * math.pi)
        return -0.5 * sum_items(standard**2) - normalizer
