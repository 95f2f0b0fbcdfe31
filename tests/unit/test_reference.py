"""Files of statistics as others read and write them, the cache of features, and the command that makes the files."""

import io
import re
import threading
import warnings
import zlib

import numpy as np
import pytest
import torch

from genmodels.data.digits import Digits
from genmodels.metrics import reference
from genmodels.metrics.features import DigitsFeatures, Pixels, features_of
from genmodels.metrics.reference import (
    ReferenceWarning,
    cache_folder,
    keep_features,
    kept_features,
    read_statistics,
    write_statistics,
)
from genmodels.metrics.reference_command import main, statistics_of
from genmodels.metrics.statistics import gaussian
from genmodels.registry import ConfigError
from tests.evaluation_fakes import Levels


def cached(extractor, data, split, compute):
    """What the evaluator does with a costly extractor."""
    found = kept_features(extractor, data, split)
    return keep_features(extractor, data, split, compute()) if found is None else found


def vectors(n=200, d=5, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 3


def stored(path, **arrays):
    np.savez(path, **arrays)
    return path


def moments(dtype=np.float64, n=200):
    found = gaussian(vectors(n))
    return {"mu": found.mean.numpy().astype(dtype), "sigma": found.covariance.numpy().astype(dtype)}


# ---- files -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    found, path = gaussian(vectors()), tmp_path / "s.npz"
    write_statistics(path, found, {"dataset": "levels", "split": "train"})
    read, facts = read_statistics(path)
    assert torch.equal(read.mean, found.mean) and torch.allclose(read.covariance, found.covariance, rtol=1e-15)
    assert read.n == 200 and facts["dataset"] == "levels" and facts["n"] == 200
    again = tmp_path / "t.npz"
    write_statistics(again, found, {"dataset": "levels", "split": "train"})
    assert again.read_bytes() == path.read_bytes()  # so that a checksum means the contents
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.npz", "t.npz"]


def test_other_tools_find_what_they_look_for(tmp_path):
    path, x = tmp_path / "s.npz", vectors()
    write_statistics(path, gaussian(x), {"split": "train"})
    with np.load(path) as file:  # as pytorch-fid, clean-fid and EDM do
        mu, sigma = file["mu"][:], file["sigma"][:]
    assert mu.dtype == sigma.dtype == np.float64
    assert np.allclose(mu, x.numpy().mean(0), rtol=1e-14)
    assert np.allclose(sigma, np.cov(x.numpy(), rowvar=False), rtol=1e-12, atol=1e-14)


def test_files_of_other_tools_are_read(tmp_path):
    plain = read_statistics(stored(tmp_path / "edm.npz", **moments()))
    more = {"mu_s": np.zeros(7), "sigma_s": np.eye(7), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
    guided = read_statistics(stored(tmp_path / "guided.npz", **moments(), **more))
    np.savez_compressed(tmp_path / "packed.npz", **moments())
    packed = read_statistics(tmp_path / "packed.npz")
    for found in (plain, guided, packed):
        assert found.gaussian.n is None and found.facts == {}
        assert torch.equal(found.gaussian.mean, torch.from_numpy(moments()["mu"]))


def spoilt(key, change):
    arrays = moments()
    arrays[key] = change(arrays[key].copy())
    return arrays


def put(array, place, value):
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(3)}, r"no 'sigma'.*found mu"),
        ({"mu_s": np.zeros(3), "sigma_s": np.eye(3)}, r"no 'mu'.*found nothing"),
        (spoilt("mu", lambda a: a[:3]), r"\[3\] and \[5, 5\]"),
        (spoilt("mu", lambda a: a[None]), r"\[1, 5\]"),
        (spoilt("mu", lambda a: a[:, None]), r"\[5, 1\]"),
        (spoilt("sigma", lambda a: a[:, :3]), r"\[5\] and \[5, 3\]"),
        (spoilt("mu", lambda a: put(a, 2, np.nan)), "NaN"),
        (spoilt("sigma", lambda a: put(a, (1, 1), np.inf)), "infinity"),
        (spoilt("sigma", lambda a: put(a, (0, 1), a[0, 1] + 1e-6)), "not symmetric"),
        (spoilt("sigma", lambda a: put(a, (1, 1), -0.5)), "no covariance.*negative eigenvalues"),
        (spoilt("sigma", lambda a: (a * 100).astype(np.int64)), "floating-point.*int64"),
        (moments() | {"n": np.array(1)}, "n must be at least 2"),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, r"no readable \.npz file of plain arrays"),
    ],
)
def test_what_is_no_mean_and_covariance_is_refused(tmp_path, arrays, words):
    with pytest.raises(ValueError, match=rf"statistics: .*bad\.npz.*{words}"):
        read_statistics(stored(tmp_path / "bad.npz", **arrays))


def test_rounding_may_make_a_covariance_not_quite_symmetric(tmp_path):
    arrays = spoilt("sigma", lambda a: put(a, (0, 1), a[0, 1] + 1e-10))
    read, _ = read_statistics(stored(tmp_path / "s.npz", **arrays))
    assert torch.equal(read.covariance, read.covariance.T)


def test_damaged_files_are_named(tmp_path):
    path = stored(tmp_path / "bad.npz", **moments())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    np.save(tmp_path / "single.npy", np.zeros(3))
    single = (tmp_path / "single.npy").read_bytes()
    np.savez_compressed(tmp_path / "packed.npz", **moments())
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[60:64] = b"\xff" * 4  # no deflate stream
    with pytest.raises(zlib.error):
        dict(np.load(io.BytesIO(packed)))
    for data in (whole[: len(whole) // 2], flipped, packed, b"", b"<html>not found</html>", single):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.npz is no readable"):
            read_statistics(path)
    with pytest.raises(ConfigError, match="there is no file"):
        read_statistics(tmp_path / "nothing.npz")


def test_single_precision_is_read_with_a_warning(tmp_path):
    with pytest.warns(ReferenceWarning, match=r"single\.npz does not hold float64.*float32"):
        read, _ = read_statistics(stored(tmp_path / "single.npz", **moments(np.float32)))
    assert read.covariance.dtype == torch.float64
    assert torch.allclose(read.covariance, gaussian(vectors()).covariance, rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_statistics(stored(tmp_path / "double.npz", **moments()))


# ---- cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("GENMODELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


class Counted:
    """Features of a split, and how often they were computed."""

    def __init__(self, data, split, extractor=None):
        self.data, self.split, self.extractor, self.calls = data, split, extractor or Pixels(3.0), 0

    def __call__(self):
        self.calls += 1
        return features_of(self.extractor, self.data, self.split, 50)

    def get(self):
        return cached(self.extractor, self.data, self.split, self)


def test_features_are_computed_once(folder):
    ask = Counted(Levels(), "train")
    first, second = ask.get(), ask.get()
    assert ask.calls == 1 and first.dtype == torch.float32 and torch.equal(first, second)
    assert torch.equal(first, features_of(Pixels(3.0), Levels(), "train", 300).float())
    (path,) = folder.iterdir()
    read, facts = read_statistics(path)  # the same file, for other tools too
    assert torch.allclose(read.covariance, gaussian(first).covariance) and read.n == 300
    assert facts["extractor_id"] == "pixels-v1:3" and facts["split"] == "train"


def test_features_in_another_order_are_computed_again(folder):
    ask = Counted(Levels(), "train")
    first = ask.get()
    (path,) = folder.iterdir()
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"ids": arrays["ids"][::-1], "features": arrays["features"][::-1]})
    with pytest.warns(ReferenceWarning, match="not what its name says"):
        assert torch.equal(ask.get(), first) and ask.calls == 2


def test_other_data_splits_and_extractors_have_their_own_file(folder):
    asked = [
        Counted(Levels(), "train"),
        Counted(Levels(), "test"),
        Counted(Levels(sizes=(301, 20, 200)), "train"),
        Counted(Levels(), "train", Pixels(2.0)),
    ]
    found = [ask.get() for ask in asked]
    assert [ask.calls for ask in asked] == [1, 1, 1, 1] and len(list(folder.iterdir())) == 4
    assert [len(z) for z in found] == [300, 200, 301, 300]
    assert torch.allclose(found[3], found[0] * 1.5)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def _flip(path):
    data = bytearray(path.read_bytes())
    place = data.index(b"features.npy") + 500
    data[place] ^= 1
    path.write_bytes(bytes(data))


def _other(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | {"extractor_id": np.array("another")}))


def _fewer(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | {"features": arrays["features"][:-1], "ids": arrays["ids"][:-1]}))


def _torn(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **(arrays | {"features": arrays["features"][:-1]}))


@pytest.mark.parametrize("damage", [_cut, _flip, _other, _fewer, _torn, lambda p: p.write_text("nothing")])
def test_a_damaged_or_foreign_file_is_made_again(folder, damage):
    ask = Counted(Levels(), "train")
    first = ask.get()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    damage(path)
    with pytest.warns(ReferenceWarning, match="made again"):
        assert torch.equal(ask.get(), first)
    assert ask.calls == 2 and path.read_bytes() == whole
    ask.get()
    assert ask.calls == 2


def test_several_may_write_at_once(folder):
    asked = [Counted(Levels(), "train") for _ in range(8)]
    threads = [threading.Thread(target=ask.get) for ask in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(folder.iterdir())) == 1
    last = Counted(Levels(), "train")
    last.get()
    assert last.calls == 0


def test_features_outlive_a_folder_that_cannot_be_written(folder):
    folder.parent.write_text("a file where the folder should be")
    ask = Counted(Levels(), "train")
    with pytest.warns(ReferenceWarning, match="not kept in .*GENMODELS_CACHE"):
        assert len(ask.get()) == 300


def test_features_that_are_not_finite_are_not_kept(folder):
    cached(Pixels(), Levels(), "train", lambda: torch.full((300, 3), torch.nan))
    assert not folder.exists()


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("GENMODELS_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "genmodels" / "features"
    monkeypatch.setenv("GENMODELS_CACHE", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere" / "features"


# ---- command -----------------------------------------------------------------------------------------------------


def test_command_writes_the_statistics_of_a_split(tmp_path, capsys):
    path = tmp_path / "digits.npz"
    words = ["digits", "--features", "digits", "--split", "test", "--out", str(path), "--batch-size", "37"]
    assert main(words) == 0
    assert "500 items of the split 'test', 64 features" in capsys.readouterr().out
    read, facts = read_statistics(path)
    exact = features_of(DigitsFeatures(), Digits(), "test", 500).double()
    assert torch.allclose(read.mean, exact.mean(0), atol=1e-5)  # float32 features differ between batch sizes
    assert torch.allclose(read.covariance, torch.cov(exact.T), atol=1e-4)
    assert facts == {
        "n": 500,
        "dataset": "digits",
        "fingerprint": Digits().fingerprint(),
        "split": "test",
        "extractor_id": DigitsFeatures().identity,
        "genmodels_schema": reference.SCHEMA,
    }
    before = path.read_bytes()
    assert main(words) == 2 and "--force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0 and path.read_bytes() == before


def test_command_takes_a_folder_of_images_whole(tmp_path):
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), dtype=np.uint8)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(pictures / f"{k:02d}.png")
    path = tmp_path / "p.npz"
    assert main([str(pictures), "--features", "{name: pixels, scale: 255}", "--out", str(path)]) == 0
    read, facts = read_statistics(path)
    exact = pixels.transpose(0, 3, 1, 2).reshape(30, -1) / 255
    assert read.n == 30 and facts["dataset"] == "image_folder"
    assert np.allclose(np.sort(read.mean), np.sort(exact.mean(0))) and np.allclose(
        read.covariance.trace(), np.cov(exact.T).trace()
    )


def test_an_extractor_is_made_ready_before_the_first_item():
    class Ready(Pixels):
        told = None

        def start(self, dataset, device):
            self.told = dataset, device

        def __call__(self, x):
            assert self.told == (data, torch.device("cpu"))
            return super().__call__(x)

    data = Levels()
    found = statistics_of(Ready(), data, "test", torch.device("cpu"), 33)
    assert found.n == 200 and torch.allclose(found.covariance, torch.cov(data.all("test").x.double().T))
    with pytest.raises(ConfigError, match="'val' has 1 items"):
        statistics_of(Ready(), Levels(sizes=(5, 1, 5)), "val", torch.device("cpu"), 33)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--features", "digitz", "--out", "x.npz"], "Did you mean 'digits'"),
        (["digits", "--features", "digits", "--out", "x.pkl"], r"ends in \.npz"),
        (["digits", "--features", "digits", "--out", "no/such/x.npz"], "no folder"),
        (["{name: digits", "--features", "digits", "--out", "x.npz"], "no name and no YAML"),
        (["digits", "--features", "digits", "--batch-size", "0", "--out", "x.npz"], "at least 1"),
        ([".", "--features", "digits", "--split", "test", "--out", "x.npz"], "taken whole"),
        (["toy", "--features", "pixels", "--out", "x.npz"], "no Dataset is called"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_vectors_are_whole(tmp_path):
    mean, covariance = vectors().mean(0).numpy(), np.eye(5)
    for n, expected in ((200.0, 200), (np.int32(7), 7)):
        np.savez(tmp_path / "s.npz", mu=mean, sigma=covariance, n=n)
        assert read_statistics(tmp_path / "s.npz").gaussian.n == expected
    for n in (3.5, "many"):
        np.savez(tmp_path / "s.npz", mu=mean, sigma=covariance, n=n)
        with pytest.raises(ValueError, match="n must be a whole number"):
            read_statistics(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    with pytest.raises(ValueError, match=r"mu must be \[D\]"):
        read_statistics(tmp_path / "s.npz")
