"""Transforms of the package nflows as bijections of ours. It is imported where it is used: it takes half a second."""

import inspect
import math
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.network import Network
from ..registry import ConfigError, register
from ..schema import near
from ..types import Condition, Shape
from .bijection import Bijection

ACTIVATIONS = ("celu", "elu", "gelu", "leaky_relu", "mish", "relu", "selu", "silu", "softplus", "tanh")


@register(Bijection, "nflows")
class NflowsBijection(Bijection):
    """Any transform of the package nflows: its forward is ours, from data to latent.

    Conditions arrive at the transform as its `context`, one vector an item: labels one-hot (a label `num_classes`,
    which means "none", and no condition at all as zeros), vectors flattened. Transforms without a context ignore them.
    From Python, `NflowsBijection.of(transform, shape)` holds a transform that is built already.

    ActNorm and BatchNorm take their start from the batch of `initialize`, never from the first training batch, so that
    replicas start alike. BatchNorm measures each training batch thereafter: items then see their batch, there is no
    inverse in training mode, and replicas keep running averages of their own shares.

    Args:
        transform: the name of a class in nflows.transforms.
        arguments: for its constructor. What is not given is filled in from the shape of the items where the class asks
            for it: `features`, `num_channels`, `shape`, `img_shape`, `mask` (the odd places are transformed) and
            `context_features`; lists become tensors for `permutation`, names functions for `activation`, and
            `{transform: …, arguments: …}` a transform, where one is needed.
        network: the conditioner of a coupling.
    Raises:
        ConfigError: if there is no such transform, if its arguments do not fit, or if it cannot be inverted.
        ValueError: if it does not take items of this shape; if values are outside its domain.
    Source: Durkan et al. 2020 (nflows: normalizing flows in PyTorch).
    """

    def __init__(
        self,
        transform: str,
        arguments: dict[str, Any] | None = None,
        network: Callable[..., Network] | None = None,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
    ) -> None:
        super().__init__()
        width = num_classes or (math.prod(condition_shape) if condition_shape is not None else None)
        made = _Maker(tuple(shape), width, network)
        module = made.make(transform, arguments or {}, "nflows")
        if network is not None and not made.used_network:
            raise ConfigError(f"nflows: {transform} has no conditioner. Drop network.")
        self._hold(module, shape, num_classes, condition_shape, made.takes_context)

    @classmethod
    def of(
        cls,
        transform: nn.Module,
        shape: Shape,
        *,
        num_classes: int | None = None,
        condition_shape: Shape | None = None,
    ) -> "NflowsBijection":
        """A transform that is built already, given a context if `num_classes` or `condition_shape` is given.

        Example: `NflowsBijection.of(CompositeTransform([LULinear(2), Tanh()]), (2,))`
        """
        held = cls.__new__(cls)
        Bijection.__init__(held)
        conditional = num_classes is not None or condition_shape is not None
        held._hold(transform, shape, num_classes, condition_shape, conditional)
        return held

    def _hold(
        self, transform: nn.Module, shape: Shape, classes: int | None, vectors: Shape | None, takes_context: bool
    ) -> None:
        self.transform, self.shape = transform, tuple(shape)
        self.num_classes = classes if takes_context else None
        self.condition_shape = vectors if takes_context else None
        self.register_load_state_dict_post_hook(_forget)
        _check_inverse(transform)
        self._out_shape = self._measure()
        self.train()

    @property
    def out_shape(self) -> Shape:
        return self._out_shape

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._call(self.transform, x, condition, self.out_shape)

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self._call(self.transform.inverse, z, condition, self.shape)

    def train(self, mode: bool = True) -> "NflowsBijection":
        super().train(mode)
        for layer in self._all("ActNorm"):
            layer.training = False  # where it would set itself from whatever comes first; nothing else depends on it
        return self

    @torch.no_grad()
    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        """Set every ActNorm, and the running averages of every BatchNorm, from x [B, *shape], once.

        An ActNorm that forward does not pass (inside an InverseTransform) stays the identity.

        Raises:
            ValueError: if something does not vary in x, so that it has no scale.
        """
        act_norms = [layer for layer in self._all("ActNorm") if not layer.initialized]
        batch_norms = [layer for layer in self._all("BatchNorm") if not layer.running_var.any()]
        if not act_norms + batch_norms:
            return
        training, momenta = self.training, [layer.momentum for layer in batch_norms]
        self.eval()
        for layer in act_norms + batch_norms:
            layer.training, layer.momentum = True, 1.0
        try:
            self(x, condition)
        finally:
            for layer, momentum in zip(batch_norms, momenta, strict=True):
                layer.momentum = momentum
            self.train(training)
        for layer in act_norms:
            layer.initialized = torch.tensor(True, device=layer.log_scale.device)
        for name, value in self.state_dict().items():
            if not value.isfinite().all():
                raise ValueError(
                    f"nflows: {name} is not finite after its start from {len(x)} items: there must be at least two, "
                    "and every component or channel must vary. Use `act_norm`, which leaves constant channels alone."
                )

    def _call(
        self, function: Callable[..., Any], x: Tensor, condition: Condition | None, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        from nflows.transforms import InputOutsideDomain, InverseNotAvailable

        if len(x) == 0:  # nflows looks at the extremes of its inputs
            return x.reshape(0, *shape), x.new_zeros(0, dtype=torch.float64)
        try:
            y, log_det = function(x, self._context(condition, x))
        except InputOutsideDomain as error:
            raise ValueError(_outside(error)) from error
        except InverseNotAvailable as error:
            raise ValueError(f"nflows: {_culprit(error.__traceback__)[0]} has no inverse here. {error}") from error
        except AssertionError as error:
            raise ValueError(
                f"nflows: {_culprit(error.__traceback__)[0]} failed a check of its own, in a spline by rounding. Use "
                "float64, or a spline of genmodels (`coupling`, `elementwise`), which does not fail."
            ) from error
        return y, log_det.to(x.device, torch.float64)

    def _context(self, condition: Condition | None, x: Tensor) -> Tensor | None:
        """[B, width], or None for a transform without context."""
        if self.num_classes is not None:
            none = torch.full((len(x),), self.num_classes, device=x.device)
            labels = none if condition is None else condition
            return F.one_hot(labels, self.num_classes + 1)[:, :-1].to(x.dtype)
        if self.condition_shape is not None:
            width = math.prod(self.condition_shape)
            return x.new_zeros(len(x), width) if condition is None else condition.flatten(1).to(x.dtype)
        return None

    @torch.no_grad()
    def _measure(self) -> Shape:
        """The shape of z for items of `shape`, by a dry run."""
        name = type(self.transform).__name__
        self.eval()
        like = next((v for v in self.state_dict().values() if v.is_floating_point()), torch.zeros(()))
        try:
            z, log_det = self._call(self.transform, like.new_full((2, *self.shape), 0.5), None, self.shape)
        except (RuntimeError, TypeError, IndexError, AttributeError, ValueError) as error:
            hint = " Put `flatten` before a transform of vectors." if len(self.shape) > 1 else ""
            raise ValueError(f"nflows: {name} does not take items of shape {self.shape}: {error}.{hint}") from error
        if log_det.shape != (2,) or z.numel() != 2 * math.prod(self.shape):
            raise ValueError(
                f"nflows: {name} is no bijection of items of shape {self.shape}: it gives items of shape "
                f"{tuple(z.shape[1:])} and, for a batch of 2, log-determinants of shape {tuple(log_det.shape)}."
            )
        return tuple(z.shape[1:])

    def _all(self, name: str) -> list[Any]:
        """The layers of that class in nflows.transforms."""
        import nflows.transforms

        cls = getattr(nflows.transforms, name)
        return [layer for layer in self.transform.modules() if isinstance(layer, cls)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NflowsBijection":
        super()._apply(fn, recurse)
        _forget(self)
        for layer in self.transform.modules():
            for name, value in vars(layer).items():
                if isinstance(value, Tensor) and value.ndim:  # Sigmoid's temperature is not registered
                    setattr(layer, name, fn(value))
        return self


class _Conditioner(nn.Module):
    """A network of ours where nflows calls one of its own."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        if isinstance(width := getattr(network, "width", None), int):
            self.hidden_features = width  # nflows divides the logits of its splines by the root of this

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.network(None, inputs, context)


class _Maker:
    """Builds transforms by name for items of one shape and contexts of one width."""

    def __init__(self, shape: Shape, width: int | None, network: Callable[..., Network] | None) -> None:
        self.shape, self.width, self.network = shape, width, network
        self.takes_context = self.used_network = False

    def make(self, name: str, arguments: dict[str, Any], where: str) -> nn.Module:
        cls = _class(name, where)
        known = inspect.signature(cls).parameters if cls.__init__ is not nn.Module.__init__ else {}
        for key in arguments:
            if key not in known:
                listed = ", ".join(k for k in known if k != "transform_net_create_fn") or "none"
                raise ConfigError(f"{where}: {name} has no argument '{key}'.{near(key, known)} It has: {listed}.")
        given = {key: self._value(key, value, where) for key, value in arguments.items()}
        given |= {key: value for key, value in self._sizes(known) if key not in given}
        for key, parameter in known.items():
            if parameter.default is parameter.empty and key not in given:
                key = "network" if key == "transform_net_create_fn" else f"arguments.{key}"
                raise ConfigError(f"{where}: {name} needs {key}.")
        if name == "MultiscaleCompositeTransform":
            raise ConfigError(f"{where}: {name} is put together in Python; NflowsBijection.of takes it.")
        self.takes_context |= self.width is not None and given.get("context_features") is not None
        try:
            return cls(**given)
        except (TypeError, ValueError, AssertionError) as error:
            shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise ConfigError(
                f"{where}: {name}({shown}) is refused by nflows: {error or 'no reason given'}."
            ) from error

    def _sizes(self, known: Any) -> Iterator[tuple[str, Any]]:
        """What the class asks for and the shape of the items tells."""
        sizes = {"shape": list(self.shape), "context_features": self.width, "img_shape": list(self.shape[1:]) or None}
        if self.shape:
            first = self.shape[0]
            sizes |= {"features": first, "num_channels": first, "mask": [i % 2 for i in range(first)]}
        if self.network is not None:
            sizes["transform_net_create_fn"] = self._conditioner
        return ((key, value) for key, value in sizes.items() if key in known)

    def _value(self, key: str, value: Any, where: str) -> Any:
        if key == "permutation":
            return torch.tensor(value)
        if key == "activation":
            if value not in ACTIVATIONS:
                raise ConfigError(f"{where}: activation must be one of {', '.join(ACTIVATIONS)}, found {value!r}.")
            return getattr(F, value)
        if isinstance(value, (list, tuple)):
            return [self._value("", item, f"{where}.{key}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, dict) and "transform" in value:
            return self.make(value["transform"], value.get("arguments") or {}, f"{where}.{key}".rstrip("."))
        return value

    def _conditioner(self, inputs: int, outputs: int) -> nn.Module:
        self.used_network = True
        self.takes_context |= self.width is not None
        rest = self.shape[1:]
        network = self.network(
            in_shape=(inputs, *rest),
            out_shape=(outputs, *rest),
            timed=False,
            num_classes=None,
            condition_shape=None if self.width is None else (self.width,),
        )
        return _Conditioner(network)


def _class(name: Any, where: str) -> type[nn.Module]:
    import nflows.transforms as library

    found = {
        key: value
        for key, value in vars(library).items()
        if isinstance(value, type) and issubclass(value, library.Transform) and value is not library.Transform
    }
    if name not in found:
        known = ", ".join(sorted(found))
        raise ConfigError(f"{where}: nflows.transforms has no transform {name!r}.{near(name, found)} Known: {known}.")
    return found[name]


def _check_inverse(transform: nn.Module) -> None:
    """Raises ConfigError for a dense layer whose inverse this torch no longer has the function for."""
    from nflows.transforms import NaiveLinear

    layer = next((layer for layer in transform.modules() if isinstance(layer, NaiveLinear)), None)
    if layer is None:
        return
    try:
        layer.inverse(layer.bias.detach()[None])
    except (RuntimeError, AttributeError) as error:
        first = str(error).split(".")[0]
        raise ConfigError(
            f"nflows: NaiveLinear could be trained, but not inverted: {first}. Use LULinear, QRLinear or SVDLinear."
        ) from None


def _forget(held: NflowsBijection, keys: Any = None) -> None:
    """Drop the weights that linear layers with `using_cache` keep in eval mode: they are others now."""
    for layer in held.transform.modules():
        if hasattr(layer, "cache") and hasattr(layer.cache, "invalidate"):
            layer.cache.invalidate()


def _culprit(trace: TracebackType | None) -> tuple[str, Tensor | None]:
    """The innermost transform in a traceback, and the innermost tensor called `inputs` at or below it."""
    from nflows.transforms import Transform

    name, inputs = "a transform", None
    while trace is not None:
        seen = trace.tb_frame.f_locals
        name = type(seen["self"]).__name__ if isinstance(seen.get("self"), Transform) else name
        inputs = seen["inputs"] if isinstance(seen.get("inputs"), Tensor) else inputs
        trace = trace.tb_next
    return name, inputs


def _outside(error: Exception) -> str:
    """What was found where, for an InputOutsideDomain."""
    name, inputs = _culprit(error.__traceback__)
    domain = "(-1, 1), the range of tanh" if name == "Tanh" else "[0, 1]"
    found = "" if inputs is None else f", found values from {inputs.min():.6g} to {inputs.max():.6g}"
    advice = "" if name in ("Tanh", "Sigmoid") else " A spline with `tails: linear` takes every number."
    return f"nflows: {name} takes values in {domain}{found}.{advice}"
