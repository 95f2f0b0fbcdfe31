"""Densities of models of the plane beside that of their data: `python -m evals.density runs/a runs/b --out d.png`.

Each panel is a density on one grid, all on one scale; below it stand the run, its mean negative log-likelihood on the
test split, and how far that is above the entropy of the data, both on the same items.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..commands import guarded
from ..data.dataset import Dataset
from ..registry import ConfigError
from ..training.plots import labels
from ..training.run import Run
from ..types import SupportsLogProb

CHUNK = 4096  # points evaluated at once
MARGIN = 0.06  # what the window shows beyond the test items on each side, as a share of their extent
BRIGHTEST = 0.999  # quantile of the densities at test items: peaks of a few pixels do not count
HEADROOM = 1.3  # how far above it the colours reach, so that it shows where a model has too much


@dataclass(frozen=True)
class Window:
    """A square of the plane, and the centres of n² equal cells of it."""

    left: float
    bottom: float
    side: float
    n: int

    @classmethod
    def around(cls, x: Tensor, n: int) -> "Window":
        """The smallest that shows the points x [N, 2] and a margin."""
        low, high = x.double().amin(0), x.double().amax(0)
        side = float((high - low).max()) * (1 + 2 * MARGIN) or 1.0
        left, bottom = ((low + high) / 2 - side / 2).tolist()
        return cls(left, bottom, side, n)

    @property
    def extent(self) -> tuple[float, float, float, float]:
        return self.left, self.left + self.side, self.bottom, self.bottom + self.side

    def points(self) -> Tensor:
        """[n², 2] float64, row by row from below."""
        steps = (torch.arange(self.n, dtype=torch.float64) + 0.5) * (self.side / self.n)
        y, x = torch.meshgrid(self.bottom + steps, self.left + steps, indexing="ij")
        return torch.stack((x, y), -1).reshape(-1, 2)


@dataclass(frozen=True)
class Panel:
    """One law.

    Attributes:
        density: [n, n] on the window, row 0 at its lower edge; None if it is not known (data without a density).
        log_p: [N] nats at the test items.
        caption: lines below it.
    """

    name: str
    density: np.ndarray | None
    log_p: Tensor | None
    caption: tuple[str, ...]


def panels(runs: Sequence[Run], window: int = 200, items: int = 10_000, weights: str | None = None) -> "Picture":
    """The data and every run.

    Args:
        window: cells along each side of the grid.
        items: test items used at most.
        weights: of the runs, see `Run.load`.
    Raises:
        ConfigError: if the data are not of the plane, if runs are of different data, or if a model has no density that
            can be asked for without a condition.
    """
    dataset, named = _common_data(runs), labels(runs)
    rows = torch.arange(min(items, dataset.size("test")))
    x = dataset.take("test", rows).x
    grid = Window.around(x, window)
    truth = dataset.log_prob(x.double())
    entropy = ("data", "test items") if truth is None else ("data", f"entropy {_nats(-truth)} nats")
    density = None if truth is None else _on(grid, lambda x: dataset.log_prob(x.double()))
    found = [Panel("data", density, truth, entropy[1:])]
    for run, name in zip(runs, named, strict=True):
        log_prob = _log_prob(run, weights)
        log_p = _chunked(log_prob, x)
        lines = [f"NLL {_nats(-log_p)} nats"]
        if truth is not None:
            lines.append(f"excess {_nats(truth - log_p)}")
        found.append(Panel(name, _on(grid, log_prob), log_p, tuple(lines)))
    return Picture(tuple(found), grid, x)


def _common_data(runs: Sequence[Run]) -> Dataset:
    first = runs[0]
    for run in runs:
        shape = tuple(run.facts()["shape"])
        if shape != (2,):
            raise ConfigError(
                f"{run.path}: its items have shape {list(shape)}; densities are drawn of data of the plane, shape [2]."
            )
        if run.config.tree["data"] != first.config.tree["data"]:
            raise ConfigError(
                f"{run.path} was trained on other data than {first.path} ({_shown(run)} instead of {_shown(first)}); "
                "draw them apart."
            )
    return first.dataset()


def _shown(run: Run) -> str:
    data = dict(run.config.tree["data"])
    return ", ".join([str(data.pop("name")), *(f"{key}={value}" for key, value in data.items() if value is not None)])


def _log_prob(run: Run, weights: str | None) -> Callable[[Tensor], Tensor]:
    model = run.load(weights)
    if not isinstance(model, SupportsLogProb):
        raise ConfigError(f"{run.path}: a model '{model.registered_name}' has no log_prob, so no density to draw.")
    if getattr(model, "conditional", False):
        raise ConfigError(f"{run.path}: its density depends on a condition. Draw models with conditional=false.")
    return lambda x: model.log_prob(x.float())


@torch.no_grad()
def _chunked(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """[N] float64 nats."""
    return torch.cat([log_prob(part).double() for part in x.split(CHUNK)])


def _on(grid: Window, log_prob: Callable[[Tensor], Tensor]) -> np.ndarray:
    return _chunked(log_prob, grid.points()).exp().reshape(grid.n, grid.n).numpy()


def _nats(values: Tensor) -> str:
    """Mean and standard error, to the digit of the error."""
    mean, error = float(values.mean()), float(values.std()) / math.sqrt(len(values))
    if not math.isfinite(error):
        return f"{mean:.3f}"
    digits = 3 if error < 1e-6 else min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


@dataclass(frozen=True)
class Picture:
    """Panels, the first that of the data, on one window."""

    panels: tuple[Panel, ...]
    window: Window
    x: Tensor

    def draw(self, path: Path) -> Path:
        """Write it as .png, .pdf or .svg."""
        import matplotlib
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure

        count = len(self.panels)
        columns = min(count, max(4, math.ceil(math.sqrt(count))))
        rows, wide = -(-count // columns), 2.3
        height = wide + 0.17 * (1.3 + max(len(panel.caption) for panel in self.panels))
        with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "genmodels", "pdf.fonttype": 42}):
            figure = Figure(figsize=(wide * columns + 0.75, height * rows), layout="constrained")
            figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.02, hspace=0.02)
            shades = ScalarMappable(Normalize(0, self._top()), "magma")
            grid = figure.subplots(rows, columns, squeeze=False).ravel()
            for axes, panel in zip(grid, self.panels, strict=False):
                self._panel(axes, panel, shades)
            for axes in grid[count:]:
                axes.set_axis_off()
            bar = figure.colorbar(shades, ax=list(grid), shrink=0.6, aspect=25 * rows, pad=0.01, extend="max")
            bar.set_label("density", fontsize=8)
            bar.ax.tick_params(labelsize=7, width=0.5, length=2)
            bar.outline.set_linewidth(0.5)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200, bbox_inches="tight", pad_inches=0.05)  # the layout clips captions
        return path

    def _panel(self, axes: Any, panel: Panel, shades: Any) -> None:
        left, right, bottom, top = self.window.extent
        if panel.density is None:
            axes.scatter(*self.x.numpy().T, s=1, linewidths=0, color="#0072B2", alpha=0.4)
        else:
            axes.imshow(panel.density, origin="lower", extent=self.window.extent, cmap=shades.cmap, norm=shades.norm)
        axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(linewidth=0.5, color="#888888")
        name = panel.name if len(panel.name) <= 30 else "…" + panel.name[-29:]
        axes.annotate(name, (0.5, 0), (0, -4), "axes fraction", "offset points", ha="center", va="top", weight="bold")
        text = "\n".join(panel.caption)
        axes.set_xlabel(text, fontsize=8, labelpad=16, linespacing=1.3, color="#333333")

    def _top(self) -> float:
        """The density of the last colour, from that of the data if it is known, else from those of the runs."""
        known = self.panels[:1] if self.panels[0].log_p is not None else self.panels[1:]
        log_p = torch.cat([panel.log_p for panel in known])
        return HEADROOM * float(log_p.quantile(BRIGHTEST).exp())


@guarded
def main(argv: Sequence[str]) -> None:
    """Draw the densities of models of the plane beside that of the data, with their test NLL."""
    parser = argparse.ArgumentParser("evals.density", description=main.__doc__)
    parser.add_argument("runs", nargs="+", help="folders of runs on the same data")
    parser.add_argument(
        "--out", type=Path, default=Path("density.png"), help=".png, .pdf or .svg (default: %(default)s)"
    )
    parser.add_argument("--weights", help="model, best or ema-<value> (default: the first average)")
    parser.add_argument("--window", type=int, default=200, help="cells along each side (default: %(default)s)")
    parser.add_argument("--items", type=int, default=10_000, help="test items at most (default: %(default)s)")
    given = parser.parse_args(list(argv))
    if given.out.suffix not in (".png", ".pdf", ".svg"):
        raise ConfigError(f"--out: a .png, .pdf or .svg is written, found '{given.out}'.")
    if given.window < 2 or given.items < 2:
        raise ConfigError(f"--window and --items: at least 2 are needed, found {given.window} and {given.items}.")
    picture = panels([Run.open(path) for path in given.runs], given.window, given.items, given.weights)
    for panel in picture.panels:
        print(f"{panel.name}: {', '.join(panel.caption)}")
    print(picture.draw(given.out))


if __name__ == "__main__":
    sys.exit(main())
