"""Uni-Edit: inversion part of the way, and a way back that goes further where the prompts disagree."""

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..rng import Noise
from ..solvers.multistep import UniInv
from .checks import check_finite, check_range, check_steps
from .editor import Editor, Prompt, Walk
from .method import EditMethod, Outcome


@register(EditMethod, "uni_edit")
class UniEdit(EditMethod):
    """Inverts the first round(α N) of N steps by Uni-Inv, and comes back by both velocities, mixed by a mask.

    Down over steps from t to s, with the velocities v_t and v_s of both prompts at (t, x), d = v_t - v_s, and the mask
    m, the mean of |d| over channels, brought to [0, 1] over the positions of an item:

        x += (s - t) [m v_t + (1 - m) v_s + ω (1 + m) d]

    m is 0 if |d| is the same everywhere: with equal prompts, which make it the round trip of Uni-Inv and Euler, and for
    items of one position, where α = ω = 1 is editing by Uni-Inv. It takes 3 round(α N) + 1 evaluations. The authors' α
    is from 0.6 to 0.8; their ω suits prompts that differ weakly, and overshoots where they do not.

    Args:
        num_steps: N of the grid.
        alpha: share of the steps that it inverts; less keeps more of the source.
        omega: ω, how far beyond the source's velocity it goes.
    Raises:
        ConfigError: unless 0 <= alpha <= 1, with at least one step inverted, and omega >= 0.
    Source: Jiao et al. 2025 (UniEdit-Flow).
    """

    def __init__(self, num_steps: int = 15, alpha: float = 0.6, omega: float = 5.0) -> None:
        check_steps(num_steps)
        check_range("alpha", alpha, 0, 1, "a share of the steps")
        check_range("omega", omega, 0, float("inf"), "a factor on the difference of velocities")
        self.num_steps, self.alpha, self.omega = num_steps, alpha, omega
        self.inverted = round(alpha * num_steps)
        if not self.inverted:
            raise ConfigError(
                f"edit.method.alpha: {alpha} of {num_steps} steps is none, so nothing would be edited. Take more."
            )

    def invert(self, editor: Editor, x: Tensor, source: Prompt, times: Tensor, noise: Noise) -> Outcome:
        if self.inverted < self.num_steps:
            raise ConfigError(
                f"edit.method: 'uni_edit' inverts {self.inverted} of {self.num_steps} steps, and does not come to "
                "noise. Take alpha=1, or uni_inv."
            )
        walk = Walk(editor, source, times)
        z = self._raised(walk, x)
        return Outcome(z, z, walk.calls)

    def edit(self, editor: Editor, x: Tensor, source: Prompt, target: Prompt, times: Tensor, noise: Noise) -> Outcome:
        walk, other = Walk(editor, source, times), Walk(editor, target, times)
        y = top = self._raised(walk, x)
        for k in range(self.inverted, 0, -1):
            interval, t, h = len(times) - 1 - k, times[k], float(times[k - 1] - times[k])
            wanted, was = other.at(interval)(t, y), walk.at(interval)(t, y)
            apart = wanted - was
            m = _mask(apart, editor.channel_axis)
            y = y + h * (was + (m + self.omega * (1 + m)) * apart)
        whole = self.inverted == self.num_steps
        return Outcome(check_finite(y, "uni_edit"), top if whole else None, walk.calls + other.calls)

    def _raised(self, walk: Walk, x: Tensor) -> Tensor:
        """[B, *latent] where Uni-Inv takes x over the steps that are inverted."""
        times, last = walk.times, len(walk.times) - 2
        solver, state = UniInv(), UniInv().start(walk.at(last), times[0], x)
        for k in range(self.inverted):
            step = solver.step(walk.at(last - k, 1), times[k], times[k + 1], x, state)
            x, state = step.x, step.state
        return x


def _mask(apart: Tensor, axis: int) -> Tensor:
    """The mean of |apart| over channels, from 0 at an item's least to 1 at its most; 0 if it is the same everywhere."""
    size = apart.abs().mean(axis, keepdim=True)
    places = tuple(range(1, size.ndim))
    low, high = size.amin(places, keepdim=True), size.amax(places, keepdim=True)
    span = high - low
    return (size - low) / torch.where(span > 0, span, 1.0)
