"""Cells: maps z ↦ f(z, u) whose fixed points are the states of equilibrium models, dense and convolutional."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import ConfigError, kind, register
from ..types import Condition, Shape
from .mlp import ACTIVATIONS, Embeddings
from .network import Network, check_images
from .weight_norm import Conv2d

Injection = dict[str, Tensor]  # what of an item enters every evaluation; each tensor has the batch axis first


@kind
class Cell(Network):
    """A map of states that depends on an item: `cell(None, z, injection)`, where `inject` makes the injection once.

    Constructors take configuration arguments first; the parent supplies `in_shape` of the items, `timed`, `num_classes`
    and `condition_shape` by keyword.

    Attributes:
        in_shape: shape of a state, of what goes in and of what comes out.
        item_shape: shape of an item.
        out_shape: shape of what `read` makes of a state.
    """

    item_shape: Shape
    out_shape: Shape

    @abstractmethod
    def inject(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Injection:
        """What items x [B, *item_shape] at t, under a condition, contribute to every evaluation."""

    def guess(self, injection: Injection) -> Tensor:
        """[B, *in_shape] what an explicit predictor without further parameters makes of an injection: f(0, u)."""
        (first, *_) = injection.values()
        return self(None, first.new_zeros(len(first), *self.in_shape), injection)

    def read(self, z: Tensor) -> Tensor:
        """[B, *out_shape] features of a state."""
        return z

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, what depends on parameters alone is computed once, with its graph."""
        yield


def contracted(weight: Tensor, bound: float) -> Tensor:
    """The matrix, scaled down so that its spectral norm is at most `bound`."""
    return weight * (bound / torch.linalg.matrix_norm(weight, 2).clamp(min=bound))


class _Dense(Cell):
    """A state of numbers, W z, and an injection that is linear in the item, its time and its condition."""

    def __init__(
        self,
        hidden: int,
        contraction: float | None,
        in_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        if hidden < 1 or (contraction is not None and not contraction > 0):
            raise ConfigError(
                f"{self.registered_name}: hidden >= 1 and contraction > 0 are needed, found {hidden} and {contraction}."
            )
        self.item_shape, self.in_shape, self.out_shape = tuple(in_shape), (hidden,), (hidden,)
        self.contraction = contraction
        bound = hidden**-0.5
        self.weight = nn.Parameter(bound * (2 * torch.rand(hidden, hidden) - 1))
        self.entrance = nn.Linear(math.prod(in_shape), hidden)
        self.embeddings = Embeddings(hidden, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        self._held: Tensor | None = None

    def inject(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Injection:
        u = self.entrance(x.flatten(1))
        return {"u": u + self.embeddings(t, x, condition) if self.embeddings.active else u}

    def matrix(self) -> Tensor:
        """W, with its spectral norm bounded."""
        if self._held is not None:
            return self._held
        return self.weight if self.contraction is None else contracted(self.weight, self.contraction)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = self.matrix()
        try:
            yield
        finally:
            self._held = None


@register(Cell, "mlp_cell")
class MLPCell(_Dense):
    """f(z, u) = act(W z + u) with u = U x + b + e(t) + e(condition), for states of `hidden` numbers.

    Args:
        hidden: numbers of a state.
        contraction: bound on the spectral norm of W, computed exactly; below 1, f is a contraction by it, as these
            activations stretch nothing (silu and gelu up to 1.13); None for no bound.
    Source: Pal et al. 2022 (Continuous deep equilibrium models), appendix, its fully connected model.
    """

    def __init__(
        self,
        hidden: int = 128,
        activation: Literal["relu", "tanh", "silu", "gelu"] = "relu",
        contraction: float | None = None,
        *,
        in_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__(hidden, contraction, in_shape, timed, num_classes, condition_shape)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, t: Tensor | None, z: Tensor, condition: Condition | None = None) -> Tensor:
        return self.activation(F.linear(z, self.matrix()) + condition["u"])


@register(Cell, "subhomogeneous")
class Subhomogeneous(_Dense):
    """f(z, u) = tanh(|W| z) + shift + softplus(u): one positive fixed point for any W, which plain iteration finds.

    f maps positive states to positive states and is subhomogeneous, |∂f/∂z| z <= μ f(z) component by component, with
    μ = max tanh'(y) y/(tanh y + shift) over y >= 0, as the injection only adds to f. With W itself, of both
    signs, |∂f/∂z| z would not be |tanh'(y) y|, and f could have several fixed points, however small that is.
    Below 1, μ is the rate of contraction in Thompson's metric max |log z - log z'|, whatever the norm of W.

    Weights start in ±1/hidden, so that |W| z starts where tanh is steep.

    Args:
        shift: 1.2 gives μ = 0.247, 0.1 gives 0.713.
    Attributes:
        rate: μ.
    Raises:
        ConfigError: if the shift is not positive.
    Source: Sittoni & Tudisco 2024 (Subhomogeneous deep equilibrium models), section 4; weights that are not negative
        as in Gabor et al. 2024 (Positive concave deep equilibrium models).
    """

    def __init__(
        self,
        hidden: int = 128,
        shift: float = 1.2,
        *,
        in_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__(hidden, None, in_shape, timed, num_classes, condition_shape)
        if not shift > 0:
            raise ConfigError(f"subhomogeneous: shift={shift:g} gives no unique fixed point. Use a positive one.")
        y = torch.linspace(0, 20, 200_001, dtype=torch.float64)
        self.shift, self.rate = shift, float(((1 - y.tanh().square()) * y / (y.tanh() + shift)).max())
        with torch.no_grad():
            self.weight.mul_(hidden**-0.5)

    def matrix(self) -> Tensor:
        """|W|."""
        return super().matrix() if self._held is not None else self.weight.abs()

    def forward(self, t: Tensor | None, z: Tensor, condition: Condition | None = None) -> Tensor:
        return torch.tanh(F.linear(z, self.matrix())) + self.shift + F.softplus(condition["u"])


def dropped(mask_of: Tensor, rate: float, training: bool) -> Tensor | None:
    """A dropout mask [B, C, 1, 1] for a whole solve, so that the map stays the same; None outside training."""
    if not training or rate == 0:
        return None
    keep = torch.rand(*mask_of.shape[:2], *(1,) * (mask_of.ndim - 2), device=mask_of.device) >= rate
    return keep.to(mask_of.dtype) / (1 - rate)


class _Injected(nn.Module):
    """norm(relu(drop(conv(relu(norm(conv z)))) + u + e)): what comes back of z starts out at a tenth of u."""

    def __init__(self, channels: int, expansion: int, kernel: int, groups: int, weight_norm: bool) -> None:
        super().__init__()
        wide, pad = expansion * channels, (kernel // 2,) * 2
        self.first = Conv2d(channels, wide, kernel, pad, weight_norm=weight_norm)
        self.second = Conv2d(wide, channels, kernel, pad, weight_norm=weight_norm)
        with torch.no_grad():
            (self.second.weight if self.second.gain is None else self.second.gain).mul_(0.1)
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(groups, size), size) for size in (wide, channels))

    def forward(self, z: Tensor, u: Tensor, shift: Tensor | None, mask: Tensor | None) -> Tensor:
        inside, last = self.norms
        h = self.second(F.relu(inside(self.first(z))))
        h = (h if mask is None else h * mask) + u
        return last(F.relu(h if shift is None else h + shift))


@register(Cell, "conv_cell")
class ConvCell(Cell):
    """f(z, u) = norm(relu(drop(conv(relu(norm(conv z)))) + u + e)) on images of the size of the items.

    Here u = conv x and e = e(t) + e(condition).

    Args:
        channels: of a state.
        expansion: channels inside the block over those of the state.
        groups: of the group norms, or fewer so as to divide the channels.
        dropout: share of the channels dropped in training; which ones stays the same during a solve.
        weight_norm: normalise the kernels of the block.
    Raises:
        ConfigError: if items are not images, or a number is out of its range.
    """

    def __init__(
        self,
        channels: int = 32,
        expansion: int = 2,
        kernel: int = 3,
        groups: int = 8,
        dropout: float = 0.0,
        weight_norm: bool = False,
        *,
        in_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        check_images(self.registered_name, in_shape, in_shape)
        check_block(self.registered_name, (channels,), expansion, kernel, dropout)
        self.item_shape, self.in_shape = tuple(in_shape), (channels, *in_shape[1:])
        self.out_shape, self.dropout = self.in_shape, dropout
        self.entrance = nn.Conv2d(in_shape[0], channels, kernel, padding=kernel // 2)
        self.embeddings = Embeddings(channels, timed=timed, num_classes=num_classes, condition_shape=condition_shape)
        self.block = _Injected(channels, expansion, kernel, groups, weight_norm)

    def inject(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Injection:
        u = self.entrance(x)
        mask = dropped(u, self.dropout, self.training)
        return {"u": u} | shifted(self.embeddings, t, x, condition) | ({} if mask is None else {"mask": mask})

    def forward(self, t: Tensor | None, z: Tensor, condition: Condition | None = None) -> Tensor:
        return self.block(z, condition["u"], condition.get("shift"), condition.get("mask"))


def shifted(embeddings: Embeddings, t: Tensor | None, x: Tensor, condition: Condition | None) -> Injection:
    """The embedding of time and condition as a shift of images, if there is one."""
    return {"shift": embeddings(t, x, condition)[:, :, None, None]} if embeddings.active else {}


def check_block(name: str, channels: Sequence[int], expansion: int, kernel: int, dropout: float) -> None:
    """Raises ConfigError if a number is out of its range."""
    if not channels or min(channels) < 1 or expansion < 1 or kernel < 1 or kernel % 2 == 0 or not 0 <= dropout < 1:
        raise ConfigError(
            f"{name}: channels >= 1, expansion >= 1, an odd kernel and 0 <= dropout < 1 are needed, found "
            f"{list(channels)}, {expansion}, {kernel} and {dropout:g}."
        )
