"""How the layers of nflows name and order their weights, and how ours do."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..networks.made import MADE
from ..networks.mlp import ResidualMLP
from ..networks.network import Network
from ..networks.resnet import ResNet
from .autoregressive import Autoregressive
from .bijection import Bijection
from .coupling import Coupling
from .elementwise import ActNorm, Elementwise
from .linear import Conv1x1, LULinear, Permutation
from .monotone import FLOOR, Affine, Monotone, RationalQuadratic

State = dict[str, Tensor]
SHIFT = math.log(math.expm1(1 - FLOOR))  # softplus(SHIFT) + FLOOR = 1: where our maps that start as the identity begin


def _permutation_out(layer: Permutation) -> State:
    return {"_permutation": layer.order}


def _permutation_in(layer: Permutation, theirs: State) -> State:
    return {**layer.state_dict(), "order": theirs["_permutation"]}


LU = {
    "lower": "lower_entries",
    "upper": "upper_entries",
    "diagonal": "unconstrained_upper_diag",
    "bias": "bias",
}


def _lu_out(layer: LULinear) -> State:
    if len(layer.shape) != 1:
        raise ValueError("nflows: lu_linear on images has no counterpart there; conv1x1 has.")
    return {theirs: getattr(layer, ours) for ours, theirs in LU.items()}


def _lu_in(layer: LULinear, theirs: State) -> State:
    return {ours: theirs[name] for ours, name in LU.items()}


def _conv_out(layer: Conv1x1) -> State:
    if len(layer.shape) != 3 or not (layer.sign > 0).all():
        raise ValueError(
            "nflows: OneByOneConvolution takes images, and its factors have positive diagonals; for vectors use "
            "permutation and lu_linear, and leave `start` at its default."
        )
    return {**{theirs: getattr(layer, ours) for ours, theirs in LU.items()}, "permutation._permutation": layer.order}


def _conv_in(layer: Conv1x1, theirs: State) -> State:
    return {**layer.state_dict(), **_lu_in(layer, theirs), "order": theirs["permutation._permutation"]}


def _act_norm_out(layer: ActNorm) -> State:
    scale, shift = layer.log_scale.flatten(), layer.shift.flatten()
    return {"log_scale": scale, "shift": shift, "initialized": layer.initialized}


def _act_norm_in(layer: ActNorm, theirs: State) -> State:
    own = layer.state_dict()
    return {key: theirs[key].reshape(own[key].shape) for key in ("log_scale", "shift", "initialized")}


# ---- couplings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Ours = theirs[order] - shift along the rows of raw parameters."""

    order: Tensor
    shift: Tensor

    def ours(self, theirs: Tensor, bias: bool) -> Tensor:
        rows = theirs[self.order.to(theirs.device)]
        return rows - self.shift.to(rows) if bias else rows

    def theirs(self, ours: Tensor, bias: bool) -> Tensor:
        rows = ours + self.shift.to(ours) if bias else ours
        return rows[self.order.argsort().to(ours.device)]


def _bins(map: Monotone) -> int:
    """K of a map that is a spline of nflows.

    Raises:
        ValueError: if it is none.
    """
    if type(map) is not RationalQuadratic or (map.form.parametrization, map.form.tails) != ("durkan", "linear"):
        raise ValueError(
            "nflows: of the maps, rational_quadratic (parametrization: durkan, tails: linear) and affine have a "
            f"counterpart there, found {getattr(map, 'registered_name', type(map).__name__)}."
        )
    return (map.parameters + 1) // 3


def _spline_rows(map: Monotone, count: int) -> _Rows:
    """Theirs have the parameters of one number next to one another, ours all first ones, then all second ones."""
    bins = _bins(map)
    order = torch.arange(map.parameters * count).reshape(count, map.parameters).T.flatten()
    shift = torch.zeros(map.parameters, count, dtype=torch.float64)
    shift[2 * bins :] = SHIFT if map.identity else 0.0
    return _Rows(order, shift.flatten())


def _coupling_rows(layer: Coupling) -> _Rows:
    count = len(layer.transformed)
    if isinstance(layer.map, Affine):
        if layer.map.form != "sigmoid":
            raise ValueError(f"nflows: an affine coupling there has form: sigmoid, found {layer.map.form}.")
        return _Rows(torch.arange(2 * count), torch.zeros(2 * count))
    if layer.scale == 1.0 and getattr(layer.network, "width", 1) != 1:
        raise ValueError("nflows: the splines of its couplings have scale_logits: true, found false.")
    return _spline_rows(layer.map, count)


def _names(network: Network) -> dict[str, str]:
    """Our prefixes of names and theirs, of the residual networks of both."""
    if not isinstance(network, (ResidualMLP, ResNet, MADE)):
        raise ValueError(
            "nflows: of the networks, residual_mlp, resnet and made have a counterpart, found "
            f"{network.registered_name}."
        )
    if network.embeddings.active:
        raise ValueError("nflows: a network with a condition is built in another way there; its weights do not fit.")
    names = {"first.": "initial_layer.", "head.": "final_layer."}
    if isinstance(network, MADE):
        inner = "blocks.{0}.linear_layers.{1}." if network.residual else "blocks.{2}.linear."
        inner = {f"layers.{k}.": inner.format(k // 2, k % 2, k) for k in range(len(network.layers))}
        return {**names, **inner}
    inner = "conv_layers" if isinstance(network, ResNet) else "linear_layers"
    for k in range(len(network.blocks)):
        names |= {f"blocks.{k}.first.": f"blocks.{k}.{inner}.0.", f"blocks.{k}.second.": f"blocks.{k}.{inner}.1."}
        names[f"blocks.{k}.norms."] = f"blocks.{k}.batch_norm_layers."
    return names


def _masks(network: MADE, rows: _Rows) -> State:
    """What their masked layers keep beside weights: masks, and degrees, which only their constructor reads."""
    hidden, last = network.input_mask.sum(1).long(), network.places.argsort() + 1
    each = network.out_shape[0] // len(last)
    masks = {"initial_layer": (network.input_mask, hidden)}
    for theirs in list(_names(network).values())[2:]:
        masks[theirs.rstrip(".")] = (network.hidden_mask, hidden)
    masks["final_layer"] = (rows.theirs(network.output_mask, False), last.repeat_interleave(each))
    return {
        f"{name}.{key}": value
        for name, pair in masks.items()
        for key, value in zip(("mask", "degrees"), pair, strict=True)
    }


def _weights(network: Network) -> State:
    """All but the order of a `made` that drew one, which their masks tell."""
    return {key: value for key, value in network.state_dict().items() if key != "order"}


def _network_out(network: Network, rows: _Rows, prefix: str) -> State:
    found, names = {}, _names(network)
    for key, value in _weights(network).items():
        start = next(start for start in names if key.startswith(start))
        value = rows.theirs(value, key.endswith("bias")) if start == "head." else value
        found[f"{prefix}{names[start]}{key.removeprefix(start)}"] = value
    return found


def _network_in(network: Network, rows: _Rows, theirs: State, prefix: str) -> State:
    found, names = {}, _names(network)
    for key in _weights(network):
        start = next(start for start in names if key.startswith(start))
        value = theirs[f"{prefix}{names[start]}{key.removeprefix(start)}"]
        found[key] = rows.ours(value, key.endswith("bias")) if start == "head." else value
    return found


OWN = ("unnormalized_widths", "unnormalized_heights", "unnormalized_derivatives")


def _free_out(layer: Elementwise) -> State:
    """Free splines [P, C, 1, …] as widths, heights [C, K] and derivatives [C, K - 1]."""
    if len(layer.shape) != 1:
        raise ValueError("nflows: free splines there have parameters of their own at every pixel.")
    bins = _bins(layer.map)
    widths, heights, derivatives = layer.raw.flatten(1).T.split((bins, bins, bins - 1), 1)
    shift = SHIFT if layer.map.identity else 0.0
    return dict(zip(OWN, (widths, heights, derivatives + shift), strict=True))


def _free_in(layer: Elementwise, theirs: State) -> State:
    widths, heights, derivatives = (theirs[key] for key in OWN)
    shift = SHIFT if layer.map.identity else 0.0
    return {"raw": torch.cat((widths, heights, derivatives - shift), 1).T.reshape(layer.raw.shape)}


def _coupling_out(layer: Coupling) -> State:
    found = {"identity_features": layer.kept, "transform_features": layer.transformed}
    found |= _network_out(layer.network, _coupling_rows(layer), "transform_net.")
    own = {} if layer.own is None else _free_out(layer.own)
    return {**found, **{f"unconditional_transform.{key}": value for key, value in own.items()}}


def _coupling_in(layer: Coupling, theirs: State) -> State:
    network = _network_in(layer.network, _coupling_rows(layer), theirs, "transform_net.")
    found = {f"network.{key}": value for key, value in network.items()}
    if layer.own is None:
        return found
    start = "unconditional_transform."
    own = {key.removeprefix(start): value for key, value in theirs.items() if key.startswith(start)}
    return {**found, "own.raw": _free_in(layer.own, own)["raw"]}


def _autoregressive_rows(layer: Autoregressive) -> _Rows:
    count = layer.shape[0]
    if isinstance(layer.map, Affine):
        if layer.map.form != "softplus":
            raise ValueError(f"nflows: an affine autoregressive layer has form: softplus, found {layer.map.form}.")
        shift = torch.zeros(2, count, dtype=torch.float64)
        shift[1] = SHIFT
        return _Rows(torch.arange(2 * count).reshape(count, 2).flip(1).T.flatten(), shift.flatten())
    if layer.scale != 1.0:
        raise ValueError("nflows: the splines of its autoregressive layers have scale_logits: false, found true.")
    return _spline_rows(layer.map, count)


def _autoregressive_out(layer: Autoregressive) -> State:
    rows, start = _autoregressive_rows(layer), "autoregressive_net."
    found = _network_out(layer.network, rows, start)
    return {**found, **{f"{start}{key}": value for key, value in _masks(layer.network, rows).items()}}


def _autoregressive_in(layer: Autoregressive, theirs: State) -> State:
    network = _network_in(layer.network, _autoregressive_rows(layer), theirs, "autoregressive_net.")
    own = {key: value for key, value in layer.state_dict().items() if key == "network.order"}
    return {**own, **{f"network.{key}": value for key, value in network.items()}}


class Pair(NamedTuple):
    """Our layer as their weights, and their weights as a state dict of our layer; both without a prefix."""

    out: Callable[..., State]
    into: Callable[..., State]


LAYERS: dict[type[Bijection], Pair] = {
    Permutation: Pair(_permutation_out, _permutation_in),
    LULinear: Pair(_lu_out, _lu_in),
    Conv1x1: Pair(_conv_out, _conv_in),
    ActNorm: Pair(_act_norm_out, _act_norm_in),
    Elementwise: Pair(_free_out, _free_in),
    Autoregressive: Pair(_autoregressive_out, _autoregressive_in),
    Coupling: Pair(_coupling_out, _coupling_in),
}
