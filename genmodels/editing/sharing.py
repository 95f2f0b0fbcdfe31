"""Sharing of attention features: what an inversion computed, in place of what denoising would (RF-Edit)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from .editor import Attention, Walk


@dataclass(frozen=True)
class Sharing:
    """Which attention features denoising takes over from inversion, and where they are kept meanwhile.

    Args:
        steps: intervals next to noise whose features are shared (the papers' "inject").
        blocks: names or numbers of attention layers; "last_half" for the last ⌈18/38⌉ of them (of the single-stream
            blocks, where there are such), "all" for every one.
        over: only layers whose tokens attend over these.
        tensors: which of queries, keys and values.
        combine: replace takes the stored feature, add adds it.
        ratio: factor on stored features.
        evaluations: both of a step, or the one amid it, which alone enters the midpoint rule's result.
        pairing: features of the same interval and evaluation, or of the same time.
        rows: of guided calls on twice the items, whether both halves take them over or the prompted one.
        store: device keeps them where they are computed, host in (pinned) memory, disk in files.
        precision: half keeps them in 16 bits.
        folder: of the files; null for a temporary one.
    Raises:
        ConfigError: if a number is out of its range, or an option has no effect.
    """

    steps: int = 2
    blocks: Literal["last_half", "all"] | tuple[int | str, ...] = "last_half"
    over: Literal["any", "space", "time", "all"] = "any"
    tensors: tuple[Literal["q", "k", "v"], ...] = ("v",)
    combine: Literal["replace", "add"] = "replace"
    ratio: float = 1.0
    evaluations: Literal["both", "mid"] = "both"
    pairing: Literal["interval", "time"] = "interval"
    rows: Literal["both", "prompted"] = "both"
    store: Literal["device", "host", "disk"] = "host"
    precision: Literal["same", "half"] = "same"
    folder: str | None = None


class FeatureStore:
    """Records features of attention layers on one walk and replays them on another, by forward hooks.

    Args:
        layers: of the editor.
        num_steps: of the walks.
    Attributes:
        bytes: that its features take.
    """

    def __init__(self, sharing: Sharing, layers: Sequence[Attention], num_steps: int) -> None:
        self.sharing, self.layers, self.num_steps, self.bytes = sharing, layers, num_steps, 0

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(self, *error: object) -> None:
        """Forget every feature."""

    @contextmanager
    def recording(self, walk: Walk) -> Iterator[None]:
        """Keep the features of a walk."""
        yield

    @contextmanager
    def replaying(self, walk: Walk) -> Iterator[None]:
        """Give those to another walk."""
        yield
