"""Protocols: what they say, what changes their hash, and where their data lie."""

import numpy as np
import pytest
import torch
import yaml

from genmodels.evaluation import evaluate as module
from genmodels.evaluation.protocol import FOLDER, Protocol
from genmodels.registry import ConfigError
from tests.evaluation_fakes import Classes, FakeProtocol, FakeRun, Levels, Points, Series, UniformLevels


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path / "runs" / "uniform", UniformLevels())


def protocol(metrics=("frechet", "bits_per_dim"), data=None, **sections):
    return FakeProtocol(data or Levels(), list(metrics), **sections)


AT_HAND = [path for path in sorted(FOLDER.glob("*.yaml")) if "???" not in path.read_text()]  # no files of the user's


@pytest.mark.parametrize("path", AT_HAND, ids=[p.stem for p in AT_HAND])
@pytest.mark.slow_for("lorenz", "tones_mel", "van_der_pol")
def test_protocols_of_the_repository_are_sound(path):
    p, by_file = Protocol.load(path.stem), Protocol.load(str(path))
    assert p.name == path.stem and len(p.hash) == 12 and p.tree["description"]
    assert [type(m) for m in by_file.metrics()] == [type(m) for m in p.metrics()]
    assert by_file.tree == p.tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["frechett"]}, r"metrics\[0\].name.*Did you mean 'frechet'"),
        ({"metrics": [{"name": "frechet", "feature": "digits"}]}, r"metrics\[0\].*Did you mean: 'features'"),
        ({"metrics": []}, "at least one"),
        ({"version": "one"}, "version"),
        ({"name": "a/b"}, "plain folder name"),
        ({"sample": {"num_items": 0}}, "sample.num_items: must be at least 1"),
        ({"sample": {"labels": "random"}}, "sample.labels"),
        ({"likelihood": {"draws": -1}}, "likelihood.draws"),
        ({"dataset": "digitz"}, "Did you mean 'digits'"),
        ({"split": "test"}, "split"),
        ({"imports": ["no_such_module_at_all"]}, "cannot import 'no_such_module_at_all'"),
    ],
)
def test_malformed_protocols_say_what_is_wrong(change, message):
    tree = {"name": "p", "version": 1, "dataset": "digits", "metrics": ["frechet"], **change}
    with pytest.raises(ConfigError, match=message):
        Protocol(tree)


def test_a_malformed_file_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"name": "p", "version": 1, "dataset": "digits", "metrics": ["frechett"]}))
    with pytest.raises(ConfigError, match=r"Did you mean 'frechet'.*\(in the protocol .*mine\.yaml\)"):
        Protocol.load(file)


def test_protocols_that_do_not_exist(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'digits'"):
        Protocol.load("digit")
    with pytest.raises(ConfigError, match="no such file"):
        Protocol.load(tmp_path / "nothing.yaml")


def test_hash_follows_everything_that_decides_a_number(monkeypatch):
    tree = {"name": "p", "version": 1, "dataset": "digits", "metrics": [{"name": "frechet", "features": "digits"}]}
    same = Protocol(tree | {"description": "words", "sample": {"num_items": 1000}})
    assert same.hash == Protocol(tree).hash
    others = [
        Protocol(tree | change).hash
        for change in ({"version": 2}, {"sample": {"num_items": 999}}, {"metrics": ["frechet"]}, {"name": "q"})
    ]
    metric = type(same.metrics()[0])
    monkeypatch.setattr(metric, "version", 99)
    others.append(Protocol(tree).hash)
    monkeypatch.undo()
    monkeypatch.setattr(type(same.metrics()[0].features), "identity", "digits-cnn-v1:other")
    others.append(Protocol(tree).hash)
    assert len({same.hash, *others}) == 7


def test_hash_follows_the_data():
    assert protocol().hash == protocol().hash != protocol(data=Levels((300, 20, 199))).hash


def test_data_fingerprint_sees_contents_and_splits():
    assert Levels().fingerprint() == Levels().fingerprint()
    moved = Levels()
    moved.hold("test", moved.all("test")[torch.arange(200).flip(0)])
    assert len({Levels().fingerprint(), moved.fingerprint(), Levels((300, 20, 199)).fingerprint()}) == 3
    points, shaken = Points(), Points()
    shaken.hold("test", shaken.all("test").replace(x=shaken.all("test").x * (1 + 1e-7)))
    assert points.fingerprint() == shaken.fingerprint()  # the last bits of simulated data differ between machines
    shaken.hold("test", shaken.all("test").replace(x=shaken.all("test").x * 1.1))
    assert points.fingerprint() != shaken.fingerprint()
    swapped = Points()
    swapped.hold("test", swapped.all("test").replace(x=swapped.all("test").x.flip(1)))
    assert points.fingerprint() != swapped.fingerprint()


def test_data_fingerprint_sees_conditions_targets_and_masks():
    def changed(data, **changes):
        items = data.all("test")
        data.hold("test", items.replace(**{name: change(getattr(items, name)) for name, change in changes.items()}))
        return data.fingerprint()

    assert changed(Levels(), condition=lambda c: 1 - c) != Levels().fingerprint() == changed(Levels())
    assert changed(Classes(), target=lambda t: 1 - t) != Classes().fingerprint() == changed(Classes())
    assert changed(Series(), target=lambda t: 2 * t) != Series().fingerprint() == changed(Series())
    assert changed(Series(), target_mask=lambda m: ~m) != Series().fingerprint()


# ---- places of data ----------------------------------------------------------------------------------------------


@pytest.fixture
def tables(tmp_path):
    """The same table in two places, and another one."""
    g = np.random.default_rng(0)
    rows = g.normal(size=(300, 3))
    for name, values in (("here", rows), ("there", rows), ("other", rows + 1)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "rows.npy", values)
    return {name: str(tmp_path / name / "rows.npy") for name in ("here", "there", "other")}


TABLE = {"name": "t", "version": 1, "dataset": {"name": "table", "path": "???"}, "metrics": ["nll"]}


def test_places_are_filled_in_and_leave_no_trace(tables):
    here, there, other = (Protocol(TABLE, {"path": tables[name]}) for name in ("here", "there", "other"))
    assert here.hash == there.hash != other.hash
    assert "path" not in here.portable["dataset"] and here.tree["dataset"]["path"] == tables["here"]
    assert here.dataset.shape == (3,)


def test_a_missing_or_wrong_place_is_told(tables):
    with pytest.raises(ConfigError, match=r"where are its data\? Add --data path=<path>.*trained on table"):
        Protocol(TABLE)
    with pytest.raises(ConfigError, match=r"--data size: 'table' has no such place"):
        Protocol(TABLE, {"size": "3"})
    with pytest.raises(ConfigError, match="--data path: 'digits' has no such place"):
        Protocol(TABLE | {"dataset": "digits"}, {"path": "x"})


def test_places_come_from_a_run_on_the_same_data(tables, tmp_path, run, monkeypatch):
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(TABLE))
    run.config.tree["data"] = {"name": "table", "path": tables["here"], "val_path": None, "test_path": None}
    assert Protocol.load(file, module._places(run, str(file), [])).tree["dataset"]["path"] == tables["here"]
    given = module._places(run, str(file), [f"path={tables['there']}"])
    assert Protocol.load(file, given).tree["dataset"]["path"] == tables["there"]
    run.config.tree["data"] = {"name": "digits"}
    assert module._places(run, str(file), []) == {}
