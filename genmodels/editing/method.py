"""What an editing method is, and all those that invert an item to noise and come back under another prompt."""

import copy
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor

from ..registry import ConfigError, kind
from ..rng import Noise
from ..solvers.base import Solver
from .editor import Editor, Prompt, Walk
from .sharing import FeatureStore, Sharing


class Outcome(NamedTuple):
    """What a method made of states x_0.

    Args:
        x: [B, *latent] the edit.
        noise: [B, *latent] where the item was taken at the last time; None for methods that do not invert.
        nfe: evaluations of the velocity on the way; a guided one counts once.
        stored: bytes of shared features.
    """

    x: Tensor
    noise: Tensor | None
    nfe: int
    stored: int = 0


@kind
class EditMethod(ABC):
    """A way to turn an item that is described by one prompt into one described by another.

    Attributes:
        num_steps: steps of the grid that it walks.
    """

    num_steps: int

    @abstractmethod
    def edit(self, editor: Editor, x: Tensor, source: Prompt, target: Prompt, times: Tensor, noise: Noise) -> Outcome:
        """Edit states x [B, *latent] at the first of the times [N + 1].

        Args:
            noise: for methods that draw; row i of what they draw depends on seed i alone.
        """

    def plain(self) -> "EditMethod":
        """The same without sharing of features: what a reconstruction is made with."""
        return self

    def invert(self, editor: Editor, x: Tensor, source: Prompt, times: Tensor, noise: Noise) -> Outcome:
        """The noise of states x, as `x` of the outcome.

        Raises:
            ConfigError: if the method does not invert.
        """
        name = getattr(self, "registered_name", type(self).__name__)
        raise ConfigError(f"edit.method: '{name}' does not invert. Use one that does, such as rf_edit.")


class ByInversion(EditMethod):
    """Inversion by a solver up to noise under the source prompt, and by a solver down to items under the target.

    Args:
        share: what the way down takes over from the way up.
        pairing: of shared features, if `share` leaves it open: by interval where both ways are evaluated at the same
            places of a step (in the midpoint rule, all that counts is); by time where they are not, and features of
            the same interval would be those of another time, which costs the round trip an order.
        amid: whether anything is evaluated between the ends of a step.
    Raises:
        ConfigError: if features amid steps are to be shared, and there are none.
    """

    def __init__(
        self,
        num_steps: int,
        up: Solver,
        down: Solver,
        share: Sharing | None,
        pairing: Literal["interval", "time"] = "interval",
        amid: bool = True,
    ) -> None:
        if share is not None and share.evaluations == "mid" and not amid:
            raise ConfigError(
                "edit.method.share.evaluations: 'mid' shares what is evaluated amid steps, but this solver asks at "
                "their ends alone. Use both."
            )
        if share is not None and share.pairing is None:
            share = replace(share, pairing=pairing)
        self.num_steps, self.up, self.down, self.share = num_steps, up, down, share

    def edit(self, editor: Editor, x: Tensor, source: Prompt, target: Prompt, times: Tensor, noise: Noise) -> Outcome:
        if self.share is None:
            inverted = self.invert(editor, x, source, times, noise)
            back = Walk(editor, target, times)
            return Outcome(back.solve(self.down, inverted.x, True), inverted.x, inverted.nfe + back.calls)
        up, down = self.way_up(editor, source, times), Walk(editor, target, times)
        with FeatureStore(self.share, editor.attention(), len(times) - 1) as store:
            with store.recording(up):
                z = up.solve(self.up, x, False)
            with store.replaying(down):
                y = down.solve(self.down, z, True)
            return Outcome(y, z, up.calls + down.calls, store.bytes)

    def way_up(self, editor: Editor, source: Prompt, times: Tensor) -> Walk:
        """The walk from items to noise."""
        return Walk(editor, source, times)

    def plain(self) -> "ByInversion":
        same = copy.copy(self)
        same.share = None
        return same

    def invert(self, editor: Editor, x: Tensor, source: Prompt, times: Tensor, noise: Noise) -> Outcome:
        walk = self.way_up(editor, source, times)
        z = walk.solve(self.up, x, False)
        return Outcome(z, z, walk.calls)
