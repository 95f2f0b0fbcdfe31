"""The convolutional conditioners of Glow: normalised convolutions that start from data, and last layers at zero."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .mlp import Embeddings
from .network import Modulation, Network, Shareable, Site, check_images

STD = 0.05  # of a hidden convolution's weights at the start


class NormalizedConv(nn.Module):
    """relu(exp(gate) ⊙ (exp(log_scale) ⊙ (W * h) + shift + bias + e)): a convolution with an ActNorm of its own.

    Scale, shift, gate and bias are folded into the kernel, so that they cost no pass over the image. Until `start` has
    set them from data, scale is 1 and shift 0.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(STD * torch.randn(outputs, inputs, kernel, kernel))
        self.log_scale = nn.Parameter(torch.zeros(outputs))
        self.shift = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, h: Tensor, modulation: Modulation = Modulation(), embedding: Tensor | None = None) -> Tensor:
        """h [B, C, H, W], embedding [B, outputs]."""
        log_scale, shift = self.log_scale, self.shift
        if modulation.bias is not None:
            shift = shift + modulation.bias
        if modulation.gate is not None:
            log_scale, shift = log_scale + modulation.gate, shift * modulation.gate.exp()
            embedding = None if embedding is None else embedding * modulation.gate.exp()
        h = F.conv2d(h, self.weight * log_scale.exp()[:, None, None, None], shift, padding="same")
        return F.relu(h if embedding is None else h + embedding[..., None, None])

    @torch.no_grad()
    def start(self, h: Tensor) -> None:
        """Give what is added to the embedding zero mean and (unbiased) unit variance per channel of the batch h, once.

        Raises:
            ValueError: if there are fewer than two items.
        """
        if self.initialized:
            return
        if len(h) < 2:
            raise ValueError(f"glow: at least two items are needed to measure a scale, found {len(h)}.")
        std, mean = torch.std_mean(F.conv2d(h, self.weight, padding="same").double(), (0, 2, 3))
        std = torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))  # constant channels keep their scale
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)
        self.initialized.fill_(True)


class ZeroConv(nn.Module):
    """exp(3 logs) ⊙ (W * h + b) with W = 0, b = 0 and logs = 0 at the start: 3 x the rate of learning for its scale."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.logs = nn.Parameter(torch.zeros(outputs))

    def forward(self, h: Tensor) -> Tensor:
        factor = (3 * self.logs).exp()
        return F.conv2d(h, self.weight * factor[:, None, None, None], self.bias * factor, padding="same")


@register(Network, "glow")
class Glow(Shareable):
    """Convolutions with ActNorm and ReLU, then a convolution that starts at zero, at one resolution.

    h = relu(exp(g_j) ⊙ (norm_j(W_j * h) + b_j)) for each hidden layer j, with e = e(t) + e(condition) added to the
    first, and out = exp(3 logs) ⊙ (W * h + b). norm_j is an affine map per channel; `initialize` sets it from the first
    batch so that what it gives has zero mean and unit variance. Gates g_j and biases b_j are there where several steps
    of a flow share the network (see `Shareable`); nothing is started twice.

    Args:
        width: channels of every hidden layer.
        form: "small": hidden layers 3x3 and 1x1, last layer 3x3 (Glow). "large": six hidden layers 3x3, last layer 1x1
            (NanoFlow).
    Raises:
        ConfigError: unless items are images [C, H, W] of one size in and out.
    Source: Kingma & Dhariwal 2018 (Glow), section 3.3; Lee et al. 2020 (NanoFlow), section 4.2.
    """

    def __init__(
        self,
        width: int = 512,
        form: Literal["small", "large"] = "small",
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        check_images("glow", in_shape, out_shape)
        if width < 1:
            raise ConfigError(f"glow: width >= 1 is needed, found width={width}.")
        self.width, self.in_shape, self.out_shape = width, tuple(in_shape), tuple(out_shape)
        self.embeddings = Embeddings(width, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        kernels, self.kernel = ((3, 1), 3) if form == "small" else ((3,) * 6, 1)
        sizes = (in_shape[0], *(width,) * (len(kernels) - 1))
        self.layers = nn.ModuleList(NormalizedConv(n, width, kernel) for n, kernel in zip(sizes, kernels, strict=True))
        self.sites = (Site(width, width),) * len(kernels)
        self.head = self.new_head()

    def new_head(self) -> nn.Module:
        return ZeroConv(self.width, self.out_shape[0], self.kernel)

    def finish(self, head: nn.Module, features: Tensor) -> Tensor:
        return head(features)

    def _embedding(self, t: Tensor | None, x: Tensor, condition: Condition | None) -> Tensor | None:
        self.check_items(x)
        embedding = self.embeddings(t, x, condition)
        return embedding if self.embeddings.active else None

    def features(
        self,
        t: Tensor | None,
        x: Tensor,
        condition: Condition | None = None,
        modulation: Sequence[Modulation] | None = None,
    ) -> Tensor:
        embedding = self._embedding(t, x, condition)
        for layer, told in zip(self.layers, modulation or (Modulation(),) * len(self.layers), strict=True):
            x, embedding = layer(x, told, embedding), None
        return x

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        embedding = self._embedding(None, x, condition)
        for layer in self.layers:
            layer.start(x)
            x, embedding = layer(x, Modulation(), embedding), None


@register(Network, "zero_conv")
class ZeroConvolution(Network):
    """out = exp(3 logs) ⊙ (W * (x + e) + b), one convolution that starts at zero: Glow's prior of what a level leaves.

    The embedding e = e(t) + e(condition) is the same at every pixel.

    Args:
        kernel: an odd width of W, in pixels.
    Raises:
        ConfigError: unless items are images [C, H, W] of one size in and out, and kernel is odd.
    Source: Kingma & Dhariwal 2018 (Glow), section 3.3.
    """

    def __init__(
        self,
        kernel: int = 3,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        check_images("zero_conv", in_shape, out_shape)
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f"zero_conv: an odd kernel is needed, found kernel={kernel}.")
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)
        sizes = {"timed": timed, "num_classes": num_classes, "condition_shape": condition_shape}
        self.embeddings = Embeddings(in_shape[0], **sizes)
        self.head = ZeroConv(in_shape[0], out_shape[0], kernel)

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        embedding = self.embeddings(t, x, condition)
        return self.head(x + embedding[..., None, None] if self.embeddings.active else x)
