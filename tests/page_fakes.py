"""Results and the page made of them, for tests of the page."""

from genmodels.evaluation.assemble import leaderboard
from genmodels.evaluation.board import Cell, Quoted
from genmodels.evaluation.page import page
from tests.board_results import BILL, example, likelihood, metric, picture

HOSTILE = "</script><img src=x onerror=document.title='taken'>"
QUOTED = {"aaaa": [Quoted("Paper", "Somebody 2020, table 3", {"FD-digits": Cell(0.5)}, nfe=35.0, note="other data")]}


def priced(name, nfe, metrics, **more):
    """A result whose samples cost so many evaluations; None if it draws none."""
    costs = {"likelihood": BILL} | ({} if nfe is None else {"sample": {**BILL, "nfe": nfe}})
    config = {"model": {"name": name}, "data": {"name": "digits", "comment": HOSTILE}}
    return example(name, metrics, cost=costs, config=config, **more)


def results():
    """Six rows of one protocol and one of another; evaluations are in another order than ranks."""
    return [
        priced("ten", 10.0, [metric(value=1.0), likelihood(2.0, kind="stochastic")]),
        priced("hundred", 100.0, [metric(value=2.0), likelihood(1.25, kind="pmf")]),
        priced("nine", 9.0, [metric(value=3.0), likelihood(1.8, kind="bound")], training={"hardware": "another"}),
        priced("no sampler", None, [likelihood(1.7, kind="numerical")]),
        priced("unfinished", 11.0, [metric(value=0.5)], model={"step": 4}),
        priced(HOSTILE, 12.0, [metric(value=5.0, stderr=None)]),
        example("toy", protocol="toy", protocol_hash="bbbb"),
    ]


def boards():
    return leaderboard(results(), quoted=QUOTED)


def html():
    """Their page; three rows have pictures, one of which is too large."""
    by_id = {result["id"]: result for result in results()}
    sizes = {"ten": 64, "hundred": 64, "nine": 512}
    grids = {i: picture(k, sizes[r["run"]]) for k, (i, r) in enumerate(by_id.items()) if r["run"] in sizes}
    return page(boards(), by_id, grids)
