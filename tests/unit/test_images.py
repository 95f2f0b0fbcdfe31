"""A folder of pictures: which items it gives, how they are split, cached and named, and what is refused."""

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels import files
from genmodels.data import image_cache, images
from genmodels.data.dataset import SPLITS, context
from genmodels.data.folders import assign, find, position
from genmodels.data.image_cache import CacheWarning
from genmodels.data.images import ImageFolder
from genmodels.hashing import fingerprint_files
from genmodels.registry import ConfigError
from tests.data_files import picture, write_pictures


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", 40)


def read(path, **arguments) -> ImageFolder:
    return ImageFolder(**{"path": str(path), "val": 6, "test": 4, **arguments})


def everything(data: ImageFolder, split: str):
    return data.take(split, torch.arange(data.size(split)))


def test_items_are_the_files_each_in_one_split(folder):
    data = read(folder, labels=True)
    assert [data.size(split) for split in SPLITS] == [30, 6, 4] and data.shape == (3, 8, 8)
    known = {picture(k).transpose(2, 0, 1).tobytes(): k for k in range(40)}
    found = {}
    for split in SPLITS:
        items = everything(data, split)
        assert items.x.dtype == torch.float32 and items.target is None
        for x, label in zip(items.x, items.condition.tolist(), strict=True):
            k = known[x.byte().numpy().tobytes()]
            assert label == k % 2
            found.setdefault(k, []).append(split)
    assert len(found) == 40 and all(len(splits) == 1 for splits in found.values())
    assert data.classes == ("class0", "class1") and data.num_classes == 2


def test_labels_are_condition_target_or_nothing(folder):
    plain, classify = read(folder), read(folder, task="classify")
    assert everything(plain, "val").condition is None and plain.num_classes is None
    assert torch.equal(everything(classify, "val").target, everything(read(folder, labels=True), "val").condition)
    assert classify.target_shape == (2,) and classify.num_classes is None
    y, _ = context(classify.facts())["transform"](everything(classify, "val").x)
    assert y.min() == -1 and y.max() == 1


def test_mirrored_items_follow_the_others_with_their_labels(folder):
    plain, flipped = read(folder, labels=True), read(folder, labels=True, flip=True)
    assert [flipped.size(split) for split in SPLITS] == [60, 6, 4]
    rows = torch.tensor([33, 3, 59])
    both, alone = flipped.take("train", rows), plain.take("train", torch.tensor([3, 3, 29]))
    assert torch.equal(both.x[0], alone.x[0].flip(-1)) and torch.equal(both.x[1], alone.x[1])
    assert torch.equal(both.x[2], alone.x[2].flip(-1)) and torch.equal(both.condition, alone.condition)


def test_files_are_found_by_suffix_at_any_depth(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for k, name in enumerate(("A.PNG", "a/x.Jpeg", "a/b/y.tiff", "z.webp", ".hidden/no.png", "a/._x.png")):
        Image.fromarray(picture(k)).save(folder / name, format="PNG")
    (folder / "a" / "notes.txt").touch()
    (folder / "linked").symlink_to(folder / "a")
    (folder / "a" / "b" / "loop").symlink_to(folder)
    assert find(folder, images.SUFFIXES, "images") == ["A.PNG", "a/b/y.tiff", "a/x.Jpeg", "z.webp"]
    other = tmp_path / "links"
    other.mkdir()
    (other / "class").symlink_to(folder / "a")
    inside = ["class/b/loop/A.PNG", "class/b/loop/z.webp", "class/b/y.tiff", "class/x.Jpeg"]
    assert find(other, images.SUFFIXES, "images") == inside  # each folder once


def test_the_home_folder_is_expanded(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = read("~/pictures", cache="~/cache")
    assert data.size("train") == 30 and (tmp_path / "cache").is_dir()


# ---- splits ----


def names(n: int) -> list[str]:
    return [f"class{k % 3}/{k}.png" for k in range(n)]


def chosen(known: list[str], val, test) -> dict[str, str]:
    split = assign(known, val, test)
    return {known[k]: s for s in split for k in split[s]}


def test_the_split_is_the_documented_rule():
    known = names(300)
    split = chosen(known, 0.1, 0.25)
    for name, found in split.items():
        u = position(name)
        assert 0 <= u < 1 and found == ("test" if u < 0.25 else "val" if u >= 0.9 else "train")
    u = sorted(map(position, known))
    counts = chosen(known, 7, 9)
    assert {n for n, s in counts.items() if s == "test"} == {n for n in known if position(n) < u[9]}
    assert {n for n, s in counts.items() if s == "val"} == {n for n in known if position(n) > u[-8]}


def test_positions_are_uniform():
    u = np.sort([position(name) for name in names(4000)])
    # Kolmogorov-Smirnov, 1.95/sqrt(n) at the 0.1 % level
    assert np.abs(u - np.arange(4000) / 4000).max() < 1.95 / 4000**0.5


def test_added_files_move_no_other():
    before, after = chosen(names(200), 0.1, 0.1), chosen(names(300), 0.1, 0.1)
    assert all(after[name] == split for name, split in before.items())
    one_more = chosen(names(201), 10, 20)
    moved = [name for name, split in chosen(names(200), 10, 20).items() if one_more[name] != split]
    assert len(moved) <= 1


def test_order_within_a_split_is_random_and_small_fractions_give_one():
    known = [f"class{k // 100}/{k}.png" for k in range(300)]
    train = assign(known, 0.1, 0.1)["train"]
    assert len({known[k].split("/")[0] for k in train[:12]}) == 3
    small = assign(names(4), 1e-9, 1e-9)
    assert [len(small[split]) for split in SPLITS] == [2, 1, 1]
    none = assign(names(4), 0, 0.0)
    assert [len(none[split]) for split in SPLITS] == [4, 0, 0]


# ---- cache ----


def test_the_cache_holds_the_same_items_and_nothing_else_is_written(folder, tmp_path, monkeypatch):
    options = {"size": 5, "labels": True, "flip": True}
    plain = read(folder, **options)
    before = sorted(tmp_path.rglob("*"))
    data = read(folder, cache=str(tmp_path / "cache"), **options)
    made = sorted(set(tmp_path.rglob("*")) - set(before))
    assert made[0] == tmp_path / "cache" and sorted(p.suffix for p in made) == ["", ".json", ".lock", ".npy"]
    assert np.load(next(made[0].glob("*.npy"))).dtype == np.uint8
    monkeypatch.setattr(images.Decoder, "__call__", lambda *_: pytest.fail("decoded again"))
    again = read(folder, cache=str(tmp_path / "cache"), **options)
    monkeypatch.undo()
    for split in SPLITS:
        for found in (data, again):
            assert torch.equal(everything(found, split).x, everything(plain, split).x)
            assert torch.equal(everything(found, split).condition, everything(plain, split).condition)
    assert data.fingerprint() == plain.fingerprint()
    items, _ = again._held("train")
    assert len(pickle.dumps(items.read)) < 1000 < 40 * 75  # the map is opened anew, not copied


def test_other_files_or_options_make_another_cache(folder, tmp_path):
    cache = tmp_path / "cache"

    def count(**options) -> int:
        read(folder, cache=str(cache), **options)
        return len(list(cache.glob("*.npy")))

    assert [count(), count(), count(val=3), count(channels=1), count(size=4), count(size=4, filter="box")] == [
        *(1, 1, 1, 2, 3, 4)
    ]
    Image.fromarray(picture(99)).save(folder / "class0" / "000.png")
    assert count() == 5
    new = read(folder, cache=str(cache))
    assert torch.equal(everything(new, "train").x, everything(read(folder), "train").x)


@pytest.mark.parametrize("harm", ["npy", "cut", "json", "gone"])
def test_a_damaged_cache_is_made_again(folder, tmp_path, harm):
    cache = tmp_path / "cache"
    expected = everything(read(folder, cache=str(cache)), "train").x
    (array,), (manifest,) = cache.glob("*.npy"), cache.glob("*.json")
    content = bytearray(array.read_bytes())
    content[-9] ^= 1
    {
        "npy": lambda: array.write_bytes(content),
        "cut": lambda: array.write_bytes(content[:-100]),
        "json": lambda: manifest.write_text("{"),
        "gone": array.unlink,
    }[harm]()
    with pytest.warns(CacheWarning, match="does not agree with its manifest; it is made again"):
        data = read(folder, cache=str(cache))
    assert torch.equal(everything(data, "train").x, expected)


def test_a_cache_appears_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    Image.fromarray(picture(0, 64, 64)).save(folder / "class1" / "zz.bmp")
    whole = (folder / "class1" / "zz.bmp").read_bytes()
    (folder / "class1" / "zz.bmp").write_bytes(whole[:-500])  # found only when it is decoded, last of all
    with pytest.raises(ConfigError, match=r"zz\.bmp cannot be decoded"):
        read(folder, size=8, cache=str(tmp_path / "cache"))
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    (folder / "class1" / "zz.bmp").write_bytes(whole)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        ConfigError, match=r"data\.cache: .*cannot hold the decoded images.*No space left.*Choose another"
    ):
        read(folder, size=8, cache=str(tmp_path / "cache"))
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_manifest_says_what_was_decoded(folder, tmp_path):
    read(folder, size=5, cache=str(tmp_path))
    manifest = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert manifest["source"]["decoder"]["size"] == 5 and manifest["shape"] == [40, 3, 5, 5]
    assert manifest["fingerprint"] == fingerprint_files(tmp_path.glob("*.npy"), tmp_path)


@pytest.mark.parametrize("cached", [False, True])
def test_items_are_read_by_worker_processes(folder, tmp_path, cached):
    data = read(folder, size=5, flip=True, cache=str(tmp_path / "cache") if cached else None)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return data.size("train")

        def __getitems__(self, rows: list[int]):
            return data.take("train", torch.tensor(rows)).x

    loader = torch.utils.data.DataLoader(Rows(), batch_size=16, num_workers=2, collate_fn=lambda x: x)
    assert torch.equal(torch.cat(list(loader)), everything(data, "train").x)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(everything(copy, "test").x, everything(data, "test").x)


# ---- fingerprint ----


def test_the_fingerprint_changes_with_contents_and_options_alone(folder, tmp_path):
    prints = [read(folder).fingerprint()]
    for options in ({"size": 5}, {"size": 5, "filter": "box"}, {"val": 7}, {"flip": True}, {"labels": True}):
        prints.append(read(folder, **options).fingerprint())
    os.utime(folder / "class0" / "000.png", (1, 1))
    elsewhere = folder.rename(tmp_path / "elsewhere")
    assert read(elsewhere).fingerprint() == prints[0]
    path = elsewhere / "class0" / "000.png"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # of the last checksum, which decoders do not look at
    path.write_bytes(content)
    prints.append(read(elsewhere).fingerprint())
    path.rename(elsewhere / "class0" / "0.png")
    prints.append(read(elsewhere).fingerprint())
    assert len(set(prints)) == len(prints)


# ---- errors ----


def test_the_folder_must_hold_images(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "file.zip").touch()
    cases = {
        "picture": r"there is no folder .*picture\. Did you mean 'pictures'\?",
        "file.zip": "is a file. A folder of images is needed",
        "pictures": r"holds no images. Looked .* for \.bmp, .*\.webp; found no files at all",
    }
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / name)
    for name in ("a.heic", "b.heic", "c.txt", "README"):
        (tmp_path / "pictures" / name).touch()
    with pytest.raises(ConfigError, match=r"found 2 \.heic, 1 .*txt"):
        read(tmp_path / "pictures")


def test_sizes_must_agree_or_be_asked_for(folder):
    path = folder / "class1" / "odd.png"
    Image.fromarray(picture(0, 8, 9)).save(path)
    with pytest.raises(ConfigError, match=r"000\.png is 8 x 8 pixels and .*odd\.png is 9 x 8, .*for example to 8"):
        read(folder)
    with pytest.raises(ConfigError, match=r"odd\.png is 9 x 8 pixels, .*'none'\. Choose data\.resize=crop"):
        read(folder, size=8, resize="none")
    assert read(folder, size=8).size("train") == 31
    with pytest.raises(ConfigError, match=r"too small for data\.size=9.* 40 more of 41 files cannot be used: .*…"):
        read(folder, size=9)
    assert read(folder, size=9, upscale=True).shape == (3, 9, 9)


def test_sizes_beyond_the_files_looked_at_are_named_when_they_are_met(folder, monkeypatch):
    monkeypatch.setattr(images, "CHECKED", 20)  # every second file
    path = folder / "class0" / "001.png"
    Image.fromarray(picture(0, 8, 9)).save(path)
    data = read(folder)
    with pytest.raises(ConfigError, match=r"000\.png is 8 x 8 pixels and .*001\.png is 9 x 8"):
        for split in SPLITS:
            everything(data, split)


def test_damaged_files_are_named_at_the_start(folder):
    for name, content in (("class0/002.png", b"<html>"), ("class1/003.png", None)):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-80] if content is None else content)
    with pytest.raises(ConfigError, match=r"002\.png is no image .* 1 more of 40 files cannot be used: 003\.png"):
        read(folder)


def test_files_that_vanish_are_named(folder):
    data = read(folder)
    (folder / "class0" / "002.png").unlink()
    with pytest.raises(ConfigError, match=r"002\.png cannot be read: No such file"):
        for split in SPLITS:
            everything(data, split)


def test_labels_need_sub_folders(folder):
    Image.fromarray(picture(0)).save(folder / "loose.png")
    with pytest.raises(ConfigError, match=r"data\.labels: .*loose\.png lies in no sub-folder"):
        read(folder, labels=True)
    assert read(folder).size("train") == 31


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val": 20, "test": 20}, "holds 40 images, and with data.val=20 and data.test=20 none is left to train on"),
        ({"val": 90, "test": 0}, "none is left"),
        ({"val": 1.0}, r"data.val: .*a fraction of them \(from 0.0, below 1.0\) is needed, found 1.0"),
        ({"test": -1}, "data.test: .*found -1"),
        ({"size": 0}, "data.size: must be at least 1"),
        ({"background": 256}, "data.background: a grey level 0 … 255"),
    ],
)
def test_impossible_arguments_are_refused(folder, arguments, message):
    with pytest.raises(ConfigError, match=message):
        read(folder, **arguments)


def test_progress_is_told_on_a_terminal_alone(folder, tmp_path, monkeypatch, capsys):
    read(folder, cache=str(tmp_path / "one"))
    assert capsys.readouterr().err == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(image_cache.sys, "stderr", terminal)
    read(folder, cache=str(tmp_path / "two"))
    assert terminal.getvalue() == "\rdecoding images 40/40\n"
