"""A residual convolutional network on images of one size: the conditioner of image flows."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import init

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .mlp import ACTIVATIONS, Activation, Embeddings
from .network import Modulation, Network, Shareable, Site, zero_head

EPS = 1e-3  # added to the variances of batch normalisation


class _Block(nn.Module):
    """h + gate ⊙ W_2 * drop(act(norm(W_1 * act(norm(h))))), gate = sigmoid(W_e e) where there is an e, else 1.

    Modulation adds its bias, per channel, to W_1 * act(norm(h)) and multiplies what is added to h.
    """

    def __init__(self, width: int, activation: Activation, dropout: float, batch_norm: bool, gated: bool) -> None:
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=EPS) if batch_norm else nn.Identity() for _ in range(2))
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.gate = nn.Linear(width, width) if gated else None
        init.uniform_(self.second.weight, -1e-3, 1e-3)
        init.uniform_(self.second.bias, -1e-3, 1e-3)

    def forward(self, h: Tensor, embedding: Tensor, bias: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        change = self.first(self.activation(self.norms[0](h)))
        change = change if bias is None else change + bias[:, None, None]
        change = self.second(self.dropout(self.activation(self.norms[1](change))))
        change = change if self.gate is None else change * self.gate(embedding).sigmoid()[..., None, None]
        return h + (change if gate is None else change * (1 + gate)[:, None, None])


@register(Network, "resnet")
class ResNet(Shareable):
    """Pre-activation residual blocks of two 3x3 convolutions between two 1x1 convolutions, at one resolution.

    h = W_0 * x + b_0 + e; per block h = h + sigmoid(W_e e) ⊙ W_2 * drop(act(norm(W_1 * act(norm(h))))); then
    out = W * h + b. The embedding e = e(t) + e(condition) is the same at every pixel (no gate where there is neither).
    The second convolution of each block starts within 1e-3 of zero.

    Args:
        width: channels of every hidden layer.
        blocks: number of residual blocks, two convolutions each.
        batch_norm: normalise each channel before each activation, over the batch in training and by running averages
            in eval mode; a flow is one invertible map in eval mode alone.
        dropout: share of the features dropped inside each block in training.
        zero_init: start the last layer (`head`) at zero.
    Raises:
        ConfigError: unless items are images [C, H, W] of one size in and out.
    Source: Durkan et al. 2019 (Neural Spline Flows), section 5.3; He et al. 2016 (Identity mappings in deep residual
        networks), section 3.
    """

    def __init__(
        self,
        width: int = 64,
        blocks: int = 2,
        activation: Activation = "relu",
        batch_norm: bool = False,
        dropout: float = 0.0,
        zero_init: bool = False,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if len(in_shape) != 3 or len(out_shape) != 3 or tuple(in_shape[1:]) != tuple(out_shape[1:]):
            raise ConfigError(
                f"resnet: images [C, H, W] of one size are needed, found items of shape {list(in_shape)} in and "
                f"{list(out_shape)} out. Use mlp or residual_mlp for vectors."
            )
        if width < 1 or blocks < 0 or not 0 <= dropout < 1:
            raise ConfigError(
                "resnet: width >= 1, blocks >= 0 and 0 <= dropout < 1 are needed, found "
                f"width={width}, blocks={blocks}, dropout={dropout}."
            )
        self.width, self.in_shape, self.out_shape = width, tuple(in_shape), tuple(out_shape)
        self.embeddings = Embeddings(width, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        self.first = nn.Conv2d(in_shape[0], width, 1)
        gated = self.embeddings.active
        self.blocks = nn.ModuleList(_Block(width, activation, dropout, batch_norm, gated) for _ in range(blocks))
        self.sites = (Site(width, width),) * blocks
        self.head = self.new_head()
        if zero_init:
            zero_head(self)

    def new_head(self) -> nn.Module:
        return nn.Conv2d(self.width, self.out_shape[0], 1)

    def finish(self, head: nn.Module, features: Tensor) -> Tensor:
        return head(features)

    def features(
        self,
        t: Tensor | None,
        x: Tensor,
        condition: Condition | None = None,
        modulation: Sequence[Modulation] | None = None,
    ) -> Tensor:
        if tuple(x.shape[1:]) != self.in_shape:
            raise ValueError(
                f"resnet: x has shape {list(x.shape)}, but this network was built for "
                f"[{', '.join(map(str, ('B', *self.in_shape)))}]. Build it with in_shape=x.shape[1:]."
            )
        embedding = self.embeddings(t, x, condition)
        h = self.first(x)
        h = h + embedding[..., None, None] if self.embeddings.active else h
        for i, block in enumerate(self.blocks):
            h = block(h, embedding, *(() if modulation is None else modulation[i]))
        return h
