"""`sample.py RUN --upsample`: fields drawn given their coarse fields, from files or from items of a split."""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import dotlist
from ..data.array_files import SUFFIXES, ArrayFile, find
from ..data.dataset import SPLITS, Dataset
from ..editing.pictures import Panel, scale_of, write_strip
from ..hashing import digest
from ..model import Model
from ..registry import ConfigError, member
from ..sampling import parse_seeds, write_arrays
from ..training import processes
from ..training.run import Run

SHOWN = 8  # fields in the picture


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sample.py` that upsample."""
    group = parser.add_argument_group(
        "upsampling",
        """Draws the details of coarse fields (models of wavelets). Coarse fields are those of
  a file, or of items of a split (test:5, test:0-7), which are coarsened first. What is
  drawn goes to the run's upsampled/ (or --out): an .npz, and a picture of coarse
  fields, draws and, of items, the items themselves.""",
    )
    group.add_argument("--upsample", metavar="FIELDS", help="an .npy or .npz file of fields [N, h, w], or test:0-7")
    group.add_argument(
        "--octaves",
        type=int,
        metavar="N",
        help="of items of a split: halvings of the grid that are undone (default: 1)",
    )


def asked(given: argparse.Namespace) -> bool:
    """Whether fields are to be upsampled.

    Raises:
        ConfigError: if something else is asked as well, or if an option of upsampling was given without it.
    """
    if given.upsample is None and given.octaves is not None:
        raise ConfigError("--octaves: is for --upsample. Say which fields, such as --upsample test:0-7.")
    others = (given.edit, given.invert, given.pipeline)
    if given.upsample is not None and any(other is not None for other in others):
        raise ConfigError("--upsample: is neither for editing nor for pipelines; choose one.")
    return given.upsample is not None


def upsample_run(given: argparse.Namespace, device: Any) -> None:
    """Draw details by a run's model and write them; the first of several processes does.

    Raises:
        ConfigError, ValueError: if the model does not upsample, or fields, seeds or options do not fit it.
    """
    if not processes.main():
        return
    run = Run.open(given.run)
    name = run.config.tree["model"]["name"]
    if not hasattr(member(Model, name, "model"), "upsample"):
        raise ConfigError(f"{run.path}: model '{name}' does not upsample. Take one of wavelets (cslc).")
    if given.condition is not None:
        raise ConfigError("--condition: is for samples; what is upsampled is given by its coarse fields alone.")
    overrides = dotlist(given.overrides)
    if set(overrides) - {"sample"}:
        raise ConfigError(f"only overrides of sample.* apply here, found {', '.join(given.overrides)}.")
    options = run.config.options("sample", overrides.get("sample"))
    model, dataset = run.load(given.weights, device), run.dataset()
    items = _items(given.upsample, dataset)
    if items is None:
        if given.octaves is not None:
            raise ConfigError("--octaves: fields of a file are upsampled from the grid that they have.")
        coarse = _read(given.upsample)
    else:
        coarse = model.coarsen(items.to(model.device), 1 if given.octaves is None else given.octaves).cpu()
    seeds = list(range(len(coarse))) if given.seeds is None else parse_seeds(given.seeds)
    if len(coarse) == 1 < len(seeds):
        coarse = coarse.expand(len(seeds), *coarse.shape[1:])
        items = None if items is None else items.expand(len(seeds), *items.shape[1:])
    if given.batch_size is not None:
        options["batch_size"] = given.batch_size
    began = time.monotonic()
    drawn = model.upsample(coarse, seeds=seeds, **options).cpu()
    seconds = time.monotonic() - began
    weights = run.weights_name(given.weights)
    notes = {"fields": given.upsample, "seeds": seeds, "weights": weights, "step": run.step_of(weights)}
    word = f"{Path(given.upsample.replace(':', '-')).stem}-from{coarse.shape[2]}x{coarse.shape[3]}"
    stem = given.out or run.folder("upsampled") / f"{word}-{weights}-seeds{digest(seeds)[:6]}"
    stem = stem.with_suffix("") if stem.suffix in (".png", ".npz") else stem
    stem.parent.mkdir(parents=True, exist_ok=True)
    picture = _picture(stem, coarse, drawn, items, dataset, seeds)
    print(f"{picture}  ({len(drawn)} fields in {seconds:.1f} s)")
    print(write_arrays(stem.with_name(stem.name + ".npz"), drawn, notes))


def _picture(
    stem: Path, coarse: Tensor, drawn: Tensor, items: Tensor | None, dataset: Dataset, seeds: list[int]
) -> Path:
    """Coarse field, draw and item beside each other, a row for each of the first few."""
    factor = drawn.shape[2] // coarse.shape[2]
    large = coarse[:SHOWN].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    panels = [Panel(f"given, {coarse.shape[2]}x{coarse.shape[3]}", large), Panel("drawn", drawn[:SHOWN])]
    if items is not None:
        panels.append(Panel("data", items[:SHOWN]))
    names = [f"seed {seed}" for seed in seeds[:SHOWN]]
    return write_strip(stem.with_name(stem.name + ".png"), panels, names, scale_of(dataset))


def _items(word: str, dataset: Dataset) -> Tensor | None:
    """The items that `split:5` or `split:0-7` names; None for other words."""
    split, colon, which = word.partition(":")
    if not colon or split not in SPLITS or Path(word).exists():
        return None
    rows, size = parse_seeds(which, f"--upsample {word}", "item"), dataset.size(split)
    if not size or max(rows) >= size:
        raise ConfigError(f"--upsample {word}: the split has {f'items 0 … {size - 1}' if size else 'no items'}.")
    return dataset.take(split, torch.tensor(rows)).x


def _read(word: str) -> Tensor:
    """[N, 1, h, w] coarse fields of a file."""
    path = find(word, "--upsample")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--upsample {word}: a file {', '.join(SUFFIXES)} is needed, or items such as test:0-7.")
    file = ArrayFile(path)
    name = next(iter(n for n in ("", "arr_0", "fields") if n in file.shapes), "fields")
    fields = torch.from_numpy(np.array(file.read(file.choose(name)), np.float32))
    fields = fields.unsqueeze(1) if fields.ndim == 3 else fields
    if fields.ndim != 4 or fields.shape[1] != 1 or not fields.isfinite().all():
        raise ConfigError(
            f"--upsample {word}: finite fields [N, h, w] or [N, 1, h, w] are needed, found {list(fields.shape)}"
            f"{'' if fields.isfinite().all() else ' with NaN or infinity'}."
        )
    return fields
