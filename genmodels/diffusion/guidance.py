"""Guidance beyond the condition: within some noise levels only, and by a weaker model."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..conditions import check_interval
from ..registry import ConfigError
from ..types import Condition, expand_like
from .denoiser import Denoiser, OnSchedule
from .parametrization import Prediction

if TYPE_CHECKING:
    from .model import DiffusionModel


class Combined(Denoiser):
    """What is known by its x̂ and ε̂ alone; the network's answer is the velocity that follows from them.

    Args:
        denoiser: gives the path and its ends.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.network, denoiser.schedule)
        self.t_min, self.t_max, self.sigma_data = denoiser.t_min, denoiser.t_max, denoiser.sigma_data
        self.denoiser = denoiser

    def label(self, t: Tensor) -> Tensor:
        return self.denoiser.label(t)

    def answer(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        clean, eps = self.predict(t, x, condition)
        scales = self.schedule(t)
        dalpha, dsigma = (expand_like(c, x).to(x.dtype) for c in (scales.dalpha, scales.dsigma))
        return dalpha * clean + dsigma * eps


class Autoguided(Combined):
    """x̂ = x̂_weak + w (x̂ - x̂_weak), and likewise ε̂: away from what a weaker model of the same data gets wrong.

    The weaker model's path may be another: it is asked at the same log-SNR.

    Args:
        denoiser: the model, guided away from no condition or not.
        guide: the weaker one.
        scale: w; 1 is off.
        conditional: whether the guide is given the condition.
        nulls: [*] "no condition" for the model and for the guide, where each has learnt its own; None for a guide
            that has learnt none.
    Raises:
        ValueError: if a guide that has learnt none is asked without a condition.
    Source: Karras et al. 2024 (Guiding a diffusion model with a bad version of itself).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        guide: Denoiser,
        scale: float,
        conditional: bool = True,
        nulls: tuple[Tensor, Tensor | None] | None = None,
    ) -> None:
        super().__init__(denoiser)
        self.nulls = nulls
        self.guide, self.scale, self.conditional = OnSchedule(guide, denoiser.schedule), scale, conditional
        self.t_min, self.t_max = max(self.t_min, self.guide.t_min), min(self.t_max, self.guide.t_max)

    def predict(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Prediction:
        main = self.denoiser.predict(t, x, condition)
        weak = self.guide.predict(t, x, self._told(condition) if self.conditional else None)
        return Prediction(*(torch.lerp(b, a, self.scale) for a, b in zip(main, weak, strict=True)))

    def _told(self, condition: Condition | None) -> Condition | None:
        """The condition for the guide: "no condition" in its own words."""
        if self.nulls is None or not isinstance(condition, Tensor):
            return condition
        own, others = self.nulls
        hidden = (condition == own.to(condition)).reshape(len(condition), -1).all(1)
        if others is not None:
            return torch.where(expand_like(hidden, condition), others.to(condition), condition)
        if bool(hidden.any()):
            raise ValueError(
                "guide: the weaker model was trained with condition_dropout=0, and has learnt no answer without a "
                f"condition, which {int(hidden.sum())} of {len(hidden)} items lack. Pass condition=, or guide by a "
                "model trained with condition_dropout > 0."
            )
        return condition


class WithinInterval(Combined):
    """A guided denoiser where low <= σ/α <= high, and the plain one elsewhere, row by row.

    Args:
        guided: what is asked within the interval.
        plain: what is asked elsewhere, of the same path.
        interval: (low, high).
    Raises:
        ValueError: unless 0 <= low < high.
    Source: Kynkäänniemi et al. 2024 (Applying guidance in a limited interval).
    """

    def __init__(self, guided: Denoiser, plain: Denoiser, interval: tuple[float, float]) -> None:
        check_interval(interval)
        super().__init__(guided)
        self.plain, self.interval = plain, tuple(interval)

    def predict(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Prediction:
        alpha, sigma = self.schedule.scales(t)
        inside = (self.interval[0] * alpha <= sigma) & (sigma <= self.interval[1] * alpha)
        if bool(inside.all()):
            return self.denoiser.predict(t, x, condition)
        if not bool(inside.any()):
            return self.plain.predict(t, x, condition)
        out = [torch.empty_like(x), torch.empty_like(x)]
        for denoiser, rows in ((self.denoiser, inside.nonzero()[:, 0]), (self.plain, (~inside).nonzero()[:, 0])):
            found = denoiser.predict(t[rows], x[rows], None if condition is None else condition[rows])
            for whole, part in zip(out, found, strict=True):
                whole[rows] = part
        return Prediction(*out)


def check_guidance(scale: float, interval: tuple[float, float] | None, guide: str | None, own: float | None) -> None:
    """Raises ValueError if a number of `Guidance` is none, or if an option has no effect."""
    for name, value in (("guidance", scale), ("guide_scale", own)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name}: a finite number is needed, found {value}; {name} = 1 is off.")
    if interval is not None:
        check_interval(interval)
    if own is not None and guide is None:
        raise ValueError("guide_scale was given without a guide. Give the run of a weaker model as guide, or drop it.")
    if own == 1:
        raise ValueError("guide_scale = 1 leaves the guide without effect. Give another value, or drop the guide.")
    if scale == 1 and own is None:
        for name, value in (("interval", interval), ("guide", guide)):
            if value is not None:
                raise ValueError(f"{name} was given, and guidance = 1 is off. Give guidance another value.")


def nulls_of(model: "DiffusionModel", guide: "DiffusionModel") -> tuple[Tensor, Tensor | None] | None:
    """What `Autoguided` is told of "no condition"; None if both mean the same by the same, or never meet it."""
    if not guide.conditional or model.conditions.dropout == 0:
        return None
    if guide.conditions.dropout == 0:
        return model.conditions.null, None
    return (model.conditions.null, guide.conditions.null) if model.conditions.num_classes is None else None


def load_guide(place: str, model: "DiffusionModel") -> "DiffusionModel":
    """The weaker model of a run, which must have learnt the same data under the same conditions.

    Args:
        place: the folder of a run, with `:weights` behind it for others than its first average (runs/small:model).
    Raises:
        ConfigError: if there is no such run, or if it is no diffusion model of the same data and conditions.
    """
    from ..training.run import Run

    folder, colon, weights = place.rpartition(":")
    if not colon or Path(place).exists():
        folder, weights = place, ""
    guide = Run.open(folder).load(weights or None, model.device)
    check_guide(place, guide, model)
    return guide.to(model.dtype)


def check_guide(place: str, guide: object, model: "DiffusionModel") -> None:
    """Raises ConfigError unless a guide is a diffusion model of the data and the conditions of a model."""
    if not isinstance(guide, type(model)):
        raise ConfigError(f"guide: {place} holds a {type(guide).__name__}; a diffusion model is needed.")
    facts = [
        ("items of the shape", model.shape, guide.shape),
        ("the model space", model.model_shape, guide.model_shape),
        ("cells of the width", model.bin_width, guide.bin_width),
        ("the transform", _told(model.transform), _told(guide.transform)),
    ]
    if guide.conditional:
        facts += [
            ("conditions", model.conditional, True),
            ("the number of classes", model.conditions.num_classes, guide.conditions.num_classes),
            ("conditions of the shape", _shape(model.conditions.null), _shape(guide.conditions.null)),
        ]
    for what, own, other in facts:
        if own != other:
            raise ConfigError(
                f"guide: {place} was trained on other data: {what} {other}, and the model has {own}. "
                "Autoguidance needs a weaker model of the same data and conditions."
            )


def _told(transform: torch.nn.Module) -> tuple[str, dict[str, list]]:
    return str(transform), {name: value.double().tolist() for name, value in transform.state_dict().items()}


def _shape(null: Tensor | None) -> list[int] | None:
    return None if null is None else list(null.shape)
