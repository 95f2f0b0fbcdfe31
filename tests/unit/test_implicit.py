"""Implicit solvers: damping of stiff modes, cost, Newton's two kinds of linear algebra, gradients, failures."""

import math

import pytest
import torch
from torch import Tensor, nn

from genmodels.registry import build
from genmodels.rng import generator
from genmodels.solvers.base import Fixed, Solver, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.implicit import ESDIRK54, Kvaerno3, Trapezoid
from genmodels.solvers.newton import gmres
from genmodels.solvers.runge_kutta import Bosh3, Tsit5
from genmodels.solvers.solution import Record, Result, SolverError
from genmodels.solvers.step_size import PI

L_STABLE = ("kvaerno3", "esdirk54")
PLANE = torch.randn(4, 2, generator=generator("plane"), dtype=torch.float64)
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)


def van_der_pol(mu: Tensor | float):
    def field(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack((x[:, 1], mu * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0]), 1)

    return field


def radau(field, x: list[float], end: float) -> Tensor:
    from scipy.integrate import solve_ivp

    out = solve_ivp(field, (0, end), x, method="Radau", rtol=1e-11, atol=1e-13)
    return torch.tensor(out.y[:, -1])


def amplification(solver: Solver, z: complex) -> complex:
    """x⁺/x of one step on x' = z x with h = 1, from the tableau."""
    tableau = solver.tableau
    n = len(tableau.b)
    a = torch.tensor(
        [[float(v) for v in (*row, *[0] * (n - len(row)))] for row in tableau.rows], dtype=torch.complex128
    )
    b = torch.tensor(tableau.weights, dtype=torch.complex128)
    ones = torch.ones(n, dtype=torch.complex128)
    return complex(1 + z * (b @ torch.linalg.solve(torch.eye(n) - z * a, ones)))


@pytest.mark.parametrize("name", [*L_STABLE, "implicit_midpoint", "trapezoid"])
def test_no_decaying_mode_grows(name):
    """|R| <= 1 on the imaginary axis, hence (maximum principle, poles at 1/γ > 0) on the left half-plane."""
    solver = build(Solver, name)
    heights = [10 ** (k / 40) for k in range(-120, 240)]
    assert max(abs(amplification(solver, 1j * y)) for y in heights) <= 1 + 1e-12
    damped = abs(amplification(solver, -1e9))
    assert damped < 1e-6 if name in L_STABLE else damped > 0.999


@pytest.mark.parametrize("name", L_STABLE)
def test_stages_are_solved_to_the_fraction_of_the_tolerance_that_was_asked_for(name):
    """Against a thousandth of it; several stages, and rates that are estimates, may add up to a few times as much."""
    x, tolerance = 2 * torch.randn(256, 2, generator=generator("stages"), dtype=torch.float64), 1e-6
    t, field, ends = x.new_zeros(256), van_der_pol(10.0), []
    for fraction, iterations in ((0.02, 12), (2e-5, 60)):
        solver = build(Solver, {"name": name, "fraction": fraction, "iterations": iterations}).within(1e-6, 1e-6)
        ends.append(solver.step(field, t, t + 0.02, x, solver.start(field, t, x)).x)
    error = (ends[0] - ends[1]).abs() / (tolerance * (1 + x.abs()))
    assert error.square().mean(1).sqrt().max() < 6 * 0.02


@pytest.mark.parametrize("name", L_STABLE)
def test_big_steps_on_a_stiff_relaxation(name):
    """Prothero & Robinson: x' = -1000 (x - cos t) from 0; steps of 0.2 are 60 times beyond what Dopri5 can take."""
    field = lambda t, x: -1000 * (x - torch.cos(t))  # noqa: E731
    solver, x = build(Solver, name), torch.zeros(1, 1, dtype=torch.float64)
    exact = (1000**2 * math.cos(2.0) + 1000 * math.sin(2.0)) / (1000**2 + 1)
    out = integrate(field, x, 2 * UNIT, solver=solver, controller=Fixed(10))
    assert out.x.item() == pytest.approx(exact, abs=2e-5)
    adaptive = integrate(field, x, 2 * UNIT, solver=solver, controller=PI(1e-6, 1e-6))
    explicit = integrate(field, x, 2 * UNIT, solver=Tsit5(), controller=PI(1e-6, 1e-6))
    assert adaptive.x.item() == pytest.approx(exact, abs=2e-6)
    assert 2 * adaptive.nfe < explicit.nfe  # half of them in the transient


def test_a_wavering_method_keeps_the_mode_that_an_l_stable_one_damps():
    field = lambda t, x: -1e6 * x  # noqa: E731
    one = torch.ones(1, 1, dtype=torch.float64)
    kept = integrate(field, one, UNIT, solver=Trapezoid(), controller=Fixed(4)).x
    damped = integrate(field, one, UNIT, solver=ESDIRK54(), controller=Fixed(4)).x
    assert kept.abs() > 0.99 and damped.abs() < 1e-10


@pytest.mark.parametrize("name", L_STABLE)
def test_van_der_pol_costs_a_fraction_of_what_an_explicit_method_needs(name):
    x, end = torch.tensor([[2.0, 0.0]], dtype=torch.float64), 10.0
    exact = torch.tensor([1.858320944, -0.015147385], dtype=torch.float64)  # μ = 50
    out = integrate(van_der_pol(50.0), x, end * UNIT, solver=build(Solver, name), controller=PI(1e-6, 1e-6))
    explicit = integrate(van_der_pol(50.0), x, end * UNIT, solver=Tsit5(), controller=PI(1e-6, 1e-6))
    assert (out.x[0] - exact).abs().max() < (explicit.x[0] - exact).abs().max() + 1e-6
    assert 4 * out.nfe < explicit.nfe


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("kvaerno3", 1e-3), ("esdirk54", 1e-3)])
def test_very_stiff_van_der_pol_and_robertson(name, tolerance):
    pytest.importorskip("scipy")
    solver = build(Solver, name)
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    out = integrate(van_der_pol(1000.0), x, 2000 * UNIT, solver=solver, controller=PI(1e-6, 1e-6))
    exact = radau(lambda t, y: [y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]], [2.0, 0.0], 2000.0)
    torch.testing.assert_close(out.x[0], exact, rtol=0, atol=tolerance)
    assert out.nfe < 60_000  # an explicit method needs millions

    def robertson(t: Tensor, y: Tensor) -> Tensor:
        a, b, c = y.unbind(1)
        slow, fast, last = 0.04 * a, 1e4 * b * c, 3e7 * b**2
        return torch.stack((fast - slow, slow - fast - last, last), 1)

    y = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    out = integrate(robertson, y, 1e4 * UNIT, solver=solver, controller=PI(1e-6, 1e-10))
    field = lambda t, y: robertson(0, torch.tensor(y)[None])[0].tolist()  # noqa: E731
    torch.testing.assert_close(out.x[0], radau(field, [1.0, 0.0, 0.0], 1e4), rtol=1e-4, atol=1e-9)
    assert out.x.sum().item() == pytest.approx(1.0, abs=1e-9), "mass is conserved"
    assert out.nfe < 10_000


@pytest.mark.parametrize("name", L_STABLE)
def test_backwards_from_where_forwards_ends(name):
    field, solver = lambda t, x: torch.tanh(x.flip(1)) * t.cos().reshape(-1, 1), build(Solver, name)
    ahead = integrate(field, PLANE, UNIT, solver=solver, controller=PI(1e-8, 1e-8)).x
    back = integrate(field, ahead, UNIT.flip(0), solver=solver, controller=PI(1e-8, 1e-8)).x
    torch.testing.assert_close(back, PLANE, rtol=0, atol=1e-6)


# ---- Newton's linear algebra -----------------------------------------------------------------------------------------


class Layers(nn.Module):
    """A stiff field with parameters: -rate x + tanh network."""

    def __init__(self, dimension: int, rate: float) -> None:
        super().__init__()
        self.inner = nn.Linear(dimension, 8, dtype=torch.float64)
        self.outer = nn.Linear(8, dimension, dtype=torch.float64)
        self.rate = rate
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.7 * torch.randn(p.shape, generator=generator("layers", i), dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x))) - self.rate * x


@pytest.mark.parametrize(
    "control", [Fixed(4), PI(1e-7, 1e-7), PI(1e-7, 1e-7, norm="batch")], ids=["fixed", "row", "batch"]
)
@pytest.mark.slow_for("batch")
def test_dense_and_krylov_agree_in_values_and_gradients(control):
    net, results = Layers(5, 40.0), []
    start = torch.randn(3, 5, generator=generator("start"), dtype=torch.float64)
    for linear in ("dense", "krylov"):
        x = start.clone().requires_grad_()
        out = integrate(net, x, 0.3 * UNIT, solver=ESDIRK54(linear=linear), controller=control)
        results.append((out.x, *torch.autograd.grad(out.x.square().sum(), (x, *net.parameters()))))
    # on a grid stages are solved to rounding, and so are the systems that give gradients
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if isinstance(control, Fixed) else {"rtol": 1e-5, "atol": 1e-8}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_auto_is_dense_for_small_states_and_krylov_for_large():
    costs = {}
    for size in (32, 33):
        x = torch.ones(2, size, dtype=torch.float64)
        costs[size] = int(integrate(lambda t, x: -x, x, UNIT, solver=Kvaerno3()).nfe[0])
    assert costs[32] > 32 > costs[33]


def test_gmres_solves_row_by_row():
    matrices = torch.randn(3, 6, 6, generator=generator("gmres"), dtype=torch.float64) + 4 * torch.eye(6)
    r = torch.randn(3, 6, generator=generator("r"), dtype=torch.float64)
    r[1] = 0.0
    product = lambda m: lambda v: torch.einsum("bij,bj->bi", m, v)  # noqa: E731
    whole = gmres(product(matrices), r, 1e-12)
    torch.testing.assert_close(whole, torch.linalg.solve(matrices, r), rtol=1e-10, atol=1e-12)
    assert (whole[1] == 0).all()
    rough = gmres(product(matrices), r, 1e-2)  # rows end after different numbers of products
    for i in range(3):
        alone = gmres(product(matrices[i : i + 1]), r[i : i + 1], 1e-2)
        torch.testing.assert_close(alone[0], rough[i], rtol=1e-12, atol=1e-14)
        assert (product(matrices)(rough)[i] - r[i]).norm() <= 1e-2 * r[i].norm()


@pytest.mark.parametrize("name", ["esdirk54", "implicit_midpoint"])
@pytest.mark.parametrize("linear", ["dense", "krylov"])
def test_gradients_are_those_of_the_implicit_function(name, linear):
    """By finite differences, of start, parameters and times, on a field of stiffness 30, in one step."""
    solver = build(Solver, {"name": name, "linear": linear})
    rate = torch.tensor([30.0, 2.0], dtype=torch.float64, requires_grad=True)

    def end(x: Tensor, rate: Tensor, last: Tensor) -> Tensor:
        field = lambda t, y: torch.sin(y.flip(1)) - rate * y + t * y.square()  # noqa: E731
        return integrate(field, x, torch.stack((0 * last, last)), solver=solver, controller=Fixed()).x

    last = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(end, (PLANE[:1].clone().requires_grad_(), rate, last), atol=1e-6)


def test_memory_of_the_iteration_is_not_kept_and_second_derivatives_are_refused():
    net, x = Layers(2, 5.0), PLANE.clone().requires_grad_()
    out = integrate(net, x, UNIT, solver=ESDIRK54(), controller=Fixed(2)).x
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        slope.sum().backward()
    plain = integrate(lambda t, x: -x, PLANE, UNIT, solver=ESDIRK54()).x
    assert not plain.requires_grad


def test_rows_are_independent_of_their_mates():
    mu = torch.tensor([50.0, 1.0, 10.0], dtype=torch.float64)
    x = torch.tensor([[2.0, 0.0], [1.0, 0.5], [0.1, -1.0]], dtype=torch.float64)
    field = RowField(lambda t, x, mu: van_der_pol(mu)(t, x), mu)
    whole = integrate(field, x, 3 * UNIT, solver=ESDIRK54(), controller=PI(1e-5, 1e-5))
    for i in range(3):
        alone = integrate(field.select(torch.tensor([i])), x[i : i + 1], 3 * UNIT, solver=ESDIRK54(), controller=PI())
        torch.testing.assert_close(alone.x[0], whole.x[i], rtol=1e-11, atol=1e-13)
        assert alone.steps[0] == whole.steps[i] and alone.nfe[0] <= whole.nfe[i]


def test_rows_do_not_count_the_iterations_of_their_mates():
    """In one long step some rows take a fresh Jacobian after their fourth iteration, others are done by then."""
    strength = torch.tensor([4.0, 0.01, 0.3, 1.0], dtype=torch.float64)
    field = RowField(lambda t, x, a: -a.reshape(-1, 1) * x**3 + x.flip(1), strength)
    solver, x = Kvaerno3().within(1e-3, 1e-3), 1.0 + 0.2 * PLANE
    whole = integrate(field, x, UNIT, solver=solver, controller=Fixed(4)).x
    for i in range(4):
        alone = integrate(field.select(torch.tensor([i])), x[i : i + 1], UNIT, solver=solver, controller=Fixed(4)).x
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-12, atol=0)


def test_float32_agrees():
    x = torch.tensor([[2.0, 0.0]])
    narrow = integrate(van_der_pol(50.0), x, 10 * UNIT, solver=Kvaerno3(), controller=PI(1e-4, 1e-4))
    wide = integrate(van_der_pol(50.0), x.double(), 10 * UNIT, solver=Kvaerno3(), controller=PI(1e-4, 1e-4))
    assert narrow.x.dtype == torch.float32
    torch.testing.assert_close(narrow.x.double(), wide.x, rtol=0, atol=1e-3)
    assert abs(int(narrow.nfe) - int(wide.nfe)) < 0.3 * int(wide.nfe)


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_stage_without_a_solution_is_rejected_and_the_step_shortened():
    """x' = x² beyond its pole has no real stage: k = (1 + h γ k)² is solvable for 4 h γ <= 1 alone."""
    one = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    square = lambda t, x: x.square()  # noqa: E731
    out = integrate(square, one, 0.9 * UNIT, solver=Kvaerno3(), controller=PI(1e-6, 1e-6, first_step=0.9))
    torch.testing.assert_close(out.x, one / (1 - 0.9 * one), rtol=1e-4, atol=0)
    assert out.rejected[0] > 0
    coarse = integrate(square, one, 0.9 * UNIT, solver=Kvaerno3(), on_failure="return")
    assert coarse.status.tolist() == [Result.non_finite, Result.success] and coarse.x[0].item() == 1.0
    with pytest.raises(SolverError, match="row 0 of 2 met an infinite"):
        integrate(square, one, 0.9 * UNIT, solver=Kvaerno3())


def test_iterations_that_run_out_are_a_failure_even_of_finite_rows():
    field = lambda t, x: -(x**3)  # noqa: E731
    out = integrate(field, 1.0 + 0.2 * PLANE, UNIT, solver=Kvaerno3(iterations=2), on_failure="return")
    assert out.status.tolist() == [Result.non_finite] * 4 and (out.x == 1.0 + 0.2 * PLANE).all()
    assert integrate(field, 1.0 + 0.2 * PLANE, UNIT, solver=Kvaerno3()).result is Result.success
    control = PI(1e-3, 1e-3, first_step=1.0)
    assert integrate(field, 1.0 + 0.2 * PLANE, UNIT, solver=Kvaerno3(iterations=2), controller=control).rejected.all()


def test_stiffness_is_the_eigenvalue_even_in_steps_much_longer():
    rate = torch.tensor([[1.0], [1000.0], [0.0]], dtype=torch.float64)
    start = torch.ones_like(rate)
    out = integrate(lambda t, x: -rate * x, start, UNIT, solver=Kvaerno3(), record=Record())
    torch.testing.assert_close(out.trace.stiffness[0], rate[:, 0], rtol=1e-9, atol=0)
    assert integrate(lambda t, x: -x, start, UNIT, solver=ESDIRK54(), record=Record()).trace.stiffness is None


@pytest.mark.parametrize("options", [{"linear": "sparse"}, {"fraction": 0.0}, {"iterations": 1}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Kvaerno3(**options)


def test_dense_output_costs_nothing_and_has_order_3():
    field = lambda t, x: -x * t.cos().reshape(-1, 1)  # noqa: E731
    middle = torch.tensor([0.37], dtype=torch.float64)
    errors, costs = [], []
    for steps in (4, 8):
        settings = {"solver": ESDIRK54(), "controller": Fixed(steps)}
        out = integrate(field, PLANE, UNIT, save="dense", **settings)
        costs.append(int(out.nfe[0]) - int(integrate(field, PLANE, UNIT, **settings).nfe[0]))
        errors.append(float((out.dense(middle)[0] - PLANE * math.exp(-math.sin(0.37))).abs().max()))
    assert costs == [0, 0] and errors[1] < errors[0] / 6


# ---- what an explicit method says of a stiff field -------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["row", "batch"])
def test_running_out_of_steps_on_a_stiff_field_names_the_stiffness_and_the_way_out(norm):
    field, one = lambda t, x: -1000 * x, torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(
        SolverError, match=r"S = 1e\+03, so h S = [23]\.\d+ against the 3\.51 up to which 'tsit5'.*esdirk54, kvaerno3"
    ):
        integrate(field, one, UNIT, solver=Tsit5(), controller=PI(1e-6, 1e-6, norm=norm), max_steps=100)
    settings = {"controller": PI(1e-6, 1e-6, norm=norm), "max_steps": 100, "on_failure": "return"}
    strain = integrate(field, one, UNIT, solver=Tsit5(), **settings).strain
    torch.testing.assert_close(strain.stiffness, 1000 * torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert (strain.h * strain.stiffness > 2).all()
    settings["max_steps"] = 1000
    assert integrate(field, one, UNIT, solver=Tsit5(), **settings).strain is None


@pytest.mark.parametrize("norm", ["row", "batch"])
def test_a_step_that_underflows_names_the_stiffness(norm):
    pole = lambda t, x: x.square()  # noqa: E731
    x = torch.tensor([[2.0]], dtype=torch.float64)  # at t = 1/2
    with pytest.raises(SolverError, match=r"step_underflow .*stiffness estimate S = .* h S = .*esdirk54, kvaerno3"):
        integrate(pole, x, UNIT, solver=Tsit5(), controller=PI(1e-6, 1e-6, norm=norm))
    with pytest.raises(SolverError, match=r"step_underflow .*If the field is stiff.*esdirk54, kvaerno3"):
        integrate(pole, x, UNIT, solver=Bosh3(), controller=PI(1e-6, 1e-6, norm=norm))  # no estimate to name
