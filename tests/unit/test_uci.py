"""The five published tables: what is done to their rows, and the files they come from."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from genmodels.baselines import Gaussian
from genmodels.config import Config
from genmodels.data import uci
from genmodels.data.uci import TABLES, UCI, OtherRows
from genmodels.registry import ConfigError
from genmodels.training.dry_run import dry_run
from genmodels.transforms import Identity
from tests.data_files import gas_columns, hepmass_rows, write_uci

SPLITS = ("train", "val", "test")
every = pytest.mark.parametrize("table", TABLES)


def read(table: str, path: Path, **options) -> UCI:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OtherRows)
        return UCI(table, str(path), **options)


def rows(dataset: UCI, split: str) -> np.ndarray:
    return dataset.all(split).x.numpy()


# ---- what is done to the rows ----
# the expected numbers come from another program, which follows the published description with data frames


def test_power_is_shuffled_and_dequantised_as_published():
    random = np.random.RandomState(7)
    data = random.rand(1000, 8) * [5, 1, 10, 20, 40, 40, 30, 1440]
    before = data.copy()
    train, val, test = uci.power(data)
    assert (len(train), len(val), len(test)) == (810, 90, 100) and np.array_equal(data, before)
    np.testing.assert_allclose(train[0], [0.957916, 0.129041, -0.201506, 0.925855, -0.13885, -1.347984], atol=1e-6)
    np.testing.assert_allclose(test[-1], [1.695184, 1.693412, -0.181705, 1.156932, -0.9468, 0.592216], atol=1e-6)
    seen = np.concatenate((train, val))
    np.testing.assert_allclose(seen.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(seen.std(0), 1, atol=1e-12)


def test_the_order_of_power_is_that_of_shuffling_the_rows_in_place():
    """The time of day gets no noise, and numbering the rows with it shows where each one went."""
    data = np.random.RandomState(0).rand(500, 8)
    data[:, 7] = np.arange(500)
    shuffled = data.copy()
    np.random.RandomState(42).shuffle(shuffled)
    parts = np.concatenate(uci.power(data))[:, 5]
    assert np.array_equal(np.argsort(parts), np.argsort(shuffled[:, 7]))


@pytest.mark.parametrize(("correlation", "kept"), [(0.975, 2), (0.985, 1)])
def test_gas_drops_sensors_that_correlate_by_more_than_98_hundredths(correlation, kept):
    """Two sensors whose correlation in the sample is the given one exactly."""
    z = np.random.RandomState(3).randn(400, 2)
    z = np.linalg.qr(z - z.mean(0))[0]
    sensors = np.stack((z[:, 0], correlation * z[:, 0] + np.sqrt(1 - correlation**2) * z[:, 1]), 1)
    assert uci.gas(sensors)[0].shape[1] == kept


def test_gas_keeps_the_last_of_sensors_that_agree():
    random = np.random.RandomState(7)
    z = random.randn(500, 6)
    random.rand(2, 500)  # the two concentrations
    sensors = {}
    for j in range(6):
        sensors[f"s{j}a"] = z[:, j] + 0.05 * random.randn(500)
        if j % 2 == 0:
            sensors[f"s{j}b"] = 2 * z[:, j] + 0.1 * random.randn(500)
        if j == 4:
            sensors["s4c"] = -z[:, j] + 0.05 * random.randn(500)
    x = np.stack(list(sensors.values()), 1)
    train, val, test = uci.gas(x)
    assert (train.shape, val.shape, test.shape) == ((405, 7), (45, 7), (50, 7))
    first = [1.765992, -0.475477, 0.029776, 0.362438, -0.764098, 0.729281, 0.127441]
    np.testing.assert_allclose(train[0], first, atol=1e-6)
    whole = np.concatenate((train, val, test))
    kept = [list(sensors).index(name) for name in ("s0b", "s1a", "s2b", "s3a", "s4b", "s4c", "s5a")]
    np.testing.assert_allclose(whole, (x[:, kept] - x[:, kept].mean(0)) / x[:, kept].std(0, ddof=1), atol=1e-12)


def test_hepmass_drops_features_whose_least_value_is_frequent():
    random = np.random.RandomState(7)
    labels, x = random.randint(0, 2, 400), random.randn(400, 5)
    x[:, 1] = random.randint(0, 3, 400)
    x[:, 3] = np.maximum(x[:, 3], -0.5)
    x[:, 4] = np.where(random.rand(400) < 0.3, 1.25, x[:, 4])  # frequent, but not the least: it stays
    others = random.randint(0, 2, 100)
    train, val, test = uci.hepmass(x[labels == 1], random.randn(100, 5)[others == 1])
    assert (train.shape, val.shape, test.shape) == ((188, 3), (20, 3), (45, 3))
    np.testing.assert_allclose(train[0], [-1.630048, 1.378601, -1.187277], atol=1e-6)
    np.testing.assert_allclose(test[0], [0.853011, -0.442933, -2.185271], atol=1e-6)


def test_five_occurrences_of_the_least_value_are_few():
    x = np.random.RandomState(0).randn(100, 2)
    x[:5, 0], x[:6, 1] = -9, -9
    assert np.allclose(uci.hepmass(x, x)[2][:, 0], (x[:, 0] - x[:, 0].mean()) / x[:, 0].std(ddof=1))
    assert uci.hepmass(x, x)[0].shape == (90, 1)


def test_miniboone_is_standardised_by_training_and_validation_rows():
    x = np.random.RandomState(0).lognormal(size=(205, 3))
    train, val, test = uci.miniboone(x)
    assert (len(train), len(val), len(test)) == (167, 18, 20)
    seen = x[:185]
    np.testing.assert_allclose(test, (x[185:] - seen.mean(0)) / seen.std(0), atol=1e-12)
    np.testing.assert_allclose(val, (x[167:185] - seen.mean(0)) / seen.std(0), atol=1e-12)


@pytest.mark.parametrize(("n", "table"), [(2_049_280, "power"), (1_052_065, "gas"), (36_488, "miniboone")])
def test_the_rule_of_the_splits_gives_the_published_sizes(n, table):
    assert tuple(len(part) for part in uci.split(np.zeros((n, 1), np.int8))) == TABLES[table].sizes


# ---- from files ----


@every
def test_the_published_files_are_read(table, tmp_path):
    write_uci(tmp_path, table)
    with pytest.warns(OtherRows, match=rf"published '{table}' has {TABLES[table].sizes[0]:,} / "):
        data = UCI(table, str(tmp_path))
    assert data.shape == (TABLES[table].dims,)
    assert data.facts()["transform"]["name"] == ("standardize" if table == "bsds300" else "identity")
    place = tmp_path / {"bsds300": "BSDS300"}.get(table, table)
    expected = {
        "power": lambda: uci.power(np.load(place / "data.npy")),
        "gas": lambda: uci.gas(np.stack(list(gas_columns(np.random.RandomState(7), 400).values())[3:], 1)),
        "hepmass": lambda: uci.hepmass(*hepmass(np.random.RandomState(7))),
        "miniboone": lambda: uci.miniboone(np.load(place / "data.npy")),
        "bsds300": lambda: np.split(0.1 * np.random.RandomState(7).randn(520, 63), [400, 440]),
    }[table]()
    for split, part in zip(SPLITS, expected, strict=True):
        np.testing.assert_array_equal(rows(data, split), part.astype(np.float32))


def hepmass(random: np.random.RandomState) -> list[np.ndarray]:
    parts = [hepmass_rows(random, n) for n in (400, 200)]
    return [part[part[:, 0] == 1, 1:] for part in parts]


@every
def test_two_users_with_the_same_files_have_one_fingerprint(table, tmp_path):
    one = write_uci(tmp_path / "one", table)
    two = write_uci(tmp_path / "two" / "data", table).parent
    first = read(table, one)
    folder = next(one.iterdir())
    file = folder / ("1000_train.csv" if table == "hepmass" else next(folder.iterdir()).name)
    others = [read(table, path) for path in (two, folder, file)]
    assert {other.fingerprint() for other in others} == {first.fingerprint()}


@every
def test_one_changed_number_changes_the_fingerprint(table, tmp_path):
    first = read(table, write_uci(tmp_path, table))
    place = next((tmp_path).iterdir())
    if table == "bsds300":
        import h5py

        with h5py.File(place / "BSDS300.hdf5", "r+") as file:
            file["test"][5, 5] += 1e-3
    elif table in ("gas", "hepmass"):
        path = place / {"gas": "ethylene_CO.csv", "hepmass": "1000_test.csv"}[table]
        lines = path.read_text().split("\n")
        k = next(k for k in range(5, 50) if lines[k].startswith("1.0") or table == "gas")
        fields = lines[k].split(",")
        fields[7] = repr(float(fields[7]) + 1e-3)
        path.write_text("\n".join([*lines[:k], ",".join(fields), *lines[k + 1 :]]))
    else:
        x = np.load(place / "data.npy")
        x[5, 5] += 1e-3
        np.save(place / "data.npy", x)
    assert read(table, tmp_path).fingerprint() != first.fingerprint()


def test_an_export_of_gas_may_be_text_or_numbers_with_or_without_an_index(tmp_path):
    path = write_uci(tmp_path, "gas") / "gas" / "ethylene_CO.csv"
    first = read("gas", path)
    header, *lines = path.read_text().strip().split("\n")
    indexed = tmp_path / "indexed.csv"
    indexed.write_text("\n".join([f",{header}", *(f"{9 * k % 400},{line}" for k, line in enumerate(lines))]))
    sensors = np.loadtxt(path, delimiter=",", skiprows=1)[:, 3:]
    np.save(tmp_path / "ethylene_CO.npy", sensors)
    for other in (indexed, tmp_path / "ethylene_CO.npy"):
        assert read("gas", other).fingerprint() == first.fingerprint()
        assert torch.equal(read("gas", other).all("test").x, first.all("test").x)


def test_fields_beyond_the_header_of_hepmass_do_not_matter(tmp_path):
    """The published test file has one column more than the training file; nobody need know whether its header has."""
    write_uci(tmp_path, "hepmass")
    first, path = read("hepmass", tmp_path), tmp_path / "hepmass" / "1000_test.csv"
    path.write_text(path.read_text().replace(",mass\n", "\n"))
    assert read("hepmass", tmp_path).fingerprint() == first.fingerprint()


@pytest.mark.parametrize("table", ["power", "gas", "miniboone"])
def test_prepared_rows_in_one_array_are_split_again(table, tmp_path):
    first = read(table, write_uci(tmp_path, table))
    (tmp_path / "prepared").mkdir()
    np.save(tmp_path / "prepared" / f"{table.upper()}.npy", np.concatenate([rows(first, split) for split in SPLITS]))
    again = read(table, tmp_path / "prepared")
    for split in SPLITS:
        np.testing.assert_array_equal(rows(again, split), rows(first, split))


@pytest.mark.parametrize("table", ["hepmass", "bsds300"])
def test_prepared_rows_without_a_rule_need_the_published_sizes(table, tmp_path, monkeypatch):
    x = np.random.RandomState(0).randn(60, TABLES[table].dims).astype(np.float32)
    np.save(tmp_path / f"{table.upper()}.npy", x)
    with pytest.raises(ConfigError, match=rf"has 60 rows, but the splits of '{table}' add up to"):
        read(table, tmp_path)
    monkeypatch.setitem(TABLES, table, replace(TABLES[table], sizes=(40, 5, 15)))
    data = read(table, tmp_path)
    for split, part in zip(SPLITS, (x[:40], x[40:45], x[45:]), strict=True):
        np.testing.assert_array_equal(rows(data, split), part)


def test_a_transform_may_be_given(tmp_path):
    from genmodels.data.dataset import Dataset
    from genmodels.registry import build, resolve

    node = {"name": "uci", "table": "power", "path": str(write_uci(tmp_path, "power")), "transform": "standardize"}
    with pytest.warns(OtherRows):
        assert build(Dataset, resolve(Dataset, node, "data")).facts()["transform"]["name"] == "standardize"


# ---- errors ----


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path: found no data\.npy or POWER\.npy of 'power' in .*Zenodo"):
        read("power", tmp_path)
    (tmp_path / "gas").mkdir()
    (tmp_path / "gas" / "ethylene_CO.pickle").write_bytes(b"")
    for path in (tmp_path, tmp_path / "gas" / "ethylene_CO.pickle"):
        with pytest.raises(ConfigError, match=r"reading a pickle can run code.*pandas\.read_pickle.*to_csv"):
            read("gas", path)
    (write_uci(tmp_path / "h", "hepmass") / "hepmass" / "1000_test.csv").unlink()
    with pytest.raises(ConfigError, match=r"no .*1000_test\.csv; HEPMASS is read from"):
        read("hepmass", tmp_path / "h")


def test_files_of_another_table_are_refused(tmp_path):
    write_uci(tmp_path, "miniboone")
    with pytest.raises(ConfigError, match=r"has 43 columns, but the published data\.npy of POWER has 8.*POWER\.npy"):
        read("power", tmp_path / "miniboone" / "data.npy")
    write_uci(tmp_path, "power")
    with pytest.raises(ConfigError, match="gives rows of 8 numbers, but 'miniboone' has 43"):
        read("miniboone", tmp_path / "power")
    x = np.stack(list(gas_columns(np.random.RandomState(7)).values()), 1)
    np.save(tmp_path / "ethylene_CO.npy", x)
    with pytest.raises(ConfigError, match=r"gives rows of 11 numbers.*'gas' has 8.*19 columns.*sensors alone"):
        read("gas", tmp_path)


def test_constant_columns_are_named(tmp_path):
    file = write_uci(tmp_path, "miniboone") / "miniboone" / "data.npy"
    x = np.load(file)
    x[:, 5] = 0.25
    np.save(file, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=r"column 5 of the prepared rows of 'miniboone'.*one value in all rows"):
            UCI("miniboone", str(file))


def test_damaged_files_are_named(tmp_path):
    path = write_uci(tmp_path, "hepmass") / "hepmass" / "1000_train.csv"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2].rsplit(",", 3)[0] + "\n")
    with pytest.raises(ConfigError, match=r"1000_train\.csv cannot be read as the published file"):
        read("hepmass", tmp_path)
    path.write_text(whole.replace("f3", "g3", 1))
    with pytest.raises(ConfigError, match=r"1000_test\.csv has the columns # label, f0"):
        read("hepmass", tmp_path)
    h5py = pytest.importorskip("h5py")
    write_uci(tmp_path, "bsds300")
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "r+") as file:
        del file["validation"]
    with pytest.raises(
        ConfigError, match="needs the arrays train, validation and test; it holds those of: train, test"
    ):
        read("bsds300", tmp_path)


@every
def test_files_with_other_columns_are_refused(table, tmp_path):
    """One column too many in each of the published formats."""
    folder = write_uci(tmp_path, table)
    file = folder / {"bsds300": "BSDS300"}.get(table, table) / TABLES[table].files[0 if table != "gas" else 1]
    message = f"gives rows of {TABLES[table].dims + 1} numbers, but '{table}' has {TABLES[table].dims}"
    if file.suffix == ".npy":
        x = np.load(file)
        np.save(file, np.c_[x, np.random.RandomState(0).rand(len(x))])
        message = "9 columns, but the published" if table == "power" else message
    elif file.suffix == ".csv":
        for path in file.parent.glob("*.csv"):
            lines = path.read_text().splitlines()
            more = ["extra", *map(str, np.random.RandomState(0).rand(len(lines) - 1))]
            last = path.name == "1000_test.csv"  # it has one more column at its end anyway
            parts = [line.rsplit(",", 1) if last else [line] for line in lines]
            path.write_text(
                "\n".join(",".join([part[0], new, *part[1:]]) for part, new in zip(parts, more, strict=True))
            )
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(file, "w") as made:
            for split in ("train", "validation", "test"):
                made[split] = np.random.RandomState(0).rand(50, 64)
    with pytest.raises(ConfigError, match=message):
        read(table, folder)


# ---- the Gaussian of the published results ----


def gaussian_of(x: np.ndarray, y: np.ndarray) -> float:
    """Mean log-density of y under the Gaussian with the moments of x, by another package."""
    return multivariate_normal(x.mean(0), np.cov(x, rowvar=False)).logpdf(y).mean()


@every
def test_the_gaussian_is_that_of_scipy_and_of_the_model_gaussian(table, tmp_path):
    data = read(table, write_uci(tmp_path, table))
    found = uci.gaussian_log_likelihood(data, batch_size=37)
    train, test = (rows(data, split).astype(np.float64) for split in ("train", "test"))
    assert found == pytest.approx(gaussian_of(train, test), abs=1e-9)
    model = Gaussian(shape=data.shape, transform=Identity(), bin_width=None)
    model.prepare([data.all("train")], generator=torch.Generator())
    # the model keeps mean and root in float32
    assert model.log_prob(data.all("test").x).mean().item() == pytest.approx(found, abs=2e-4)


def test_on_gaussian_rows_it_is_minus_the_entropy(tmp_path, monkeypatch):
    """Prepared rows are read as they are; -E log N(x; m, S) = (D log 2πe + log|S|)/2, here with |S| = 0.09."""
    root = np.array([[1.0, 0.0], [0.8, 0.3]])
    x = 5 + np.random.RandomState(0).randn(100_000, 2) @ root.T
    monkeypatch.setitem(TABLES, "power", replace(TABLES["power"], dims=2))
    np.save(tmp_path / "POWER.npy", x)
    entropy = math.log(2 * math.pi * math.e) + math.log(0.3)
    # 10,000 test rows of standard deviation 1
    assert uci.gaussian_log_likelihood(read("power", tmp_path)) == pytest.approx(-entropy, abs=0.04)


def test_a_dry_run_prints_the_gaussian_beside_the_published_value(tmp_path):
    data = {"name": "uci", "table": "power", "path": str(write_uci(tmp_path, "power"))}
    config = Config({"data": data, "model": {"name": "gaussian"}, "train": {"steps": 0}, "name": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OtherRows)
        text = dry_run(config, tmp_path / "runs")
        value = uci.gaussian_log_likelihood(read("power", tmp_path))
    assert f"gives {value:.2f} nats a test row, published -7.74 (difference {value + 7.74:+.2f})" in text


def test_published_gaussians_are_those_of_the_paper():
    assert [TABLES[table].gaussian for table in TABLES] == [-7.74, -3.58, -27.93, -37.24, 96.67]


def test_a_singular_covariance_is_told(tmp_path):
    x = np.random.RandomState(0).randn(2000, 6)
    x[:, 5] = x[:, :5].sum(1)
    np.save(tmp_path / "POWER.npy", x.astype(np.float32).astype(np.float64))
    data = read("power", tmp_path)
    data.hold("train", data.all("train")[:5])  # fewer rows than columns
    assert data.checks() == ["no Gaussian fits the training rows: their covariance is singular (published -7.74 nats)"]
