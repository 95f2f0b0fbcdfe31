"""Maps between data space (a data set's own units) and model space, with their log-determinants.

log p_data(x) = log p_model(T(x)) + log|det ∂T/∂x|. A transform holds buffers only; a fitted mean is state of the model
that owns it. `Dequantize` is random and `forward` therefore takes a source of noise.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from .registry import Builder, kind, register
from .rng import Noise
from .types import Batch, Shape, sum_items


@kind
class Transform(nn.Module, ABC):
    """Data x -> model space y.

    Attributes:
        volume: False if no log-determinant exists (a learned latent space); likelihoods are then not applicable.
    """

    volume: bool = True

    @abstractmethod
    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        """y [B, *out_shape(shape)] and log|det ∂y/∂x| [B] float64; without noise, random parts take their mean."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """x [B, *shape] in data units; clamps to the range of the data where there is one."""

    def continuous(self, y: Tensor) -> Tensor:
        """x [B, *shape] as `inverse`, but of discrete data between levels and beyond them: `forward` takes it to y."""
        return self.inverse(y)

    def out_shape(self, shape: Shape) -> Shape:
        """The shape of y for items x of a shape; another only where there is no volume."""
        return tuple(shape)

    def fit(self, batches: Iterable[Batch]) -> None:
        """Set buffers from one pass over the training data."""


@register(Transform, "identity")
class Identity(Transform):
    """y = x."""

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x), dtype=torch.float64)

    def inverse(self, y: Tensor) -> Tensor:
        return y


@register(Transform, "affine")
class Affine(Transform):
    """y = (x - loc)/scale; log|det ∂y/∂x| = -D log scale.

    Args:
        loc: data value that becomes 0.
        scale: data units per model unit, > 0.
    """

    def __init__(self, loc: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"affine: scale must be > 0, found {scale}.")
        self.loc, self.scale = loc, scale

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        log_det = x.new_full((len(x),), -x[0].numel() * math.log(self.scale) if len(x) else 0.0, dtype=torch.float64)
        return (x - self.loc) / self.scale, log_det

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.scale + self.loc


@register(Transform, "standardize")
class Standardize(Transform):
    """y = (x - mean)/std with one mean and standard deviation per component, fitted to the training data.

    Components that never vary keep std = 1.
    """

    def __init__(self, *, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("std", torch.ones(shape, dtype=torch.float64))

    def fit(self, batches: Iterable[Batch]) -> None:
        n, total, square, shift = 0, 0.0, 0.0, None
        for batch in batches:
            x = batch.x.double()
            shift = x.mean(0) if shift is None else shift
            n, total, square = n + len(x), total + (x - shift).sum(0), square + ((x - shift) ** 2).sum(0)
        if shift is None:
            raise ValueError("standardize: there are no training items to fit to.")
        std = (square / n - (total / n) ** 2).clamp(min=0).sqrt()
        self.mean.copy_(shift + total / n)
        self.std.copy_(torch.where(std > 1e-8 * (1 + self.mean.abs()), std, torch.ones_like(std)))

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        y = (x - self.mean.to(x.dtype)) / self.std.to(x.dtype)
        return y, (-self.std.log().sum()).expand(len(x))

    def inverse(self, y: Tensor) -> Tensor:
        return y * self.std.to(y.dtype) + self.mean.to(y.dtype)


@register(Transform, "standardize_channels")
class StandardizeChannels(Standardize):
    """y = (x - mean)/std with one mean and standard deviation per channel of items [C, *], fitted to the training data.

    What is stationary stays so: fields have one law at all sites, and each site's own estimates would differ.
    """

    def __init__(self, *, shape: tuple[int, ...]) -> None:
        super().__init__(shape=(shape[0], *(1 for _ in shape[1:])))
        self.sites = math.prod(shape[1:])

    def fit(self, batches: Iterable[Batch]) -> None:
        super().fit(batch.replace(x=self._sites(batch.x)) for batch in batches)

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward(x, noise)
        return y, log_det * self.sites

    def _sites(self, x: Tensor) -> Tensor:
        """[B · sites, C, 1, …]: every site as an item."""
        return x.movedim(1, -1).reshape(-1, *self.mean.shape)


@register(Transform, "dequantize")
class Dequantize(Transform):
    """y = x + bin_width·u, u ~ U[0, 1), for data on the levels 0, bin_width, 2 bin_width, …

    Then -log P(x) <= E_u[-log p(y)] - D log(bin_width) (Jensen): a bound on the discrete code length.

    Args:
        levels: number of levels; `inverse` rounds down to the nearest one.
        bin_width: spacing of the levels.
    Source: Theis et al. 2016 (A note on the evaluation of generative models), section 3.1.
    """

    def __init__(self, levels: int, bin_width: float = 1.0) -> None:
        super().__init__()
        if levels < 2 or bin_width <= 0:
            raise ValueError(
                f"dequantize: at least 2 levels and a bin width > 0 are needed, found {levels} and {bin_width}."
            )
        self.levels, self.bin_width = levels, bin_width

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        u = 0.5 if noise is None else noise.uniform(*x.shape[1:], dtype=x.dtype).to(x.device)
        # the sum may round up to the next level, where `inverse` would not find x again
        end = x.detach() + self.bin_width
        y = torch.minimum(x + self.bin_width * u, torch.nextafter(end, x.detach()))
        return y, x.new_zeros(len(x), dtype=torch.float64)

    def inverse(self, y: Tensor) -> Tensor:
        return (y / self.bin_width).floor().clamp(0, self.levels - 1) * self.bin_width

    def continuous(self, y: Tensor) -> Tensor:
        return y - self.bin_width / 2


@register(Transform, "logit")
class Logit(Transform):
    """y = logit(s) with s = a + (1 - 2a)(x - low)/(high - low).

    log|dy/dx| = log(1 - 2a) - log(high - low) - log s - log(1 - s) per component; x is clamped to [low, high] first.

    Args:
        low, high: range of the data, in its units.
        alpha: a, the distance kept from the ends of the unit interval.
    Source: Dinh et al. 2017 (Real NVP), section 4.1.
    """

    def __init__(self, low: float, high: float, alpha: float = 0.05) -> None:
        super().__init__()
        if not (high > low and 0 < alpha < 0.5):
            raise ValueError(f"logit: low < high and 0 < alpha < 0.5 are needed, found {low}, {high} and {alpha}.")
        self.low, self.high, self.alpha = low, high, alpha

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        width = self.high - self.low
        # 1 - s is formed from high - x: as a difference of rounded numbers it would lose its digits near the upper end
        log_s = (self.alpha + (1 - 2 * self.alpha) * ((x - self.low) / width).clamp(0, 1)).log()
        log_rest = (self.alpha + (1 - 2 * self.alpha) * ((self.high - x) / width).clamp(0, 1)).log()
        slope = math.log(1 - 2 * self.alpha) - math.log(width)
        return log_s - log_rest, sum_items(slope - log_s - log_rest)

    def inverse(self, y: Tensor) -> Tensor:
        unit = (torch.sigmoid(y) - self.alpha) / (1 - 2 * self.alpha)
        return unit.clamp(0, 1) * (self.high - self.low) + self.low


@register(Transform, "log_shift")
class LogShift(Transform):
    """y = log(1 + x/shift), for data above -shift with a heavy upper tail (densities, convergence maps).

    log|dy/dx| = -log(shift + x) per component.

    Args:
        shift: > 0, in units of the data.
    Raises:
        ValueError: unless shift > 0; of data, if any is at or below -shift.
    Source: Hilbert et al. 2011 (Cosmic shear covariance: the log-normal approximation).
    """

    def __init__(self, shift: float) -> None:
        super().__init__()
        if not 0 < shift < math.inf:
            raise ValueError(f"log_shift: shift > 0 is needed, found {shift}.")
        self.shift = shift

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        if (x <= -self.shift).any():
            raise ValueError(
                f"log_shift: the data go down to {float(x.min()):.4g}, but only those above -{self.shift:g} have a "
                "logarithm. Take a larger shift."
            )
        return torch.log1p(x / self.shift), sum_items(-(x + self.shift).log())

    def inverse(self, y: Tensor) -> Tensor:
        return self.shift * torch.expm1(y.clamp(max=80.0))  # float32 ends at e^88.7


@register(Transform, "compose")
class Compose(Transform):
    """Transforms applied one after another, each built for the shape that the one before it leaves.

    Log-determinants add.
    """

    def __init__(self, parts: tuple[Callable[..., Transform], ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_built(parts))
        self.volume = all(part.volume for part in self.parts)

    def out_shape(self, shape: Shape) -> Shape:
        for part in self.parts:
            shape = part.out_shape(shape)
        return tuple(shape)

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x), dtype=torch.float64)
        for part in self.parts:
            x, log_det = part(x, noise)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.inverse(y)
        return y

    def continuous(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part.continuous(y)
        return y

    def fit(self, batches: Iterable[Batch]) -> None:
        for k, part in enumerate(self.parts):
            part.fit(batch.replace(x=self._through(k, batch.x)) for batch in batches)

    def _through(self, k: int, x: Tensor) -> Tensor:
        for part in self.parts[:k]:
            x, _ = part(x)
        return x


def _built(parts: Iterable[Callable[..., Transform] | Transform]) -> Iterator[Transform]:
    """The transforms of some builders, whose context holds the shape of the data; finished ones stay as they are."""
    shape: Shape | None = None
    for part in parts:
        if isinstance(part, Builder):
            shape = part.context.get("shape") if shape is None else shape
            part = part() if shape is None else part(shape=shape)
        shape = None if shape is None else part.out_shape(shape)
        yield part
