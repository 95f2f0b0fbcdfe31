"""The study of editing on mixtures: its references are exact, and the published tables are what it computes."""

import re

import pytest
import torch

from evals.studies import editing_mixtures as study

TEXT = (study.RESULTS / "editing_mixtures.md").read_text()
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?")
CHEAP = (
    "RF-Solver, 15 steps",
    "FireFlow, 49",
    "Euler, 30",
    "Uni-Edit, 15, α 0.6, ω 5",
    "DNAEdit, 28, mvg 0.85, skip 4",
)


def tables(text: str) -> list[dict[str, list[str]]]:
    """Cells by the first of each line, of the tables in order."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("| "):
            lines = [[c.strip() for c in line.split("|")[1:-1]] for line in block.splitlines()]
            found.append({line[0]: line[1:] for line in lines[2:]})
    return found


def close(one: str, other: str) -> bool:
    """Whether two cells say the same but for one unit of their last digit, which rounding may turn."""
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    return all(
        abs(float(a) - float(b)) <= 1.01 * unit(a) for a, b in zip(*map(NUMBER.findall, (one, other)), strict=True)
    )


def unit(number: str) -> float:
    digits, _, power = number.partition("e")
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


def compare(found: str, names: set[str]) -> None:
    """Lines of tables with those that are published."""
    for here, there in zip(tables(found), tables(TEXT), strict=True):
        assert here.keys() == there.keys() & (names | {"none", "exact"})
        for name, cells in here.items():
            assert all(map(close, cells, there[name])) and len(cells) == len(there[name]), (name, cells, there[name])


def test_published_tables_are_what_the_study_computes():
    """Of a few; all of them is slow."""
    rows, errors = study.edits(CHEAP), ("Euler", "RF-Solver")
    compare(study.table(rows, study.errors(errors)), {*CHEAP, *errors})
    assert [len(r) for r in rows.values()] == [1] * 6 + [study.SEEDS]
    assert list(tables(TEXT)[0]) == ["none", "exact", *study.METHODS]
    assert [list(t) for t in tables(TEXT)[1:]] == [list(study.SOLVERS)] * 3
    assert TEXT.endswith(study.NOTE) and "nan" not in TEXT
    # known of such a study: identity and the exact edit, RF-Solver with 15 steps
    assert rows["none"][0] == pytest.approx((0, 0, -5.449, 0.633), abs=5e-4)
    assert rows["exact"][0] == pytest.approx((0, 0.6249, -2.7336, 0), abs=5e-5)
    assert rows["RF-Solver, 15 steps"][0] == pytest.approx((60, 0.6247, -2.7354, 1.3e-3), abs=5e-5)


@pytest.mark.slow
def test_published_tables_and_the_picture_are_all_that_the_study_computes(tmp_path):
    found = study.errors()
    compare(study.table(study.edits(), found), {*study.METHODS, *study.SOLVERS})
    study.picture(found, tmp_path / "editing.png")
    assert (tmp_path / "editing.png").stat().st_size > 100_000


def test_slopes_are_the_orders_of_the_solvers():
    """Of round trips one more where the order is even; RK4 is not there yet."""
    orders = {"Euler": 1, "Uni-Inv up, Euler down": 1, "AB2": 2, "Heun": 2, "RF-Solver": 2, "FireFlow": 2, "RK4": 4}
    orders["RF-Solver of order 3"] = 3
    trips = {**orders, "Uni-Inv up, Euler down": 2, "Heun": 3, "RF-Solver": 3, "FireFlow": 3, "RK4": 5}
    for table, expected in zip(tables(TEXT)[1:], (orders, orders, trips), strict=True):
        assert {n: -float(c[-1]) for n, c in table.items()} == pytest.approx(expected, abs=0.37)
    exact = study.Errors([9, 16, 32, 64, 127], [], [], [7.0, 5.0, *(3.0 * n**-2.5 for n in (32, 64, 127))])
    assert exact.slope("trip") == pytest.approx(-2.5, abs=1e-12)


def test_budgets_are_spent():
    """On whole steps, with what is evaluated before the first."""
    made = {"euler": 16, "uni_inv": 15, "fireflow": 15, "rf_solver": 8, "rk4": 4}
    x = torch.zeros(1, 2, dtype=torch.float64)
    for name, count in made.items():
        solver = study.build(study.Solver, name)
        assert study.steps(solver, 16) == count
        assert study.walked(solver, study.SOURCE, x, count, False)[1] == 16
    assert study.steps(study.build(study.Solver, {"name": "rf_solver", "order": 3}), 16) == 5
