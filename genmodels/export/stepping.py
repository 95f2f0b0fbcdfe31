"""How a solver that asks its field is run by a loop that answers: by replay, since solvers are pure functions."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..diffusion.denoiser import Denoiser
from ..diffusion.grids import TimeGrid
from ..diffusion.parametrization import Target
from ..diffusion.samplers import FINEST, LACKING
from ..diffusion.schedules import BISECTIONS, Linear, Schedule
from ..diffusion.time_condition import TimeCondition
from ..diffusion.times import Span
from ..registry import ConfigError
from ..rng import Noise, SeedNoise, as_seeds
from ..solvers.base import Solver, State, title
from ..solvers.brownian import Brownian, BrownianTree, Increment, path_seeds
from ..solvers.inverse import Inverse
from ..types import Condition, Seeds, Shape, expand_like


class Wanted(Exception):
    """The solver asks for the network's answer at x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class Pushed(Denoiser):
    """A denoiser whose network answers from outside: with the outputs pushed so far in their order, or `Wanted`.

    Attributes:
        asked: the times of the calls since the last push.
        silent: answer 0 in place of asking, to find out when a solver asks.
    """

    def __init__(
        self, schedule: Schedule, prediction: Target, sigma_data: float, told: TimeCondition | None = None
    ) -> None:
        super().__init__(None, schedule, prediction, sigma_data, told)
        self.silent = False
        self.push(())

    def push(self, outputs: tuple[Tensor, ...]) -> None:
        self.outputs, self.asked = outputs, []

    @property
    def fresh(self) -> bool:
        """Whether nothing has been answered in this step of the solver."""
        return not self.outputs

    def answer(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        self.asked.append(t)
        if self.silent:
            return torch.zeros_like(x)
        if len(self.asked) > len(self.outputs):
            raise Wanted(x)
        return self.outputs[len(self.asked) - 1]


class Labels:
    """The numbers that a network is told in place of times: scale · t + offset, or scale · log(σ/α)/4."""

    def __init__(self, schedule: Schedule, noise: bool, scale: float, offset: float) -> None:
        if not scale > 0:
            raise ConfigError(f"time_scale: a number > 0 is needed, found {scale}.")
        self.schedule, self.noise, self.scale, self.offset = schedule, noise, scale, offset

    def __call__(self, t: Tensor) -> Tensor:
        """float64 labels of times; the same bits as in our networks."""
        return -self.schedule.log_snr(t) / 8 * self.scale if self.noise else t.double() * self.scale + self.offset

    def times(self, labels: Tensor) -> Tensor:
        """float64 times of labels of any type, whole numbers included."""
        labels = labels.double()
        if self.noise:
            return self.schedule.time(-8 * labels / self.scale)
        return (labels - self.offset) / self.scale


class Grid:
    """The times between which a solver steps, from noise to data.

    Args:
        span: first and last time at which the network can be asked.
        denoises: whether a last step takes x̂ at the last time, in place of one that the solver takes.
    """

    def __init__(self, law: TimeGrid, schedule: Schedule, span: Span, denoises: bool) -> None:
        self.law, self.schedule, self.span, self.denoises = law, schedule, span, denoises

    def of(self, n: int | None) -> Tensor:
        """[n + 1] float64 falling times, or [n] where the last is for x̂: those of `DiffusionModel.sample`."""
        if n is None or n < 1:
            raise ValueError(f"set_timesteps: at least 1 step is needed, found {n}.")
        if n == 1 and self.denoises:
            return torch.tensor(self.span[1:], dtype=torch.float64)
        return self.law.times(n, self.schedule, self.span, self.denoises).flip(0)

    def given(self, t: Tensor, what: str) -> Tensor:
        """The times that were given, with t_min after them where the solver is to step there."""
        low, high = self.span
        slack = 1e-6 * (high - low)
        falls = t.ndim == 1 and len(t) > 0 and bool((t.diff() < 0).all())
        if not falls or t.min() < low - slack or t.max() > high + slack:
            raise ValueError(
                f"set_timesteps: {what} must fall strictly, from noise to data, at times between {low:g} and {high:g} "
                f"of the path; found the times {[round(v, 6) for v in t.flatten().tolist()[:8]]}."
            )
        t = t.clamp(low, high)
        return t if self.denoises or t[-1] == low else torch.cat((t, t.new_tensor([low])))


class Plan(NamedTuple):
    """When a solver asks on a grid, found by a run on zeros.

    Args:
        nodes: [L] the grid.
        times: [E] of each question, the entries.
        first: whether an entry is asked at the state that begins a step.
        interval: of the grid, for each entry.
        steps: intervals; the one that takes x̂ counts.
        memoryless: whether every step asks once and hands nothing on.
        denoises: whether the last step takes x̂.
        random: whether the solver wants a Brownian path.
    """

    nodes: Tensor
    times: Tensor
    first: list[bool]
    interval: list[int]
    steps: int
    memoryless: bool
    denoises: bool
    random: bool

    @classmethod
    def bare(cls, nodes: Tensor) -> "Plan":
        """The times alone, before any steps are laid."""
        return cls(nodes, nodes, [], [], 0, False, False, False)

    @classmethod
    def of(cls, solver: Solver, field: Pushed, nodes: Tensor, denoises: bool) -> "Plan":
        """The plan of a solver on a grid.

        Raises:
            ConfigError: if it asks first at another state than it is given, as with churn: a pipeline cannot know it.
        """
        steps = len(nodes) - 1 + denoises
        plan = cls(nodes, nodes, [], [], steps, False, denoises, False)
        noise = Asked(plan.path([0], (1,)))
        x, state, times, counts, bare = nodes.new_zeros(1, 1), None, [], [], True
        field.silent = True
        for j in range(steps):
            field.push(())
            x, state = plan.attempt(solver, field, j, x, state, noise)  # type: ignore[misc]  (silent: nothing wanted)
            times += field.asked
            counts.append(len(field.asked))
            bare &= not state
        field.silent = False
        field.push(())
        interval = [j for j, count in enumerate(counts) for _ in range(count)]
        started = [float(t) == float(nodes[j]) for t, j in zip(times, interval, strict=True)]
        if not started[0]:
            raise ConfigError(
                f"solver '{title(solver)}' adds noise before it asks the network, and a pipeline asks before it hears "
                "of that. Set s_churn to 0, or use ddpm, or ddim or dpmpp with eta > 0."
            )
        first = [s and (e == 0 or interval[e - 1] != interval[e]) for e, s in enumerate(started)]
        single = bare and set(counts) == {1} and not noise.asked
        return cls(nodes, torch.stack(times), first, interval, steps, single, denoises, noise.asked)

    def path(self, seeds: Seeds, shape: Shape, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> BrownianTree:
        """A Brownian path for every item, the one that `DiffusionModel.sample` has for these seeds on this grid."""
        low, high = self.nodes[-1].item(), self.nodes[0].item()
        low = low if low < high else high - 1.0  # a step to x̂ alone draws nothing
        shortest = -self.nodes.diff().max().item() / (high - low) if len(self.nodes) > 1 else 1.0
        tolerance = min(2.0**-14, max(FINEST, LACKING * shortest))
        kind = {"tolerance": tolerance, "dtype": dtype, "device": device}
        noise = SeedNoise(as_seeds(seeds), device=device)
        noise.normal(*shape, dtype=dtype)  # of the start, which `sample` draws before
        return BrownianTree(path_seeds(noise), shape, start=low, end=high, **kind)

    def begins(self, entry: int) -> int:
        """The interval that begins with an entry."""
        if not (0 <= entry < len(self.first) and self.first[entry]):
            allowed = [e for e, first in enumerate(self.first) if first]
            raise ValueError(f"step: entry {entry} does not begin a step of the solver; entries {allowed[:12]} … do.")
        return self.interval[entry]

    def attempt(
        self, solver: Solver, field: Pushed, j: int, x: Tensor, state: State | None, noise: Brownian | None
    ) -> tuple[Tensor, State] | Tensor:
        """State and memory after interval j; or, if an answer is missing, the state at which it is wanted."""
        field.asked = []
        t = self.nodes[j].to(x.device)
        try:
            if self.denoises and j == self.steps - 1:
                return field.predict(t, x).x, ()
            state = solver.start(field, t, x) if state is None else state
            step = solver.step(field, t, self.nodes[j + 1].to(x.device), x, state, noise)
        except Wanted as wanted:
            return wanted.x
        return step.x, step.state

    def rows(self, solver: Solver, field: Pushed, entries: Tensor, x: Tensor) -> Tensor:
        """The step of each row from its own entry."""
        nodes = self.nodes.to(x.device)
        t, s = nodes[entries], nodes[(entries + 1).clamp(max=len(nodes) - 1)]
        last = (entries == self.steps - 1) & self.denoises
        field.asked = []
        clean = field.predict(t, x).x if self.denoises else x
        field.asked = []
        new = solver.step(field, t, s, x, (), None).x
        return torch.where(expand_like(last, x), clean, new)


class Asked(Brownian):
    """A Brownian path that notes whether it was asked for."""

    def __init__(self, inner: Brownian) -> None:
        self.inner, self.shape, self.asked = inner, inner.shape, False

    def increment(self, t: Tensor, s: Tensor) -> Increment:
        self.asked = True
        return self.inner.increment(t, s)

    def select(self, rows: Tensor) -> Brownian:
        return self.inner.select(rows)

    def another(self, noise: Noise) -> Brownian:
        return self.inner.another(noise)


def check_solver(solver: Solver) -> None:
    """Raises ConfigError if a solver is not run by answers at times that are known beforehand."""
    name = title(solver)
    if solver.whole or solver.implicit or isinstance(solver, Inverse):
        raise ConfigError(
            f"solver '{name}': {'it has loops of its own' if solver.whole else 'it solves equations in every step'}, "
            "so that no list of timesteps can be made before. Use an explicit solver, such as euler or heun."
        )
    if not solver.serves(Pushed(Linear(), "velocity", 1.0)):
        raise ConfigError(
            f"solver '{name}' needs {solver.wanted()}, which a network with a schedule is not. For noise on the way "
            "use ddpm, or ddim or dpmpp with eta > 0."
        )


def place(labels: Tensor, label: float, near: int | None = None) -> int:
    """The entry of a label, or of the one closest to it within rounding of any float type; `near` if that is one.

    Raises:
        ValueError: if there is none, naming the closest.
    """
    gaps = (labels.double() - label).abs()
    slack = 4e-3 * abs(label) + 1e-3 * float(labels.double().diff().abs().max() if len(labels) > 1 else 1.0)
    best = int(gaps.argmin())
    if near is not None and float(gaps[near]) <= slack:
        return near
    if float(gaps[best]) > slack:
        raise ValueError(
            f"step: there is no timestep {label:g} among the {len(labels)} entries where steps begin; the closest is "
            f"{float(labels[best]):g}. Use those of scheduler.timesteps after set_timesteps."
        )
    return best


def times_of_sigmas(schedule: Schedule, sigmas: Tensor, span: Span) -> Tensor:
    """float64 times at which σ(t), which grows with t, has these values; the ends of the span beyond theirs."""
    low, high = torch.full_like(sigmas, span[0]), torch.full_like(sigmas, span[1])
    ends = schedule.scales(torch.tensor(span, dtype=torch.float64))[1]
    if sigmas.min() < ends[0] * (1 - 1e-6) or sigmas.max() > ends[1] * (1 + 1e-6):
        raise ValueError(
            f"set_timesteps: sigmas must lie between {float(ends[0]):g} and {float(ends[1]):g} on this path, found "
            f"{float(sigmas.min()):g} to {float(sigmas.max()):g}."
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        below = schedule.scales(middle)[1] < sigmas
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
