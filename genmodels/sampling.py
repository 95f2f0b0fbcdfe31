"""Samples as files: a PNG that a person can read, GIF and WAV files to play, an .npz that a program can read.

Seeds are cut into batches whose size depends on their number alone, and batches are shared by processes: what is drawn
has the same bits however many there are.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .data.dataset import SPLITS, Dataset
from .data.external import External
from .model import Model
from .pictures import enlarged, tiled, to_bytes
from .registry import ConfigError
from .rng import as_seeds
from .series import draw_forecasts, draw_series
from .sounds import SHOWN, draw_sounds, write_sounds
from .training import processes
from .types import Condition, SupportsSample
from .videos import write_gif

Chosen = int | str | None  # a class; a split, `split:item`, or a file; None for what suits the data
COLUMNS = 8
PREDICTED = 8  # items in a picture of predictions
MOST_SEEDS = 1_000_000  # of one request; they are held in memory


def parse_seeds(text: str, where: str = "--seeds", what: str = "seed") -> list[int]:
    """`0-63`, `7`, `0-9,20,30-31` as a list.

    Args:
        where, what: whom an error speaks of, and what the numbers are.
    Raises:
        ConfigError: if the text is malformed, saying which part.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (_is_number(first) and _is_number(last)) or int(last) < int(first):
            raise ConfigError(f"{where}: '{part.strip()}' is no {what} and no range like 0-63 (in '{text}').")
        if int(last) >= 2**63 or len(seeds) + int(last) - int(first) >= MOST_SEEDS:
            raise ConfigError(f"{where}: '{part.strip()}' is out of range: at most {MOST_SEEDS:,} {what}s below 2^63.")
        seeds += range(int(first), int(last) + 1)
    return seeds


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def default_seeds(model: Model, dataset: Dataset) -> list[int]:
    """One row of 8 for each class, 8 sounds, a video of each class (or 8), or 64 of anything else."""
    if dataset.frame_rate is not None and model.conditional and dataset.num_classes:
        return list(range(0, COLUMNS * dataset.num_classes, COLUMNS))
    if dataset.sample_rate is not None or dataset.frame_rate is not None:
        return list(range(8))
    return list(range(COLUMNS * dataset.num_classes if model.conditional and dataset.num_classes else 64))


def conditions(model: Model, dataset: Dataset, seeds: list[int], chosen: Chosen = None) -> Condition | None:
    """What each seed's sample is drawn given; None for a model that takes no condition.

    Without a choice: class (seed // 8) mod classes, so that a grid has a class in each row; of data without classes the
    condition of validation item (seed mod items), or of a training item without those.

    Args:
        chosen: a class (a number, also as text); "test" for the condition of test item (seed mod items), likewise of
            another split; "test:5" for that of item 5, whatever the seed; or a file from which the data set makes
            conditions: the seed takes number (seed mod conditions).
    Raises:
        ConfigError: if the model takes no condition, or the choice does not fit the data.
    """
    if isinstance(chosen, str) and chosen.removeprefix("-").isdecimal():
        chosen = int(chosen)
    if isinstance(chosen, int) and not (model.conditional and dataset.num_classes):
        raise ConfigError("--condition: this model takes no class label.")
    if not model.conditional:
        if chosen is not None:
            raise ConfigError(f"--condition {chosen}: this model takes no condition.")
        return None
    index = as_seeds(seeds)
    if isinstance(chosen, str):
        return _taken(dataset, index, chosen)
    if dataset.num_classes is None:
        return _taken(dataset, index, "val" if dataset.size("val") else "train")
    if chosen is not None and not 0 <= chosen < dataset.num_classes:
        raise ConfigError(f"--condition: class {chosen} is out of range; there are 0 … {dataset.num_classes - 1}.")
    return index // COLUMNS % dataset.num_classes if chosen is None else torch.full_like(index, chosen)


def _taken(dataset: Dataset, index: Tensor, chosen: str) -> Condition:
    """The conditions of items of a split, or those that are made from a file."""
    split, colon, item = chosen.partition(":")
    if split not in SPLITS:
        path = Path(chosen).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"--condition: there is no file '{chosen}', and it is neither a class nor one of {', '.join(SPLITS)} "
                "(or such with an item: test:5)."
            )
        found = dataset.conditions_of(path)
        return found[index % len(found)]
    size = dataset.size(split)
    if not size or (colon and not (_is_number(item) and int(item) < size)):
        raise ConfigError(
            f"--condition {chosen}: the split '{split}' has {f'items 0 … {size - 1}' if size else 'none'}."
        )
    condition = dataset.take(split, torch.full_like(index, int(item)) if colon else index % size).condition
    if condition is None:
        raise ConfigError(f"--condition {chosen}: the model needs a condition, and the items of its data have none.")
    return condition


def draw(
    model: Model, dataset: Dataset, seeds: list[int], options: Mapping[str, Any], chosen: Chosen = None
) -> tuple[Tensor, Condition | None]:
    """Samples of the seeds in one batch, [n, *shape] in data units on the CPU, and what they were drawn given.

    Raises:
        ConfigError: if the model cannot sample, and what `conditions` raises.
    """
    if not isinstance(model, SupportsSample):
        raise ConfigError(f"{type(model).__name__} does not draw samples (it has no method `sample`).")
    condition = conditions(model, dataset, seeds, chosen)
    x = model.sample(seeds, condition=to_device(condition, model.device), **options)
    return x.detach().cpu(), condition


def default_batch_size(n: int) -> int:
    """A quarter of n seeds, so that four processes have work; at least 8 for speed, at most 256 for memory."""
    return min(256, max(8, math.ceil(n / 4)))


def draw_in_batches(
    model: Model,
    dataset: Dataset,
    seeds: list[int],
    options: Mapping[str, Any],
    chosen: Chosen = None,
    batch_size: int | None = None,
) -> Tensor | None:
    """Samples of the seeds, [n, *shape] in data units on the CPU, on process 0; None on those that only help.

    Args:
        batch_size: seeds per call of the model, None for `default_batch_size`; it decides the last bits of a sample.
    Raises:
        ConfigError: if a batch is empty, and what `draw` raises.
    """
    size = default_batch_size(len(seeds)) if batch_size is None else batch_size
    if size < 1:
        raise ConfigError(f"--batch-size: at least 1 is needed, found {size}.")
    batches = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    drawn = list(processes.in_order(batches, lambda part: draw(model, dataset, part, options, chosen)[0]))
    return torch.cat(drawn) if processes.main() else None


def request(
    seeds: list[int], condition: Condition | None, answer: dict[str, Any], weights: str, step: int
) -> dict[str, Any]:
    """What a file of samples says of itself."""
    labels = condition.tolist() if isinstance(condition, Tensor) and condition.ndim == 1 else None
    return {"seeds": seeds, "condition": labels, "sample": answer, "weights": weights, "step": step}


class Written(NamedTuple):
    """What was written, and what is to be said of it (nothing, mostly)."""

    path: Path
    remark: str


def write_samples(stem: Path, x: Tensor, dataset: Dataset, notes: dict[str, Any]) -> Written:
    """What `write_picture` writes; of sound also the WAV files `<stem>/<seed>.wav`.

    Args:
        notes: from `request`.
    """
    remark = "" if dataset.sample_rate is None else write_sounds(stem, x, dataset.sample_rate, notes["seeds"])
    return Written(write_picture(stem, x, dataset, notes | ({"clipped": remark} if remark else {})), remark)


def write_picture(stem: Path, x: Tensor, dataset: Dataset, notes: dict[str, Any]) -> Path:
    """Images as a grid, points of the plane as a scatter plot, sounds as waveforms and spectrograms, series as curves,
    videos as a sheet with a row of frames for each and a GIF beside it; anything else as .npz. Notes go into the
    metadata.

    Data whose items are not at hand to compare with give .npz as well, except sound.

    Args:
        stem: path without its suffix; its folder must exist.
    """
    if dataset.sample_rate is not None:
        return _sheet(stem.with_name(stem.name + ".png"), x, dataset.sample_rate, notes)
    if isinstance(dataset, External):
        return write_arrays(stem.with_name(stem.name + ".npz"), x, notes)
    if dataset.frame_rate is not None and dataset.shape[0] in (1, 3):
        write_gif(stem.with_name(stem.name + ".gif"), x, dataset)
        frames = rearrange(x, "n c t h w -> (n t) c h w")
        return _grid(stem.with_name(stem.name + ".png"), frames, dataset, notes, x.shape[2])
    if len(dataset.shape) == 3 and dataset.shape[0] in (1, 3):
        return _grid(stem.with_name(stem.name + ".png"), x, dataset, notes, min(COLUMNS, len(x)))
    if dataset.shape == (2,):
        return _scatter(stem.with_name(stem.name + ".png"), x, dataset, notes)
    if dataset.unit_of_time is not None and x.ndim == 3:
        return draw_series(stem.with_name(stem.name + ".png"), x, dataset, _texts(notes))
    return write_arrays(stem.with_name(stem.name + ".npz"), x, notes)


def write_forecasts(
    stem: Path, model: Model, dataset: Dataset, options: Mapping[str, Any], notes: dict[str, Any]
) -> Written:
    """A picture of predictions for the first items of "val", or of "train" without those; item i has the seed i."""
    split = "val" if dataset.size("val") else "train"
    seeds = torch.arange(min(PREDICTED, dataset.size(split)))
    batch = dataset.take(split, seeds)
    prediction = model.predict(batch.to(model.device), seeds=seeds, **options).detach()
    path = stem.with_name(stem.name + ".png")
    return Written(draw_forecasts(path, prediction, batch, dataset, _texts(notes | {"seeds": seeds.tolist()})), "")


def write_arrays(path: Path, x: Tensor, notes: dict[str, Any]) -> Path:
    """`arr_0` = samples [n, *shape] in data units, `notes` = JSON text."""
    np.savez_compressed(path, arr_0=x.numpy(), notes=np.array(json.dumps(notes)))
    return path


def _grid(path: Path, x: Tensor, dataset: Dataset, notes: dict[str, Any], columns: int) -> Path:
    """Nearest-neighbour enlarged images [n, C, H, W] with a margin of one pixel; row by row in the order of the seeds.

    Levels 0 … top become black … white; continuous data are scaled by the range of the training items.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    sheet = enlarged(tiled(to_bytes(x, dataset), columns), max(x.shape[2:]))
    info = PngInfo()
    for key, value in _texts(notes).items():
        info.add_text(key, value)
    Image.fromarray(sheet.squeeze(-1).numpy()).save(path, pnginfo=info)
    return path


def _scatter(path: Path, x: Tensor, dataset: Dataset, notes: dict[str, Any]) -> Path:
    """Samples beside data on the data's axes; the title counts samples that fall outside."""
    from matplotlib.figure import Figure

    data = dataset.take("train", torch.arange(min(len(x), dataset.size("train")))).x
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    low, high = data.amin(0), data.amax(0)
    low, high = low - 0.1 * (high - low), high + 0.1 * (high - low)
    outside = int((~((x >= low) & (x <= high)).all(1)).sum())  # NaN counts as outside
    title = f"samples ({outside} of {len(x)} outside)" if outside else "samples"
    (left, bottom), (right, top) = low.tolist(), high.tolist()
    for axes, points, heading in zip(panels, (data, x), ("data", title), strict=True):
        axes.scatter(*points.numpy().T, s=4, linewidths=0)
        axes.set(title=heading, aspect="equal", xlim=(left, right), ylim=(bottom, top))
    figure.savefig(path, dpi=120, metadata=_texts(notes))
    return path


def _sheet(path: Path, x: Tensor, rate: int, notes: dict[str, Any]) -> Path:
    """Sounds with their seeds, and how much of each a WAV file cannot hold."""
    names = [f"seed {seed}" for seed in notes.get("seeds", range(len(x)))[:SHOWN]]
    beyond = (~(x[:SHOWN].abs() <= 1)).double().mean(1).tolist()
    titles = [f"{name}, {100 * b:.2g} % beyond ±1" if b else name for name, b in zip(names, beyond, strict=True)]
    return draw_sounds(path, x, rate, titles, _texts(notes))


def _texts(notes: dict[str, Any]) -> dict[str, str]:
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in notes.items()}


def to_device(condition: Condition | None, device: torch.device) -> Condition | None:
    """A condition on a device."""
    if isinstance(condition, Mapping):
        return {key: value.to(device) for key, value in condition.items()}
    return None if condition is None else condition.to(device)
