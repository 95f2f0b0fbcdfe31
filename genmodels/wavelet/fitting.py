"""How a model of conditional energies is fitted: units, score matching, polish, chains, in passes over the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from ..files import write_text
from ..registry import ConfigError
from ..types import Batch
from .band_limit import Power
from .conditional import Conditional
from .polish import Moments, Polish, polish_chains, polish_line
from .score_matching import Gram, Sandwich
from .tuning import tune

if TYPE_CHECKING:
    from .cslc import CSLC

PIXELS = 200_000  # of a level, from which ranges of potentials are found
MARGIN = 0.5  # least curvature far from the data, in units of 1/σ²
FEWEST = 4  # training fields: R̂ compares chains at a quarter of those that it is given
STILL = 1e-4  # of the deviation of the next level, below which the mean of a field does not vary


def measure(model: CSLC, batches: Iterable[Batch], count: int) -> Tensor:
    """Set the mean, the units and the ranges of potentials, in two passes; returns `count` items, or all there are.

    Raises:
        ConfigError: if fields are not finite, do not vary, or hold nothing above some frequency.
    """
    n, total, some, low, high = 0, 0.0, [], math.inf, -math.inf
    for batch in batches:
        _check_finite(batch.x)
        y = model.transform(batch.x.to(model.device).double())[0]
        n, total = n + len(y), total + y.mean((1, 2, 3)).sum()
        low, high = min(low, float(y.min())), max(high, float(y.max()))
        if sum(map(len, some)) < count:
            some.append(batch.x.to(model.device))
    if n < FEWEST:
        raise ConfigError(f"cslc: at least {FEWEST} training fields are needed to tune chains, found {n}.")
    if not high - low > 1e-12 * max(1, abs(low), abs(high)):
        raise ConfigError(
            f"cslc: the training fields do not vary: all pixels are {low:.4g} in model space, so that there is no law "
            "to fit. Look at the data: constant fields are no samples."
        )
    even = any(getattr(term, "even", False) for c in model.conditionals for term in c.terms)
    model.mean.copy_(0 * total if even else total / n)  # the mean of a sample would tilt an even potential
    power = Power(model.shape[1:], model.transform, model.device)
    squares, kept = [0.0] * len(model.conditionals), [[] for _ in model.conditionals]
    for batch in batches:
        fields = model.fields(batch.x.to(model.device).double())[0]
        power.update(batch.x, fields[-1])
        for k, y in enumerate(fields):
            squares[k] += y.square().mean((1, 2)).sum()
            kept[k].append(y[:: max(1, n * y[0].numel() // PIXELS)])
    for c, square in zip(model.conditionals, squares, strict=True):
        c.unit.copy_((square / n) ** 0.5)
    _mark_still(model)
    for k, c in enumerate(model.conditionals):
        if k < model.first:
            continue
        if not c.unit > 1e-12 * (1 + model.mean.abs()):
            raise ConfigError(
                f"{c.level.label}: the training fields do not vary at this scale, so that there is no law to fit. "
                "Look at the data: constant fields are no samples."
            )
        u = torch.cat(kept[k]) / c.unit
        for f in model.free_energies[k : k + 1]:  # of the next finer level, a function of the same field
            f.unit.copy_(c.unit)
        for term in (*c.terms, *(term for f in model.free_energies[k : k + 1] for term in f.terms)):
            term.fit(u)
    for c in reversed(model.chained()):  # from the finest, where a limit begins
        power.check(c.level)
    return torch.cat(some)[:count]


def _mark_still(model: CSLC) -> None:
    """Note whether the mean of the fields is the same for all: some simulations conserve it."""
    units, level = [float(c.unit) for c in model.conditionals], model.tree.levels[0]
    still = level.dim == 1 and len(units) > 1 and units[0] < STILL * units[1]
    model.still.fill_(int(still))
    if still:
        model.conditionals[0].unit.fill_(1.0)


def match_scores(model: CSLC, batches: Iterable[Batch], regularization: float) -> None:
    """Parameters of all levels in closed form, and their standard errors, in two passes.

    Raises:
        ConfigError: if features cannot be told apart.
    """
    grams = [Gram(c) for c in model.chained()]
    _pass(model, batches, grams)
    for gram in grams:
        gram.solve(regularization)
    sandwiches = [Sandwich(gram) for gram in grams]
    _pass(model, batches, sandwiches)
    for sandwich in sandwiches:
        sandwich.finish()


def _pass(model: CSLC, batches: Iterable[Batch], sums: list) -> None:
    for batch in batches:
        for total, u in zip(sums, model.units(batch.x.to(model.device))[model.first :], strict=True):
            total.update(u)


def polish_levels(
    model: CSLC, batches: Iterable[Batch], some: Tensor, polish: Polish, generator: Generator
) -> dict[str, Tensor]:
    """Levels that `polish` reaches; returns their mismatches in standard errors, before and after.

    Args:
        some: [n, 1, H, W] items whose coarse fields condition the chains.
    """
    levels = [k for k in range(model.first, len(model.conditionals)) if polish.reaches(model.conditionals[k])]
    if not levels:
        return {}
    moments = Moments(model.conditionals[0])  # of the only level that is given nothing
    if levels[0] == 0:
        for batch in batches:
            moments.update(model.units(batch.x.to(model.device))[0])
    fields, logs = model.fields(some[: polish.fields].float())[0], {}
    for k in levels:
        c, y = model.conditionals[k], fields[k]
        c.set_scale(y[: model.tuning.starts].double() / c.unit)
        c.guard(MARGIN)
        if c.level.dim == 1 and not c.level.conditional:
            found = polish_line(c, moments, margin=MARGIN)
        else:
            given = None if c.level.conditional else moments
            found = polish_chains(
                c, model.kernel, y, model.tree.given(k, y), polish, margin=MARGIN, generator=generator, moments=given
            )
        logs |= {f"mismatch_{when}/{c.level.label}": torch.tensor(v) for when, v in found._asdict().items()}
    return logs


def tune_levels(model: CSLC, some: Tensor, generator: Generator) -> dict[str, Tensor]:
    """Guard tails, and tune the chains of every level at some items [n, 1, H, W]; returns what is to be told of them.

    Raises:
        ConfigError: if an energy cannot be normalised, or if its chains collapse.
    """
    fields = model.fields(some.float())[0]
    for k in range(model.first, len(model.conditionals)):
        c, y = model.conditionals[k], fields[k]
        c.set_scale(y.double() / c.unit)
        c.guard(MARGIN)
        tune(c, model.kernel, y, model.tree.given(k, y), model.tuning, generator)
    chains = [c for c in model.chained() if c.level.dim > 1]
    each = ("acceptance", "autocorrelation", "r_hat", "num_steps", "condition")
    told = {f"{name}/{c.level.label}": getattr(c, name) for c in chains for name in each}
    return told | {
        "condition_number": max(c.condition for c in model.chained()),
        "acceptance": min(c.acceptance for c in chains),
        "autocorrelation": max(c.autocorrelation for c in chains),
        "r_hat": max(c.r_hat for c in chains),
        "transitions": sum(c.num_steps for c in chains),
    }


def write_parameters(folder: Path, conditionals: Sequence[Conditional]) -> Path:
    """A table of the parameters of every level in units of its σ, with their standard errors."""
    lines = ["level,sigma,feature,theta,stderr"]
    for c in conditionals:
        for name, theta, error in zip(c.names, c.theta.tolist(), c.errors.tolist(), strict=True):
            lines.append(f'{c.level.label},{float(c.unit):.6g},"{name}",{theta:.6g},{error:.3g}')
    write_text(folder / "parameters.csv", "\n".join(lines) + "\n")
    return folder / "parameters.csv"


def _check_finite(x: Tensor) -> None:
    bad = ~x.flatten(1).isfinite().all(1)
    if bad.any():
        raise ConfigError(
            f"cslc: {int(bad.sum())} of {len(bad)} training fields of a batch hold NaN or infinity. Remove them, or "
            "fill masked pixels before training."
        )
