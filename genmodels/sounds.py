"""Sound as files: WAV to listen to, waveforms above spectrograms to look at."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .data import wav
from .data.mel import magnitudes

SHOWN = 8  # sounds in a picture
COLUMNS = 4
RANGE = 80.0  # decibels between black and white
WINDOW = 0.03  # seconds that a column of a spectrogram sees, roughly


def write_sounds(folder: Path, x: Tensor, rate: int, seeds: Sequence[int]) -> str:
    """16-bit WAV files `<folder>/<seed>.wav` of amplitudes x [n, T].

    Returns:
        What was lost in them, in words; empty if nothing was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(max(seeds, default=0))))
    beyond = [wav.write(folder / f"{seed:0{digits}}.wav", row, rate) for seed, row in zip(seeds, x, strict=True)]
    if not any(beyond):
        return ""
    files = sum(n > 0 for n in beyond)
    return (
        f"{sum(beyond):,} of {x.numel():,} amplitudes in {files} of {len(x)} files were beyond [-1, 1] and are clipped"
    )


def spectrogram(x: Tensor, rate: int) -> tuple[Tensor, int]:
    """[n, F, frames] decibels of sounds x [n, T], 0 for a sine of amplitude 1, and the samples between frames."""
    window = 2 ** round(math.log2(max(16, WINDOW * rate)))
    while window // 2 >= x.shape[1] and window > 2:
        window //= 2
    hop = max(1, min(window // 4, x.shape[1] // 64))
    level = magnitudes(x.double().nan_to_num(0.0, 0.0, 0.0), window, hop, min(window // 2, x.shape[1] - 1)) / (
        window / 4
    )
    return 20 * level.clamp(min=10 ** (-RANGE / 20 - 1)).log10(), hop


def draw_sounds(path: Path, x: Tensor, rate: int, titles: Sequence[str], notes: dict[str, str]) -> Path:
    """A PNG of the first sounds x [n, T]: waveforms, below each its spectrogram in decibels relative to full scale.

    Args:
        titles: of the sounds.
        notes: text for the metadata of the file.
    """
    from matplotlib.figure import Figure

    x, total = x[:SHOWN].float().cpu(), len(x)
    columns = min(COLUMNS, max(1, len(x)))
    rows = max(1, math.ceil(len(x) / columns))
    width, height = 3.1 * columns + 1.5, 2.8 * rows + 0.8  # inches; margins are set, since finding them takes seconds
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(2 * rows, columns, squeeze=False, sharex=True, height_ratios=[1, 2] * rows)
    figure.subplots_adjust(0.6 / width, 0.45 / height, 1 - 0.9 / width, 1 - 0.5 / height, 0.07, 0.3)
    levels, hop = spectrogram(x, rate)
    loudest = x.abs().nan_to_num(0.0, 0.0).amax().item()
    reach = min(max(1.05 * loudest, 0.01), 2.0)
    for k in range(rows * columns):
        pair = [panels[2 * (k // columns) + lower][k % columns] for lower in (0, 1)]
        if k >= len(x):
            for axes in pair:
                axes.axis("off")
            continue
        pair[0].set_title(titles[k], fontsize=9)
        pair[0].set_ylim(-reach, reach)
        pair[0].plot(np.arange(x.shape[1]) / rate, x[k].numpy(), linewidth=0.4)
        image = _image(pair[1], levels[k], hop / rate, rate)
        pair[1].set_xlim(0, x.shape[1] / rate)
        _label(pair, left=k % columns == 0, lowest=k + columns >= len(x))
    bar = figure.colorbar(image, cax=figure.add_axes((1 - 0.75 / width, 0.1, 0.15 / width, 0.8)))
    bar.set_label("dB relative to full scale", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    if total > len(x):
        figure.suptitle(f"the first {len(x)} of {total:,}", fontsize=9, y=1 - 0.1 / height)
    return _save(figure, path, notes)


def _image(axes: Any, levels: Tensor, step: float, rate: int) -> Any:
    """A spectrogram [F, frames], a frame every `step` seconds, over kilohertz."""
    extent = (-step / 2, (levels.shape[1] - 0.5) * step, 0, rate / 2000)
    return axes.imshow(levels.numpy(), origin="lower", aspect="auto", extent=extent, vmin=-RANGE, vmax=0, cmap="magma")


def _label(pair: Sequence[Any], *, left: bool, lowest: bool) -> None:
    """Numbers and names at the outer axes of a waveform and its spectrogram."""
    for axes, name in zip(pair, ("amplitude", "kHz"), strict=True):
        axes.tick_params(labelsize=8, labelleft=left, labelbottom=lowest and name == "kHz")
        axes.set_ylabel(name if left else "", fontsize=8)
    pair[1].set_xlabel("seconds" if lowest else "", fontsize=8)


def _save(figure: Any, path: Path, notes: dict[str, str]) -> Path:
    """A PNG of 128 colours, spread over all that occur: rare ones, as of the colour bar, stay what they are."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn, info = io.BytesIO(), PngInfo()
    figure.savefig(drawn, dpi=72)
    for key, value in notes.items():
        info.add_text(key, value)
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, pnginfo=info, optimize=True)
    return path
