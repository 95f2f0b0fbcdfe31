"""The published comparisons: every run of a study is a configuration that resolves, and what it says it is."""

import json

import pytest

from evals.studies import sharing
from evals.studies.flows import DEPTHS, PLANES, ROOT, STUDIES, VARIANTS
from genmodels.config import load, read
from genmodels.evaluation.protocol import FOLDER


def tree(plan):
    return load([ROOT / "configs" / f"{plan.config}.yaml"], [f"name={plan.name}", *plan.overrides]).tree


@pytest.mark.parametrize("study", STUDIES)
def test_runs_have_names_of_their_own_and_known_protocols(study):
    plans = list(STUDIES[study]())
    assert len({plan.name for plan in plans}) == len(plans)
    assert all((FOLDER / f"{plan.protocol}.yaml").is_file() for plan in plans)


@pytest.mark.parametrize("study", STUDIES)
def test_protocols_ask_on_the_data_that_runs_are_trained_on(study):
    """With the conditions that their models need."""
    for plan in STUDIES[study]():
        asked, trained = read(FOLDER / f"{plan.protocol}.yaml")["dataset"], tree(plan)["data"]
        assert asked["name"] == trained["name"], plan.name
        assert (asked.get("condition") is None) == (trained.get("condition") is None), plan.name


@pytest.mark.parametrize("study", ["toy2d", "digits", "patches"])
def test_overrides_make_the_variants(study):
    """Of every kind one: data, depth, and how the steps share their network."""
    for plan in STUDIES[study]():
        flow, _, variant = plan.name.rpartition("-")
        if variant not in ("unshared", *VARIANTS) or not flow.startswith(("moons", "digits", "patches")):
            continue
        text = json.dumps(tree(plan)["model"])
        parts = ('"name": "shared"', '"projection": "shared"', '"embedding": 0', '"gate"')
        expected = {
            "unshared": (False, False, False, False),
            "naive": (True, True, True, False),
            "decomp": (True, False, True, False),
            "nanoflow": (True, False, False, True),
        }
        assert tuple(part in text for part in parts) == expected[variant], plan.name
        depth = flow.partition("-k")[2]
        assert not depth or f'"count": {depth}' in text, plan.name


def test_a_study_of_the_plane_covers_every_density():
    plans = list(STUDIES["toy2d"]())
    assert {tree(plan)["data"]["name"] for plan in plans[::16]} == set(PLANES)
    assert len(plans) == len(PLANES) * 4 * (1 + len(VARIANTS))


def test_rows_of_the_table_are_read_from_results(tmp_path, monkeypatch):
    """Depth and variant from the name, both counts of parameters, and the value of the study's metric."""
    monkeypatch.setattr(sharing, "RESULTS", tmp_path)
    for depth, variant in ((8, "naive"), (4, "nanoflow")):
        path = tmp_path / "digits" / f"digits-nsf-k{depth}-{variant}" / "result.json"
        path.parent.mkdir(parents=True)
        path.touch()
    results = iter(
        [
            {"run": "digits-nsf-k4-nanoflow", "model": {"parameters": 90, "x-inference_parameters": 70}, "metrics": []},
            {"run": "digits-nsf-k8-naive", "model": {"parameters": 50}, "metrics": []},
        ]
    )

    def read_next(path):
        result = next(results)
        result["metrics"] = [{"name": "bits_per_dim", "value": 1.5 * len(result["model"]), "stderr": 0.25}]
        return (result,)

    monkeypatch.setattr(sharing, "read", read_next)
    lines = sharing.table("digits-nsf").splitlines()[2:]
    assert lines == ["| 4 | nanoflow | 90 | 70 | 3 ± 0.25 |", "| 8 | naive | 50 | 50 | 1.5 ± 0.25 |"]
    assert len(DEPTHS) == 3


def test_published_tables_are_those_of_the_results():
    """What README and sharing.md say of shared networks is made from the results, to the last digit."""
    tables = [*map(sharing.table, sharing.STUDIES), sharing.planes()]
    assert (sharing.RESULTS / "sharing.md").read_text() == "\n\n".join(tables) + "\n"
    assert sharing.planes() in (ROOT / "README.md").read_text()
