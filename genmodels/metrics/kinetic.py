"""How much a diffusion model moves its items: the kinetic energy of its velocity, beside that of exact ones."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..diffusion import separation
from ..diffusion.kinetic import energy
from ..diffusion.model import DiffusionModel
from ..diffusion.model_space import InModelSpace
from ..diffusion.schedules import Linear, Schedule
from ..diffusion.tabulated import Table
from ..registry import ConfigError, register
from ..rng import SeedNoise, generator
from ..types import Batch, Estimate, NotApplicable, Samples, SupportsLogProb, expand_like, sum_items
from .metric import Metric, Subject

REMEMBERED = 5000  # training items that references are made of; more are thinned out evenly
QUERIES = 256
WIDEST = 2048  # components up to which a covariance is made


@register(Metric, "kinetic_energy")
class KineticEnergy(Metric):
    """1/D ∫ E|v(t, x_t)|² dt of a diffusion model on noised items, in squared units of model space.

    The items are those that are scored, with noise of their seeds. Times run from t_min to t_max of the model, one in
    each of some parts of u in [0, 1] with t ~ sin²(πu/2), close together at both ends where velocities may grow: the
    mean over items is unbiased for any path. The velocity of a conditional model is that under the item's condition,
    whose energy is the larger for it.

    References: the energy of the conditional velocities of this path (E_c, which no exact velocity exceeds), that of
    the exact velocity if training items are all there is, on this path and on the linear one, and the least that any
    path could have if the data were Gaussian (a bound for all others, whose W2² is no less).

    Args:
        points: times of each item, an evaluation of the network each.
    Raises:
        ConfigError: unless points >= 2.
    Source: Shaul et al. 2023 (On kinetic optimal probability paths for generative models), section 3.1.
    """

    requires = (SupportsLogProb,)

    def __init__(self, points: int = 16) -> None:
        if points < 2:
            raise ConfigError(f"kinetic_energy: at least 2 points are needed, found {points}.")
        self.points = points

    def start(self, subject: Subject) -> None:
        if not isinstance(subject.model, DiffusionModel):
            raise NotApplicable("needs the velocity of a path from noise to data, which only diffusion models have")
        self.model = subject.model
        self.references = _references(self.model, subject.dataset, subject.batch_size)
        self.restart()

    def restart(self) -> None:
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def update(self, samples: Samples, batch: Batch | None) -> None:
        found = _energies(self.model, batch, samples.seeds, self.points).cpu()
        scored = samples.likelihood.value.detach().isfinite().cpu()  # what could not be scored is no item to rest on
        self.kept.append(found.where(scored, torch.nan))

    def compute(self) -> dict[str, Estimate]:
        if not self.kept:
            raise ValueError("kinetic_energy: no items were taken in.")
        items = torch.cat(self.kept)
        stderr = items.std().item() / math.sqrt(len(items)) if len(items) > 1 else None
        estimate = Estimate(
            value=items.mean().item(),
            stderr=stderr,
            n=len(items),
            unit="1/dim",
            better="none",
            kind="stochastic",
            references=self.references,
            items=items,
            detail=f"{self.points} times an item",
        )
        return {"kinetic_energy": estimate}


def _energies(model: DiffusionModel, batch: Batch, seeds: Tensor, points: int) -> Tensor:
    """[B] float64 ∫|v|² dt/D of each item, one time in each of the parts."""
    batch = batch.to(model.device)
    noise = SeedNoise(seeds, purpose="kinetic energy", device=model.device)
    x = model.transform(batch.x.to(torch.promote_types(batch.x.dtype, model.dtype)), noise)[0].to(model.dtype)
    condition = batch.condition if model.conditional else None
    first, last = model.denoiser.t_min, model.denoiser.t_max
    total = torch.zeros(len(x), dtype=torch.float64, device=model.device)
    for k in range(points):
        u = (k + noise.uniform(dtype=torch.float64)) / points
        t = first + (last - first) * torch.sin(math.pi / 2 * u).square()
        scales, eps = model.schedule(t), noise.normal(*model.model_shape, dtype=x.dtype)
        alpha, sigma = (expand_like(c, x).to(x.dtype) for c in (scales.alpha, scales.sigma))
        v = model.velocity(t, alpha * x + sigma * eps, condition=condition)
        total += (last - first) * math.pi / 2 * torch.sin(math.pi * u) * sum_items(v.double().square())
    return total / (points * math.prod(model.model_shape))


class _Some:
    """Training items in order, thinned out evenly to a number that can be compared with each other."""

    def __init__(self, dataset: Dataset, batch_size: int, device: torch.device) -> None:
        size = dataset.size("train")
        self.rows = torch.arange(size)[:: max(1, -(-size // REMEMBERED))]
        self.dataset, self.batch_size, self.device = dataset, batch_size, device

    def __iter__(self) -> Iterator[Batch]:
        return (self.dataset.take("train", rows).to(self.device) for rows in self.rows.split(self.batch_size))


@torch.no_grad()
def _references(model: DiffusionModel, dataset: Dataset, batch_size: int) -> dict[str, float]:
    """Energies by name; none if there are too few training items, or only equal ones."""
    g = generator("kinetic energy")
    items = InModelSpace(model.transform, _Some(dataset, batch_size, model.device), g)
    try:
        curve = separation.of_items(items, queries=QUERIES, generator=g)
        gaussian = separation.of_covariance(items) if math.prod(model.model_shape) <= WIDEST else None
    except ValueError:
        return {}
    span = model.denoiser.t_min, model.denoiser.t_max
    path = _on_cpu(model.schedule)
    own = energy(path, curve, span)
    found = {
        "conditional velocities": own.conditional,
        "remembered items": own.marginal,
        "remembered items, linear path": energy(Linear(), curve).marginal,
    }
    return found if gaussian is None else found | {"least for Gaussian data": gaussian.distance()}


def _on_cpu(schedule: Schedule) -> Schedule:
    """The schedule where quadratures are done; one that keeps its path in buffers is read from a copy."""
    return Table(schedule.knots.cpu()) if isinstance(schedule, Table) else schedule
