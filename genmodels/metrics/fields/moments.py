"""Moments of pixels and of the mean of a field: fourth moments, skewness, susceptibility, Binder's ratio."""

import torch
from torch import Tensor

from ...registry import register
from ...types import Estimate, NotApplicable
from ..metric import Metric
from .metric import FieldMetric, Fields, scale
from .summary import Norm, Summary, checked, summarize, weighted

MOMENTS = ("second_moment", "fourth_moment", "skewness", "excess_kurtosis")
MAGNETIZATION = ("abs_magnetization", "susceptibility", "binder_cumulant")
STILL = 1e-6  # root mean square of the mean of a field, in units of the pixels' own: rounding in float32 leaves 1e-8


def powers(x: Tensor, centre: float = 0.0) -> Tensor:
    """[N, 6] means over each field's pixels of x², x⁴, and of the first to fourth powers of x - centre."""
    x = checked(x, "powers").flatten(1)
    y = x - centre
    return torch.stack([x**2, x**4, y, y**2, y**3, y**4]).mean(2).T


def of_powers(means: Tensor) -> Tensor:
    """⟨x²⟩, ⟨x⁴⟩, skewness and excess kurtosis from the means of `powers`."""
    x2, x4, a, b, c, d = means
    variance = b - a**2
    third = c - 3 * a * b + 2 * a**3
    fourth = d - 4 * a * c + 6 * a**2 * b - 3 * a**4
    return torch.stack([x2, x4, third / variance**1.5, fourth / variance**2 - 3])


def field_moments(x: Tensor) -> Summary:
    """⟨x²⟩, ⟨x⁴⟩, skewness and excess kurtosis (`MOMENTS`) of all pixels of fields [N, H, W]."""
    x = checked(x, "field_moments")
    return summarize(powers(x, x.mean().item()), of_powers)


def magnetizations(x: Tensor) -> Tensor:
    """[N, 4] |m|, m², m⁴ of the mean m of each field of [N, H, W], and the number of its pixels."""
    x = checked(x, "magnetizations").flatten(1)
    m = x.mean(1)
    return torch.stack([m.abs(), m**2, m**4, torch.full_like(m, x.shape[1])], 1)


def of_magnetizations(means: Tensor) -> Tensor:
    """⟨|m|⟩, χ = N(⟨m²⟩ - ⟨|m|⟩²) and U₄ = 1 - ⟨m⁴⟩/(3⟨m²⟩²) from the means of `magnetizations`."""
    m, m2, m4, n = means
    return torch.stack([m, n * (m2 - m**2), 1 - m4 / (3 * m2**2)])


def magnetization(x: Tensor) -> Summary:
    """⟨|m|⟩, susceptibility and Binder's cumulant (`MAGNETIZATION`) of fields [N, H, W] with means m.

    χ = N(⟨m²⟩ - ⟨|m|⟩²) for N pixels, without a factor of the temperature; U₄ = 1 - ⟨m⁴⟩/(3⟨m²⟩²) is 0 for a normal m
    and 2/3 for ±1.

    Source: Binder 1981 (Finite size scaling analysis of Ising model block distribution functions).
    """
    return summarize(magnetizations(x), of_magnetizations)


@register(Metric, "field_moments")
class FieldMoments(FieldMetric):
    """Errors of ⟨x²⟩, ⟨x⁴⟩ (relative), skewness and excess kurtosis (absolute) of the pixels of fields.

    The two latter are pure numbers, and may be 0: their errors are |difference|. Fields x(1 + δ) of the reference's law
    score (1 + δ)² - 1, (1 + δ)⁴ - 1, 0 and 0. `field_values` reports the moments themselves.

    Args:
        reference: the split that drawn fields are compared with.
    """

    curved = None
    units = dict.fromkeys((f"{name}_error" for name in MOMENTS), "1")

    def prepare(self, fields: Fields) -> None:
        self.centre = scale(fields).mean

    def per_item(self, x: Tensor) -> Tensor:
        return powers(x, self.centre)

    def of_means(self, means: Tensor) -> Tensor:
        return of_powers(means)

    def norms(self, reference: Summary) -> dict[str, Norm]:
        weights = [1 / reference.value[0], 1 / reference.value[1], 1.0, 1.0]
        return {name: weighted(w, slice(i, i + 1)) for i, (name, w) in enumerate(zip(self.units, weights, strict=True))}


@register(Metric, "magnetization")
class Magnetization(FieldMetric):
    """Errors of ⟨|m|⟩, the susceptibility (relative) and Binder's cumulant (absolute), m the mean of a field.

    χ = N(⟨m²⟩ - ⟨|m|⟩²) and U₄ = 1 - ⟨m⁴⟩/(3⟨m²⟩²). Fields x(1 + δ) of the reference's law score δ, (1 + δ)² - 1 and
    0. `field_values` reports the quantities themselves.

    Args:
        reference: the split that drawn fields are compared with.
    Raises:
        NotApplicable: if the fields of the reference have mean 0, each of them.
    Source: Binder 1981 (Finite size scaling analysis of Ising model block distribution functions).
    """

    curved = None
    units = dict.fromkeys((f"{name}_error" for name in MAGNETIZATION), "1")

    def prepare(self, fields: Fields) -> None:
        if not moves(fields):
            raise NotApplicable("every field of the reference has mean 0")

    def per_item(self, x: Tensor) -> Tensor:
        return magnetizations(x)

    def of_means(self, means: Tensor) -> Tensor:
        return of_magnetizations(means)

    def norms(self, reference: Summary) -> dict[str, Norm]:
        weights = [1 / reference.value[0], 1 / reference.value[1].abs(), 1.0]
        return {name: weighted(w, slice(i, i + 1)) for i, (name, w) in enumerate(zip(self.units, weights, strict=True))}


def moves(fields: Fields) -> bool:
    """Whether the means of fields differ from 0 by more than rounding."""
    squares = torch.stack([torch.stack([x.mean((1, 2)).square().sum(), x.square().mean((1, 2)).sum()]) for x in fields])
    mean, pixel = squares.sum(0).sqrt().tolist()
    return mean > STILL * pixel


@register(Metric, "field_values")
class FieldValues(FieldMetric):
    """Moments of the pixels of drawn fields and of their means, to be read beside those of the data.

    ⟨x²⟩, ⟨x⁴⟩, skewness, excess kurtosis, and with the mean m of a field of N pixels ⟨|m|⟩, N(⟨m²⟩ - ⟨|m|⟩²) and
    Binder's 1 - ⟨m⁴⟩/(3⟨m²⟩²), the last three unless every field has mean 0. References: the same of the held-out data,
    "data", and of training items.

    Args:
        reference: the split of the data.
    Source: Binder 1981 (Finite size scaling analysis of Ising model block distribution functions).
    """

    curved = None
    units = {  # noqa: RUF012
        "second_moment": "squared data units",
        "fourth_moment": "data units to the fourth",
        "skewness": "1",
        "excess_kurtosis": "1",
        "abs_magnetization": "data units",
        "susceptibility": "squared data units",
        "binder_cumulant": "1",
    }

    def prepare(self, fields: Fields) -> None:
        self.centre, self.moving = scale(fields).mean, moves(fields)

    def per_item(self, x: Tensor) -> Tensor:
        return torch.cat([powers(x, self.centre), magnetizations(x)], 1) if self.moving else powers(x, self.centre)

    def of_means(self, means: Tensor) -> Tensor:
        moments = of_powers(means[:6])
        return torch.cat([moments, of_magnetizations(means[6:])]) if self.moving else moments

    def norms(self, reference: Summary) -> dict[str, Norm]:
        return {}

    def compute(self) -> dict[str, Estimate]:
        drawn, found = self.drawn(), {}
        n = len(drawn.influence)
        for i, (name, unit) in enumerate(list(self.units.items())[: len(drawn.value)]):
            references = {"data": self.known.value[i].item()}
            if self.train is not None:
                references["training data"] = self.train.value[i].item()
            value, stderr = drawn.value[i].item(), drawn.stderr[i].item() if n > 1 else None
            items = drawn.influence[:, i] - drawn.influence[:, i].mean() + value
            found[name] = Estimate(value, stderr, n, unit, "none", "plug-in", references, items)
        return found
