"""Arrays on disk: the rows asked for are read and no others, by any process, and faults are named with their place."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genmodels.data import arrays
from genmodels.data.arrays import Array, skip, spaced
from genmodels.data.dataset import Dataset, context
from genmodels.registry import ConfigError, build, resolve

IMAGES = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 5), dtype=np.uint8)
WHOLE = {"val": 0, "test": 0}
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make(path, **arguments) -> Array:
    return build(Dataset, resolve(Dataset, {"name": "array", "path": str(path), **arguments}, "data"))


def save(folder, x, name="x.npy"):
    folder.mkdir(exist_ok=True)
    np.save(folder / name, x, allow_pickle=True)
    return folder / name


def shards(folder, x, sizes, names="part{}.npy"):
    for k, piece in enumerate(np.split(x, np.cumsum(sizes)[:-1])):
        save(folder, piece, names.format(k))
    return folder


def take(dataset, rows, split="train") -> np.ndarray:
    return dataset.take(split, torch.as_tensor(rows)).x.numpy()


# ---- what is read ----


@FEW
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    order=st.sampled_from(["C", "F"]),
    dtype=st.sampled_from(["u1", "<f4", ">f8", "<i2"]),
    data=st.data(),
)
def test_taking_is_indexing_of_the_whole(tmp_path_factory, sizes, order, dtype, data):
    n = sum(sizes)
    x = np.array(np.random.default_rng(n).integers(0, 200, (n, 2, 3)), dtype, order=order)
    rows = data.draw(st.lists(st.integers(0, n - 1), max_size=20))
    folder = tmp_path_factory.mktemp("shards")
    for k, piece in enumerate(np.split(x, np.cumsum(sizes)[:-1])):
        np.save(folder / f"part{k}.npy", piece)
    dataset = make(folder, levels=256, **WHOLE)
    found = dataset.take("train", torch.tensor(rows, dtype=torch.int64)).x
    assert found.dtype == torch.float32 and np.array_equal(found, x[rows].astype(np.float32))
    for row in range(n):
        k = int(np.searchsorted(np.cumsum(sizes), row, side="right"))
        assert dataset.shards.where(row) == f"{folder / f'part{k}.npy'}, row {row - sum(sizes[:k])}"


def test_only_the_rows_asked_for_are_read_once_each_and_in_order(tmp_path, monkeypatch):
    dataset = make(shards(tmp_path, IMAGES, [15, 25]), order="file", **WHOLE)
    asked = []

    class Map(np.ndarray):
        def __getitem__(self, rows):
            asked.append(rows.tolist())
            return np.asarray(self)[rows]

    real = arrays.open_npy
    monkeypatch.setattr(arrays, "open_npy", lambda path: real(path).view(Map))
    assert np.array_equal(take(dataset, [39, 3, 15, 3, 0]), IMAGES[[39, 3, 15, 3, 0]])
    assert asked == [[0, 3], [0, 24]]


def test_files_follow_each_other_by_number(tmp_path):
    names = ["x2b.npy", "x10.npy", "x1.npy", "x02a.npy"]
    for name, value in zip(names, (2, 10, 1, 2), strict=True):
        save(tmp_path, np.full((1, 1), value, np.float32), name)
    assert take(make(tmp_path, **WHOLE), range(4)).ravel().tolist() == [1, 2, 2, 10]


def test_a_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "OPEN", 3)
    dataset = make(shards(tmp_path, IMAGES, [1] * 40), **WHOLE)
    assert np.array_equal(take(dataset, range(40)), IMAGES)
    assert list(dataset.shards.maps) == [37, 38, 39]
    take(dataset, [37])
    take(dataset, [0])
    assert list(dataset.shards.maps) == [39, 37, 0]  # the one that was used longest ago was closed


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_worker_processes_read_for_themselves(tmp_path, start):
    dataset = make(
        shards(tmp_path, IMAGES, [15, 25]), labels=str(save(tmp_path / "y", np.arange(40))), flip=True, **WHOLE
    )
    expected = take(dataset, range(80))  # the maps are open now
    assert IMAGES[0].tobytes() not in pickle.dumps(dataset)
    copy = pickle.loads(pickle.dumps(dataset))
    assert (
        np.array_equal(take(copy, range(80)), expected)
        and dataset.shards.maps
        and copy.fingerprint() == dataset.fingerprint()
    )
    loader = torch.utils.data.DataLoader(
        _Items(dataset),
        batch_size=None,
        sampler=torch.arange(80).split(16),
        num_workers=2,
        multiprocessing_context=start,
    )
    found = list(loader)
    assert np.array_equal(torch.cat([x for x, _ in found]), expected)
    assert torch.cat([y for _, y in found]).tolist() == [*range(40)] * 2


class _Items:
    """What a DataLoader indexes: a batch of items as a pair."""

    def __init__(self, dataset: Array) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        items = self.dataset.take("train", rows)
        return items.x, items.condition


# ---- splits ----


@FEW
@given(n=st.integers(1, 500), val=st.floats(0, 0.4), test=st.floats(0, 0.4), order=st.sampled_from(["spaced", "file"]))
def test_every_row_is_in_one_split(tmp_path, n, val, test, order):
    dataset = make(save(tmp_path, np.zeros((n, 1), np.float32)), val=val, test=test, order=order)
    rows = {split: dataset.rows(split, np.arange(dataset.size(split))) for split in ("train", "val", "test")}
    assert len(rows["test"]) == int(test * n) and len(rows["val"]) == int(val * (n - int(test * n)))
    assert sorted(np.concatenate(list(rows.values()))) == list(range(n))
    assert np.array_equal(rows["train"], np.sort(rows["train"]))
    if order == "file":
        assert np.array_equal(np.concatenate(list(rows.values())), np.arange(n))


def test_spaced_rows_are_the_middles_of_equal_parts_and_are_mixed(tmp_path):
    assert spaced(12, 3).tolist() == [2, 6, 10] and spaced(5, 5).tolist() == list(range(5)) and len(spaced(5, 0)) == 0
    dataset = make(save(tmp_path, np.zeros((1000, 1), np.float32)), val=90, test=100)
    test = dataset.rows("test", np.arange(100))
    assert np.sort(test).tolist() == list(range(5, 1000, 10)) and test[:20].max() > 700 and test[:20].min() < 300
    val = np.sort(dataset.rows("val", np.arange(90)))
    assert np.diff(val).min() >= 10 and np.diff(val).max() <= 13


def test_skipping_leaves_out_what_is_taken():
    taken = np.array([0, 3, 4, 9])
    assert skip(np.arange(6), taken - np.arange(4)).tolist() == [1, 2, 5, 6, 7, 8]


# ---- images, labels, levels ----


def test_mirror_images_follow_as_training_items(tmp_path):
    dataset = make(save(tmp_path, IMAGES), flip=True, order="file", test=10, val=6)
    assert [dataset.size(split) for split in ("train", "val", "test")] == [48, 6, 10]
    rows = [0, 24, 25, 47, 23, 1]
    expected = IMAGES[[0, 0, 1, 23, 23, 1]].astype(np.float32)
    expected[1:4] = expected[1:4, :, :, ::-1]
    assert np.array_equal(take(dataset, rows), expected) and np.array_equal(take(dataset, rows), take(dataset, rows))
    assert np.array_equal(take(dataset, range(10), "test"), IMAGES[30:])


def test_channels_may_be_stored_last(tmp_path):
    dataset = make(save(tmp_path, IMAGES.transpose(0, 2, 3, 1)), channels_last=True, **WHOLE)
    assert dataset.shape == (3, 4, 5) and np.array_equal(take(dataset, range(40)), IMAGES)


def test_labels_stay_with_their_items(tmp_path):
    x, y = np.arange(30.0)[:, None], np.arange(30) % 7
    folder = shards(tmp_path, x, [4, 26])
    labels = str(save(tmp_path, y, "labels.npy"))  # beside the items, and none of them
    generate, classify = make(folder, labels=labels), make(folder, labels=labels, task="classify", classes=9)
    assert generate.num_classes == 7 and generate.target_shape is None and generate.size("train") == 25
    assert classify.num_classes is None and classify.target_shape == (9,)
    for split in ("train", "val", "test"):
        rows = torch.arange(generate.size(split)).flip(0)
        items = generate.take(split, rows)
        assert items.condition.dtype == torch.int64 and torch.equal(items.condition, items.x[:, 0].long() % 7)
        assert torch.equal(classify.take(split, rows).target, items.condition)


def test_bytes_are_levels_and_real_numbers_are_not(tmp_path):
    bytes_, real = make(save(tmp_path, IMAGES)), make(save(tmp_path, IMAGES / 255, "f.npy"))
    assert (bytes_.levels, bytes_.bin_width, real.levels, real.bin_width) == (256, 1.0, None, None)
    stated = make(tmp_path / "f.npy", levels=256, bin_width=1 / 255)
    assert make(save(tmp_path, IMAGES > 9, "b.npy")).levels == 2
    for dataset in (bytes_, stated, real):
        transform = context(dataset.facts())["transform"]
        transform.fit(dataset.batches("train", 7))
        y, _ = transform(dataset.take("test", torch.arange(4)).x)
        assert 0.4 < y.std() < 1.2 and y.abs().max() < 4
    standard = context(real.facts())["transform"]
    standard.fit(real.batches("train", 7))
    x = real.take("train", torch.arange(real.size("train"))).x
    torch.testing.assert_close(standard.mean, x.double().mean(0), rtol=1e-6, atol=1e-7)


def test_the_fingerprint_is_of_contents_and_options(tmp_path):
    path = save(tmp_path, IMAGES)
    first = make(path)
    changed = IMAGES.copy()
    changed[17, 1, 2, 3] ^= 1
    variants = [
        make(path, test=3),
        make(path, order="file"),
        make(path, flip=True),
        make(path, labels=str(save(tmp_path, np.arange(40), "y.npy"))),
        make(path, labels=str(save(tmp_path, np.arange(40)[::-1], "z.npy"))),
        make(path, levels=300),
        make(save(tmp_path / "changed", changed)),
    ]
    assert len({first.fingerprint(), *(v.fingerprint() for v in variants)}) == 8
    cube = save(tmp_path / "cube", np.arange(40 * 27, dtype=np.uint8).reshape(40, 3, 3, 3))  # no shape tells
    assert make(cube).fingerprint() != make(cube, channels_last=True).fingerprint()
    assert make(save(tmp_path / "copy", IMAGES)).fingerprint() == first.fingerprint()


def test_the_fingerprint_does_not_depend_on_names(tmp_path):
    """Neither of the file, nor of the folder, nor of the labels, nor of shards; but on the order of shards."""
    labels = np.arange(40) % 5
    first = make(save(tmp_path, IMAGES), labels=str(save(tmp_path, labels, "y.npy")))
    other = make(save(tmp_path / "b", IMAGES, "other.npy"), labels=str(save(tmp_path, labels, "classes.npy")))
    assert other.fingerprint() == first.fingerprint()
    for folder, one, two in (("c", "a1", "a2"), ("d", "part-9", "part-10"), ("e", "a2", "a1")):
        save(tmp_path / folder, IMAGES[:15], f"{one}.npy")
        save(tmp_path / folder, IMAGES[15:], f"{two}.npy")
    c, d, e = (make(tmp_path / folder).fingerprint() for folder in "cde")
    assert c == d != e


# ---- errors ----


def with_bad(value):
    x = np.zeros((40, 3))
    x[22, 1] = x[35, 0] = value
    return x


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e39])
def test_a_bad_item_is_named_when_it_is_taken(tmp_path, value):
    dataset = make(shards(tmp_path, with_bad(value), [15, 25]), **WHOLE)
    take(dataset, [0, 21, 23, 34])
    with pytest.raises(ConfigError, match=r"part1\.npy, row 7 holds NaN or infinity \(as float32\)"):
        take(dataset, [35, 1, 22])


def test_a_value_beside_the_levels_is_named_when_it_is_taken(tmp_path):
    dataset = make(shards(tmp_path, with_bad(1.5), [15, 25]), levels=3, **WHOLE)
    with pytest.raises(
        ConfigError, match=r"part1\.npy, row 7 .* none of the 3 levels k·1, k = 0 … 2\. Correct data\.levels"
    ):
        take(dataset, [22])


def test_there_are_no_items_beyond_the_split(tmp_path):
    dataset = make(save(tmp_path, IMAGES), test=4)
    for rows in ([4], [-1]):
        with pytest.raises(IndexError, match=r"split 'test': indices must lie in 0 … 3"):
            take(dataset, rows, "test")
    assert take(dataset, torch.zeros(0, dtype=torch.int64), "test").shape == (0, 3, 4, 5)


def test_a_truncated_file_is_named_with_its_sizes(tmp_path):
    path = save(tmp_path, IMAGES)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ConfigError, match=r"x\.npy is truncated: .*\[40, 3, 4, 5\] uint8, which takes 2,528 bytes.* 2,527"
    ):
        make(path)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (np.zeros((2, 4), np.float32), r"b\.npy holds items \[4\] float32, but .*a\.npy holds items \[3\] float32"),
        (np.zeros((2, 3)), r"b\.npy holds items \[3\] float64, but .*a\.npy holds items \[3\] float32"),
        (np.zeros(2, int), r"b\.npy holds items \[\] int64.*Name a file of labels as data\.labels"),
        (np.array([[None]]), r"b\.npy holds Python objects"),
        (np.zeros((0, 3), np.float32), r"b\.npy is empty"),
    ],
)
def test_files_of_a_folder_must_agree(tmp_path, second, message):
    save(tmp_path, np.zeros((2, 3), np.float32), "a.npy")
    save(tmp_path, second, "b.npy")
    with pytest.raises(ConfigError, match=message):
        make(tmp_path)


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (np.arange(39), {}, r"y\.npy has shape \[39\], but there are 40 items: \[40\] is needed"),
        (np.zeros((40, 2), int), {}, r"y\.npy has shape \[40, 2\]"),
        (np.arange(40) - 2, {}, r"y\.npy, row 0 holds the label -2; labels must be 0 or more \(2 of 40"),
        (np.arange(40), {"classes": 38}, r"y\.npy, row 38 holds the label 38; labels must be 0 … 37 \(2 of 40"),
        (np.arange(40.0), {}, r"y\.npy holds float64, but labels are whole numbers"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, labels, arguments, message):
    path = save(tmp_path, IMAGES)
    with pytest.raises(ConfigError, match=message):
        make(path, labels=str(save(tmp_path, labels, "y.npy")), **arguments)


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (np.zeros(5), {}, r"x\.npy has shape \[5\]; \[N, \*shape\] is needed"),
        (np.zeros((5, 3)), {"flip": True}, r"data\.flip: images \[C, H, W\] are needed, but .* shape \[3\]"),
        (np.zeros((5, 3, 3)), {"channels_last": True}, r"data\.channels_last: images"),
        (IMAGES, {"levels": 1}, r"at least 2 levels"),
        (IMAGES, {"classes": 3}, r"data\.classes: .* goes with data\.labels"),
        (IMAGES, {"val": 36, "test": 4}, r"of 40 items, val=36 takes 36 and test=4 takes 4: none is left"),
    ],
)
def test_options_that_do_not_fit_the_items_are_named(tmp_path, x, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make(save(tmp_path, x), **arguments)


def test_what_is_no_array_file_is_said_to_be(tmp_path):
    for name, message in (("x.csv", "is no .npy file and no folder"), ("x.npy", "is no readable .npy file")):
        (tmp_path / name).write_text("1,2\n")
        with pytest.raises(ConfigError, match=message):
            make(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.npy file"):
        make(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"there is no file .*Did you mean 'x\.npy'"):
        make(tmp_path / "xx.npy")
