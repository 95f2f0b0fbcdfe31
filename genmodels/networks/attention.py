"""Self-attention layers as networks tell of them, to whoever reads or replaces what their projections give."""

from typing import Literal, NamedTuple

from torch import nn


class Tap(NamedTuple):
    """Where a projection of an attention layer can be read and replaced: the output of a module, or a part of it.

    Args:
        module: its output is [B, tokens, *, features].
        part: (i, n) for the i-th of n equal parts of the features, of projections that are fused.
    """

    module: nn.Module
    part: tuple[int, int] = (0, 1)


class Attention(NamedTuple):
    """One self-attention layer of a network.

    Args:
        name: how users name its block ("blocks.3", "single_transformer_blocks.20"). Layers of networks that take turns
            along the times have one name, if they stand for each other.
        over: the tokens that attend to each other: those of one picture or frame, of one place in all frames, or all.
        taps: of "q", "k" and "v" (queries and keys after their norm and before rotation, where there are such).
        main: whether it counts where layers are chosen by number, as a share or all; others are chosen by name only.
        rows: rows of the taps that one item has: its frames where each attends within itself, its places where each
            attends along time.
    """

    name: str
    over: Literal["space", "time", "all"]
    taps: dict[str, Tap]
    main: bool = True
    rows: int = 1


def fused(module: nn.Module) -> dict[str, Tap]:
    """The taps of one projection that gives queries, keys and values one after the other."""
    return {name: Tap(module, (i, 3)) for i, name in enumerate(("q", "k", "v"))}
