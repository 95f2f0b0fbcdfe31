"""Networks that turn a condition into what the layers of a model see, once per call."""

import math
from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import ConfigError, kind, register
from ..types import Condition, Shape
from .weight_norm import ConvTranspose2d


@kind
class ConditionEncoder(nn.Module, ABC):
    """A network from conditions to features [B, *out_shape].

    Constructors take configuration arguments first; the parent supplies `shape` of one item, `num_classes` and
    `condition_shape` by keyword.

    Attributes:
        out_shape: shape of the features of one condition, without the batch axis.
    """

    out_shape: Shape

    @abstractmethod
    def forward(self, condition: Condition) -> Tensor:
        """[B, *out_shape] from labels [B], or vectors [B, *condition_shape]."""


@register(ConditionEncoder, "mel_upsampler")
class MelUpsampler(ConditionEncoder):
    """Spectrograms [B, bands, frames] at the rate of the samples they describe: [B, bands, T].

    Per stride s, one transposed convolution of one channel over bands and frames (kernel 3 x 2s, stride 1 x s, padding
    1 x s/2) and a leaky rectifier; what is longer than the T samples of an item is cut off.

    Args:
        strides: their product is the hop, the samples per frame.
        slope: of the rectifier below zero.
        weight_norm: normalise the weights of the convolutions.
    Raises:
        ConfigError: unless items are signals [T] and conditions spectrograms long enough for them.
    Source: Ping et al. 2020 (WaveFlow), section 3; Lee et al. 2020 (NanoFlow), section 4.1.
    """

    def __init__(
        self,
        strides: tuple[int, ...] = (16, 16),
        slope: float = 0.4,
        weight_norm: bool = True,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if not strides or min(strides) < 1:
            raise ConfigError(f"mel_upsampler: at least one stride of at least 1 is needed, found {list(strides)}.")
        if condition_shape is None or len(condition_shape) != 2 or len(shape) != 1:
            found = "none" if condition_shape is None else list(condition_shape)
            raise ConfigError(
                "mel_upsampler: signals [T] with spectrograms [bands, frames] are needed, found items of shape "
                f"{list(shape)} with conditions of shape {found}."
            )
        self.condition_shape, self.slope = tuple(condition_shape), slope
        (bands, frames), (length,) = condition_shape, shape
        hop = math.prod(strides)
        if frames * hop < length:
            raise ConfigError(
                f"mel_upsampler: {frames} frames of {hop} samples (the product of strides={list(strides)}) are "
                f"{frames * hop} samples, too few for items of {length}. Set strides to factors of the hop of the "
                "spectrograms."
            )
        self.out_shape = (bands, length)
        self.layers = nn.ModuleList(
            ConvTranspose2d(1, 1, (3, 2 * s), (1, s), (1, s // 2), weight_norm) for s in strides
        )

    def forward(self, condition: Condition) -> Tensor:
        """[B, bands, T] from spectrograms [B, bands, frames].

        Raises:
            ValueError: if their shape is another one.
        """
        if not isinstance(condition, Tensor) or tuple(condition.shape[1:]) != self.condition_shape:
            found = list(condition.shape) if isinstance(condition, Tensor) else sorted(condition)
            raise ValueError(
                f"mel_upsampler: the condition is {found}, but spectrograms of shape "
                f"[B, {', '.join(map(str, self.condition_shape))}] are needed: bands, then frames."
            )
        c = condition[:, None].to(self.layers[0].weight.dtype)
        for layer in self.layers:
            c = F.leaky_relu(layer(c), self.slope)
        return c[:, 0, :, : self.out_shape[1]]
