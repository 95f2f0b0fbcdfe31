"""Which noise meets which item in training: pairs within a batch, drawn so that paths cross less.

A coupling leaves the laws of items and of noise as they are and changes their joint law. The velocity E[dx_t/dt | x_t]
is then still that of a flow from the noise to the data, which is what samples and the likelihood by the ODE rest on.
But x_t given the item is no Gaussian any more, so that -ε̂/σ is no score: what needs one is refused. (The name of the
straight path α = 1 - t, σ = t, "conditional optimal transport", speaks of one item and its noise, and has nothing to do
with these.)
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..registry import ConfigError, kind, register
from ..rng import Noise

Conditions = Literal["within", "cost", "ignore"]


@kind
class Coupling(ABC):
    """A law of pairs of items and noise within a batch.

    Attributes:
        independent: whether the noise of an item says nothing about it, so that scores and bounds exist.
    """

    independent: ClassVar[bool] = False

    @abstractmethod
    def pair(self, x: Tensor, eps: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
        """[B] int64: row k of the noise eps [B, *shape] that each item of x [B, *shape], under its condition, meets."""

    def __call__(self, x: Tensor, eps: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
        """[B, *shape] the noise in the order of the items; what is random comes from `noise`."""
        return eps[self.pair(x, eps, condition, noise)]


@register(Coupling, "independent")
class Independent(Coupling):
    """Every item with noise of its own."""

    independent = True

    def pair(self, x: Tensor, eps: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
        return torch.arange(len(x), device=x.device)

    def __call__(self, x: Tensor, eps: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
        return eps


class TransportCoupling(Coupling):
    """Pairs at a low squared distance |x - ε|² in model space.

    Args:
        conditions: what pairs may do to the conditions of a conditional model. "within" pairs items of equal labels
            alone, so that the noise stays N(0, I) under every label, as it is when samples are drawn. "cost" adds
            condition_cost |c - c'|² (1 for unequal labels), c' the condition of the item that the noise was drawn with:
            near conditions may swap, which leaves a bias that falls as the cost rises. "ignore" makes noise depend on
            the condition, which conditional samples then contradict.
        condition_cost: > 0, in units of the mean squared distance of a batch; for "cost".
    """

    def __init__(self, conditions: Conditions, condition_cost: float) -> None:
        if not 0 < condition_cost < float("inf"):
            raise ConfigError(f"coupling.condition_cost: a finite number > 0 is needed, found {condition_cost}.")
        self.conditions, self.condition_cost = conditions, condition_cost

    @abstractmethod
    def match(self, cost: Tensor, noise: Tensor) -> Tensor:
        """[n] the columns of a cost [n, n] float64 that its rows are paired with; `noise` [n] is uniform on [0, 1)."""

    def pair(self, x: Tensor, eps: Tensor, condition: Tensor | None, noise: Noise) -> Tensor:
        u, cost = noise.uniform(dtype=torch.float64), squared_distances(x, eps)
        if not cost.isfinite().all():
            raise ValueError(f"coupling '{self.registered_name}': the batch holds items that are not finite.")
        if not len(x):
            return torch.arange(0, device=x.device)
        if condition is None or self.conditions == "ignore":
            return self.match(cost, u)
        if self.conditions == "cost":
            scale = self.condition_cost * cost.mean()
            return self.match(cost + scale * condition_distances(condition), u)
        if condition.ndim > 1 or condition.is_floating_point():
            raise ValueError(
                f"coupling '{self.registered_name}': items are to be paired within equal labels, but these conditions "
                f"are {condition.dtype} of shape {list(condition.shape)}, of which no two are equal. "
                "Use conditions: cost, or conditions: ignore."
            )
        out = torch.arange(len(x), device=x.device)
        for label in condition.unique():
            rows = (condition == label).nonzero()[:, 0]
            out[rows] = rows[self.match(cost[rows][:, rows], u[rows])]
        return out


@register(Coupling, "minibatch_ot")
class MinibatchOT(TransportCoupling):
    """The permutation of a batch's noise that has the least sum of |x - ε|²: exact optimal transport within the batch.

    Solved on the CPU, in time of order B³ for a batch of B; under several processes each pairs its own part.

    Args:
        conditions: "within" pairs items of equal labels alone, "cost" lets near conditions swap, "ignore" all.
        condition_cost: of a swap between unequal conditions, in units of the mean squared distance; for "cost".
    Raises:
        ConfigError: unless condition_cost is finite and > 0.
        ValueError: in training, if conditions that are no labels are to be paired "within".
    Source: Pooladian et al. 2023 (Multisample flow matching); Tong et al. 2024 (OT-CFM);
        Cheng & Schwing 2025 (The curse of conditions), for the cost of conditions.
    """

    def __init__(self, conditions: Conditions = "within", condition_cost: float = 10.0) -> None:
        super().__init__(conditions, condition_cost)

    def match(self, cost: Tensor, noise: Tensor) -> Tensor:
        from scipy.optimize import linear_sum_assignment

        return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=cost.device)


@register(Coupling, "sinkhorn")
class Sinkhorn(TransportCoupling):
    """Noise drawn for each item from the entropic transport plan of the batch.

    P minimises Σ P_ij |x_i - ε_j|² + r Σ P_ij log P_ij with even marginals; item i meets ε_j with the probability
    P_ij/Σ_j P_ij. As r goes to 0 that is "minibatch_ot", and the independent pairs of a batch as it grows. Noise may
    be met twice or not at all: its law is that of the batch on average over draws.

    Args:
        regularization: r, in units of the mean squared distance of the batch.
        iterations: at most so many updates of both potentials; small r need many.
        tolerance: on the error of a marginal, relative to 1/B, at which iterations end.
        conditions: "within" pairs items of equal labels alone, "cost" lets near conditions swap, "ignore" all.
        condition_cost: of a swap between unequal conditions, in units of the mean squared distance; for "cost".
    Raises:
        ConfigError: if a number is not > 0.
        ValueError: in training, if conditions that are no labels are to be paired "within".
    Source: Cuturi 2013 (Sinkhorn distances), algorithm 1, in the logarithmic domain; Tong et al. 2024 (OT-CFM).
    """

    def __init__(
        self,
        regularization: float = 0.05,
        iterations: int = 200,
        tolerance: float = 1e-3,
        conditions: Conditions = "within",
        condition_cost: float = 10.0,
    ) -> None:
        super().__init__(conditions, condition_cost)
        if not (0 < regularization < float("inf") and tolerance > 0 and iterations > 0):
            raise ConfigError(
                "sinkhorn: a finite regularization > 0, tolerance > 0 and iterations > 0 are needed, found "
                f"{regularization}, {tolerance} and {iterations}."
            )
        self.regularization, self.iterations, self.tolerance = regularization, iterations, tolerance

    def match(self, cost: Tensor, noise: Tensor) -> Tensor:
        plan = self.plan(cost).cumsum(1)
        # a row may sum to a little less than a draw; its last column is then the one
        return torch.searchsorted(plan / plan[:, -1:], noise[:, None], right=True)[:, 0].clamp(max=len(cost) - 1)

    def plan(self, cost: Tensor) -> Tensor:
        """[n, n] float64 P: rows sum to 1/n, columns to within the tolerance."""
        n, mean = len(cost), cost.mean()
        kernel = -cost / (self.regularization * mean) if mean > 0 else torch.zeros_like(cost)
        g = kernel.new_zeros(n)  # the potential of the columns
        for _ in range(self.iterations):
            f = -torch.logsumexp(kernel + g, 1)
            columns = torch.logsumexp(kernel + f[:, None], 0)
            if ((columns + g).exp() - 1).abs().max() < self.tolerance:
                break
            g = -columns
        return (kernel + g - torch.logsumexp(kernel + g, 1)[:, None]).exp() / n


def squared_distances(x: Tensor, eps: Tensor) -> Tensor:
    """[B, B] float64 |x_i - ε_j|²."""
    x, eps = x.detach().flatten(1).double(), eps.detach().flatten(1).double()
    # by matrix products, whose cancellation float64 can afford: distances of noise are of the order of its dimension
    products = x @ eps.T
    return (x.square().sum(1)[:, None] + eps.square().sum(1) - 2 * products).clamp(min=0)


def condition_distances(condition: Tensor) -> Tensor:
    """[B, B] float64 1 for unequal labels, the squared distance of vectors divided by its mean."""
    if condition.ndim == 1 and not condition.is_floating_point():
        return (condition[:, None] != condition).double()
    c = condition.detach().flatten(1) if condition.ndim > 1 else condition.detach()[:, None]
    distances = squared_distances(c, c)
    mean = distances.mean()
    return distances / mean if mean > 0 else distances
