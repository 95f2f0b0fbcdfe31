"""The metric 'frechet': its references, items, names, files of statistics, and what it refuses."""

import dataclasses

import pytest
import torch

from genmodels.metrics import frechet
from genmodels.metrics.bures import bias_constant, extrapolated_distance, frechet_distance
from genmodels.metrics.features import Pixels
from genmodels.metrics.frechet import Frechet
from genmodels.metrics.metric import Subject
from genmodels.metrics.reference import write_statistics
from genmodels.metrics.statistics import Gaussian, gaussian
from genmodels.registry import ConfigError
from genmodels.types import Samples
from tests.evaluation_fakes import Levels, Points, UniformLevels


class NoData:
    """A data set whose items may not be read."""

    levels, bin_width = 5, 1.0

    def take(self, *_):
        raise AssertionError("a split was read")

    size = batches = take


def started(dataset, features=None, **arguments):
    metric = Frechet(features or Pixels(), **arguments)
    metric.start(Subject(UniformLevels(), dataset, torch.device("cpu"), 50))
    return metric


def feed(metric, x):
    features = {metric.features.identity: metric.features(x)}
    metric.update(Samples(torch.arange(len(x)), x=x, features=features), None)


def levels(n, seed=0):
    return torch.randint(0, 5, (n, 3), generator=torch.Generator().manual_seed(seed)).float()


def test_references_say_what_to_expect():
    data = Levels(sizes=(2000, 20, 2000))
    metric = started(data)
    feed(metric, Levels(sizes=(10, 10, 1500)).all("test").x)
    e = metric.compute()["FD-pixels"]
    assert e.n == 1500 and e.better == "lower" and e.kind == "plug-in"
    constant = bias_constant(gaussian(data.all("train").x.flatten(1)).covariance)
    assert e.references["floor"] == pytest.approx(constant * (1 / 1500 + 1 / 2000), rel=1e-12)
    train, test = (gaussian(data.all(split).x.flatten(1)) for split in ("train", "test"))
    assert e.references["test set"] == pytest.approx(frechet_distance(train, test), rel=1e-9, abs=1e-12)
    assert e.value < 5 * e.references["floor"] < e.references["uniform noise"]
    assert e.stderr > 0


def test_items_are_the_value_with_their_spread():
    metric = started(Levels())
    feed(metric, levels(500))
    e = metric.compute()["FD-pixels"]
    assert e.items.mean().item() == pytest.approx(e.value, rel=1e-12)
    assert e.items.std().item() / 500**0.5 == pytest.approx(e.stderr, rel=1e-12)


def test_split_and_other_reference_are_named():
    metric = started(Points(), reference="test")
    feed(metric, torch.randn(100, 2, generator=torch.Generator().manual_seed(0)))
    (label, e) = next(iter(metric.compute().items()))
    assert label == "FD-pixels-test" and set(e.references) == {"floor", "train set"}
    assert set(metric.splits) == {"train", "test"}


def test_the_well_known_name_is_for_whom_it_belongs_to():
    class Official(Pixels):
        frechet_name = "FID"

    assert Frechet(Official()).label == "FID" and Frechet(Official(), reference="val").label == "FID-val"
    assert Frechet(Pixels()).label == "FD-pixels"


def test_too_few_samples_are_refused_unless_asked_for():
    data = Levels()
    metric = started(data)
    feed(metric, data.all("test").x[:5])
    with pytest.raises(ValueError, match="allow_few"):
        metric.compute()
    few = started(data, allow_few=True)
    feed(few, data.all("test").x[:5])
    assert few.compute()["FD-pixels"].value > 0
    with pytest.raises(ValueError, match="split 'train' has 5 items"):
        started(Levels(sizes=(5, 5, 5)))


def test_the_reference_noise_is_always_the_same():
    data = Levels()
    assert torch.equal(frechet.uniform_noise(data, 9), frechet.uniform_noise(data, 9))
    assert set(frechet.uniform_noise(data, 200).unique().tolist()) == {0, 1, 2, 3, 4}


def test_costly_extractors_read_no_noise():
    class Costly(Pixels):
        costly = True

    assert "uniform noise" not in started(Levels(), Costly()).known


def test_a_gaussian_fitted_to_the_training_set_beats_the_floor_without_a_copy():
    """Why a value below the floor is not flagged."""
    data = Points(sizes=(300, 20, 200))
    train = gaussian(data.all("train").x.double())
    root = torch.linalg.cholesky(train.covariance)
    g = torch.Generator().manual_seed(0)
    fitted = torch.randn(3000, 2, dtype=torch.float64, generator=g) @ root.T + train.mean
    metric = started(data)
    feed(metric, fitted)
    e = metric.compute()["FD-pixels"]
    assert e.value < 0.5 * e.references["floor"] and not e.flags


# ---- extrapolation -----------------------------------------------------------------------------------------------


def test_extrapolation_adds_an_estimate():
    metric = started(Levels(), extrapolate=True)
    x = levels(1000)
    feed(metric, x)
    found = metric.compute()
    assert list(found) == ["FD-pixels", "FD-pixels-infinity"]
    plain, limit = found.values()
    assert limit.value == extrapolated_distance(x.double(), metric.target) < plain.value
    assert limit.stderr == plain.stderr and limit.kind == "extrapolated"
    assert limit.items.mean().item() == pytest.approx(limit.value, rel=1e-12)
    assert limit.references["floor"] == pytest.approx(metric.constant / 300, rel=1e-12)  # the share of the reference


def test_extrapolation_needs_eight_usable_subsets():
    metric = started(Levels(), extrapolate=True)
    feed(metric, levels(47))  # 47 // 8 = 5 < 2·3
    with pytest.raises(ValueError, match=r"smallest of 8 sizes.* has 5 items.*at least 6"):
        metric.compute()


# ---- files of statistics -----------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "statistics.npz"
    write_statistics(path, gaussian(levels(400)), {"extractor_id": Pixels().identity, "split": "train"})
    return path


def test_a_file_stands_for_the_split_it_was_made_from(file):
    data = Levels()
    write_statistics(file, gaussian(data.all("train").x), {"split": "train"})
    read, given = started(data), started(NoData(), statistics=str(file))
    for metric in (read, given):
        feed(metric, levels(300, seed=1))
    ours, theirs = (metric.compute()["FD-pixels"] for metric in (read, given))
    assert theirs.value == pytest.approx(ours.value, rel=1e-12) and theirs.stderr == pytest.approx(ours.stderr)
    assert theirs.references == {"floor": ours.references["floor"]}
    assert given.splits == () and given.fingerprint != read.fingerprint
    assert theirs.detail.split()[1] in given.fingerprint


def test_a_file_without_a_count_has_no_floor(file):
    write_statistics(file, gaussian(levels(400))._replace(n=None), {})
    metric = started(NoData(), statistics=str(file), extrapolate=True)
    feed(metric, levels(300, seed=1))
    assert all(e.references == {} for e in metric.compute().values())


def test_the_hash_follows_the_contents_and_not_the_place(file, tmp_path):
    metric = Frechet(statistics=str(file))
    moved = tmp_path / "elsewhere.npz"
    moved.write_bytes(file.read_bytes())
    assert Frechet.local == ("statistics",)
    assert Frechet(statistics=str(moved)).fingerprint == metric.fingerprint
    before = metric.fingerprint
    write_statistics(file, gaussian(levels(401)), {})
    assert metric.fingerprint != before
    with pytest.raises(ConfigError, match=r"no file .*nothing\.npz.*evals\.reference"):
        Frechet(statistics=str(tmp_path / "nothing.npz")).fingerprint  # noqa: B018


def test_a_file_of_something_else_is_refused(file):
    with pytest.raises(ValueError, match=r"statistics\.npz.*extractor_id 'pixels-v1:1'.*'pixels-v1:16'"):
        started(NoData(), Pixels(16.0), statistics=str(file))
    with pytest.raises(ValueError, match=r"split 'train'.*'test'"):
        started(NoData(), statistics=str(file), reference="test")
    write_statistics(file, gaussian(levels(5)), {})
    with pytest.raises(ValueError, match=r"statistics\.npz has 5 items for 3 features"):
        started(NoData(), statistics=str(file))
    wide = Gaussian(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), None)
    write_statistics(file, wide, {})
    with pytest.raises(ValueError, match=r"statistics\.npz holds the statistics of 4 features.*gives 3"):
        feed(started(NoData(), statistics=str(file)), levels(10))


def test_blocks_of_seeds_share_the_reference(file):
    metric = started(NoData(), statistics=str(file))
    found = []
    for seed in (1, 2, 1):
        metric.restart()
        feed(metric, levels(300, seed))
        found.append(dataclasses.replace(metric.compute()["FD-pixels"], items=None))
    assert found[0] == found[2] != found[1]


def test_the_value_of_an_item_tells_what_the_distance_would_be_without_it():
    """FD without item i is about FD - (value of i - FD)/(n - 1): the sign of the influence, and its size to 1/n."""
    data = Points((300, 20, 200))
    x = 1.5 * data.all("train").x[:120] + 0.7

    def found(part):
        metric = started(data)
        feed(metric, part)
        return metric.compute()["FD-pixels"]

    whole = found(x)
    without = torch.tensor([found(torch.cat([x[:i], x[i + 1 :]])).value for i in range(40)], dtype=torch.float64)
    told = whole.value - (whole.items[:40] - whole.value) / (len(x) - 1)
    assert (without - told).abs().max() < 0.1 * (without - whole.value).abs().max()
