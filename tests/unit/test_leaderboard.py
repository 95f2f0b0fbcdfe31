"""Rank intervals, what may share a table, and that the same results always give the same bytes."""

import base64
import csv
import io
import json
import random
from html.parser import HTMLParser

import numpy as np
import pytest

from genmodels.evaluation import leaderboard as module
from genmodels.evaluation.assemble import leaderboard
from genmodels.evaluation.costs import cost
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.exports import as_csv, as_json, wide_csv
from genmodels.evaluation.leaderboard import collect, main, write_all
from genmodels.evaluation.markdown import markdown
from genmodels.evaluation.ranking import difference_stderr
from genmodels.evaluation.results import Items
from tests.board_results import BILL, example, likelihood, metric, picture, store
from tests.evaluation_fakes import FakeProtocol, FakeRun, Levels, UniformLevels


def run(name, value, stderr=0.1, seed=0, **more):
    metrics = more.pop("metrics", None) or [metric(value=value, stderr=stderr, **more.pop("metric", {}))]
    return example(
        run=name, metrics=metrics, seed=seed, config={"model": {"name": more.pop("model_name", name)}}, **more
    )


def ranks(results, items=None):
    (board,) = leaderboard(results, items)
    return {row.name: row.rank for row in board.rows}


def order(results):
    return [row.name for row in leaderboard(results)[0].rows]


# ---- ranks -------------------------------------------------------------------------------------------------------


def test_clear_differences_give_single_places():
    assert ranks([run("a", 3.0), run("b", 1.0), run("c", 2.0)]) == {"b": (1, 1), "c": (2, 2), "a": (3, 3)}


def test_differences_within_the_error_share_places():
    # 1.96·√2·0.1 = 0.277: a and b are tied, b and c are tied, a beats c
    assert ranks([run("a", 1.0), run("b", 1.2), run("c", 1.4)]) == {"a": (1, 2), "b": (1, 3), "c": (2, 3)}


def test_threshold_is_two_sided_five_per_cent():
    width = 1.96 * np.sqrt(2) * 0.1
    assert ranks([run("a", 1.0), run("b", 1.0 + 0.999 * width)]) == {"a": (1, 2), "b": (1, 2)}
    assert ranks([run("a", 1.0), run("b", 1.0 + 1.001 * width)]) == {"a": (1, 1), "b": (2, 2)}


def test_equal_values_are_tied_and_sorted_by_name():
    results = [run("b", 1.0), run("a", 1.0)]
    assert ranks(results) == {"a": (1, 2), "b": (1, 2)} and order(results) == ["a", "b"]


def test_higher_may_be_better():
    up = {"better": "higher"}
    assert ranks([run("a", 0.9, 0.01, metric=up), run("b", 0.5, 0.01, metric=up)]) == {"a": (1, 1), "b": (2, 2)}


def paired(noise):
    """Two models whose per-item values move together; the second is worse by 0.05 for every item."""
    shared = np.random.default_rng(0).normal(2.0, 1.0, 100)
    values = [shared, shared + 0.05 + noise * np.random.default_rng(1).normal(size=100)]
    results = [run(n, float(v.mean()), float(v.std(ddof=1) / 10)) for n, v in zip("ab", values, strict=True)]
    return results, {r["id"]: {"FD-digits": Items(np.arange(100), v)} for r, v in zip(results, values, strict=True)}


def test_items_in_common_sharpen_the_comparison():
    results, items = paired(noise=0.05)
    assert ranks(results) == {"a": (1, 2), "b": (1, 2)}
    assert ranks(results, items) == {"a": (1, 1), "b": (2, 2)}
    (board,) = leaderboard(results, items)
    difference = np.subtract(*[items[r["id"]]["FD-digits"].values for r in results])
    assert difference_stderr(*board.rows, "FD-digits", items) == pytest.approx(difference.std(ddof=1) / 10)


def test_other_items_are_not_paired():
    results, items = paired(noise=0.05)
    items[results[1]["id"]]["FD-digits"] = items[results[1]["id"]]["FD-digits"]._replace(ids=np.arange(1, 101))
    assert ranks(results, items) == {"a": (1, 2), "b": (1, 2)}


def test_training_seeds_are_averaged_with_their_spread_and_not_paired():
    results = [run(f"a{s}", v, seed=s, model_name="a") for s, v in enumerate((1.0, 2.0, 3.0))] + [run("b", 2.1)]
    ids = {r["id"]: {"FD-digits": Items(np.arange(9), np.full(9, r["metrics"][0]["value"]))} for r in results}
    (board,) = leaderboard(results, ids)
    row = board.rows[0]
    assert row.seeds == (0, 1, 2) and row.runs == ("a0", "a1", "a2")
    assert row.cells["FD-digits"].value == pytest.approx(2.0)
    assert row.cells["FD-digits"].stderr == pytest.approx(1 / np.sqrt(3))
    assert [r.rank for r in board.rows] == [(1, 2), (1, 2)]
    assert "a0 (mean of 3 seeds)" in markdown([board])


# ---- what is not ranked ------------------------------------------------------------------------------------------


def test_missing_values_come_last_and_take_no_place():
    results = [run("a", None, None, metric={}, metrics=[metric("bits_per_dim", 2.0, entry=1)]), run("b", 9.0)]
    assert ranks(results) == {"b": (1, 1), "a": None} and order(results) == ["b", "a"]
    text = markdown(leaderboard(results))
    assert "| 9.00 ± 0.10 |" in text.replace("  ", " ") and "a is not ranked: no FD-digits." in text


def test_without_an_error_there_is_no_rank():
    results = [run("a", 1.0, None), run("b", 2.0)]
    assert ranks(results) == {"b": (1, 1), "a": None} and order(results) == ["b", "a"]


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_unranked_rows_follow_in_order_of_value_and_missing_ones_last(better):
    kind = {"better": better}
    results = [run("gone", None, None, metrics=[metric("other", entry=1)]), run("x", 1.0, None, metric=kind)]
    results += [run("y", 2.0, None, metric=kind), run("z", 3.0, metric=kind)]
    assert order(results) == ["z", *(["x", "y"] if better == "lower" else ["y", "x"]), "gone"]


def test_flagged_models_are_shown_and_not_ranked():
    copied = metric("copies", 1.0, 0.0, entry=1, better="none", flags=["overlap_suspected"])
    results = [run("cheat", 0.1, metrics=[metric(value=0.1), copied]), run("honest", 2.0)]
    assert ranks(results) == {"honest": (1, 1), "cheat": None}
    assert "cheat is not ranked: overlap suspected." in markdown(leaderboard(results))


def test_unfinished_training_is_shown_and_not_ranked():
    cut = {"step": 400, "steps": 2000}
    results = [run("cut", 0.1, model=cut), run("best", 1.0, model={**cut, "weights": "best"}), run("whole", 2.0)]
    assert ranks(results) == {"best": (1, 1), "whole": (2, 2), "cut": None}
    assert "cut is not ranked: training unfinished (400 of 2,000 steps)." in markdown(leaderboard(results))


def test_all_reasons_are_told():
    copied = metric("copies", 1.0, 0.0, entry=1, better="none", flags=["overlap_suspected", "another_thing"])
    (row,) = leaderboard([run("a", 1.0, metrics=[metric(), copied], model={"step": 4})])[0].rows
    assert row.unranked == "another thing, overlap suspected, training unfinished (4 of 100 steps)"


def test_no_other_metric_ranks_in_place_of_the_first():
    second = [metric("bits_per_dim", 2.0, entry=1)]
    assert ranks([run("a", 0, metrics=second), run("b", 0, metrics=second)]) == {"a": None, "b": None}
    assert "a is not ranked: its first metric was not measured." in markdown(leaderboard([run("a", 0, metrics=second)]))


# ---- rows and boards ---------------------------------------------------------------------------------------------


def test_other_protocol_hashes_never_share_a_table():
    boards = leaderboard([run("a", 1.0), run("b", 2.0, protocol_hash="bbbb"), run("c", 3.0, protocol="demo")])
    assert [(b.protocol, b.hash, [r.name for r in b.rows]) for b in boards] == [
        ("demo", "aaaa", ["c"]),
        ("digits", "aaaa", ["a"]),
        ("digits", "bbbb", ["b"]),
    ]
    assert markdown(boards).count("\n## ") == 3


def test_weights_steps_and_options_are_rows_of_their_own():
    base = run("a", 1.0)
    others = [run("a", 2.0, model={"weights": "ema"}), run("a", 3.0, model={"step": 200})]
    others.append(run("a", 4.0, answers={"sample": {"num_steps": 10}}, overridden=True))
    (board,) = leaderboard([base, *others])
    assert len(board.rows) == 4 and board.rows[3].options == "sample.num_steps=10"
    assert "a sample.num_steps=10" in markdown([board])


def labels(results):
    return sorted(row.label for row in leaderboard(results)[0].rows)


def test_configurations_of_one_name_are_told_apart():
    results = [
        run("try", 1.0, model_name=m, model={"config_hash": f"{h}cdef"}) for m, h in (("a", "77ab12"), ("b", "0"))
    ]
    assert labels([*results, run("other", 3.0)]) == ["other", "try (0cdef)", "try (77ab12)"]


def test_weights_and_steps_of_one_configuration_are_told_apart_by_what_differs():
    results = [run("a", 1.0, model={"step": s, "weights": w}) for s, w in ((100, "ema"), (100, "model"), (50, "model"))]
    assert labels(results) == ["a (ema)", "a (model) (step 100)", "a (model) (step 50)"]
    assert labels(results[1:]) == ["a (step 100)", "a (step 50)"]


def test_what_no_fact_tells_apart_the_result_does():
    results = [run("a", 1.0, model_name=m) for m in "xy"]
    assert labels(results) == sorted(f"a ({r['id'][:6]})" for r in results)


def test_identical_results_collapse():
    assert labels([run("a", 1.0), run("a", 1.0)]) == ["a"]


def test_the_newest_result_of_a_seed_counts():
    old, new = run("a", 9.0, created="2026-01-01T00:00:00Z"), run("a", 1.0, created="2026-02-01T00:00:00Z")
    (board,) = leaderboard([new, old])
    assert len(board.rows) == 1 and board.rows[0].cells["FD-digits"].value == 1.0


def test_uncommitted_changes_and_costs_are_shown():
    text = markdown(leaderboard([run("a", 1.0, training={"dirty": True})]))
    header, _, line = [[cell.strip() for cell in s.split("|")] for s in text.splitlines() if s.startswith("|")]
    shown = dict(zip(header, line, strict=True))
    assert shown["commit"] == "abcdef1+" and shown["NFE"] == "50" and shown["s/item"] == "0.025"
    assert shown["FLOPs/item"] == "2.00 M" and shown["parameters"] == "72,842" and shown["peak memory"] == "300 MiB"
    assert shown["training s × devices"] == "19"  # 9.5 s on 2 devices


def test_costs_are_of_the_question_that_feeds_the_ranking_metric():
    costs = {"sample": BILL, "likelihood": {**BILL, "nfe": 7.0}}
    (board,) = leaderboard([run("a", 1.0, cost=costs), run("b", 0, metrics=[likelihood(2.0)], cost=costs)])
    assert [cost(row, board.columns[0], "nfe") for row in board.rows] == [50.0, 50.0]
    assert [cost(row, board.columns[1], "nfe") for row in board.rows] == [7.0, 7.0]
    (board,) = leaderboard([run("b", 0, metrics=[likelihood(2.0, entry=0)], cost=costs)])
    assert cost(board.rows[0], board.columns[0], "nfe") == 7.0


def test_rows_of_other_questions_have_their_own_costs():
    """A metric that takes samples or predictions: each row has the price of the answers that it gave."""
    costs = {"sample": BILL, "predict": {**BILL, "nfe": 3.0}}
    results = [run(n, 1.0, metric={"question": q}, cost=costs) for n, q in (("a", "sample"), ("b", "predict"))]
    (board,) = leaderboard(results)
    assert {row.name: cost(row, board.first, "nfe") for row in board.rows} == {"a": 50.0, "b": 3.0}


def test_costs_that_were_not_measured_are_no_columns():
    bill = {**BILL, "flops_per_item": None, "peak_memory": None}
    text = markdown(leaderboard([run("a", 1.0, cost={"sample": bill}, training={"seconds": None})]))
    assert "NFE" in text and not any(word in text for word in ("FLOPs", "peak memory", "training s ×"))


def test_costs_of_training_seeds_are_averaged():
    results = [
        run(f"a{s}", 1.0, seed=s, model_name="a", training={"seconds": 10.0 * s, "world_size": 1}) for s in (1, 2)
    ]
    assert leaderboard(results)[0].rows[0].training == 15.0


def test_references_stand_apart():
    results = [run("a", 1.0, metric={"references": {"floor": 0.9, "uniform noise": 88.7}})]
    text = markdown(leaderboard(results))
    table, apart = text.split("to read them against")
    assert "uniform noise" in apart and "88.7" in apart and "88.7" not in table
    assert leaderboard(results)[0].references["floor"] == {"FD-digits": 0.9}


def test_symbols_say_what_a_likelihood_is():
    rows = [
        run(k, 2.05, 0.01, metric={"name": "bits_per_dim", "kind": k})
        for k in ("pmf", "bound", "numerical", "stochastic")
    ]
    text = markdown(leaderboard(rows))
    assert all(f"{symbol} 2.050 ± 0.010" in text for symbol in "=≤≈~")


# ---- what is worth its price -------------------------------------------------------------------------------------


def priced(name, value, nfe, stderr=0.1, **more):
    return run(name, value, stderr, cost={"sample": {**BILL, "nfe": nfe}}, **more)


def standing(results, cost="nfe", items=None):
    (board,) = leaderboard(results, items)
    (found,) = [f for f in board.frontiers if f.metric == "FD-digits" and f.cost == cost]
    return dict(zip([row.name for row in board.rows], found.standing, strict=True))


def test_front_holds_what_nothing_as_cheap_beats():
    results = [
        priced("cheap", 5.0, 1.0),
        priced("good", 1.0, 100.0),
        priced("bad", 6.0, 50.0),
        priced("dear", 1.1, 200.0),
    ]
    assert standing(results) == {"good": "front", "dear": "tied", "cheap": "front", "bad": "dominated"}


def test_equal_prices_compete():
    assert standing([priced("a", 1.0, 10.0), priced("b", 2.0, 10.0)]) == {"a": "front", "b": "dominated"}


def test_threshold_of_the_front_is_that_of_ranks():
    width = 1.96 * np.sqrt(2) * 0.1
    for factor, expected in ((0.999, "tied"), (1.001, "dominated")):
        assert standing([priced("a", 1.0, 1.0), priced("b", 1.0 + factor * width, 2.0)])["b"] == expected


def test_higher_may_be_better_on_the_front():
    up = {"better": "higher"}
    results = [priced("a", 0.9, 1.0, 0.01, metric=up), priced("b", 0.5, 2.0, 0.01, metric=up)]
    assert standing(results) == {"a": "front", "b": "dominated"}


def test_items_in_common_sharpen_the_front():
    results, items = paired(noise=0.05)
    assert standing(results) == {"a": "front", "b": "tied"}
    assert standing(results, items=items) == {"a": "front", "b": "dominated"}


def test_unranked_rows_stand_apart_from_the_front():
    results = [priced("cut", 0.1, 1.0, model={"step": 1}), priced("no error", 0.1, 1.0, None), priced("a", 2.0, 9.0)]
    results += [priced("free", 1.0, 0.0)]
    assert standing(results) == {"cut": "apart", "no error": "apart", "a": "dominated", "free": "front"}


def test_what_costs_nothing_is_the_cheapest():
    free = [priced("replay", 1.0, 0.0), priced("gaussian", 9.0, 0.0)]
    results = [*free, priced("good", 0.5, 10.0), priced("poor", 2.0, 1.0)]
    expected = {"good": "front", "replay": "front", "poor": "dominated", "gaussian": "dominated"}
    assert standing(results) == expected
    for name in ("parameters", "training"):
        free = {"model": {"parameters": 0}, "training": {"seconds": 0.0}}
        results = [run("replay", 1.0, **free), run("poor", 2.0), run("good", 0.5)]
        assert standing(results, name) == {"good": "front", "replay": "front", "poor": "dominated"}


def test_seconds_of_different_machines_have_no_front():
    other = {"hardware": "another machine"}
    (board,) = leaderboard([run("a", 1.0), run("b", 2.0, training=other)])
    assert {f.cost: f.comparable for f in board.frontiers} == {"nfe": True, "parameters": True, "training": False}
    (board,) = leaderboard([run("a", 1.0), run("b", 2.0, training=other, model={"step": 1})])
    assert all(f.comparable for f in board.frontiers)


def test_the_first_likelihood_is_drawn_too():
    second = likelihood(2.0, entry=1)
    (board,) = leaderboard([run("a", 1.0, metrics=[metric(value=1.0), metric("KID", entry=1), second])])
    assert [f.metric for f in board.frontiers[::3]] == ["FD-digits", "bits_per_dim"]
    (board,) = leaderboard([run("a", 1.0, metrics=[likelihood(2.0, entry=0)])])
    assert [f.metric for f in board.frontiers[::3]] == ["bits_per_dim"]


def many():
    rng = random.Random(0)
    return [run(f"r{k}", round(rng.uniform(0, 2), 3), seed=k % 2, model_name=f"m{k // 2}") for k in range(12)]


def test_same_results_same_bytes_in_any_order():
    results = many()
    text, data, table = (form(leaderboard(results)) for form in (markdown, as_json, as_csv))
    for seed in range(5):
        shuffled = random.Random(seed).sample(results, len(results))
        assert markdown(leaderboard(shuffled)) == text and as_json(leaderboard(shuffled)) == data
        assert as_csv(leaderboard(shuffled)) == table
    json.loads(data, parse_constant=lambda c: pytest.fail(c))


def test_names_cannot_break_the_table():
    header, _, line = [s for s in markdown(leaderboard([run("a|b", 1.0)])).splitlines() if s.startswith("|")]
    assert "a\\|b" in line and line.replace("\\|", "").count("|") == header.count("|")


def lines(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_a_line_for_every_number_in_full():
    third = 1 / 3
    rows = [run('a "quoted", name', third, metrics=[metric(value=third), likelihood(2.0, kind="pmf")])]
    found = {line["metric"]: line for line in lines(as_csv(leaderboard([*rows, run("b", 9.0)])))}
    assert found["FD-digits"]["row"] == "b"
    found = {line["metric"]: line for line in lines(as_csv(leaderboard(rows)))}
    assert found["FD-digits"]["row"] == 'a "quoted", name' and float(found["FD-digits"]["value"]) == third
    assert (found["FD-digits"]["rank_low"], found["FD-digits"]["rank_high"]) == ("1", "1")
    assert found["bits_per_dim"]["kind"] == "pmf" and found["bits_per_dim"]["rank_low"] == ""
    assert float(found["nfe"]["value"]) == 50 and found["nfe"]["kind"] == "cost"


def test_csv_tells_why_a_row_is_not_ranked_even_without_a_value():
    gone = run("gone", None, None, metrics=[metric("other", entry=1)])
    (line,) = [s for s in lines(as_csv(leaderboard([gone, run("b", 9.0)]))) if s["not_ranked_because"]]
    assert (line["row"], line["metric"], line["value"]) == ("gone", "FD-digits", "")
    assert line["not_ranked_because"] == "no FD-digits"


def test_wide_csv_has_a_line_for_every_row():
    (board,) = leaderboard([run("a", 1.0, metrics=[metric(value=1.0), likelihood(2.0)]), run("b", 9.0)])
    first, second = lines(wide_csv(board))
    assert (first["row"], first["FD-digits"], first["bits_per_dim_kind"], first["nfe"]) == ("a", "1.0", "bound", "50.0")
    assert (second["row"], second["rank_low"], second["bits_per_dim"]) == ("b", "2", "")


def test_no_results():
    assert leaderboard([]) == [] and "no results yet" in markdown([])


# ---- files and command -------------------------------------------------------------------------------------------


def test_the_published_board_is_what_its_results_say():
    assert main(["--check"]) == 0


FILES = ("LEADERBOARD.md", "leaderboard.csv", "leaderboard.html", "leaderboard.json")


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "EVALS", tmp_path / "evals")
    for k, result in enumerate(many()):
        store(tmp_path / "evals" / "results" / "digits" / f"{k}.json", result)
    return tmp_path / "evals"


def test_published_board_is_regenerated_and_checked(published, capsys):
    assert main(["--check"]) == 2 and "out of date" in capsys.readouterr().err
    assert main([]) == 0
    files = {published / name: (published / name).read_bytes() for name in FILES}
    assert main(["--check"]) == 0 and main([]) == 0
    assert files == {p: p.read_bytes() for p in files}
    assert not [p for p in published.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_checked(published, name):
    assert main([]) == 0
    (published / name).write_text("typed by hand")
    assert main(["--check"]) == 2


def test_a_bad_published_file_is_an_error_and_a_bad_private_one_a_warning(published, tmp_path, capsys):
    (published / "results" / "benchmarks").mkdir()
    (published / "results" / "benchmarks" / "speed.json").write_text("{}")
    assert main([]) == 0
    (published / "results" / "digits" / "bad.json").write_text("{}")
    assert main([]) == 2 and "bad.json" in capsys.readouterr().err
    assert main([str(published / "results")]) == 0
    shown = capsys.readouterr()
    assert "left out" in shown.err and "## digits" in shown.out
    assert main([str(published / "results"), "--out", str(tmp_path / "board")]) == 0
    assert (tmp_path / "board" / "LEADERBOARD.md").read_text() + "\n" == capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2 and "no results" in capsys.readouterr().err


def test_from_model_to_table(tmp_path):
    """The whole way: two samplers evaluated, compared pairwise by their items."""
    data = Levels()
    protocol = FakeProtocol(data, ["bits_per_dim", "frechet"], sample={"num_items": 300})
    for name in ("one", "two"):
        fake = FakeRun(tmp_path / "runs" / name, UniformLevels())
        fake.config.tree["model"] = {"name": name}
        (fake.path).mkdir(parents=True)
        (fake.path / "config.yaml").write_text("")
        evaluate(fake, protocol, device="cpu")
    collection = collect(sorted((tmp_path / "runs").iterdir()), strict=True)
    (board,) = collection.boards()
    assert [(row.name, row.rank) for row in board.rows] == [("one", (1, 2)), ("two", (1, 2))]
    assert [c.name for c in board.columns] == ["bits_per_dim", "FD-pixels"]
    text = markdown([board])
    assert "= 2.322" in text and "uniform" in text
    page = write_all(collection, tmp_path)[tmp_path / "leaderboard.html"]
    assert all(f"<summary><bdi>{name}</bdi>" in page for name in ("one", "two")) and "ema-0.999 after step 12" in page


def test_pictures_beside_results_are_on_the_page(published):
    store(published / "results" / "digits" / "seen.json", run("seen", 1.0), grid=picture())
    assert main([]) == 0
    assert base64.b64encode(picture()).decode() in (published / "leaderboard.html").read_text()


def test_the_board_of_runs_is_written_beside_them_and_not_read_as_a_result(tmp_path, capsys):
    store(tmp_path / "runs" / "a.json", run("a", 1.0))
    for _ in range(2):
        assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "runs")]) == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {*FILES, "a.json"} and not capsys.readouterr().err


def test_markdown_holds_no_html():
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(markdown(leaderboard([*many(), run("<img src=x>", 1.0, None)])).replace("\\<", "&lt;"))
    assert not found
