"""Weights of flows of the package nflows in flows of ours and back: names, orders of rows, and starts differ."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from .bijection import Bijection, Chain, Inverse
from .flow import NormalizingFlow
from .image import Multiscale, Squeeze
from .linear import Conv1x1, Flatten, Permutation
from .nflows_layers import LAYERS, Pair, State

PREFIX = re.compile(r"(?:_transforms\.\d+\.|_transform\.)*")
SHOWN = 20  # differences in a message


@torch.no_grad()
def load_nflows(flow: NormalizingFlow, state: Mapping[str, Tensor] | str | Path) -> None:
    """Give a flow the weights of a flow of nflows that has the same architecture; log p(x) is the same thereafter.

    The layers with parameters must come in the same order on both sides, however they are nested. What leaves no trace
    in weights must agree as well: activations, the bound of splines, dropout, the base law, and no transform to model
    space. Couplings and autoregressive layers need `residual_mlp`, `resnet` or `made` with the activation of theirs.

    Args:
        state: the state dict of an nflows `Flow` or of its transform, or a file that holds one: .safetensors, or one
            of `torch.save`, of which nothing but tensors is read.
    Raises:
        ValueError: if it does not fit, with the differences layer by layer; the flow is as it was then.
    Source: Durkan et al. 2020 (nflows: normalizing flows in PyTorch).
    """
    theirs = _read(state) if isinstance(state, (str, Path)) else _tensors(state, "state")
    layers, groups = list(_leaves(flow.layers, "layers", "_transform.")), _groups(theirs)
    differences = _order(layers, groups)
    for leaf, (prefix, group) in zip(layers, groups, strict=False):
        differences += [f"{leaf.path} ({leaf.name}) <- {prefix or 'state'}: {d}" for d in leaf.differences(group)]
    if differences:
        more = [f"… and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        listed = "\n  ".join(differences[:SHOWN] + more)
        raise ValueError(
            f"load_nflows: the state dict does not fit this flow, which was left as it is:\n  {listed}\n"
            "Build the flow with the layers, widths, blocks, bins and masks that the weights come from."
        )
    for leaf, (_, group) in zip(layers, groups, strict=True):
        leaf.load(group)


def export_nflows(flow: NormalizingFlow, like: Mapping[str, Tensor] | None = None) -> State:
    """The weights of a flow as a state dict that an nflows `Flow` of the same architecture loads with strict=True.

    Args:
        like: the state dict of that `Flow`, for the nesting of its transforms. Without it, names are those of
            `Flow(CompositeTransform([…]), StandardNormal([D]))` with one transform for each of our layers, in order,
            those inside `repeat` among them.
    Raises:
        ValueError: if a layer has no counterpart in nflows, or if `like` has other tensors.
    """
    layers = list(_leaves(flow.layers, "layers", "_transform."))
    if like is None:
        return {f"{leaf.theirs}{key}": value for leaf in layers for key, value in leaf.export().items()}
    groups = _groups(dict(like))
    differences = _order(layers, groups)
    found: State = {}
    for leaf, (prefix, group) in zip(layers, groups, strict=False):
        given = leaf.export()
        differences += [f"{leaf.path} ({leaf.name}) -> {prefix}: {d}" for d in _shapes(given, group, "like")]
        found |= {f"{prefix}{key}": value for key, value in given.items()}
    if differences:
        raise ValueError("export_nflows: `like` has other tensors:\n  " + "\n  ".join(differences[:SHOWN]))
    return found


# ---- one layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """A layer with weights: its path in our flow, and where nflows would hold it if it were nested as ours."""

    path: str
    layer: Bijection
    theirs: str

    @property
    def name(self) -> str:
        return str(self.layer.registered_name)

    def export(self) -> State:
        """The layer's weights as nflows names and orders them, without the prefix."""
        return {key: value.detach().clone() for key, value in self._pair().out(self.layer).items()}

    def differences(self, group: State) -> list[str]:
        """What of theirs is missing, too much, of another shape, or of another order or mask."""
        own = self.export()
        found = _shapes(own, group, "state")
        if found:
            return found
        if isinstance(self.layer, (Permutation, Conv1x1)):
            key = next(key for key in group if key.endswith("_permutation"))
            n = len(group[key])
            return [] if group[key].sort().values.tolist() == list(range(n)) else [f"{key} is no order of 0 … {n - 1}"]
        fixed = [key for key in own if key.split(".")[-1] in ("transform_features", "identity_features", "mask")]
        return [
            f"{key} differs: {_short(group[key])} in the state, {_short(own[key])} here"
            for key in fixed
            if not torch.equal(group[key].to(own[key]), own[key])
        ]

    def load(self, group: State) -> None:
        self.layer.load_state_dict(self._pair().into(self.layer, group))

    def _pair(self) -> Pair:
        if type(self.layer) not in LAYERS:
            raise ValueError(f"nflows: {self.path} ({self.name}) has no counterpart in nflows.")
        return LAYERS[type(self.layer)]


def _shapes(own: State, group: State, where: str) -> list[str]:
    missing = [f"{key} {list(own[key].shape)} is missing" for key in own if key not in group]
    unexpected = [f"{key} {list(group[key].shape)} is unexpected" for key in group if key not in own]
    other = [
        f"{key} has shape {list(group[key].shape)} in the {where}, {list(own[key].shape)} here"
        for key in own
        if key in group and group[key].shape != own[key].shape
    ]
    return missing + unexpected + other


def _short(values: Tensor) -> str:
    return str(values.tolist()) if values.numel() <= 16 else f"{tuple(values.shape)} numbers"


# ---- the whole ------------------------------------------------------------------------------------------------------


def _leaves(layer: Bijection, path: str, theirs: str) -> Iterator[_Leaf]:
    """The layers with weights, in the order of the data's way to the latent."""
    if isinstance(layer, Chain):
        for k, (name, part) in enumerate(_flat(layer, path)):
            yield from _leaves(part, name, f"{theirs}_transforms.{k}.")
    elif isinstance(layer, Multiscale):
        for k, level in enumerate(layer.levels):
            yield from _leaves(level, f"{path}.levels.{k}", f"{theirs}_transforms.{k}.")
    elif isinstance(layer, Inverse):
        yield from _leaves(layer.of, f"{path}.of", f"{theirs}_transform.")
    elif not isinstance(layer, (Squeeze, Flatten)):
        yield _Leaf(path, layer, theirs)


def _flat(layer: Chain, path: str) -> Iterator[tuple[str, Bijection]]:
    """The parts of a chain with their paths, those of the chains in it among them."""
    for k, part in enumerate(layer.bijections):
        name = f"{path}.bijections.{k}"
        if isinstance(part, Chain):
            yield from _flat(part, name)
        else:
            yield name, part


def _groups(state: State) -> list[tuple[str, State]]:
    """The tensors of each transform without transforms inside, by its prefix, in the order in which they act."""
    groups: dict[str, State] = {}
    for key, value in state.items():
        prefix = PREFIX.match(key)[0]
        groups.setdefault(prefix, {})[key.removeprefix(prefix)] = value
    return sorted(groups.items(), key=lambda pair: [int(part) for part in re.findall(r"\d+", pair[0])])


def _order(layers: list[_Leaf], groups: list[tuple[str, State]]) -> list[str]:
    """One line that sets both sequences side by side, if they are not equally long."""
    if len(layers) == len(groups):
        return []
    pairs = zip_longest(layers, groups)
    shown = [
        f"{'nothing' if leaf is None else leaf.name} <- {'nothing' if group is None else next(iter(group[1]))}"
        for leaf, group in pairs
    ]
    listed = ", ".join(shown[:SHOWN]) + (", …" if len(shown) > SHOWN else "")
    return [f"the flow has {len(layers)} layers with weights, the state dict {len(groups)}: {listed}"]


def _read(path: str | Path) -> State:
    """The tensors of a file.

    Raises:
        ValueError: if it is missing or damaged, or holds more than tensors.
    """
    place = Path(path)
    try:
        if place.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(place)
        found = torch.load(place, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise of many kinds
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"load_nflows: {place} cannot be read as weights ({type(error).__name__}: {reason}). Save the flow's "
            "state_dict(), with torch.save or safetensors."
        ) from error
    return _tensors(found, str(place))


def _tensors(found: object, where: str) -> State:
    """Raises ValueError unless it is a mapping of tensors."""
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        keys = f" with {', '.join(map(str, found))}" if isinstance(found, Mapping) else ""
        raise ValueError(
            f"load_nflows: {where} holds a {type(found).__name__}{keys}, a state dict of tensors is needed. Pass the "
            "part of it that is one."
        )
    return dict(found)
