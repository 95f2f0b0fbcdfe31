"""Which attention layers, and which rows of their features, sharing is about."""

from collections.abc import Sequence

from torch import Tensor

from ..networks.attention import Attention
from ..registry import ConfigError, near

WHERE = "edit.method.share"
SHARE = (18, 38)  # of FLUX's 38 single-stream blocks RF-Edit shares the last 18


def select(
    layers: Sequence[Attention], blocks: str | tuple[int | str, ...], over: str, tensors: Sequence[str]
) -> list[Attention]:
    """The layers that options of `Sharing` choose, in the order of the network.

    Raises:
        ConfigError: if there are none, or not those that it names; it lists what there is.
    """
    if not layers:
        raise ConfigError(f"{WHERE}: there are no attention layers here to share features of. Set share: null.")
    usable = [layer for layer in layers if over in ("any", layer.over)]
    if not usable:
        found = ", ".join(sorted({layer.over for layer in layers}))
        raise ConfigError(f"{WHERE}.over: no layer attends over '{over}'; these attend over: {found}.")
    main = list(dict.fromkeys(layer.name for layer in usable if layer.main))
    if isinstance(blocks, tuple):
        names = {name for block in blocks for name in _named(block, usable, main)}
    else:
        part, whole = SHARE if blocks == "last_half" else (1, 1)
        names = set(main[len(main) - -(-part * len(main) // whole) :])
    chosen = [layer for layer in usable if layer.name in names]
    for layer in chosen:
        for tensor in tensors:
            if tensor not in layer.taps:
                given = ", ".join(layer.taps) or "nothing"
                raise ConfigError(f"{WHERE}.tensors: {layer.name} does not give '{tensor}', only {given}.")
    return chosen


def _named(block: int | str, usable: list[Attention], main: list[str]) -> list[str]:
    if isinstance(block, int):
        if not 0 <= block < len(main):
            raise ConfigError(
                f"{WHERE}.blocks: there is no attention layer {block}. There are {len(main)}, counted from 0: "
                f"{_shown(main)}."
            )
        return [main[block]]
    names = [layer.name for layer in usable]
    found = [name for name in names if f"{name}.".startswith(f"{block}.")]
    if not found:
        raise ConfigError(
            f"{WHERE}.blocks: there is no attention layer '{block}'.{near(block, names)} There are: {_shown(names)}."
        )
    return found


def _shown(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 80 else [*names[:40], "…", *names[-40:]])


def aligned(stored: Tensor, rows: int, doubled: bool | None, was: bool | None, prompted: bool) -> tuple[Tensor, int]:
    """Stored rows for a call of so many, and the row from which on it takes them over.

    Guided calls have the free rows first, then the prompted ones.

    Args:
        doubled, was: whether the call is guided, and the recorded one was; None if that is not known.
        prompted: whether the free rows keep their own.
    Raises:
        ValueError: if the two do not belong to the same items.
    """
    kept = len(stored)
    if rows == kept and (doubled is None or was is None or doubled == was):
        half = rows // 2 if prompted and doubled else 0
        return stored[half:], half
    if rows == 2 * kept and doubled is not False and was is not True:
        return (stored, kept) if prompted else (stored.repeat(2, *(1 for _ in stored.shape[1:])), 0)
    if kept == 2 * rows and doubled is not True and was is not False:
        return stored[rows:], 0
    raise ValueError(f"{kept} rows were recorded, {rows} are needed")
