"""What a store of features sees of a walk: where it is, which layers ran, and whether two walks fit together."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..networks.attention import Attention
from .editor import Place

SAME_TIME = 1e-6


class Log:
    """What a store saw of a walk.

    Attributes:
        places: (interval, evaluation) -> time, of the evaluations whose features were taken or given.
        sizes: bytes of a feature, by layer and tensor.
        doubled: whether calls were guided, where that is known.
        highest: the last interval from noise that was seen; -1 for none.
    """

    def __init__(self, walk: Any, num_steps: int) -> None:
        self.walk, self.num_steps, self.highest = walk, num_steps, -1
        times = getattr(walk, "times", None)
        self.times = times.detach().to("cpu", torch.float64) if isinstance(times, Tensor) else None
        self.places: dict[tuple[int, int], float] = {}
        self.sizes: dict[tuple[str, str], int] = {}
        self.doubled: dict[tuple[str, int, int], bool | None] = {}
        self._ran: set[tuple[str, str]] = set()
        self._calls: set[tuple[str, str]] = set()  # in the present evaluation
        self._place: Place | None = None
        self._intervals: dict[int, set[int]] = {}  # their evaluations, in the order of the walk
        self._turn = -1
        if self.times is not None and len(self.times) != num_steps + 1:
            raise ValueError(
                f"sharing: a walk of {len(self.times) - 1} steps was given to a store for {num_steps}. Make another "
                "store."
            )

    def check_same(self, other: "Log") -> None:
        """Raises ValueError unless both walks have the same times, as far as they tell."""
        if self.times is not None and other.times is not None and not _close(self.times, other.times):
            raise ValueError(
                f"sharing: features were recorded at times {_shown(other.times)} and are to be replayed at "
                f"{_shown(self.times)}. Use the same times both ways."
            )

    def check_ran(self, tapped: Iterable[tuple[str, str]]) -> None:
        """Raises ValueError if a projection, by layer and tensor, was never called."""
        silent = [f"'{tensor}' of {name}" for name, tensor in tapped if (name, tensor) not in self._ran]
        if silent:
            raise ValueError(
                f"sharing: the projections of {', '.join(silent[:8])}{' …' if len(silent) > 8 else ''} never ran, so "
                "that nothing of them can be shared. Undo the fusing of projections (unfuse_qkv_projections) before "
                "asking for an editor, and let the walk ask the same model."
            )

    def arrive(self, layer: Attention, tensor: str) -> tuple[Place, bool]:
        """Where the walk is, and whether the module was called before in the same evaluation."""
        place = getattr(self.walk, "place", None)
        if place is None:
            raise ValueError(
                "sharing: an attention layer ran, but the walk does not say where it is (`place` is None). Ask for "
                "velocities through the walk, or give the pipeline the scheduler that was passed here."
            )
        if not 0 <= place.interval < self.num_steps:
            raise ValueError(
                f"sharing: a walk came to step {place.interval} from noise, of a store for {self.num_steps} steps "
                "(counted from 0). Take equal steps both ways."
            )
        if place != self._place:
            self._place, self._calls = place, set()
            self._intervals.setdefault(place.interval, set()).add(place.evaluation)
            self.highest = max(self.highest, place.interval)
        again = (layer.name, tensor) in self._calls
        self._calls.add((layer.name, tensor))
        self._ran.add((layer.name, tensor))
        return place, again

    def turned(self) -> bool:
        """Whether the walk has come to another interval since this was last asked."""
        turned, self._turn = self._place.interval != self._turn, self._place.interval
        return turned

    def expected(self, steps: int, mid: bool, taps: int) -> int:
        """Bytes that will be needed from here up to noise, for the last steps of the walk and so many taps."""
        left = min(self._place.interval + 1, steps)
        # the first interval also has what a solver evaluates before its steps, and the present one is not over
        whole = list(self._intervals.values())[1:-1]
        counted = sum(not mid or evaluation > 0 for evaluation in whole[-1]) if whole else 1
        return left * counted * taps * sum(self.sizes.values()) // len(self.sizes)

    def nearest(self, time: float) -> tuple[int, int] | None:
        """The place at this time; None if there was none."""
        found = min(self.places, key=lambda slot: abs(self.places[slot] - time), default=None)
        return found if found is not None and abs(self.places[found] - time) <= SAME_TIME else None

    def guided(self, layer: Attention, output: Tensor) -> bool | None:
        """Whether a call is on twice the rows of the items; None if they are not known."""
        items = getattr(self.walk, "items", None)
        times, rest = divmod(len(output), items * layer.rows) if items else (0, 1)
        return times == 2 if rest == 0 and times in (1, 2) else None


def _shown(times: Tensor) -> str:
    shown = [f"{t:.6g}" for t in times.tolist()]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:3], "…", *shown[-3:]])


def _close(times: Tensor, others: Tensor) -> bool:
    return bool((times - others).abs().max() <= SAME_TIME)
