"""Convolutions whose kernels are directions times gains (weight normalisation), and their plain form."""

import torch
from torch import Tensor, nn


class _Normalised:
    """What both kinds share: `kernel() = gain · weight / ‖weight‖` over the first axis, or `weight` without a gain.

    Weights start Kaiming-normal and the gain at their norms, so that both forms start as the same layer. Kernels of one
    number per channel have no gain: they would be its sign.
    """

    weight: nn.Parameter
    gain: nn.Parameter | None

    def start(self, weight_norm: bool) -> None:
        nn.init.kaiming_normal_(self.weight)
        directed = weight_norm and self.weight[0].numel() > 1
        self.gain = nn.Parameter(self._norms().detach().clone()) if directed else None

    def _norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.weight, dim=tuple(range(1, self.weight.ndim)), keepdim=True)

    def kernel(self) -> Tensor:
        """The kernel that the convolution uses."""
        return self.weight if self.gain is None else self.weight * (self.gain / self._norms())

    def foldable(self) -> tuple[list[nn.Parameter], int]:
        """Parameters that inference can do without, and how many numbers it keeps in their place."""
        return [] if self.gain is None else [self.gain], 0

    @torch.no_grad()
    def fold(self) -> None:
        """Write the kernel to the weight and drop the gain."""
        self.weight.copy_(self.kernel())
        self.gain = None


class Conv2d(_Normalised, nn.Conv2d):
    """A 2-D convolution, with weight normalisation per output channel if asked.

    Source: Salimans & Kingma 2016 (Weight normalization), section 2.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        weight_norm: bool = True,
    ) -> None:
        super().__init__(channels, out_channels, kernel_size, padding=padding, dilation=dilation)
        self.start(weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.kernel(), self.bias)


class ConvTranspose2d(_Normalised, nn.ConvTranspose2d):
    """A transposed 2-D convolution, with weight normalisation per input channel if asked."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        weight_norm: bool = True,
    ) -> None:
        super().__init__(channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.start(weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv_transpose2d(x, self.kernel(), self.bias, self.stride, self.padding)


def fold_weight_norm(module: nn.Module) -> None:
    """Make every weight-normalised convolution inside a plain one with the same kernel, in place, for inference.

    Papers count parameters in this form. Weights that were folded load into a model built with `weight_norm: false`.
    """
    for part in module.modules():
        if isinstance(part, _Normalised):
            part.fold()
