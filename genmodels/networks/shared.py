"""One network for all steps of a flow (NanoFlow): a step keeps an embedding, gates and a last layer of its own."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..registry import ConfigError, names, register
from ..schema import MEMBERS
from ..types import Condition, Shape
from .network import Modulation, Network, Shareable


class Scope:
    """What the copies of repeated layers share, by key: the estimators of `shared` networks."""

    def __init__(self) -> None:
        self.held: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is held under a key; made by the first who asks."""
        if key not in self.held:
            self.held[key] = make()
        return self.held[key]


class _Trunk(NamedTuple):
    """What the steps share.

    Args:
        maps: e -> the biases of all sites, one after another; None if nothing is added.
        drawn: the embeddings that steps have started from so far.
    """

    estimator: Shareable
    maps: nn.Linear | None
    drawn: list[Tensor]


@register(Network, "shared")
class Shared(Network):
    """One network for all steps inside a `repeat`: step k is out = head_k(g(x; e_k, γ_k)) with one g for all k.

    What a step has of its own is small: a last layer head_k, an embedding e_k in R^E, and one gate γ_k per channel of
    each layer. K steps with H hidden units so cost O(H² + K(H + head)) parameters instead of O(K H²).

    "concat" joins e_k to the items: E more components of vectors; of images E more channels, which hold a learned map
    per step that starts as N(0, 1) noise, with a normalisation per channel that starts at its mean and deviation.
    "add" adds W e_k + b to the pre-activation of each layer or block, with one (W, b) for all steps.
    "gate" multiplies the branch of each layer or block by 1 + γ_k (of `glow`, by exp γ_k), from γ_k = 0 on.

    The embeddings of the steps start orthonormal as long as E allows. Networks in one `repeat` share if their
    configurations, the shapes in and out and the conditions are equal; where the resolution changes, each level has a
    `repeat` of its own.

    Args:
        of: the network g: any that lets its layers be told which step they serve and its last layer be replaced.
        embedding: E; 0 for none.
        inject: how a step is told apart. None at all is "decomp" of the paper with a projection of its own, and "naive"
            with a shared one; ["add", "gate"] is its audio model, ["concat", "gate"] its image model.
        projection: whether each step has a last layer of its own.
    Raises:
        ConfigError: outside of a `repeat`; if E and `inject` contradict each other; if the network cannot be shared.
    Source: Lee et al. 2020 (NanoFlow), section 3.
    """

    hands_on = True
    advice: ClassVar = {"scope": "Put `shared` into the layers of a `repeat`: it shares one network among its steps."}

    def __init__(
        self,
        of: Callable[..., Network],
        embedding: int = 0,
        inject: tuple[Literal["concat", "add", "gate"], ...] = (),
        projection: Literal["own", "shared"] = "own",
        *,
        in_shape: Shape,
        out_shape: Shape,
        timed: bool,
        num_classes: int | None,
        condition_shape: Shape | None,
        scope: Scope,
    ) -> None:
        super().__init__()
        _check(embedding, inject)
        self.in_shape, self.out_shape, self.inject = tuple(in_shape), tuple(out_shape), tuple(inject)
        joined = embedding if "concat" in inject else 0
        sizes = {"in_shape": (self.in_shape[0] + joined, *self.in_shape[1:]), "out_shape": self.out_shape}
        sizes |= {"timed": timed, "num_classes": num_classes, "condition_shape": condition_shape}
        settings = (embedding, tuple(inject), projection)
        key = ("shared", _identity(of), settings, tuple(sizes.items()))
        trunk = scope.get(key, partial(_trunk, of, *settings, sizes))
        self.estimator, self.maps = trunk.estimator, trunk.maps
        self.head = trunk.estimator.head if projection == "shared" else trunk.estimator.new_head()
        self.embedding = self.map = self.log_scale = self.shift = self.gates = self.biases = None
        if "add" in inject or (joined and len(self.in_shape) == 1):
            self.embedding = nn.Parameter(_another(trunk.drawn, embedding))
        if joined and len(self.in_shape) > 1:
            self._start_map(torch.randn(joined, *self.in_shape[1:]))
        if "gate" in inject:
            self.gates = nn.Parameter(torch.zeros(sum(site.gate for site in self.estimator.sites)))
        self._cached: tuple[list[Tensor], list[int], Tensor] | None = None

    def _start_map(self, noise: Tensor) -> None:
        axes = list(range(1, noise.ndim))
        self.map = nn.Parameter(noise)
        deviation = noise.std(axes, keepdim=True) if noise[0].numel() > 1 else torch.ones_like(noise)
        self.log_scale = nn.Parameter(-deviation.log())
        self.shift = nn.Parameter(-noise.mean(axes, keepdim=True) / deviation)

    @property
    def width(self) -> int:
        """Number of features that the head reads, of networks that tell."""
        return self.estimator.width

    @property
    def order(self) -> Tensor:
        """The order of the components, of a network that is masked."""
        return self.estimator.order

    @property
    def sweep(self) -> Callable[..., Any]:
        """Of a masked network: its outputs for one variable after another, as this step."""
        return partial(self.estimator.sweep, modulation=self.modulation(), head=self.head)

    @property
    def rows(self) -> Callable[..., Any]:
        """Of a network that is causal along rows: its outputs for one row after another, as this step."""
        if "concat" in self.inject:
            raise ConfigError("shared: evaluation row by row goes without concat. Use inject: [add, gate].")
        return partial(self.estimator.rows, modulation=self.modulation(), head=self.head)

    def forward(self, t: Tensor | None, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.check_items(x)
        features = self.estimator.features(t, self._joined(x), condition, self.modulation())
        return self.estimator.finish(self.head, features)

    def initialize(self, x: Tensor, condition: Condition | None = None) -> None:
        """Start the normalisations inside the shared network; they keep what the first step gave them."""
        self.estimator.initialize(self._joined(x), condition)

    def _joined(self, x: Tensor) -> Tensor:
        """x with what "concat" joins to it."""
        if "concat" not in self.inject:
            return x
        e = self.embedding if self.map is None else self.log_scale.exp() * self.map + self.shift
        return torch.cat((x, e.to(x.dtype).expand(len(x), *e.shape)), 1)

    def modulation(self) -> list[Modulation] | None:
        """What each site of the network is told, in the arithmetic that autocast asks for; None if nothing."""
        if not {"add", "gate"} & {*self.inject}:
            return None
        sites = self.estimator.sites
        biases = self._split(self.added() if "add" in self.inject else None, [s.bias for s in sites])
        gates = self._split(self.gates, [s.gate for s in sites])
        return [Modulation(bias, gate) for bias, gate in zip(biases, gates, strict=True)]

    def _split(self, values: Tensor | None, sizes: list[int]) -> list[Tensor | None]:
        if values is None:
            return [None] * len(sizes)
        device = values.device.type
        if device != "meta" and torch.is_autocast_enabled(device):  # float32 would widen what it is added to
            values = values.to(torch.get_autocast_dtype(device))
        return [part if len(part) else None for part in values.split(sizes)]

    def added(self) -> Tensor:
        """The biases of all sites, W e_k + b.

        Where no gradient is asked for they are kept until one of W, b and e_k changes, by the versions that autograd
        counts: like autograd, this does not see what is written through `.data`.
        """
        if self.biases is not None:
            return self.biases
        parts = [self.embedding, self.maps.weight, self.maps.bias]
        plain = all(type(p) is nn.Parameter and not p.is_inference() for p in parts)
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in parts)
        if wanted or torch.is_inference_mode_enabled() or torch.compiler.is_compiling() or not plain:
            self._cached = None
            return self._project()
        versions = [p._version for p in parts]
        if self._cached is None or self._cached[1] != versions or not all(map(_same, self._cached[0], parts)):
            # the views keep the memory, so that no other tensor can come to lie at the same place
            self._cached = ([p.detach() for p in parts], versions, self._project())
        return self._cached[2]

    def _project(self) -> Tensor:
        if self.embedding.is_meta:
            return self.maps(self.embedding)
        with torch.autocast(self.embedding.device.type, enabled=False):
            return self.maps(self.embedding)

    def foldable(self) -> tuple[list[nn.Parameter], int]:
        """Parameters that inference can do without, and how many numbers it keeps in their place."""
        if self.maps is None:
            return [], 0
        own = [] if self._joins_embedding else [self.embedding]
        return [*own, *self.maps.parameters()], self.maps.out_features

    @property
    def _joins_embedding(self) -> bool:
        return "concat" in self.inject and self.map is None

    @torch.no_grad()
    def fold(self) -> None:
        """Keep the biases W e_k + b in place of W, b and e_k."""
        if self.maps is None:
            return
        self.biases = nn.Parameter(self._project().clone(), requires_grad=False)
        self.maps, self._cached = None, None
        self.embedding = self.embedding if self._joins_embedding else None


def fold_embeddings(model: nn.Module) -> None:
    """Replace the embeddings of all `shared` networks of a model by the biases that they amount to, for inference.

    In place; the function stays what it is, and the number of parameters becomes that of `inference_parameters`. The
    folded model has other tensors than its checkpoint: load weights before folding.
    """
    for module in model.modules():
        if isinstance(module, Shared):
            module.fold()


def _check(embedding: int, inject: tuple[str, ...]) -> None:
    told = [way for way in inject if way != "gate"]
    if len(set(inject)) < len(inject):
        raise ConfigError(f"shared.inject: each way counts once, found {list(inject)}.")
    if embedding < 0 or (embedding == 0 and told):
        raise ConfigError(
            f"shared: inject={list(inject)} needs an embedding of at least 1 number, found embedding={embedding}. Set "
            "embedding (16, say), or leave concat and add out."
        )
    if embedding and not told:
        raise ConfigError(
            f"shared: embedding={embedding} has no use with inject={list(inject)}. Name concat or add in inject, or "
            "set embedding: 0."
        )


def _trunk(of: Callable[..., Network], embedding: int, inject: tuple[str, ...], projection: str, sizes: dict) -> _Trunk:
    """The network for all steps, with the map of embeddings to biases.

    Raises:
        ConfigError: if it cannot be shared, or not in this way.
    """
    node = getattr(of, "node", {"name": getattr(of, "__name__", "this network")})
    if "concat" in inject and hasattr(MEMBERS[Network].get(node["name"]), "sweep"):
        raise ConfigError(
            f"shared: {node['name']} is masked, and an embedding among its inputs would break the order of the "
            "components. Use inject: [add, gate]."
        )
    estimator = of(**sizes)
    if not isinstance(estimator, Shareable):
        known = [name for name in names(Network) if issubclass(MEMBERS[Network][name], Shareable)]
        raise ConfigError(
            f"shared.of: {node['name']} cannot be shared: its layers cannot be told which step they serve. Those that "
            f"can: {', '.join(known)}."
        )
    if any(isinstance(m, _BatchNorm) for m in estimator.modules()):
        raise ConfigError(
            f"shared.of: {node['name']} with batch normalisation cannot be shared: its running averages would mix the "
            "steps, and it would cancel what is added to its channels. Set batch_norm: false."
        )
    counts = {"add": sum(site.bias for site in estimator.sites), "gate": sum(site.gate for site in estimator.sites)}
    for way in {"add", "gate"} & {*inject}:
        if not counts[way]:
            raise ConfigError(f"shared.inject: {node['name']} as configured has no layer for '{way}'. Leave it out.")
    if projection == "own":
        estimator.head = nn.Identity()  # each step has its own
    maps = None
    if "add" in inject:
        maps = nn.Linear(embedding, counts["add"])
        nn.init.kaiming_normal_(maps.weight)
        nn.init.zeros_(maps.bias)
    return _Trunk(estimator, maps, [])


def _another(drawn: list[Tensor], size: int) -> Tensor:
    """A random unit vector, orthogonal to those drawn since the last `size` of them filled the space; noted there."""
    e = torch.randn(size, dtype=torch.float64)
    for other in drawn[len(drawn) // size * size :]:
        e = e - (e @ other) * other
    drawn.append(e / e.norm())
    return drawn[-1].to(torch.get_default_dtype())


def _identity(of: Callable[..., Network]) -> Any:
    node = getattr(of, "node", None)
    return of if node is None else json.dumps(node, sort_keys=True)


def _same(kept: Tensor, now: Tensor) -> bool:
    return kept.data_ptr() == now.data_ptr() and kept.dtype == now.dtype and kept.shape == now.shape
