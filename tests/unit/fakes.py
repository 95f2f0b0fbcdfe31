"""Small kinds and members for the tests of the core; `world` registers them, `restored` takes them out again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from genmodels.data.dataset import Dataset
from genmodels.model import Model
from genmodels.registry import kind, register
from genmodels.schema import MEMBERS
from genmodels.types import Batch, Loss


@contextmanager
def restored() -> Iterator[None]:
    """Whatever is registered inside is forgotten afterwards."""
    saved = {base: dict(found) for base, found in MEMBERS.items()}
    try:
        yield
    finally:
        MEMBERS.clear()
        MEMBERS.update(saved)


def world() -> SimpleNamespace:
    """The fakes by class name."""

    @kind
    class FakeNet:
        """Networks of the tests."""

    @register(FakeNet, "mlp")
    class MLP(FakeNet):
        """Layers one after another.

        Args:
            width: units per layer.
        Source: Rumelhart et al. 1986, page 318;
            and a second line.

        Not part of the source.
        """

        renamed: ClassVar[dict[str, str]] = {"act": "activation"}

        def __init__(
            self,
            width: int = 64,
            activation: Literal["relu", "tanh"] = "relu",
            *,
            dropout: float = 0.0,
            in_features: int,
            out_features: int,
        ) -> None:
            self.width, self.activation, self.dropout = width, activation, dropout
            self.sizes = (in_features, out_features)

    @register(FakeNet, "tree")
    class Tree(FakeNet):
        """A tree of the depth given."""

        def __init__(self, depth: int) -> None:
            self.depth = depth

    @kind
    class FakeSchedule:
        """Schedules of the tests."""

    @register(FakeSchedule, "linear")
    class Linear(FakeSchedule):
        """A straight line.

        Source: Euclid, book 1.
        """

        def __init__(self, slope: float = 1.0) -> None:
            self.slope = slope

    @register(FakeSchedule, "cosine")
    class Cosine(FakeSchedule):
        """A cosine."""

        def __init__(self, offset: float = 0.008) -> None:
            self.offset = offset

    @kind
    class FakeLayer:
        """Layers of the tests."""

    @register(FakeLayer, "coupling")
    class Coupling(FakeLayer):
        """Half of the components transform the other half."""

        def __init__(self, network: Callable[..., FakeNet], bins: int = 8, *, shape: tuple[int, ...]) -> None:
            self.network = network(in_features=shape[0] // 2, out_features=3 * bins - 1)
            self.bins, self.shape, self.out_shape = bins, shape, shape

    @register(FakeLayer, "squeeze")
    class Squeeze(FakeLayer):
        """Four times as many components."""

        def __init__(self, *, shape: tuple[int, ...]) -> None:
            self.shape, self.out_shape = shape, (shape[0] * 4,)

    @kind
    class FakeSolver:
        """Solvers of the tests."""

    @register(FakeSolver, "euler")
    class Euler(FakeSolver):
        """One stage."""

    @register(FakeSolver, "heun")
    class Heun(FakeSolver):
        """Two stages.

        Source: Heun 1900.
        """

        def __init__(self, tolerance: float = 1e-3) -> None:
            self.tolerance = tolerance

    @register(Model, "fake_flow")
    class Flow(Model):
        """Layers, a schedule and a bag of plain values."""

        def __init__(
            self,
            layers: tuple[Callable[..., FakeLayer], ...] = (),
            schedule: FakeSchedule = Linear(),
            more: tuple[FakeSchedule, ...] = (Linear(), Cosine()),
            guide: FakeNet | None = None,
            maker: Callable[..., FakeNet] = MLP,
            flag: bool = False,
            count: int | None = None,
            scale: float = 1.0,
            title: str = "plain",
            level: Literal[1, 2, 3] = 1,
            pairs: tuple[tuple[int, float], ...] = ((1, 0.5),),
            weights: dict[str, float] = {"a": 1.0},  # noqa: B006  (never changed: resolve copies)
            either: int | str = 0,
            sizes: int | tuple[int, ...] = 3,
            *,
            clip: float | None = None,
            shape: tuple[int, ...],
            transform: Any,
        ) -> None:
            super().__init__()
            self.given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
            self.shape = shape
            self.layers = []
            for layer in layers:
                self.layers.append(layer(shape=shape))
                shape = self.layers[-1].out_shape

        def loss(self, batch: Batch, *, generator: torch.Generator | None = None) -> Loss:
            return Loss(batch.x.flatten(1).sum(1), {})

        def sample(
            self,
            seeds: list[int],
            *,
            condition: Tensor | None = None,
            solver: FakeSolver = Euler(),
            num_steps: int = 50,
            guidance: float = 1.0,
        ) -> Tensor:
            return torch.full((len(seeds),), float(num_steps))

    @register(Dataset, "fake_points")
    class Points(Dataset):
        """Nothing but a shape."""

        shape = (4,)

        def __init__(self, count: int = 10, path: str = "") -> None:
            self.count, self.path = count, path

        def size(self, split: str) -> int:
            return self.count

        def take(self, split: str, indices: Tensor) -> Batch:
            return Batch(torch.zeros(len(indices), 4))

    return SimpleNamespace(**{k: v for k, v in locals().items() if isinstance(v, type)})


def tree(**changes: Any) -> dict[str, Any]:
    """A small valid configuration of fakes."""
    return {"data": "fake_points", "model": "fake_flow", **changes}
