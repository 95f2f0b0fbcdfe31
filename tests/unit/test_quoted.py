"""Figures of papers: shown with their source in every output, compared with nothing, and checked when read."""

import csv
import io
import json

import pytest

from genmodels.evaluation.assemble import leaderboard
from genmodels.evaluation.exports import as_csv, as_json, wide_csv
from genmodels.evaluation.leaderboard import EVALS
from genmodels.evaluation.markdown import markdown
from genmodels.evaluation.protocol import Protocol, tree_of
from genmodels.evaluation.quoted import load_quoted, quoted_for, read_quoted
from genmodels.registry import ConfigError
from tests.board_results import example, likelihood, metric

GOOD = """
columns: [FD-digits, bits_per_dim]
rows:
  - name: Paper
    source: Somebody 2020, table 3
    values: {FD-digits: 0.5, bits_per_dim: {value: 1.5, stderr: 0.01, kind: bound}}
    nfe: 35
    note: other data
"""


@pytest.fixture
def quoted(tmp_path):
    (tmp_path / "digits.yaml").write_text(GOOD)
    return {"aaaa": load_quoted(tmp_path, ["digits", "other"])["digits"]}


def results():
    return [example("a", [metric(value=1.0), likelihood(2.0)]), example("b", [metric(value=9.0)], config={"x": 1})]


def test_quoted_rows_come_last_and_are_compared_with_nothing(quoted):
    (board,), (without,) = leaderboard(results(), quoted=quoted), leaderboard(results())
    assert board.rows == without.rows and board.frontiers == without.frontiers
    assert [row.name for row in board.quoted] == ["Paper"]


def test_every_output_says_that_they_are_quoted_and_from_where(quoted):
    boards = leaderboard(results(), quoted=quoted)
    text = markdown(boards)
    line = next(s for s in text.splitlines() if "Paper" in s)
    assert text.index("| Paper") > text.index("| b") and line.split("|")[1].strip() == "quoted"
    assert "0.5" in line and "≤ 1.500 ± 0.010" in line and " 35 " in line
    assert "- Paper is quoted from Somebody 2020, table 3 (other data)." in text
    long = [line for line in csv.DictReader(io.StringIO(as_csv(boards))) if line["row"] == "Paper"]
    assert {(line["status"], line["source"], line["rank_low"]) for line in long} == {
        ("quoted", "Somebody 2020, table 3", "")
    }
    assert [line["metric"] for line in long] == ["FD-digits", "bits_per_dim", "nfe"]
    assert "Paper,quoted,,,0.5" in wide_csv(boards[0])
    assert json.loads(as_json(boards))["boards"][0]["quoted"][0]["source"] == "Somebody 2020, table 3"


def test_without_measured_rows_or_common_columns_nothing_is_quoted(quoted):
    assert leaderboard([], quoted=quoted) == []
    assert leaderboard([example(metrics=[metric("KID")])], quoted=quoted)[0].quoted == ()
    assert leaderboard([example(protocol_hash="bbbb")], quoted=quoted)[0].quoted == ()


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed("    source: Somebody 2020, table 3\n", ""), r"rows\[0\]: 'source' is missing"),
        (changed("source: Somebody 2020, table 3", "source: ''"), r"rows\[0\]: 'source' is missing"),
        (changed("source: Somebody 2020, table 3", "source: 3"), r"rows\[0\].source: text is needed, found 3"),
        (changed("FD-digits: 0.5", "FD-digit: 0.5"), "no column 'FD-digit'. Did you mean 'FD-digits'"),
        (changed("FD-digits: 0.5", "FD-digits: good"), "FD-digits: a finite number is needed, found 'good'"),
        (changed("FD-digits: 0.5", "FD-digits: .nan"), "a finite number is needed"),
        (changed("value: 1.5, ", ""), r"values.bits_per_dim: 'value' is missing"),
        (changed("kind: bound", "kind: bond"), "kind: one of pmf, exact, bound"),
        (changed("nfe: 35", "nfe: true"), r"rows\[0\].nfe: a finite number"),
        (changed("FD-digits: 0.5", f"FD-digits: {10**400}"), "a finite number is needed"),
        (changed("nfe: 35", "nfe: 0"), r"rows\[0\].nfe: a number above 0 is needed, found 0"),
        (changed("nfe: 35", "parameters: -5.0"), r"rows\[0\].parameters: a number above 0 is needed, found -5"),
        (changed("stderr: 0.01", "stderr: -0.01"), r"bits_per_dim.stderr: .* not negative is needed, found -0.01"),
        (changed("note:", "notes:"), "'notes' is unknown. Did you mean 'note'"),
        (changed("columns: [FD-digits, bits_per_dim]", ""), "'columns' is missing"),
        (changed("columns: [FD-digits, bits_per_dim]", "columns: FD"), "columns: a list of names is needed"),
        ("columns: [a]\nrows: [3]", r"rows\[0\]: a mapping is needed, found 3"),
        ("columns: [a]\nrows: {b: 3}", "rows: a list is needed"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, text, words):
    path = tmp_path / "digits.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        read_quoted(path)
    assert str(path) in str(error.value)


def under(tree, name="power"):
    result = example("a", [metric("nll", 1.0)], protocol=name, protocol_hash="cccc")
    return {**result, "protocol": {**result["protocol"], "tree": tree}}


@pytest.fixture
def power():
    """The tree of the frozen protocol as results hold it: read from JSON, without the place of the data."""
    tree = Protocol(tree_of("power"), {"path": "data/here"}).portable
    return json.loads(json.dumps(tree))


def test_figures_are_quoted_under_the_frozen_protocol_only(power):
    rows = quoted_for([under(power)], EVALS / "quoted")["cccc"]
    assert rows and rows == read_quoted(EVALS / "quoted" / "power.yaml")
    (board,) = leaderboard([under(power)], quoted={"cccc": rows})
    assert board.quoted == rows
    for words in ({"description": "In other words."}, {"imports": ["my.code"]}):
        assert quoted_for([under(power | words)], EVALS / "quoted")
    for change in (
        {"version": 2},
        {"likelihood": {**power["likelihood"], "split": "val"}},
        {"likelihood": {**power["likelihood"], "num_items": 100}},
        {"dataset": {**power["dataset"], "table": "gas"}},
        {"metrics": [*power["metrics"], {"name": "prdc"}]},
        {"name": "mine"},
        {"name": ["power"]},
        {"name": "../quoted/power"},
    ):
        assert quoted_for([under(power | change)], EVALS / "quoted") == {}


def test_every_file_of_figures_belongs_to_a_protocol_that_results_can_be_under():
    for path in (EVALS / "quoted").glob("*.yaml"):
        tree = tree_of(path.stem)
        node = tree["dataset"] if isinstance(tree["dataset"], dict) else {}
        places = {key: "here" for key, value in node.items() if value == "???"}
        result = under(Protocol(tree, places).portable, path.stem)
        assert quoted_for([result], EVALS / "quoted")["cccc"] == read_quoted(path)


@pytest.mark.parametrize("path", sorted((EVALS / "quoted").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_read(path):
    assert read_quoted(path)
    assert all(isinstance(row.source, str) and len(row.source) > 10 for row in read_quoted(path))


def test_shipped_files_belong_to_protocols():
    names = {path.stem for path in (EVALS / "quoted").glob("*.yaml")}
    assert names and names <= {path.stem for path in (EVALS / "protocols").glob("*.yaml")}


def test_published_log_likelihoods_changed_their_sign():
    """Papers report mean log-likelihood, boards its negative: 0.66 nats became -0.66, and -9.22 became 9.22."""
    found = load_quoted(EVALS / "quoted", ["power", "miniboone"])
    values = {name: {row.name: row.cells["nll"].value for row in rows} for name, rows in found.items()}
    assert values["power"]["RQ-NSF (AR)"] == -0.66 and values["miniboone"]["RQ-NSF (AR)"] == 9.22
