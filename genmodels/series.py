"""Series for people: drawn curves beside those of the data, and predictions over what was seen and asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data.dataset import Dataset
from .training.plots import COLOURS
from .types import Batch

CURVES = 8  # of the data, and drawn
CHANNELS = 4  # the first ones, in a panel or a colour each
Series = tuple[Tensor, Tensor, Tensor]  # values [n, L, C], times [n, L] and mask [n, L, C]


def observed(batch: Batch) -> Series:
    """What the items are known to be: the values asked for, where these are series, or else those given."""
    if batch.target_times is not None:
        return _series(batch.target, batch.target_times, batch.target_mask)
    return _series(batch.x, batch.times, batch.mask)


def _series(values: Tensor, times: Tensor, mask: Tensor | None) -> Series:
    seen = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    seen = seen[..., None] if seen.ndim < values.ndim else seen
    return values, times, seen.expand_as(values)


def draw_series(path: Path, x: Tensor, dataset: Dataset, notes: dict[str, str]) -> Path:
    """A PNG of series: a row a channel, the data on the left and the first of x [n, L, C] on the right.

    Where all items of the data have the same times, and samples have as many, these are the samples' times; otherwise
    they stand at even times up to the data's last.

    Args:
        notes: text for the metadata of the file.
    """
    from matplotlib.figure import Figure

    values, times, seen = observed(dataset.take("train", torch.arange(min(CURVES, dataset.size("train")))))
    x = x[:CURVES].float().cpu()
    shared = x.shape[1] == times.shape[1] and torch.equal(times, times[:1].expand_as(times))
    at = times[0] if shared else torch.linspace(0, times.max().item(), x.shape[1])
    channels = min(CHANNELS, x.shape[2], values.shape[2])
    figure = Figure(figsize=(8, 0.6 + 1.9 * channels), layout="constrained")
    panels = figure.subplots(channels, 2, squeeze=False, sharex=True, sharey="row")
    for channel, (left, right) in enumerate(panels):
        for k in range(len(values)):
            there = seen[k, :, channel]
            _curve(left, times[k][there], values[k, there, channel], k, marker="o", markersize=2)
        for k in range(len(x)):
            _curve(right, at, x[k, :, channel], k)
        _reach(left, values[..., channel][seen[..., channel]])
        left.set_ylabel(f"channel {channel}", fontsize=8)
    for axes, title in zip(panels[0], ("data", _counted("samples", x)), strict=True):
        axes.set_title(title, fontsize=9)
    _dress(panels, dataset)
    return _save(figure, path, notes)


def draw_forecasts(path: Path, prediction: Tensor, batch: Batch, dataset: Dataset, notes: dict[str, str]) -> Path:
    """A PNG of predictions, an item a panel, a colour a channel.

    Dots were seen, rings are asked for, and lines are predicted, with bands of two standard deviations where the
    prediction is a law.

    Args:
        prediction: [n, M, C], or [n, M, C, 2] with mean and log standard deviation, for the items of the batch.
        notes: text for the metadata of the file.
    """
    from matplotlib.figure import Figure

    prediction = prediction[:CURVES].float().cpu()
    law = prediction.ndim == batch.target.ndim + 1
    mean, log_std = prediction.unbind(-1) if law else (prediction, None)
    x, times, seen = _series(batch.x, batch.times, batch.mask)
    asked, when, counts = observed(batch)
    columns = min(4, len(mean))
    rows = -(-len(mean) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.6 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    channels = min(CHANNELS, mean.shape[2])
    for axes in panels.ravel()[len(mean) :]:
        axes.axis("off")
    for k, axes in enumerate(panels.ravel()[: len(mean)]):
        new = when[k].diff(prepend=when[k, :1] - 1) > 0  # not the repeated times of padding
        for c in range(channels):
            there, here = counts[k, :, c], seen[k, :, c]
            look = {"linestyle": "none", "color": COLOURS[c]}
            axes.plot(when[k][there], asked[k, there, c], marker="o", markersize=4, fillstyle="none", alpha=0.5, **look)
            axes.plot(times[k][here], x[k, here, c], marker="o", markersize=3, **look)
            _curve(axes, when[k][new], mean[k, new, c], c)
            if law:
                low, high = (mean[k, new, c] + side * 2 * log_std[k, new, c].exp() for side in (-1, 1))
                axes.fill_between(when[k][new], low, high, color=COLOURS[c], alpha=0.15, linewidth=0)
    shown = counts[: len(mean), :, :channels]
    _reach(panels[0, 0], asked[: len(mean), :, :channels][shown])
    figure.suptitle("dots: seen, rings: asked for, lines: predicted" + " ± 2 standard deviations" * law, fontsize=9)
    _dress(panels, dataset)
    return _save(figure, path, notes)


def _curve(axes: Any, times: Tensor, values: Tensor, k: int, **look: Any) -> None:
    axes.plot(times.numpy(), values.numpy(), color=COLOURS[k % len(COLOURS)], linewidth=1, **look)


def _reach(axes: Any, values: Tensor) -> None:
    """The vertical range of the values, with a tenth more at both ends."""
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    margin = 0.1 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _counted(name: str, x: Tensor) -> str:
    bad = int((~x.isfinite().flatten(1).all(1)).sum())
    return f"{name} ({bad} of {len(x)} not finite)" if bad else name


def _dress(panels: np.ndarray, dataset: Dataset) -> None:
    unit = dataset.unit_of_time
    for axes in panels.ravel():
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("time" if unit in (None, "1") else f"time [{unit}]", fontsize=8)


def _save(figure: Any, path: Path, notes: dict[str, str]) -> Path:
    figure.savefig(path, dpi=110, metadata=notes)
    return path
