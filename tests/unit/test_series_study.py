"""The study of series with gaps: its runs are what they say they are, and its table says what its results do."""

import pytest

from evals.studies import series
from evals.studies.plans import ROOT
from genmodels.config import load, read
from genmodels.data.dataset import Dataset
from genmodels.evaluation.protocol import FOLDER
from genmodels.registry import resolve


def config(plan):
    return load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *plan.overrides])


def test_runs_are_scored_on_the_rows_that_they_were_trained_to_read():
    plans = list(series.digits())
    assert len({plan.name for plan in plans}) == len(plans) == 36
    for plan in plans:
        tree = config(plan).tree
        asked = read(FOLDER / f"{plan.protocol}.yaml")["dataset"]
        assert resolve(Dataset, asked, "dataset") == tree["data"]
        assert plan.name == f"series-{plan.name.split('-', 1)[1].rsplit('-', 2)[0]}-{_lost(tree)}-{tree['seed']}"


def _lost(tree):
    return round(100 * tree["data"]["dropped"])


def test_models_are_of_one_size():
    """Within a factor of 1.25, so that what differs is how they read."""
    facts = {"shape": [8, 8], "target_shape": [10], "transform": {"name": "identity"}}
    facts |= {"num_classes": None, "condition_shape": None, "bin_width": None}
    plans = {plan.name.rsplit("-", 2)[0]: plan for plan in series.digits()}
    sizes = {k: sum(p.numel() for p in config(plan).model(facts).parameters()) for k, plan in plans.items()}
    assert len(sizes) == 4 and max(sizes.values()) < 1.25 * min(sizes.values()), sizes


def result(accuracy, seconds):
    return {
        "metrics": [{"name": "cross_entropy", "value": 9.0}, {"name": "accuracy", "value": accuracy}],
        "model": {"parameters": 1234},
        "cost": {"predict": {"nfe": 14.0}},
        "training": {"seconds": seconds},
    }


def test_a_row_is_the_mean_over_seeds_with_the_error_of_that_mean():
    found = series.summary([result(0.90, 10), result(0.93, 20), result(0.96, 30)])
    assert found["accuracy"] == pytest.approx(0.93) and found["stderr"] == pytest.approx(0.03 / 3**0.5)
    line = series.table([{"dropped": 0.3, "model": "gru", **found}]).splitlines()[2]
    assert line == "| 30% | GRU | 0.930 ± 0.017 | 1,234 | 14 | 20 |"


def test_rows_are_read_where_results_are_published(tmp_path, monkeypatch):
    for seed in series.SEEDS:
        place = tmp_path / "digit_series_30" / f"series-ode_rnn-30-{seed}"
        place.mkdir(parents=True)
        (place / "a.json").touch()
    (tmp_path / "digit_series" / "series-gru-0-0").mkdir(parents=True)  # one seed is no row
    monkeypatch.setattr(series, "read", lambda path: (result(0.5, 1),))
    (row,) = series.rows(tmp_path)
    assert (row["dropped"], row["model"], row["accuracy"], row["stderr"]) == (0.3, "ode_rnn", 0.5, 0)
    series.draw([row], tmp_path / "series.png")
    assert (tmp_path / "series.png").stat().st_size > 1000


@pytest.mark.skipif(not (series.RESULTS / "series.md").exists(), reason="the study is not published")
def test_the_published_table_is_that_of_the_results():
    assert (series.RESULTS / "series.md").read_text() == series.table(series.rows())
