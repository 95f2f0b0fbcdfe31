"""Gradients of fixed points against dense linear algebra: exact ones, and the series of those that are not."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from genmodels.registry import build, names
from genmodels.rng import generator
from genmodels.solvers.equilibrium import EquilibriumGradient, Implicit, JacobianFree, Phantom, Unrolled, equilibrium
from genmodels.solvers.fixed_point import Anderson, FixedPoint, Picard, RowMap
from genmodels.solvers.infinite_time import InfiniteTime
from genmodels.solvers.newton import gmres
from genmodels.solvers.outcomes import EquilibriumError

LINEAR = ("gmres", "neumann", "anderson", "broyden")
TIGHT = Anderson(1e-13, 1e-13, 200)
START = torch.zeros(4, 5, dtype=torch.float64)


def problem(norm: float = 0.8, size: int = 5) -> tuple[Tensor, Tensor]:
    """W [D, D] with the given norm, and x [4, D], of z = tanh(W z + x)."""
    w = torch.randn(size, size, generator=generator("w"), dtype=torch.float64)
    w = norm * w / torch.linalg.matrix_norm(w, 2)
    x = torch.randn(4, size, generator=generator("x"), dtype=torch.float64)
    return w.requires_grad_(), x.requires_grad_()


def mapped(w: Tensor, x: Tensor) -> RowMap:
    return RowMap(lambda z, x: torch.tanh(z @ w.T + x), x)


def jacobians(w: Tensor, z: Tensor) -> Tensor:
    """[B, D, D] of tanh(W z + x) at fixed points z."""
    return (1 - z.square())[:, :, None] * w


def dense(w: Tensor, x: Tensor, z: Tensor, weights: Tensor) -> list[Tensor]:
    """Gradients of Σ weights z with respect to w and x, from λ = (I - Jᵀ)⁻¹ weights."""
    lam = torch.linalg.solve(torch.eye(len(w), dtype=w.dtype) - jacobians(w, z).mT, weights)
    inner = (1 - z.square()) * lam
    return [inner.T @ z, inner]


WEIGHTS = torch.randn(4, 5, generator=generator("weights"), dtype=torch.float64)


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("norm", [0.8, 1.3])
def test_implicit_gradients_are_those_of_a_dense_solve(linear, norm):
    w, x = problem(norm)
    gradient = Implicit(linear, rtol=1e-12, max_iterations=300)
    found = equilibrium(mapped(w, x), START, solver=TIGHT, gradient=gradient, on_failure="raise")
    got = torch.autograd.grad((WEIGHTS * found.z).sum(), (w, x))
    for mine, exact in zip(got, dense(w.detach(), x.detach(), found.z.detach(), WEIGHTS), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-10)
    assert gradient.adjoint.converged.all() and gradient.unconverged == 0
    if linear == "gmres":
        assert gradient.adjoint.nfe <= 5  # as many products as dimensions


@pytest.mark.parametrize("name", ["picard", "anderson", "broyden", "infinite_time"])
def test_gradcheck_through_every_solver(name):
    limit = {"max_steps": 3000} if name == "infinite_time" else {"max_iterations": 500}
    solver = build(FixedPoint, {"name": name, "rtol": 1e-11, "atol": 1e-12, **limit})
    w, x = problem(size=2)  # finite differences solve twice for every entry of W and x

    def solved(w, x):
        gradient = Implicit(rtol=1e-12)
        return equilibrium(mapped(w, x), START[:1, :2], solver=solver, gradient=gradient, on_failure="raise").z

    assert torch.autograd.gradcheck(solved, (w, x[:1].detach().requires_grad_()), eps=1e-5, atol=1e-6)


def test_a_solved_map_without_dependence_has_no_gradient():
    found = equilibrium(lambda z: 0.5 * z.detach() + 1, START, solver=TIGHT)
    assert not found.z.requires_grad


def test_jacobian_free_and_phantom_gradients_are_sums_of_the_series():
    """JFB: λ = g; phantom: λ = τ Σ_k ((1 - τ) I + τ Jᵀ)^k g, which tends to the implicit one."""
    w, x = problem()
    z = equilibrium(mapped(w, x), START, solver=TIGHT).z.detach()
    j = jacobians(w.detach(), z).mT
    eye = torch.eye(5, dtype=w.dtype)

    def series(steps, damping):
        total, power = torch.zeros_like(WEIGHTS), WEIGHTS
        for _ in range(steps):
            total = total + damping * power
            power = torch.einsum("bij,bj->bi", (1 - damping) * eye + damping * j, power)
        return total

    for gradient, lam in (
        (JacobianFree(), WEIGHTS),
        (Phantom(1, 0.3), 0.3 * WEIGHTS),
        (Phantom(4, 0.5), series(4, 0.5)),
        (Phantom(3, 1.0), series(3, 1.0)),
        (Phantom(400, 0.9), torch.linalg.solve(eye - j, WEIGHTS)),
    ):
        out = equilibrium(mapped(w, x), START, solver=TIGHT, gradient=gradient).z
        inner = (1 - z.square()) * lam
        for mine, exact in zip(torch.autograd.grad((WEIGHTS * out).sum(), (w, x)), (inner.T @ z, inner), strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", [Picard(1e-13, 1e-13, 400), Anderson(1e-13, 1e-13, 100)])
def test_unrolled_gradients_tend_to_the_implicit_ones_and_are_those_of_a_tied_network_before(solver):
    w, x = problem(0.6)
    found = equilibrium(mapped(w, x), START, solver=solver, gradient=Unrolled())
    got = torch.autograd.grad((WEIGHTS * found.z).sum(), (w, x))
    for mine, exact in zip(got, dense(w.detach(), x.detach(), found.z.detach(), WEIGHTS), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-6, atol=1e-7)
    two = equilibrium(mapped(w, x), START, solver=Picard(1e-13, 1e-13, 3), gradient=Unrolled())
    z = torch.tanh(torch.tanh(x) @ w.T + x)
    torch.testing.assert_close(two.z, z)
    got, tied = (torch.autograd.grad((WEIGHTS * v).sum(), (w, x)) for v in (two.z, z))
    for mine, exact in zip(got, tied, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("name", names(EquilibriumGradient))
def test_the_fixed_point_does_not_depend_on_the_gradient(name):
    w, x = problem()
    found = equilibrium(mapped(w, x), START, solver=Picard(1e-4, 1e-4), gradient=build(EquilibriumGradient, name))
    with torch.no_grad():
        plain = equilibrium(mapped(w, x), START, solver=Picard(1e-4, 1e-4))
    assert torch.equal(found.z.detach(), plain.z) and torch.equal(found.nfe, plain.nfe)
    assert found.z.requires_grad and not plain.z.requires_grad


def test_equilibria_in_and_after_each_other():
    """z = tanh(W z + x), y = tanh(W y + z): the same weights twice, differentiated by one backward pass."""
    w, x = problem(0.5, size=3)

    def twice(w, x):
        z = equilibrium(mapped(w, x), START[:1, :3], solver=TIGHT, gradient=Implicit(rtol=1e-12)).z
        return equilibrium(mapped(w, z), z.detach(), solver=TIGHT, gradient=Implicit(rtol=1e-12)).z

    def inside(w, x):
        """z = tanh(W z + x + y(z)/4) with y = tanh(W y + z)."""

        def f(z, x):
            y = equilibrium(mapped(w, z), torch.zeros_like(z), solver=TIGHT, gradient=Implicit(rtol=1e-12)).z
            return torch.tanh(z @ w.T + x + y / 4)

        return equilibrium(RowMap(f, x), START[:1, :3], solver=TIGHT, gradient=Implicit(rtol=1e-12)).z

    for f in (twice, inside):
        assert torch.autograd.gradcheck(f, (w, x[:1].detach().requires_grad_()), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("linear", LINEAR)
def test_an_adjoint_that_does_not_converge_is_told_once_and_counted(linear):
    w, x = problem()
    gradient = Implicit(linear, rtol=1e-10, max_iterations=2)
    with pytest.warns(UserWarning, match=r"4 of 4 linear systems .* rtol=1e-10 in .*the worst is left at 0"):
        equilibrium(mapped(w, x), START, solver=TIGHT, gradient=gradient).z.sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        equilibrium(mapped(w, x), START, solver=TIGHT, gradient=gradient).z.sum().backward()
    assert gradient.unconverged == 8 and not gradient.adjoint.converged.any()


def test_the_residual_of_the_adjoint_is_that_of_its_system():
    w, x = problem()
    gradient = Implicit("neumann", rtol=1e-12, max_iterations=3)
    with pytest.warns(UserWarning):
        found = equilibrium(mapped(w, x), START, solver=TIGHT, gradient=gradient)
        (WEIGHTS * found.z).sum().backward()
    j = jacobians(w.detach(), found.z.detach()).mT
    powers = [WEIGHTS]
    for _ in range(3):
        powers.append(torch.einsum("bij,bj->bi", j, powers[-1]))
    # after the evaluations at g, g + Jg and g + Jg + JJg the last one is best, and leaves JJJg
    torch.testing.assert_close(
        gradient.adjoint.residual, powers[3].norm(dim=1) / WEIGHTS.norm(dim=1), rtol=1e-9, atol=1e-12
    )


def test_rows_of_a_backward_pass_do_not_see_each_other():
    """One row with a cotangent a billion times larger changes nothing for the others."""
    w, x = problem()
    weights = WEIGHTS.clone()
    weights[0] *= 1e9
    found = []
    for each in (WEIGHTS, weights):
        out = equilibrium(mapped(w, x), START, solver=TIGHT, gradient=Implicit("anderson", 1e-4)).z
        found.append(torch.autograd.grad((each * out).sum(), x)[0])
    torch.testing.assert_close(found[0][1:], found[1][1:], rtol=1e-12, atol=1e-14)


def test_modules_and_states_of_images_in_float32():
    """A convolutional map: gradients of the parameters against a long unrolled iteration in float64."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 2, 3, padding=1, bias=False), torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        conv.weight.mul_(0.3)
    f = RowMap(lambda z, x: torch.tanh(conv(z) + x), x)
    out = equilibrium(f, torch.zeros_like(x), solver=InfiniteTime(1e-5, 1e-5), gradient=Implicit(rtol=1e-5))
    (grad,) = torch.autograd.grad(out.z.square().sum(), conv.weight)
    conv.double()
    z = torch.zeros_like(x).double()
    for _ in range(60):
        z = torch.tanh(conv(z) + x.double())
    (exact,) = torch.autograd.grad(z.square().sum(), conv.weight)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


def test_bad_settings_are_refused():
    for message, call in (
        ("rtol > 0", lambda: Implicit(rtol=0)),
        (
            "implicit: rtol=1e-09 is below the resolution .* torch.float32",
            lambda: equilibrium(lambda z: 0.5 * z, torch.ones(2, 3), solver=Picard(), gradient=Implicit(rtol=1e-9)),
        ),
        ("max_iterations >= 1", lambda: Implicit(max_iterations=0)),
        ("steps >= 1", lambda: Phantom(0)),
        ("damping", lambda: Phantom(3, 0.0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("size", [1e-25, 1e30])
def test_gradients_do_not_depend_on_the_scale_of_the_loss(linear, size):
    """In float32, where squares of such cotangents are 0 or infinite."""
    rates = torch.tensor([0.5, 0.2, -0.7])
    x = torch.ones(2, 3, requires_grad=True)
    gradient = Implicit(linear, rtol=1e-4)
    out = equilibrium(RowMap(lambda z, x: rates * z + x, x), torch.zeros(2, 3), solver=Picard(), gradient=gradient).z
    (grad,) = torch.autograd.grad((size * out).sum(), x)
    assert gradient.adjoint.converged.all()
    torch.testing.assert_close(grad / size, (1 / (1 - rates)).expand(2, 3), rtol=3e-4, atol=0)


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(linear, dtype):
    rates = torch.tensor([0.5, 0.25, -0.5], dtype=dtype)
    x = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    f, start = RowMap(lambda z, x: rates * z + x, x), torch.zeros(2, 3, dtype=dtype)
    out = equilibrium(f, start, solver=Picard(0.02, 0.02), gradient=Implicit(linear, rtol=0.02)).z
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, (1 / (1 - rates)).expand(2, 3), rtol=0.05, atol=0)


@pytest.mark.parametrize("linear", LINEAR)
def test_systems_without_a_solution_are_told_and_leave_the_gradient_bounded(linear):
    """z_0 is free to move: (I - Jᵀ) λ = g has no solution for most g, and GMRES gives the one of least squares."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    a = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    f, gradient = RowMap(lambda z, x: z @ a.T + x, x), Implicit(linear, rtol=1e-8)
    with pytest.warns(UserWarning, match="2 of 2 linear systems"):
        out = equilibrium(f, torch.zeros_like(x), solver=Picard(), gradient=gradient).z
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.abs().max() < 1e3
    if linear == "gmres":
        g = torch.ones(3, dtype=torch.float64)
        m = torch.eye(3, dtype=torch.float64) - a.T
        basis = torch.stack((g, m @ g), 1)  # the third of the Krylov space adds nothing
        best = basis @ torch.linalg.lstsq(m @ basis, g).solution
        torch.testing.assert_close((m @ grad[0] - g).norm(), (m @ best - g).norm(), rtol=1e-9, atol=0)


def test_gmres_on_singular_matrices_is_that_of_least_squares():
    g = generator("singular")
    a = torch.randn(6, 8, 8, generator=g, dtype=torch.float64)
    u, s, v = torch.linalg.svd(a)
    s[:, -1] = 0
    a, r = u @ torch.diag_embed(s) @ v, torch.randn(6, 8, generator=g, dtype=torch.float64)
    found = gmres(lambda v: torch.einsum("bij,bj->bi", a, v), r, 1e-12)
    left = (torch.einsum("bij,bj->bi", a, found) - r).norm(dim=1)
    torch.testing.assert_close(left, (u[:, :, -1] * r).sum(1).abs(), rtol=1e-8, atol=1e-10)
    assert (found.norm(dim=1) < 1e6).all()


@pytest.mark.parametrize("steps", [1, 5])
def test_what_follows_an_iterate_does_not_reach_its_value(steps):
    """The best iterate of row 1 leads to an undefined one; further steps meet it, the value does not."""
    rows = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)[:, None]
    x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    f = lambda z: torch.where((rows == 1) & (z > 0.6), torch.nan, 0.5 * z + 0.5 * x)  # noqa: E731
    found = equilibrium(f, torch.zeros(3, 2, dtype=torch.float64), solver=Picard(), gradient=Phantom(steps, 1.0))
    assert (found.z[1] == 0.5).all() and found.z.isfinite().all()


def test_second_derivatives_are_refused_or_right():
    """Of z = tanh(w z + 1), with respect to w: an error for implicit ones, also of a loss that is linear in z."""
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    f, start = (lambda z: torch.tanh(w * z + 1)), torch.zeros(1, 1, dtype=torch.float64)

    def first(gradient, loss):
        out = equilibrium(f, start, solver=Picard(1e-14, 1e-14, 100), gradient=gradient).z
        return torch.autograd.grad(loss(out), w, create_graph=True)[0]

    for loss in (torch.sum, lambda z: z.square().sum()):
        for again in (lambda slope: torch.autograd.grad(slope, w), lambda slope: slope.backward()):
            slope = first(Implicit(rtol=1e-10), loss)
            with pytest.raises(RuntimeError, match="can be taken once, not twice"):
                again(slope)
    slope = first(Unrolled(), torch.sum)
    (curve,) = torch.autograd.grad(slope, w)
    z = start
    for _ in range(60):
        z = f(z)
    one = torch.autograd.grad(z.sum(), w, create_graph=True)[0]
    torch.testing.assert_close(slope, one, rtol=1e-9, atol=0)
    torch.testing.assert_close(curve, torch.autograd.grad(one, w)[0], rtol=1e-9, atol=0)


def test_adjoints_of_rows_that_are_asked_nothing_and_of_maps_that_ignore_the_state():
    """A cotangent of 0 is solved by 0; where f does not depend on z the gradient is that of f."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    for linear in LINEAR:
        gradient = Implicit(linear, rtol=1e-8)
        out = equilibrium(RowMap(lambda z, x: 0.5 * z + x, x), START[:2, :3], solver=TIGHT, gradient=gradient).z
        (grad,) = torch.autograd.grad(out[0].sum(), x)
        torch.testing.assert_close(grad, torch.tensor([[2.0], [0.0]], dtype=torch.float64).expand(2, 3))
        assert gradient.adjoint.converged.all() and gradient.adjoint.residual[1] == 0
        out = equilibrium(RowMap(lambda z, x: 3 * x, x), START[:2, :3], solver=TIGHT, gradient=gradient).z
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert (grad == 3).all()


def test_one_row_that_is_lost_leaves_the_verdicts_of_the_others():
    """With on_failure="return" an error names the row without any finite iterate, not one that ran out before it."""
    f = RowMap(lambda z, k: torch.where(k[:, None] > 0, torch.nan, -z), torch.tensor([0.0, 1.0]))
    with pytest.raises(EquilibriumError, match="row 1 of 2 met an infinite"):
        equilibrium(f, torch.ones(2, 3), solver=Picard())


def test_gmres_keeps_its_basis_orthogonal():
    """At a condition of a million one pass of Gram-Schmidt leaves a residual of 1e-10."""
    g = generator("orthogonal")
    u, v = (torch.linalg.qr(torch.randn(3, 30, 30, generator=g, dtype=torch.float64))[0] for _ in range(2))
    a = u @ torch.diag_embed(torch.logspace(0, -6, 30, dtype=torch.float64)).expand(3, 30, 30) @ v
    r = torch.einsum("bij,bj->bi", a, torch.randn(3, 30, generator=g, dtype=torch.float64))
    found = gmres(lambda v: torch.einsum("bij,bj->bi", a, v), r, 1e-14)
    assert ((torch.einsum("bij,bj->bi", a, found) - r).norm(dim=1) <= 1e-13 * r.norm(dim=1)).all()


def test_gmres_gives_up_rows_that_are_undefined_at_once():
    calls, r = [], torch.full((2, 9), torch.nan, dtype=torch.float64)
    found = gmres(lambda v: calls.append(1) or 2 * v, r, 1e-6)
    assert len(calls) == 1 and found.isnan().all()
    r[1] = torch.arange(9.0)
    torch.testing.assert_close(gmres(lambda v: 2 * v, r, 1e-6)[1], torch.arange(9.0, dtype=torch.float64) / 2)


def test_gradients_under_autocast_are_those_of_float32():
    x = torch.ones(2, 3, requires_grad=True)
    f = RowMap(lambda z, x: torch.tensor([0.9, 0.5, -0.7]) * z + x, x)
    found = []
    for lowered in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lowered):
            out = equilibrium(f, torch.zeros(2, 3), solver=Picard(), gradient=Implicit(rtol=1e-6)).z
            found.append(torch.autograd.grad((WEIGHTS[:2, :3].float() * out).sum(), x)[0])
    assert torch.equal(*found)
