"""The handwritten digits read as series, row by row or pixel by pixel, with parts of them lost."""

from typing import Literal

import torch

from ..registry import ConfigError, register
from ..types import Batch
from .dataset import SPLITS, Dataset
from .digits import LEVELS, Digits
from .memory import InMemory
from .trajectories import chosen, item_noise

LAYOUTS = {"rows": (8, 8), "pixels": (64, 1)}


@register(Dataset, "digit_series")
class DigitSeries(InMemory):
    """The images of `digits` as series: 8 rows of 8 channels, or 64 pixels of 1 channel, in reading order.

    Values are the levels 0 … 16 over 16, in [0, 1]; time runs evenly from 0 (the first step) to 1 (the last). A share
    of each item's time steps is lost, whole steps, the same ones whenever the item is taken:
    round((1 - dropped) · steps) are left, one at least. Lost values are 0 and their mask is False. Splits are those of
    `digits`.

    Args:
        layout: rows or pixels as steps.
        dropped: share of the time steps that is lost.
        task: "classify" asks for the digit; "interpolate" for every value at every time, also the lost ones.
        seed: of which steps are lost.
    Source: Alpaydin & Kaynak 1998 (Optical Recognition of Handwritten Digits, UCI repository), its test part.
    """

    unit_of_time = "reading times of the image"

    def __init__(
        self,
        layout: Literal["rows", "pixels"] = "rows",
        dropped: float = 0.0,
        task: Literal["classify", "interpolate"] = "classify",
        seed: int = 0,
    ) -> None:
        if not 0 <= dropped < 1:
            raise ConfigError(f"data 'digit_series': dropped must be a share in [0, 1), found {dropped:g}.")
        self.shape = LAYOUTS[layout]
        steps = self.shape[0]
        self.target_shape = (10,) if task == "classify" else self.shape
        digits = Digits(task="classify")
        for split in SPLITS:
            images = digits.all(split)
            n = len(images)
            mask = chosen(item_noise(n, f"digit_series {layout}", split, seed), steps, 1 - dropped)
            times = (torch.arange(steps, dtype=torch.float64) / (steps - 1)).repeat(n, 1)
            values = images.x.reshape(n, *self.shape) / (LEVELS - 1)
            asked = (
                {"target": images.target}
                if task == "classify"
                else {"target": values, "target_times": times, "target_mask": torch.ones_like(mask)}
            )
            self.hold(split, Batch(torch.where(mask[..., None], values, 0.0), times=times, mask=mask, **asked))
