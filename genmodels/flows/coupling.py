"""Couplings: one part of an item passes unchanged and tells a network how to transform the other part."""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from ..networks.network import Network
from ..registry import register
from ..types import Condition, Shape, sum_items
from .bijection import Bijection
from .elementwise import Parametrization, Spline, check_spline, knots_of, transform_items

Split = Literal["half", "alternating"]


class Coupling(Bijection):
    """Splits the first axis of an item (components, or channels of an image) and calls a network on one part.

    The network maps the kept part [B, C_k, …] to [B, P·C_t, …], P parameters for each number of the transformed part,
    parameter-major. It is called once per evaluation, in either direction.

    Args:
        network: builder of the conditioner.
        parameters: P.
        split: "half" keeps the first half of the axis, "alternating" its even places.
        swap: keep and transform the other way round.
        identity: start the network's last layer (its attribute `head`, where it has one) at zero.
    """

    def __init__(
        self,
        network: Callable[..., Network],
        parameters: int,
        split: Split,
        swap: bool,
        identity: bool,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        self.shape, self.parameters_each = tuple(shape), parameters
        if not self.shape or self.shape[0] < 2:
            raise ValueError(
                f"{self.registered_name}: the first axis of the items must hold at least 2 numbers to split, found "
                f"shape={self.shape}. Put `flatten` before it, or use `spline` for single numbers."
            )
        places = torch.arange(self.shape[0])
        second = places >= self.shape[0] // 2 if split == "half" else places % 2 == 1
        second = ~second if swap else second
        self.register_buffer("kept", places[~second], persistent=False)
        self.register_buffer("transformed", places[second], persistent=False)
        self.register_buffer("order", torch.cat((self.kept, self.transformed)).argsort(), persistent=False)
        rest = self.shape[1:]
        self.network = network(
            in_shape=(len(self.kept), *rest),
            out_shape=(parameters * len(self.transformed), *rest),
            timed=False,
            num_classes=num_classes,
            condition_shape=condition_shape,
        )
        head = getattr(self.network, "head", None)
        if identity and isinstance(head, nn.Module):
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the transformed part of x."""
        return x.index_select(1, self.kept), x.index_select(1, self.transformed)

    def join(self, kept: Tensor, transformed: Tensor) -> Tensor:
        return torch.cat((kept, transformed), 1).index_select(1, self.order)


@register(Bijection, "spline_coupling")
class SplineCoupling(Coupling):
    """z_t = RQS(x_t; θ(x_k)) with rational-quadratic splines; z_k = x_k, or RQS(x_k) with free parameters.

    log_det = Σ log|dz_t/dx_t| (+ Σ log|dz_k/dx_k|). The conditioner sees x_k before the free spline.

    Args:
        network: builder of the conditioner. Where its output has the batch innermost in memory (as that of `mlp` and of
            `residual_mlp` has), no copy is made.
        bins: K.
        bound: the splines act on [-bound, bound], in model units, and are the identity outside.
        unconditional: give the kept part splines of its own.
        split: "half" keeps the first half of the components or channels, "alternating" the even ones.
        swap: keep and transform the other way round.
        parametrization: how parameters become knots, see `splines.durkan` and `splines.bounded`.
        identity: start as the identity: zero the network's `head`, and shift the raw derivatives (durkan) so that zero
            parameters give the identity. False is the paper's start.
        scale_logits: divide raw widths and heights by the root of the network's `width`, where it has one.
    Source: Durkan et al. 2019 (Neural Spline Flows), sections 3.1, 3.2 and appendix B.
    """

    def __init__(
        self,
        network: Callable[..., Network],
        bins: int = 8,
        bound: float = 3.0,
        unconditional: bool = False,
        split: Split = "half",
        swap: bool = False,
        parametrization: Parametrization = "durkan",
        identity: bool = True,
        scale_logits: bool = True,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        check_spline("spline_coupling", bins, bound)
        super().__init__(network, 3 * bins - 1, split, swap, identity, shape, num_classes, condition_shape)
        self.bound, self.parametrization, self.identity = bound, parametrization, identity
        width = getattr(self.network, "width", None) if scale_logits else None
        self.scale = 1.0 if width is None else width**-0.5
        kept = (len(self.kept), *self.shape[1:])
        own = Spline(bins, bound, parametrization, shape=kept, num_classes=None, condition_shape=None)
        self.own = own if unconditional else None

    def _transform(self, x: Tensor, kept: Tensor, condition: Condition | None, inverse: bool) -> tuple[Tensor, Tensor]:
        out = self.network(None, kept, condition)
        raw = rearrange(out, "b (p c) ... -> p c ... b", p=self.parameters_each).contiguous()
        knots = knots_of(raw, self.bound, self.parametrization, self.identity, self.scale)
        return transform_items(x, knots, self.bound, inverse)

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        kept, x = self.part(x)
        z, log_det = self._transform(x, kept, condition, False)
        if self.own is not None:
            kept, more = self.own(kept)
            log_det = log_det + more
        return self.join(kept, z), log_det

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        kept, z = self.part(z)
        log_det = 0.0
        if self.own is not None:
            kept, log_det = self.own.inverse(kept)
        x, more = self._transform(z, kept, condition, True)
        return self.join(kept, x), log_det + more


@register(Bijection, "affine_coupling")
class AffineCoupling(Coupling):
    """z_t = scale(x_k) ⊙ x_t + shift(x_k), z_k = x_k; scale = sigmoid(a + 2) + 1e-3, log_det = Σ log scale.

    Args:
        network: builder of the conditioner, which gives shift | a.
        split: "half" keeps the first half of the components or channels, "alternating" the even ones.
        swap: keep and transform the other way round.
        identity: start the network's `head` at zero, so that the first map is x_t ↦ 0.88 x_t.
    Source: Dinh et al. 2017 (Real NVP), section 3.2, with the scale of Durkan et al. 2019 (Neural Spline Flows).
    """

    def __init__(
        self,
        network: Callable[..., Network],
        split: Split = "half",
        swap: bool = False,
        identity: bool = True,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__(network, 2, split, swap, identity, shape, num_classes, condition_shape)

    def _scale_shift(self, kept: Tensor, condition: Condition | None) -> tuple[Tensor, Tensor]:
        shift, a = self.network(None, kept, condition).chunk(2, 1)
        return torch.sigmoid(a + 2) + 1e-3, shift

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        kept, x = self.part(x)
        scale, shift = self._scale_shift(kept, condition)
        return self.join(kept, scale * x + shift), sum_items(scale.log())

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        kept, z = self.part(z)
        scale, shift = self._scale_shift(kept, condition)
        return self.join(kept, (z - shift) / scale), -sum_items(scale.log())
