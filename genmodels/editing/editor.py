"""What can be edited: a rectified flow between items and noise, asked under prompts, and walks along its times."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..networks.attention import Attention, Tap
from ..registry import ConfigError
from ..solvers.base import Solver, title
from ..solvers.fields import VectorField

__all__ = ["Attention", "Editor", "Place", "Prompt", "Tap", "Walk"]


class Prompt(NamedTuple):
    """What a flow is told, and how strongly.

    Args:
        condition: whatever the editor's velocity understands: labels, prepared text embeddings, None for nothing.
        guidance: 1 is off (for guidance-distilled models, the scale that they are told).
        interval: noise levels (low, high) of σ/α = t/(1 - t) within which guidance acts; None for all.
    """

    condition: Any = None
    guidance: float = 1.0
    interval: tuple[float, float] | None = None


class Editor(ABC):
    """A rectified flow x_t = (1 - t) x_0 + t ε with the velocity dx/dt = E[ε - x_0 | x_t], t = 0 at items, 1 at noise.

    States are kept in float32 or better whatever the network computes in: in bf16 the rounding of states, not the
    solver, would decide how well an inversion returns.

    Attributes:
        channel_axis: of its states, the axis of features: 1 of [B, C, H, W], -1 of tokens [B, N, C]. Every other axis
            but the first is one of positions.
    """

    channel_axis: int = 1

    @abstractmethod
    def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        """[B, *latent] dx/dt at the time t [] float64, in the dtype of the states x [B, *latent]; one evaluation."""

    @abstractmethod
    def times(self, num_steps: int, x: Tensor) -> Tensor:
        """[num_steps + 1] float64 times of the steps for such states, rising from items to noise."""

    @abstractmethod
    def encode(self, items: Any) -> Tensor:
        """[B, *latent] states at t = 0 of items, float32 or better."""

    @abstractmethod
    def decode(self, x: Tensor) -> Any:
        """Items of states at t = 0."""

    @abstractmethod
    def attention(self) -> Sequence[Attention]:
        """Its self-attention layers in the order of the network; empty if it has none."""


class Place(NamedTuple):
    """Where on a walk a velocity is asked for.

    Args:
        interval: between two times of the grid, counted from noise.
        evaluation: within the step; 0 is at its beginning.
        time: t.
    """

    interval: int
    evaluation: int
    time: float


class Walk:
    """A walk along the times of an editor under one prompt; as the field of a solver it knows where it is asked.

    Args:
        times: [N + 1] rising.
    Attributes:
        place: of the present (or last) evaluation; None before the first.
        calls: evaluations of the velocity so far.
        items: in the states of the present (or last) evaluation; 0 before the first.
    """

    def __init__(self, editor: Editor, prompt: Prompt, times: Tensor) -> None:
        self.editor, self.prompt, self.times = editor, prompt, times
        self.place: Place | None = None
        self.calls = 0
        self.items = self._interval = self._evaluation = 0

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.place, self.items = Place(self._interval, self._evaluation, float(t)), len(x)
        self._evaluation, self.calls = self._evaluation + 1, self.calls + 1
        return self.editor.velocity(t, x, self.prompt)

    def at(self, interval: int, evaluation: int = 0) -> "Walk":
        """Itself, whose next evaluation is this one of the interval (counted from noise)."""
        self._interval, self._evaluation = interval, evaluation
        return self

    def solve(self, solver: Solver, x: Tensor, to_data: bool) -> Tensor:
        """[B, *latent] where a solver takes x over all the times, down to items or up to noise.

        What a solver evaluates before its first step counts as evaluation 0, and its steps then count from 1.

        Raises:
            ConfigError: if the solver steps other fields than velocities, or draws noise.
            ValueError: if the result is not finite, or there are too few steps for the solver.
        """
        if solver.needs is not VectorField or solver.whole:
            raise ConfigError(f"solver '{title(solver)}': editing needs one that steps velocities, such as rf_solver.")
        times = self.times.flip(0) if to_data else self.times
        last = len(times) - 2
        solver = solver.along(last + 1)
        self.at(0 if to_data else last)
        state = solver.start(self, times[0], x)
        first = self._evaluation
        for number, (t, s) in enumerate(pairwise(times.unbind())):
            self.at(number if to_data else last - number, first)
            step = solver.step(self, t, s, x, state, None)
            x, state = step.x, step.state
        if not bool(torch.isfinite(x).all()):
            way = "from noise to items" if to_data else "from items to noise"
            raise ValueError(
                f"editing: the way {way} ended in numbers that are not finite. Take more steps (exact inversion finds "
                "its fixed points on short ones alone), or float32."
            )
        return x
