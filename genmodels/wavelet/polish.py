"""Newton ascent of the conditional likelihood of a level, from where score matching left it."""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..registry import ConfigError
from ..rng import BatchNoise
from .chains import Kernel, adapt, advance, begin, restart
from .conditional import Conditional
from .score_matching import FitWarning
from .tuning import line_law

INFORMED = 30.0  # conditionings that must tell of a feature before its parameter is moved
WORSE, NOISE = 2.0, 5.0  # an update is taken back if it multiplies the mismatch by the first, to above the second
CONVERGED = 1e-9  # nats that Newton's step on a line would still gain
MOST = 100  # of its steps


@dataclass(frozen=True)
class Polish:
    """Maximum likelihood of each level's law given the coarser field, after score matching.

    E log p(x̄ | x_j) has the gradient E_model[Φ | x_j] - E_data[Φ], so that at its maximum the moments that the model
    has given the true coarse fields are those of the data. Score matching gives them up where the energy is
    misspecified, and errors of coarse scales are handed on to finer ones.

    Args:
        fields: training fields, B, whose coarse parts condition two chains each. Standard errors of θ are those of B
            fields.
        burn: transitions before the first iteration, in which a step size is found.
        iterations: Newton steps; θ is the mean over the second half of them.
        transitions: of every chain in an iteration.
        records: states of those over which features are averaged.
        rate: γ, share of a Newton step that is made.
        ridge: λ, of the diagonal of the Hessian added to it.
        largest: side of the largest grid whose levels are polished; None for all.
    Raises:
        ConfigError: if a number is out of its range.
    """

    fields: int = 1000
    burn: int = 150
    iterations: int = 8
    transitions: int = 40
    records: int = 4
    rate: float = 0.8
    ridge: float = 1e-2
    largest: int | None = None

    def __post_init__(self) -> None:
        counts = self.fields >= 2 and self.burn >= 10 and self.iterations >= 1
        if not counts or not 1 <= self.records <= self.transitions or not 0 < self.rate <= 1 or self.ridge < 0:
            raise ConfigError(
                "polish: fields >= 2, burn >= 10, iterations >= 1, 1 <= records <= transitions, a rate in (0, 1] and "
                f"a ridge >= 0 are needed, found {self}."
            )

    def reaches(self, conditional: Conditional) -> bool:
        """Whether the level is one of those that are polished."""
        return self.largest is None or max(conditional.level.size) <= self.largest


class Moments:
    """Sums over training fields of Φ and Φ Φᵀ, float64: all that the likelihood of an unconditional level asks for."""

    def __init__(self, conditional: Conditional) -> None:
        count = len(conditional.theta)
        self.conditional, self.n = conditional, 0
        self.first = torch.zeros(count, dtype=torch.float64, device=conditional.theta.device)
        self.second = torch.zeros(count, count, dtype=torch.float64, device=conditional.theta.device)

    def update(self, u: Tensor) -> None:
        """Take in fields u [B, H, W] float64."""
        for part in u.split(self.conditional.rows()):
            features = self.conditional.features(part)
            self.first += features.sum(0)
            self.second += features.T @ features
            self.n += len(part)

    @property
    def mean(self) -> Tensor:
        """[M] of the features."""
        return self.first / self.n

    @property
    def covariance(self) -> Tensor:
        """[M, M] of the features of a field."""
        return self.second / self.n - self.mean.outer(self.mean)


class Mismatch(NamedTuple):
    """Largest distance of a feature's mean over the chains from that over the data, in standard errors.

    Those are of the mean of the differences at the same conditionings: the spread of coarse fields cancels. Only
    features whose parameters may move count.
    """

    before: float
    after: float


class Visit(NamedTuple):
    """What the chains of an iteration saw.

    Args:
        gaps: [B, M] Φ(data) - mean Φ(chains) at every conditioning.
        covariance: [M, M] C = ½ E (Φ¹ - Φ²)(Φ¹ - Φ²)ᵀ of the two chains of a conditioning: E Cov(Φ | x_j).
        informed: [M] conditionings that tell of each feature: (Σ d²)²/Σ d⁴ of d = Φ¹ - Φ².
        acceptance: share of transitions that moved.
    """

    gaps: Tensor
    covariance: Tensor
    informed: Tensor
    acceptance: float


class Chains:
    """Two persistent chains at each of B conditionings; they begin at the data, where a good model is at rest.

    Args:
        y, base: [B, H, W] fields of the level and their known parts, in data units.
        target: [B, M] features of the data at each conditioning, or their mean [M] where a level is given nothing.
    """

    def __init__(
        self, conditional: Conditional, kernel: Kernel, y: Tensor, base: Tensor, target: Tensor, polish: Polish,
        generator: Generator,
    ) -> None:  # fmt: skip
        self.conditional, self.kernel, self.polish, self.target = conditional, kernel, polish, target
        self.label, unit = conditional.level.label, conditional.unit.to(y)
        self.base = torch.cat([base, base])
        self.noise = BatchNoise(len(self.base), generator=generator, device=y.device)
        z = conditional.level.detail(y) / unit
        found = adapt(
            kernel, *self._at(torch.cat([z, z])), scale=conditional.scale_given(self.base), noise=self.noise,
            steps=polish.burn, where=self.label,
        )  # fmt: skip
        self.z, self.step_size = found.state.z, found.step_size

    def _at(self, z: Tensor):  # noqa: ANN202 - a potential and a state
        potential = self.conditional.potential(self.base)
        return potential, begin(potential, z, where=self.label)

    def visit(self) -> Visit:
        """Go on with the present θ, at a fixed step size; then move that towards the target of acceptance."""
        (potential, state), scale = self._at(self.z), self.conditional.scale_given(self.base)
        sums, total, squares, fourths = 0.0, 0.0, 0.0, 0.0
        records = self.polish.records
        for k in range(records):
            steps = self.polish.transitions * (k + 1) // records - self.polish.transitions * k // records
            state = advance(
                self.kernel, potential, state, steps, step_size=self.step_size, scale=scale, noise=self.noise
            )
            one, two = self.features(state.z).chunk(2)
            difference = one - two
            sums, total = sums + (one + two) / 2, total + difference.T @ difference / 2
            squares, fourths = squares + difference.square().sum(0), fourths + difference**4
        self.z, acceptance = restart(state).z, float(state.acceptance.mean())
        self.step_size = self.step_size * math.exp(acceptance - self.kernel.target)
        informed = squares.square() / records / fourths.sum(0).clamp(min=1e-300)
        return Visit(self.target - sums / records, total / (records * len(sums)), informed, acceptance)

    def features(self, z: Tensor) -> Tensor:
        """[B, M] float64 of the fields of coefficients z [B, dim]."""
        c = self.conditional
        u = self.base / c.unit.to(z) + c.level.synthesize(z)
        return torch.cat([c.features(part) for part in u.split(c.rows(u.dtype))])


def polish_chains(
    conditional: Conditional,
    kernel: Kernel,
    y: Tensor,
    base: Tensor,
    polish: Polish,
    *,
    margin: float,
    generator: Generator,
    moments: Moments | None = None,
) -> Mismatch:
    """θ ← θ - γ (C + λ diag C)⁻¹ (Φ(data) - mean Φ(chains)), averaged over the later iterations; sets θ and errors.

    Both means are over the same B conditionings: C/B is the variance of their difference, where means over other
    fields would add that of E[Φ | x_j], which is larger by far in a field with long correlations. A level that is given
    nothing has no conditionings to share, and is matched to the moments of all data. Features that fewer than 30
    conditionings tell of (the last intervals of a spline) keep what score matching found. An update after which the
    energy cannot be normalised, chains accept less than half of their target, or the mismatch doubles beyond noise is
    taken back, and the next is half as long.

    Args:
        y, base: [B, H, W] fields of the level and their known parts, in data units.
        margin: of `Conditional.guard`, which follows each update.
        moments: of all training data, for a level that is given nothing.
    Raises:
        ConfigError: if the chains collapse before the first update, or the energy cannot be normalised after the last.
    """
    u = y / conditional.unit.to(y)
    own = torch.cat([conditional.features(part) for part in u.split(conditional.rows(u.dtype))])
    chains = Chains(conditional, kernel, y, base, own if moments is None else moments.mean, polish, generator)
    seen = chains.visit()
    active = seen.informed > INFORMED
    before = _mismatch(seen, active, moments)
    iterates = _ascend(chains, seen, active, margin, moments)
    _move(conditional, torch.stack(iterates[len(iterates) // 2 :]).mean(0), margin)
    seen = chains.visit()
    _set_errors(conditional, seen, active, moments)
    return Mismatch(before, _mismatch(seen, active, moments))


def _ascend(chains: Chains, seen: Visit, active: Tensor, margin: float, moments: Moments | None) -> list[Tensor]:
    """θ after every iteration; updates that break the chains are taken back."""
    conditional, polish, iterates, refused = chains.conditional, chains.polish, [], 0
    rate, size = polish.rate, _mismatch(seen, active, moments)
    for _ in range(polish.iterations):
        kept = conditional.theta.clone(), chains.z, chains.step_size
        free = active & _free(conditional, seen.gaps.mean(0))
        found = _try(chains, conditional.theta - rate * _newton(seen, free, polish.ridge), margin)
        new = math.inf if found is None else _mismatch(found, active, moments)
        if not new < max(NOISE, WORSE * size):
            _move(conditional, kept[0], margin)
            chains.z, chains.step_size, rate, refused = *kept[1:], rate / 2, refused + 1
        else:
            seen, size, rate = found, new, min(2 * rate, polish.rate)
        iterates.append(conditional.theta.clone())
    if refused > polish.iterations // 2:
        warnings.warn(
            f"polish of {chains.label}: {refused} of {polish.iterations} updates were taken back. Take more fields or "
            "transitions, or a larger ridge.",
            FitWarning,
            stacklevel=3,
        )
    return iterates


def _try(chains: Chains, theta: Tensor, margin: float) -> Visit | None:
    """What chains see at θ; None if the energy cannot be normalised there, or if they hardly move."""
    try:
        _move(chains.conditional, theta, margin)
        found = chains.visit()
    except ValueError:  # of the guard, or of chains whose energy is not finite
        return None
    return found if found.acceptance > chains.kernel.target / 2 else None


def _move(conditional: Conditional, theta: Tensor, margin: float) -> None:
    conditional.theta.copy_(theta)
    conditional.guard(margin)


def _free(conditional: Conditional, gap: Tensor) -> Tensor:
    """[M] which parameters a step may move: not tails that the guard holds and the data would lower."""
    return ~(conditional.held & (gap > 0))


def _newton(seen: Visit, active: Tensor, ridge: float) -> Tensor:
    """[M] (C + λ diag C)⁻¹ times the mean gap, of the active features alone."""
    step = torch.zeros_like(seen.gaps[0])
    c = seen.covariance[active][:, active]
    matrix, gap = (c + ridge * c.diagonal().diag()).cpu(), seen.gaps[:, active].mean(0).cpu()
    step[active] = torch.linalg.lstsq(matrix, gap, driver="gelsd")[0].to(step)  # a driver that GPUs do not have
    return step


def _spread(seen: Visit, moments: Moments | None) -> Tensor:
    """[M, M] covariance of the mean gap."""
    noise = torch.cov(seen.gaps.T).reshape(seen.covariance.shape) / len(seen.gaps)
    return noise if moments is None else noise + moments.covariance / moments.n


def _mismatch(seen: Visit, active: Tensor, moments: Moments | None) -> float:
    if not active.any():
        return 0.0
    errors = _spread(seen, moments).diagonal()[active].sqrt()
    return float((seen.gaps.mean(0)[active].abs() / errors).max())


def _set_errors(conditional: Conditional, seen: Visit, active: Tensor, moments: Moments | None) -> None:
    """C⁻¹ Cov(mean gap) C⁻¹, right also where the energy is misspecified; frozen parameters keep theirs."""
    bread = torch.linalg.pinv(seen.covariance[active][:, active], hermitian=True)
    covariance = bread @ _spread(seen, moments)[active][:, active] @ bread
    conditional.errors[active] = covariance.diagonal().clamp(min=0).sqrt()


def polish_line(conditional: Conditional, moments: Moments, *, margin: float) -> Mismatch:
    """The exact maximum of the likelihood of a single coefficient that is given nothing; sets θ and errors.

    Newton steps on θᵀ E_data[Φ] + log Z(θ), which is convex, with both moments under the model by quadrature; a step is
    halved until the objective falls. A tail that the guard holds stays where it is while the data would lower it.

    Raises:
        ConfigError: if it has not converged after 100 steps: some parameter has no finite maximum.
    """
    mean, label = moments.mean, conditional.level.label
    before, objective = None, math.inf
    for _ in range(MOST):
        found, covariance, value = _line_moments(conditional, mean)
        gap = mean - found
        free = _free(conditional, gap)
        errors = (moments.covariance.diagonal().clamp(min=1e-300) / moments.n).sqrt()
        size = float((gap.abs() / errors)[free].max())
        before, objective = size if before is None else before, value
        step = torch.zeros_like(gap)
        step[free] = torch.linalg.pinv(covariance[free][:, free], rtol=1e-12, hermitian=True) @ gap[free]
        if step @ gap < CONVERGED:
            bread = torch.linalg.pinv(covariance, rtol=1e-12, hermitian=True)
            conditional.errors.copy_((bread @ moments.covariance @ bread / moments.n).diagonal().clamp(min=0).sqrt())
            return Mismatch(before, size)
        theta = conditional.theta.clone()
        for halving in range(40):
            _move(conditional, theta - step / 2**halving, margin)
            if _objective(conditional, mean) < objective:
                break
        else:
            _move(conditional, theta, margin)
            break
    raise ConfigError(
        f"polish of {label}: the likelihood has no maximum within reach: the range of the basis holds values that the "
        "data never take. Use fewer functions, or more fields."
    )


def _objective(conditional: Conditional, mean: Tensor) -> float:
    try:
        return _line_moments(conditional, mean)[2]
    except ConfigError:  # the step led to a law that the grid does not hold
        return math.inf


def _line_moments(conditional: Conditional, mean: Tensor) -> tuple[Tensor, Tensor, float]:
    """[M] and [M, M] mean and covariance of Φ under the model, and θᵀ mean + log Z."""
    law = line_law(conditional, torch.zeros(1, 1, 1, dtype=torch.float64, device=mean.device))
    features = conditional.features(conditional.level.synthesize(law.grid.to(mean.device)[:, None])).T.cpu()
    found = law.mean(features)
    centred = features - found[:, None]
    covariance = law.mean(centred[:, None] * centred)
    value = float(conditional.theta @ mean) + law.log_normalizer
    return found.to(mean.device), covariance.to(mean.device), value
