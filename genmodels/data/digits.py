"""Handwritten digits that come with scikit-learn: real scans, no download, seconds to train on."""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..registry import register
from ..rng import generator
from ..transforms import Transform
from ..types import Batch
from .dataset import SPLITS, Dataset, Split, centred, proposal
from .memory import InMemory

SPLIT_FILE = Path(__file__).with_name("digits_split.json")
SIZES = {"val": 100, "test": 500}  # the rest is "train"
LEVELS = 17
HALF = 8  # the middle of the levels: digits are binarised there


@functools.cache
def _load() -> tuple[Tensor, Tensor, str]:
    """x [1797, 1, 8, 8] float32 with the levels 0 … 16, labels [1797] int64, and the SHA-256 of both as bytes."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    digest = hashlib.sha256(x.astype("uint8").tobytes() + labels.astype("uint8").tobytes()).hexdigest()
    return torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels, dtype=torch.int64), digest


def _quotas(counts: Tensor, total: int) -> list[int]:
    """Whole numbers proportional to the counts that add up to `total`, by largest remainders."""
    exact = counts.double() * total / counts.sum()
    quotas = exact.floor().long()
    extra = (exact - quotas).argsort(descending=True, stable=True)[: total - int(quotas.sum())]
    quotas[extra] += 1
    return quotas.tolist()


def make_split(seed: int = 0) -> dict[str, str | list[int]]:
    """The class-stratified random split that `digits_split.json` holds, with the SHA-256 of the data it is for.

    The upstream order follows the writers, so that a split in that order would separate them. Every class gives "test"
    and "val" its share (largest remainders), drawn at random; inside a split the order is random, so that any first n
    items are a random subset. `SPLIT_FILE.write_text(json.dumps(make_split()))` wrote the file.
    """
    _, labels, digest = _load()
    g = generator("digits", seed)
    rows_of = [torch.where(labels == c)[0] for c in range(10)]
    by_class = [rows[torch.randperm(len(rows), generator=g)] for rows in rows_of]
    parts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    counts = labels.bincount(minlength=10)
    for rows, val, test in zip(by_class, _quotas(counts, SIZES["val"]), _quotas(counts, SIZES["test"]), strict=True):
        for name, part in zip(parts, rows.split([len(rows) - val - test, val, test]), strict=True):
            parts[name].append(part)
    rows = {name: torch.cat(part) for name, part in parts.items()}
    return {"sha256": digest} | {name: r[torch.randperm(len(r), generator=g)].tolist() for name, r in rows.items()}


@register(Dataset, "digits")
class Digits(InMemory):
    """1,797 handwritten digits, 8x8 pixels with the integer levels 0 … 16, in ten classes.

    Splits: train 1,197, val 100, test 500, stratified by class and fixed in a file (`make_split`). Three pixels are 0
    in every image. The proposed transform adds uniform dequantisation noise and maps [0, 17) to [-1, 1); for
    classification it maps [0, 16] to [-1, 1] without noise.

    Args:
        task: "generate" gives the labels as condition, "classify" as target.
        transform: instead of the proposed one.
    Raises:
        ValueError: if the installed scikit-learn ships other data than the split file was made for.
    Source: Alpaydin & Kaynak 1998 (Optical Recognition of Handwritten Digits, UCI repository), its test part.
    """

    shape = (1, 8, 8)
    bin_width = 1.0
    levels = LEVELS

    def __init__(
        self, task: Literal["generate", "classify"] = "generate", transform: Callable[..., Transform] | None = None
    ) -> None:
        x, labels, digest = _load()
        split = json.loads(SPLIT_FILE.read_text())
        if digest != split["sha256"]:
            raise ValueError(
                f"data 'digits': scikit-learn's digits have the SHA-256 {digest[:12]}…, the fixed split was made for "
                f"{split['sha256'][:12]}…. Install a scikit-learn version that ships the original file."
            )
        classify = task == "classify"
        self.num_classes = None if classify else 10
        self.target_shape = (10,) if classify else None
        self.transform = proposal(transform, centred(LEVELS, noise=not classify))
        for name in ("train", "val", "test"):
            rows = torch.tensor(split[name])
            self.hold(name, Batch(x[rows], **{"target" if classify else "condition": labels[rows]}))

    def labels(self, split: Split) -> Tensor:
        """[N] int64 classes of a split, whatever the task."""
        items = self.all(split)
        return items.condition if items.target is None else items.target

    def baselines(self) -> dict[str, float]:
        """Bits/dim on the test split of three exact probability mass functions, fitted to the training split.

        uniform: log2 levels. histograms: Π_i P_i(v_i), one histogram per pixel with 0.1 added to every count. class
        histograms: Σ_c P(c) Π_i P_i(v_i | c), such histograms within every class.
        """
        v, labels = self.all("train").x.flatten(1).long(), self.labels("train")
        one_hot = torch.nn.functional.one_hot(v, self.levels).double()
        test = torch.nn.functional.one_hot(self.all("test").x.flatten(1).long(), self.levels).double()

        def log_pmf(counts: Tensor, n: Tensor) -> Tensor:
            smooth = ((counts + 0.1) / (n + 0.1 * self.levels)).log()
            return torch.einsum("bil,il->b", test, smooth)

        def bits(log_p: Tensor) -> float:
            return float(-log_p.mean() / (v.shape[1] * math.log(2)))

        n = labels.bincount(minlength=10).double()
        by_class = [log_pmf(one_hot[labels == c].sum(0), n[c]) + (n[c] / n.sum()).log() for c in range(10)]
        return {
            "uniform": math.log2(self.levels),
            "histograms": bits(log_pmf(one_hot.sum(0), n.sum())),
            "class histograms": bits(torch.stack(by_class).logsumexp(0)),
        }


@register(Dataset, "binary_digits")
class BinaryDigits(Digits):
    """The handwritten digits in black and white: 1 where a pixel has at least level 8 of 16, 0 elsewhere.

    Items, labels and splits are those of `digits`; 18 of the 500 test images, which differ from every training image in
    grey, equal one in black and white. Models of two levels (`vae`, `nade`, `made`) take them as they are;
    for others the proposed transform adds uniform dequantisation noise and maps [0, 2) to [-1, 1).

    Args:
        transform: instead of the proposed one.
    Source: Alpaydin & Kaynak 1998 (Optical Recognition of Handwritten Digits, UCI repository), its test part.
    """

    levels = 2

    def __init__(self, transform: Callable[..., Transform] | None = None) -> None:
        super().__init__()
        self.transform = proposal(transform, centred(self.levels))
        for name in SPLITS:
            grey = self.all(name)
            self.hold(name, grey.replace(x=(grey.x >= HALF).to(grey.x)))
