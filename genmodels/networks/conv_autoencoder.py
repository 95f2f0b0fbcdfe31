"""Convolutional encoders and decoders: residual blocks that halve the image down to a vector, and double it back."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from ..registry import ConfigError, register
from ..types import Condition, Shape
from .mlp import ACTIVATIONS, Activation, Embeddings
from .network import Network

Resample = Callable[[int, int], nn.Module]


def _same(before: int, after: int) -> nn.Module:
    return nn.Conv2d(before, after, 3, padding=1)


def _down(before: int, after: int) -> nn.Module:
    """n pixels become ceil(n/2)."""
    return nn.Conv2d(before, after, 3, stride=2, padding=1)


def _up(size: tuple[int, int]) -> Resample:
    """Twice the pixels, or one less where the size that comes out is odd."""
    even = tuple(1 - side % 2 for side in size)
    return lambda before, after: nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=even)


class _Block(nn.Module):
    """S * h + gate ⊙ W_2 * drop(act(W_1 * act(h))), gate = sigmoid(W_e e) where there is an e, else 1.

    W_1 keeps channels and size; S and W_2 change both if the block resamples. If it does not, S is the identity.
    """

    def __init__(
        self,
        before: int,
        after: int,
        resample: Resample | None,
        activation: Activation,
        dropout: float,
        embedding: int | None,
    ) -> None:
        super().__init__()
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.shortcut = nn.Identity() if resample is None else resample(before, after)
        self.first, self.second = _same(before, before), (resample or _same)(before, after)
        self.gate = None if embedding is None else nn.Linear(embedding, after)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        change = self.second(self.dropout(self.activation(self.first(self.activation(h)))))
        if self.gate is not None:
            change = change * self.gate(embedding).sigmoid()[..., None, None]
        return self.shortcut(h) + change


class _Convolutional(Network):
    """What both networks share: the sizes of the levels, embeddings and the blocks.

    Attributes:
        sizes: [n, m] pixels of each level, the finest first.
        channels: of each level.
    """

    def __init__(
        self,
        image: Shape,
        width: int,
        halvings: int,
        blocks: int,
        dropout: float,
        shapes: dict[str, Shape],
        **conditions: int | bool | Shape | None,
    ) -> None:
        super().__init__()
        name = self.registered_name
        if len(image) != 3:
            raise ConfigError(
                f"{name}: images [C, H, W] are needed on one side, found items of shape {list(image)}. Use mlp or "
                "residual_mlp for vectors."
            )
        if width < 1 or halvings < 0 or blocks < 0 or not 0 <= dropout < 1:
            raise ConfigError(
                f"{name}: width >= 1, halvings >= 0, blocks >= 0 and 0 <= dropout < 1 are needed, found width={width}, "
                f"halvings={halvings}, blocks={blocks}, dropout={dropout}."
            )
        self.in_shape, self.out_shape = tuple(shapes["in_shape"]), tuple(shapes["out_shape"])
        self.sizes = [tuple(image[1:])]
        while len(self.sizes) <= halvings and max(self.sizes[-1]) > 1:
            self.sizes.append(tuple(-(-side // 2) for side in self.sizes[-1]))
        self.channels = [width * 2**level for level in range(len(self.sizes))]
        self.coarsest = (self.channels[-1], *self.sizes[-1])
        self.embeddings = Embeddings(width, **conditions)


@register(Network, "conv_encoder")
class ConvEncoder(_Convolutional):
    """Images to vectors: residual blocks of 3x3 convolutions at ever half the resolution and twice the channels.

    h = W_0 * x + b_0 + e (1x1); at each level but the last `blocks` blocks
    h = h + sigmoid(W_e e) ⊙ W_2 * drop(act(W_1 * act(h))) and one whose W_2 and shortcut have stride 2, from n pixels
    to ceil(n/2); then out = W act(h) + b over all pixels and channels. The embedding e = e(t) + e(condition) is the
    same at every pixel (no gate where there is neither). What comes out may have any shape.

    Args:
        width: channels at the full resolution; level l has width · 2^l.
        halvings: how often the resolution is halved, at most: a single pixel stays as it is.
        blocks: residual blocks before each halving.
        dropout: share of the features dropped inside each block in training.
    Raises:
        ConfigError: unless what goes in are images [C, H, W].
    Source: Durkan et al. 2019 (Neural Spline Flows), section 5.2; He et al. 2016 (Identity mappings in deep residual
        networks), section 3.
    """

    def __init__(
        self,
        width: int = 16,
        halvings: int = 3,
        blocks: int = 1,
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        conditions = {"timed": timed, "num_classes": num_classes, "condition_shape": condition_shape}
        shapes = {"in_shape": in_shape, "out_shape": out_shape}
        super().__init__(in_shape, width, halvings, blocks, dropout, shapes, **conditions)
        common = (activation, dropout, width if self.embeddings.active else None)
        self.first = nn.Conv2d(in_shape[0], width, 1)
        self.blocks = nn.ModuleList()
        for before, after in zip(self.channels, self.channels[1:], strict=False):
            self.blocks.extend(_Block(before, before, None, *common) for _ in range(blocks))
            self.blocks.append(_Block(before, after, _down, *common))
        self.activation = ACTIVATIONS[activation]()
        self.head = nn.Linear(math.prod(self.coarsest), math.prod(out_shape))

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        embedding = self.embeddings(t, x, condition)
        h = self.first(x)
        h = h + embedding[..., None, None] if self.embeddings.active else h
        for block in self.blocks:
            h = block(h, embedding)
        return self.head(self.activation(h).flatten(1)).reshape(len(x), *self.out_shape)


@register(Network, "conv_decoder")
class ConvDecoder(_Convolutional):
    """Vectors to images: the levels of `conv_encoder` from the coarsest to the finest, with transposed convolutions.

    h = W_0 x + b_0 + W_c e, an image of the coarsest level; at each level but the finest `blocks` blocks
    h = h + sigmoid(W_e e) ⊙ W_2 * drop(act(W_1 * act(h))) and one whose W_2 and shortcut are transposed convolutions of
    stride 2, which end at the size that the encoder's halving starts from; then out = W * act(h) + b (1x1). What goes
    in may have any shape.

    Args:
        width: channels at the full resolution; level l, l halvings below it, has width · 2^l.
        halvings: how often the resolution is doubled, at most: the coarsest level has at least one pixel.
        blocks: residual blocks before each doubling.
        dropout: share of the features dropped inside each block in training.
    Raises:
        ConfigError: unless what comes out are images [C, H, W].
    Source: Durkan et al. 2019 (Neural Spline Flows), section 5.2; He et al. 2016 (Identity mappings in deep residual
        networks), section 3.
    """

    def __init__(
        self,
        width: int = 16,
        halvings: int = 3,
        blocks: int = 1,
        activation: Activation = "relu",
        dropout: float = 0.0,
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        conditions = {"timed": timed, "num_classes": num_classes, "condition_shape": condition_shape}
        shapes = {"in_shape": in_shape, "out_shape": out_shape}
        super().__init__(out_shape, width, halvings, blocks, dropout, shapes, **conditions)
        common = (activation, dropout, width if self.embeddings.active else None)
        self.first = nn.Linear(math.prod(in_shape), math.prod(self.coarsest))
        self.enter = nn.Linear(width, self.coarsest[0], bias=False) if self.embeddings.active else None
        self.blocks = nn.ModuleList()
        for level in range(len(self.sizes) - 1, 0, -1):
            before, after = self.channels[level], self.channels[level - 1]
            self.blocks.extend(_Block(before, before, None, *common) for _ in range(blocks))
            self.blocks.append(_Block(before, after, _up(self.sizes[level - 1]), *common))
        self.activation = ACTIVATIONS[activation]()
        self.head = nn.Conv2d(width, out_shape[0], 1)

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        embedding = self.embeddings(t, x, condition)
        h = self.first(x.flatten(1)).reshape(len(x), *self.coarsest)
        h = h if self.enter is None else h + self.enter(embedding)[..., None, None]
        for block in self.blocks:
            h = block(h, embedding)
        return self.head(self.activation(h))
