"""The result schema: what is written can be read, and what does not follow it is refused with the name of the key."""

import contextlib
import copy
import json
import math

import numpy as np
import pytest
import torch

from genmodels.evaluation import results as module
from genmodels.evaluation.results import (
    Companions,
    Items,
    ResultError,
    check,
    combine,
    companion,
    describe_estimate,
    find,
    identify,
    read,
    write,
)
from genmodels.evaluation.tables import describe_result, show, table
from genmodels.types import Estimate


def metric(name="FD-digits", value=4.2, stderr=0.1, entry=0, better="lower", **more):
    estimate = Estimate(value, stderr, 100, "1", better, more.pop("kind", "plug-in"), more.pop("references", None))
    return {**describe_estimate(entry, "frechet", 1, "sample", name, estimate), **more}


def example(run="try", metrics=None, seed=0, protocol="digits", protocol_hash="aaaa", **more):
    """A valid result; keyword arguments replace parts of it."""
    config = {"name": run, "seed": seed, "sample": {"num_steps": 50}, "model": {"name": "flow"}} | more.pop(
        "config", {}
    )
    result = {
        "schema": "genmodels.result/2",
        "created_utc": more.pop("created", "2026-01-31T12:00:00Z"),
        "run": run,
        "model": {
            "name": "flow",
            "dataset": "digits",
            "config_hash": "cafe",
            "config": config,
            "seed": seed,
            "step": more.pop("step", 100),
            "steps": more.pop("steps", 100),
            "samples_seen": 6400,
            "weights": more.pop("weights", "model"),
            "parameters": 72842,
            "trainable": 72842,
        },
        "protocol": {
            "name": protocol,
            "version": 1,
            "hash": protocol_hash,
            "data_fingerprint": "beef",
            "tree": {"description": "Some digits."},
        },
        "answers": more.pop("answers", {"sample": {"num_steps": 50}}),
        "overridden": False,
        "metrics": [metric()] if metrics is None else metrics,
        "not_applicable": {"bits_per_dim": "needs likelihood"},
        "failures": {},
        "cost": {
            "sample": {
                "items": 100,
                "nfe": 50.0,
                "seconds": 2.5,
                "seconds_per_item": 0.024,
                "batch_size": 50,
                "flops_per_item": 12_000_000,
                "peak_memory": None,
            }
        },
        "training": {"commit": "abcdef123", "dirty": False, "hardware": None, "seconds": 9.5, "world_size": 1},
        "environment": {
            "commit": "abcdef123",
            "dirty": False,
            "versions": {"torch": "2.13.0"},
            "hardware": "a machine",
            "device": "cpu",
            "threads": 1,
            "world_size": 1,
        },
        "seconds": 3.0,
        "artifacts": {"items": None, "grid": None},
        **more,
    }
    return {**result, "id": identify(result)}


def facts(**more):
    """The same without what writing adds."""
    return {key: value for key, value in example(**more).items() if key not in ("id", "artifacts")}


NONE = Companions({}, None)


def changed(path, value):
    """The example with one value replaced (or removed), and its id made right again."""
    result = copy.deepcopy(example())
    *parents, last = path
    node = result
    for key in parents:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    if path != ("id",):
        with contextlib.suppress(ValueError, TypeError):  # what has no canonical form has no id
            result["id"] = identify(result)
    return result


def test_example_is_valid_and_survives_a_round_trip(tmp_path):
    items = {"FD-digits": Items(np.arange(3), np.array([0.1, 0.2, 0.3]))}
    result = write(tmp_path / "eval" / "x.json", facts(metrics=[metric(per_item=True)]), Companions(items, b"picture"))
    back, (found, grid) = read(tmp_path / "eval" / "x.json")
    assert back == result and grid == b"picture"
    assert all(np.array_equal(getattr(found["FD-digits"], f), getattr(items["FD-digits"], f)) for f in Items._fields)
    marks = [result["artifacts"][name][:8] for name in ("items", "grid")]
    names = {"x.json", f"x-{marks[0]}.npz", f"x-{marks[1]}.png"}
    assert {p.name for p in (tmp_path / "eval").iterdir()} == names


def items_and_grid(k):
    """Companions that differ with k."""
    return Companions({"FD-digits": Items(np.arange(3), np.array([0.1, 0.2, 0.3]) + k)}, b"picture %d" % k)


@pytest.mark.parametrize("name", ["items", "grid"])
def test_an_altered_companion_is_refused_and_a_missing_one_left_out(tmp_path, name):
    path = tmp_path / "x.json"
    result = write(path, facts(metrics=[metric(per_item=True)]), items_and_grid(1))
    file = companion(path, name, result["artifacts"][name])
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ResultError, match=rf"{file.name} was altered.*Evaluate the run again"):
        read(path)
    file.unlink()
    missing = read(path)[1]
    assert missing.grid is None if name == "grid" else missing.items == {}


def test_whenever_a_write_ends_there_is_the_old_result_or_the_new_one(tmp_path, monkeypatch):
    """Each write of a file is the last one that a process lives to see, or finds the disk full."""
    path, original = tmp_path / "x.json", module.new_file
    old = write(path, facts(metrics=[metric(per_item=True)]), items_and_grid(1))
    for survives in range(4):
        calls = iter(range(10))

        def stop(file, calls=calls, survives=survives):
            if next(calls) >= survives:
                raise OSError("disk full")
            return original(file)

        with monkeypatch.context() as patch:
            patch.setattr(module, "new_file", stop)
            patch.setattr("genmodels.files.new_file", stop)
            try:
                new = write(path, facts(run="new", metrics=[metric(per_item=True)]), items_and_grid(2))
            except OSError:
                assert survives < 3
                new = None
        found, (items, grid) = read(path)
        k = 1 if new is None else 2
        assert found == (old if new is None else new) and grid == b"picture %d" % k
        assert items["FD-digits"].values[0] == 0.1 + k
    assert len(list(tmp_path.iterdir())) == 3  # and nothing of the old one is left


def test_deeply_nested_files_are_no_results(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ResultError, match=r"deep\.json"):
        read(tmp_path / "deep.json")


def test_a_result_without_companions_removes_those_of_the_one_before(tmp_path):
    write(tmp_path / "x.json", facts(), Companions({}, b"picture"))
    write(tmp_path / "x.json", facts(), NONE)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and read(tmp_path / "x.json")[1] == NONE


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("unheard",), 1, "'unheard' is unknown"),
        (("metrics", 0, "valu"), 1, r"metrics\[0\].*'valu' is unknown"),
        (("run",), KeyError, "'run' is missing"),
        (("metrics", 0, "value"), math.nan, r"metrics\[0\].value: nan is not allowed"),
        (("seconds",), math.inf, "result.seconds: inf"),
        (("metrics", 0, "references"), {"floor": "low"}, "references.floor: int or float is needed, found 'low'"),
        (("metrics", 0, "n"), 1.5, "n: int is needed"),
        (("metrics", 0, "n"), True, "n: int is needed, found True"),
        (("metrics", 0, "better"), "up", "one of higher, lower, none"),
        (("overridden",), 1, "overridden: bool"),
        (("schema",), "genmodels.result/1", "schema genmodels.result/1.*reads genmodels.result/2.*[Ee]valuate"),
        (("schema",), "another/1", "one of genmodels.result/2"),
        (("metrics",), {}, "metrics: list"),
        (("model",), None, "model: dict"),
        (("answers",), {"sample": {1, 2}}, "no plain finite JSON"),
        (("id",), "0" * 64, "edited after it was written"),
    ],
)
def test_what_does_not_follow_the_schema_is_named(path, value, message):
    with pytest.raises(ResultError, match=message):
        check(changed(path, value))


def test_own_keys_are_free():
    result = example(**{"x-note": {"anything": [1, 2]}})
    assert check(result) is result


def test_a_value_that_is_not_finite_becomes_null_and_failed():
    row = describe_estimate(
        0, "m", 1, "sample", "m", Estimate(math.nan, math.nan, 5, "1", "lower", "x", items=torch.zeros(5))
    )
    assert row["value"] is None and row["stderr"] is None and row["flags"] == ["failed"] and not row["per_item"]
    row = describe_estimate(
        0, "m", 1, "sample", "m", Estimate(1.0, math.inf, 5, "1", "lower", "x", {"a": math.nan, "b": 2.0})
    )
    assert row["stderr"] is None and row["references"] == {"b": 2.0} and row["flags"] == []


def test_an_invalid_result_is_not_written(tmp_path):
    path = tmp_path / "x.json"
    write(path, facts(), NONE)
    before = path.read_bytes()
    with pytest.raises(ResultError):
        write(path, facts() | {"seconds": "long"}, NONE)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failing_disk_leaves_no_half_files(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    path = tmp_path / "x.json"
    write(path, facts(), NONE)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, facts(run="other"), Companions({"FD-digits": Items(np.arange(2), np.zeros(2))}, None))
    assert path.read_bytes() == before and not list(tmp_path.glob("*.npz"))


def test_reading_names_the_file(tmp_path):
    (tmp_path / "bad.json").write_text('{"schema": 3')
    with pytest.raises(ResultError, match=r"bad\.json"):
        read(tmp_path / "bad.json")
    with pytest.raises(ResultError, match=r"gone\.json"):
        read(tmp_path / "gone.json")


def test_results_are_found_in_runs_folders_and_files(tmp_path):
    run = tmp_path / "runs" / "a"
    for path in (run / "eval" / "p" / "1.json", tmp_path / "published" / "p" / "b" / "2.json"):
        write(path, facts(), NONE)
    (run / "config.yaml").write_text("")
    (run / "meta.json").write_text("{}")
    (tmp_path / "runs" / "leaderboard.json").write_text("{}")
    (tmp_path / "runs" / "notes.txt").write_text("")
    places = [*(tmp_path / "runs").iterdir(), tmp_path / "published"]
    assert [p.name for p in find(places)] == ["2.json", "1.json"]
    with pytest.raises(ResultError, match="no such"):
        find([tmp_path / "nowhere"])


def test_mean_over_seeds_and_blocks():
    assert combine([2.0], [0.5]) == (2.0, 0.5)
    assert combine([1.0, 3.0], [0.1, 0.1]) == (2.0, pytest.approx(1.0))  # spread between: √2/√2
    assert combine([1.0, 2.0, 3.0], [None] * 3) == (2.0, pytest.approx(1 / math.sqrt(3)))  # sd 1
    assert combine([2.0, 2.0], [0.3, 0.4]) == (2.0, pytest.approx(0.25))  # errors within: √(0.09 + 0.16)/2
    assert combine([1.0, 3.0], [None, 0.1]) == (2.0, pytest.approx(1.0))
    assert combine([1.0], [None]) == (1.0, None)
    assert combine([0.0, 0.0], [3e299, 4e299]) == (0.0, pytest.approx(2.5e299))  # squares would overflow


def test_numbers_show_what_is_known():
    assert show(88.7218, 1.34) == "88.7 ± 1.3"
    assert show(1234.4, 56.0) == "1234 ± 56"
    assert show(2.05, 0.0102, "stochastic") == "~ 2.050 ± 0.010"
    assert show(1.0, 0.0) == "1" and show(None, 0.1) == "–"


def test_table_is_markdown_and_aligned():
    lines = table(["rank", "run"], [["1", "a|b"], ["10", "c"]], left=(1,)).split("\n")
    assert lines == ["| rank | run  |", "|-----:|:-----|", "|    1 | a\\|b |", "|   10 | c    |"]


def test_summary_says_everything_that_was_measured():
    text = describe_result(example(metrics=[metric(references={"floor": 0.9}, flags=["overlap_suspected"])]))
    assert "FD-digits" in text and "4.20 ± 0.10" in text and "floor 0.9" in text and "overlap suspected" in text
    assert "bits_per_dim  not applicable: needs likelihood" in text
    assert "sample        50 evaluations, 0.024 s and 12.0 MFLOP an item, in batches of 50" in text
    broken = {"sample": {"items": 6, "of": 5000, "first": [1, 2, 3, 4, 5, 8], "reason": ""}}
    text = describe_result(example(failures=broken))
    assert "sample        6 of 5,000 samples are not finite (seeds 1, 2, 3, 4, 5, …)" in text
    broken["sample"]["reason"] = "the solver met infinity"
    assert describe_result(example(failures=broken)).endswith("4, 5, …): the solver met infinity")
    assert json.dumps(example())
