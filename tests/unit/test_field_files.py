"""Maps in the user's files: how fields are cut from them, split, cached and fingerprinted, and what is refused."""

import math

import numpy as np
import pytest
import torch

from genmodels.data import fits
from genmodels.data.field_files import FieldFiles, window
from genmodels.data.image_cache import CacheWarning
from genmodels.registry import ConfigError
from tests.data_files import fits_unit, write_fits

SPLITS = ("train", "val", "test")


def maps(count: int = 10, height: int = 6, width: int = 8) -> np.ndarray:
    """Map k has whole numbers between 1000 k and 1000 k + 999, and so every field tells its map."""
    values = np.random.default_rng(0).integers(0, 1000, (count, height, width))
    return (values + 1000 * np.arange(count).reshape(-1, 1, 1)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    """The same maps as FITS files in a sub-folder."""
    place = tmp_path / "maps" / "deep"
    place.mkdir(parents=True)
    for k, values in enumerate(maps()):
        (place / f"kappa_{k:02}.fits").write_bytes(fits_unit(values))
    return tmp_path / "maps"


def everything(data: FieldFiles) -> torch.Tensor:
    return torch.cat([data.take(split, torch.arange(data.size(split))).x for split in SPLITS])


def sources(x: torch.Tensor) -> list[int]:
    """[N] the number of the map of each field."""
    return (x.flatten(1).amin(1) // 1000).long().tolist()


def test_fields_are_the_maps_in_float32(folder, tmp_path):
    data = FieldFiles(str(folder), val=2, test=3)
    assert [data.size(split) for split in SPLITS] == [5, 2, 3] and data.shape == (1, 6, 8)
    x = everything(data)
    assert x.dtype == torch.float32 and sorted(sources(x)) == list(range(10))
    assert torch.equal(x[:, 0], torch.from_numpy(maps())[sources(x)])
    assert data.periodic is False and FieldFiles(str(folder), periodic=True).facts()["periodic"] is True
    assert data.checks() == ["10 maps of 6 x 8 pixels in 10 files, 1 field of each"]
    assert data.facts()["transform"] == {"name": "standardize_channels"}


@pytest.mark.parametrize("form", ["one", "several", "channel", "npz", "flat"])
def test_stacks_hold_the_same_maps(tmp_path, form):
    values, options = maps(), {}
    place = tmp_path / "stacks"
    place.mkdir()
    if form == "npz":
        np.savez(place / "a.npz", kappa=values, mask=np.zeros(3))
        options = {"array": "kappa"}
    elif form == "flat":
        for k, one in enumerate(values):
            np.save(place / f"{k}.npy", one.astype(">f8"))
    elif form == "several":
        np.save(place / "a.npy", values[:7])
        np.save(place / "b.npy", values[7:].astype(np.int32))
    else:
        np.save(place / "a.npy", values[:, None] if form == "channel" else values)
    data = FieldFiles(str(place), val=2, test=2, **options)
    x = everything(data)
    assert sorted(sources(x)) == list(range(10)) and torch.equal(x[:, 0], torch.from_numpy(values)[sources(x)])
    if form == "one":
        alone = FieldFiles(str(place / "a.npy"), val=2, test=2)
        assert sorted(sources(everything(alone))) == list(range(10))
        np.save(place / "renamed.npy", values)
        renamed = FieldFiles(str(place / "renamed.npy"), val=2, test=2)
        assert renamed.fingerprint() == alone.fingerprint() and torch.equal(everything(renamed), everything(alone))


def test_a_large_stack_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("genmodels.data.field_files.SOME", 3)
    np.save(tmp_path / "a.npy", maps())
    x = everything(FieldFiles(str(tmp_path / "a.npy"), val=1, test=1))
    assert sorted(sources(x)) == list(range(10))
    assert torch.equal(x[:, 0], torch.from_numpy(maps())[sources(x)])


def test_pooling_averages_blocks_and_tiles_lie_about_the_centre(folder):
    data = FieldFiles(str(folder), pool=2, val=1, test=1)
    pooled = maps().reshape(10, 3, 2, 4, 2).mean((2, 4))
    x = everything(data)
    assert data.shape == (1, 3, 4)
    np.testing.assert_allclose(x[:, 0], pooled[sources(x)], rtol=1e-6)
    tiles = FieldFiles(str(folder), crop=3, val=1, test=1)
    assert tiles.shape == (1, 3, 3) and [tiles.size(split) for split in SPLITS] == [32, 4, 4]
    x = everything(tiles)
    for k, found in zip(sources(x)[::4], x[:, 0].reshape(10, 4, 3, 3).numpy(), strict=True):
        expected = [maps()[k, i : i + 3, j : j + 3] for i in (0, 3) for j in (1, 4)]
        assert np.array_equal(found, np.stack(expected))
    assert "4 fields of each" in tiles.checks()[0]


def test_all_tiles_of_a_map_are_in_one_split(folder):
    for tiles in ("regular", "random"):
        data = FieldFiles(str(folder), crop=2, tiles=tiles, val=0.3, test=0.3)
        of = [set(sources(data.take(split, torch.arange(data.size(split))).x)) for split in SPLITS]
        assert not (of[0] & of[1] or of[0] & of[2] or of[1] & of[2]) and len(of[0] | of[1] | of[2]) == 10
        assert sum(data.size(split) for split in SPLITS) == 120


def test_random_tiles_are_parts_of_their_map_and_follow_the_seed(folder):
    first, again, other = (FieldFiles(str(folder), crop=3, tiles="random", seed=s, val=1, test=1) for s in (0, 0, 1))
    x = everything(first)
    assert torch.equal(x, everything(again)) and not torch.equal(x, everything(other))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    corners = set()
    for k, tile in zip(sources(x), x[:, 0].numpy(), strict=True):
        parts = np.lib.stride_tricks.sliding_window_view(maps()[k], (3, 3))
        (place,) = np.argwhere((parts == tile).all((2, 3)))
        corners.add(tuple(place.tolist()))
    assert max(i for i, _ in corners) == 3 and max(j for _, j in corners) == 5 and min(min(corners)) == 0


def test_a_window_fades_to_the_mean_at_the_borders(folder):
    data, plain = (FieldFiles(str(folder), apodize=a, val=1, test=1) for a in (0.25, 0.0))
    x, whole = everything(data).double()[:, 0], everything(plain).double()[:, 0]
    rows = [(1 - math.cos(math.pi * (i + 0.5) / 1.5)) / 2 if i < 1 else 1.0 for i in (0, 1, 2, 2, 1, 0)]
    columns = [(1 - math.cos(math.pi * (i + 0.5) / 2)) / 2 if i < 2 else 1.0 for i in (0, 1, 2, 3, 3, 2, 1, 0)]
    mask = torch.outer(torch.tensor(rows), torch.tensor(columns))
    mean = whole.mean((1, 2), keepdim=True)
    torch.testing.assert_close(x, mean + mask * (whole - mean), rtol=1e-6, atol=1e-3, check_dtype=False)
    assert data.fingerprint() != plain.fingerprint()
    assert window(100, 0.5).mean() == pytest.approx(0.5) and window(7, 1e-9).tolist() == [1.0] * 7


def test_a_pattern_chooses_files(tmp_path):
    write_fits(tmp_path, 6)
    for k in range(3):
        (tmp_path / "Maps10" / f"WLconv_z1.50_{k:04}r.fits").write_bytes(fits_unit(maps(1)[0]))
    data = FieldFiles(str(tmp_path), pattern="WLconv_z1.00_*r.fits", val=1, test=1)
    assert sum(data.size(split) for split in SPLITS) == 6 and data.shape == (1, 8, 12)
    assert sum(FieldFiles(str(tmp_path), pattern="Maps10/*1.5*").size(split) for split in SPLITS) == 3
    with pytest.raises(ConfigError, match=r"data\.pattern: none of the 9 files.*'z2'; the first is Maps10/WLconv"):
        FieldFiles(str(tmp_path), pattern="z2")


def test_adding_files_moves_no_other_to_another_split(folder):
    before = FieldFiles(str(folder), val=0.3, test=0.3)
    of = {k: split for split in SPLITS for k in sources(before.take(split, torch.arange(before.size(split))).x)}
    for k in range(10, 20):
        (folder / "deep" / f"more_{k}.fits").write_bytes(fits_unit(maps(20)[k]))
    after = FieldFiles(str(folder), val=0.3, test=0.3)
    for split in SPLITS:
        found = sources(after.take(split, torch.arange(after.size(split))).x)
        assert all(of[k] == split for k in found if k in of)


def test_the_cache_holds_the_same_fields(folder, tmp_path, monkeypatch):
    options = {"crop": 3, "val": 2, "test": 2}
    plain, first = FieldFiles(str(folder), **options), FieldFiles(str(folder), **options, cache=str(tmp_path / "c"))
    assert torch.equal(everything(plain), everything(first)) and plain.fingerprint() == first.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(fits, "read_image", None)
        again = FieldFiles(str(folder), **options, cache=str(tmp_path / "c"))
        assert torch.equal(everything(again), everything(plain))
        with pytest.raises(TypeError):
            FieldFiles(str(folder), **{**options, "crop": 2}, cache=str(tmp_path / "c"))
    (array,) = [path for path in (tmp_path / "c").glob("*.npy") if path.with_suffix(".json").exists()]
    array.write_bytes(array.read_bytes()[:-1] + b"x")
    with pytest.warns(CacheWarning, match="made again"):
        mended = FieldFiles(str(folder), **options, cache=str(tmp_path / "c"))
    assert torch.equal(everything(mended), everything(plain))


def test_the_fingerprint_follows_contents_and_options(folder):
    first = FieldFiles(str(folder)).fingerprint()
    assert first == FieldFiles(str(folder), periodic=True).fingerprint()
    changed = [FieldFiles(str(folder), **o).fingerprint() for o in ({"pool": 2}, {"crop": 3}, {"val": 3}, {"test": 3})]
    (folder / "deep" / "kappa_00.fits").write_bytes(fits_unit(maps()[0] + 1))
    assert len({first, *changed, FieldFiles(str(folder)).fingerprint()}) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((6, 8), 2.5), r"bad\.fits holds the value 2\.5 everywhere.*Leave the file out"),
        (np.where(np.arange(48).reshape(6, 8) == 5, np.nan, 1.0), r"bad\.fits holds NaN or infinity"),
        (np.where(np.arange(48).reshape(6, 8) == 5, 1e300, 1.0), r"bad\.fits holds NaN or infinity"),
        (np.zeros((5, 8)), r"deep/kappa_00\.fits holds maps of \[6, 8\].*bad\.fits of \[5, 8\].*data\.pattern"),
    ],
)
def test_fields_that_no_model_can_learn_are_refused(folder, values, message):
    (folder / "bad.fits").write_bytes(fits_unit(values, -64))
    with pytest.raises(ConfigError, match=message):
        FieldFiles(str(folder))


def test_a_constant_tile_is_named(tmp_path):
    values = maps()
    values[4, 3:, 4:] = 7.0
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ConfigError, match=r"a\.npy, map 4, tile 3 holds the value 7 everywhere"):
        FieldFiles(str(tmp_path / "a.npy"), crop=3, pool=1)
    with pytest.raises(ConfigError, match=r"a\.npy holds an array \[80\]; maps are \[height, width\]"):
        np.save(tmp_path / "a.npy", np.zeros(80))
        FieldFiles(str(tmp_path / "a.npy"))
    with pytest.raises(ConfigError, match=r"\[2, 3, 4, 5\]"):
        np.save(tmp_path / "a.npy", np.zeros((2, 3, 4, 5)))
        FieldFiles(str(tmp_path / "a.npy"))
    with pytest.raises(ConfigError, match=r"holds the arrays 'x' \[2\], 'y' \[3\]. Name the one of the maps"):
        np.savez(tmp_path / "b.npz", x=np.zeros(2), y=np.zeros(3))
        FieldFiles(str(tmp_path / "b.npz"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 4}, r"data\.pool: 4 does not divide maps of \[6, 8\] pixels. Take one of 1, 2\."),
        ({"pool": 2, "crop": 4}, r"data\.crop: tiles of 1 … 3 pixels fit into maps of \[3, 4\]"),
        ({"apodize": 0.6}, r"data\.apodize: a share of the side in \[0, 0\.5\]"),
        ({"val": 5, "test": 5}, "none is left to train on"),
        ({"val": -1}, r"data\.val: a number of maps"),
    ],
)
def test_impossible_options_are_refused(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        FieldFiles(str(folder), **options)


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path: there is no file"):
        FieldFiles(str(tmp_path / "nowhere"))
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(ConfigError, match=r"a\.txt ends in none of \.fits"):
        FieldFiles(str(tmp_path / "a.txt"))
    with pytest.raises(ConfigError, match="holds no maps"):
        FieldFiles(str(tmp_path))
