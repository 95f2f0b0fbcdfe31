"""The path of a chain of discrete noising steps, made continuous: exact at the steps, smooth between them."""

import math
from typing import Literal

import torch
from torch import Tensor

from ..registry import ConfigError, register
from .schedules import Scales, Schedule, as_times

Betas = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
LARGEST_BETA = 0.999  # of the cosine chain, whose last step would otherwise leave no signal


@register(Schedule, "discrete")
class Discrete(Schedule):
    """α² = ᾱ_k, σ² = 1 - ᾱ_k at t = (k + 1)/N after the steps k = 0 … N - 1 of a chain with ᾱ_k = Π_{i<=k} (1 - β_i).

    Between the steps the log-SNR is a monotone cubic, whose slope at a step is the harmonic mean of the secants beside
    it. Before the first step noise is added at the constant rate that gives ᾱ_0, so that t = 0 is the clean item. If ᾱ
    of the last step is 0, α goes there as a parabola. The slope is continuous, unless at such an end it must be cut.

    Args:
        alphas_cumprod: ᾱ of every step; None to make them from the β that follow.
        betas: "linear" from beta_start to beta_end; "scaled_linear", whose square roots are linear;
            "squaredcos_cap_v2", the cosine chain, which has no start and end.
        beta_start, beta_end: β of the first and last step.
        steps: N.
        zero_terminal_snr: shift and scale √ᾱ so that nothing of the signal is left after the last step.
        start: where times begin: "clean" at t_min = 1e-5, because σ' is infinite at 0, or "trained" after the first
            step, which is the least noise that the network of such a chain has seen.
    Raises:
        ConfigError: unless 1 > ᾱ_0 > … > ᾱ_{N-1} >= 0 and N >= 2.
    Source: Ho et al. 2020 (Denoising diffusion probabilistic models), equation 4; Nichol & Dhariwal 2021 (Improved
        denoising diffusion probabilistic models), equation 17; Lin et al. 2024 (Common diffusion noise schedules and
        sample steps are flawed), algorithm 1; Fritsch & Carlson 1980.
    """

    def __init__(
        self,
        alphas_cumprod: tuple[float, ...] | None = None,
        betas: Betas = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        steps: int = 1000,
        zero_terminal_snr: bool = False,
        start: Literal["clean", "trained"] = "clean",
    ) -> None:
        if alphas_cumprod is None:
            log_bar = _log_bar(betas, beta_start, beta_end, steps)
        else:
            log_bar = torch.tensor(alphas_cumprod, dtype=torch.float64).log()
        log_bar = _without_signal(log_bar) if zero_terminal_snr else log_bar
        falls = bool((torch.cat((log_bar.new_zeros(1), log_bar)).diff() < 0).all())
        if len(log_bar) < 2 or not falls or not log_bar[:-1].isfinite().all():
            raise ConfigError(
                "discrete: 1 > ᾱ_0 > ᾱ_1 > … >= 0 at two steps or more are needed, found "
                f"{_shown(log_bar.exp().tolist())}. Every β must lie between 0 and 1."
            )
        self.steps, self.first = len(log_bar), float(log_bar[0])
        self.t_min = 1e-5 if start == "clean" else 1 / self.steps
        self.ends_in_noise = bool(log_bar[-1] == -math.inf)
        self.levels = log_bar - torch.log(-torch.expm1(log_bar))
        self.slopes = self._slopes()

    @property
    def alphas_cumprod(self) -> Tensor:
        """[N] float64 ᾱ after every step."""
        return torch.sigmoid(self.levels)

    def at(self, step: Tensor) -> Tensor:
        """The times after steps k, whole numbers or not."""
        return (step.double() + 1) / self.steps

    def _slopes(self) -> Tensor:
        """[M] dλ/dk at the steps whose λ is finite: harmonic means of the secants beside them.

        A cubic falls between two steps if its slopes there are at most three times its secant. Harmonic means are at
        most twice the smaller one, and near the data, where λ falls like -log k, closer to its slope than others.
        """
        secants = self.levels[: self.steps - self.ends_in_noise].diff()
        start = _rate(self.first, torch.ones(1, dtype=torch.float64))  # that of the noise before the first step
        if not len(secants):
            return start
        last = 1.5 * secants[-1:] - 0.5 * secants[-2:-1] if len(secants) > 1 else secants
        between = 2 * secants[1:] * secants[:-1] / (secants[1:] + secants[:-1])
        slopes = torch.cat((start, between, last))
        steepest = 3 * torch.maximum(torch.cat((secants[:1], secants)), torch.cat((secants, secants[-1:])))
        return torch.maximum(slopes, steepest).clamp(max=0)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The interval i = 0 … N - 1 of each time, which ends with step i, and how far it has gone there."""
        p = self.steps * as_times(t)
        i = p.detach().floor().long().clamp(0, self.steps - 1)
        return i, p - i

    def _level(self, i: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """λ and dλ/dk of a cubic interval i >= 1, both of any kind elsewhere."""
        levels, slopes = self.levels.to(r.device), self.slopes.to(r.device)
        right = i.clamp(1, max(1, len(slopes) - 1))
        left = right - 1
        right = right.clamp(max=len(slopes) - 1)
        a, rise, d, e = levels[left], levels[right] - levels[left], slopes[left], slopes[right]
        c2, c3 = 3 * rise - 2 * d - e, d + e - 2 * rise
        return a + r * (d + r * (c2 + r * c3)), d + r * (2 * c2 + 3 * r * c3)

    def _scales(self, t: Tensor) -> Scales:
        """Scales with slopes per step in place of those per unit of time."""
        i, r = self._place(t)
        level, slope = self._level(i, r)
        decay = -self.first * torch.where(i == 0, r, 1.0)
        early = i == 0
        alpha = torch.where(early, torch.exp(-decay / 2), torch.sigmoid(level).sqrt())
        sigma = torch.where(early, torch.sqrt(-torch.expm1(-decay)), torch.sigmoid(-level).sqrt())
        slope = torch.where(early, _rate(self.first, torch.where(early, r, 1.0)), slope)
        dalpha, dsigma = slope * alpha * sigma.square() / 2, -slope * sigma * alpha.square() / 2
        if not self.ends_in_noise:
            return Scales(alpha, sigma, dalpha, dsigma)
        late = i == self.steps - 1
        a, bend = self._tail()
        tail, dtail = a * (1 - r) * (1 + bend * r), a * (bend - 1 - 2 * bend * r)
        rest = torch.where(late, torch.sqrt((1 - tail) * (1 + tail)), 1.0)
        return Scales(
            torch.where(late, tail, alpha),
            torch.where(late, rest, sigma),
            torch.where(late, dtail, dalpha),
            torch.where(late, -tail * dtail / rest, dsigma),
        )

    def _tail(self) -> tuple[float, float]:
        """α where its way to 0 begins, and the bend of that parabola: with the slope there, if so it falls."""
        level, slope = float(self.levels[-2]), float(self.slopes[-1])
        sigma2 = 1 / (1 + math.exp(level))
        return math.sqrt(1 - sigma2), min(1.0, max(-1.0, 1 + 0.5 * slope * sigma2))

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._scales(t)[:2]

    def __call__(self, t: Tensor) -> Scales:
        alpha, sigma, dalpha, dsigma = self._scales(t)
        return Scales(alpha, sigma, self.steps * dalpha, self.steps * dsigma)

    def log_snr(self, t: Tensor) -> Tensor:
        i, r = self._place(t)
        level = torch.where(i == 0, -torch.expm1(-self.first * torch.where(i == 0, r, 1.0)).log(), self._level(i, r)[0])
        return torch.where(i == self.steps - 1, super().log_snr(t), level) if self.ends_in_noise else level


def _rate(first: float, r: Tensor) -> Tensor:
    """dλ/dk at the share r of the first step, in which -log ᾱ grows evenly to -first: λ = -log(e^{-first r} - 1)."""
    return -first / torch.expm1(first * r)


def _log_bar(betas: Betas, start: float, end: float, steps: int) -> Tensor:
    """[N] log ᾱ of a named chain."""
    if steps < 2:
        raise ConfigError(f"discrete: at least 2 steps are needed, found {steps}.")
    if betas == "squaredcos_cap_v2":
        bar = torch.cos((torch.linspace(0, 1, steps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1 - bar[1:] / bar[:-1]).clamp(max=LARGEST_BETA)
    elif betas == "scaled_linear" and min(start, end) > 0:
        beta = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()
    else:
        beta = torch.linspace(start, end, steps, dtype=torch.float64)
    return torch.log1p(-beta).cumsum(0)


def _without_signal(log_bar: Tensor) -> Tensor:
    """log ᾱ with √ᾱ moved to end at 0, and scaled to begin where it did."""
    root = (log_bar / 2).exp()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return 2 * root.log()


def _shown(values: list[float]) -> str:
    shown = [f"{v:.6g}" for v in (values if len(values) <= 5 else [*values[:3], *values[-2:]])]
    return ", ".join(shown if len(values) <= 5 else [*shown[:3], "…", *shown[3:]]) or "none"
