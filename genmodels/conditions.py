"""Conditions of models that are trained with a share of them hidden, and guidance from "no condition" towards them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .model import check_labels
from .registry import ConfigError
from .rng import Noise
from .types import Condition, Shape, expand_like


class Conditions(nn.Module):
    """What a network is told: conditions, a share of which training hides, and "no condition".

    Args:
        dropout: share of items whose condition is hidden in training; 0 gives up guidance and unconditional answers.
        num_classes, condition_shape: of the data's conditions; both None for an unconditional model.
    Attributes:
        active: whether there are conditions.
        null: [*] "no condition", without the batch axis: the label num_classes, or a vector that training finds; None
            for an unconditional model.
    Raises:
        ConfigError: unless 0 <= dropout < 1.
    """

    def __init__(self, dropout: float, num_classes: int | None, condition_shape: Shape | None) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"model.condition_dropout: 0 <= condition_dropout < 1 is needed, found {dropout}.")
        self.dropout, self.num_classes, self.condition_shape = dropout, num_classes, condition_shape
        self.active = num_classes is not None or condition_shape is not None
        if num_classes is None and condition_shape is not None:
            # without dropout nothing would ever train it
            self.null = nn.Parameter(torch.zeros(condition_shape), requires_grad=dropout > 0)
        else:
            null = None if num_classes is None else torch.tensor(num_classes)
            self.register_buffer("null", null, persistent=False)

    @property
    def keywords(self) -> dict[str, int | Shape | None]:
        """Those by which networks are told of the conditions."""
        return {"num_classes": self.num_classes, "condition_shape": self.condition_shape}

    def drop(self, condition: Condition | None, noise: Noise) -> Tensor | None:
        """The conditions of a batch with a share of them hidden, item by item; None for an unconditional model, which
        may be trained on data that have conditions."""
        if not self.active:
            return None
        condition = self.checked(condition, noise.n, "loss", required=True)
        if self.dropout == 0:
            return condition
        hidden = expand_like(noise.uniform() < self.dropout, condition)
        return torch.where(hidden, self.null.to(condition), condition)

    def checked(
        self, condition: Condition | None, n: int, where: str, required: bool = False, guidance: float = 1.0
    ) -> Tensor | None:
        """One condition for each of n items: "no condition" if None, and None for an unconditional model.

        Args:
            guidance: scale away from "no condition", which has no effect unless there are conditions.
        Raises:
            ValueError: if they do not fit the model or the items, or are missing.
        """
        if not self.active:
            if condition is not None:
                raise ValueError(f"{where}: a condition was given to an unconditional model. Drop it.")
            return None
        if condition is None and self.dropout > 0 and not required:
            if guidance not in (0, 1):
                raise ValueError(
                    f"{where}: guidance {guidance} needs conditions to guide towards. Give one for each item, or "
                    "guidance=1."
                )
            return self.null.expand(n, *self.null.shape)
        if not isinstance(condition, Tensor) or len(condition) != n:
            found = f"{list(condition.shape)}" if isinstance(condition, Tensor) else type(condition).__name__
            advice = "" if self.dropout else " A model trained with condition_dropout=0 needs one."
            raise ValueError(f"{where}: a tensor of {n} conditions is needed, one per item, found {found}.{advice}")
        if where not in ("loss", "velocity", "score"):  # asked often, and reading labels waits for the device
            check_labels(condition, self.num_classes, where)
        return condition.to(self.null.device)

    def check_guidance(self, scale: float, advice: str = "") -> None:
        """Raises ValueError if conditions were never hidden, so that there is nothing to guide away from."""
        if not self.active or self.dropout == 0:
            raise ValueError(
                f"guidance {scale} needs a conditional model trained with condition_dropout > 0; this one has "
                f"conditional={self.active}, condition_dropout={self.dropout}. Use guidance=1{advice}."
            )


def check_interval(interval: tuple[float, float]) -> None:
    """Raises ValueError unless an interval is (low, high) with 0 <= low < high."""
    ends = list(interval) if isinstance(interval, tuple | list) else [interval]
    if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends) or not 0 <= ends[0] < ends[1]:
        raise ValueError(
            f"interval: two noise levels σ/α, (low, high) with 0 <= low < high, are needed, found {interval}."
        )


def guide(
    ask: Callable[[Tensor, Tensor, Tensor], Tensor],
    t: Tensor,
    x: Tensor,
    condition: Condition | None,
    null: Tensor,
    scale: float | Tensor,
) -> Tensor:
    """[B, *] a_null + w (a_condition - a_null), both answers from one call on 2B rows; from B rows if w is 0 or 1.

    Args:
        ask: (t, x, condition) -> [B, *].
        t: [] or [B].
        condition: [B, *] what to guide towards.
        null: [*] the label or embedding that stands for "no condition".
        scale: w, a number or [B].
    Raises:
        ValueError: if there is no condition to guide towards.
    Source: Ho & Salimans 2022 (Classifier-free diffusion guidance), equation 6, whose w is w - 1 here.
    """
    if not isinstance(condition, Tensor):
        raise ValueError("guidance needs a tensor of conditions to guide towards. Pass condition=, or guidance=1.")
    absent = null.to(condition).expand_as(condition)
    if not isinstance(scale, Tensor) and scale in (0, 1):
        return ask(t, x, condition if scale == 1 else absent)
    times = torch.cat((t, t)) if t.ndim else t
    free, given = ask(times, torch.cat((x, x)), torch.cat((absent, condition))).chunk(2)
    weight = expand_like(scale, free).to(free.dtype) if isinstance(scale, Tensor) else scale
    return free + weight * (given - free)


class GuidedNetwork(nn.Module):
    """A network with classifier-free guidance, for scores that are affine functions of its answers at fixed t and x.

    Args:
        network: trained with its conditions dropped at times.
        scale: w; 0 ignores the condition, above 1 exaggerates it.
        null: [*] the label or embedding that stands for "no condition".
        acts: of times [] or [B], whether guidance acts there; None for everywhere. Elsewhere w is 1.
    Source: Ho & Salimans 2022 (Classifier-free diffusion guidance), equation 6, whose w is w - 1 here.
    """

    def __init__(
        self, network: nn.Module, scale: float, null: Tensor, acts: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.network, self.scale, self.null, self.acts = network, scale, null, acts

    def forward(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        return guide(self.network, t, x, condition, self.null, self._weight(t))

    def _weight(self, t: Tensor) -> float | Tensor:
        if self.acts is None:
            return self.scale
        inside = self.acts(t)
        if bool(inside.all()):
            return self.scale
        return torch.where(inside, self.scale, 1.0).expand(t.shape) if bool(inside.any()) else 1.0
