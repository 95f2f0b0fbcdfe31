"""NADE: an item's numbers one after another, each given those before it, by one hidden layer of tied weights."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..networks.embeddings import ConditionEmbedding
from ..networks.mlp import ACTIVATIONS
from ..registry import register
from ..rng import BatchNoise, Noise, SeedNoise, as_seeds, generator
from ..transforms import Transform
from ..types import Batch, Condition, Likelihood, Loss, Seeds, Shape, sum_items
from .observations import GaussianMixture, Observation, ObservationModel, check_draws, uniforms


class OrderedModel(ObservationModel):
    """p(x) = Π_i p(x_{o_i} | x_{o_1}, …, x_{o_{i-1}}) for an order o of the numbers of a flattened item.

    Subclasses give the laws of all numbers at once (`raw`), and draw them one after another (`draw`). A model that is
    trained for any order is one law for each of them, and the mixture of several is a law too.

    Attributes:
        any_order: whether every order has a law; the fixed order is None then, and a choice is [D] or [B, D].
    """

    any_order: bool

    @abstractmethod
    def raw(self, x: Tensor, condition: Tensor | None, order: Tensor | None) -> Tensor:
        """[P, B, D] parameters of the law of each number of x [B, D] given those before it."""

    @abstractmethod
    def draw(self, u: Tensor, condition: Tensor | None, order: Tensor | None) -> Tensor:
        """[n, D] numbers made of u [2, n, D], for one order [D]."""

    def some_order(self, k: int) -> Tensor | None:
        """[D] the k-th of a fixed list of random orders; None if there is one order alone."""
        return torch.randperm(self.dims, generator=generator("order", k)).to(self.device) if self.any_order else None

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        self.check_items(batch.x, "loss")
        condition = self.checked(batch.condition if self.conditional else None, len(batch), "loss")
        noise, order = BatchNoise(len(batch), generator=generator, device=batch.x.device), None
        observed, volume = self.observed(batch.x, noise if self.dequantised else None)
        if self.any_order:
            order = self.training_order(noise)
        log_p = self._log_prob(observed, condition, order) + volume
        return Loss(-log_p / self.dims, {"nll": -log_p.detach().mean()} | self.code_lengths(log_p))

    @abstractmethod
    def training_order(self, noise: Noise) -> Tensor:
        """[D] or [B, D] random orders of a training batch."""

    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform."""
        self.transform.fit(batches)
        return {}

    def likelihood(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        draws: int = 1,
        orders: int = 1,
    ) -> Likelihood:
        """log p(x) in nats: the mass of items of two levels, the density of continuous ones, a bound for other levels.

        Args:
            x: [B, *shape] in data units; gradients flow to it.
            condition: [B, *] for conditional models.
            seeds: [B] for the dequantisation noise u; 0 … B-1 if not given.
            draws: how many values of u the bound is averaged over.
            orders: how many orders are mixed, log (1/K Σ_k p_{o_k}(x)), for a model of any order: a law in itself.
        Raises:
            NotApplicable: if the transform to model space has no volume.
        Source: Uria et al. 2014 (A Deep and Tractable Density Estimator), section 3, for the mixture of orders.
        """
        self.check_scored(x, "likelihood")
        condition = self.checked(condition, len(x), "likelihood")
        self._check_orders(orders, "likelihood")
        seeds = as_seeds(len(x) if seeds is None else seeds)
        check_draws(len(x), seeds, draws, 1)
        noise = SeedNoise(seeds, purpose="dequantise", device=x.device) if self.dequantised else None
        values = []
        for _ in range(draws if self.dequantised else 1):
            observed, volume = self.observed(x, noise)
            each = [self._log_prob(observed, condition, self.some_order(k)) for k in range(orders)]
            value = torch.stack(each).logsumexp(0) - math.log(orders)
            values.append(value if self.binary else value + volume)
        kind = "pmf" if self.binary else "bound" if self.dequantised else "exact"
        return Likelihood(torch.stack(values).mean(0), kind)

    def log_prob(
        self,
        x: Tensor,
        *,
        condition: Condition | None = None,
        seeds: Seeds | None = None,
        draws: int = 1,
        orders: int = 1,
    ) -> Tensor:
        """[B] nats: the value of `likelihood`."""
        return self.likelihood(x, condition=condition, seeds=seeds, draws=draws, orders=orders).value

    @torch.no_grad()
    def sample(
        self, seeds: Seeds, *, condition: Condition | None = None, orders: int = 1, batch_size: int = 512
    ) -> Tensor:
        """[n, *shape] items in data units; item i depends on seed i (and condition i) alone.

        Args:
            seeds: n, or n seeds.
            condition: [n, *] one per seed, for conditional models.
            orders: of how many orders the mixture is drawn from, for a model of any order.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if the model is conditional and there is not one condition per seed, or the other way round.
        """
        seeds = as_seeds(seeds)
        condition = self.checked(condition, len(seeds), "sample")
        self._check_orders(orders, "sample")
        if batch_size < 1:
            raise ValueError(f"sample: batch_size must be at least 1, found {batch_size}.")
        drawn = []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            noise, given = SeedNoise(seeds[rows], device=self.device), None if condition is None else condition[rows]
            chosen = (noise.uniform(dtype=torch.float64) * orders).long()
            u = uniforms(noise, self.dims)
            x = u.new_zeros(len(rows), self.dims, dtype=self.dtype)
            for k in chosen.unique().tolist():
                of_k = chosen == k
                x[of_k] = self.draw(u[:, of_k], None if given is None else given[of_k], self.some_order(k))
            drawn.append(self.in_data_units(x.reshape(len(rows), *self.observed_shape)))
        return torch.cat(drawn)

    def _log_prob(self, observed: Tensor, condition: Tensor | None, order: Tensor | None) -> Tensor:
        """[B] float64 log p of what the law is of."""
        x = observed.reshape(len(observed), self.dims)
        return sum_items(self.observation.log_prob(x, self.raw(x, condition, order)))

    def _check_orders(self, orders: int, where: str) -> None:
        if orders < 1 or (orders > 1 and not self.any_order):
            raise ValueError(
                f"{where}: orders={orders}, but this {self.registered_name} "
                f"{'needs at least 1' if self.any_order else 'has one order. Train it with order: any to mix several'}."
            )


@register(Model, "nade")
class NADE(OrderedModel):
    """Laws of x_{o_i} given x_{o_1}, …, x_{o_{i-1}} from one hidden layer, whose pre-activations are handed on.

    a_1 = c + e(condition), h_i = act(ρ_{o_i} a_i), raw_{o_i} = b_{o_i} + V_{o_i} h_i, a_{i+1} = a_i + W_{o_i} x_{o_i}:
    all D laws cost O(DH), in scoring and in sampling. With the order "any" each item of a batch has a random order
    of its own, so that the loss is unbiased for the mean over all orders, and a_{i+1} = a_i + W_{o_i} x_{o_i} + M_{o_i}
    tells a zero from a number that is not known yet.

    Data of two levels are modelled as they are, by Bernoulli laws; all other data in model space, by mixtures.

    Args:
        hidden: H.
        observation: law of one number; bernoulli for data of two levels if not given, gaussian_mixture for others.
        order: of the numbers of a flattened item: "natural", "random" (drawn as parameters are), "any", or a list that
            names the first first.
        activation: sigmoid for binary data and relu for real ones in the papers.
        rescale: learn ρ, which keeps real-valued sums from saturating (RNADE); 1 otherwise.
        conditional: whether the hidden layer sees the condition of the data (labels, embeddings).
    Raises:
        ValueError: if there is no hidden unit, if the list is no order, if the law does not fit the data, or if a
            conditional model meets data without conditions.
    Source: Larochelle & Murray 2011 (NADE), section 3; Uria et al. 2013 (RNADE), section 3; Uria et al. 2014 (A Deep
        and Tractable Density Estimator), section 3, for training on any order.
    """

    def __init__(
        self,
        hidden: int = 256,
        observation: Observation | None = None,
        order: Literal["natural", "random", "any"] | tuple[int, ...] = "natural",
        activation: Literal["sigmoid", "relu", "silu", "tanh"] = "sigmoid",
        rescale: bool = False,
        conditional: bool = False,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        levels: int | None,
        bin_width: float | None,
    ) -> None:
        sizes = {"shape": shape, "num_classes": num_classes, "condition_shape": condition_shape}
        facts = {"transform": transform, "levels": levels, "bin_width": bin_width}
        super().__init__(observation, GaussianMixture(), conditional, **sizes, **facts)
        if hidden < 1:
            raise ValueError(f"nade: at least one hidden unit is needed, found hidden={hidden}.")
        d, p = self.dims, self.observation.parameters
        self.any_order = order == "any"
        self.register_buffer("order", _order(order, d), persistent=order == "random")
        self.act: Callable[[Tensor], Tensor] = torch.sigmoid if activation == "sigmoid" else ACTIVATIONS[activation]()
        self.weight = nn.Parameter(_uniform(d, hidden, fan=d))
        self.known = nn.Parameter(_uniform(d, hidden, fan=d)) if self.any_order else None
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.factor = nn.Parameter(torch.ones(d)) if rescale else None
        self.output = nn.Parameter(_uniform(d, p, hidden, fan=hidden))
        self.output_bias = nn.Parameter(torch.zeros(d, p))
        self.embedding = ConditionEmbedding(hidden, **self.conditions) if conditional else None

    def _start(self, condition: Tensor | None, like: Tensor) -> Tensor:
        """[B, H] a_1."""
        start = self.bias.expand(len(like), -1)
        return start if self.embedding is None else start + self.embedding(condition, len(like), like)

    def _hidden(self, a: Tensor, places: Tensor | slice) -> Tensor:
        return self.act(a if self.factor is None else a * self.factor[places][..., None])

    def _steps(self, x: Tensor, places: Tensor | slice) -> Tensor:
        """[..., H] what numbers x [...] at these places add to the pre-activations."""
        change = x[..., None] * self.weight[places]
        return change if self.known is None else change + self.known[places]

    def raw(self, x: Tensor, condition: Tensor | None, order: Tensor | None) -> Tensor:
        order = torch.atleast_2d(self.order if order is None else order)[..., None]
        steps = torch.take_along_dim(self._steps(x, slice(None)), order, 1)
        sums = torch.cat((self._start(condition, x)[:, None], steps[:, :-1]), 1).cumsum(1)
        h = self._hidden(torch.take_along_dim(sums, order.argsort(1), 1), slice(None))  # by place again
        return torch.einsum("bdh,dph->pbd", h, self.output) + self.output_bias.T[:, None]

    def draw(self, u: Tensor, condition: Tensor | None, order: Tensor | None) -> Tensor:
        x = u.new_zeros(u.shape[1:], dtype=self.dtype)
        a = self._start(condition, x)
        for place in self.order if order is None else order:
            raw = torch.addmm(self.output_bias[place][:, None], self.output[place], self._hidden(a, place).T)
            x[:, place] = self.observation.sample(raw, u[:, :, place])
            a = a + self._steps(x[:, place], place)
        return x

    def training_order(self, noise: Noise) -> Tensor:
        return noise.uniform(self.dims).argsort(1)


def _order(order: str | tuple[int, ...], count: int) -> Tensor:
    """[count] the places in their order; the natural one where any may come."""
    if order == "random":
        return torch.randperm(count)
    if isinstance(order, str):
        return torch.arange(count)
    if sorted(order) != list(range(count)):
        raise ValueError(f"nade: an order names each of the places 0 … {count - 1} once, found {list(order)}.")
    return torch.tensor(order)


def _uniform(*shape: int, fan: int) -> Tensor:
    """Uniform within 1/√fan."""
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan)
