"""How fast the answer of a denoiser's network changes with time: Lipschitz constants in t over noised data."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.dataset import Dataset, Split
from ..registry import ConfigError, register
from ..rng import SeedNoise
from ..types import Batch, Estimate, NotApplicable, Samples, SupportsDenoise, SupportsSample
from .metric import Metric, Subject

Answer = Callable[[Tensor, Tensor], Tensor]


class Grid(NamedTuple):
    """Pairs of neighbouring times k/T and (k - 1)/T, cut off at the ends of a denoiser's span.

    Args:
        index: [K] int64, the k.
        t, before: [K] float64.
        inside: [K] bool, where both times have one label.
        edge: [K] bool, where a label that several times share begins or ends.
    """

    index: Tensor
    t: Tensor
    before: Tensor
    inside: Tensor
    edge: Tensor


def grid(model: SupportsDenoise, steps: int, at: tuple[int, ...] | None = None) -> Grid:
    """The pairs at the given k, and at every edge of shared labels; all k = 1 … T if `at` is None.

    Args:
        steps: T.
        at: from 1 to T.
    """
    first, last = model.span()
    times = (torch.arange(steps + 1, dtype=torch.float64) / steps).clamp(first, last)
    label = model.label(times)
    same = label[1:] == label[:-1]
    beyond = torch.zeros(1, dtype=torch.bool)
    edge = ~same & (torch.cat((beyond, same[:-1])) | torch.cat((same[1:], beyond)))
    wanted = torch.ones_like(same) if at is None else edge.clone()
    if at is not None:
        wanted[torch.tensor(at, dtype=torch.int64) - 1] = True
    (rows,) = (wanted & (times[1:] > times[:-1])).nonzero(as_tuple=True)
    return Grid(rows + 1, times[rows + 1], times[rows], same[rows], edge[rows])


def difference_quotient(answer: Answer, t: Tensor, before: Tensor, x: Tensor) -> Tensor:
    """[B] float64 ‖p(t, x) - p(t', x)‖/|t - t'| per unit time: how a network's answer p changes with t at fixed states.

    Where the two times are close it is the length of ∂p/∂t.

    Args:
        answer: p.
        t, before: [] or [B] two times t and t'.
        x: [B, *shape].
    """
    change = (answer(t, x) - answer(before, x)).double().flatten(1)
    return torch.linalg.vector_norm(change, dim=1) / (t - before).abs()


def quotients(model: SupportsDenoise, found: Grid, batch: Batch, seeds: Tensor) -> Tensor:
    """[K, B] float64 difference quotients at noised items, per unit time; item i has the same noise at every time.

    Args:
        batch: the items, on the model's device.
        seeds: [B] of the noise.
    """
    condition = batch.condition if getattr(model, "conditional", False) else None
    rows = []
    for t, before in zip(found.t.to(batch.x.device), found.before.to(batch.x.device), strict=True):
        x = model.noised(t, batch.x, SeedNoise(seeds, purpose="lipschitz", device=batch.x.device))
        rows.append(difference_quotient(lambda t, x: model.answer(t, x, condition=condition), t, before, x))
    return torch.stack(rows)


def perturbed_error(answer: Answer, t: Tensor, x: Tensor, wanted: Tensor, delta: Tensor) -> Tensor:
    """[B] float64 mean square of p(t, x + δ) - p: how wrong an answer is where the state is off by δ [B, *shape].

    Source: Yang et al. 2024 (Lipschitz Singularities in Diffusion Models), whose test of stability perturbs early
        states by Gaussian noise.
    """
    return (answer(t, x + delta) - wanted).double().flatten(1).square().mean(1)


@register(Metric, "lipschitz")
class Lipschitz(Metric):
    """K(t) = E ‖p(x_t, t) - p(x_t, t - 1/T)‖ of what a denoiser's network answers, and the largest over t.

    Numbers are per step of a grid of T steps: per unit time they are T times as large. The norm is that of the whole
    item, about √D times that of a component. `lipschitz` is the largest of the measured K (of noisy means, so it errs
    upwards). Where labels are shared by several times, `lipschitz_inside` is the largest within an interval, which is 0
    by construction, and `lipschitz_edge` the largest over an edge, where the answer jumps instead. `lipschitz_at_k` is
    K at t = k/T.

    States are noised items of a split: the drawn item of seed i stands for item i of the split (around again at its
    end) with noise of seed i. What was drawn is not looked at.

    Args:
        steps: T.
        at: the k; every edge of shared labels is added to what the largest is taken over.
        split: of the data.
    Raises:
        ConfigError: if a k lies outside 1 … T.
    Source: Yang et al. 2024 (Lipschitz Singularities in Diffusion Models).
    """

    requires = (SupportsSample,)

    def __init__(
        self,
        steps: int = 1000,
        at: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500),
        split: Split = "test",
    ) -> None:
        if steps < 1 or not at or not all(1 <= k <= steps for k in at):
            raise ConfigError(f"lipschitz.at: steps 1 <= k <= {steps} are needed, found {list(at)}.")
        self.steps, self.at, self.split = steps, tuple(sorted(set(at))), split

    def start(self, subject: Subject) -> None:
        if not isinstance(subject.model, SupportsDenoise):
            raise NotApplicable("the model has no denoiser (methods span, label, noised and answer)")
        if not subject.dataset.size(self.split):
            raise NotApplicable(f"the split '{self.split}' of the protocol's data is empty")
        self.subject, self.grid = subject, grid(subject.model, self.steps, self.at)
        self.restart()

    def restart(self) -> None:
        self.seeds: list[Tensor] = []

    def update(self, samples: Samples, batch: Batch | None) -> None:
        self.seeds.append(samples.seeds)

    @torch.no_grad()
    def compute(self) -> dict[str, Estimate]:
        if not self.seeds:
            raise ValueError("lipschitz: no samples were taken in.")
        seeds = torch.cat(self.seeds).sort().values  # batches of the same rows whatever order they came in
        parts = [
            quotients(self.subject.model, self.grid, items(self.subject, self.split, rows), rows)
            for rows in seeds.split(self.subject.batch_size)
        ]
        values = torch.cat(parts, 1).cpu() / self.steps
        everywhere, k = torch.ones_like(self.grid.inside), self.grid.index
        places = {"": everywhere, "_inside": self.grid.inside, "_edge": self.grid.edge}
        places |= {f"_at_{n}": k == n for n in self.at}
        return {
            f"lipschitz{name}": self._largest(values[where], k[where]) for name, where in places.items() if where.any()
        }

    def _largest(self, values: Tensor, k: Tensor) -> Estimate:
        n, means = values.shape[1], values.mean(1)
        best = int(means.argmax())
        stderr = float(values[best].std()) / n**0.5 if n > 1 else None
        detail = f"t = {int(k[best])}/{self.steps}"
        return Estimate(float(means[best]), stderr, n, f"per 1/{self.steps}", "none", "stochastic", detail=detail)


def items(subject: Subject, split: Split, seeds: Tensor) -> Batch:
    """The item of a split for each seed, on the model's device."""
    data: Dataset = subject.dataset
    return data.take(split, seeds % data.size(split)).to(subject.model.device)
