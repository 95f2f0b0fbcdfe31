"""The contract of every registered Dataset, the facts of the shipped ones, and errors that name what is wrong."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from genmodels.data import digits
from genmodels.data.dataset import Dataset, context
from genmodels.data.digits import Digits
from genmodels.data.memory import InMemory
from genmodels.data.toy import Checkerboard, EightGaussians, Moons, Rings, SmoothToy, Spirals, Toy
from genmodels.registry import arguments, build, member, names, resolve
from genmodels.rng import BatchNoise, generator
from genmodels.types import Batch
from tests import data_files
from tests.oracles import grid

pytestmark = pytest.mark.filterwarnings("ignore::genmodels.data.uci.OtherRows")  # of files made small
SPLITS = ("train", "val", "test")
# other tests register fakes of their own; `external` stands for items that only Python has
NAMES = [name for name in names(Dataset) if member(Dataset, name, "data").__module__.startswith("genmodels.")]
NAMES.remove("external")
TOYS = [name for name in NAMES if issubclass(member(Dataset, name, "data"), Toy)]
# arguments under which a data set can be built from nothing but the package
EXAMPLES: dict[str, dict] = data_files.examples()


@functools.cache
def _build(name: str, arguments: str) -> Dataset:
    return build(Dataset, resolve(Dataset, {"name": name, **json.loads(arguments)}, "data"))


def make(name: str, **arguments) -> Dataset:
    try:
        return _build(name, json.dumps({**EXAMPLES.get(name, {}), **arguments}))
    except FileNotFoundError as error:
        pytest.skip(f"needs files of the user's: {error}")


def some(dataset: Dataset, split: str, n: int = 2000) -> Batch:
    return dataset.take(split, torch.arange(min(n, dataset.size(split))))


@pytest.mark.parametrize("name", NAMES)
def test_items_are_finite_and_have_the_stated_shape(name):
    dataset = make(name)
    for split in SPLITS:
        x = some(dataset, split).x
        assert x.shape[1:] == dataset.shape and x.dtype == torch.float32 and len(x) > 0 and x.isfinite().all()
        if dataset.levels is not None:  # discrete data lie on their stated levels, and use them
            level = x.double() / dataset.bin_width
            assert torch.equal(level, level.round()) and level.min() == 0 and level.max() == dataset.levels - 1


@pytest.mark.parametrize("name", NAMES)
def test_take_keeps_order_and_repeats(name):
    dataset = make(name)
    for split in SPLITS:
        rows = torch.tensor([2, 0, 2, 1])
        together = dataset.take(split, rows)
        assert len(together) == 4
        for row, item in zip(rows, together.x, strict=True):
            assert torch.equal(dataset.take(split, row[None]).x[0], item)
        first = next(dataset.batches(split, 3))
        assert torch.equal(first.x[rows], together.x)
        assert sum(len(b) for b in dataset.batches(split, 1000)) == dataset.size(split)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_items(name):
    first = make(name)
    again = build(Dataset, resolve(Dataset, {"name": name, **EXAMPLES.get(name, {})}, "data"))
    for split in SPLITS:
        a, b = some(first, split), some(again, split)
        assert torch.equal(a.x, b.x)
        for field in ("condition", "target", "times", "mask", "target_times", "target_mask"):
            if isinstance(getattr(a, field), torch.Tensor):
                assert torch.equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("name", NAMES)
def test_every_path_is_named_as_local(name):
    """Arguments whose values are paths, and no others; a default that says "nowhere" counts as well."""
    cls = member(Dataset, name, "data")
    given = {key for key, value in EXAMPLES.get(name, {}).items() if isinstance(value, str) and Path(value).exists()}
    assert given <= set(cls.local) <= {a.name for a in arguments(cls)}
    text = {a.name for a in arguments(cls) if a.hint in (str, str | None)}
    assert text - set(cls.local) <= {"array", "delimiter", "pattern", "problem"}, (
        "a text that is no path decides what is read"
    )


@pytest.mark.parametrize("name", [name for name in NAMES if member(Dataset, name, "data").local])
def test_the_fingerprint_does_not_depend_on_where_files_lie(name, tmp_path):
    moved = {}
    for key in set(EXAMPLES[name]) & set(member(Dataset, name, "data").local):
        path, target = Path(EXAMPLES[name][key]), tmp_path / key / "elsewhere"
        target.parent.mkdir()
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        moved[key] = str(copy(path, target.with_suffix("" if path.is_dir() else path.suffix)))
    other = make(name, **moved)
    assert moved and other.fingerprint() == make(name).fingerprint()
    assert all(other.size(split) == make(name).size(split) for split in SPLITS)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if "flip" in {a.name for a in arguments(member(Dataset, n, "data"))}]
)
def test_mirror_images_are_more_training_items_and_nothing_else(name):
    """Without flip the training split is the data themselves: what a distance to them refers to."""
    form = {"form": "image"} if name == "natural_patches" else {}
    plain, flipped = make(name, flip=False, **form), make(name, flip=True, **form)
    n = plain.size("train")
    assert [flipped.size(split) for split in SPLITS] == [2 * n, plain.size("val"), plain.size("test")]
    for split in SPLITS:
        rows = torch.arange(min(50, plain.size(split)))
        assert torch.equal(plain.take(split, rows).x, flipped.take(split, rows).x)
    mirrored = flipped.take("train", torch.arange(n, n + 5)).x
    assert torch.equal(mirrored, some(plain, "train", 5).x.flip(-1))
    assert flipped.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "binary_digits"])  # few pixels: some are equal
def test_splits_share_no_item(name):
    dataset, found = make(name), []
    for split in SPLITS:
        items = some(dataset, split)
        asked = items.x if dataset.target_shape is None or not items.target.is_floating_point() else items.target
        rows = zip(items.x, asked, strict=True)  # of one start there are many paths
        found.append({x.numpy().tobytes() + y.numpy().tobytes() for x, y in rows})
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])


@pytest.mark.parametrize("name", NAMES)
def test_conditions_and_targets_are_as_stated(name):
    dataset = make(name)
    for split in SPLITS:
        items = some(dataset, split)
        if dataset.num_classes is not None:
            assert items.condition.dtype == torch.int64 and items.condition.shape == (len(items),)
            assert set(items.condition.tolist()) <= set(range(dataset.num_classes))
        elif dataset.condition_shape is not None:
            assert items.condition.shape[1:] == dataset.condition_shape
        if dataset.target_shape is not None and items.target.dtype == torch.int64:
            assert 0 <= items.target.min() and items.target.max() < dataset.target_shape[-1]


@pytest.mark.parametrize("name", NAMES)
def test_series_are_as_stated(name):
    """Times never go back, in one unit; what was not observed is 0; padding repeats the last time unobserved."""
    dataset = make(name)
    for split in SPLITS:
        items = some(dataset, split)
        if items.times is None:
            return
        n, (steps, channels) = len(items), dataset.shape
        assert dataset.unit_of_time and items.times.shape == (n, steps) and items.times.dtype == torch.float64
        assert items.mask.dtype == torch.bool and items.mask.shape in ((n, steps), (n, steps, channels))
        gaps, seen = items.times.diff(dim=1), items.mask.reshape(n, steps, -1)
        assert (items.times >= 0).all() and (gaps >= 0).all() and seen.flatten(1).any(1).all()
        assert (items.x[~seen.expand_as(items.x)] == 0).all() and (items.x != 0).any()
        repeated = gaps == 0
        assert not seen[:, 1:][repeated].any() and (~repeated | repeated.roll(-1, 1))[:, :-1].all()
        if items.target_times is None:
            continue
        assert items.target.shape == (n, *dataset.target_shape) and items.target_times.dtype == torch.float64
        assert items.target_times.shape == items.target.shape[:2] and (items.target_times.diff(dim=1) >= 0).all()
        assert items.target_mask.dtype == torch.bool and items.target_mask.flatten(1).any(1).all()
        assert items.target_mask.shape in (items.target.shape, items.target.shape[:2])


@pytest.mark.parametrize("name", NAMES)
def test_the_facts_are_plain_and_the_proposed_transform_goes_there_and_back(name):
    dataset = make(name)
    facts = json.loads(json.dumps(dataset.facts()))
    transform = context(facts)["transform"]
    transform.fit([some(dataset, "train", 1000)])
    x = some(dataset, "test", 500).x
    for noise in (None, BatchNoise(len(x), generator=generator("noise"))):
        y, log_det = transform(x, noise)
        assert y.isfinite().all() and log_det.isfinite().all() and log_det.dtype == torch.float64
        assert 0.05 < y.std() < 20  # model space has unit order of magnitude
        if transform.volume:
            torch.testing.assert_close(transform.inverse(y), x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_discrete_data_lie_on_their_levels(name):
    dataset = make(name)
    if dataset.levels is None:
        return
    assert dataset.bin_width is not None
    level = some(dataset, "train").x / dataset.bin_width
    assert (level - level.round()).abs().max() < 1e-4
    assert level.min() >= 0 and level.round().max() <= dataset.levels - 1


# ---- laws with a known density ----


def region(toy: Toy) -> float:
    return toy.reach + 9 * toy.noise if isinstance(toy, SmoothToy) else toy.width / 2 + 1


@pytest.mark.parametrize("name", TOYS)
def test_the_density_integrates_to_one_and_has_the_stated_entropy(name):
    toy = make(name)
    # midpoints: spectrally accurate for the smooth laws; the board's edges fall between cells (0.01 divides them)
    bound = region(toy)
    points, area = grid(
        -bound, bound, round(2 * bound / 0.045) if isinstance(toy, SmoothToy) else round(2 * bound / 0.02)
    )
    log_p = toy.log_prob(points)
    assert float(log_p.exp().sum() * area) == pytest.approx(1.0, abs=1e-9)
    plogp = torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0)
    assert float(-plogp.sum() * area) == pytest.approx(toy.entropy(), abs=1e-5)


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.slow_for("spirals")
def test_the_items_have_the_entropy_of_the_density(name):
    toy = make(name)
    x = torch.cat([toy.all(split).x for split in SPLITS])
    values = -toy.log_prob(x)
    # 4.5 standard errors; the board's density is constant, so that float rounding is all there is
    assert abs(values.mean() - toy.entropy()) < 4.5 * values.std() / len(x) ** 0.5 + 1e-12


@pytest.mark.parametrize("name", TOYS)
def test_the_items_fill_space_as_the_density_says(name):
    """Chi-square over 16 x 16 cells, the expected counts by integrating the density over each cell."""
    toy, cells = make(name), 16
    fine = 8 if isinstance(toy, SmoothToy) else 16
    bound = region(toy)
    points, area = grid(-bound, bound, cells * fine)
    p = (toy.log_prob(points).exp() * area).reshape(cells, fine, cells, fine).sum((1, 3)).flatten()
    x = torch.cat([toy.all(split).x for split in SPLITS]).double()
    place = ((x + bound) / (2 * bound) * cells).long()
    counts = (place[:, 0] * cells + place[:, 1]).bincount(minlength=cells**2)
    expected = p * len(x)
    seen = expected > 5
    assert counts[expected < 1e-6].sum() == 0
    chi2, dof = float(((counts - expected)[seen] ** 2 / expected[seen]).sum()), int(seen.sum()) - 1
    assert abs(chi2 - dof) < 5 * (2 * dof) ** 0.5


@pytest.mark.parametrize("name", TOYS)
def test_labels_do_not_change_the_items(name):
    plain, labelled = make(name), make(name, conditional=True)
    for split in SPLITS:
        items = labelled.all(split)
        assert torch.equal(plain.all(split).x, items.x) and plain.all(split).condition is None
        share = items.condition.bincount(minlength=labelled.num_classes) / len(items)
        assert share.min() > 0.8 / labelled.num_classes
    assert plain.num_classes is None and len(share) == labelled.num_classes


@pytest.mark.parametrize("name", TOYS)
def test_seed_and_size_are_honoured(name):
    small, other = make(name, size=50), make(name, size=50, seed=1)
    assert [small.size(split) for split in SPLITS] == [50] * 3
    assert not torch.equal(small.all("train").x, other.all("train").x)
    with pytest.raises(ValueError, match="size must be at least 1"):
        make(name, size=0)


LABELS: dict[type[Toy], Callable] = {
    EightGaussians: lambda x, toy: (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8,
    Checkerboard: lambda x, toy: ((x[:, 0] / toy.width + 0.5) * toy.cells).floor().long(),
    Rings: lambda x, toy: (x.norm(dim=1)[:, None] - toy.radii).abs().argmin(1),
}


@pytest.mark.parametrize("cls", LABELS)
def test_labels_name_the_component(cls):
    toy = cls(size=2000, conditional=True)
    items = toy.all("train")
    # components lie at least 5 noise widths from the boundary between two; a float32 edge point may round away
    assert (LABELS[cls](items.x, toy) == items.condition).float().mean() > 0.999


@pytest.mark.parametrize("cls", [Moons, Spirals])
def test_quadrature_along_the_curves_is_exact(cls):
    toy, finer = cls(size=200), cls(size=200)
    finer.speed = 1.7 * toy.speed  # nearly twice the nodes
    x = torch.cat((toy.all("train").x, torch.tensor([[0.0, 0.0], [2.0, -2.0]])))
    torch.testing.assert_close(toy.log_prob(x), finer.log_prob(x), rtol=1e-12, atol=1e-11)
    far = torch.tensor([[30.0, 40.0], [-1e6, 1e6]])
    distance = torch.stack(
        [(far - arm[:, None, :]).square().sum(-1).amin(0) for arm in toy.arms(torch.linspace(0, 1, 999))]
    )
    torch.testing.assert_close(toy.log_prob(far), -distance.amin(0).double() / (2 * toy.noise**2), rtol=1e-3, atol=0)
    torch.testing.assert_close(toy.log_prob(far), finer.log_prob(far), rtol=1e-4, atol=0)
    t = torch.linspace(0, 1, 20001, dtype=torch.float64)
    longest = (toy.arms(t).diff(dim=1).norm(dim=-1) * 20000).max()
    assert longest <= toy.speed * (1 + 1e-9) and longest > 0.99 * toy.speed
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (dt,) = torch.autograd.grad(toy.inverse_cdf(u).sum(), u) if toy.inverse_cdf(u) is not u else (torch.ones(50),)
    torch.testing.assert_close(toy.weight(toy.inverse_cdf(u)) * dt, torch.ones(50).double(), check_dtype=False)


def test_a_ring_is_a_circle_of_gaussians():
    toy = Rings(size=1, rings=1, radius=1.5, noise=0.3)
    x = torch.tensor([[0.0, 0.0], [1.0, 1.2], [-2.0, 0.1]], dtype=torch.float64)
    angle = torch.arange(400, dtype=torch.float64) * 2 * math.pi / 400
    centres = 1.5 * torch.stack((angle.cos(), angle.sin()), 1)
    square = (x[:, None] - centres).square().sum(-1)
    direct = (-square / (2 * 0.09) - math.log(2 * math.pi * 0.09)).logsumexp(1) - math.log(400)
    torch.testing.assert_close(toy.log_prob(x), direct, rtol=1e-12, atol=1e-12)


def test_the_edges_of_the_board_belong_to_it():
    toy = Checkerboard(size=1, cells=3, width=3.0)
    edge = torch.tensor([[-1.5, -1.5], [-0.5, -1.0], [-0.5, -0.5], [1.5, 1.5], [0.0, -1.0], [1.6, 1.0], [-1.5, -2.0]])
    inside = toy.log_prob(edge) > -math.inf
    assert inside.tolist() == [True, True, True, True, False, False, False]
    assert toy.entropy() == pytest.approx(math.log(5))  # five dark squares of area 1


# ---- digits ----


def test_digits_are_what_they_are_known_to_be():
    data = make("digits")
    assert [data.size(split) for split in SPLITS] == [1197, 100, 500]
    x = torch.cat([data.all(split).x for split in SPLITS])
    assert x.unique().tolist() == list(range(17))
    assert torch.where(x.flatten(1).amax(0) == 0)[0].tolist() == [0, 32, 39]
    assert len(x.unique(dim=0)) == 1797
    assert torch.linalg.matrix_rank(torch.cov(x.flatten(1).T.double())) == 61


def test_the_digits_split_is_stratified_complete_and_reproducible():
    stored = json.loads(digits.SPLIT_FILE.read_text())
    assert digits.make_split() == stored
    assert sorted(stored["train"] + stored["val"] + stored["test"]) == list(range(1797))
    data = make("digits")
    total = torch.cat([data.labels(split) for split in SPLITS]).bincount()
    assert total.sum() == 1797
    for split in SPLITS:
        share = data.labels(split).bincount(minlength=10) - total * data.size(split) / 1797
        assert share.abs().max() <= 1.0 + 1e-6
    # within a split the order is random: the classes of a prefix are mixed
    assert len(data.labels("val")[:30].unique()) >= 8


def test_digits_labels_are_condition_or_target():
    generate, classify = make("digits"), make("digits", task="classify")
    assert generate.facts()["num_classes"] == 10 and generate.facts()["target_shape"] is None
    assert classify.facts()["num_classes"] is None and classify.facts()["target_shape"] == [10]
    for split in SPLITS:
        a, b = generate.all(split), classify.all(split)
        assert torch.equal(a.x, b.x) and torch.equal(a.condition, b.target)
        assert a.target is None and b.condition is None
        assert torch.equal(generate.labels(split), classify.labels(split))


def test_the_digits_transforms_fill_the_interval():
    x = make("digits").all("train").x
    y, _ = context(make("digits").facts())["transform"](x, BatchNoise(len(x), generator=generator("y")))
    assert -1 <= y.min() < -0.999 and 0.99 < y.max() < 1
    y, _ = context(make("digits", task="classify").facts())["transform"](x)
    assert y.min() == -1 and y.max() == 1
    chosen = make("digits", transform={"name": "logit", "low": 0, "high": 17}).facts()["transform"]
    assert chosen == {"name": "logit", "low": 0.0, "high": 17.0, "alpha": 0.05}


def test_the_digits_baselines_are_probability_mass_functions():
    """Against a direct computation, pixel by pixel, in numpy."""
    data = make("digits")
    v, labels = data.all("train").x.flatten(1).numpy().astype(int), data.labels("train").numpy()
    test = data.all("test").x.flatten(1).numpy().astype(int)

    def tables(rows):
        counts = np.stack([np.bincount(rows[:, i], minlength=17) for i in range(64)]) + 0.1
        return np.log(counts / counts.sum(1, keepdims=True))

    def score(table):
        return table[np.arange(64), test].sum(1)

    one = score(tables(v))
    parts = np.stack([score(tables(v[labels == c])) + np.log(np.mean(labels == c)) for c in range(10)])
    mixture = np.log(np.exp(parts - parts.max(0)).sum(0)) + parts.max(0)
    found = data.baselines()
    assert found["uniform"] == pytest.approx(4.087462841250339, abs=1e-12)
    assert found["histograms"] == pytest.approx(-one.mean() / (64 * math.log(2)), abs=1e-12)
    assert found["class histograms"] == pytest.approx(-mixture.mean() / (64 * math.log(2)), abs=1e-12)
    # the level of the same models on another split of these data: 2.4263 and 2.2148, with standard errors near 0.01
    assert abs(found["histograms"] - 2.4263) < 0.03 and abs(found["class histograms"] - 2.2148) < 0.03
    assert make("digits", task="classify").baselines() == found


def test_other_data_under_the_name_of_digits_are_noticed(monkeypatch):
    x, labels, _ = digits._load()
    monkeypatch.setattr(digits, "_load", lambda: (x, labels, "0123456789abcdef"))
    with pytest.raises(ValueError, match=r"SHA-256 0123456789ab….*Install a scikit-learn version"):
        Digits()


# ---- errors ----


class Holding(InMemory):
    """Items that are given."""

    registered_name = "holding"
    shape = (2,)

    def __init__(self, x: torch.Tensor) -> None:
        self.hold("train", Batch(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_the_data_is_named(bad):
    x = torch.zeros(9, 2)
    x[4, 1] = x[7, 0] = bad
    with pytest.raises(ValueError, match=r"data 'holding', split 'train': item 4 holds NaN or infinity \(2 of 9"):
        Holding(x)


def test_a_missing_split_is_named():
    with pytest.raises(ValueError, match=r"no split 'test'; it has train"):
        Holding(torch.zeros(3, 2)).size("test")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "moons", "noise": 0.0}, "noise must be > 0"),
        ({"name": "rings", "radius": -1.0}, "radius must be > 0"),
        ({"name": "checkerboard", "cells": 0}, "cells must be > 0"),
        ({"name": "digits", "task": "classification"}, "task"),
    ],
)
def test_impossible_arguments_are_refused(node, message):
    with pytest.raises(ValueError, match=message):
        build(Dataset, resolve(Dataset, node, "data"))
