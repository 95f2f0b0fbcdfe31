"""Data given from Python: tensors become a checked data set, and a configuration says that they were given."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genmodels.config import Config
from genmodels.data.dataset import Dataset
from genmodels.data.external import External, from_tensors
from genmodels.registry import ConfigError, build
from genmodels.training.loop import train
from genmodels.types import Batch

X = torch.arange(60.0).reshape(20, 3)
LABELS = torch.arange(20) % 4
SPLITS = ("train", "val", "test")
CONFIG = {
    "name": "own",
    "data": "external",
    "model": {"name": "flow", "layers": [{"name": "lu_linear"}]},
    "train": {"steps": 3, "batch_size": 4, "eval_every": 3},
}


# ---- in a configuration ----


def test_a_run_on_given_data_says_so_and_asks_for_them_again(tmp_path):
    data = from_tensors(X)
    run = train(Config(CONFIG), root=tmp_path, dataset=data, quiet=True)
    assert run.config.tree["data"] == {"name": "external"}
    mean = run.load("model").transform.mean
    torch.testing.assert_close(mean, data.all("train").x.double().mean(0))
    assert run.load("model").sample(2).shape == (2, 3)  # the model needs no data
    longer = Config({**CONFIG, "name": "other"})
    with pytest.raises(ConfigError, match=r"pass them again: train\(config, dataset=…\)"):
        train(longer, root=tmp_path, quiet=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "use",
    [
        lambda data: data.size("train"),
        lambda data: data.take("train", torch.arange(2)),
        lambda data: next(data.batches("val", 2)),
        lambda data: data.facts(),
        lambda data: data.shape,
        lambda data: data.fingerprint(),
    ],
    ids=["size", "take", "batches", "facts", "shape", "fingerprint"],
)
def test_what_needs_items_asks_for_them(use):
    data = build(Dataset, "external")
    assert isinstance(data, External)
    with pytest.raises(ConfigError, match=r"data were given from Python.*from_tensors.*Run\.open\(folder\)\.load"):
        use(data)


# ---- what tensors become ----


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 50), val=st.floats(0, 0.4), test=st.floats(0, 0.4), seed=st.integers(0, 3))
def test_every_item_is_in_one_split_beside_its_condition_and_target(n, val, test, seed):
    x = torch.arange(2.0 * n).reshape(n, 1, 2)
    data = from_tensors(x, condition=torch.arange(n), target=x[:, 0, 0] * 3, val=val, test=test, seed=seed)
    parts = [data.all(split) for split in SPLITS]
    assert [len(part) for part in parts[1:]] == [int(val * (n - int(test * n))), int(test * n)]
    together = torch.cat([part.condition for part in parts])
    assert sorted(together.tolist()) == list(range(n))
    for part in parts:
        assert torch.equal(part.x, x[part.condition]) and torch.equal(part.target, x[part.condition][:, :, 0] * 3)
    assert (data.num_classes, data.condition_shape, data.target_shape) == (n, None, (1,))


def test_arrays_lists_and_tensors_of_any_number_type_are_the_same_data():
    first = from_tensors(X, condition=LABELS)
    for x in (
        X.double(),
        X.half(),
        X.int(),
        X.numpy(),
        X.numpy().astype(">f8"),
        X.tolist(),
        X.clone().requires_grad_(),
    ):
        data = from_tensors(x, condition=LABELS.numpy().astype("uint8"))
        assert data.all("train").x.dtype == torch.float32 and not data.all("train").x.requires_grad
        assert data.fingerprint() == first.fingerprint()
    others = [from_tensors(X + 1, condition=LABELS), from_tensors(X, condition=LABELS, seed=1), from_tensors(X)]
    assert len({first.fingerprint(), *(data.fingerprint() for data in others)}) == 4


def test_nothing_is_shared_with_what_was_given():
    x, own, labels = X.clone(), X[:4].clone(), LABELS.clone()
    data = from_tensors(
        x, condition=labels, order="file", val=Batch(own, condition=labels[:4]), test=Batch(own, LABELS[:4])
    )
    for given_ in (x, own, labels):
        given_.zero_()
    assert torch.equal(data.all("train").x, X) and torch.equal(data.all("val").x, X[:4])
    assert torch.equal(data.all("val").condition, LABELS[:4])


def test_splits_of_their_own_are_kept_whole_and_the_rest_is_cut():
    data = from_tensors(X, val=Batch(X[:3] + 100), test=Batch(X[:2] - 100))
    assert torch.equal(data.all("train").x, X)
    assert torch.equal(data.all("val").x, X[:3] + 100) and torch.equal(data.all("test").x, X[:2] - 100)
    data = from_tensors(X, val=4, test=Batch(X[:2] - 100), order="file")
    assert torch.equal(data.all("train").x, X[:16]) and torch.equal(data.all("val").x, X[16:])


def test_labels_are_classes_and_vectors_are_shapes():
    labels = from_tensors(X, condition=LABELS, target=LABELS % 2)
    assert (labels.num_classes, labels.condition_shape, labels.target_shape) == (4, None, (2,))
    assert from_tensors(X, condition=LABELS, num_classes=10).facts()["num_classes"] == 10
    assert from_tensors(X, target=LABELS, num_classes=10).facts()["target_shape"] == [10]
    vectors = from_tensors(X, condition=X.reshape(20, 3, 1), target=X)
    assert (vectors.num_classes, vectors.condition_shape, vectors.target_shape) == (None, (3, 1), (3,))
    late = from_tensors(X, condition=LABELS, val=Batch(X[:1], torch.tensor([6])))
    assert late.num_classes == 7


def test_levels_and_their_distance_are_part_of_the_fingerprint():
    x = torch.arange(40.0).reshape(20, 2) % 4
    kinds = [{}, {"levels": 4}, {"levels": 5}, {"levels": 8, "bin_width": 0.5}, {"levels": 8}]
    assert len({from_tensors(x, **kind).fingerprint() for kind in kinds}) == 5


def test_levels_and_transform_become_facts():
    data = from_tensors((X % 5) / 4, levels=5, bin_width=0.25)
    assert (data.levels, data.bin_width) == (5, 0.25) and data.facts()["transform"]["name"] == "compose"
    assert from_tensors(X).facts()["transform"] == {"name": "standardize"}
    assert from_tensors(X, transform="identity").facts()["transform"] == {"name": "identity"}
    assert from_tensors(X).bin_width is None


# ---- errors ----


def bad(row, value, like=X):
    out = like.double().clone()
    out[row, 1] = value
    return out


FAULTS = [
    ((X[:, 0],), {}, r"x has shape \[20\]; \[N, \*shape\] is needed\. .*x\.reshape\(-1, 1\)"),
    ((torch.tensor(1.0),), {}, r"x has shape \[\]"),
    ((X[:0],), {}, r"x has shape \[0, 3\]"),
    ((X[:, :0],), {}, r"x has shape \[20, 0\]"),
    ((None,), {}, r"x must be a tensor or an array of numbers, found NoneType"),
    ((np.array([["a"]]),), {}, r"x must be a tensor or an array of numbers, found ndarray"),
    (([[1.0], [1.0, 2.0]],), {}, r"x must be a tensor or an array of numbers, found list"),
    ((X + 0j,), {}, r"x is torch\.complex64; real numbers are needed"),
    ((bad(7, torch.nan),), {}, r"x, item 7 holds NaN, infinity or a number beyond float32 .*; 1 of 20 items do"),
    ((bad(7, 1e39),), {}, r"x, item 7 holds NaN, infinity or a number beyond float32"),
    ((X,), {"levels": 59}, r"x, item 19 holds a value that is none of the 59 levels k·1, k = 0 … 58 \(1 of 20"),
    ((X,), {"levels": 1}, r"at least 2 levels"),
    ((X,), {"condition": LABELS[:5]}, r"condition has shape \[5\], but there are 20 items"),
    ((X,), {"condition": torch.tensor(1)}, r"condition has shape \[\]"),
    ((X,), {"condition": LABELS - 1}, r"condition, item 0 is the label -1; labels count from 0"),
    ((X,), {"target": LABELS[:, None]}, r"target holds whole numbers of shape \[20, 1\]; labels are \[N\]"),
    ((X,), {"condition": bad(3, torch.inf)}, r"condition, item 3 holds NaN, infinity"),
    ((X,), {"condition": {"prompt": X}}, r"condition must be a tensor .*, found dict"),
    ((X,), {"condition": LABELS, "num_classes": 3}, r"condition holds the label 3, but num_classes=3 allows 0 … 2"),
    ((X,), {"num_classes": 3}, r"num_classes=3 is given, but no labels"),
    ((X,), {"val": Batch(X[:, :2])}, r"val\.x is \[N, 2\] real, but x is \[N, 3\] real; they must agree"),
    ((X,), {"condition": LABELS, "test": Batch(X)}, r"test\.condition is not given, but condition is \[N\] labels"),
    ((X,), {"val": Batch(X, times=X)}, r"val\.times is given; only x, condition and target"),
    ((X,), {"test": Batch(bad(4, torch.nan))}, r"test\.x, item 4 holds NaN"),
    ((X,), {"val": 20}, r"from_tensors: of 20 items, val=20 takes 20 and test=0\.1 takes 2: none is left to train on"),
]  # fmt: skip


@pytest.mark.parametrize(("given_", "options", "message"), FAULTS, ids=[fault[2][:40] for fault in FAULTS])
def test_what_does_not_fit_is_named(given_, options, message):
    with pytest.raises(ConfigError, match=f"from_tensors: .*{message.removeprefix('from_tensors: ')}"):
        from_tensors(*given_, **options)
