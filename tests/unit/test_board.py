"""What failed is told and not ranked; which result stands for a run; what costs nothing; names are text."""

import csv
import io
import json

import pytest

from genmodels.evaluation.assemble import leaderboard
from genmodels.evaluation.exports import as_csv, as_json, wide_csv
from genmodels.evaluation.leaderboard import collect
from genmodels.evaluation.markdown import markdown
from genmodels.evaluation.page import page
from genmodels.evaluation.tables import escaped, short, show
from tests.board_results import example, likelihood, metric, store

NAN = float("nan")
FAILED = {"sample": {"items": 40, "of": 4000, "first": [3, 103, 203, 303, 403, 503], "reason": ""}}
WORDS = "40 of 4,000 samples are not finite (seeds 3, 103, 203, 303, 403, …)"


def html(results):
    return page(leaderboard(results), {result["id"]: result for result in results}, {})


def lines(text):
    return list(csv.DictReader(io.StringIO(text)))


# ---- failures ----------------------------------------------------------------------------------------------------


def broken():
    """A model with the best likelihood, some of whose samples are not finite, and a sound one."""
    best, failed = likelihood(1.0, kind="exact", entry=0), metric(value=NAN, stderr=None, entry=1)
    sound = [likelihood(2.0, kind="exact", entry=0)]
    return [example("broken", [best, failed], failures=FAILED), example("sound", sound, config={"x": 1})]


def test_a_row_whose_samples_are_not_finite_is_not_ranked_and_says_so_everywhere():
    results = broken()
    (board,) = leaderboard(results)
    assert [(row.name, row.rank, row.unranked) for row in board.rows] == [
        ("sound", (1, 1), None),
        ("broken", None, WORDS),
    ]
    text = markdown([board])
    assert f"- broken is not ranked: {WORDS}." in text
    assert [cell.strip() for cell in next(s for s in text.splitlines() if "| broken" in s).split("|")][4] == "failed"
    found = {line["metric"]: line for line in lines(as_csv([board])) if line["row"] == "broken"}
    assert found["bits_per_dim"]["not_ranked_because"] == WORDS
    assert (found["FD-digits"]["value"], found["FD-digits"]["kind"]) == ("", "failed")
    assert lines(wide_csv(board))[1]["FD-digits_kind"] == "failed"
    row = json.loads(as_json([board]))["boards"][0]["rows"][1]
    assert row["unranked"] == WORDS and row["cells"]["FD-digits"]["failed"]
    words = html(results)
    assert f"not ranked: <bdi>{WORDS}</bdi>" in words and '<td data-key="FD-digits">failed</td>' in words


def test_a_row_with_failures_takes_part_in_no_front():
    found = {f.cost: f.standing for f in leaderboard(broken())[0].frontiers if f.metric == "bits_per_dim"}
    assert found["parameters"] == ("front", "apart")


def test_answers_that_are_not_finite_bar_whatever_the_question():
    failed = {"likelihood": {"items": 1, "of": 50, "first": [7], "reason": ""}}
    (row,) = leaderboard([example("a", [metric(), likelihood(NAN, None)], failures=failed)])[0].rows
    assert row.rank is None and row.unranked == "1 of 50 answers to likelihood are not finite (items 7)"


def test_estimates_that_failed_though_their_answers_are_finite_are_named():
    results = [example("a", [metric(), likelihood(NAN, None), metric("other", NAN, None, entry=2)])]
    (row,) = leaderboard(results)[0].rows
    assert row.rank is None and row.unranked == "bits_per_dim, other failed"


def test_of_several_seeds_the_run_that_failed_is_named():
    failed = example("a1", [metric(value=NAN, stderr=None)], seed=1, failures=FAILED)
    (row,) = leaderboard([example("a0", [metric(value=1.0)]), failed])[0].rows
    assert row.unranked == f"{WORDS} in a1 (training seed 1)"
    assert row.cells["FD-digits"].failed and row.cells["FD-digits"].value is None


def test_an_estimate_that_one_seed_lacks_has_no_mean_and_did_not_fail():
    results = [example("a0", [metric(), likelihood(2.0)]), example("a1", [metric()], seed=1)]
    (row,) = leaderboard(results)[0].rows
    assert row.cells["bits_per_dim"].value is None and not row.cells["bits_per_dim"].failed
    assert row.cells["FD-digits"].value is not None


def test_a_metric_that_could_not_be_computed_never_takes_the_place_of_its_estimates():
    """It is told under the metric's own name, which has no direction and may come first in the alphabet."""
    failed = metric("FD", NAN, None, better="none")
    (board,) = leaderboard([example("a", [failed], failures=FAILED), example("b", [metric()], config={"x": 1})])
    assert [column.name for column in board.columns] == ["FD-digits", "FD"]
    assert [(row.name, row.rank) for row in board.rows] == [("b", (1, 1)), ("a", None)]


# ---- rows --------------------------------------------------------------------------------------------------------


def test_the_newest_result_counts_whatever_its_checksum():
    old = [example("a", [metric(value=9.0)], created="2026-01-01T00:00:00Z", seconds=float(k)) for k in range(8)]
    new = example("a", [metric(value=1.0)], created="2026-02-01T00:00:00Z")
    assert min(result["id"] for result in old) < new["id"] < max(result["id"] for result in old)
    for result in old:
        (row,) = leaderboard([new, result])[0].rows
        assert row.cells["FD-digits"].value == 1.0


def test_results_that_newer_ones_replace_are_named(tmp_path, capsys):
    dates = ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z", "2026-03-01T00:00:00Z")
    for k, created in enumerate(dates):
        store(tmp_path / f"{k}.json", example("a", created=created))
    store(tmp_path / "copy.json", example("a", created=dates[2]))
    for name, more in {"seed": {"seed": 1}, "hash": {"protocol_hash": "b"}, "step": {"model": {"step": 7}}}.items():
        store(tmp_path / f"{name}.json", example("a", created=dates[0], **more))
    assert len(collect([tmp_path], strict=False).results) == 6
    told = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in told] == [
        f"left out: {tmp_path / f'{k}.json'} is older than {tmp_path / 'copy.json'}" for k in range(2)
    ]


def test_references_are_the_middle_of_what_results_say():
    results = [
        example("a", [metric(references={"floor": v})], config={"x": k}) for k, v in enumerate((1.0, 9.0, 2.0, 8.0))
    ]
    assert leaderboard(results)[0].references == {"floor": {"FD-digits": 2.0}}


# ---- text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[link](http://x)", "`code`", "*bold*", "_soft_", "<b>", "~~gone~~", "&lt;", "# x"])
def test_markup_in_names_is_shown_literally(name):
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    inline = reader.parseInline(escaped(name))[0].children
    assert {token.type for token in inline} <= {"text", "text_special"}
    assert "".join(token.content for token in inline) == name
    text = markdown(leaderboard([example(name, [metric(stderr=None)])]))
    _, _, row = [line for line in text.splitlines() if line.startswith("|")]
    note = next(line for line in text.splitlines() if line.startswith("- "))
    assert f" {escaped(name)} " in row and note.startswith(f"- {escaped(name)} is not ranked")
    assert not [token for token in reader.parse(note) if token.type == "heading_open"]


def test_names_that_need_no_escape_have_none():
    assert escaped("digits-flow_matching sample.num_steps=10 (mean of 3 seeds)") == (
        "digits-flow_matching sample.num_steps=10 (mean of 3 seeds)"
    )


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (0.150848245455895702, 6.3e-18, "0.15084825 ± 6.3e-18"),
        (1.00486332192469107e36, 2.5e29, "1.0048633e+36 ± 2.5e+29"),
        (-1.00486332192469107e36, 2.5e34, "-1.005e+36 ± 2.5e+34"),
        (1.0, 1e9, "1 ± 1e+09"),
        (123456.78, 0.12, "123456.78 ± 0.12"),
        (1.25e-9, 2.0e-10, "1.25e-09 ± 2e-10"),
        (0.0, 0.5, "0.00 ± 0.50"),
    ],
)
def test_values_are_shown_with_eight_digits_at_most(value, stderr, text):
    assert show(value, stderr) == text


def test_huge_values_have_exponents():
    assert short(1.00486332192469107e36) == "1.005e+36" and short(-2e12) == "-2e+12"
    assert short(2e11) == "200,000,000,000"
