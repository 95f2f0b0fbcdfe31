"""An editor without a network: prompts are Gaussian mixtures, and every velocity is exact."""

import torch
from torch import Tensor

from ..distributions import GaussianMixture
from .editor import Attention, Editor, Prompt


class MixtureEditor(Editor):
    """Rectified flows of Gaussian mixtures: what is wrong with an edit is then the method's fault alone.

    The condition of a prompt is the mixture that it describes. With guidance w the velocity is v_0 + w (v - v_0), v_0
    that of the mixture without a prompt.

    Args:
        free: the mixture without a prompt; None if nothing is guided.
        shift: s of the times s u/(1 + (s - 1) u), u even; FLUX has s = e^μ.
    """

    def __init__(self, free: GaussianMixture | None = None, shift: float = 1.0) -> None:
        self.free, self.shift = free, shift

    def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        t = t.to(x.device)
        alpha, one = 1 - t, torch.ones_like(t)
        found = prompt.condition.velocity(x, alpha, t, -one, one)
        if prompt.guidance == 1 or not within(prompt.interval, alpha, t):
            return found
        if self.free is None:
            raise ValueError("guidance needs the mixture without a prompt. Give `free`, or guidance=1.")
        free = self.free.velocity(x, alpha, t, -one, one)
        return free + prompt.guidance * (found - free)

    def times(self, num_steps: int, x: Tensor) -> Tensor:
        even = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        return self.shift * even / (1 + (self.shift - 1) * even)

    def encode(self, items: Tensor) -> Tensor:
        return items

    def decode(self, x: Tensor) -> Tensor:
        return x

    def attention(self) -> tuple[Attention, ...]:
        return ()


def within(interval: tuple[float, float] | None, alpha: Tensor, sigma: Tensor) -> bool:
    """Whether the noise level σ/α lies in an interval; α may be 0 if σ is not, where the level is infinite."""
    if interval is None:
        return True
    level = sigma / alpha  # not compared as σ <= high α: an infinite bound times 0 is undefined
    return bool((interval[0] <= level) & (level <= interval[1]))
