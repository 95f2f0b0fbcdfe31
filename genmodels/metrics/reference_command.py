"""Write the statistics of reference data: `python -m evals.reference digits --features digits --out digits.npz`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..commands import guarded
from ..data.dataset import SPLITS, Dataset, Split
from ..registry import ConfigError, build, names, resolve
from ..training import processes
from .features import FeatureExtractor
from .reference import write_statistics
from .statistics import Gaussian, Moments

EXAMPLES = """examples:
  python -m evals.reference digits --features digits --out digits-train.npz
  python -m evals.reference "{name: cifar10, path: data/cifar10}" --features "{name: inception, weights: w.pth}" \\
      --split train --out cifar10-train.npz
  python -m evals.reference pictures/ --features pixels --out pictures.npz      (every image of a folder)
"""


@guarded
def main(argv: Sequence[str]) -> None:
    """Write mean and covariance of the features of a split to a .npz file that `frechet` and other tools read."""
    parser = argparse.ArgumentParser(
        "evals.reference",
        description=main.__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", help="a data set as in a protocol, or a folder of images, which is taken whole")
    parser.add_argument("--features", required=True, help="an extractor as in a protocol")
    parser.add_argument("--split", choices=SPLITS, default="train", help="(default: train)")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--batch-size", type=int, default=64, help="items at a time (default: 64)")
    given = parser.parse_args(list(argv))
    _check_output(given.out, given.force)
    if given.batch_size < 1:
        raise ConfigError(f"--batch-size: must be at least 1, found {given.batch_size}.")
    device = processes.place(given.device)
    extractor = build(FeatureExtractor, resolve(FeatureExtractor, _node(given.features), "--features"))
    dataset = build(Dataset, resolve(Dataset, _data(given.dataset, given.split), "dataset"))
    found = statistics_of(extractor, dataset, given.split, device, given.batch_size)
    facts = {
        "dataset": dataset.registered_name,
        "fingerprint": dataset.fingerprint(),
        "split": given.split,
        "extractor_id": extractor.identity,
    }
    write_statistics(given.out, found, facts)
    print(f"{given.out}  ({found.n:,} items of the split '{given.split}', {len(found.mean)} features)")


def _check_output(path: Path, force: bool) -> None:
    if path.suffix != ".npz":
        raise ConfigError(f"--out: a file name that ends in .npz is needed, found {path}.")
    if path.exists() and not force:
        raise ConfigError(f"--out: {path} exists already; add --force to replace it, or choose another name.")
    if not path.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {path.parent}; make it first.")


def _data(text: str, split: str) -> Any:
    """The node of a data set; of a folder of images, all of them are the split 'train'."""
    if text in names(Dataset) or not Path(text).expanduser().is_dir():
        return _node(text)
    if split != "train":
        raise ConfigError(f"--split: a folder is taken whole, as the split 'train'; found '{split}'.")
    return {"name": "image_folder", "path": text, "val": 0, "test": 0}


def _node(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is no name and no YAML of the form {{name: …}}: {error}.") from error


def statistics_of(
    extractor: FeatureExtractor, dataset: Dataset, split: Split, device: torch.device, batch_size: int
) -> Gaussian:
    """Mean and covariance of the features of a split, batch by batch.

    Raises:
        ConfigError: if the split holds fewer than two items.
    """
    size = dataset.size(split)
    if size < 2:
        raise ConfigError(f"--split: '{split}' has {size} items; a covariance needs at least 2.")
    extractor.start(dataset, device)
    moments = Moments()
    for batch in dataset.batches(split, batch_size):
        moments.update(extractor(batch.x).to(device))
        if sys.stderr.isatty():
            end = "\n" if moments.n >= size else ""
            print(f"\rfeatures {moments.n:,}/{size:,}", end=end, file=sys.stderr, flush=True)
    return moments.gaussian()
