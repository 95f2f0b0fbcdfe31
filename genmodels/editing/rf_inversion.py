"""RF-Inversion: an inversion led to a Gaussian noise, and a way back led to the item."""

from torch import Tensor

from ..registry import register
from ..rng import Noise
from .checks import check_finite, check_range, check_steps
from .editor import Editor, Prompt, Walk
from .method import EditMethod, Outcome


@register(EditMethod, "rf_inversion")
class RFInversion(EditMethod):
    """Controlled ODEs: up between the flow and a line to fresh noise y_1, down between the flow and a line to x_0.

    Up over steps h from t to s under the source prompt, and down under the target prompt from s to t:

        x += h [v + γ ((y_1 - x)/(1 - t) - v)]
        x += h [u + η ((x_0 - x)/s - u)],  u = -v(x, s),  η only in the first `stop` steps

    Up it ends in a likelier noise than the flow's, from which the flow does not return to x_0: η does. With η = 1 in
    every step the way down is the line to x_0. It takes 2 num_steps evaluations.

    Stochastic, the way down is from the second step on the SDE of the same marginals: with the score
    ∇ log p = ((1 - t) u - x)/t and the noise g² = 2t/(1 - t), its drift u + g²/2 ∇ log p is 2u - x/(1 - t), and u is
    controlled as above. The first step is the ODE's, because g is infinite at t = 1.

    The authors invert under the empty prompt with guidance 1, and edit with guidance 3.5: give such as the source
    prompt. `invert` gives the end of the controlled way up.

    Args:
        num_steps: each way.
        gamma: γ, 0 for the flow alone.
        eta: η, 0 for the flow alone.
        stop: steps next to noise that η acts in; more keep more of the source.
        stochastic: whether the way down draws noise.
    Raises:
        ConfigError: unless gamma and eta are within 0 and 1, and 0 <= stop <= num_steps.
    Source: Rout et al. 2025 (Semantic Image Inversion), algorithms 1 and 2.
    """

    def __init__(
        self, num_steps: int = 28, gamma: float = 0.5, eta: float = 0.9, stop: int = 7, stochastic: bool = False
    ) -> None:
        check_steps(num_steps)
        check_range("gamma", gamma, 0, 1, "a share")
        check_range("eta", eta, 0, 1, "a share")
        check_range("stop", stop, 0, num_steps, "0 and num_steps")
        self.num_steps, self.gamma, self.eta, self.stop, self.stochastic = num_steps, gamma, eta, stop, stochastic

    def invert(self, editor: Editor, x: Tensor, source: Prompt, times: Tensor, noise: Noise) -> Outcome:
        walk, last = Walk(editor, source, times), len(times) - 1
        goal = noise.normal(*x.shape[1:], dtype=x.dtype).to(x.device)
        for k in range(last):
            t, h = times[k], float(times[k + 1] - times[k])
            v = walk.at(last - 1 - k)(t, x)
            x = x + h * ((1 - self.gamma) * v + self.gamma / float(1 - t) * (goal - x))
        return Outcome(check_finite(x, "rf_inversion"), x, walk.calls)

    def edit(self, editor: Editor, x: Tensor, source: Prompt, target: Prompt, times: Tensor, noise: Noise) -> Outcome:
        inverted = self.invert(editor, x, source, times, noise)
        walk, last, y = Walk(editor, target, times), len(times) - 1, inverted.x
        for number in range(last):
            t, h = times[last - number], float(times[last - number] - times[last - number - 1])
            eta = self.eta if number < self.stop else 0.0
            u = eta / float(t) * (x - y) - (1 - eta) * walk.at(number)(t, y)
            y = self._stepped(y, u, float(t), h, noise) if self.stochastic and number else y + h * u
        return Outcome(check_finite(y, "rf_inversion"), inverted.x, inverted.nfe + walk.calls)

    def _stepped(self, y: Tensor, u: Tensor, t: float, h: float, noise: Noise) -> Tensor:
        """By Euler and Maruyama."""
        xi = noise.normal(*y.shape[1:], dtype=y.dtype).to(y.device)
        return y + h * (2 * u - y / (1 - t)) + (2 * t / (1 - t) * h) ** 0.5 * xi
