"""Linear fields, on which regularizers have closed forms, and sources of given draws."""

import torch
from torch import Tensor, nn

from genmodels.dynamics.regularization import evolve
from genmodels.rng import BatchNoise, Noise, generator
from genmodels.solvers.runge_kutta import Tsit5
from genmodels.solvers.step_size import PI

SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
START = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
TIGHT = PI(rtol=1e-9, atol=1e-9)


class Given(Noise):
    """The draws of each row, handed out as they are asked for."""

    def __init__(self, draws: Tensor) -> None:
        super().__init__(len(draws), "cpu")
        self.draws = draws

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.draws.reshape(self.n, *shape).to(dtype)

    normal = uniform


class Linear(nn.Module):
    """x' = x Aᵀ, or of its tanh."""

    def __init__(self, matrix: Tensor, squashed: bool = False) -> None:
        super().__init__()
        self.matrix, self.squashed = nn.Parameter(matrix.clone()), squashed

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (x @ self.matrix.T).tanh() if self.squashed else x @ self.matrix.T


def line(*times: float) -> Tensor:
    return torch.tensor(times, dtype=torch.float64)


def penalty(regularizer, field, x=START, times=line(0, 1), noise=None, **options):
    """[B] value of a regularizer of coefficient 1."""
    options = {"solver": Tsit5(), "controller": PI(rtol=1e-6, atol=1e-6), **options}
    noise = noise or BatchNoise(len(x), generator=generator("penalty"))
    regularizer.coefficient, regularizer.end = 1.0, None
    return evolve(field, x, times, regularizers=(regularizer,), noise=noise, **options).penalty
