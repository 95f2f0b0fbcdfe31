"""Averages of the weights over training, kept beside the weights and never mixed into them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from ..registry import kind, register


@kind
class Average(ABC):
    """A rule for the decay of a running average of the weights."""

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of its file: `ema-<value>`."""

    @abstractmethod
    def decay(self, step: int) -> float:
        """β of the update θ̄ <- β θ̄ + (1 - β) θ after optimiser step `step` = 1, 2, …"""


@register(Average, "constant")
class ConstantDecay(Average):
    """β_k = min(value, k/(k + 9)): a constant decay that forgets the initial weights fast at the start.

    Args:
        value: the decay; the average looks back over about 1/(1 - value) steps.
    """

    def __init__(self, value: float = 0.999) -> None:
        if not 0 <= value < 1:
            raise ValueError(f"constant: the decay must be in [0, 1), found {value}.")
        self.value = value

    @property
    def label(self) -> str:
        return f"ema-{self.value!r}"  # every digit: two averages must not share a file

    def decay(self, step: int) -> float:
        return min(self.value, step / (step + 9))


WIDEST = math.sqrt(1 / 12)  # the relative standard deviation of the plain mean over all steps, exponent 0


def exponent_of(std: float) -> float:
    """γ >= 0 of the profile s^γ on [0, 1] whose standard deviation is `std`: the inverse of `std_of`.

    With u = γ + 2 the relation std² = (γ+1)/((γ+2)² (γ+3)) is the cubic (std u)² (u + 1) - (u - 1) = 0, whose largest
    root lies below 1/std; Newton's method comes down to it from there, because the cubic is convex for u > 0.

    Raises:
        ValueError: unless 0 < std <= √(1/12) = 0.2887: beyond, early weights would count more than late ones.
    Source: Karras et al. 2024 (Analyzing and improving the training dynamics of diffusion models), appendix C.
    """
    if not 0 < std <= WIDEST:
        raise ValueError(
            f"power: std must be above 0 and at most √(1/12) = {WIDEST:.4f} (the plain mean of all steps), found {std}."
        )
    u, before = 1 / std, math.inf
    while u < before:
        before, scaled = u, std * u
        u -= (scaled * scaled * (u + 1) - (u - 1)) / (scaled * (3 * scaled + 2 * std) - 1)
    return max(before - 2, 0.0)


def std_of(exponent: float) -> float:
    """The standard deviation of the profile (γ+1) s^γ on [0, 1]: √((γ+1)/((γ+2)² (γ+3)))."""
    return math.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2)


@register(Average, "power")
class PowerProfile(Average):
    """β_k = (1 - 1/k)^(γ+1): an average whose memory grows with training, each past step weighted as its power γ.

    After k steps θ_i has the weight ∫ p from i-1 to i of p(s) = (γ+1) s^γ/k^(γ+1), exactly: mean (γ+1)/(γ+2) and
    standard deviation `std` in units of k, whatever the length of the run. The first update takes θ_1 whole. From
    snapshots of two such averages others are made after training, see `posthoc`.

    Args:
        std: the width of the profile relative to the steps so far, above 0 and at most 0.2887 (a plain mean).
    Source: Karras et al. 2024 (Analyzing and improving the training dynamics of diffusion models), section 3.1.
    """

    def __init__(self, std: float = 0.05) -> None:
        self.exponent = exponent_of(std)
        self.std = std

    @classmethod
    def of_label(cls, label: str) -> "PowerProfile | None":
        """The profile that a label `ema-<std>` means; None if it is no such label (`model`, `ema-0.999`)."""
        start, _, number = label.partition("ema-")
        try:
            return None if start else cls(float(number))
        except ValueError:
            return None

    @property
    def label(self) -> str:
        return f"ema-{self.std!r}"

    def decay(self, step: int) -> float:
        return math.exp((self.exponent + 1) * math.log1p(-1 / step)) if step > 1 else 0.0


class WeightAverage:
    """A running average of a model's parameters in float32 or wider; buffers are copied."""

    def __init__(self, rule: Average, model: nn.Module) -> None:
        self.rule = rule
        named = dict(model.named_parameters(remove_duplicate=False))
        self.tensors: dict[str, Tensor] = {}
        self.averaged: list[str] = []
        tied: dict[int, str] = {}  # a weight with several names is averaged once, and stands under each of them
        for name, value in model.state_dict().items():
            first = tied.setdefault(id(named.get(name, value)), name)
            self.tensors[name] = self.tensors[first] if first != name else _wide(value)
            if first == name and name in named and named[name].is_floating_point():
                self.averaged.append(name)
        self.copied = sorted(n for n in self.tensors if n not in named or not named[n].is_floating_point())
        self.places = _Places(model, (*self.averaged, *self.copied))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimiser step `step`."""
        beta = self.rule.decay(step)
        if model is not self.places.model:
            self.places = _Places(model, (*self.averaged, *self.copied))
        state = self.places.read()
        if self.averaged:
            wide = [state[name].to(self.tensors[name].dtype) for name in self.averaged]
            torch._foreach_lerp_([self.tensors[name] for name in self.averaged], wide, 1 - beta)
        for name in self.copied:
            self.tensors[name].copy_(state[name])

    def distinct(self) -> list[Tensor]:
        """The tensors, those with several names once."""
        return list({id(value): value for value in self.tensors.values()}.values())

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the tensors of a checkpoint."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model in eval mode with these weights; its own weights come back afterwards."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            with evaluating(model):
                yield
        finally:
            model.load_state_dict(own)


class _Places:
    """Where the tensors of a model's state are kept: to read them there takes a tenth of making a `state_dict`."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model, self.found = model, []
        for name in names:
            path, _, last = name.rpartition(".")
            module = model.get_submodule(path)
            self.found.append((name, module._parameters if last in module._parameters else module._buffers, last))

    def read(self) -> dict[str, Tensor]:
        """The tensors by name, as they are now."""
        return {name: owner[last] for name, owner, last in self.found}


def best(averages: Mapping[str, WeightAverage], model: nn.Module) -> AbstractContextManager[None]:
    """The model in eval mode with the first average of its weights, or with its own if there is none."""
    first = next(iter(averages.values()), None)
    return evaluating(model) if first is None else first.applied(model)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _wide(value: Tensor) -> Tensor:
    reduced = value.is_floating_point() and value.dtype.itemsize < 4
    return value.detach().clone().float() if reduced else value.detach().clone()
