"""What TensorBoard shows of a run: scalars and pictures, as event files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..registry import ConfigError

AXES = ("step", "samples", "seconds")  # of a line of metrics.jsonl: not quantities


def check() -> None:
    """Raises ConfigError if TensorBoard is not installed; before anything is written."""
    _writer()


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            f"train.tensorboard: the package tensorboard cannot be imported ({error}). Install it, "
            "pip install 'genmodels[track]', or set train.tensorboard=false."
        ) from None
    return SummaryWriter


class TensorBoard:
    """Event files of a run; look at them with `tensorboard --logdir runs`.

    What an interrupted run showed after the step it resumes from is shown no more, so that no step appears twice.

    Args:
        folder: where the event files go, made if missing.
        start: optimiser steps behind the run.
    Raises:
        ConfigError: if TensorBoard is not installed.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        resumed = any(folder.glob("events.out.tfevents.*"))
        self.writer = _writer()(str(folder), purge_step=start + 1 if resumed else None)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """Numbers by name, on disk when this returns; None stands for what is not finite."""
        for name, value in values.items():
            if name not in AXES:
                self.writer.add_scalar(name, float("nan") if value is None else float(value), step)
        self.writer.flush()

    def picture(self, step: int, path: Path, name: str = "samples") -> None:
        """A PNG, pixel by pixel; what is no picture (.npz) is left out."""
        if path.suffix != ".png":
            return
        from PIL import Image

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
