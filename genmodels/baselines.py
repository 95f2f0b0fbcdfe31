"""The control rows of a board: a model that gives back its training items, and a Gaussian."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from einops import einsum
from torch import Generator, Tensor

from .flows.bijection import Bijection
from .flows.flow import NormalizingFlow
from .model import Model, check_labels
from .registry import register
from .rng import BatchNoise, SeedNoise, as_seeds
from .transforms import Transform
from .types import Batch, Condition, Loss, Seeds, Shape


@register(Model, "replay")
class Replay(Model):
    """Training items, drawn at random with replacement, as they are or altered: what metrics must tell from a model.

    It learns nothing: `prepare` takes the items (`train.steps: 0`), and a checkpoint holds them. If the data have class
    labels, items of the class asked for are drawn. Its loss is the squared distance to the nearest of its items, per
    component.

    Args:
        noise: standard deviation of Gaussian noise that is added to every draw, in data units.
        blur: standard deviation of a Gaussian blur, in pixels; images only.
        share: how many of the training items it takes, of each class, chosen at random.
    Raises:
        ValueError: if an option is out of its range, or if items that are no images are to be blurred.
    """

    def __init__(
        self, noise: float = 0.0, blur: float = 0.0, share: float = 1.0, *, shape: Shape, num_classes: int | None
    ) -> None:
        super().__init__()
        if noise < 0 or blur < 0 or not 0 < share <= 1:
            raise ValueError(
                f"replay: noise >= 0, blur >= 0 and 0 < share <= 1 are needed, found {noise}, {blur} and {share}."
            )
        if blur and len(shape) != 3:
            raise ValueError(f"replay: only images [C, H, W] can be blurred, found items of shape {list(shape)}.")
        self.shape, self.noise, self.blur, self.share = tuple(shape), noise, blur, share
        self.num_classes, self.conditional = num_classes, num_classes is not None
        self.register_buffer("items", torch.empty(0, *shape))
        self.register_buffer("counts", torch.zeros(num_classes or 1, dtype=torch.int64))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """How many items there are is known from the data alone: make room for those that come."""
        found = state_dict.get(f"{prefix}items")
        if found is not None and found.shape[1:] == self.items.shape[1:]:
            self.items = self.items.new_empty(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Take the items, class by class; logs how many."""
        found = list(batches)
        x = torch.cat([batch.x.cpu() for batch in found])
        label = (
            torch.cat([batch.condition.cpu() for batch in found]) if self.conditional else torch.zeros(len(x)).long()
        )
        rows = torch.randperm(len(x), generator=generator)
        of_class = [rows[label[rows] == c] for c in range(len(self.counts))]
        kept = [part[: math.ceil(self.share * len(part))] for part in of_class]
        self.counts.copy_(torch.tensor([len(part) for part in kept]))
        self.items = self._blurred(x[torch.cat(kept)]).to(self.items)
        return {"items": self.counts.sum()}

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        self.check_items(batch.x, "loss")
        self._check_prepared("loss")
        items, exact = self.items.flatten(1).to(batch.x), "donot_use_mm_for_euclid_dist"  # copies are at exactly 0
        distance = torch.cdist(batch.x.flatten(1), items, compute_mode=exact).min(1).values
        return Loss(distance.square() / math.prod(self.shape), {})

    @torch.no_grad()
    def sample(self, seeds: Seeds, *, condition: Condition | None = None, batch_size: int = 512) -> Tensor:
        """[n, *shape] items in data units; item i depends on seed i (and condition i) alone.

        Args:
            seeds: n, or n seeds.
            condition: [n] classes, if the data have such; the number of classes stands for any.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if classes are missing or none is asked for, or if there are no items of one.
        """
        seeds = as_seeds(seeds)
        self._check_prepared("sample")
        first, count = self._ranges(condition, len(seeds))
        drawn = []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            noise = SeedNoise(seeds[rows], device=self.device)
            u = noise.uniform(dtype=torch.float64)
            x = self.items[first[rows] + (u * count[rows]).long()]
            drawn.append(x + self.noise * noise.normal(*self.shape, dtype=x.dtype) if self.noise else x)
        return torch.cat(drawn)

    def _ranges(self, condition: Condition | None, n: int) -> tuple[Tensor, Tensor]:
        """[n] the first item that may be drawn for each seed, and of how many."""
        if self.conditional == (condition is None) or (condition is not None and len(condition) != n):
            given = "none was given" if condition is None else f"{len(condition)} were given for {n} seeds"
            raise ValueError(
                f"sample: replay needs one class per seed exactly if its data have classes, and {given}. "
                f"Its data have {self.num_classes or 'none'}."
            )
        if condition is None:
            condition = torch.zeros(n, dtype=torch.int64)
        check_labels(condition, self.num_classes, "sample")
        counts = torch.cat([self.counts, self.counts.sum()[None]])
        firsts = torch.cat([self.counts.cumsum(0) - self.counts, self.counts.new_zeros(1)])
        condition = condition.to(self.device)
        if not counts[condition].all():
            empty = condition[counts[condition] == 0][0].item()
            raise ValueError(f"sample: replay has no item of the class {empty}; its training data had none.")
        return firsts[condition], counts[condition]

    def _check_prepared(self, where: str) -> None:
        if not len(self.items):
            raise ValueError(f"{where}: replay has no items yet. Call prepare with the training data, or load weights.")

    def _blurred(self, x: Tensor) -> Tensor:
        if not self.blur:
            return x
        rows, columns = (blur_matrix(size, self.blur).to(x) for size in self.shape[1:])
        return einsum(x, rows, columns, "b c h w, g h, v w -> b c g v")


def blur_matrix(size: int, std: float) -> Tensor:
    """[size, size] float64 Gaussian blur of a line of pixels, cut at 4 std, reflected at the ends: a b c | c b a."""
    offsets = torch.arange(-int(4 * std + 0.5), int(4 * std + 0.5) + 1)
    weights = (-0.5 * (offsets.double() / std).square()).exp()
    place = (torch.arange(size)[:, None] + offsets) % (2 * size)
    place = torch.minimum(place, 2 * size - 1 - place)
    weights = (weights / weights.sum()).expand(place.shape)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, place, weights)


class Whitening(Bijection):
    """z = L⁻¹ (y - m) of flattened items; log|det ∂z/∂y| = -Σ log Lᵢᵢ. Buffers, set once from all data."""

    def __init__(self, *, shape: Shape, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__()
        self.shape, dim = tuple(shape), math.prod(shape)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("root", torch.eye(dim))

    def fitted_numbers(self) -> int:
        """The mean, and the free numbers of a covariance."""
        dim = len(self.mean)
        return dim + dim * (dim + 1) // 2

    @property
    def log_det(self) -> Tensor:
        """[] float64 log|det ∂z/∂y|."""
        return -self.root.diagonal().double().log().sum()

    def forward(self, x: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        centred = x.flatten(1).double() - self.mean
        z = torch.linalg.solve_triangular(self.root.double(), centred.T, upper=False).T
        return z.to(x).reshape(x.shape), self.log_det.expand(len(x))

    def inverse(self, z: Tensor, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        y = self.mean + z.flatten(1).double() @ self.root.double().T
        return y.to(z).reshape(z.shape), (-self.log_det).expand(len(z))


@register(Model, "gaussian")
class Gaussian(NormalizingFlow):
    """N(m, S) in model space with the mean and covariance of the training data: the model that moments cannot tell.

    A flow of one fixed layer, fitted in closed form in `prepare` (`train.steps: 0`); discrete data are dequantised
    first. Its likelihood is exact for continuous data and a bound for discrete data, as that of any flow.

    Args:
        shrink: s in (1 - s) S + s diag(S), which is regular with fewer items than dimensions; 0 for S itself.
    Raises:
        ValueError: if shrink is not in [0, 1].
    """

    def __init__(self, shrink: float = 0.0, *, shape: Shape, transform: Transform, bin_width: float | None) -> None:
        if not 0 <= shrink <= 1:
            raise ValueError(f"gaussian: shrink must be in [0, 1], found {shrink}.")
        facts = {"num_classes": None, "condition_shape": None, "bin_width": bin_width}
        super().__init__((Whitening,), shape=shape, transform=transform, **facts)
        self.shrink = shrink

    @property
    def dtype(self) -> torch.dtype:
        return self.layers.bijections[0].root.dtype

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform, mean and covariance; logs the likelihood of the fit.

        Raises:
            ValueError: if the covariance is singular.
        """
        self.transform.fit(batches)
        y = torch.cat([self._in_model_space(batch, generator) for batch in batches])
        layer = self.layers.bijections[0]
        covariance = y.T.cov()
        covariance = torch.lerp(covariance, covariance.diagonal().diag(), self.shrink)
        root, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            raise ValueError(
                f"gaussian: the covariance of {len(y)} items in {y.shape[1]} dimensions is singular. Set shrink above "
                "0 (0.1, say), or dequantise the data."
            )
        layer.mean.copy_(y.mean(0))
        layer.root.copy_(root)
        return {"nll": -torch.cat([self._log_prob(*self._noised(batch, generator)) for batch in batches]).mean()}

    def _in_model_space(self, batch: Batch, generator: Generator) -> Tensor:
        """[B, D] float64."""
        x, _, noise = self._noised(batch, generator)
        return self._to_model_space(x, noise)[0].flatten(1).double()

    def _noised(self, batch: Batch, generator: Generator) -> tuple[Tensor, None, BatchNoise]:
        """What `_log_prob` takes."""
        return batch.x.to(self.device), None, BatchNoise(len(batch), generator=generator, device=self.device)
