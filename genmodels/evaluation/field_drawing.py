"""Fields of several models beside those of the data: spectra, histograms and samples in one picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..metrics.fields.one_point import histogram
from ..metrics.fields.spectrum import spectrum_errors
from ..metrics.fields.summary import checked, summarize
from ..registry import ConfigError
from ..training.plots import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BINS = 60
STRIP, GAP = 3.0, 0.06  # inches of a row of samples, and between two of them
RARE = 2e-4  # share of the pixels of the reference beyond either end of the histogram, before it is made wider
FAINT = 5e-3  # the same for the colours of samples
GREY, INK = "0.55", "0.25"


def draw_fields(
    path: Path,
    fields: Mapping[str, Tensor],
    reference: Tensor,
    *,
    name: str = "data",
    largest: int | None = None,
    limits: tuple[float, float] | None = None,
) -> Path:
    """Draw fields of models against those of the data, and write it as .png, .pdf or .svg.

    Three panels: the radial spectrum over the reference's, with a band of one standard error of the reference and bars
    of one of the model; the histogram of pixels on a logarithmic axis; and the first samples of each, on one scale.

    Args:
        fields: [N, H, W] or [N, 1, H, W] by the name that is drawn.
        reference: [M, H, W] or [M, 1, H, W].
        name: what the reference is called.
        largest: last ring of the spectrum, see `radial_spectrum`.
        limits: of the histogram, in data units; None for the range that nearly all pixels of the reference have.
    Raises:
        ConfigError: if the kind of file is not known, there is nothing to draw, or fields differ in size.
    """
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"draw_fields: a .png, .pdf or .svg is written, found '{path}'.")
    known = checked(reference, "draw_fields")
    found = {label: checked(x, f"draw_fields, '{label}'") for label, x in fields.items()}
    wrong = next((label for label, x in found.items() if x.shape[1:] != known.shape[1:]), None)
    if not found or wrong is not None:
        what = f"'{wrong}' has {list(found[wrong].shape[1:])}" if found else "there are none"
        raise ConfigError(f"draw_fields: fields of {list(known.shape[1:])} like the reference are needed; {what}.")
    import matplotlib

    style = {"font.size": 9, "svg.hashsalt": "genmodels", "pdf.fonttype": 42, "axes.edgecolor": INK}
    with matplotlib.rc_context(style):
        figure = _figure(found, known, name, largest, limits or _limits(known))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    return path


def _figure(
    fields: Mapping[str, Tensor], known: Tensor, name: str, largest: int | None, limits: tuple[float, float]
) -> "Figure":
    from matplotlib.figure import Figure

    height = max(3.2, 0.9 * (len(fields) + 1))
    figure = Figure(figsize=(11.5, height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.2, 1))
    spectra, values = left.subplots(1, 2)
    _spectra(spectra, fields, known, name, largest)
    _histograms(values, fields, known, name, limits)
    _strips(right, {name: known, **fields}, _limits(known, FAINT), height)
    return figure


def _spectra(axis: "Axes", fields: Mapping[str, Tensor], known: Tensor, name: str, largest: int | None) -> None:
    """Ratios of spectra; the modes of the lowest rings are few, so that their errors are large."""
    for place, (label, x) in enumerate(fields.items()):
        errors = spectrum_errors(x, known, largest)
        k, error, stderr = (part.numpy() for part in errors[:3])
        if place == 0:
            noise = (errors.noise / (1 + errors.error)).numpy()
            axis.fill_between(k, 1 - noise, 1 + noise, color=GREY, alpha=0.3, lw=0, label=f"{name} ± 1 s.e.")
            axis.axhline(1, color=GREY, lw=1)
        colour = COLOURS[place % len(COLOURS)]
        axis.fill_between(k, 1 + error - stderr, 1 + error + stderr, color=colour, alpha=0.18, lw=0)
        axis.plot(k, 1 + error, color=colour, lw=1.4, marker="o", ms=2.6, label=f"{label} ({errors.rms:.1%} rms)")
    axis.set_xscale("log")
    ticks = [t for t in (1, 2, 4, 8, 16, 32, 64, 128, 256) if t <= k[-1]]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set(xlabel="wave number k [cycles per side]", ylabel=f"P(k) / P(k) of {name}")
    axis.set_title("power spectrum", fontsize=9)
    _finish(axis)


def _histograms(
    axis: "Axes", fields: Mapping[str, Tensor], known: Tensor, name: str, limits: tuple[float, float]
) -> None:
    """Densities on a logarithmic axis, down to what the reference's pixels can tell."""
    edges = torch.linspace(*limits, BINS + 1, dtype=torch.float64)
    width = (edges[1] - edges[0]).item()
    middles = ((edges[1:] + edges[:-1]) / 2).numpy()

    def density(x: Tensor) -> tuple[Tensor, Tensor]:
        found = summarize(histogram(x.flatten(1), edges)[:, 1:-1] / width)
        return found.value, found.stderr.nan_to_num()

    value, stderr = density(known)
    lowest = 0.5 * value[value > 0].min().item()
    low, high = (value - stderr).clamp(min=lowest).numpy(), (value + stderr).clamp(min=lowest).numpy()
    axis.fill_between(middles, low, high, color=GREY, alpha=0.35, lw=0)
    axis.plot(middles, value.clamp(min=lowest).numpy(), color=GREY, lw=2.2, label=name)
    for place, (label, x) in enumerate(fields.items()):
        value = density(x)[0]
        shown = value.where(value > 0, torch.nan).numpy()
        axis.plot(middles, shown, color=COLOURS[place % len(COLOURS)], lw=1.2, label=label)
    axis.set(yscale="log", ylim=(lowest, None), xlim=limits, xlabel="pixel value [data units]", ylabel="density")
    axis.set_title("one-point law", fontsize=9)
    _finish(axis)


def _strips(figure: "SubFigure", fields: Mapping[str, Tensor], limits: tuple[float, float], height: float) -> None:
    """A row of samples of each, as many as fit; fields of both signs have a diverging scale about 0."""
    low, high = limits
    top = max(-low, high)
    diverging = {"cmap": "RdBu_r", "vmin": -top, "vmax": top}
    shown = diverging if low < -0.25 * high < 0 else {"cmap": "magma", "vmin": low, "vmax": high}
    rows, columns = next(iter(fields.values())).shape[1:]
    tall = height / len(fields) - 0.3  # inches of a sample, less its caption
    count = max(1, round(STRIP / (tall * columns / rows + GAP)))
    gap = max(1, round(GAP / tall * rows))
    axes = figure.subplots(len(fields), 1, squeeze=False)[:, 0]
    for axis, (label, x) in zip(axes, fields.items(), strict=True):
        row = torch.full((rows, count * (columns + gap) - gap), torch.nan, dtype=torch.float64)
        for place, sample in enumerate(x[:count]):
            row[:, place * (columns + gap) :][:, :columns] = sample
        image = axis.imshow(row.numpy(), interpolation="nearest", **shown)
        axis.set_title(label, fontsize=8, loc="left", pad=2)
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=list(axes), fraction=0.04, pad=0.02, aspect=30)
    bar.outline.set_visible(False)


def _finish(axis: "Axes") -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.15, lw=0.6)


def _limits(known: Tensor, rare: float = RARE) -> tuple[float, float]:
    """The quantiles that leave some share of the pixels beyond either, a tenth of their distance further out."""
    ordered = known.flatten().sort().values
    cut = int(rare * len(ordered))
    low, high = ordered[cut].item(), ordered[-1 - cut].item()
    margin = 0.1 * (high - low) or 1.0
    return low - margin, high + margin
