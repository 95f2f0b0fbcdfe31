"""What models share that predict the target of an item: the way in, and the error of a prediction."""

from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..networks.network import Network
from ..rng import Noise
from ..transforms import Transform
from ..types import Batch, expand_like


class Supervised(Model):
    """A model that begins at T(x), or at what an encoder makes of it, and predicts classes or values.

    Attributes:
        transform: T.
        encoder: None for none.
    """

    transform: Transform
    encoder: Network | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters: what the model computes in."""
        return next(self.parameters()).dtype

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Fit the transform."""
        self.transform.fit(batches)
        return {}

    def encoded(self, x: Tensor, noise: Noise | None) -> Tensor:
        """encoder(T(x)) of items x [B, *shape], or T(x) without an encoder."""
        self.check_items(x, self.registered_name)
        y, _ = self.transform(x.to(torch.promote_types(x.dtype, self.dtype)), noise)
        y = y.to(self.dtype)
        return y if self.encoder is None else self.encoder(None, y)

    def check_target(self, batch: Batch) -> None:
        """Raises ValueError if the batch has no target to learn from."""
        if batch.target is None:
            raise ValueError(
                f"{self.registered_name}: the batch has no target. Use a task of the data set that has one."
            )

    def prediction_error(self, prediction: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """[B] cross entropy of the classes, or mean squared error of the observed values; and what to log.

        Raises:
            ValueError: if the targets are values of another shape than the predictions.
        """
        target = batch.target
        if not target.is_floating_point():
            value = nn.functional.cross_entropy(prediction, target, reduction="none")
            right = (prediction.detach().argmax(1) == target).to(value.dtype).mean()
            return value, {"cross_entropy": value.detach().mean(), "accuracy": right}
        if target.shape != prediction.shape:
            raise ValueError(
                f"{self.registered_name}: targets of shape {list(target.shape)} were given where predictions have "
                f"shape {list(prediction.shape)}."
            )
        mask = torch.ones_like(prediction) if batch.target_mask is None else batch.target_mask.to(prediction.dtype)
        mask = expand_like(mask, prediction).expand_as(prediction)
        # what stands where the mask is 0 may be anything, nan too
        error = torch.where(mask > 0, prediction - target.to(prediction.dtype), 0.0).square().flatten(1).sum(1)
        value = error / mask.flatten(1).sum(1).clamp(min=1)
        return value, {"squared_error": value.detach().mean()}
