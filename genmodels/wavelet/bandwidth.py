"""How wide the packets of an octave may be: fits with 1, 2, … subdivisions, compared by convexity and certainty."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.tables import MISSING, short, table
from ..registry import ConfigError
from ..types import Batch
from .concavity import Spectrum, affordable, spectrum
from .conditional import Conditional
from .fitting import PIXELS
from .score_matching import FitWarning, Gram, Sandwich
from .terms import Term
from .tree import Tree

THRESHOLD = 0.02  # share of fields with a negative direction that is taken for none
BATCH = 250


@dataclass(frozen=True)
class Band:
    """A ring of packets as it was fitted.

    Args:
        label: of the level.
        spectrum: ends of the conditional Hessian's spectra at fields that it was not fitted to.
        condition: condition number of the normalised Gram matrix.
        coupling, error: of nearest neighbours in units of the data, and its standard error; NaN without such a feature.
    """

    label: str
    spectrum: Spectrum
    condition: float
    coupling: float
    error: float


@dataclass(frozen=True)
class Trial:
    """An octave with some number of subdivisions.

    Args:
        bands: from coarse to fine; none if the fit failed.
        failure: why it failed.
    """

    subdivisions: int
    bands: tuple[Band, ...]
    failure: str = ""

    @property
    def negative(self) -> float:
        """The largest share, over bands, of fields with a negative direction."""
        return max((band.spectrum.negative for band in self.bands), default=1.0)


@dataclass(frozen=True)
class Suggestion:
    """For one octave: what was tried, and the least number of subdivisions whose energies are convex at data.

    Args:
        grid: H, W of the octave.
        trials: by number of subdivisions.
        threshold: on the share of fields with a negative direction.
        fields: how many each was fitted to.
    """

    grid: tuple[int, int]
    trials: tuple[Trial, ...]
    threshold: float
    fields: int

    @property
    def subdivisions(self) -> int | None:
        """The least that suffices; None if none of those tried does."""
        return next((trial.subdivisions for trial in self.trials if trial.negative <= self.threshold), None)

    @property
    def sentence(self) -> str:
        """What is suggested, in words."""
        grid = f"{self.grid[0]}x{self.grid[1]}"
        if self.subdivisions is not None:
            enough = next(trial for trial in self.trials if trial.subdivisions == self.subdivisions)
            return f"{grid}: subdivisions {self.subdivisions} suffices{self._price(enough)}."
        least = min(self.trials, key=lambda trial: trial.negative)
        if len(self.trials) == 1:
            return f"{grid}: subdivisions 1, the only one tried, is negative on {least.negative:.0%} of the fields."
        return (
            f"{grid}: none of the subdivisions 1 … {self.trials[-1].subdivisions} suffices; the least negative is "
            f"{least.subdivisions} ({least.negative:.0%} of the fields){self._price(least)}."
        )

    def _price(self, trial: Trial) -> str:
        """What narrower packets cost in certainty of the coupling of nearest neighbours."""
        errors = [max((band.error for band in t.bands), default=math.nan) for t in (self.trials[0], trial)]
        if trial is self.trials[0] or any(error != error for error in errors):
            return ""
        return f"; it knows the coupling of nearest neighbours to {errors[1]:.2g}, where 1 knows it to {errors[0]:.2g}"


@torch.no_grad()
def suggest(
    y: Tensor,
    energy: Sequence[Callable[..., Term]],
    *,
    wavelet: str = "db4",
    octaves: int | None = None,
    most: int = 3,
    threshold: float = THRESHOLD,
    regularization: float = 1e-6,
) -> list[Suggestion]:
    """Fit every octave with 1, 2, … subdivisions, to four fifths of the fields, and see how convex it is at the rest.

    Narrower bands are more convex, so that fits are safe and chains mix, but each has less coefficients to tell its
    parameters from: the smallest number that is convex is the one to take. Tiles keep two coefficients a side.

    Args:
        y: [N, H, W] fields of zero mean in model space.
        energy: builders of the terms.
        octaves: how many from the finest; None for all.
        most: subdivisions tried.
        threshold: on the share of fields with a negative direction.
    Returns:
        a suggestion for each octave, from the finest.
    Raises:
        ConfigError: if there are fewer than 10 fields, or numbers are out of their ranges.
    """
    if len(y) < 10 or most < 1 or not 0 <= threshold < 1:
        raise ConfigError(
            "suggest: at least 10 fields, most >= 1 and 0 <= threshold < 1 are needed, found "
            f"{len(y)}, {most} and {threshold:g}."
        )
    tree = Tree(tuple(y.shape[1:]), wavelet, octaves).to(y.device)
    held, found = len(y) // 5, []
    for _ in range(len(tree.levels) - 1):
        size = tuple(y.shape[1:])
        trials = tuple(
            _trial(y[held:], y[:held], energy, wavelet, depth, regularization) for depth in _depths(size, most)
        )
        found.append(Suggestion(size, trials, threshold, len(y) - held))
        y = tree.coarsen(y)
    return found


def _depths(size: tuple[int, int], most: int) -> range:
    deepest = max((m for m in range(1, most + 1) if all(n % 2**m == 0 and n >> m >= 2 for n in size)), default=1)
    return range(1, deepest + 1)


def _trial(
    y: Tensor, held: Tensor, energy: Sequence[Callable[..., Term]], wavelet: str, depth: int, regularization: float
) -> Trial:
    tree = Tree(tuple(y.shape[1:]), wavelet, 1, (depth,)).to(y.device)
    bands = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FitWarning)  # the condition number is told for each
        for k in range(len(tree.levels) - 1, 0, -1):
            level = tree.levels[k]
            try:
                c = Conditional(level, tuple(energy)).to(y.device)
                fit(c, y, regularization)
            except ConfigError as error:
                return Trial(depth, (), str(error))
            some = held[: affordable(level)].double() / c.unit
            found = spectrum(c.hessian, some, level.dim)
            bands.append(Band(level.label, found, float(c.condition), *_coupling(c)))
            y, held = (f - level.synthesize(level.detail(f)) for f in (y, held))
    return Trial(depth, tuple(reversed(bands)))


def fit(conditional: Conditional, y: Tensor, regularization: float) -> None:
    """Fit one level to fields y [N, H, W] that are in memory.

    Raises:
        ConfigError: if they are constant, or cannot tell features apart.
    """
    conditional.unit.copy_(y.double().square().mean().sqrt())
    if not conditional.unit > 0:
        raise ConfigError(f"{conditional.level.label}: the fields are constant, so that there is no law to fit.")
    unit = float(conditional.unit)
    for term in conditional.terms:
        term.fit(y[:: max(1, y.numel() // PIXELS)].double() / unit)
    gram = Gram(conditional)
    for part in y.split(BATCH):
        gram.update(part.double() / unit)
    gram.solve(regularization)
    sandwich = Sandwich(gram)
    for part in y.split(BATCH):
        sandwich.update(part.double() / unit)
    sandwich.finish()


def _coupling(c: Conditional) -> tuple[float, float]:
    """Of nearest neighbours, in units of the data."""
    name = next((k for k, name in enumerate(c.names) if name == "shift 1,0"), None)
    if name is None:
        return float("nan"), float("nan")
    return float(c.theta[name] / c.unit.square()), float(c.errors[name] / c.unit.square())


def gather(batches: Iterable[Batch], count: int) -> Tensor:
    """[n, *] the first items of a pass, `count` of them at most."""
    parts = []
    for batch in batches:
        parts.append(batch.x[: count - sum(map(len, parts))])
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)


def report(suggestions: Sequence[Suggestion], given: Sequence[int]) -> str:
    """A table of all trials, and what is suggested for each octave.

    Args:
        given: subdivisions of each octave, which stay where none of those tried suffices.
    """
    rows = [row for octave in suggestions for trial in octave.trials for row in _rows(octave, trial)]
    headers = ["octave", "subdivisions", "band", "smallest", "median", "negative", "condition", "coupling", "error"]
    lines = [table(headers, rows, left=(0, 2)), ""]
    lines += [f"- {octave.sentence}" for octave in suggestions]
    lines += [
        f"- {octave.grid[0]}x{octave.grid[1]}, subdivisions {trial.subdivisions} could not be fitted: {trial.failure}"
        for octave in suggestions
        for trial in octave.trials
        if trial.failure
    ]
    chosen = ", ".join(str(octave.subdivisions or own) for octave, own in zip(suggestions, given, strict=True))
    return "\n".join([*lines, "", f"model.subdivisions=[{chosen}]"])


def _rows(octave: Suggestion, trial: Trial) -> list[list[str]]:
    grid, depth = f"{octave.grid[0]}x{octave.grid[1]}", str(trial.subdivisions)
    if trial.failure:
        return [[grid, depth, "failed", *[MISSING] * 6]]
    rows = []
    for band in trial.bands:
        found = band.spectrum
        cells = [f"{found.smallest:.3g}", f"{found.quantile(0.5):.3g}", f"{found.negative:.0%}", short(band.condition)]
        known = band.error == band.error
        cells += [f"{band.coupling:.4f}", f"{band.error:.2g}"] if known else [MISSING] * 2
        rows.append([grid, depth, _ring(band.label), *cells])
    return rows


def _ring(label: str) -> str:
    return label.partition(" band ")[2] or "1/2"
