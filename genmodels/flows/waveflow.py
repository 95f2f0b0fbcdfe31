"""Waveforms as images whose rows are transformed one after another: many short sequential steps become a few."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..networks.network import Network, zero_head
from ..networks.wavenet2d import WaveNet2D
from ..registry import ConfigError, register
from ..types import Condition, Shape, sum_items
from .bijection import Bijection
from .linear import Unconditional
from .monotone import Affine, Monotone


@register(Bijection, "fold")
class Fold(Unconditional):
    """A signal as an image, column by column: z[0, i, j] = x[height·j + i]; log_det = 0.

    Neighbours in time lie in one column, so that row by row from the top every row refines the signal between the
    samples of the rows above it.

    Args:
        height: rows of the image.
    Raises:
        ConfigError: unless items are signals [T] with T a multiple of the height.
    Source: Ping et al. 2020 (WaveFlow), section 3.
    """

    def __init__(
        self, height: int = 16, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None
    ) -> None:
        super().__init__(shape, num_classes, condition_shape)
        if height < 1 or len(self.shape) != 1 or self.shape[0] % height:
            raise ConfigError(
                f"fold: signals [T] with T a multiple of height={height} are needed, found items of shape "
                f"{list(self.shape)}. Choose another height, or another length in the data set."
            )
        self.height = height

    @property
    def out_shape(self) -> Shape:
        return (1, self.height, self.shape[0] // self.height)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return fold(x[:, None], self.height), self.no_change(x)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return rearrange(z, "b 1 h w -> b (w h)"), self.no_change(z)


def fold(x: Tensor, height: int) -> Tensor:
    """[B, C, height, T/height] from [B, C, T]: sample t lies in row t mod height, column ⌊t/height⌋."""
    return rearrange(x, "b c (w h) -> b c h w", h=height)


@register(Bijection, "row_autoregressive")
class RowAutoregressive(Bijection):
    """z_i = g(x_i; θ_i(x_0, …, x_{i-1}, c)) for the rows i of an image, with an increasing map g of each number.

    The network maps x shifted down by one row (zeros on top) [B, C, H, W] to [B, P·C, H, W], P parameters for each
    number, parameter-major, and its row i may depend on the rows 0 … i of its input alone: density takes one call, and
    the inverse one row of it at a time. log_det = Σ log|dz/dx|.

    A condition [L, H·W], one vector per sample of a signal, is folded as `fold` folds the signal; others reach the
    network as they are.

    Args:
        network: builder of the conditioner; it must offer `rows`, as `wavenet2d` does.
        map: g, exp(a) x + t if not given. The network's `head` starts at zero if the map's `identity` asks for it.
        reverse: go through the rows of x and of the condition from the last to the first. The published models turn
            all rows round in every step, which is this in every other step.
        scale_logits: divide what the map calls logits by the root of the network's `width`, where it has one.
    Raises:
        ConfigError: unless items are images [C, H, W], the network offers `rows`, and a condition [L, T] has T = H·W.
    Source: Ping et al. 2020 (WaveFlow), section 3; Lee et al. 2020 (NanoFlow), section 3.3.
    """

    hands_on = True

    def __init__(
        self,
        network: Callable[..., Network] = WaveNet2D,
        map: Monotone | None = None,
        reverse: bool = False,
        scale_logits: bool = True,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        map = Affine(form="exp") if map is None else map
        self.shape, self.map, self.reverse = tuple(shape), map, reverse
        if len(self.shape) != 3:
            raise ConfigError(
                f"row_autoregressive: images [C, H, W] are needed, found items of shape {list(self.shape)}. Put `fold` "
                "before it."
            )
        self.signals = condition_shape is not None and len(condition_shape) == 2
        if self.signals:
            condition_shape = self._folded_shape(condition_shape)
        self.network = network(
            in_shape=self.shape,
            out_shape=(map.parameters * self.shape[0], *self.shape[1:]),
            timed=False,
            num_classes=num_classes,
            condition_shape=condition_shape,
        )
        if not callable(getattr(self.network, "rows", None)):
            raise ConfigError(
                f"row_autoregressive: {type(self.network).__name__} cannot be evaluated row by row (it has no `rows`). "
                "Use wavenet2d, or shared of it."
            )
        if map.identity:
            zero_head(self.network)
        width = getattr(self.network, "width", None) if scale_logits else None
        self.scale = 1.0 if width is None else width**-0.5

    def _folded_shape(self, condition_shape: Shape) -> Shape:
        bands, length = condition_shape
        _, height, width = self.shape
        if length != height * width:
            raise ConfigError(
                f"row_autoregressive: a condition [L, T] needs one vector for each of the {height * width} samples, "
                f"found the shape {list(condition_shape)}. Use an encoder that brings it to their rate "
                "(encoder: mel_upsampler)."
            )
        return (bands, height, width)

    def _turned(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] with its rows in the order in which they are transformed; its own inverse."""
        return x.flip(2) if self.reverse else x

    def _condition(self, condition: Condition | None) -> Condition | None:
        if self.signals and isinstance(condition, Tensor):
            return self._turned(fold(condition, self.shape[1]))
        one_map = isinstance(condition, Tensor) and condition.shape[2:] == self.shape[1:]
        return self._turned(condition) if one_map else condition

    def _map(self, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        raw = rearrange(raw, "b (p c) h w -> p b c h w", p=self.map.parameters)
        return self.map(x, raw, inverse=inverse, scale=self.scale)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        x = self._turned(x)
        raw = self.network(None, _shifted(x), self._condition(condition))
        z, log_slope = self._map(x, raw, False)
        return self._turned(z), sum_items(log_slope)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        with self._autocast(z):
            rows = self.network.rows(self._condition(condition), z)
        row, out = torch.zeros_like(z[:, :, :1]), []
        total = z.new_zeros(len(z), dtype=torch.float64)
        for given in self._turned(z).split(1, 2):
            with self._autocast(z):
                raw = rows(row).to(z.dtype)
            row, log_slope = self._map(given, raw, True)
            out.append(row)
            total = total + sum_items(log_slope)
        self.network.passed(len(z))
        return self._turned(torch.cat(out, 2)), total

    def _autocast(self, x: Tensor) -> AbstractContextManager:
        """The arithmetic that a call of the network has inside."""
        dtype = self.network.autocast
        return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype=dtype)

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        self.network.initialize(_shifted(self._turned(x)), self._condition(condition))


def _shifted(x: Tensor) -> Tensor:
    """x [B, C, H, W] down by one row, with zeros on top."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))
