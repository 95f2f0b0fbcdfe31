"""Laws of single numbers steered by raw parameters, and what models share that give such laws of their data."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import Model, check_labels
from ..registry import kind, register
from ..rng import Noise
from ..transforms import Transform
from ..types import Condition, NotApplicable, Shape, sum_items

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
SPREAD = 1.5  # the components of a mixture start at evenly spaced means in [-SPREAD, SPREAD], in model units


@kind
class Observation(ABC):
    """The law of one number, steered by P raw parameters; elementwise and without state.

    Attributes:
        parameters: P.
        binary: whether it is a probability mass on {0, 1}; otherwise it is a density on the real line.
    """

    parameters: int
    binary: ClassVar[bool] = False

    @abstractmethod
    def log_prob(self, x: Tensor, raw: Tensor) -> Tensor:
        """[...] log p of x [...] given raw [P, ...]."""

    @abstractmethod
    def sample(self, raw: Tensor, u: Tensor) -> Tensor:
        """[...] a draw given raw [P, ...], made of u [2, ...], independent and uniform on (0, 1)."""

    @abstractmethod
    def mean(self, raw: Tensor) -> Tensor:
        """[...] the mean given raw [P, ...]."""


@register(Observation, "bernoulli")
class Bernoulli(Observation):
    """P(x = 1) = sigmoid(raw), so that log p(x) = log sigmoid((2x - 1) raw) for x in {0, 1}."""

    parameters, binary = 1, True

    def log_prob(self, x: Tensor, raw: Tensor) -> Tensor:
        return F.logsigmoid((2 * x - 1) * raw[0])  # softplus would be off by 2e-9 from 20 on

    def sample(self, raw: Tensor, u: Tensor) -> Tensor:
        return (u[0] < raw[0].sigmoid()).to(raw.dtype)

    def mean(self, raw: Tensor) -> Tensor:
        return raw[0].sigmoid()


class Mixture(Observation):
    """Σ_k w_k s_k⁻¹ h((x - m_k)/s_k) for a density h; raw = logits of w | m less its start | log s.

    Means start evenly spaced where all raw parameters are equal, so that components can part.

    Args:
        components: K; P = 3K, or 2 for a single one, which has no weight.
    Raises:
        ValueError: if there is no component.
    """

    def __init__(self, components: int = 10) -> None:
        if components < 1:
            raise ValueError(f"{self.registered_name}: components must be at least 1, found {components}.")
        self.components = components
        self.parameters = 3 * components if components > 1 else 2

    @abstractmethod
    def standard(self, z: Tensor) -> Tensor:
        """log h(z)."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The number below which h has the mass u."""

    def _parts(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w, m and log s, each [K, ...]."""
        k = self.components
        log_s = raw[-k:]
        start = torch.linspace(-SPREAD, SPREAD, k, dtype=raw.dtype, device=raw.device) if k > 1 else raw.new_zeros(1)
        means = raw[-2 * k : -k] + start.reshape(-1, *(1,) * (raw.ndim - 1))
        return (raw[:k].log_softmax(0) if k > 1 else torch.zeros_like(log_s)), means, log_s

    def log_prob(self, x: Tensor, raw: Tensor) -> Tensor:
        log_w, means, log_s = self._parts(raw)
        return (log_w + self.standard((x - means) * (-log_s).exp()) - log_s).logsumexp(0)

    def sample(self, raw: Tensor, u: Tensor) -> Tensor:
        log_w, means, log_s = self._parts(raw)
        # the last sum may round to less than u: the last component is taken then
        k = (u[0] >= log_w.exp().cumsum(0)).sum(0).clamp(max=self.components - 1)[None]
        means, log_s = means.gather(0, k)[0], log_s.gather(0, k)[0]
        return (means + log_s.exp() * self.quantile(u[1])).to(raw.dtype)

    def mean(self, raw: Tensor) -> Tensor:
        log_w, means, _ = self._parts(raw)
        return (log_w.exp() * means).sum(0)


@register(Observation, "gaussian_mixture")
class GaussianMixture(Mixture):
    """Σ_k w_k N(x; m_k, s_k²).

    Source: Uria et al. 2013 (RNADE), section 3.
    """

    def standard(self, z: Tensor) -> Tensor:
        return -0.5 * z.square() - HALF_LOG_TWO_PI

    def quantile(self, u: Tensor) -> Tensor:
        return torch.special.ndtri(u)


@register(Observation, "logistic_mixture")
class LogisticMixture(Mixture):
    """Σ_k w_k s_k⁻¹ h((x - m_k)/s_k) with the logistic density h(z) = e^{-z}/(1 + e^{-z})²: heavier tails.

    Source: Salimans et al. 2017 (PixelCNN++), section 2.1, without its rounding to levels.
    """

    def standard(self, z: Tensor) -> Tensor:
        return F.logsigmoid(z) + F.logsigmoid(-z)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.logit(u)


def uniforms(noise: Noise, *shape: int) -> Tensor:
    """[2, n, *shape] float64 in the open interval (0, 1): the middles of the 2^24 cells that float32 draws fall on."""
    return (noise.uniform(2, *shape, dtype=torch.float64) + 2.0**-25).movedim(1, 0)


class ObservationModel(Model):
    """What models share whose law of an item is a product of laws of single numbers, given something.

    Data of two levels are modelled as they are, as x/bin_width in {0, 1}; all other data as y = T(x) in model space,
    with log|det ∂T/∂x|, so that likelihoods are of items in data units. Discrete data of more levels are dequantised by
    T.

    Args:
        observation: law of one number; None is bernoulli for data of two levels and `default` for others.
    Raises:
        ValueError: if the law does not fit the data, or if a conditional model meets data without conditions.
    """

    def __init__(
        self,
        observation: Observation | None,
        default: Observation,
        conditional: bool,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        levels: int | None,
        bin_width: float | None,
    ) -> None:
        super().__init__()
        name, binary = self.registered_name, levels == 2
        if conditional and num_classes is None and condition_shape is None:
            raise ValueError(f"{name}: conditional=True, but the data set has no conditions. Set conditional: false.")
        self.observation = observation or (Bernoulli() if binary else default)
        if self.observation.binary != binary:
            found = "are continuous" if levels is None else f"have {levels} levels"
            raise ValueError(
                f"{name}: the observation {self.observation.registered_name} is for data "
                f"{'of two levels' if self.observation.binary else 'of more than two levels or none'}, and these "
                f"{found}. Leave `observation` out, or choose data such as binary_digits."
            )
        self.shape, self.conditional, self.transform = tuple(shape), conditional, transform
        self.num_classes = num_classes if conditional else None
        self.condition_shape = condition_shape if conditional else None
        self.bin_width = bin_width
        self.cell = (1.0 if bin_width is None else bin_width) if binary else None
        self.observed_shape = self.shape if binary else tuple(transform.out_shape(self.shape))
        self.dims = math.prod(self.observed_shape)

    @property
    def binary(self) -> bool:
        """Whether data are two levels."""
        return self.cell is not None

    @property
    def dequantised(self) -> bool:
        """Whether T is random."""
        return self.bin_width is not None and not self.binary

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def observed(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """What the law is of, [B, *observed_shape], and log|det| [B] float64 of the step to it from data units.

        Of two levels that is the log volume of their cells, which makes a mass a density of the width of a cell; a
        probability mass leaves it out.
        """
        if self.binary:
            volume = x.new_full((len(x),), -self.dims * math.log(self.cell), dtype=torch.float64)
            return (x / self.cell).to(self.dtype), volume
        y, log_det = self.transform(x.to(torch.promote_types(x.dtype, self.dtype)), noise)
        return y.to(self.dtype), log_det

    def in_data_units(self, observed: Tensor) -> Tensor:
        """[B, *shape] items of what the law is of."""
        return observed * self.cell if self.binary else self.transform.inverse(observed)

    def check_scored(self, x: Tensor, where: str) -> None:
        """Raises ValueError for items of another shape or off the two levels, NotApplicable if there is no density."""
        self.check_items(x, where)
        if self.binary and not ((x == 0) | (x == self.cell)).all():
            raise ValueError(
                f"{where}: data of two levels are 0 and {self.cell:g}, found values from {x.min():g} to {x.max():g} "
                "in between or beyond. Round them to levels first."
            )
        if not self.binary and not self.transform.volume:
            raise NotApplicable("the transform to model space has no log-determinant, so data have no density.")

    def code_lengths(self, log_p: Tensor) -> dict[str, Tensor]:
        """Logs of a loss: bits/dim of log p in data units, where data are discrete."""
        if self.bin_width is None or not (self.binary or self.transform.volume):
            return {}
        dims = math.prod(self.shape)
        return {"bits_per_dim": -log_p.detach().mean() / (dims * math.log(2)) - math.log2(self.bin_width)}

    def checked(self, condition: Condition | None, n: int, where: str) -> Tensor | None:
        """The condition on the model's device, if there is one per item exactly where the model takes one."""
        if self.conditional == (condition is None):
            problem = (
                "this model is conditional, but no condition was given. Pass condition=, one row per item."
                if self.conditional
                else "a condition was given to an unconditional model. Drop it, or build it with conditional=True."
            )
            raise ValueError(f"{where}: {problem}")
        if condition is None:
            return None
        if not isinstance(condition, Tensor) or len(condition) != n:
            found = len(condition) if isinstance(condition, Tensor) else type(condition).__name__
            raise ValueError(f"{where}: one condition per item is needed, a tensor of {n} rows, found {found}.")
        if where != "loss":  # there, reading labels would wait for the device
            check_labels(condition, self.num_classes, where)
        return condition.to(self.device)

    @property
    def conditions(self) -> dict[str, int | Shape | None]:
        """The keywords by which networks and layers are told of the condition."""
        return {"num_classes": self.num_classes, "condition_shape": self.condition_shape}


def check_draws(n: int, seeds: Tensor, draws: int, batch_size: int) -> None:
    """Raises ValueError unless there is one seed for each of n items, and draws and batch_size are at least 1."""
    if len(seeds) != n or draws < 1 or batch_size < 1:
        raise ValueError(
            "likelihood: one seed per item, draws >= 1 and batch_size >= 1 are needed, found "
            f"{len(seeds)} seeds for {n} items, draws={draws} and batch_size={batch_size}."
        )


def log_mass(observation: Observation, x: Tensor, raw: Tensor) -> Tensor:
    """[B] float64 Σ log p of the numbers of x [B, *] given raw [B, P, *]."""
    return sum_items(observation.log_prob(x, raw.movedim(1, 0)))
