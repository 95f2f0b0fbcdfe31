"""A gated convolutional network that is causal along the rows of an image: the conditioner of WaveFlow and NanoFlow."""

import math
from collections import deque
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .mlp import Embeddings
from .network import Modulation, Network, Shareable, Site, check_images
from .weight_norm import Conv2d

NONE = Modulation()


class _Head(nn.Module):
    """exp(3 scale) ⊙ (W * h + b) with a 1x1 convolution, a scale per channel out, and W, b within 1e-3 of zero."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 1)
        self.scale = nn.Parameter(torch.zeros(out_channels, 1, 1))
        nn.init.uniform_(self.conv.weight, -1e-3, 1e-3)
        nn.init.uniform_(self.conv.bias, -1e-3, 1e-3)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h) * (3 * self.scale).exp()


class _Layer(nn.Module):
    """a | b = W_h * h + W_c * c + bias, then change | skip = W_o * (tanh(a) ⊙ sigmoid(b)).

    h becomes (h + change) √½, or h + (1 + gate) ⊙ change where there is a gate. W_h is causal along rows and centred
    along columns.
    """

    def __init__(
        self, channels: int, kernel: int, dilation: tuple[int, int], bands: int | None, residual: bool, norm: bool
    ) -> None:
        super().__init__()
        self.dilation, self.residual = dilation, residual
        self.above = dilation[0] * (kernel - 1)  # rows above its own that a row sees
        self.gated = Conv2d(channels, 2 * channels, kernel, weight_norm=norm)
        self.condition = None if bands is None else Conv2d(bands, 2 * channels, weight_norm=norm)
        self.out = Conv2d(channels, (1 + residual) * channels, weight_norm=norm)

    def kernels(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """W_h, W_c and W_o."""
        return self.gated.kernel(), self.condition and self.condition.kernel(), self.out.kernel()

    def forward(
        self, h: Tensor, c: Tensor | None, bias: Tensor | None = None, gate: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The next h and the skip, [B, channels, H, W] each."""
        return self.advance(h, F.pad(h, (0, 0, self.above, 0)), c, self.kernels(), self.dilation, bias, gate)

    def advance(
        self,
        h: Tensor,
        window: Tensor,
        c: Tensor | None,
        kernels: tuple[Tensor, Tensor | None, Tensor],
        dilation: tuple[int, int],
        bias: Tensor | None,
        gate: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The next h and the skip of rows h; `window` holds them after the rows above that the convolution reads."""
        w_h, w_c, w_o = kernels
        sides = dilation[1] * (w_h.shape[-1] // 2)
        a = F.conv2d(window, w_h, self.gated.bias, padding=(0, sides), dilation=dilation)
        if self.condition is not None and c is not None:
            a = a + F.conv2d(c, w_c, self.condition.bias)
        if bias is not None:
            a = a + bias[:, None, None]
        value, open_ = a.chunk(2, 1)
        out = F.conv2d(value.tanh() * open_.sigmoid(), w_o, self.out.bias)
        if not self.residual:
            return h, out
        change, skip = out.chunk(2, 1)
        return (h + change) * math.sqrt(0.5) if gate is None else h + change * (1 + gate)[:, None, None], skip


@register(Network, "wavenet2d")
class WaveNet2D(Shareable):
    """Dilated convolutions with gates and skips; row i of the output depends on rows 0 … i of the input alone.

    h = W_0 * x + b_0 + e; per layer i a | b = W_h * h + W_c * c, change | skip = W_o * (tanh(a) ⊙ sigmoid(b)) and
    h = (h + change) √½; out = exp(3 s) ⊙ (W * Σ skip + b). W_h is causal along rows, with dilation 2^(i mod
    height_cycle), and centred along columns, with dilation 2^i. A condition with the rows and columns of the items is
    the map c; times, labels and other conditions are one embedding e at every pixel.

    Where several steps share the network, their bias is added to a | b, and where they bring a gate,
    h = h + (1 + gate) ⊙ change. `rows` evaluates one row after another, each at the cost of one.

    Args:
        channels: of h and of the skips.
        layers: number of layers.
        kernel: side of W_h, odd.
        height_cycle: after how many layers the row dilation starts again at 1.
        weight_norm: normalise the weights of all convolutions but the last; `fold_weight_norm` undoes it for inference.
        last_residual: compute the unused change of the last layer too, as the published models do.
    Raises:
        ConfigError: unless items are images [C, H, W] of one size in and out.
    Source: Ping et al. 2020 (WaveFlow), section 3; Lee et al. 2020 (NanoFlow), section 3.3.
    """

    blockwise = True

    def __init__(
        self,
        channels: int = 64,
        layers: int = 8,
        kernel: int = 3,
        height_cycle: int = 1,
        weight_norm: bool = True,
        last_residual: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        check_images("wavenet2d", in_shape, out_shape)
        if min(channels, layers, height_cycle) < 1 or kernel < 1 or kernel % 2 == 0:
            raise ConfigError(
                "wavenet2d: channels, layers and height_cycle of at least 1 and an odd kernel are needed, found "
                f"channels={channels}, layers={layers}, height_cycle={height_cycle}, kernel={kernel}."
            )
        self.width, self.in_shape, self.out_shape = channels, tuple(in_shape), tuple(out_shape)
        mapped = condition_shape is not None and tuple(condition_shape[1:]) == self.in_shape[1:]
        self.map_shape = tuple(condition_shape) if mapped else None
        self.embeddings = Embeddings(
            channels, timed=timed, num_classes=num_classes, condition_shape=None if mapped else condition_shape
        )
        self.first = Conv2d(in_shape[0], channels, weight_norm=weight_norm)
        bands = condition_shape[0] if mapped else None
        residuals = [i < layers - 1 or last_residual for i in range(layers)]
        self.layers = nn.ModuleList(
            _Layer(channels, kernel, (2 ** (i % height_cycle), 2**i), bands, residual, weight_norm)
            for i, residual in enumerate(residuals)
        )
        self.sites = tuple(Site(2 * channels, channels * residual) for residual in residuals)
        self.head = self.new_head()

    def new_head(self) -> nn.Module:
        return _Head(self.width, self.out_shape[0])

    def finish(self, head: nn.Module, features: Tensor) -> Tensor:
        return head(features)

    def features(
        self,
        t: Tensor | None,
        x: Tensor,
        condition: Condition | None = None,
        modulation: Sequence[Modulation] | None = None,
    ) -> Tensor:
        self.check_items(x)
        e, c = self.given(t, x, condition)
        h = self.first(x)
        h = h if e is None else h + e
        total = 0.0
        for layer, told in zip(self.layers, modulation or (NONE,) * len(self.layers), strict=True):
            h, skip = self.recompute(layer, h, c, *told)
            total = total + skip
        return total

    def given(self, t: Tensor | None, x: Tensor, condition: Condition | None) -> tuple[Tensor | None, Tensor | None]:
        """The embedding e [B, channels, 1, 1] and the map c [B, bands, H, W], None where there is none."""
        if self.map_shape is None:
            e = self.embeddings(t, x, condition)
            return (e[..., None, None] if self.embeddings.active else None), None
        e = self.embeddings(t, x, None)
        c = x.new_zeros(len(x), *self.map_shape) if condition is None else condition
        if tuple(c.shape[1:]) != self.map_shape:
            raise ValueError(
                f"wavenet2d: the condition has shape {list(c.shape)}, but this network was built for "
                f"[{', '.join(map(str, ('B', *self.map_shape)))}]. Encode it to that shape, or build another network."
            )
        return (e[..., None, None] if self.embeddings.active else None), c.to(x.dtype)

    def rows(
        self,
        condition: Condition | None,
        like: Tensor,
        modulation: Sequence[Modulation] | None = None,
        head: nn.Module | None = None,
    ) -> "Rows":
        """The output row after row, of a network without time, for items of the batch, device and dtype of `like`.

        Args:
            like: [B, *in_shape].
            head: what is used instead of `head`.
        """
        self.check_items(like)
        return Rows(self, condition, like, modulation, self.head if head is None else head)


class Rows:
    """rows(x_0), rows(x_1), …: row i of the network's output, given row i of its input and what the rows before left.

    Every layer keeps as many rows of its input as its convolution reads; kernels are formed once.

    Source: Lee et al. 2020 (NanoFlow), section 3.3; Paine et al. 2016 (Fast WaveNet), section 3.
    """

    def __init__(
        self,
        network: WaveNet2D,
        condition: Condition | None,
        like: Tensor,
        modulation: Sequence[Modulation] | None,
        head: nn.Module,
    ) -> None:
        self.network, self.head = network, head
        self.modulation = modulation or (NONE,) * len(network.layers)
        self.embedding, self.map = network.given(None, like, condition)
        self.kernels = [layer.kernels() for layer in network.layers]
        row = like.new_zeros(len(like), network.width, 1, like.shape[-1])
        self.seen = [deque([row] * layer.above, maxlen=layer.above + 1) for layer in network.layers]
        self.next = 0

    def __call__(self, row: Tensor) -> Tensor:
        """[B, P, 1, W] from the next row [B, C, 1, W] of the input."""
        h = self.network.first(row)
        h = h if self.embedding is None else h + self.embedding
        c = None if self.map is None else self.map[:, :, self.next : self.next + 1]
        total = 0.0
        for layer, seen, kernels, told in zip(
            self.network.layers, self.seen, self.kernels, self.modulation, strict=True
        ):
            seen.append(h)
            window = torch.cat(list(seen)[:: layer.dilation[0]], 2)
            h, skip = layer.advance(h, window, c, kernels, (1, layer.dilation[1]), *told)
            total = total + skip
        self.next += 1
        return self.network.finish(self.head, total)
