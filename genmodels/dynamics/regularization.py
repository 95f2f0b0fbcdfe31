"""Regularization of continuous-depth models, and `evolve`, the one way in which they solve their equations."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..registry import kind
from ..rng import Noise
from ..solvers.base import Controller, Gradient, Solver, integrate
from ..solvers.solution import Solution


@kind
class Regularizer:
    """A penalty on how a model's equation is solved, added to its loss in training."""


class Evolved(NamedTuple):
    """A solution with what its regularizers have to say.

    Args:
        solution: of the model's own equation.
        penalty: [B] to be added to the loss of each item; 0 without regularizers.
        logs: detached scalars: "nfe", and each regularizer's value.
    """

    solution: Solution
    penalty: Tensor
    logs: dict[str, Tensor]


def evolve(
    field: Any,
    x: Tensor,
    times: Tensor,
    *,
    solver: Solver,
    controller: Controller,
    gradient: Gradient,
    regularizers: tuple[Regularizer, ...] = (),
    progress: float = 1.0,
    noise: Noise | None = None,
    brownian: Any = None,
    save: Literal["last", "all", "dense"] = "last",
    max_steps: int = 10_000,
    on_failure: Literal["raise", "return"] = "raise",
) -> Evolved:
    """`integrate` with regularizers.

    Args:
        regularizers: none in evaluation.
        progress: of training, for coefficients with a schedule.
        noise: what regularizers draw from.
        brownian: the path that drives an SDE.
    """
    solution = integrate(
        field,
        x,
        times,
        solver=solver,
        controller=controller,
        gradient=gradient,
        noise=brownian,
        save=save,
        max_steps=max_steps,
        on_failure=on_failure,
    )
    penalty = x.new_zeros(len(x))
    return Evolved(solution, penalty, {"nfe": solution.nfe.to(torch.float64).mean()})
