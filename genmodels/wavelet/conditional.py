"""The law of one level: p(x̄ | what is coarser) ∝ exp(-Ē(x̄, coarser)) with an energy linear in its parameters."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import ConfigError
from .terms import Energy, Term
from .tree import Level

DENSE = 800  # coefficients up to which spectra are of dense matrices
ROUNDING = 1e-9  # of a curvature, in units of 1/σ²
MEMORY = 2**26  # bytes of features' gradients at a time
QUANTILES = 21  # of the smallest eigenvalues of Hessians that are kept


class Conditional(nn.Module):
    """Ē(x̄) = Σ_k θ_k Φ_k(u), u = y/σ, of the coefficients x̄ = σ ζ that a level draws.

    y = base + Ḡᵀ x̄ is the level's field, base what is known of it, and σ the standard deviation of y over the training
    data, so that energies, their parameters and steps of chains have no units: gradients are by ζ = x̄/σ.

    Args:
        level: of a tree.
        terms: builders of the terms, called with `level`.
    Attributes:
        theta, errors: [M] float64 parameters and their standard errors.
        unit: [] float64 σ.
        scale: [dim] float64 of the chains' moves, 1/√(mean curvature) by tiles.
        stiffness: [] float64 mean curvature over training fields without details; see `scale_given`.
        condition: [] float64 condition number of the Gram matrix of normalised features.
        step_size: [] float64 of its chains, in units of the scale; 0 where none is needed (a single coefficient).
        num_steps: [] int64 transitions of a sample.
        acceptance, autocorrelation, r_hat: [] float64 of its chains, as measured when they were tuned.
        minima: [21] float64 quantiles, at 0, 5 %, …, 100 %, of the smallest eigenvalue of ∇²_ζ Ē over training fields.
        negative: [] float64 share of these fields where it is negative.
        largest: [] float64 largest eigenvalue over these fields.
    """

    theta: Tensor
    errors: Tensor
    unit: Tensor
    scale: Tensor
    stiffness: Tensor
    condition: Tensor
    step_size: Tensor
    num_steps: Tensor
    acceptance: Tensor
    autocorrelation: Tensor
    r_hat: Tensor
    minima: Tensor
    negative: Tensor
    largest: Tensor

    def __init__(self, level: Level, terms: tuple[Callable[..., Term], ...]) -> None:
        super().__init__()
        self.__dict__["level"] = level
        self.terms = nn.ModuleList(term(level=level) for term in terms)
        self.sizes = [len(term) for term in self.terms]
        count = sum(self.sizes)
        for name, shape in (("theta", (count,)), ("errors", (count,)), ("scale", (level.dim,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("minima", torch.full((QUANTILES,), math.nan, dtype=torch.float64))
        for name in ("negative", "largest"):
            self.register_buffer(name, torch.full((), math.nan, dtype=torch.float64))
        self.register_buffer("stiffness", torch.full((), math.inf, dtype=torch.float64))  # of none: one scale for all
        for name in ("unit", "condition", "acceptance", "autocorrelation", "r_hat"):
            self.register_buffer(name, torch.ones((), dtype=torch.float64))
        self.register_buffer("held", torch.zeros(count, dtype=torch.bool), persistent=False)
        self.register_buffer("step_size", torch.zeros((), dtype=torch.float64))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @property
    def names(self) -> list[str]:
        """Of all features, in the order of `theta`."""
        return [name for term in self.terms for name in term.names]

    def parts(self) -> list[tuple[Term, Tensor]]:
        """Every term with its parameters."""
        return list(zip(self.terms, self.theta.split(self.sizes), strict=True))

    def features(self, u: Tensor) -> Tensor:
        """[B, M] float64 Φ_k(u)."""
        return torch.cat([term.features(u) for term in self.terms], 1)

    def laplacians(self, u: Tensor) -> Tensor:
        """[B, M] float64 Δ_ζ Φ_k."""
        return torch.cat([term.laplacians(u) for term in self.terms], 1)

    def gradients(self, u: Tensor) -> Tensor:
        """[B, M, dim] ∇_ζ Φ_k."""
        return self.level.detail(torch.cat([term.gradients(u) for term in self.terms], 1))

    def rows(self, dtype: torch.dtype = torch.float64) -> int:
        """How many fields' gradients of features fit in 64 MiB."""
        height, width = self.level.size
        return max(1, MEMORY // (dtype.itemsize * height * width * max(1, len(self.theta))))

    def energy(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """[B] float64 Ē and [B, H, W] ∂Ē/∂u, of fields u [B, H, W]."""
        return self.at(u.dtype)(u)

    def at(self, dtype: torch.dtype) -> Energy:
        """u of a dtype -> what `energy` gives at the present θ; what depends on θ alone is found once."""
        energies = [term.at(theta, dtype) for term, theta in self.parts()]

        def energy(u: Tensor) -> tuple[Tensor, Tensor]:
            found = [of(u) for of in energies]
            return sum(e for e, _ in found), sum(g for _, g in found)

        return energy

    def potential(self, base: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """ζ [B, dim] -> (Ē [B] float64, ∇_ζ Ē [B, dim]), at the present θ and given the known part [B, H, W] in data
        units."""
        known, energy_at = base / self.unit.to(base), self.at(base.dtype)

        def of(z: Tensor) -> tuple[Tensor, Tensor]:
            energy, gradient = energy_at(known + self.level.synthesize(z))
            return energy, self.level.detail(gradient)

        return of

    def laplacian(self, u: Tensor) -> Tensor:
        """[B] float64 Δ_ζ Ē."""
        return sum(term.laplacian(theta, u) for term, theta in self.parts())

    def loss(self, u: Tensor) -> Tensor:
        """[B] float64 ℓ = ½ |∇_ζ Ē|² - Δ_ζ Ē, whose mean is ½ E|∇ log p - ∇ log p_θ|² up to a constant of the data."""
        gradient = self.level.detail(self.energy(u)[1])
        return 0.5 * gradient.square().sum(1, dtype=torch.float64) - self.laplacian(u)

    def hessian(self, u: Tensor, z: Tensor) -> Tensor:
        """[*, dim] product of the conditional Hessian ∇²_ζ Ē at u [*, H, W] with z [*, dim]."""
        v = self.level.synthesize(z)
        return self.level.detail(sum(term.hessian(theta, u, v) for term, theta in self.parts()))

    def at_infinity(self, z: Tensor) -> Tensor:
        """[*, dim] the same far from all data."""
        v = self.level.synthesize(z)
        return self.level.detail(sum(term.at_infinity(theta, v) for term, theta in self.parts()))

    def set_scale(self, u: Tensor) -> None:
        """Scale moves by 1/√(mean curvature) of each tile over fields u; of tiles where that is not positive, by 1."""
        diagonal = sum(term.diagonal(theta, u) for term, theta in self.parts())
        count = torch.zeros(int(self.level.tile.max()) + 1, dtype=torch.float64, device=diagonal.device)
        ones, total = torch.ones_like(diagonal), count.clone()
        mean = total.index_add(0, self.level.tile, diagonal) / count.index_add(0, self.level.tile, ones)
        self.scale.copy_(torch.where(mean > 0, mean.clamp(min=1e-12).rsqrt(), 1.0)[self.level.tile])
        stiff = self._stiffness(u - self.level.synthesize(self.level.detail(u))).clamp(min=0).mean()
        self.stiffness.copy_(torch.where(stiff > 0, stiff, math.inf))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(prefix + "stiffness", torch.tensor(math.inf, dtype=torch.float64))  # of older runs
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _stiffness(self, known: Tensor) -> Tensor:
        """[B] float64 mean curvature Δ_ζ Ē/dim at known parts u [B, H, W] alone, without details."""
        return self.laplacian(known).double() / self.level.dim

    def scale_given(self, base: Tensor) -> Tensor:
        """[B, dim] of the moves given the known part [B, H, W] in data units.

        The law of the details may be far narrower given some fields than given others (φ⁴ given a large magnetisation),
        where steps for the mean of them would be refused for ever. The scale is multiplied by √(κ̄/κ) <= 1, κ the mean
        curvature at the known part alone and κ̄ the mean of max(κ, 0) over some training fields. It depends on what is
        given alone, not on where the chain is, which leaves the law as it is.
        """
        scale = self.scale.to(base)
        if not self.level.conditional:
            return scale.expand(len(base), -1)
        ratio = self.stiffness / self._stiffness(base / self.unit.to(base))
        return torch.where((ratio > 0) & (ratio < 1), ratio.sqrt(), 1.0).to(base)[:, None] * scale

    def guard(self, margin: float) -> float:
        """Raise the tails of a potential until exp(-Ē) has a finite integral; returns the least curvature at infinity.

        Far out Ē grows at least like ½ ζᵀ (Ḡ K Ḡᵀ + κ) ζ with K of the other terms and κ of the flatter tail. What is
        at its bound then, `held` marks until the next call.

        Args:
            margin: least curvature, in units of 1/σ².
        Raises:
            ConfigError: if there is no potential to guard and some direction has no positive curvature.
        """
        lowest = smallest_eigenvalue(self.at_infinity, self.level.dim, self.theta.device)
        self.held.zero_()
        guarded = next((k for k, term in enumerate(self.terms) if getattr(term, "guards", False)), None)
        if guarded is None:
            if not lowest > 0:
                raise ConfigError(
                    f"{self.level.label}: the fitted energy cannot be normalised: its curvature is {lowest:.3g} in "
                    "some direction, so that chains would run away. Add a potential (its tails are guarded), a larger "
                    "regularization, or a smaller reach."
                )
            return lowest
        if lowest < margin + ROUNDING:
            part, held = (v.split(self.sizes)[guarded] for v in (self.theta, self.held))
            held.copy_(self.terms[guarded].raise_tails(part, max(0.0, margin - lowest)))
        return max(lowest, margin)


def smallest_eigenvalue(product: Callable[[Tensor], Tensor], dim: int, device: torch.device) -> float:
    """Of a symmetric matrix [dim, dim] given by its products with rows [*, dim]: dense up to 800, Lanczos beyond."""
    if dim <= DENSE:
        matrix = product(torch.eye(dim, dtype=torch.float64, device=device))
        return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0])
    from scipy.sparse.linalg import LinearOperator, eigsh

    times = lambda v: product(torch.from_numpy(v.reshape(1, dim)).to(device)).squeeze(0).cpu().numpy()  # noqa: E731
    start = torch.linspace(1, dim, dim, dtype=torch.float64).sin().numpy()  # else Lanczos starts at random
    return float(eigsh(LinearOperator((dim, dim), times, dtype="float64"), 1, which="SA", v0=start, tol=1e-4)[0][0])
