"""The contract of every network: `(t, x, condition) -> out`, with autocast, recomputation and compilation from outside.

What a run decides about arithmetic and memory is set on a model with `set_autocast`, `set_gradient_checkpointing` and
`set_compile`, and acts inside its networks and nowhere else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..registry import ConfigError, kind
from ..types import Condition, Shape
from .attention import Attention


@kind
class Network(nn.Module, ABC):
    """A neural network from items of `in_shape` to items of `out_shape`.

    Constructors take configuration arguments first; the parent supplies `in_shape`, `out_shape`, `timed` (whether t is
    given), `num_classes` and `condition_shape` by keyword. A condition of class labels may hold the value
    `num_classes`, which stands for "no label"; `condition=None` stands for that in every row.

    Attributes:
        in_shape: shape of one item in, without the batch axis.
        autocast: dtype for the arithmetic inside, None for the parameters' own. Inputs arrive and outputs leave in the
            caller's dtype, so nothing outside the network ever sees reduced precision.
        checkpointing: whether training keeps only what enters a block, and computes its inside again in backward.
        charges: whether training has penalties of this network to add to the loss (see `equilibrium.charges`).
        blockwise: whether `forward` passes its blocks through `recompute`; if not, the whole forward is one block.
    """

    in_shape: Shape
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    charges: bool = False
    blockwise: ClassVar[bool] = False

    def __call__(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        if self.autocast is None:
            return self._run(t, x, condition)
        with torch.autocast(x.device.type, dtype=self.autocast):
            return self._run(t, x, condition).to(x.dtype)

    def _run(self, *inputs: Any) -> Tensor:
        call = super().__call__
        return call(*inputs) if self.blockwise else self.recompute(call, *inputs)

    def recompute(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """block(*inputs); with checkpointing in training, its intermediate results are not kept but computed again.

        The second computation has the random numbers and the autocast of the first, so that gradients are the same.
        Source: Chen et al. 2016 (Training deep nets with sublinear memory cost), section 4.
        """
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    @abstractmethod
    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, *out_shape] from t of shape [] or [B] (None if not timed), x [B, *in_shape] and a condition [B, *]."""

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        """Set what depends on data (norms inside) from one batch x [B, *in_shape], once; called in `prepare`."""

    def passed(self, items: int) -> None:
        """Told of items that went through the network by another way than a call: row by row, in a sweep.

        It does nothing; who counts evaluations puts a counter in its place.
        """

    def attention(self) -> Sequence[Attention]:
        """Its self-attention layers in the order in which they run; empty if it has none."""
        return ()

    def check_items(self, x: Tensor) -> None:
        """Raises ValueError unless x is [B, *in_shape]."""
        if tuple(x.shape[1:]) != tuple(self.in_shape) or x.ndim == 0:
            raise ValueError(
                f"{self.registered_name}: x has shape {list(x.shape)}, but this network was built for "
                f"[{', '.join(map(str, ('B', *self.in_shape)))}]. Build it with in_shape=x.shape[1:]."
            )


class Site(NamedTuple):
    """A place in a network where it can be told which of several steps it serves, with its numbers of channels.

    Args:
        bias: of what is added to a layer's pre-activation.
        gate: of what multiplies the layer's branch.
    """

    bias: int
    gate: int


class Modulation(NamedTuple):
    """What a site receives: a bias [site.bias], and a gate [site.gate] of which 0 changes nothing; None for neither."""

    bias: Tensor | None = None
    gate: Tensor | None = None


class Shareable(Network):
    """A network of which several steps of a flow can use one trunk: `out = finish(head, features(t, x, condition))`.

    Attributes:
        sites: where modulation enters, one for each layer or block.
        head: the last layer, which a step may replace by one of its own.
    """

    sites: tuple[Site, ...]
    head: nn.Module

    @abstractmethod
    def features(
        self,
        t: Tensor | None,
        x: Tensor,
        condition: Condition | None = None,
        modulation: Sequence[Modulation] | None = None,
    ) -> Tensor:
        """What the head reads, for x [B, *in_shape], with one modulation per site or none."""

    @abstractmethod
    def new_head(self) -> nn.Module:
        """Another head with a start of its own."""

    @abstractmethod
    def finish(self, head: nn.Module, features: Tensor) -> Tensor:
        """[B, *out_shape] from features, by this head or another one."""

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        return self.finish(self.head, self.features(t, x, condition))


def zero_head(network: Network) -> None:
    """Zero the parameters of the last layer of a network (its attribute `head`), where it has one."""
    head = getattr(network, "head", None)
    for parameter in head.parameters() if isinstance(head, nn.Module) else ():
        nn.init.zeros_(parameter)


def check_images(name: str, in_shape: Shape, out_shape: Shape) -> None:
    """Raises ConfigError unless both are shapes [C, H, W] of images of one size."""
    if len(in_shape) != 3 or len(out_shape) != 3 or in_shape[1:] != out_shape[1:]:
        raise ConfigError(
            f"{name}: images [C, H, W] of one size are needed, found items of shape {list(in_shape)} in and "
            f"{list(out_shape)} out. Use mlp or residual_mlp for vectors."
        )


def check_timed(timed: bool, t: Tensor | None) -> None:
    """Raises ValueError if t is missing from a network with time, or given to one without."""
    if (t is None) == timed:
        found, built = ("no time", "with") if t is None else ("a time", "without")
        raise ValueError(f"{found} was given to a network built {built} time. Build it with timed={t is not None}.")


def networks(model: nn.Module) -> list[Network]:
    """The outermost networks of a model: not those that are parts of another."""
    found: list[Network] = []

    def visit(module: nn.Module) -> None:
        if isinstance(module, Network):
            found.append(module)
            return
        for child in module.children():
            visit(child)

    visit(model)
    return list({id(n): n for n in found}.values())


def check_charges(model: nn.Module, collects: bool) -> None:
    """Raises ConfigError if networks inside have penalties to add to a loss that does not collect them."""
    for part in model.modules():
        if not collects and isinstance(part, Network) and part.charges:
            raise ConfigError(
                f"{part.registered_name}: {type(model).__name__} does not add the penalties of its networks to its "
                "loss. Set the network's skip and jacobian to 0."
            )


def set_autocast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Make every network of a model compute in `dtype` (None: as its parameters are)."""
    for network in networks(model):
        network.autocast = dtype


def set_gradient_checkpointing(model: nn.Module, on: bool = True) -> None:
    """Make every network of a model trade time for memory in training: one more forward pass for a step."""
    for network in networks(model):
        network.checkpointing = on


def set_compile(model: nn.Module, backend: str = "inductor") -> None:
    """Compile every network of a model with torch.compile at its first call, in place: names of tensors stay.

    A second batch size makes the first axis symbolic, so that further sizes compile little or nothing. Networks of one
    class do not count against each other's limit of graphs (torch 2.13 or later).

    Args:
        backend: a name that torch.compile knows.
    Raises:
        ConfigError: if the model's loss differentiates its network twice, which compiled code cannot.
    """
    if any(getattr(part, "differentiates_twice", False) for part in model.modules()):
        raise ConfigError(
            f"train.compile: the loss of {type(model).__name__} differentiates its network, and compiled code has no "
            "second derivative. Set train.compile=false."
        )
    own = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    for network in networks(model):
        network.compile(backend=backend, **own)
