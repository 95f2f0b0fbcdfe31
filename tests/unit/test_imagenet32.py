"""Downsampled ImageNet from small files in its own formats: what is read, how it is kept, and what is refused."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch

from genmodels.data import downsampled, imagenet32
from genmodels.data.cifar10 import AlteredData
from genmodels.data.image_cache import CacheWarning, Mapped
from genmodels.data.imagenet32 import ImageNet32
from genmodels.registry import ConfigError
from tests.data_files import IMAGENET, imagenet_batch, imagenet_files, python2_pickle, write_imagenet

SPLITS = ("train", "val", "test")


@pytest.fixture
def folder(tmp_path):
    return write_imagenet(tmp_path / "published")


def read(path, **arguments):
    return ImageNet32(**{"path": str(path), "val": 15, "checksum": "ignore", **arguments})


def everything(data, split):
    return data.take(split, torch.arange(data.size(split)))


@pytest.mark.parametrize("side", [32, 64])
def test_items_are_those_of_the_files_in_order(tmp_path, side):
    data = read(write_imagenet(tmp_path / "files", side=side), size=side)
    batches = [imagenet_batch(name, side=side) for name in IMAGENET]
    x = np.concatenate([b["data"] for b in batches]).reshape(-1, 3, side, side)
    y = np.concatenate([b["labels"] for b in batches]) - 1  # files count classes from 1
    assert data.shape == (3, side, side) and data.num_classes == 1000 and data.levels == 256
    for split, rows in zip(SPLITS, (slice(0, 85), slice(85, 100), slice(100, 110)), strict=True):
        items = everything(data, split)
        assert items.x.dtype == torch.float32 and items.condition.dtype == torch.int64
        np.testing.assert_array_equal(items.x.numpy(), x[rows])
        np.testing.assert_array_equal(items.condition.numpy(), y[rows])
    assert {0, 999} <= set(y.tolist()) and y.max() > 255  # both bytes of a class count
    mixed = torch.tensor([84, 3, 33, 3, 60])
    np.testing.assert_array_equal(data.take("train", mixed).x.numpy(), x[mixed.numpy()])
    with pytest.raises(IndexError, match="items are 0 … 14"):
        data.take("val", torch.tensor([15]))


def test_pixels_lie_channel_by_channel(folder):
    row = imagenet_batch(IMAGENET[0])["data"][0]
    x = read(folder).take("train", torch.tensor([0])).x[0]
    assert x[1, 2, 5] == row[1024 + 2 * 32 + 5] and x[2, 31, 0] == row[2048 + 31 * 32]


def test_every_published_form_gives_the_same_items(folder, tmp_path):
    forms = {
        "zip": write_imagenet(tmp_path / "a", zipped=True),
        "npz": write_imagenet(tmp_path / "b", imagenet_files("npz")),
        "npz in zip": write_imagenet(tmp_path / "c", imagenet_files("npz"), zipped=True),
        "one folder": tmp_path / "d",
        "other protocols": tmp_path / "e",
        "Python 2": tmp_path / "f",
    }
    for place, name in (
        (forms[form], name) for form in ("one folder", "other protocols", "Python 2") for name in IMAGENET
    ):
        place.mkdir(exist_ok=True)
        made, protocol = imagenet_batch(name), 2 + IMAGENET.index(name) % 3 if place.name == "e" else 4
        if name == "train_data_batch_2":  # column by column in memory, as a pickle may hold it
            made["data"] = np.asfortranarray(made["data"])
        old = {key.encode(): value for key, value in made.items()}
        (place / name).write_bytes(python2_pickle(old) if place.name == "f" else pickle.dumps(made, protocol))
    first = read(folder)
    for form, place in forms.items():
        other = read(place)
        assert other.fingerprint() == first.fingerprint(), form
        for split in SPLITS:
            assert torch.equal(everything(other, split).x, everything(first, split).x), form


def test_labels_are_condition_target_or_nothing(folder):
    generate, without, classify = read(folder), read(folder, labels=False), read(folder, task="classify")
    labels = everything(generate, "val").condition
    assert everything(without, "val").condition is None and without.num_classes is None
    assert torch.equal(everything(classify, "val").target, labels) and classify.num_classes is None
    assert classify.target_shape == (1000,) and everything(classify, "val").condition is None


def test_the_fingerprint_changes_with_contents_and_options(folder, tmp_path):
    options = ({}, {"val": 9}, {"flip": True}, {"labels": False}, {"task": "classify"})
    prints = [read(folder, **o).fingerprint() for o in options]
    for key in ("data", "labels"):
        changed = imagenet_batch(IMAGENET[4])
        changed[key][7] = 1 if key == "labels" else changed[key][7] ^ 1
        files = imagenet_files(train_data_batch_5=pickle.dumps(changed))
        prints.append(read(write_imagenet(tmp_path / key, files)).fingerprint())
    assert len(set(prints)) == 7


# ---- the cache ----


def test_a_cache_holds_the_same_items_and_is_made_once(folder, tmp_path, monkeypatch):
    plain, cached = read(folder), read(folder, cache=str(tmp_path / "cache"))
    monkeypatch.setattr(imagenet32, "read", None)  # batches are not read again
    again = read(folder, cache=str(tmp_path / "cache"))
    for split in SPLITS:
        for data in (cached, again):
            assert torch.equal(everything(data, split).x, everything(plain, split).x)
            assert torch.equal(everything(data, split).condition, everything(plain, split).condition)
    assert plain.fingerprint() == cached.fingerprint() == again.fingerprint()
    items, _ = again._held("train")
    assert (
        isinstance(items.read, Mapped) and len(pickle.dumps(again)) < 10_000
    )  # workers map the file, and copy nothing
    (array,) = (tmp_path / "cache").glob("*.npy")
    assert np.load(array, mmap_mode="r").shape == (110, 3074)


def test_a_cache_of_other_files_or_that_is_damaged_is_not_used(folder, tmp_path):
    cache = tmp_path / "cache"
    first = read(folder, cache=str(cache))
    files = imagenet_files(val_data=pickle.dumps(imagenet_batch("train_data_batch_1")))
    other = read(write_imagenet(tmp_path / "other", files), cache=str(cache))
    assert other.fingerprint() != first.fingerprint() and len(list(cache.glob("*.npy"))) == 2
    for array in cache.glob("*.npy"):
        content = array.read_bytes()
        array.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.warns(CacheWarning, match="made again"):
        assert torch.equal(everything(read(folder, cache=str(cache)), "test").x, everything(first, "test").x)


def test_a_cache_that_is_cut_off_leaves_nothing_behind(folder, tmp_path):
    (folder / "Imagenet32_val" / "val_data").write_bytes(b"no pickle")
    with pytest.raises(ConfigError, match="val_data is cut short or damaged"):
        read(folder, cache=str(tmp_path / "cache"))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["cache.lock"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache: .* leave data\.cache out to keep them in memory"):
        read(folder, cache=str(tmp_path / "file"))


# ---- what is refused ----


def message(path, **arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **arguments)
    return str(caught.value)


class Malicious:
    def __init__(self, call, *arguments):
        self.parts = call, arguments

    def __reduce__(self):
        return self.parts


def test_a_malicious_file_runs_nothing(tmp_path):
    witness = tmp_path / "witness"
    evil = [
        ({"data": Malicious(os.system, f"touch {witness}"), "labels": [1]}, "posix.system"),
        ({"data": Malicious(eval, f"open({str(witness)!r}, 'w')"), "labels": [1]}, "builtins.eval"),
        ({"data": np.array([1, "x"], dtype=object), "labels": [1]}, "an array of the type 'O8'"),
    ]
    for k, (content, name) in enumerate(evil):
        files = imagenet_files(train_data_batch_2=pickle.dumps(content, 3))
        found = message(write_imagenet(tmp_path / str(k), files))
        assert f"train_data_batch_2 asks for {name}" in found and "nothing of it was run" in found
    np.savez(tmp_path / "evil.npz", data=np.array([Malicious(os.system, f"touch {witness}")]), labels=[1])
    files = imagenet_files("npz", **{"val_data.npz": (tmp_path / "evil.npz").read_bytes()})
    assert "val_data.npz is cut short or damaged" in message(write_imagenet(tmp_path / "npz", files))
    assert not witness.exists()


def test_missing_ambiguous_and_damaged_files_are_named(folder, tmp_path):
    assert "there is no" in message(tmp_path / "nowhere") and "image-net.org" in message(tmp_path / "nowhere")
    train = message(folder / "Imagenet32_train")
    assert "lacks val_data (or .npz of these names)" in train and "archives of their own" in train
    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in message(tmp_path / "empty")
    twice = write_imagenet(write_imagenet(tmp_path / "twice"), side=64)
    assert "train_data_batch_1 is there twice" in message(twice) and "different sizes" in message(twice)
    packed = write_imagenet(tmp_path / "packed", zipped=True)
    archive = packed / "Imagenet32_val.zip"
    archive.write_bytes(archive.read_bytes()[:-40])
    assert "Imagenet32_val.zip is cut short or damaged" in message(packed)
    batch = folder / "Imagenet32_train" / "train_data_batch_7"
    batch.write_bytes(batch.read_bytes()[:-500])
    assert "train_data_batch_7 is cut short or damaged" in message(folder)


def test_the_size_of_the_files_is_named(tmp_path, folder):
    large = write_imagenet(tmp_path / "large", side=64)
    assert "Those are images of 64x64 pixels: set data.size=64" in message(large)
    assert "[N, 12288] (3 x 64 x 64), found uint8 [10, 3072]" in message(folder, size=64)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": np.zeros((10, 3071), np.uint8)}, "found uint8 [10, 3071]"),
        ({"data": np.zeros((10, 3072))}, "found float64 [10, 3072]"),
        ({"data": [1, 2]}, "found list"),
        ({"labels": [1] * 9}, "10 integers 1 … 1000, one for each image, found 9 values"),
        ({"labels": [0] + [1] * 9}, "found 10 values, some of them others"),
        ({"labels": [1001] + [1] * 9}, "found 10 values, some of them others"),
        ({"labels": [1.5] * 10}, "found 10 values, some of them others"),
        ({"labels": None}, "found NoneType"),
        ([1], "a dictionary with 'data' and 'labels' is needed, found list"),
        ({"labels": "gone"}, "'data' and 'labels' are needed, found 'data', 'mean'"),
    ],
)
def test_wrong_contents_are_named(tmp_path, change, expected):
    content = change if isinstance(change, list) else imagenet_batch("train_data_batch_3") | change
    if isinstance(content, dict) and content["labels"] == "gone":
        del content["labels"]
    found = message(write_imagenet(tmp_path / "a", imagenet_files(train_data_batch_3=pickle.dumps(content, 3))))
    assert expected in found and "train_data_batch_3" in found


def test_published_files_are_told_from_others(folder, tmp_path, monkeypatch, recwarn):
    """Pickled batches by their MD5, .npz by their number of images: the published counts sum to those of ImageNet."""
    assert sum(downsampled.COUNTS.values()) == 1_281_167 + 50_000
    assert "train_data_batch_1, train_data_batch_2" in message(folder, checksum="error")
    with pytest.warns(AlteredData, match="val_data can be read, but are altered"):
        read(folder, checksum="warn")
    files, npz = imagenet_files(), write_imagenet(tmp_path / "npz", imagenet_files("npz"))
    assert "are altered" in message(npz, checksum="error")
    for name in IMAGENET:
        monkeypatch.setitem(downsampled.MD5, name, hashlib.md5(files[name]).hexdigest())
        monkeypatch.setitem(downsampled.COUNTS, name, 10)
    recwarn.clear()
    for place, cache in (
        (folder, None),
        (npz, None),
        (folder, str(tmp_path / "cache")),
        (folder, str(tmp_path / "cache")),
    ):
        assert read(place, checksum="error", cache=cache).size("test") == 10
    assert not list(recwarn)
    monkeypatch.setitem(downsampled.MD5, "val_data", "0" * 32)
    assert "val_data can be read, but is altered" in message(folder, checksum="error", cache=str(tmp_path / "cache"))


def test_impossible_arguments_are_refused(folder):
    assert "data.val: 0 … 99 of the 100 training images, found 100" in message(folder, val=100)
