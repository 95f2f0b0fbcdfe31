"""Models of physical fields by conditional energies from scale to scale."""

import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..registry import ConfigError, register
from ..rng import Noise, SeedNoise, as_seeds
from ..transforms import Transform
from ..types import Batch, Condition, Loss, Seeds, Shape
from .chains import MALA, Kernel, State
from .concavity import judge
from .concavity_plot import write
from .conditional import Conditional
from .fitting import match_scores, measure, polish_levels, tune_levels, write_parameters
from .polish import Polish
from .score_matching import FitWarning
from .scoring import Scored
from .terms import Term
from .tree import Tree
from .tuning import UNLIKE, Tuning, check_moves, draw
from .whole_field import WholeField

WHOLE = 16  # coefficients of the coarsest level that are drawn at once without a word


@register(Model, "cslc")
class CSLC(Scored, WholeField, Model):
    """p(x) = p(x_J) Π_j p(x̄_j | x_j): energies of wavelet packets given coarser scales, fitted by score matching.

    x_j are the coarse fields of an orthogonal periodic wavelet transform and x̄_j the packets between x_j and x_{j-1}.
    p(x̄_j | x_j) ∝ exp(-Ē_j(x_{j-1})) with Ē_j = Σ_k θ_k Φ_k linear in its parameters, which minimise
    E[½ |∇_x̄ Ē|² - Δ_x̄ Ē] in closed form. The law may have many modes and long correlations: if each conditional is
    strongly log-concave, the fit is safe and chains mix in a number of steps that does not grow with the field.

    Everything is fitted in `prepare` (`train.steps: 0`). With `octaves: 0` it is one energy of the whole field.

    Args:
        energy: terms of the energy of every level.
        wavelet: "haar", "db2" to "db6", "db8", "db10", "sym4" to "sym6", "sym8", "sym10" or "shannon".
        octaves: scales; None for as many as the grid can be halved.
        subdivisions: M of packets that part an octave into 2^(M-1) rings, for all octaves or each from the finest.
        kernel: of the Markov chains.
        regularization: λ, added to the normalised Gram matrix.
        polish: by maximum likelihood after score matching, to cure what misspecified energies miss; None for none.
        tuning: of the chains.
        boundary: "periodic", the only one for which the transform is orthogonal and energies are stationary.
        free_energy: terms of -log Z_j(x_j) of every level, as functions of what it is given, which make the conditional
            energies one energy of the whole field (see `WholeField`); None fits none.
    Raises:
        ConfigError: if items are no fields [1, H, W], if the grid cannot be split so, or if another boundary is asked.
    Source: Guth et al. 2023 (Conditionally strongly log-concave generative models).
    """

    def __init__(
        self,
        energy: tuple[Callable[..., Term], ...],
        wavelet: str = "db4",
        octaves: int | None = None,
        subdivisions: int | tuple[int, ...] = 1,
        kernel: Kernel = MALA(),
        regularization: float = 1e-6,
        polish: Polish | None = None,
        tuning: Tuning = Tuning(),
        boundary: str = "periodic",
        free_energy: tuple[Callable[..., Term], ...] | None = None,
        *,
        shape: Shape,
        transform: Transform,
        periodic: bool | None,
    ) -> None:
        super().__init__()
        self.shape, self.periodic = tuple(shape), periodic
        _check(self.shape, boundary, regularization)
        if not energy:
            raise ConfigError("cslc: energy needs one term at least, such as {name: potential}.")
        self.tree = Tree(self.shape[1:], wavelet, octaves, subdivisions)
        self.conditionals = nn.ModuleList(Conditional(level, energy) for level in self.tree.levels)
        self.transform, self.kernel, self.regularization = transform, kernel, regularization
        self.polish, self.tuning, self.whole = polish, tuning, octaves
        self.known = nn.ModuleList(self.tree.known(k) for k in range(1, len(self.conditionals)) if free_energy)
        self.free_energies = nn.ModuleList(Conditional(level, free_energy or ()) for level in self.known)
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("still", torch.zeros((), dtype=torch.int64))

    @property
    def first(self) -> int:
        """The first level that is drawn: 1 where the mean of the fields never varies, which is then given."""
        return int(self.still)

    def chained(self) -> list[Conditional]:
        """The levels that have a law, coarse to fine."""
        return list(self.conditionals)[self.first :]

    def fitted_numbers(self) -> int:
        """How many parameters energies and free energies have, over all levels that have a law."""
        return sum(len(c.theta) for c in (*self.chained(), *self.free_energies[self.first :]))

    def fields(self, x: Tensor, noise: Noise | None = None) -> tuple[list[Tensor], Tensor]:
        """The field [B, H_k, W_k] of every level, coarse to fine, of items x in data units, and [B] the log-determinant
        of the transform to model space (with `noise`, if that is random)."""
        if not x.isfinite().all():
            raise ValueError(
                "cslc: items hold NaN or infinity, of which no energy is known. Remove or fill them first."
            )
        y, log_det = self.transform(x, noise)
        return self.tree.decompose(y.squeeze(1) - self.mean.to(y)), log_det

    def items(self, y: Tensor) -> Tensor:
        """[B, 1, H, W] items in data units of fields [B, H, W] of the finest level."""
        return self.transform.inverse((y + self.mean.to(y)).unsqueeze(1))

    def units(self, x: Tensor) -> list[Tensor]:
        """The fields u = y/σ of every level, coarse to fine, float64."""
        return [y / c.unit for y, c in zip(self.fields(x.double())[0], self.conditionals, strict=True)]

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit every level in passes over the data, polish the fits, guard tails and tune chains on some fields, and fit
        the free energies in two more passes if there are any.

        Raises:
            ConfigError: if fields are constant or not finite, if features cannot be told apart, if an energy cannot be
                normalised, or if its chains collapse.
        """
        if self.periodic is False:
            warnings.warn(
                "cslc: the data say that their fields are not periodic, and the transform wraps around: it sees a seam "
                "at the borders, which widens the laws of the largest scales. Crop or apodise the maps (data.crop, "
                "data.apodize), or read those scales with care.",
                FitWarning,
                stacklevel=2,
            )
        coarsest = self.tree.levels[0]
        if self.whole is None and coarsest.dim > WHOLE:
            warnings.warn(
                f"cslc: fields of {self.shape[1]} x {self.shape[2]} can be halved {len(self.tree.begins) - 1} times at "
                f"most, so that {coarsest.label} pixels are drawn at once, without the scales that make chains short. "
                "Crop or pool the fields to sides with more factors of 2, or say octaves yourself.",
                FitWarning,
                stacklevel=2,
            )
        some = self.fit(batches)
        logs = polish_levels(self, batches, some, self.polish, generator) if self.polish else {}
        some = some[: self.tuning.starts]
        logs |= tune_levels(self, some, generator)
        judge(self.chained(), self.units(some)[self.first :], self.tree.wavelet)
        logs["hessian_min"] = min(c.minima[0] for c in self.chained() if c.level.dim > 1)
        logs["hessian_negative"] = max(c.negative for c in self.chained() if c.level.dim > 1)
        self._fit_free_energies(batches)
        self.fitted.fill_(1)
        return logs

    @torch.no_grad()
    def fit(self, batches: Iterable[Batch]) -> Tensor:
        """Fit transform, units and parameters alone: energies are known then, but samples cannot be drawn yet.

        Returns:
            [n, 1, H, W] some of the items.
        Raises:
            ConfigError: if fields are constant or not finite, or if features cannot be told apart.
        """
        self.transform.fit(batches)
        some = measure(self, batches, max(self.tuning.starts, self.polish.fields if self.polish else 0))
        match_scores(self, batches, self.regularization)
        return some

    def portray(self, folder: Path) -> list[Path]:
        """`concavity.png`: how convex each level's energy is at training fields; `potentials.png`: those found;
        `parameters.csv`: all of them, with their standard errors."""
        paths = write(folder, self.chained())
        return [*paths, write_parameters(folder, self.chained())] if paths else paths

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        """[B] Σ_j ℓ_j per pixel: the score matching losses of all levels, each up to a constant of the data."""
        self.check_items(batch.x, "loss")
        losses = [c.loss(u) for c, u in zip(self.chained(), self.units(batch.x)[self.first :], strict=True)]
        return Loss(sum(losses) / math.prod(self.shape), {})

    @torch.no_grad()
    def sample(
        self, seeds: Seeds, *, condition: Condition | None = None, num_steps: int | None = None, batch_size: int = 256
    ) -> Tensor:
        """[n, 1, H, W] items in data units, from coarse to fine; item i depends on seed i alone.

        Args:
            seeds: n, or n seeds.
            num_steps: transitions of the chain of every level; those found when the model was fitted if None.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if the model is not fitted yet, if an option is out of its range, or if chains leave what is
                finite. Of chains that hardly move a `ChainWarning` tells.
        """
        return self._drawn(None, 0, seeds, num_steps, batch_size, "sample")

    @torch.no_grad()
    def upsample(
        self, coarse: Tensor, *, seeds: Seeds | None = None, num_steps: int | None = None, batch_size: int = 256
    ) -> Tensor:
        """[n, 1, H, W] items drawn given their coarse fields: p(x | x_j).

        A coarse field is what `coarsen` gives: low-pass coefficients in data units, divided by 2 an octave, so that
        constants stay what they are. If the transform to model space is no affine one, they are those of transformed
        items, mapped back: of `log_shift` a kind of geometric mean, which is not that of pooled maps.

        Args:
            coarse: [n, 1, H/2^j, W/2^j] fields of some octave j.
            seeds: n seeds; 0 … n-1 if not given. Item i depends on field i and seed i alone.
        Raises:
            ValueError: if no octave of the model has that grid, or fields are not finite; else as of `sample`.
        """
        sizes = [level.size for level in self.tree.levels]
        grid = tuple(coarse.shape[2:])
        if coarse.ndim != 4 or coarse.shape[1] != 1 or grid not in sizes:
            known = ", ".join(f"{h} x {w}" for h, w in dict.fromkeys(sizes))
            raise ValueError(
                f"upsample: fields [n, 1, H, W] on a grid of one of the model's octaves ({known}) are needed, found "
                f"{list(coarse.shape)}. Coarsen or pool them first."
            )
        if not coarse.isfinite().all():
            raise ValueError("upsample: the coarse fields hold NaN or infinity. Remove or fill them first.")
        last = max(k for k, size in enumerate(sizes) if size == grid)
        if last + 1 == len(sizes):
            raise ValueError(f"upsample: fields on the grid {grid[0]} x {grid[1]} have all their details already.")
        factor = 2.0 ** round(math.log2(self.shape[1] / grid[0]))
        y = (self.transform(coarse.to(self.device))[0].squeeze(1) - self.mean.to(coarse)) * factor
        seeds = as_seeds(len(coarse) if seeds is None else seeds)
        if len(seeds) != len(coarse):
            raise ValueError(f"upsample: one seed per field is needed, found {len(seeds)} for {len(coarse)} fields.")
        return self._drawn(y, last + 1, seeds, num_steps, batch_size, "upsample")

    def coarsen(self, x: Tensor, octaves: int = 1) -> Tensor:
        """[B, 1, H/2^j, W/2^j] low-pass fields of items x, in data units.

        Raises:
            ValueError: if the grid cannot be halved so often.
        """
        most = len({level.size for level in self.tree.levels}) - 1
        if not 1 <= octaves <= most:
            raise ValueError(f"coarsen: this model has {most} octaves, asked for {octaves}.")
        y = self.transform(x)[0].squeeze(1) - self.mean.to(x)
        for _ in range(octaves):
            y = self.tree.coarsen(y) / 2
        return self.items(y)

    def _drawn(
        self, below: Tensor | None, first: int, seeds: Seeds, num_steps: int | None, batch_size: int, where: str
    ) -> Tensor:
        seeds = as_seeds(seeds)
        if not self.fitted:
            raise ValueError(f"{where}: the model is not fitted yet. Call prepare with training data, or load weights.")
        if batch_size < 1 or (num_steps is not None and num_steps < 1):
            raise ValueError(f"{where}: batch_size and num_steps >= 1 are needed, found {batch_size}, {num_steps}.")
        if first == 0 and self.still:
            below, first = torch.zeros(len(seeds), *self.tree.levels[0].size, device=self.device), 1
        if not len(seeds):
            return torch.empty(0, *self.shape, device=self.device)
        drawn, ends = [], {k: [] for k in range(first, len(self.conditionals))}
        for rows in torch.arange(len(seeds)).split(batch_size):
            y = None if below is None else below[rows]
            for k, counts in ends.items():
                y, end = self._level(k, y, seeds[rows], num_steps)
                counts += [] if end is None else [(end.accepted, end.transitions)]
            drawn.append(self.items(y).float())
        for k, counts in ends.items():
            if counts:  # a quadrature has none
                check_moves(self.conditionals[k], torch.cat([accepted for accepted, _ in counts]), counts[0][1])
        return torch.cat(drawn)

    def _level(self, k: int, below: Tensor | None, seeds: Tensor, num_steps: int | None) -> tuple[Tensor, State | None]:
        """[n, H, W] fields of level k, given those of the level below, and where its chains ended."""
        conditional = self.conditionals[k]
        like = torch.empty(0, device=self.device)
        base = self.tree.base(k, below, len(seeds), like)
        noise = SeedNoise(seeds, purpose=f"level {k}", device=self.device)
        z, end = draw(conditional, self.kernel, base, noise, num_steps)
        y = base + conditional.level.synthesize(z * conditional.unit.to(z))
        if not y.isfinite().all():
            raise ValueError(f"{conditional.level.label}: fields drawn there are not finite. {UNLIKE}")
        return y, end


def _check(shape: Shape, boundary: str, regularization: float) -> None:
    if len(shape) != 3 or shape[0] != 1:
        raise ConfigError(f"cslc: items must be fields [1, H, W] of one channel, found {list(shape)}.")
    if boundary != "periodic":
        raise ConfigError(
            f"cslc: boundary {boundary!r} is not offered: with a boundary the wavelets at the edge differ from the "
            "rest, so that the transform is not orthogonal (or not stationary), and conditional laws lose the volume "
            "that makes them a density. Use 'periodic'; of fields that are not, crop or apodise the data, and read the "
            "largest scales with care: they see a seam."
        )
    if not 0 <= regularization < math.inf:
        raise ConfigError(f"cslc: regularization >= 0 is needed, found {regularization:g}.")
