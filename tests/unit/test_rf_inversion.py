"""Methods that invert and come back by solvers of rectified flows: errors against an exact flow, and costs."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from genmodels.editing.apply import edit, invert
from genmodels.editing.editor import Prompt, Walk
from genmodels.editing.exact import MixtureEditor
from genmodels.editing.method import EditMethod, Outcome
from genmodels.editing.sharing import Sharing
from genmodels.registry import ConfigError, build
from genmodels.rng import SeedNoise
from genmodels.solvers.runge_kutta import RK4
from tests.unit.test_rf_solver import EVEN, MODES, NOISE, SHIFTED, error, images, mixture, ring

PROMPT = Prompt()
DRAWS = SeedNoise([0])


class Ring(MixtureEditor):
    """The ring of the solvers' tests, quicker than a mixture."""

    def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        return ring(t, x)


@cache
def there_and_back(shift: float, name: str, num_steps: int) -> Outcome:
    options = {"share": None, "num_steps": num_steps}
    method, editor = build(EditMethod, {"name": name, **options}), Ring(shift=shift)
    return method.edit(editor, images(), PROMPT, PROMPT, editor.times(num_steps, NOISE), DRAWS)


# steps: evaluations of both ways, error at noise, error of the reconstruction
TRIPS = {
    "vanilla": {
        10: (20, 2.24e-1, 1.96e-1),
        30: (60, 7.89e-2, 6.82e-2),
        50: (100, 4.79e-2, 4.14e-2),
        60: (120, 4.00e-2, 3.46e-2),
    },
    "rf_edit": {
        5: (20, 2.69e-2, 2.83e-2),
        15: (60, 2.30e-3, 8.55e-4),
        25: (100, 8.28e-4, 1.86e-4),
        30: (120, 5.75e-4, 1.08e-4),
    },
    "heun": {
        5: (20, 5.03e-2, 2.50e-2),
        15: (60, 4.95e-3, 1.31e-3),
        25: (100, 1.71e-3, 2.98e-4),
        30: (120, 1.17e-3, 1.74e-4),
    },
    "fireflow": {
        8: (18, 2.49e-2, 1.34e-2),
        30: (62, 1.72e-3, 3.16e-4),
        50: (102, 6.10e-4, 6.91e-5),
        60: (122, 4.22e-4, 4.01e-5),
    },
    "ab2": {10: (20, 3.49e-2, 2.87e-2), 30: (60, 3.65e-3, 2.78e-3), 50: (100, 1.29e-3, 9.56e-4)},
    "uni_inv": {10: (21, 2.25e-1, 2.85e-2), 30: (61, 7.98e-2, 3.25e-3), 50: (101, 4.83e-2, 1.16e-3)},
}


def test_round_trips_on_the_even_grid():
    """Of three digits."""
    for name, rows in TRIPS.items():
        for num_steps, (nfe, inverted, returned) in rows.items():
            made = there_and_back(EVEN, name, num_steps)
            found = (error(made.noise, NOISE), error(made.x, images()))
            assert (name, num_steps, made.nfe) == (name, num_steps, nfe)
            assert found == pytest.approx((inverted, returned), rel=5e-3), (name, num_steps)
    for num_steps, known in {10: (7.92e-5, 2.96e-5), 15: (1.66e-5, 3.58e-6)}.items():
        walk = Walk(Ring(), PROMPT, Ring().times(num_steps, NOISE))
        z = walk.solve(RK4(), images(), False)
        assert (error(z, NOISE), error(walk.solve(RK4(), z, True), images())) == pytest.approx(known, rel=5e-3)
        assert walk.calls == 8 * num_steps


def test_rf_solver_returns_closer_than_euler_at_equal_cost():
    back = lambda name, n: error(there_and_back(EVEN, name, n).x, images())  # noqa: E731
    gains = {nfe: back("vanilla", nfe // 2) / back("rf_edit", nfe // 4) for nfe in (20, 60, 100, 120)}
    assert {nfe: round(gain) for nfe, gain in gains.items()} == {20: 7, 60: 80, 100: 222, 120: 321}


def test_round_trips_on_the_shifted_grid():
    known = {("vanilla", 30): 8.58e-2, ("rf_edit", 15): 4.77e-3, ("rf_edit", 25): 9.66e-4, ("fireflow", 30): 2.09e-3}
    for (name, num_steps), returned in {**known, ("uni_inv", 30): 1.26e-2}.items():
        found = error(there_and_back(SHIFTED, name, num_steps).x, images())
        assert found == pytest.approx(returned, rel=5e-3), (name, num_steps)


def test_orders_of_round_trips():
    """One more than the solver's where that is even; of Uni-Inv and Euler's method, two of order 1, also one more."""
    orders = {"vanilla": 1.0, "rf_edit": 3.0, "heun": 2.9, "fireflow": 2.9, "uni_inv": 2.0, "ab2": 2.1}
    for name, order in orders.items():
        coarse, fine = (error(there_and_back(EVEN, name, n).x, images()) for n in (48, 96))
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1), name
    coarse, fine = (error(_rk4(n), images()) for n in (24, 48))
    assert math.log2(coarse / fine) == pytest.approx(5.0, abs=0.1)


def _rk4(num_steps: int) -> Tensor:
    walk = Walk(Ring(), PROMPT, Ring().times(num_steps, NOISE))
    return walk.solve(RK4(), walk.solve(RK4(), images(), False), True)


def test_fixed_points_return_to_rounding():
    """With 3 iterations to the published figures of two digits, and with 20 exactly."""
    for solver, stages, brief in (("euler", 1, 9.1e-5), ("rf_solver", 2, 7.8e-7)):
        for iterations in (3, 20):
            config = {"name": "fixed_point", "solver": solver, "num_steps": 25, "iterations": iterations}
            made = build(EditMethod, config).edit(Ring(), images(), PROMPT, PROMPT, Ring().times(25, NOISE), DRAWS)
            assert made.nfe == 25 * stages * (iterations + 2)
            back = error(made.x, images())
            assert back == pytest.approx(brief, rel=0.01) if iterations == 3 else back < 1e-15


def test_a_fixed_point_that_is_not_found_says_what_helps():
    method = build(EditMethod, {"name": "fixed_point", "solver": "euler", "num_steps": 3})
    with pytest.raises(
        ValueError,
        match=r"from items to noise ended in numbers that are not finite\. Take more steps \(exact inversion",
    ):
        method.edit(Ring(), images(), PROMPT, PROMPT, Ring().times(3, NOISE), DRAWS)


@pytest.mark.parametrize(("name", "stages", "near"), [("fixed_point", 2, 1e-8), ("uni_inv", 1, 0.02)])
def test_the_last_evaluations_of_a_step_up_are_placed_as_those_of_the_step_down(name, stages, near):
    """So that features which a store keeps by place are of one time, and nearly of one state."""
    seen = []

    class Watched(Ring):
        def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
            seen.append((*walk.place[:2], float(t), x.clone()))
            return super().velocity(t, x, prompt)

    method, editor = build(EditMethod, {"name": name, "num_steps": 25}), Watched()
    times = editor.times(25, NOISE)
    walk = method.way_up(editor, PROMPT, times)
    z = walk.solve(method.up, images(), False)
    last = {each[:2]: each for each in seen}
    seen.clear()
    walk = Walk(editor, PROMPT, times)
    walk.solve(method.down, z, True)
    assert len(seen) == 25 * stages == len(last)
    for interval, evaluation, t, x in seen:
        assert last[interval, evaluation][2] == pytest.approx(t, abs=1e-15)
        assert error(last[interval, evaluation][3], x) < near


def test_methods_are_those_of_their_solvers_and_share_by_default_as_published():
    made = {name: build(EditMethod, name) for name in (*TRIPS, "fixed_point")}
    steps = {"vanilla": 30, "rf_edit": 15, "heun": 15, "ab2": 30, "fireflow": 8, "uni_inv": 15, "fixed_point": 25}
    assert {name: method.num_steps for name, method in made.items()} == steps
    shared = {name: method.share for name, method in made.items() if method.share is not None}
    default = {"rf_edit": Sharing(2, "last_half"), "fireflow": Sharing(1, "all")}
    assert shared == {name: replace(share, pairing="interval") for name, share in default.items()}
    assert all(method.plain().share is None for method in made.values())
    third = build(EditMethod, {"name": "rf_edit", "order": 3, "share": None})
    assert third.invert(Ring(), images(), PROMPT, Ring().times(4, NOISE), DRAWS).nfe == 12
    ahead = build(EditMethod, {"name": "rf_edit", "probe": 1.0, "share": None})
    heun, times = build(EditMethod, "heun"), Ring().times(9, NOISE)
    found, expected = (m.edit(Ring(), images(), PROMPT, PROMPT, times, DRAWS).x for m in (ahead, heun))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    zero = build(EditMethod, {"name": "uni_inv", "zero_start": True})
    assert zero.edit(Ring(), images(), PROMPT, PROMPT, times, DRAWS).nfe == 18
    for config in ({"name": "fixed_point", "solver": "ab2"}, {"name": "rf_edit", "order": 3, "probe": 1.0}):
        with pytest.raises(ConfigError):
            build(EditMethod, config)


def test_edits_and_inversions_reach_the_caller():
    """An edit between two rings against the exact one, its reconstruction under the source prompt, and no steps."""
    turned = (
        1.25
        * MODES
        @ torch.tensor(
            [[math.cos(math.pi / 8), math.sin(math.pi / 8)], [-math.sin(math.pi / 8), math.cos(math.pi / 8)]]
        ).to(MODES)
    )
    source, target, editor = Prompt(mixture(MODES)), Prompt(mixture(turned)), MixtureEditor()
    method = build(EditMethod, {"name": "rf_edit", "share": None})
    exact = Walk(editor, target, editor.times(30, NOISE)).solve(RK4(), NOISE, True)
    made = edit(editor, images(), source, target, method=method, noise=DRAWS)
    assert made.nfe == 60 and made.stored == 0
    assert error(made.items, exact) < 0.01 < 0.5 < error(exact, images())
    assert error(made.reconstruction, images()) == pytest.approx(8.55e-4, rel=5e-3)
    found = invert(editor, images(), source, method=method, noise=DRAWS)
    assert found.nfe == 30 and error(found.noise, NOISE) == pytest.approx(2.30e-3, rel=5e-3)
    assert torch.equal(found.reconstruction, made.reconstruction)
    with pytest.raises(ConfigError, match="num_steps: at least 1 is needed, found 0"):
        none = build(EditMethod, {"name": "rf_edit", "num_steps": 0})
        edit(editor, images(), source, target, method=none, noise=DRAWS)


def test_guidance_intervals_of_exact_mixtures_hold_at_both_ends_of_time():
    """Unbounded guidance acts in pure noise too, where σ/α is infinite; a bounded one does not."""
    editor, x = MixtureEditor(free=mixture(MODES)), NOISE[:5]
    prompted, free = mixture(MODES[:3]), mixture(MODES)
    for t, interval, acts in (
        (1.0, None, True),
        (1.0, (0.5, float("inf")), True),
        (1.0, (0.0, 9.0), False),
        (0.5, (0.0, 1.0), True),
        (0.5, (1.1, 9.0), False),
        (0.0, None, True),
        (0.0, (0.1, 9.0), False),
    ):
        t = torch.tensor(t, dtype=torch.float64)
        plain, other = (MixtureEditor().velocity(t, x, Prompt(law)) for law in (prompted, free))
        found = editor.velocity(t, x, Prompt(prompted, 3.0, interval))
        torch.testing.assert_close(found, other + 3 * (plain - other) if acts else plain, rtol=1e-13, atol=1e-13)
