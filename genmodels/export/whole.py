"""Models whose sampling no scheduler describes, whole, as a component of a pipeline: prior, network and transform."""

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ..data.dataset import context
from ..model import Model
from ..registry import build, values


class GenWhole(ModelMixin, ConfigMixin):
    """A model of this package that draws its own items: from its own prior, by its own reverse equation.

    Args:
        model: its node, resolved.
        facts: of its data, plain JSON.
        sample: its options of sampling, resolved.
    """

    @register_to_config
    def __init__(self, model: dict[str, Any], facts: dict[str, Any], sample: dict[str, Any]) -> None:
        super().__init__()
        self.inner: Model = build(Model, model, **context(facts))

    def draw(
        self, seeds: Tensor, labels: Tensor | None, num_steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """[n, *shape] items in data units, those of `sample` of the model for these seeds and labels.

        Raises:
            ValueError: as the model's `sample`.
        """
        options = values(type(self.inner).sample, dict(self.config.sample))
        if num_steps is not None:
            options["num_steps"] = num_steps
        if guidance is not None:
            options["guidance"] = guidance
        elif labels is None:
            options["guidance"] = 1.0  # there is nothing to guide towards
        return self.inner.sample(seeds, condition=labels, **options)
