"""Fixed points against linear algebra: rates, finite termination, right books, rows by themselves, refusals."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from genmodels.registry import build
from genmodels.rng import generator
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
    with pytest.raises(EquilibriumError, match="row 0 of 3 met an infinite or undefined state"):
        equilibrium(lambda z: z * torch.nan, z, solver=solver(name))
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
        ("floating point", lambda: equilibrium(lambda z: z, z.long(), solver=Picard())),
        ("on_failure", lambda: equilibrium(lambda z: z, z, solver=Picard(), on_failure="stop")),
        ("max_iterations must be at least 1", lambda: Picard(max_iterations=0)),
        ("not both 0", lambda: Broyden(0, 0)),
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
