"""DNAEdit: one noise to which every item is walked, and the misses on the way kept for the way back."""

from torch import Tensor

from ..registry import register
from ..rng import Noise
from .checks import check_finite, check_range, check_steps
from .editor import Editor, Prompt, Walk
from .method import EditMethod, Outcome


@register(EditMethod, "dnaedit")
class DNAEdit(EditMethod):
    """Direct noise alignment: steps straight towards one noise ε, whose misses d are kept and added on the way back.

    Up, from x = x_0, over steps h from t to s under the source prompt, all but the last `skip`:

        x̃ = x + h (ε - x)/(1 - t),  v = v(x̃, s),  d = x̃ - x - h v,  x += h v

    Down from there by the same steps under the target prompt, with o = x_0 at the start:

        v' = v(x + d, s),  o -= h (v' - v),  x -= h [mvg v' + (1 - mvg)(x - o)/s]

    Equal prompts return x_0 if mvg = 1, up to rounding. It keeps two states a step, and takes 2 (num_steps - skip)
    evaluations. The authors use guidance 1 of the source and 2.5 of the target. What it walks to is no noise that could
    be denoised without what was kept, so it does not count as inversion.

    Args:
        num_steps: of the grid.
        mvg: share of the target's velocity; the rest leads to o, which moves as FlowEdit would, and keeps the source.
        skip: steps next to noise that it leaves out; more keep more of the source.
    Raises:
        ConfigError: unless 0 <= mvg <= 1 and 0 <= skip < num_steps.
    Source: Xie et al. 2025 (DNAEdit).
    """

    def __init__(self, num_steps: int = 28, mvg: float = 0.85, skip: int = 4) -> None:
        check_steps(num_steps)
        check_range("mvg", mvg, 0, 1, "a share")
        check_range("skip", skip, 0, num_steps - 1, "0 and num_steps - 1")
        self.num_steps, self.mvg, self.skip = num_steps, mvg, skip

    def edit(self, editor: Editor, x: Tensor, source: Prompt, target: Prompt, times: Tensor, noise: Noise) -> Outcome:
        up, down = Walk(editor, source, times), Walk(editor, target, times)
        eps = noise.normal(*x.shape[1:], dtype=x.dtype).to(x.device)
        last, y, kept = len(times) - 1, x, []
        for k in range(last - self.skip):
            t, s = times[k], times[k + 1]
            h = float(s - t)
            aimed = y + h / float(1 - t) * (eps - y)
            v = up.at(last - 1 - k)(s, aimed)
            new = y + h * v
            kept.append((aimed - new, v))
            y = new
        whole = x
        for k, (missed, was) in reversed(list(enumerate(kept))):
            s, h = times[k + 1], float(times[k + 1] - times[k])
            v = down.at(last - 1 - k)(s, y + missed)
            whole = whole - h * (v - was)
            y = y - h * (self.mvg * v + (1 - self.mvg) / float(s) * (y - whole))
        return Outcome(check_finite(y, "dnaedit"), None, up.calls + down.calls)
