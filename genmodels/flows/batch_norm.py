"""Batch normalisation as a bijection."""

import math

import torch
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .bijection import Bijection
from .elementwise import per_channel


@register(Bijection, "batch_norm")
class BatchNorm(Bijection):
    """z = exp(log_scale) (x - m)/√(v + eps) + shift per component, or per channel of an image.

    log_det = pixels · Σ (log_scale - log(v + eps)/2). In eval mode m and v are running averages, which makes it one
    invertible map of each item. In training they are the mean and the unbiased variance of the batch (over items and
    pixels), through which gradients flow; log_det is that of the map at fixed m and v. Running averages start at
    m = 0, v = 1; `initialize` sets them from its batch, once. Averages of weights (`train.ema`) do not fit them.

    Args:
        momentum: weight of the newest batch in the running averages.
        eps: added to variances.
    Raises:
        ConfigError: unless 0 < momentum <= 1 and eps > 0.
    Source: Dinh et al. 2017 (Real NVP), section 3.7; Papamakarios et al. 2017 (Masked Autoregressive Flow), section 3.
    """

    def __init__(
        self,
        momentum: float = 0.1,
        eps: float = 1e-5,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if not 0 < momentum <= 1 or not eps > 0:
            raise ConfigError(f"batch_norm: 0 < momentum <= 1 and eps > 0 are needed, found {momentum} and {eps}.")
        self.shape, self.momentum, self.eps = tuple(shape), momentum, eps
        sizes = per_channel(self.shape, "batch_norm")
        self.log_scale = nn.Parameter(torch.zeros(sizes))
        self.shift = nn.Parameter(torch.zeros(sizes))
        self.register_buffer("mean", torch.zeros(sizes))
        self.register_buffer("variance", torch.ones(sizes))
        self.register_buffer("initialized", torch.tensor(False))

    def _measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance per channel of x [B, *shape].

        Raises:
            ValueError: if there are fewer than two items.
        """
        if len(x) < 2:
            raise ValueError(
                f"batch_norm: at least two items are needed to measure a variance in training, found {len(x)}. Use "
                "a larger train.batch_size (per process and micro-batch), or call .eval() first."
            )
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], keepdim=True)
        return mean[0], variance[0]

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        if self.initialized:
            return
        mean, variance = self._measure(x.double())
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        self.initialized.fill_(True)

    def _log_det(self, x: Tensor, variance: Tensor) -> Tensor:
        each = self.log_scale.double() - 0.5 * (variance.double() + self.eps).log()
        return (each.sum() * math.prod(self.shape[1:])).expand(len(x))

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = self._measure(x)
            self.mean.lerp_(mean.detach().to(self.mean), self.momentum)
            self.variance.lerp_(variance.detach().to(self.variance), self.momentum)
        factor = self.log_scale.exp() * (variance + self.eps).rsqrt()
        return (x - mean) * factor + self.shift, self._log_det(x, variance)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        """x and log_det by the running averages.

        Raises:
            ValueError: in training mode, where z depends on a batch that is not known here.
        """
        if self.training:
            raise ValueError(
                "batch_norm: in training mode the map depends on its whole batch, which its output does not tell, so "
                "it cannot be inverted. Call .eval() first, or use act_norm in a flow that is trained by its inverse."
            )
        factor = (-self.log_scale).exp() * (self.variance + self.eps).sqrt()
        return (z - self.shift) * factor + self.mean, -self._log_det(z, self.variance)
