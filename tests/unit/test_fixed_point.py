"""Fixed points against linear algebra: rates, finite termination, right books, rows by themselves, refusals."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from genmodels.registry import build
from genmodels.rng import generator
from genmodels.solvers.base import Fixed
from genmodels.solvers.equilibrium import equilibrium
from genmodels.solvers.fixed_point import Anderson, Broyden, FixedPoint, Picard, RowMap
from genmodels.solvers.infinite_time import InfiniteTime
from genmodels.solvers.norms import rms
from genmodels.solvers.outcomes import EquilibriumError, Outcome
from genmodels.solvers.step_size import PI

EVERY = ("picard", "anderson", "broyden", "infinite_time")
MANY = {"picard": 500, "anderson": 100, "broyden": 100}
ZERO = torch.zeros(5, 6, dtype=torch.float64)


def solver(name: str, tolerance: float = 1e-10) -> FixedPoint:
    most = {"max_steps": 2000} if name == "infinite_time" else {"max_iterations": MANY[name]}
    return build(FixedPoint, {"name": name, "rtol": tolerance, "atol": tolerance, **most})


def linear(size: float = 0.8) -> tuple[Tensor, Tensor, RowMap]:
    """A [5, 6, 6] with norm `size`, b [5, 6], and z ↦ A z + b row by row."""
    a = torch.randn(5, 6, 6, generator=generator("linear"), dtype=torch.float64)
    a = size * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    b = torch.randn(5, 6, generator=generator("shift"), dtype=torch.float64)
    return a, b, RowMap(lambda z, a, b: torch.einsum("bij,bj->bi", a, z) + b, a, b)


@pytest.mark.parametrize("name", EVERY)
def test_fixed_points_of_linear_maps(name):
    a, b, f = linear()
    found = solver(name).solve(f, ZERO)
    exact = torch.linalg.solve(torch.eye(6, dtype=a.dtype) - a, b)
    assert found.converged.all()
    # |z - z*| <= |f(z) - z|/(1 - 0.8)
    assert (rms(found.z - exact) <= 5.001 * found.residual).all()
    torch.testing.assert_close(found.residual, rms(f(found.z) - found.z), rtol=1e-6, atol=1e-14)
    if name != "infinite_time":
        assert (found.residual <= 1e-10 * (1 + rms(f(found.z)))).all() and (found.lipschitz <= 0.8 + 1e-9).all()


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_picard_contracts_at_its_rate(damping):
    """On f = a z + b residuals shrink by 1 - damping (1 - a)."""
    f = lambda z: 0.6 * z + 1  # noqa: E731
    found = Picard(0.0, 1e-6, 100, damping).solve(f, torch.zeros(1, 1, dtype=torch.float64))
    rate = 1 - damping * 0.4
    needed = math.ceil(math.log(1e-6) / math.log(rate))
    assert found.iterations.tolist() == found.nfe.tolist() == [needed + 1]
    expected = rate ** torch.arange(needed + 1, dtype=torch.float64)
    torch.testing.assert_close(found.history[:, 0], expected, rtol=1e-9, atol=0)
    assert found.lipschitz.item() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("method", "bound"), [(Anderson(1e-9, 0, 60, memory=6, ridge=0), 8), (Broyden(1e-9, 0, 60), 14)]
)
def test_secant_methods_end_on_linear_maps_of_any_norm(method, bound):
    """Anderson with D differences is GMRES and needs D + 2 evaluations; Broyden ends in 2 D + 2 (Gay 1979)."""
    *_, f = linear(3.0)
    found = method.solve(f, ZERO)
    assert found.converged.all() and found.nfe.max() <= bound
    assert (Picard().solve(f, ZERO).outcome != Outcome.converged).any()


@pytest.mark.parametrize("name", ["anderson", "broyden", "infinite_time"])
def test_an_expansion_whose_flow_comes_to_rest(name):
    """f = 4 - 3 z: plain iteration runs away, the flow dz/dt = 4 (1 - z) does not."""
    z = torch.tensor([[0.0], [5.0]], dtype=torch.float64)
    found = equilibrium(lambda z: 4 - 3 * z, z, solver=solver(name, 1e-8), on_failure="raise")
    torch.testing.assert_close(found.z, torch.ones_like(z), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_rows_are_alone_and_leave_when_they_are_done(name):
    """Row by row the same answer; a map that can be narrowed is not asked again for rows that have converged."""
    a, b, f = linear()
    start = ZERO.clone()
    start[2] = torch.linalg.solve(torch.eye(6, dtype=a.dtype) - a[2], b[2])  # at its fixed point already
    sizes = []

    def spied(z, a, b):
        sizes.append(len(z))
        return f.f(z, a, b)

    together = solver(name, 1e-6).solve(RowMap(spied, a, b), start)
    whole = solver(name, 1e-6).solve(lambda z: f(z), start)
    for i in range(5):
        alone = solver(name, 1e-6).solve(f.select(torch.tensor([i])), start[i : i + 1])
        for other in (together, whole):
            torch.testing.assert_close(other.z[i], alone.z[0], rtol=1e-9, atol=1e-10)
            assert other.nfe[i] == alone.nfe[0] and other.outcome[i] == alone.outcome[0]
    if name == "infinite_time":  # with one evaluation more for what is left at the end
        sizes.clear()
        alone = solver(name, 1e-6).solve(RowMap(spied, a[:1], b[:1]), start[:1])
        assert sum(sizes) == alone.nfe.item()
    else:
        assert sum(sizes) == together.nfe.sum() and together.nfe[2] == 1 < together.nfe.max()
        seen = []
        solver(name, 1e-6).solve(lambda z: seen.append(z[2]) or f(z), start)
        assert len(seen) > 3 and all(torch.equal(z, start[2]) for z in seen)  # what has ended stands still


def test_the_best_iterate_is_kept():
    """A map that leads towards 0 and then away: the residuals are 4, 3, 2, 1, 2, 3 …"""
    shifts = torch.tensor([4.0, 3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    places = shifts.cumsum(0) - shifts

    def f(z):
        return z + shifts[(places[:, None] == z[:, 0]).float().argmax(0)][:, None]

    found = Picard(0, 0.5, 7).solve(f, torch.zeros(1, 1, dtype=torch.float64))
    assert (found.z.item(), found.residual.item()) == (places[3].item(), 1.0)
    assert found.outcome.item() == Outcome.exhausted and found.history[:, 0].tolist() == shifts[:7].tolist()


def test_an_iterate_that_converged_is_given_back_whatever_its_residual():
    """Relative to a state that has grown: residuals 1, 999 and 2, the last of which is within a hundredth of 1002."""
    value = lambda z: torch.where(z < 0.5, 1.0, torch.where(z < 500, 1000.0, z + 2))  # noqa: E731
    found = Picard(0.01, 0, 9).solve(value, torch.zeros(1, 1, dtype=torch.float64))
    assert found.converged.all() and (found.z.item(), found.residual.item()) == (1000.0, 2.0)


def test_the_stretch_that_is_reported_is_the_largest_between_iterates():
    f = lambda z: 2.2 + 1.5 * torch.tanh(z - 2)  # noqa: E731
    found = Picard(1e-12, 0, 40).solve(f, torch.full((1, 1), 2.0, dtype=torch.float64))
    z = [torch.tensor(2.0, dtype=torch.float64)]
    for _ in range(int(found.nfe)):
        z.append(f(z[-1]))
    slopes = [(f(a) - f(b)).abs() / (a - b).abs() for a, b in itertools.pairwise(z[:-1])]
    assert found.lipschitz.item() == pytest.approx(float(max(slopes)), rel=1e-9)
    assert float(slopes[-1]) < 0.9 * float(max(slopes))


def test_a_residual_that_does_not_change_teaches_broyden_nothing():
    """f = z + 1 has no fixed point, and no secant: the search goes on plainly and stays finite."""
    found = Broyden(1e-9, 1e-9, 6).solve(lambda z: z + 1, torch.zeros(2, 3, dtype=torch.float64))
    assert found.outcome.tolist() == [Outcome.exhausted] * 2 and (found.history == 1).all()


def test_anderson_minimises_the_residual_over_its_memory():
    """Its second iterate is the secant point, where a linear residual in one dimension is 0; a ridge moves it."""
    f = lambda z: -2.5 * z + 7  # noqa: E731
    z = torch.zeros(1, 1, dtype=torch.float64)
    assert Anderson(1e-12, 0, 3).solve(f, z).z.item() == pytest.approx(2.0, rel=1e-9)
    ridged = Anderson(1e-12, 0, 3, ridge=1.0).solve(f, z)
    # dr = -24.5, r = -17.5 after z = 7: gamma = r dr/(dr² + dr²) = 5/14, z = 7 - 17.5 - (7 - 24.5) 5/14
    assert ridged.history[2, 0].item() == pytest.approx(abs(7 - 3.5 * (-10.5 + 17.5 * 5 / 14)), rel=1e-12)


@pytest.mark.parametrize("name", EVERY)
def test_solvers_obey_their_tolerances(name):
    *_, f = linear()
    found = [solver(name, tolerance).solve(f, ZERO) for tolerance in (1e-2, 1e-5)]
    assert (found[0].nfe < found[1].nfe).all() and (found[0].residual > 50 * found[1].residual).all()


def test_divergence_is_diagnosed():
    f = lambda z: 3 * z + 1  # noqa: E731
    z = torch.ones(2, 3, dtype=torch.float64)
    found = equilibrium(f, z, solver=Picard())
    assert found.outcome.tolist() == [Outcome.diverged] * 2 and (found.z == 1).all()  # the start was best
    with pytest.raises(
        EquilibriumError, match=r"diverged \(picard.*residuals 3, 9, 27.*stretched .* by up to 3\).*damp it"
    ):
        equilibrium(f, z, solver=Picard(), on_failure="raise")
    with pytest.raises(EquilibriumError, match=r"row 1 of 2 did not converge.*Raise max_iterations"):
        solver_, start = Picard(max_iterations=3), torch.tensor([[2.0], [0.0]])
        equilibrium(lambda z: 0.5 * z + 1, start, solver=solver_, on_failure="raise")


@pytest.mark.parametrize("name", EVERY)
def test_undefined_maps_are_named_and_the_last_finite_iterate_kept(name):
    z = torch.zeros(3, 2, dtype=torch.float64)
    for worst in (torch.nan, torch.inf):
        with pytest.raises(EquilibriumError, match="row 0 of 3 met an infinite or undefined state"):
            equilibrium(lambda z, worst=worst: z + worst, z, solver=solver(name))
    rows = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)[:, None]
    broken = lambda z: torch.where((rows == 1) & (z > 0.6), torch.nan, 0.5 * z + 0.5)  # noqa: E731
    found = equilibrium(broken, z, solver=solver(name))
    assert found.outcome.tolist() == [0, Outcome.non_finite, 0] and found.z[1].isfinite().all()


def test_bad_arguments_are_refused():
    z = torch.zeros(2, 3)
    for message, call in (
        ("keep the shape", lambda: equilibrium(lambda z: z[:, :2], z, solver=Picard())),
        ("keep the shape", lambda: equilibrium(lambda z: z[:, :2], z, solver=InfiniteTime())),
        (r"below the resolution .* float64", lambda: equilibrium(lambda z: z, z, solver=Picard(1e-9, 1e-9))),
        (r"below the resolution .* float64", lambda: equilibrium(lambda z: z, z, solver=InfiniteTime(1e-9, 1e-9))),
        ("row 0 of the start is not finite", lambda: equilibrium(lambda z: z, z / 0, solver=Picard())),
        ("a tuple; it must keep", lambda: equilibrium(lambda z: (z,), z, solver=Picard())),
        ("floating point", lambda: equilibrium(lambda z: z, z.long(), solver=Picard())),
        ("floating point", lambda: Anderson().solve(lambda z: z, z.long())),
        (r"\[B, ...\], found torch.float32 of shape \[\]", lambda: equilibrium(lambda z: z, z[0, 0], solver=Picard())),
        ("on_failure", lambda: equilibrium(lambda z: z, z, solver=Picard(), on_failure="stop")),
        ("max_iterations must be at least 1", lambda: Picard(max_iterations=0)),
        ("not both 0", lambda: Broyden(0, 0)),
        ("rtol >= 0", lambda: Picard(-1e-3, 1.0)),
        ("atol >= 0", lambda: Picard(1.0, -1e-3)),
        ("mixing", lambda: Anderson(mixing=0.0)),
        ("ridge", lambda: Anderson(ridge=-1.0)),
        ("Use a controller such as pi", lambda: InfiniteTime(controller=Fixed(10))),
        ("damping", lambda: Picard(damping=1.5)),
        ("memory", lambda: Anderson(memory=0)),
        ("memory", lambda: Broyden(memory=0)),
        ("horizon", lambda: InfiniteTime(horizon=0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_broyden_forgets_its_oldest_updates():
    """With less memory than dimensions it still converges on a contraction, later than with enough."""
    *_, f = linear(0.95)
    full, short = (Broyden(1e-8, 0, 200, memory=m).solve(f, ZERO) for m in (30, 3))
    assert full.converged.all() and short.converged.all() and (short.nfe > full.nfe).all()


def test_controller_of_the_flow_is_an_option():
    *_, f = linear()
    loose, tight = (InfiniteTime(1e-3, 1e-3, controller=PI(t, t)).solve(f, ZERO) for t in (1e-3, 1e-6))
    assert loose.converged.all() and tight.converged.all() and (loose.nfe < tight.nfe).all()


def test_a_fixed_point_at_zero_is_found_with_a_relative_tolerance_alone():
    """f = 0: the first residual is infinitely larger than f, the second is 0 beside 0."""
    for method in (Picard(1e-3, 0), Anderson(1e-3, 0), Broyden(1e-3, 0)):
        found = equilibrium(lambda z: 0 * z, torch.ones(2, 3), solver=method, on_failure="raise")
        assert (found.z == 0).all() and (found.residual == 0).all()
    assert InfiniteTime(1e-3, 0).solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3)).converged.all()


@pytest.mark.parametrize("size", [1e25, 1e-25])
@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_secant_methods_do_not_depend_on_the_scale(name, size):
    """Squares of such numbers are beyond float32."""
    rates = torch.tensor([0.9, 0.5, 0.1])
    method = build(FixedPoint, {"name": name, "rtol": 1e-5, "atol": 0.0, "max_iterations": 12})
    found = method.solve(lambda z: rates * z + size, torch.zeros(2, 3))
    assert found.converged.all()
    torch.testing.assert_close(found.z / size, (1 / (1 - rates)).expand(2, 3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_many_components_in_half_precision(name):
    """The square of their distance is beyond float16."""
    method = build(FixedPoint, {"name": name, "rtol": 2e-3, "atol": 1e-3})
    found = method.solve(lambda z: 0.5 * z + 1, torch.full((2, 2000), 100.0, dtype=torch.float16))
    assert found.converged.all() and found.z.dtype == torch.float16


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_states_keep_their_dtype_whatever_the_map_computes_in(name, dtype):
    found = build(FixedPoint, {"name": name, "rtol": 0.02}).solve(lambda z: 0.5 * z.to(dtype) + 1, torch.zeros(2, 3))
    assert found.z.dtype == torch.float32 and found.converged.all()


def test_slow_divergence_is_not_met_with_more_iterations_alone():
    z = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(EquilibriumError, match=r"residuals 1, 1.1, 1.2, …, .* up to 1.1\).*Where f stretches.*damp it"):
        equilibrium(lambda z: 1.1 * z + 1, z, solver=Picard(), on_failure="raise")
    with pytest.raises(EquilibriumError) as told:
        equilibrium(lambda z: 0.99 * z + 1, z, solver=Picard(max_iterations=7), on_failure="raise")
    assert "damp it" not in str(told.value) and "0.98, …, 0.95, 0.94;" in str(told.value)


def test_a_flow_that_runs_away_is_told_and_its_start_kept():
    """f = 3 z + 1 in one row, in the other one half z + 1."""
    slope = torch.tensor([3.0, 0.5], dtype=torch.float64)
    sizes = []
    f = RowMap(lambda z, slope: sizes.append(len(z)) or slope[:, None] * z + 1, slope)
    z = torch.ones(2, 2, dtype=torch.float64)
    for given in (f, lambda z: f(z)):
        found = InfiniteTime(max_steps=60).solve(given, z)
        assert found.outcome.tolist() == [Outcome.diverged, Outcome.converged]
        assert (found.z[0] == 1).all() and abs(found.residual[0] - 3) < 1e-14
        assert found.lipschitz[0].item() == pytest.approx(3) and found.history[1, 0] > 1e6
        assert found.history[0].tolist() == pytest.approx([3.0, found.residual[1].item()])
        assert given is not f or sum(sizes) == found.nfe.sum()
    with pytest.raises(EquilibriumError, match=r"row 0 of 2 diverged \(infinite_time.*up to 3\)"):
        equilibrium(f, z, solver=InfiniteTime(max_steps=60), on_failure="raise")
    near = InfiniteTime(1e-9, 1e-9, horizon=3.0).solve(lambda z: 0.5 * z + 1, z)  # an end that is better than the start
    exact = 2 - math.exp(-1.5)
    torch.testing.assert_close(near.z, torch.full_like(z, exact), rtol=1e-7, atol=0)
    assert near.outcome.tolist() == [Outcome.exhausted] * 2


def test_a_flow_to_a_better_state_is_kept_where_it_meets_an_undefined_one():
    f = lambda z: torch.where(z > 5, torch.nan, z + 4 - 0.5 * z)  # noqa: E731
    found = InfiniteTime().solve(f, torch.zeros(1, 1, dtype=torch.float64))
    assert found.outcome.item() == Outcome.non_finite and 1 < found.z.item() <= 5 and found.residual.item() < 3.5


def test_limits_of_the_dial():
    """k moves from the start, never more than the solver makes by itself."""
    f = lambda z: 0.5 * z + 1  # noqa: E731
    z = torch.zeros(1, 1, dtype=torch.float64)
    counts = [Picard(1e-14, 1e-14, 6).limited(k).solve(f, z).nfe.item() for k in (0, 2, 9)]
    assert counts == [1, 3, 6]
    assert [InfiniteTime(max_steps=5).limited(k).max_steps for k in (2, 9)] == [2, 5]


def test_growth_is_relative_to_the_first_residual():
    """Residuals beyond a million are no divergence where the first one was as large."""
    found = Picard(1e-3, 0, 50).solve(lambda z: 0.5 * z + 1e9, torch.zeros(1, 1, dtype=torch.float64))
    assert found.converged.all()


def test_the_stretch_is_between_consecutive_iterates():
    """Slopes 2, 5/2 and 1/5, and 2, 1 and 1 beside the first iterate."""
    value = {0.0: 1.0, 1.0: 3.0, 3.0: -2.0, -2.0: -1.0}
    f = lambda z: torch.tensor([[value[z.item()]]], dtype=torch.float64)  # noqa: E731
    assert Picard(1e-9, 0, 4).solve(f, torch.zeros(1, 1, dtype=torch.float64)).lipschitz.item() == 2.5


def test_a_row_at_rest_among_others_has_no_stretch():
    """Its slope is 0/0 in a map that can not be narrowed; a row that has been there from the start has none to tell."""
    f = lambda z: torch.tensor([[1.0], [0.5]], dtype=torch.float64) * z + torch.tensor([[0.0], [1.0]])  # noqa: E731
    found = Picard().solve(f, torch.ones(2, 1, dtype=torch.float64))
    assert found.lipschitz.isnan().tolist() == [True, False] and found.nfe[0] == 1


@pytest.mark.parametrize(("mixing", "memory"), [(1.0, 2), (0.4, 2), (0.4, 9)])
def test_anderson_by_its_definition(mixing, memory):
    """γ by least squares, the iterates by the formula; memory 9 is more than there are dimensions."""
    a, b, _ = linear(0.9)
    f = lambda z: torch.tanh(a[0] @ z) + b[0]  # noqa: E731
    z = [torch.zeros(6, dtype=torch.float64)]
    for k in range(5):
        r = [f(v) - v for v in z]
        step = mixing * r[k]
        if k:
            first = max(0, k - memory)
            moves = torch.stack([z[i + 1] - z[i] for i in range(first, k)], 1)
            changes = torch.stack([r[i + 1] - r[i] for i in range(first, k)], 1)
            step = step - (moves + mixing * changes) @ torch.linalg.lstsq(changes, r[k]).solution
        z.append(z[k] + step)
    seen = []
    method = Anderson(1e-14, 0, 6, memory=memory, mixing=mixing, ridge=0)
    method.solve(lambda z: seen.append(z[0]) or f(z[0])[None], ZERO[:1])
    torch.testing.assert_close(torch.stack(seen), torch.stack(z), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("memory", [2, 9])
def test_broyden_by_its_definition(memory):
    """H = -I + Σ u vᵀ as a matrix, without the oldest terms."""
    a, b, _ = linear(0.9)
    f = lambda z: torch.tanh(a[0] @ z) + b[0]  # noqa: E731
    z, terms = [torch.zeros(6, dtype=torch.float64)], []
    for k in range(6):
        h = -torch.eye(6, dtype=a.dtype) + sum(terms)
        if k:
            step, change = z[k] - z[k - 1], f(z[k]) - z[k] - f(z[k - 1]) + z[k - 1]
            terms.append(torch.outer(step - h @ change, step @ h) / (step @ h @ change))
            terms = terms[-memory:]
            h = -torch.eye(6, dtype=a.dtype) + sum(terms)
        z.append(z[k] - h @ (f(z[k]) - z[k]))
    seen = []
    Broyden(1e-14, 0, 7, memory=memory).solve(lambda z: seen.append(z[0]) or f(z[0])[None], ZERO[:1])
    torch.testing.assert_close(torch.stack(seen), torch.stack(z), rtol=1e-9, atol=1e-10)


def test_repeated_differences_do_not_break_anderson():
    """More of them than dimensions, in float32 and without a ridge of its own."""
    f = lambda z: -0.5 * z + torch.tensor([1.0, 2.0])  # noqa: E731
    found = Anderson(1e-6, 1e-6, 30, memory=8, ridge=0.0).solve(f, torch.zeros(3, 2))
    assert found.converged.all()


def test_a_flow_knows_its_two_tolerances_and_its_limits():
    """Near 1000 a relative thousandth ends with a residual of about 1, an absolute one with a thousandth."""
    f, z = (lambda z: 0.5 * z + 500), torch.zeros(1, 1, dtype=torch.float64)
    loose, tight = (InfiniteTime(*tolerances).solve(f, z) for tolerances in ((1e-3, 1e-9), (1e-9, 1e-3)))
    assert 0.05 < loose.residual.item() <= 1 and tight.residual.item() <= 1e-3 + 1e-6
    assert 6 * loose.iterations.item() < loose.nfe.item() <= 6 * loose.iterations.item() + 12
    short = InfiniteTime(1e-9, 1e-3, max_steps=3).solve(f, z)
    assert short.outcome.item() == Outcome.exhausted and short.iterations.item() <= 3


@pytest.mark.parametrize("method", [Anderson(1e-5, 0, 60, memory=6), Broyden(1e-5, 0, 60)])
def test_autocast_reaches_the_map_and_not_the_iteration(method):
    """Which in bfloat16 would not end on a linear map of norm 3 in so few steps."""
    a, b, _ = linear(3.0)
    product = lambda z: (a.float() * z[:, None]).sum(2) + b.float()  # noqa: E731 — is not cast
    plain = method.solve(product, ZERO.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method.solve(product, ZERO.float())
    assert torch.equal(found.z, plain.z) and torch.equal(found.nfe, plain.nfe)
