"""Optimisers and learning rates as configuration."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import nn

from ..registry import ConfigError, kind, register


@kind
class Optimizer(ABC):
    """A recipe for a torch optimiser.

    Attributes:
        lr: the learning rate that `LearningRate` scales.
    """

    lr: float

    @abstractmethod
    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of some parameters."""


def kernel(parameters: list[nn.Parameter]) -> dict[str, bool]:
    """Torch's option for the fastest update: one kernel for all of it where there is one, else one an operation."""
    places = {p.device.type for p in parameters}
    fusable = places in ({"cuda"}, {"cpu"}) and all(p.is_floating_point() for p in parameters)
    return {"fused": True} if fusable else {"foreach": True}


@register(Optimizer, "adam")
class Adam(Optimizer):
    """Adam; with weight_decay > 0 decoupled from the gradient (AdamW).

    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019.
    """

    def __init__(
        self, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        _check_rate("adam", lr)
        _check_adam("adam", betas, eps, weight_decay)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.AdamW(parameters, self.lr, self.betas, self.eps, self.weight_decay, **kernel(parameters))


@register(Optimizer, "adamax")
class Adamax(Optimizer):
    """Adam with the largest recent gradient in place of the root of its mean square.

    m = β₁ m + (1 - β₁) g, u = max(β₂ u, |g| + ε), θ ← θ - lr/(1 - β₁ᵏ) m/u at step k = 1, 2, …, with
    g = ∇θ + weight_decay θ.

    Source: Kingma & Ba 2015, section 7.1.
    """

    def __init__(
        self, lr: float = 2e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        _check_rate("adamax", lr)
        _check_adam("adamax", betas, eps, weight_decay)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adamax(list(parameters), self.lr, self.betas, self.eps, self.weight_decay, foreach=True)


@register(Optimizer, "sgd")
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    def __init__(
        self, lr: float = 1e-2, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        _check_rate("sgd", lr)
        self.lr, self.momentum, self.nesterov, self.weight_decay = lr, momentum, nesterov, weight_decay

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        more = {"weight_decay": self.weight_decay, "nesterov": self.nesterov}
        # not fused: torch's kernel fails where a parameter has its first gradient later than others
        return torch.optim.SGD(list(parameters), self.lr, self.momentum, **more, foreach=True)


@kind
class LearningRate(ABC):
    """A factor on the optimiser's learning rate.

    Attributes:
        warmup: the shape is multiplied by (step + 1)/warmup in the first `warmup` steps.
    """

    warmup: int = 0

    def factor(self, step: int, steps: int) -> float:
        """The factor for step = 0 … steps-1 of a run of `steps`."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return rise * self.shape(step, steps)

    @abstractmethod
    def shape(self, step: int, steps: int) -> float:
        """The factor without warm-up."""


@register(LearningRate, "constant")
class Constant(LearningRate):
    """Factor 1, after a linear warm-up.

    Args:
        warmup: steps of the warm-up.
    """

    def __init__(self, warmup: int = 0) -> None:
        _check_warmup("constant", warmup)
        self.warmup = warmup

    def shape(self, step: int, steps: int) -> float:
        return 1.0


@register(LearningRate, "cosine")
class Cosine(LearningRate):
    """Cosine annealing over the run of K steps: final + (1 - final)(1 + cos(π k/K))/2 at step k = 0 … K-1.

    Args:
        warmup: steps of a linear warm-up, during which the cosine falls already.
        final: the factor that step K would have.
    Source: Loshchilov & Hutter 2017 (SGDR), equation 5 with one cycle.
    """

    def __init__(self, warmup: int = 0, final: float = 0.0) -> None:
        _check_warmup("cosine", warmup)
        self.warmup, self.final = warmup, final

    def shape(self, step: int, steps: int) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


@register(LearningRate, "one_cycle")
class OneCycle(LearningRate):
    """Cosine rise from `start` to 1, then cosine fall to `final`: torch's `OneCycleLR` without its momentum cycle.

    In a run of K steps, counted from 0, the factor is 1 at step rise·K - 1 and `final` at step K - 1.

    Args:
        rise: fraction of the run in which the factor rises, in (0, 1).
        start: factor of step 0 (torch: 1/div_factor).
        final: factor of the last step (torch: 1/(div_factor final_div_factor)).
    Source: Smith & Topin 2018 (super-convergence).
    """

    def __init__(self, rise: float = 0.1, start: float = 0.04, final: float = 1e-4) -> None:
        if not 0 < rise < 1:
            raise ValueError(f"one_cycle: rise must be in (0, 1), found {rise}.")
        self.rise, self.start, self.final = rise, start, final

    def shape(self, step: int, steps: int) -> float:
        top, last = self.rise * steps - 1, steps - 1  # last - top = (1 - rise) steps > 0
        if step < top:
            return self._ease(self.start, 1.0, step / top)
        return self._ease(1.0, self.final, (step - top) / (last - top))

    @staticmethod
    def _ease(a: float, b: float, fraction: float) -> float:
        return b + (a - b) * 0.5 * (1 + math.cos(math.pi * fraction))


@register(LearningRate, "step_decay")
class StepDecay(LearningRate):
    """ratio^⌊k/every⌋ at step k = 0, 1, …: torch's `StepLR`.

    Args:
        every: steps between two decays.
        ratio: what the rate is multiplied by at each, in (0, 1].
        warmup: steps of a linear warm-up.
    """

    def __init__(self, every: int = 200_000, ratio: float = 0.5, warmup: int = 0) -> None:
        _check_warmup("step_decay", warmup)
        if every < 1 or not 0 < ratio <= 1:
            raise ConfigError(
                f"step_decay: every >= 1 and 0 < ratio <= 1 are needed, found every={every} and ratio={ratio}."
            )
        self.every, self.ratio, self.warmup = every, ratio, warmup

    def shape(self, step: int, steps: int) -> float:
        return self.ratio ** (step // self.every)


@register(LearningRate, "inverse_decay")
class InverseDecay(LearningRate):
    """1/(1 + rate k) at step k = 0, 1, …

    Args:
        rate: how fast it falls: the factor is a half after 1/rate steps.
        warmup: steps of a linear warm-up.
    """

    def __init__(self, rate: float = 1e-5, warmup: int = 0) -> None:
        _check_warmup("inverse_decay", warmup)
        if rate < 0:
            raise ConfigError(f"inverse_decay: rate must be at least 0, found {rate}.")
        self.rate, self.warmup = rate, warmup

    def shape(self, step: int, steps: int) -> float:
        return 1 / (1 + self.rate * step)


def _check_rate(name: str, lr: float) -> None:
    if lr <= 0:
        raise ValueError(f"{name}: lr must be above 0, found {lr}.")


def _check_adam(name: str, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not all(0 <= beta < 1 for beta in betas) or eps <= 0 or weight_decay < 0:
        raise ConfigError(
            f"{name}: 0 <= betas < 1, eps > 0 and weight_decay >= 0 are needed, found "
            f"betas={list(betas)}, eps={eps}, weight_decay={weight_decay}."
        )


def _check_warmup(name: str, warmup: int) -> None:
    if warmup < 0:
        raise ValueError(f"{name}: warmup must be at least 0, found {warmup}.")
