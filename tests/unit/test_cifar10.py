"""CIFAR-10 from small archives in its own format: what is read, and what is refused."""

import pickle
import tarfile

import numpy as np
import pytest
import torch

from genmodels.data import cifar10
from genmodels.data.cifar10 import CIFAR10, AlteredData, ByteArrayUnpickler
from genmodels.data.dataset import context
from genmodels.registry import ConfigError
from genmodels.rng import BatchNoise, generator
from tests.data_files import (
    BATCHES,
    FOLDER,
    cifar_batch,
    cifar_files,
    python2_pickle,
    write_cifar_archive,
)


@pytest.fixture
def archive(tmp_path):
    return write_cifar_archive(tmp_path / "cifar-10-python.tar.gz", cifar_files())


def unpack(archive):
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent, filter="data")
    return archive.parent / FOLDER


def read(path, **arguments):
    return CIFAR10(**{"path": str(path), "val": 10, "checksum": "ignore", **arguments})


def test_items_are_those_of_the_files_in_order(archive):
    data = read(archive)
    x = np.concatenate([cifar_batch(name)[b"data"] for name in BATCHES[:5]])
    y = [label for name in BATCHES[:5] for label in cifar_batch(name)[b"labels"]]
    test = cifar_batch("test_batch")
    assert [data.size(split) for split in ("train", "val", "test")] == [90, 10, 20]
    for split, pixels, labels in (
        ("train", x[:90], y[:90]),
        ("val", x[90:], y[90:]),
        ("test", test[b"data"], test[b"labels"]),
    ):
        items = data.take(split, torch.arange(data.size(split)))
        assert items.x.dtype == torch.float32
        # a row holds 1,024 red values, then green, then blue, each row by row
        red, green, blue = (pixels[:, k : k + 1024].reshape(-1, 32, 32) for k in (0, 1024, 2048))
        np.testing.assert_array_equal(items.x.numpy(), np.stack((red, green, blue), 1))
        assert items.condition.tolist() == labels
    assert data.num_classes == 10 and data.levels == 256


def test_levels_are_kept_in_bytes(archive):
    items, _ = read(archive)._held("train")
    assert items.x.dtype == torch.uint8


@pytest.mark.parametrize("place", ["archive", "folder", "beside the archive", "beside the folder"])
def test_every_place_that_a_path_may_mean(archive, place, monkeypatch):
    folder = unpack(archive)
    path = {"archive": archive, "folder": folder}.get(place, archive.parent)
    if place == "beside the archive":
        folder.rename(folder.with_name("elsewhere"))
    if place == "beside the folder":
        archive.unlink()
    assert read(path).fingerprint() == read(path).fingerprint()
    assert torch.equal(read(path).all("test").x[:, 0, 0, 0], torch.zeros(20))
    monkeypatch.setenv("HOME", str(archive.parent))
    assert read(f"~/{path.name if path != archive.parent else ''}").size("test") == 20


def test_fewer_bits_are_the_upper_ones(archive):
    fine, coarse = read(archive).all("test").x, read(archive, bits=5)
    assert torch.equal(coarse.all("test").x, (fine / 8).floor()) and coarse.levels == 32
    assert coarse.baselines() == {"uniform": 5.0}
    y, _ = context(coarse.facts())["transform"](coarse.all("test").x, BatchNoise(20, generator=generator("y")))
    assert -1 <= y.min() < -0.99 and 0.99 < y.max() < 1


def test_labels_are_condition_target_or_nothing(archive):
    generate, without, classify = read(archive), read(archive, labels=False), read(archive, task="classify")
    labels = generate.all("val").condition
    assert without.all("val").condition is None and without.num_classes is None
    assert torch.equal(classify.all("val").target, labels) and classify.all("val").condition is None
    assert classify.target_shape == (10,) and classify.num_classes is None
    y, _ = context(classify.facts())["transform"](classify.all("val").x)
    assert y.min() == -1 and y.max() == 1


def test_flipped_images_follow_the_others_with_their_labels(archive):
    plain, flipped = read(archive), read(archive, flip=True)
    assert [flipped.size(split) for split in ("train", "val", "test")] == [180, 10, 20]
    rows = torch.tensor([95, 5])
    both = flipped.take("train", rows)
    assert torch.equal(both.x[0], both.x[1].flip(-1)) and not torch.equal(both.x[0], both.x[1])
    assert torch.equal(both.x[1], plain.all("train").x[5]) and len(set(both.condition.tolist())) == 1


def test_the_fingerprint_changes_with_files_and_options(archive, tmp_path):
    prints = [read(archive, **o).fingerprint() for o in ({}, {"val": 9}, {"bits": 5}, {"labels": False})]
    changed = cifar_batch("data_batch_3")
    changed[b"data"][7, 1000] ^= 1
    other = write_cifar_archive(tmp_path / "other.tar.gz", cifar_files(data_batch_3=python2_pickle(changed)))
    prints.append(read(other).fingerprint())
    assert len(set(prints)) == 5 and read(unpack(archive)).fingerprint() == prints[0]


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


def test_a_malicious_pickle_runs_nothing(tmp_path):
    import os

    witness = tmp_path / "witness"
    for call, arguments, name in (
        (os.system, (f"touch {witness}",), "posix.system"),
        (eval, (f"open({str(witness)!r}, 'w')",), "builtins.eval"),
        (np.load, (str(witness),), "numpy.load"),
        (np.ndarray.__reduce__, (np.empty(1),), "builtins.getattr"),
    ):
        evil = pickle.dumps({b"data": Malicious(call, *arguments), b"labels": [1]}, 4)
        archive = write_cifar_archive(tmp_path / "evil.tar.gz", cifar_files(data_batch_2=evil))
        found = message(archive)
        assert f"data_batch_2 asks for {name}" in found and "nothing of it was run" in found
        assert not witness.exists()


@pytest.mark.parametrize(("array", "kind"), [(np.array([1, "x"], dtype=object), "O8"), (np.zeros(3), "f8")])
def test_arrays_of_objects_and_other_types_are_refused(tmp_path, array, kind):
    evil = python2_pickle({b"data": array, b"labels": [1]})
    archive = write_cifar_archive(tmp_path / "evil.tar.gz", cifar_files(test_batch=evil))
    assert f"test_batch asks for an array of the type b'{kind}'" in message(archive)


def test_the_unpickler_reaches_no_code_of_numpy():
    import io

    content = python2_pickle(np.arange(6, dtype=np.uint8).reshape(2, 3))
    found = ByteArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    assert type(found).__module__ == cifar10.__name__ and found.array.tolist() == [[0, 1, 2], [3, 4, 5]]
    column_major = python2_pickle(np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)))
    found = ByteArrayUnpickler(io.BytesIO(column_major), encoding="bytes").load()
    assert found.array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_archive_that_is_cut_short(archive):
    content = archive.read_bytes()
    for share in (0.3, 0.9):
        archive.write_bytes(content[: int(share * len(content))])
        assert "cut short or damaged" in message(archive) and "170,498,071 bytes" in message(archive)
    assert f"cut short or damaged in {FOLDER}/test_batch" in message(archive)
    archive.write_bytes(content[:15])
    assert str(archive) in message(archive)
    archive.write_bytes(b"<html>not found</html>")
    assert "is no tar archive" in message(archive)


def test_a_batch_that_is_cut_short_is_told_from_an_altered_one(archive):
    folder = unpack(archive)
    whole = (folder / "data_batch_4").read_bytes()
    (folder / "data_batch_4").write_bytes(whole[:-500])
    for checksum in ("error", "warn", "ignore"):
        assert "data_batch_4 is cut short or damaged" in message(folder, checksum=checksum)
    (folder / "data_batch_4").write_bytes(whole)
    assert "data_batch_5, test_batch can be read, but are altered" in message(folder, checksum="error")
    with pytest.warns(AlteredData, match="test_batch can be read, but are altered"):
        assert read(folder, checksum="warn").size("test") == 20


def test_published_files_are_recognised(archive, monkeypatch, recwarn):
    import hashlib

    files = cifar_files()
    monkeypatch.setattr(cifar10, "MD5", {name: hashlib.md5(files[name]).hexdigest() for name in BATCHES})
    assert read(archive, checksum="error").size("val") == 10
    assert not list(recwarn)


def test_missing_files_are_named(tmp_path):
    archive = write_cifar_archive(tmp_path / "a.tar.gz", cifar_files(data_batch_2=None, test_batch=None))
    assert "lacks data_batch_2, test_batch; it holds cifar-10-batches-py/data_batch_1" in message(archive)
    folder = unpack(archive)
    assert "lacks data_batch_2, test_batch" in message(folder)
    binary = write_cifar_archive(tmp_path / "b.tar.gz", {f"{name}.bin": b"1" for name in BATCHES})
    assert "looks like the binary or MATLAB version" in message(binary)
    assert "there is no" in message(tmp_path / "nowhere.tar.gz") and "University of Toronto" in message(tmp_path / "no")
    (tmp_path / "other").mkdir()
    assert "holds nothing" in message(tmp_path / "other")
    (tmp_path / "other" / "data_batch_1.mat").touch()
    assert "it holds data_batch_1.mat. Those look like the binary or MATLAB version" in message(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {b"data": np.zeros((20, 3071), np.uint8)},
            r"array of bytes [N, 3072] (3 x 32 x 32), found the shape [20, 3071]",
        ),
        ({b"data": np.zeros(20 * 3072, np.uint8)}, "found the shape [61440]"),
        ({b"data": [1, 2]}, "found no array"),
        ({b"labels": [1] * 19}, "a list of 20 integers 0 … 9, one for each image, found 19 values"),
        ({b"labels": [1] * 19 + [10]}, "found 20 values, some of them others"),
        ({b"labels": [-1] + [1] * 19}, "found 20 values, some of them others"),
        ({b"labels": None}, "found NoneType"),
        (None, "a dictionary with b'data' and b'labels' is needed, found list"),
        ("cifar100", "looks like CIFAR-100"),
    ],
)
def test_wrong_contents_are_named(tmp_path, change, expected):
    batch = cifar_batch("data_batch_1")
    content = [1] if change is None else batch | change if isinstance(change, dict) else batch
    if change == "cifar100":
        content[b"fine_labels"] = content.pop(b"labels")
    archive = write_cifar_archive(tmp_path / "a.tar.gz", cifar_files(data_batch_1=python2_pickle(content)))
    found = message(archive)
    assert expected in found and "data_batch_1" in found and str(archive) in found


@pytest.mark.parametrize(
    ("arguments", "expected"), [({"bits": 9}, "data.bits: 1 … 8"), ({"val": 100}, "data.val: 0 … 99")]
)
def test_impossible_arguments_are_refused(archive, arguments, expected):
    assert expected in message(archive, **arguments)
