"""MNIST and EMNIST from small files in their own format: what is read, and what is refused."""

import gzip
import struct

import numpy as np
import pytest
import torch

from genmodels.data.dataset import context
from genmodels.data.mnist import MNIST
from genmodels.registry import ConfigError
from genmodels.rng import BatchNoise, generator
from tests.data_files import idx, mnist_arrays, write_mnist

SPLITS = ("train", "val", "test")
TRAIN = "train-images-idx3-ubyte"


@pytest.fixture
def folder(tmp_path):
    return write_mnist(tmp_path / "mnist")


def read(path, **arguments):
    return MNIST(**{"path": str(path), "val": 10, **arguments})


def write_emnist(folder, name="letters", first=1, classes=26, count=40, size=(6, 5)):
    """The four files of a part of EMNIST, not compressed, and the training images."""
    folder.mkdir()
    rng, made = np.random.default_rng(1), {}
    for split in ("train", "test"):
        made[f"{split}-images-idx3"] = rng.integers(0, 256, (count, *size), dtype=np.uint8)
        made[f"{split}-labels-idx1"] = first + np.arange(count) % classes
    for key, array in made.items():
        (folder / f"emnist-{name}-{key}-ubyte").write_bytes(idx(array))
    return made


def test_items_are_those_of_the_files_in_order(folder):
    data, arrays = read(folder), mnist_arrays()
    assert [data.size(split) for split in SPLITS] == [80, 10, 20]
    assert data.shape == (1, 8, 8) and data.num_classes == 10 and data.levels == 256
    parts = {"train": ("train", slice(80)), "val": ("train", slice(80, 90)), "test": ("t10k", slice(20))}
    for split, (name, rows) in parts.items():
        items = data.all(split)
        assert items.x.dtype == torch.float32 and items.x.shape[1:] == (1, 8, 8)
        np.testing.assert_array_equal(items.x[:, 0].numpy(), arrays[f"{name}-images-idx3-ubyte"][rows])
        assert items.condition.tolist() == arrays[f"{name}-labels-idx1-ubyte"][rows].tolist()
    assert data._held("train")[0].x.dtype == torch.uint8


def test_the_format_is_that_of_the_published_description():
    """Big-endian: 0, 0, 8 for unsigned bytes, the number of axes, four bytes for each size, rows of pixels."""
    assert idx(np.array([[[1, 2, 3], [4, 5, 6]]])) == bytes.fromhex("00000803 00000001 00000002 00000003 010203040506")
    assert idx(np.array([7, 0])) == bytes.fromhex("00000801 00000002 0700")


def test_black_and_white_is_a_threshold_at_half(folder):
    grey, binary = read(folder), read(folder, binarize=True)
    for split in SPLITS:
        assert torch.equal(binary.all(split).x, (grey.all(split).x > 127).float())
        assert torch.equal(binary.all(split).x, read(folder, binarize=True).all(split).x), "no draw is made"
        assert torch.equal(binary.all(split).condition, grey.all(split).condition)
    assert binary.levels == 2 and binary.bin_width == 1.0
    assert binary.baselines() == {"uniform": 1.0} and grey.baselines() == {"uniform": 8.0}
    y, _ = context(binary.facts())["transform"](binary.all("val").x, BatchNoise(10, generator=generator("y")))
    assert -1 <= y.min() < -0.9 and 0.9 < y.max() < 1
    edges = np.full((20, 8, 8), 127)
    edges[0, 0, 0] = 128
    write_mnist(folder, t10k_images_idx3_ubyte=idx(edges))
    assert read(folder, binarize=True).all("test").x.sum() == 1


def test_labels_are_condition_target_or_nothing(folder):
    generate, without, classify = read(folder), read(folder, labels=False), read(folder, task="classify")
    labels = generate.all("val").condition
    assert without.all("val").condition is None and without.num_classes is None
    assert torch.equal(classify.all("val").target, labels) and classify.all("val").condition is None
    assert classify.target_shape == (10,) and classify.num_classes is None
    y, _ = context(classify.facts())["transform"](classify.all("val").x)
    assert y.min() == -1 and y.max() == 1


def test_files_may_be_compressed_or_not_and_named_so_or_not(folder, tmp_path, monkeypatch):
    plain = write_mnist(tmp_path / "plain", compress=False)
    assert read(plain).fingerprint() == read(folder).fingerprint()
    place = plain / TRAIN
    place.write_bytes(gzip.compress(place.read_bytes()))
    assert read(plain).fingerprint() == read(folder).fingerprint()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/plain").size("test") == 20


def test_letters_of_emnist_stand_upright_and_start_at_zero(tmp_path):
    made = write_emnist(tmp_path / "emnist")
    data = read(tmp_path / "emnist", files="emnist-letters", val=4)
    assert data.shape == (1, 5, 6) and data.num_classes == 26
    items = data.all("train")
    np.testing.assert_array_equal(items.x[:, 0].numpy(), made["train-images-idx3"][:36].transpose(0, 2, 1))
    assert items.condition[:27].tolist() == [*range(26), 0]


@pytest.mark.parametrize(("name", "classes"), [("balanced", 47), ("byclass", 62), ("bymerge", 47), ("digits", 10)])
def test_other_parts_of_emnist_have_their_classes(tmp_path, name, classes):
    write_emnist(tmp_path / "emnist", name, 0, classes, count=70)
    data = read(tmp_path / "emnist", files=f"emnist-{name}", task="classify")
    assert data.target_shape == (classes,) and data.all("test").target.max() == classes - 1


def test_the_fingerprint_changes_with_files_and_options(folder, tmp_path):
    options = ({}, {"val": 9}, {"binarize": True}, {"labels": False}, {"task": "classify"})
    prints = [read(folder, **o).fingerprint() for o in options]
    images = mnist_arrays()[TRAIN]
    images[7, 3, 3] ^= 1
    prints.append(read(write_mnist(tmp_path / "other", train_images_idx3_ubyte=idx(images))).fingerprint())
    assert len(set(prints)) == 6


# ---- what is refused ----


def message(path, **arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path, **arguments)
    return str(caught.value)


def test_missing_files_are_named_with_what_is_there(folder, tmp_path):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    found = message(folder)
    assert f"{folder} lacks t10k-labels-idx1-ubyte (plain or .gz); it holds t10k-images-idx3-ubyte.gz" in found
    assert "the MNIST page of its authors" in found and "data.files" not in found
    found = message(folder, files="emnist-letters")
    assert "lacks emnist-letters-train-images-idx3-ubyte, emnist-letters-train-labels-idx1-ubyte, " in found
    assert "emnist-letters-test-images-idx3-ubyte" in found and "Those are read with data.files=mnist." in found
    assert "the EMNIST page of NIST" in found
    write_emnist(tmp_path / "emnist")
    assert "Those are read with data.files=emnist-letters." in message(tmp_path / "emnist")
    (tmp_path / "empty").mkdir()
    assert "it holds nothing." in message(tmp_path / "empty")
    assert f"{tmp_path / 'no'} does not exist" in message(tmp_path / "no")
    assert "is a file. Get them" in message(folder / "train-images-idx3-ubyte.gz")


def test_other_formats_are_told_by_their_magic_number(tmp_path):
    labels = idx(mnist_arrays()["train-labels-idx1-ubyte"])
    found = message(write_mnist(tmp_path / "a", train_images_idx3_ubyte=labels))
    assert "starts with the number 2049 (0x00000801), which stands for labels, where 2051 (0x00000803)" in found
    assert f"{TRAIN}.gz is no IDX file of images" in found
    found = message(write_mnist(tmp_path / "b", t10k_labels_idx1_ubyte=b"<html>not found</html>"))
    assert "t10k-labels-idx1-ubyte.gz is no IDX file of labels" in found and "0x3c68746d), where 2049" in found
    floats = struct.pack(">HBBI", 0, 0x0D, 1, 1) + b"1234"
    assert "(0x00000d01), where" in message(write_mnist(tmp_path / "c", train_labels_idx1_ubyte=floats))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda whole: whole[:-1], "is cut short: it says that it holds 90 x 8 x 8 images, which takes 5,776 bytes"),
        (lambda whole: whole + b"1", "has bytes behind its end: it says that it holds 90 x 8 x 8 images"),
        (lambda whole: whole[:13], "is cut short: its header is not whole, which takes 16 bytes, but there are 13"),
        (lambda whole: b"", "is cut short: its header is not whole"),
    ],
)
def test_files_of_another_length_than_they_say(tmp_path, change, expected):
    content = change(idx(mnist_arrays()[TRAIN]))
    found = message(write_mnist(tmp_path / "a", compress=False, train_images_idx3_ubyte=content))
    assert expected in found and TRAIN in found and "page of its authors" in found


def test_damaged_compression_is_named(folder):
    place = folder / f"{TRAIN}.gz"
    whole = place.read_bytes()
    for content in (whole[:-30], whole[:5], whole[:10] + b"\xff" * 8 + whole[18:], whole[:-8] + bytes(8)):
        place.write_bytes(content)
        assert f"{place} is cut short or damaged ({len(content):,} bytes" in message(folder)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"train_labels_idx1_ubyte": np.arange(89) % 10}, "holds 90 images, but"),
        ({"t10k_labels_idx1_ubyte": np.arange(21) % 10}, "21 labels: they are not of one data set"),
        ({"t10k_images_idx3_ubyte": np.zeros((20, 8, 9))}, "of 8x9: they are of different data sets"),
        ({"train_labels_idx1_ubyte": np.arange(90) % 11}, "label 10 is 10, where 0 … 9 are expected. Set data.files"),
        ({"t10k_images_idx3_ubyte": np.zeros((0, 8, 8))}, "holds nothing: it says that it holds 0 x 8 x 8 images"),
        ({"t10k_labels_idx1_ubyte": np.zeros(0)}, "holds nothing: it says that it holds 0 labels"),
    ],
)
def test_files_that_do_not_fit_each_other(tmp_path, changed, expected):
    found = message(write_mnist(tmp_path / "a", **{key: idx(array) for key, array in changed.items()}))
    assert expected in found and str(tmp_path) in found


def test_labels_of_letters_start_at_one(tmp_path):
    write_emnist(tmp_path / "emnist", first=0)
    assert "label 0 is 0, where 1 … 26" in message(tmp_path / "emnist", files="emnist-letters")


@pytest.mark.parametrize("val", [90, -1])
def test_impossible_shares_are_refused(folder, val):
    assert f"data.val: 0 … 89 of the 90 training images, found {val}" in message(folder, val=val)
