"""FlowEdit: from item to item along the difference of two velocities, without inversion."""

from torch import Tensor

from ..registry import register
from ..rng import Noise
from .checks import check_finite, check_range, check_steps
from .editor import Editor, Prompt, Walk
from .method import EditMethod, Outcome


@register(EditMethod, "flowedit")
class FlowEdit(EditMethod):
    """An ODE from item to item by the mean difference of both velocities at the same noise; it never inverts.

    With y = x_0 at the start, going down, over steps from t to s and fresh noises ε:

        z = (1 - t) x_0 + t ε,  y += (s - t) mean_ε[v(z + y - x_0, t; target) - v(z, t; source)]

    over the last n_max steps next to items but n_min, which are Euler's from z + y - x_0 under the target prompt. Equal
    prompts at equal guidance return x_0 itself if n_min = 0. It takes 2 n_avg (n_max - n_min) + n_min evaluations.

    The defaults are those for FLUX, with guidance 1.5 of the source and 5.5 of the target; for Stable Diffusion 3 they
    are 50 steps, n_max 33, guidance 3.5 and 13.5.

    Args:
        num_steps: of the grid.
        n_max: steps next to items that it walks; fewer keep more of the source.
        n_min: steps at the end that only sample.
        n_avg: noises whose mean a step takes.
    Raises:
        ConfigError: unless 0 <= n_min <= n_max <= num_steps and n_avg >= 1.
    Source: Kulikov et al. 2025 (FlowEdit), algorithm 1.
    """

    def __init__(self, num_steps: int = 28, n_max: int = 24, n_min: int = 0, n_avg: int = 1) -> None:
        check_steps(num_steps)
        check_range("n_max", n_max, 0, num_steps, "0 and num_steps")
        check_range("n_min", n_min, 0, n_max, "0 and n_max")
        check_range("n_avg", n_avg, 1, float("inf"), "a count of noises")
        self.num_steps, self.n_max, self.n_min, self.n_avg = num_steps, n_max, n_min, n_avg

    def edit(self, editor: Editor, x: Tensor, source: Prompt, target: Prompt, times: Tensor, noise: Noise) -> Outcome:
        walks = Walk(editor, source, times), Walk(editor, target, times)
        steps = [(len(times) - 1 - k, times[k], float(times[k] - times[k - 1])) for k in range(self.n_max, 0, -1)]
        moved = x.new_zeros(x.shape)  # y - x_0, so that equal prompts are asked at one point to the last bit
        for interval, t, h in steps[: self.n_max - self.n_min]:
            moved = moved - h * self._apart(walks, interval, t, x, moved, noise)
        y = x + moved
        if self.n_min:
            y = _noised(x, times[self.n_min], noise) + moved
        for interval, t, h in steps[self.n_max - self.n_min :]:
            y = y - h * walks[1].at(interval)(t, y)
        return Outcome(check_finite(y, "flowedit"), None, sum(walk.calls for walk in walks))

    def _apart(
        self, walks: tuple[Walk, Walk], interval: int, t: Tensor, x: Tensor, moved: Tensor, noise: Noise
    ) -> Tensor:
        """[B, *latent] mean over noises of the target's velocity less the source's."""
        source, target = (walk.at(interval) for walk in walks)
        total = x.new_zeros(x.shape)
        for _ in range(self.n_avg):
            z = _noised(x, t, noise)
            total = total + (target(t, z + moved) - source(t, z))
        return total / self.n_avg


def _noised(x: Tensor, t: Tensor, noise: Noise) -> Tensor:
    eps = noise.normal(*x.shape[1:], dtype=x.dtype).to(x.device)
    return (1 - float(t)) * x + float(t) * eps
