"""Protocols over the user's own files: each runs on small files in the real format, and hashes follow contents only.

The Inception network is replaced by a few means of pixels, and numbers of samples are lowered: both are no part of the
data side, which is looked at here.
"""

import math
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genmodels.config import overlay
from genmodels.data import uci
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import FOLDER, Protocol, tree_of
from genmodels.metrics.features import FeatureExtractor
from genmodels.metrics.metric import Metric
from genmodels.registry import names, register
from genmodels.rng import SeedNoise
from genmodels.types import Batch, Likelihood, Shape
from tests.data_files import (
    cifar_files,
    idx,
    imagenet_files,
    write_cifar_archive,
    write_imagenet,
    write_mnist,
    write_physionet,
    write_pictures,
    write_sounds,
    write_uci,
    write_uea,
)
from tests.evaluation_fakes import FakeRun, _Base

pytestmark = pytest.mark.filterwarnings("ignore::genmodels.data.uci.OtherRows")
OWN = sorted(path.stem for path in FOLDER.glob("*.yaml") if "???" in path.read_text())
IMAGES = [name for name in OWN if name.startswith(("cifar10", "image_folder", "imagenet32"))]
TABLES = [name for name in OWN if name in uci.TABLES]
SAMPLES = 60


class Uniform(_Base):
    """Levels that are all equally likely."""

    def __init__(self, shape: Shape, levels: int) -> None:
        super().__init__(shape)
        self.levels = levels

    def sample(self, seeds: Tensor, *, condition: Any = None) -> Tensor:
        return (self.levels * SeedNoise(seeds).uniform(*self.shape)).floor()

    def likelihood(self, x: Tensor, *, condition: Any = None, seeds: Any = None) -> Likelihood:
        assert x.min() >= 0 and x.max() <= self.levels - 1
        value = torch.full((len(x),), -math.prod(self.shape) * math.log(self.levels), dtype=torch.float64)
        return Likelihood(value, "pmf")

    def log_prob(self, x: Tensor, *, condition: Any = None, seeds: Any = None) -> Tensor:
        return self.likelihood(x).value


class Normal(_Base):
    """Standard normal numbers."""

    def sample(self, seeds: Tensor, *, condition: Any = None) -> Tensor:
        return SeedNoise(seeds).normal(*self.shape)

    def likelihood(self, x: Tensor, *, condition: Any = None, seeds: Any = None) -> Likelihood:
        value = -(x.double() ** 2 + math.log(2 * math.pi)).sum(1) / 2
        return Likelihood(value, "exact")

    def log_prob(self, x: Tensor, *, condition: Any = None, seeds: Any = None) -> Tensor:
        return self.likelihood(x).value


@pytest.fixture(autouse=True)
def means() -> Iterator[None]:
    from tests.unit.fakes import restored

    with restored():

        @register(FeatureExtractor, "means")
        class Means(FeatureExtractor):
            """The means of the two halves of every channel."""

            label = "means"
            identity = "means-v1"

            def __call__(self, x: Tensor) -> Tensor:
                return x.double().unflatten(2, (2, -1)).mean((3, 4)).flatten(1)

        yield


def small(name: str, **dataset: Any) -> dict[str, Any]:
    """What the file says, for few samples and without a network."""
    tree = tree_of(name)
    metrics = [m | ({"features": "means"} if "features" in m else {}) for m in tree["metrics"]]
    if name.startswith(("cifar10", "imagenet32")):
        dataset["checksum"] = "ignore"
    if name == "imagenet32_10k":
        dataset["val"] = 20  # of 100
    changed = {
        "metrics": [m for m in metrics if m["name"] in names(Metric)],
        "sample": {"num_items": SAMPLES},
        "dataset": dataset,
    }
    return overlay(tree, changed)


def files(name: str, folder: Path) -> Path:
    """Small files in the real format of a protocol's data: what a user would name as its path."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.startswith("cifar10"):
        return write_cifar_archive(folder / "cifar-10-python.tar.gz", cifar_files())
    if name.startswith("image_folder"):
        return write_pictures(folder / "pictures", 90, 66, 70)
    if name.startswith("imagenet32"):
        return write_imagenet(folder / "imagenet32")
    if name.startswith("mnist"):
        return write_mnist(folder / "mnist", (28, 28))
    if name.startswith("physionet"):
        return write_physionet(folder / "records")
    if name.startswith("character_trajectories"):
        return write_uea(folder / "archive", "CharacterTrajectories")
    if name in ("wav_folder", "speech"):
        return write_sounds(folder / "sounds", 6, 33_000, 22_050)
    return write_uci(folder / "data", name)


def protocol(name: str, path: Path, **places: str) -> Protocol:
    return Protocol(small(name), {"path": str(path), **places})


# ---- what the files say ----


@pytest.mark.parametrize("name", OWN)
def test_data_of_protocols_are_complete_and_not_augmented(name, tmp_path):
    tree = tree_of(name)
    assert tree["name"] == name and tree["description"] and "cost" not in [m["name"] for m in tree["metrics"]]
    found = protocol(name, files(name, tmp_path))
    node = found.tree["dataset"]
    predicted = found.dataset.target_shape is not None
    assert not node.get("flip") and predicted == (node.get("task", "generate") != "generate" or node["name"] == "uea")
    assert found.dataset.size("test") > 0
    if name.startswith("cifar10"):  # all training images are the reference, and none is held out
        assert [found.dataset.size(split) for split in ("train", "val", "test")] == [100, 0, 20]
    if name == "imagenet32":
        assert [found.dataset.size(split) for split in ("train", "val", "test")] == [100, 0, 10]


def test_the_fid_protocol_asks_for_what_papers_report():
    tree, cheap = tree_of("cifar10"), tree_of("cifar10_10k")
    assert tree["metrics"][0] == {"name": "frechet", "features": "inception"}
    assert tree["sample"]["num_items"] == 50_000 and tree["sample"]["blocks"] == 3
    assert tree["dataset"]["val"] == 0 and "num_items" not in tree["likelihood"]
    assert cheap["sample"]["num_items"] == 10_000 and cheap["dataset"] == tree["dataset"]
    large, cheap = tree_of("imagenet32"), tree_of("imagenet32_10k")
    assert large["metrics"][0] == tree["metrics"][0] and large["sample"] == tree["sample"]
    assert large["dataset"]["val"] == 0 and "num_items" not in large["likelihood"]
    # features of 1,281,167 images are asked for by the full protocol alone
    assert {m.get("reference") for m in cheap["metrics"][:-1]} == {"val"} and cheap["dataset"]["val"] == 50_000


# ---- from files to numbers ----


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_scored(name, tmp_path):
    found = protocol(name, files(name, tmp_path / "files"))
    data, size = found.dataset, {"image_folder_64": 64}.get(name, 32)
    assert data.shape == (3, size, size) and data.levels == (32 if name == "cifar10_5bit" else 256)
    result = evaluate(FakeRun(tmp_path / "run", Uniform(data.shape, data.levels)), found, device="cpu")
    values = {row["name"]: row["value"] for row in result["metrics"]}
    assert values["bits_per_dim"] == pytest.approx(math.log2(data.levels), abs=1e-12)
    assert result["not_applicable"] == {} and all(math.isfinite(value) for value in values.values())
    if name != "cifar10_5bit":
        frechet = next(row for row in result["metrics"] if row["name"].startswith("FD-means"))
        assert frechet["n"] == SAMPLES * found.sample.blocks and frechet["value"] > 0


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_scored_in_nats_of_the_published_rows(name, tmp_path):
    found = protocol(name, files(name, tmp_path / "files"))
    result = evaluate(FakeRun(tmp_path / "run", Normal(found.dataset.shape)), found, device="cpu")
    row = next(row for row in result["metrics"] if row["name"] == "nll")
    x = found.dataset.all("test").x.double()
    expected = (x.square() + math.log(2 * math.pi)).sum(1) / 2
    assert row["value"] == pytest.approx(expected.mean().item(), rel=1e-12) and row["n"] == len(x)
    assert row["unit"] == "nats" and found.dataset.shape == (uci.TABLES[name].dims,)


def test_images_in_black_and_white_are_scored_in_bits_and_nats(tmp_path):
    found = protocol("mnist_binary", files("mnist_binary", tmp_path / "files"))
    data = found.dataset
    assert data.shape == (1, 28, 28) and data.levels == 2 and data.size("test") == 20
    assert tree_of("mnist_binary")["likelihood"] == {
        "split": "test", "draws": 1000, "combine": "importance", "batch_size": 250
    }  # fmt: skip
    result = evaluate(FakeRun(tmp_path / "run", Uniform(data.shape, data.levels)), found, device="cpu")
    values = {row["name"]: (row["value"], row["unit"]) for row in result["metrics"]}
    assert values["bits_per_dim"] == (pytest.approx(1.0, abs=1e-12), "bits/dim")
    assert values["nll"] == (pytest.approx(784 * math.log(2), rel=1e-12), "nats")


def test_recordings_are_scored_by_the_likelihood_of_a_sample(tmp_path):
    found = protocol("wav_folder", files("wav_folder", tmp_path / "files"))
    data = found.dataset
    assert data.shape == (16_000,) and data.condition_shape == (80, 63) and data.size("test") == 2
    result = evaluate(FakeRun(tmp_path / "run", Normal(data.shape)), found, device="cpu")
    row = next(row for row in result["metrics"] if row["name"] == "nats_per_dim")
    x = data.take("test", torch.arange(2)).x.double()
    expected = (x.square() + math.log(2 * math.pi)).mean() / 2  # minus the log-likelihood per sample of papers
    assert row["value"] == pytest.approx(expected.item(), rel=1e-9) and row["unit"] == "nats/dim"
    assert result["not_applicable"] == {}


class Constant(_Base):
    """One answer to every question: the first class, or 0 with a standard deviation of 1."""

    def __init__(self, shape: Shape, target_shape: Shape) -> None:
        super().__init__(shape)
        self.target_shape = target_shape

    def predict(self, batch: Batch, *, seeds: Any = None) -> Tensor:
        if batch.target_times is None:
            return torch.eye(*self.target_shape)[:1].repeat(len(batch), 1)
        return torch.zeros(*batch.target.shape, 2)


PREDICTED = [name for name in OWN if name.startswith(("mnist_classify", "physionet", "character_trajectories"))]
SERIES = ("annulus", "lorenz", "oscillators", "spiral_ode", "spiral_series", "van_der_pol")
SERIES += tuple(path.stem for path in sorted(FOLDER.glob("digit_series*.yaml")))


def fewer(name: str) -> dict[str, Any]:
    """The protocol on 64 training items, where those are made."""
    tree = tree_of(name)
    made = {} if tree["dataset"]["name"] == "digit_series" else {"count": 64}
    return {**tree, "dataset": {**tree["dataset"], **made}}


@pytest.mark.parametrize("name", [*PREDICTED, *SERIES])
def test_predictions_are_scored_where_targets_count(name, tmp_path):
    own = name in PREDICTED
    found = protocol(name, files(name, tmp_path / "files")) if own else Protocol(fewer(name))
    data = found.dataset
    result = evaluate(FakeRun(tmp_path / "run", Constant(data.shape, data.target_shape)), found, device="cpu")
    values = {row["name"]: row["value"] for row in result["metrics"]}
    target, mask = data.all("test").target, data.all("test").target_mask
    assert result["not_applicable"] == {} and {m["name"] for m in found.tree["metrics"]} == set(values)
    if not target.is_floating_point():
        share, classes = (target == 0).double().mean().item(), data.target_shape[0]
        assert values["accuracy"] == pytest.approx(share, abs=1e-12)
        log_total = math.log(math.e + classes - 1)
        assert values["cross_entropy"] == pytest.approx(log_total - share, rel=1e-6)
    else:
        y = target[mask] if mask.ndim == 3 else target[mask].flatten()
        assert values["squared_error"] == pytest.approx(y.double().square().mean().item(), rel=1e-9)
        assert values["forecast_nll"] == pytest.approx((values["squared_error"] + math.log(2 * math.pi)) / 2, rel=1e-9)


# ---- one hash for one set of files ----


@pytest.mark.parametrize("name", OWN)
def test_two_users_with_the_same_files_have_one_hash(name, tmp_path):
    mine, yours = files(name, tmp_path / "mine"), files(name, tmp_path / "yours" / "deeper")
    first = protocol(name, mine)
    assert protocol(name, yours).hash == first.hash
    if yours.is_dir():
        assert protocol(name, yours.rename(yours.with_name("other"))).hash == first.hash
    if name.startswith(("image_folder", "imagenet32")):
        assert protocol(name, mine, cache=str(tmp_path / "cache")).hash == first.hash
    if name.startswith("cifar10"):
        with tarfile.open(yours) as archive:
            archive.extractall(yours.parent, filter="data")
        assert protocol(name, yours.parent / "cifar-10-batches-py").hash == first.hash


@pytest.mark.parametrize("name", OWN)
def test_other_contents_have_another_hash(name, tmp_path):
    path = files(name, tmp_path)
    first = protocol(name, path).hash
    if name.startswith("cifar10"):
        content = cifar_files()
        path = write_cifar_archive(path, content | {"data_batch_2": content["data_batch_1"]})
    elif name.startswith("imagenet32"):
        content = imagenet_files()
        path = write_imagenet(tmp_path / "other", content | {"val_data": content["train_data_batch_1"]})
    elif name.startswith("image_folder"):
        place = path / "class0"
        shutil.copy(place / "000.png", place / "002.png")
    elif name in ("wav_folder", "speech"):
        shutil.copy(path / "002.wav", path / "003.wav")
    elif name.startswith("physionet"):
        write_physionet(path, 61)
    elif name.startswith("character_trajectories"):
        write_uea(path, "CharacterTrajectories", train=39)
    elif name.startswith("mnist"):
        write_mnist(path, (28, 28), t10k_labels_idx1_ubyte=idx(np.arange(20) % 7))
    else:
        shutil.rmtree(path)
        write_uci(path.parent / "data", name, rows=500)
    assert protocol(name, path).hash != first


def test_protocols_have_hashes_of_their_own(tmp_path):
    path = files("cifar10", tmp_path)
    assert len({protocol(name, path).hash for name in OWN if name.startswith("cifar10")}) == 3


def test_reference_items_are_the_same_in_every_process(tmp_path):
    """What a distance refers to must not depend on chance, on the cache, or on how items are asked for."""
    path = files("image_folder_32", tmp_path)
    plain = protocol("image_folder_32", path).dataset
    cached = protocol("image_folder_32", path, cache=str(tmp_path / "cache")).dataset
    whole = torch.cat([batch.x for batch in plain.batches("train", 7)])
    assert torch.equal(torch.cat([batch.x for batch in cached.batches("train", 50)]), whole)
    assert np.unique(whole.numpy().reshape(len(whole), -1), axis=0).shape[0] == len(whole)  # none twice
