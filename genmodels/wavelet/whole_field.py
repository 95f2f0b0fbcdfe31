"""The energy of the whole field, of conditional energies and their free energies, and what it says of the physics."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..types import Batch
from .conditional import Conditional
from .potential import Potential
from .score_matching import Projection, Sandwich
from .terms import Quadratic

Part = Literal["conditional", "free_energy", "net"]
OFF_LINE = 1e-6  # relative bend of a transform that is still affine


class WholeField:
    """The part of `CSLC` that knows -log p(x) up to a constant.

    With y_0 … y_K the fields of the levels, coarse to fine, y_K = x, and F_k(y_{k-1}) ≈ -log Z_k(y_{k-1}) + constant,

        -log p(x) = Σ_k Ē_k(y_k) - Σ_{k>=1} F_k(y_{k-1}) + constant = Σ_k [Ē_k(y_k) - F_{k+1}(y_k)] + constant,

    F_{K+1} = 0: on every grid there is a conditional energy, and what the next finer level gives back. The bracket is
    the net energy of a grid. If all fits are perfect Ē_k and F_{k+1} are both -log p(y_k), but for functions of
    y_{k-1}, so that Ē_K is the microscopic energy and nets are functions of coarser fields: what Ē_K could not see.

    F_k is fitted by regression. As ∂/∂y_{k-1} (-log Z_k) = E[∂Ē_k/∂y_{k-1} | y_{k-1}] under p_θ(x̄_k | y_{k-1}), the
    least E|∇F_k - ∂Ē_k/∂y_{k-1}|² has that gradient. The mean is over the data, pairs of whose law p: they are
    equilibrium draws of p_θ as far as the fit of Ē_k is good, and where it is not, F_k is no free energy of Ē_k.

    Source: Marchand et al. 2022 (Wavelet conditional renormalization group).
    """

    def _fit_free_energies(self, batches: Iterable[Batch]) -> None:
        grams = [Projection(f) for f in self.free_energies[self.first :]]  # a mean that never varies has none
        if not grams:
            return
        self._regress(batches, grams)
        for gram in grams:
            gram.solve(self.regularization)
        sandwiches = [Sandwich(gram) for gram in grams]
        self._regress(batches, sandwiches)
        for sandwich in sandwiches:
            sandwich.finish()

    def _regress(self, batches: Iterable[Batch], sums: list) -> None:
        for batch in batches:
            units = self.units(batch.x.to(self.device))
            for k, total in enumerate(sums, 1 + self.first):
                c, f = self.conditionals[k], self.free_energies[k - 1]
                pull = self.tree.lower(k, c.energy(units[k])[1]) * (f.unit / c.unit)
                total.update(units[k - 1], f.level.detail(pull))

    def _check_whole(self, where: str) -> None:
        if not self.fitted:
            raise ValueError(f"{where}: the model is not fitted yet. Call prepare, or load weights.")
        if len(self.free_energies) != len(self.conditionals) - 1:
            raise ValueError(
                f"{where}: the energy of the whole field needs the free energies of its levels, and this model has "
                "none. Give `free_energy` terms (the same as `energy`, say) and fit it again."
            )

    @torch.no_grad()
    def energy(self, x: Tensor) -> Tensor:
        """[B] float64 nats: -log p(x) of items in data units, up to one constant of the model.

        Raises:
            ValueError: if the model is not fitted, or has no free energies.
        """
        self.check_items(x, "energy")
        self._check_whole("energy")
        fields, log_det = self.fields(x.to(self.device).double())
        return self._whole(fields)[0] - log_det

    def energy_gradient(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] float64 -∇ log p(x) per data unit: minus the score of the model at items x.

        Raises:
            ValueError: as of `energy`.
        """
        self.check_items(x, "energy_gradient")
        self._check_whole("energy_gradient")
        with torch.enable_grad():
            x = x.detach().to(self.device).double().requires_grad_()
            y, log_det = self.transform(x)
            with torch.no_grad():
                by_y = self._whole(self.tree.decompose(y.squeeze(1) - self.mean.to(y)))[1].unsqueeze(1)
            total = (y * by_y).sum() - log_det.sum()
            return torch.autograd.grad(total, x)[0]

    def _whole(self, fields: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Σ_k [Ē_k(y_k) - F_{k+1}(y_k)] [B], and its gradient by the finest field [B, H, W]."""
        total, gradient = 0.0, None
        for k, y in enumerate(fields):
            gradient = torch.zeros_like(y) if gradient is None else self.tree.lift(k, gradient)
            for sign, c in self._parts(k, "net"):
                energy, slope = c.energy(y / c.unit)
                total, gradient = total + sign * energy, gradient + sign * slope / c.unit
        return total, gradient

    def _parts(self, k: int, part: Part) -> list[tuple[int, Conditional]]:
        """The energies of the field of level k, with their signs."""
        known = [(1, f) for f in self.free_energies[k : k + 1]]  # none of the finest
        if part == "free_energy":
            return known
        return [(1, self.conditionals[k]), *((-sign, f) for sign, f in known if part == "net")]

    def couplings(self, level: int = -1, part: Part = "conditional") -> dict[str, tuple[float, float]]:
        """Coefficients a_o of ½ Σ_o a_o Σ_{s in o} Σ_i x_i x_{i+s} on a level's field in data units, with their errors.

        Orbits o are named by a shift: `shift 1,0` is the coefficient of Σ_<ij> x_i x_j, -β of the φ⁴ model at the
        finest level. x is the deviation from the mean of the field as `coarsen` gives it, y_k in data units and divided
        by 2 an octave. Errors are standard errors of the fit; those of "net" are sums, which bound them.

        Args:
            level: counted from the coarsest, or by negative numbers from the finest.
            part: "conditional" of Ē_k, "free_energy" of F_{k+1}, or "net" of their difference (see `WholeField`).
        Raises:
            ValueError: if there is no such level, if it has no quadratic term or no free energy (the finest), or if the
                transform is not affine.
        """
        k, slope, _ = self._where(level, part, "couplings")
        found: dict[str, tuple[float, float]] = {}
        for sign, c in self._parts(k, part):
            errors = dict(zip(c.names, c.errors.tolist(), strict=True))
            rate = float((slope / c.unit).square())
            for term, theta in c.parts():
                for name, value in zip(term.names, theta.tolist(), strict=True) if isinstance(term, Quadratic) else ():
                    old = found.get(name, (0.0, 0.0))
                    found[name] = (old[0] + sign * rate * value, old[1] + rate * errors[name])
        if not found:
            raise ValueError(f"couplings: {self.tree.levels[k].label} has no quadratic term whose couplings to read.")
        return found

    def potential_at(self, t: Tensor, level: int = -1, part: Part = "conditional") -> Tensor:
        """[*] float64 nats: the potential v of a pixel of a level's field at values t [*] in data units.

        Values are those of `coarsen`, as of `couplings`. Of a conditional energy v is known up to a constant and a
        multiple of t, which details do not feel. For the φ⁴ model it is t⁴ - t² at the finest level, if the quadratic
        term has no own orbit (`own: false`); beyond the data it is what the guard makes it.

        Raises:
            ValueError: as of `couplings`, for terms `potential`.
        """
        k, slope, offset = self._where(level, part, "potential_at")
        total, found = torch.zeros(t.shape, dtype=torch.float64, device=self.device), False
        for sign, c in self._parts(k, part):
            u = (slope * t.to(total) + offset) / c.unit
            for term, theta in c.parts():
                if isinstance(term, Potential):
                    total, found = total + sign * term.shape(theta, u)[0], True
        if not found:
            raise ValueError(f"potential_at: {self.tree.levels[k].label} has no term 'potential' whose values to read.")
        return total

    def _where(self, level: int, part: Part, where: str) -> tuple[int, Tensor, Tensor]:
        """The level counted from the coarsest, and y = slope t + offset of pixels of its field."""
        count = len(self.conditionals)
        if not -count <= level < count or part not in ("conditional", "free_energy", "net"):
            raise ValueError(
                f"{where}: a level from {-count} to {count - 1}, and the part conditional, free_energy or net, are "
                f"needed, found {level} and {part!r}."
            )
        if part != "conditional":
            self._check_whole(where)
        k = level % count
        if part == "free_energy" and k == count - 1:
            coarser = f"a level from {-count} to -2, or " if count > 1 else ""
            raise ValueError(
                f"{where}: the finest level, {self.tree.levels[k].label}, has no free energy, since nothing is drawn "
                f"given its field. Take {coarser}the part conditional, which is its net energy too."
            )
        values = torch.arange(3, dtype=torch.float64, device=self.device).reshape(3, 1, 1, 1)
        y = self.transform(values.expand(3, *self.shape))[0]
        slope = (y[2] - y[0]) / 2
        if ((y[1] - y[0]) - slope).abs().max() > OFF_LINE * slope.abs().max():
            raise ValueError(f"{where}: data units need an affine transform to model space; this one is not.")
        factor = self.shape[1] // self.tree.levels[k].size[0]
        return k, factor * slope.mean(), factor * (y[0].mean() - self.mean)
