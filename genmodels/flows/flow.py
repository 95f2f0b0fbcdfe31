"""Normalizing flows as a model: exact likelihood, one-pass sampling, latents."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Generator, Tensor

from ..distributions import Distribution, StandardNormal
from ..model import Model, check_labels
from ..networks.encoders import ConditionEncoder
from ..registry import register
from ..rng import BatchNoise, Noise, SeedNoise, as_seeds
from ..transforms import Transform
from ..types import Batch, Condition, Likelihood, Loss, NotApplicable, Seeds, Shape
from .bijection import Bijection, chain, starts_from_data

FIRST_ITEMS = 512  # how many items the data-dependent start of a layer sees, if there are so many


@register(Model, "flow")
class NormalizingFlow(Model):
    """A chain of bijections f from data to a simple base law.

    log p(x) = log p_base(f(T(x))) + log|det ∂f/∂y| + log|det ∂T/∂x|, in nats and in the units of the data set, where
    y = T(x) is the transform to model space. The loss is -log p(x)/D in nats per component of x. Discrete data are
    dequantised by T with fresh noise at every evaluation, so that what is trained and reported for them is a bound.

    Args:
        layers: the bijections from data to latent, each built for the shape that the one before it leaves.
        base: law of the latent, standard normal if not given.
        conditional: whether the layers see the condition of the data (labels, embeddings); otherwise it is ignored in
            training, and refused elsewhere.
        encoder: what turns the condition, once per call, into what the layers see instead of it.
    Raises:
        ValueError: if there is no layer, or if a conditional flow meets data without conditions.
    Source: Papamakarios et al. 2021 (Normalizing flows for probabilistic modeling and inference), section 2.
    """

    def __init__(
        self,
        layers: tuple[Callable[..., Bijection], ...],
        base: Callable[..., Distribution] | None = None,
        conditional: bool = False,
        encoder: Callable[..., ConditionEncoder] | None = None,
        *,
        shape: Shape,
        num_classes: int | None,
        condition_shape: Shape | None,
        transform: Transform,
        bin_width: float | None,
    ) -> None:
        super().__init__()
        if not layers:
            raise ValueError("flow: at least one layer is needed, found layers=[].")
        if conditional and num_classes is None and condition_shape is None:
            raise ValueError("flow: conditional=True, but the data set has no conditions. Set conditional: false.")
        self.shape, self.conditional, self.bin_width = tuple(shape), conditional, bin_width
        if encoder is not None and not conditional:
            raise ValueError(
                "flow: an encoder of conditions was given to an unconditional flow. Set conditional: true."
            )
        self.num_classes = num_classes if conditional else None
        self.condition_shape = condition_shape if conditional else None
        sizes = {"num_classes": self.num_classes, "condition_shape": self.condition_shape}
        self.encoder = encoder and encoder(shape=self.shape, **sizes)
        if self.encoder is not None:
            sizes = {"num_classes": None, "condition_shape": tuple(self.encoder.out_shape)}
        self.transform = transform
        self.model_shape = transform.out_shape(self.shape)
        self.layers = chain(layers, self.model_shape, **sizes)
        self.base = (base or StandardNormal)(shape=self.layers.out_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters: what the layers compute in."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        noise = BatchNoise(len(batch), generator=generator, device=batch.x.device)
        condition = batch.condition if self.conditional else None
        nll = -self._log_prob(batch.x, self._checked(condition, len(batch), "loss"), noise)
        dims = math.prod(self.model_shape)
        logs = {"nll": nll.detach().mean()}
        if self.bin_width is not None and self.transform.volume:
            logs["bits_per_dim"] = logs["nll"] / (dims * math.log(2)) - math.log2(self.bin_width)
        return Loss(nll / dims, logs)

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform, then let the layers set what depends on data (ActNorm) from the first items."""
        self.transform.fit(batches)
        if not starts_from_data(self.layers):
            return {}
        batch = _first(batches, FIRST_ITEMS).to(self.device)
        condition = self._checked(batch.condition if self.conditional else None, len(batch), "prepare")
        training = self.training
        self.eval()  # dropout would measure another map than the one that is used
        y, _ = self._to_model_space(batch.x, BatchNoise(len(batch), generator=generator, device=self.device))
        self.layers.initialize(y, self._encoded(condition))
        nll = -self._log_prob(batch.x, condition, BatchNoise(len(batch), generator=generator, device=self.device))
        self.train(training)
        return {"nll": nll.mean()}

    @torch.no_grad()
    def sample(self, seeds: Seeds, *, condition: Condition | None = None, batch_size: int = 512) -> Tensor:
        """[n, *shape] items in data units; item i depends on seed i (and condition i) alone.

        Args:
            seeds: n, or n seeds.
            condition: [n, *] one per seed, for conditional flows.
            batch_size: how many are drawn at once.
        Raises:
            ValueError: if the flow is conditional and there is not one condition per seed, or the other way round.
        """
        seeds = as_seeds(seeds)
        condition = self._checked(condition, len(seeds), "sample")
        if batch_size < 1:
            raise ValueError(f"sample: batch_size must be at least 1, found {batch_size}.")
        drawn = []
        for rows in torch.arange(len(seeds)).split(batch_size):  # one empty part if there are no seeds
            noise = SeedNoise(seeds[rows], device=self.device)
            z = self.base.sample(noise, dtype=self.dtype)
            drawn.append(self.decode(z, condition=_rows(condition, rows)))
        return torch.cat(drawn)

    def likelihood(
        self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None, draws: int = 1
    ) -> Likelihood:
        """log p(x) in nats: exact for continuous data, a bound E_u[log p(x + u)] for discrete data.

        Args:
            x: [B, *shape] in data units; gradients flow to it.
            condition: [B, *] for conditional flows.
            seeds: [B] for the dequantisation noise u; 0 … B-1 if not given.
            draws: how many values of u the bound is averaged over.
        Raises:
            NotApplicable: if the transform to model space has no volume.
        """
        self.check_items(x, "likelihood")
        condition = self._checked(condition, len(x), "likelihood")
        if not self.transform.volume:
            raise NotApplicable("the transform to model space has no log-determinant, so data have no density.")
        if self.bin_width is None:
            numerical = any(getattr(layer, "numerical", False) for layer in self.layers.modules())
            return Likelihood(self._log_prob(x, condition, None), "numerical" if numerical else "exact")
        seeds = as_seeds(len(x) if seeds is None else seeds)
        if len(seeds) != len(x) or draws < 1:
            raise ValueError(
                f"likelihood: one seed per item and draws >= 1 are needed, found {len(seeds)} seeds for {len(x)} items "
                f"and draws={draws}."
            )
        noise = SeedNoise(seeds, purpose="dequantise", device=x.device)
        values = [self._log_prob(x, condition, noise) for _ in range(draws)]
        return Likelihood(torch.stack(values).mean(0), "bound")

    def log_prob(
        self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None, draws: int = 1
    ) -> Tensor:
        """[B] nats: the value of `likelihood`."""
        return self.likelihood(x, condition=condition, seeds=seeds, draws=draws).value

    def encode(self, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *latent shape] latent of x; discrete data are placed in the middle of their cells."""
        self.check_items(x, "encode")
        condition = self._checked(condition, len(x), "encode")
        y, _ = self._to_model_space(x, None)
        return self.layers(y, self._encoded(condition))[0]

    def decode(self, z: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *shape] item in data units of a latent: decode(encode(x)) = x."""
        if tuple(z.shape[1:]) != tuple(self.layers.out_shape) or z.ndim == 0:
            raise ValueError(
                f"decode: z has shape {list(z.shape)}, but latents of this flow have shape "
                f"[{', '.join(map(str, ('B', *self.layers.out_shape)))}]. Pass what `encode` or the base law gives."
            )
        condition = self._checked(condition, len(z), "decode")
        y, _ = self.layers.inverse(z.to(self.dtype), self._encoded(condition))
        return self.transform.inverse(y)

    def _to_model_space(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        y, log_det = self.transform(x.to(torch.promote_types(x.dtype, self.dtype)), noise)
        return y.to(self.dtype), log_det

    def _log_prob(self, x: Tensor, condition: Condition | None, noise: Noise | None) -> Tensor:
        self.check_items(x, "flow")
        y, log_volume = self._to_model_space(x, noise)
        z, log_det = self.layers(y, self._encoded(condition))
        return self.base.log_prob(z) + log_det + log_volume

    def _encoded(self, condition: Condition | None) -> Condition | None:
        return condition if self.encoder is None or condition is None else self.encoder(condition)

    def _checked(self, condition: Condition | None, n: int, where: str) -> Condition | None:
        """The condition, if it is given exactly where the flow needs one."""
        if self.conditional == (condition is None):
            problem = (
                "this flow is conditional, but no condition was given. Pass condition=, one row per item."
                if self.conditional
                else "a condition was given to an unconditional flow. Drop it, or build the flow with conditional=True."
            )
            raise ValueError(f"{where}: {problem}")
        if isinstance(condition, Tensor) and len(condition) != n:
            raise ValueError(f"{where}: one condition per item is needed, found {len(condition)} for {n} items.")
        if isinstance(condition, Tensor) and self.encoder is None:
            self._check_kind(condition, where)
        if isinstance(condition, Tensor) and where != "loss":  # there, reading labels would wait for the device
            check_labels(condition, self.num_classes, where)
        return condition.to(self.device) if isinstance(condition, Tensor) else condition

    def _check_kind(self, condition: Tensor, where: str) -> None:
        """Raises ValueError unless the condition holds labels [B], or vectors [B, *condition_shape]."""
        labels = self.num_classes is not None
        shape = () if labels else tuple(self.condition_shape or ())
        if tuple(condition.shape[1:]) == shape and not (labels and condition.is_floating_point()):
            return
        kind = "integer class labels of shape [B]" if labels else f"vectors [{', '.join(map(str, ('B', *shape)))}]"
        found = str(condition.dtype).removeprefix("torch.")
        raise ValueError(
            f"{where}: this flow was built for {kind} as conditions, found {found} of shape "
            f"{list(condition.shape)}. Pass one such row per item, or rebuild the flow for the data."
        )


def _rows(condition: Condition | None, rows: Tensor) -> Condition | None:
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else condition[rows]
    return {key: value[rows] for key, value in condition.items()}


def _first(batches: Iterable[Batch], least: int) -> Batch:
    """The first items of a pass as one batch of x and condition: whole batches, until there are enough.

    Raises:
        ValueError: if there are none.
    """
    found: list[Batch] = []
    for batch in batches:
        found.append(batch)
        if sum(map(len, found)) >= least:
            break
    if not found:
        raise ValueError("flow: there are no training items to start from.")
    conditions = [batch.condition for batch in found]
    if isinstance(conditions[0], Tensor):
        return Batch(torch.cat([batch.x for batch in found]), condition=torch.cat(conditions))
    return Batch(torch.cat([batch.x for batch in found])) if conditions[0] is None else found[0]
