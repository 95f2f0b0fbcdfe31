"""Chains of a conditional energy: where they start, their step size, and how many steps make a sample."""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..autocorrelation import autocorrelation_time
from ..registry import ConfigError
from ..rng import BatchNoise, Noise
from .chains import Kernel, State, adapt, advance, begin, record, restart
from .conditional import Conditional
from .line import BEYOND, LineLaw
from .mixing import split_r_hat
from .score_matching import FitWarning

NODES = 4001  # of the quadrature of a single coefficient
WIDE, WIDENED = 2.0, 6  # its grid over the interval of the potential, and how often it may be doubled
CHAINS = 4  # at each conditioning where R̂ is measured
MIXED = 1.1  # R̂ that is told beyond
LONG = 50  # autocorrelation times of a trace whose R̂ says something
SLUGGISH = 0.5  # of the acceptance found when tuned: a sample's chain lasts half as many autocorrelation times as meant
SPREAD, CHANCE = 0.25, 3.0  # of acceptances of a good model's chains, and standard errors without a word
NEVER, STUCK = 1e-9, 0.01  # probability of never moving that chance cannot be, and share of such chains without a word
UNLIKE = (
    "The coarser fields that are given may be unlike those of the training data: compare their units, grid, mean and "
    "variance, and if the model drew them itself, the spectra of samples and data (polish mends coarse levels). "
    "Otherwise fit the model again, with more fields to tune its chains by (tuning.starts)."
)


class ChainWarning(UserWarning):
    """Chains of samples move less than those by which they were tuned."""


@dataclass(frozen=True)
class Tuning:
    """How chains are tuned when a model is fitted, and how long those of a sample are.

    Args:
        starts: training fields whose coarse parts condition the chains.
        adapt: transitions in which the step size is found.
        record: transitions over which autocorrelation is measured; R̂, over 50 autocorrelation times if that is more.
        decorrelate: integrated autocorrelation times that a sample's chain lasts.
        least, most: bounds on its transitions.
    """

    starts: int = 64
    adapt: int = 200
    record: int = 300
    decorrelate: float = 10.0
    least: int = 40
    most: int = 2000

    def __post_init__(self) -> None:
        if self.starts < CHAINS or self.adapt < 10 or self.record < 20 or not 1 <= self.least <= self.most:
            raise ConfigError(
                f"tuning: starts >= {CHAINS}, adapt >= 10, record >= 20 and 1 <= least <= most are needed, "
                f"found {self}."
            )


def start(scale: Tensor, noise: Noise) -> Tensor:
    """[n, dim] where chains of a sample begin: independent coefficients of scales [n, dim]."""
    return noise.normal(scale.shape[1], dtype=scale.dtype) * scale


def draw(
    conditional: Conditional, kernel: Kernel, base: Tensor, noise: Noise, num_steps: int | None = None
) -> tuple[Tensor, State | None]:
    """[n, dim] ζ of p(ζ | base) by a chain of the frozen step size, and its last state (None without a chain).

    Args:
        base: [n, H, W] known part of the fields in data units.
        num_steps: transitions; those found by `tune` if None.
    Raises:
        ValueError: if chains begin, propose or end where the energy or the field is not finite.
    """
    if conditional.level.dim == 1:
        return line_law(conditional, base).sample(noise, (1,), dtype=base.dtype).to(base.device), None
    potential, scale = conditional.potential(base), conditional.scale_given(base)
    state = begin(potential, start(scale, noise), where=conditional.level.label)
    steps = int(conditional.num_steps) if num_steps is None else num_steps
    state = advance(kernel, potential, state, steps, step_size=conditional.step_size, scale=scale, noise=noise)
    failed = state.failed > 0
    if failed.any():
        raise ValueError(
            f"{conditional.level.label}: chains of {int(failed.sum())} of {len(failed)} items meet energies that are "
            f"not finite, in {int(state.failed.sum())} of {steps * len(failed)} proposals (the first is item "
            f"{int(failed.nonzero()[0])}). {UNLIKE}"
        )
    return state.z, state


def check_moves(conditional: Conditional, accepted: Tensor, transitions: int) -> None:
    """Warn if the chains of samples hardly move: draws are then what they began with, not those of the law.

    The step size was found at training fields. Told is a mean acceptance below half of that found there: a chain that
    moves half as often lasts half as many autocorrelation times, and `adapt` refuses the same share of its target.
    Chains of a good model differ too, by what they are given: the mean must be 3 standard errors lower. More than 1 %
    of chains that never moved are told of too, if that cannot be chance.

    Args:
        accepted: [n] transitions that moved, of each item's chain.
        transitions: that each made.
    """
    expected, found = float(conditional.acceptance), float(accepted.double().mean()) / transitions
    least = SLUGGISH * expected - CHANCE * SPREAD / math.sqrt(len(accepted))
    still = int((accepted == 0).sum()) if (1 - expected) ** transitions < NEVER else 0
    if found < least or still > STUCK * len(accepted):
        warnings.warn(
            f"{conditional.level.label}: chains of samples accept {found:.2g} of their proposals where {expected:.2g} "
            f"are expected from training fields, and {still} of {len(accepted)} never moved, so that draws depend on "
            f"where their chains began. {UNLIKE}",
            ChainWarning,
            stacklevel=5,  # where samples were asked for
        )


def line_law(conditional: Conditional, base: Tensor) -> LineLaw:
    """The law of a level that draws one coefficient given nothing: no chain is needed.

    Raises:
        ConfigError: if the level is given anything, whose laws would differ from field to field.
    """
    if conditional.level.conditional:
        raise ConfigError(f"{conditional.level.label}: a single coefficient that depends on others needs chains.")
    reach = max((float(t.interval.abs().max()) for t in conditional.terms if hasattr(t, "interval")), default=3.0)
    energy = conditional.potential(base.new_zeros(NODES, 1, 1, dtype=torch.float64))
    for _ in range(WIDENED):
        grid = torch.linspace(-WIDE * reach, WIDE * reach, NODES, dtype=torch.float64, device=conditional.theta.device)
        values, reach = energy(grid[:, None])[0], 2 * reach
        if values[[0, -1]].min() - values.min() > BEYOND:
            break
    return LineLaw(grid.cpu(), values.cpu(), where=conditional.level.label)


def tune(
    conditional: Conditional, kernel: Kernel, y: Tensor, base: Tensor, tuning: Tuning, generator: Generator
) -> None:
    """Find and freeze the step size of a level's chains, measure their mixing, and set how long a sample's chain is.

    Chains begin at the data's own coefficients, where a good model is at rest. R̂ compares chains from data and from
    wide starts at one conditioning each.

    Args:
        y, base: [n, H, W] fields of the level and their known parts, in data units.
    Raises:
        ConfigError: if the chains collapse or escape.
    """
    level = conditional.level
    if level.dim == 1:
        line_law(conditional, base)
        return
    unit, label = conditional.unit.to(y), level.label
    z = level.detail(y) / unit
    noise = BatchNoise(len(y), generator=generator, device=y.device)
    potential, scale = conditional.potential(base), conditional.scale_given(base)
    found = adapt(
        kernel, potential, begin(potential, z, where=label), scale=scale, noise=noise, steps=tuning.adapt, where=label
    )
    conditional.step_size.copy_(found.step_size)
    conditional.acceptance.fill_(found.acceptance)
    few = len(y) // CHAINS
    base = base[:few].repeat_interleave(CHAINS, 0)
    noise = BatchNoise(len(base), generator=generator, device=y.device)
    scale = conditional.scale_given(base)
    wide = start(scale, noise)
    at_data = torch.arange(len(base), device=y.device) % CHAINS < CHAINS // 2
    z = torch.where(at_data[:, None], z[:few].repeat_interleave(CHAINS, 0), wide)
    potential, options = conditional.potential(base), {"step_size": found.step_size, "scale": scale, "noise": noise}
    state = advance(kernel, potential, begin(potential, z, where=label), tuning.record, **options)
    observe = _observables(conditional)
    state, trace = record(kernel, potential, restart(state), tuning.record, observe=observe, **options)
    tau = autocorrelation_time(trace, one_law=False).tau
    more = min(math.ceil(LONG * float(tau.max())), tuning.most) - tuning.record
    if more > 0:
        _, rest = record(kernel, potential, state, more, observe=observe, **options)
        trace = torch.cat((trace, rest))
        tau = autocorrelation_time(trace, one_law=False).tau
    # of its own chains each, since every conditioning has a law of its own
    grouped = trace.unflatten(1, (few, CHAINS)).transpose(1, 2).flatten(2)
    conditional.autocorrelation.copy_(tau.max())
    conditional.r_hat.copy_(split_r_hat(grouped).nanmean())
    if conditional.r_hat > MIXED:
        warnings.warn(
            f"{label}: chains from data and from afar still differ after {tuning.record + len(trace)} transitions (R̂ = "
            f"{float(conditional.r_hat):.2f}): the conditional law may have several modes. Use narrower packets "
            "(subdivisions), or longer chains (tuning.record, tuning.least).",
            FitWarning,
            stacklevel=2,
        )
    wanted = math.ceil(tuning.decorrelate * float(conditional.autocorrelation))
    if wanted > tuning.most:
        warnings.warn(
            f"{label}: {tuning.decorrelate:g} autocorrelation times are {wanted} transitions, and samples take at most "
            f"{tuning.most} (tuning.most): they may depend on where their chains begin.",
            FitWarning,
            stacklevel=2,
        )
    conditional.num_steps.fill_(min(max(wanted, tuning.least), tuning.most))


def _observables(conditional: Conditional):  # noqa: ANN202 - a closure of one line
    """Of a state: the energy, the power of the coefficients, and the sum and the first of them."""
    return lambda state: torch.stack(
        (state.energy, state.z.square().sum(1).double(), state.z.sum(1).double(), state.z[:, 0].double()), 1
    )
