"""Which results are compared, what is said of them, and mistakes that are explained."""

import json
import math
import re

import numpy as np
import pytest

from genmodels.evaluation.compare import Comparison, compare, main, sentence, settle, text
from genmodels.evaluation.intervals import Difference
from genmodels.evaluation.pairing import Side, default_weights, gather, labelled, matched
from genmodels.evaluation.results import Companions, Items, write
from genmodels.registry import ConfigError
from tests.unit.test_results import example, metric

AVERAGED = {"train": {"ema": [{"name": "constant", "value": 0.99}]}}


def side(label, metrics, items=None, **more):
    return Side(None, example(run=label, metrics=metrics, **more), items or {}, label)


def said(a, b, items=({}, {}), level=0.95, **more):
    """The sentence on one metric of runs a and b."""
    pair = compare(side("a", [a], items[0]), side("b", [b], items[1]), **more)
    (pair,) = settle([pair], level, "none")
    return sentence(pair.comparisons[0], "a", "b")


def per_item(values, ids=None):
    return {"bits_per_dim": Items(np.arange(len(values)) if ids is None else ids, np.asarray(values))}


def bits(value, **more):
    more = {"kind": "bound", **more}
    return {**metric("bits_per_dim", value, 0.05, **more), "unit": "bits/dim"}


# ---- sentences ---------------------------------------------------------------------------------------------------


def two_models(gap=0.1, n=400):
    shared = np.random.default_rng(0).normal(2, 1, n)
    a = shared + 0.1 * np.random.default_rng(1).normal(size=n)
    return a, shared + gap


def test_items_in_common_decide_what_standard_errors_leave_open():
    a, b = two_models()
    rows = bits(float(a.mean())), bits(float(b.mean()))
    d, error = float((b - a).mean()), float((b - a).std(ddof=1)) / 20
    words = said(*rows, (per_item(a), per_item(b)))
    found = re.fullmatch(
        r"bits_per_dim: a is better by (\S+) bits/dim \(95 % interval (\S+) to (\S+); paired on 400 items\)", words
    )
    assert [float(x) for x in found.groups()] == pytest.approx([d, d - 1.96 * error, d + 1.96 * error], abs=8e-4)
    assert said(*rows).startswith(
        "bits_per_dim: not distinguishable: a - b = -0.11 bits/dim (95 % interval -0.25 to 0.03"
    )
    assert said(*rows).endswith("; unpaired)")
    swapped = said(*rows[::-1], (per_item(b), per_item(a)))
    assert swapped == words.replace("a is better", "b is better")


def test_items_are_matched_by_their_numbers():
    a, b = two_models()
    order = np.random.default_rng(2).permutation(400)
    rows = bits(float(a.mean())), bits(float(b.mean()))
    assert said(*rows, (per_item(a), per_item(b[order], order))) == said(*rows, (per_item(a), per_item(b)))
    for ids in (np.arange(1, 401), np.full(400, 3)):
        assert said(*rows, (per_item(a), per_item(b, ids))).endswith("unpaired)")
    twice = np.arange(400) // 2
    assert said(*rows, (per_item(a, twice), per_item(b, twice))).endswith("unpaired)")


def test_higher_may_be_better():
    up = {"better": "higher"}
    rows = metric("accuracy", 0.9, 0.01, **up), metric("accuracy", 0.8, 0.01, **up)
    z = 1.959964 * math.sqrt(2) * 0.01
    assert said(*rows) == f"accuracy: a is better by 0.100 (95 % interval {0.1 - z:.3f} to {0.1 + z:.3f}; unpaired)"
    assert said(*rows[::-1]).startswith("accuracy: b is better by 0.100 (95 % interval 0.072 to 0.128")


def test_what_has_no_better_direction_is_described():
    rows = [metric("authenticity", value, 0.01, better="none") for value in (0.6, 0.9)]
    assert said(*rows).startswith("authenticity: b is higher by 0.300 (95 % interval 0.272 to 0.328")


def test_blocks_of_the_same_seeds_are_paired():
    blocks = ([4.1, 4.4, 3.9, 4.6], [3.8, 4.3, 3.7, 4.2])
    rows = [metric(value=float(np.mean(x)), stderr=0.2) | {"blocks": x} for x in blocks]
    assert said(*rows) == "FD-digits: b is better by 0.25 (95 % interval 0.04 to 0.46; paired on 4 blocks, Student's t)"
    assert said(rows[0], rows[1] | {"blocks": [1.0, 2.0]}).endswith("; unpaired)")
    assert said(rows[0] | {"blocks": [1.0]}, rows[1] | {"blocks": [1.0]}).endswith("; unpaired)")


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (("bound", "pmf"), "; a bound against an exact value: a may be better than its bound"),
        (("stochastic", "bound"), "; a stochastic estimate against a bound: b may be better than its bound"),
        (("exact", "numerical"), "; an exact value against a value up to a solver's tolerance"),
        (("bound", "bound"), ""),
        (("exact", "pmf"), ""),
    ],
)
def test_different_kinds_are_said(kinds, words):
    found = said(*(bits(value, kind=kind) for value, kind in zip((1.0, 2.0), kinds, strict=True)))
    assert found.endswith(f"; unpaired){words}")


def test_counts_and_missing_errors():
    count = {"kind": "count", "stderr": None}
    assert said(metric("nfe", 50.0, **count), metric("nfe", 1.0, **count)) == "nfe: a 50, b 1"
    assert said(metric(value=2.0, stderr=None), metric(value=1.0)) == (
        "FD-digits: a 2, b 1; no interval: a has no standard error"
    )
    both = [metric(value=v, stderr=None) for v in (2.0, 1.0)]
    assert said(*both).endswith("no interval: a and b have no standard error")
    assert said(metric(value=math.nan), metric()) == "FD-digits: a –, b 4.2; no interval: it failed for a"
    assert "failed for b" in said(metric(), metric(flags=["failed"]))
    assert (
        compare(side("a", [metric()]), side("b", [metric(flags=["failed"])])).notes == ()
    )  # a note on the metric will do


@pytest.mark.parametrize(("centre", "decided"), [(1.0, False), (-1.0, False), (1.01, True), (-1.01, True)])
def test_an_interval_that_ends_at_zero_leaves_it_open(centre, decided):
    difference = Difference(centre, centre, 1.0, lambda q: math.copysign(1.0, q - 0.5), 0.05, "unpaired")
    assert Comparison("FD", metric(), metric(), difference).decided is decided


def test_identical_models():
    same = per_item(np.arange(5.0))
    assert said(bits(2.0), bits(2.0), (same, same)) == "bits_per_dim: no difference (paired on 5 items)"


def test_a_flagged_model_is_not_called_better():
    copied = metric("copies", 0.5, 0.1, better="none", flags=["overlap_suspected"])
    a = side("a", [metric(value=1.0), copied])
    pair = compare(a, side("b", [metric(value=3.0), metric("copies", 0.0, 0.1, better="none")]))
    assert sentence(pair.comparisons[0], "a", "b").startswith("FD-digits: b is higher by 2.00 (")
    assert pair.notes == ("a is not called better or worse: overlap suspected.",)


def test_a_model_whose_answers_are_not_finite_is_not_called_better():
    failed = {"sample": {"items": 2, "of": 100, "first": [3, 14], "reason": ""}}
    a, b = side("a", [bits(1.0)], failures=failed), side("b", [bits(3.0)])
    (pair,) = settle([compare(a, b)], 0.95, "none")
    assert pair.notes == ("a is not called better or worse: 2 of 100 samples are not finite (seeds 3, 14).",)
    assert sentence(pair.comparisons[0], "a", "b").startswith("bits_per_dim: b is higher by 2.00")


def test_metrics_that_only_one_has():
    lacking = side("b", [metric("nfe", 1.0, None)], not_applicable={"frechet": "needs sample"})
    pair = compare(side("a", [metric(), metric("nfe", 2.0, None)]), lacking)
    assert [c.name for c in pair.comparisons] == ["nfe"]
    assert pair.notes == ("FD-digits: only a has it (b: needs sample).",)
    back = compare(lacking, side("a", [metric(), metric("nfe", 2.0, None)]))
    assert back.notes == ("FD-digits: only a has it (b: needs sample).",)


def test_levels_of_a_family_and_what_is_said_of_it():
    rows = [
        [metric(name, value, 0.1) for name, value in zip("xyz", values, strict=True)]
        for values in ([1] * 3, [1.3, 2, 1.01])
    ]
    pair = compare(side("a", rows[0]), side("b", rows[1]))

    def told(family):
        settled = settle([pair], 0.95, family)
        return [c.decided for c in settled[0].comparisons], text(settled, family)

    decided, words = told("none")  # differences of 2.1, 7.1 and 0.07 standard errors
    assert decided == [True, True, False] and "of 3 differences that are truly zero about 0.15" in words
    decided, words = told("holm")
    assert decided == [False, True, False] and "The levels of the 3 intervals follow Holm's step-down." in words
    assert "(97.5 % interval" in words and "(98.33 % interval" in words
    decided, words = told("bonferroni")
    assert decided == [False, True, False] and words.count("(98.33 % interval") == 3


# ---- which results -----------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    """Writes a result of a run and gives the folder of the run."""

    def make(run, value=2.0, file=None, seed=0, items=None, **more):
        more["config"] = {**AVERAGED, **more.get("config", {})}
        result = example(run=run, metrics=[bits(value, per_item=items is not None)], seed=seed, **more)
        folder = tmp_path / run
        model = result["model"]
        name = file or f"{model['step']:08d}-{model['weights']}-{result['protocol']['hash']}-{result['id'][:6]}"
        facts = {key: value for key, value in result.items() if key not in ("id", "artifacts")}
        write(folder / "eval" / result["protocol"]["name"] / f"{name}.json", facts, Companions(items or {}, None))
        (folder / "config.yaml").touch()
        return folder

    return make


def chosen(places, **wanted):
    first, second = gather(places, **wanted)
    pairs, notes = matched(first, second)
    return [tuple(s.result["metrics"][0]["value"] for s in pair) for pair in pairs], notes


def test_the_newest_result_with_the_default_weights_is_meant(made):
    for value, more in enumerate(
        [
            {"weights": "ema-0.99", "step": 250, "created": "2026-01-01T00:00:00Z"},
            {"weights": "ema-0.99", "step": 200, "created": "2026-01-02T00:00:00Z"},
            {"weights": "model", "step": 300, "created": "2026-01-03T00:00:00Z"},
            {"weights": "ema-0.99", "step": 300, "created": "2026-01-04T00:00:00Z", "overridden": True},
        ]
    ):
        a = made("a", float(value), **more)
    b = made("b", 9.0)  # raw weights only
    assert chosen([a, b]) == ([(1.0, 9.0)], [])
    assert chosen([a, b], weights="model") == ([(2.0, 9.0)], [])
    c = made("c", 8.0, weights="ema-0.99", step=250)
    assert chosen([a, c], step=250) == ([(0.0, 8.0)], [])
    with pytest.raises(ConfigError, match=r"b: no result has step 300, weights best|weights best, step 300") as error:
        chosen([a, b], weights="best", step=300)
    assert "ema-0.99" in str(error.value)


def test_default_weights_are_the_first_average():
    assert default_weights({"train": {"ema": [{"name": "power", "std": 0.1}, *AVERAGED["train"]["ema"]]}}) == "ema-0.1"
    assert default_weights({"train": {"ema": []}}) == default_weights({}) == "model"


def test_only_results_under_one_protocol_hash_are_compared(made):
    for value, key, day in ((1.0, "aaaa", 1), (2.0, "bbbb", 2), (3.0, "cccc", 3)):
        made("a", value, protocol_hash=key, created=f"2026-01-0{day}T00:00:00Z")
    for value, key, day in ((4.0, "aaaa", 1), (5.0, "bbbb", 2)):
        b = made("b", value, protocol_hash=key, created=f"2026-01-0{day}T00:00:00Z")
    a = made("a", 6.0, protocol="digits_demo", protocol_hash="dddd")
    assert chosen([a, b]) == ([(2.0, 5.0)], [])
    b = made("b", 7.0, protocol="digits_demo", protocol_hash="eeee")
    pairs, (note,) = chosen([a, b])
    assert pairs == [(2.0, 5.0)] and note.startswith(
        "digits_demo is not compared: its settings, metrics or data changed"
    )
    assert "a (dddd) and b (eeee)" in note and "evals.evaluate <runs> --protocol digits_demo" in note
    with pytest.raises(
        ConfigError, match=r"no protocol is common: a has digits_demo \(dddd\) at step 100, weights model"
    ):
        chosen([a, b], protocol="digits_demo")


def test_results_of_one_run_are_compared_as_files(made):
    run = made("a", 1.0, file="one", step=100)
    made("a", 2.0, file="two", step=200)
    one, two = (run / "eval" / "digits" / f"{name}.json" for name in ("one", "two"))
    assert chosen([one, two]) == ([(1.0, 2.0)], [])
    pairs, _ = matched(*gather([one, two]))
    assert [s.label for s in labelled(pairs[0])] == ["a@100-model", "a@200-model"]
    with pytest.raises(ConfigError, match="are the same result"):
        chosen([one, f"{one.parent}/./one.json"])


def test_a_folder_may_hold_several_runs(made, tmp_path):
    made("a", 1.0)
    made("b", 2.0)
    made("b", 3.0, seed=1)
    found = sorted([s.result["metrics"][0]["value"] for s in run] for run in gather([tmp_path]))
    assert found == [[1.0], [2.0], [3.0]]


def test_labels_tell_apart(tmp_path):
    def labels(*sides):
        return [s.label for s in labelled(sides)]

    a, b, same = (Side(tmp_path / f"{n}.json", example(run=r), {}) for n, r in (("x", "a"), ("y", "b"), ("z", "a")))
    assert labels(a, b) == ["a", "b"]
    assert labels(a, same) == [str(tmp_path / "x"), str(tmp_path / "z")]
    evil = Side(tmp_path / "e.json", example(run="\x1b[31mred\nline"), {})
    assert labels(a, evil)[1] == " [31mred line"


# ---- command -----------------------------------------------------------------------------------------------------


def ran(capsys, *argv):
    status = main([str(word) for word in argv])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_command_pairs_the_items_on_disk(made, capsys):
    a, b = two_models()
    runs = [made(n, float(v.mean()), items=per_item(v)) for n, v in (("a", a), ("b", b))]
    status, out, err = ran(capsys, *runs, "--level", "0.9", "--draws", "500", "--seed", "3")
    assert status == 0 and err == ""
    assert "## a against b: digits, version 1 (aaaa)" in out and "90 % interval" in out and "paired on 400 items" in out
    assert "- a: flow, step 100, weights model, seed 0\n" in out and "| bits_per_dim | ≤ " in out
    assert "--family" not in out  # one interval is no family
    assert ran(capsys, *runs, "--level", "0.9", "--draws", "500", "--seed", "3")[1] == out
    few = [ran(capsys, *runs, "--draws", "100", "--seed", seed)[1] for seed in ("3", "4")]
    assert few[0] != few[1]  # 100 draws place a quantile to a fifth of a standard error


def test_the_first_is_compared_with_each_other(made, capsys):
    runs = [made(name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    _, out, _ = ran(capsys, *runs, "--family", "bonferroni")
    assert [line for line in out.splitlines() if line.startswith("##")] == [
        "## a against b: digits, version 1 (aaaa)",
        "## a against c: digits, version 1 (aaaa)",
    ]
    assert out.count("(97.5 % interval") == 2 and "levels of the 2 intervals follow Bonferroni" in out


def test_markup_in_names_is_shown_and_not_obeyed(made, capsys):
    _, out, _ = ran(capsys, made("a|b*<i>`"), made("c"))
    assert r"## a|b\*\<i>\` against c" in out
    head = next(line for line in out.splitlines() if line.startswith("| metric"))
    assert r" a\|b\*\<i>\` |" in head


def test_options_that_are_not_the_runs_own_are_named(made, capsys):
    config = {"sample": {"num_steps": 50, "guidance": 1.0}}
    own = made("a", config=config, answers=config)
    other = made("b", config=config, answers={"sample": {"num_steps": 10, "guidance": 1.0}}, overridden=True)
    _, out, _ = ran(capsys, own, other)
    assert "- b: flow, step 100, weights model, seed 0, sample.num_steps=10\n" in out


def test_files_that_are_no_results_are_left_out_with_a_word(made, capsys):
    a, b = made("a"), made("b")
    (a / "eval" / "digits" / "old.json").write_text(json.dumps({"schema": "genmodels.result/0"}))
    status, _, err = ran(capsys, a, b)
    assert status == 0 and err.startswith("left out: ") and "old.json" in err


def test_mistakes_are_explained(made, capsys, tmp_path):
    a, b = made("a"), made("b")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").touch()
    (empty / "eval").mkdir()
    old = tmp_path / "old.json"
    old.write_text(json.dumps({**example(), "schema": "genmodels.result/0"}))
    for argv, message in [
        ([a, a], "two runs are needed, found 1 in "),
        ([a], "To compare results of one run, name their files"),
        ([a, empty], f"{empty}: there are no results to compare. Make some: python -m evals.evaluate {empty}"),
        ([a, old], "old.json: it follows the schema genmodels.result/0, and this version reads genmodels.result/2"),
        ([a, tmp_path / "gone"], "gone: there is no such run, folder or result."),
        ([a, b, "--protocol", "other"], f"{a}: no result has protocol other. It has: digits (aaaa) at step 100"),
        ([a, b, "--level", "95"], "a level between 0 and 1"),
        ([a, b, "--draws", "5"], "at least 100 draws"),
        ([a, made("c", protocol_hash="bbbb")], "digits is not compared: its settings, metrics or data changed"),
        ([a, made("d", protocol="points", protocol_hash="ffff")], "d has points (ffff)"),
    ]:
        status, out, err = ran(capsys, *argv)
        assert (status, out) == (2, "") and err.startswith("error: ") and message in err, err
