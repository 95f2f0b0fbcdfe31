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
    w, x = problem(size=3)  # finite differences solve twice for every entry of W and x

    def solved(w, x):
        gradient = Implicit(rtol=1e-12)
        return equilibrium(mapped(w, x), START[:1, :3], solver=solver, gradient=gradient, on_failure="raise").z

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
        ("max_iterations >= 1", lambda: Implicit(max_iterations=0)),
        ("steps >= 1", lambda: Phantom(0)),
        ("damping", lambda: Phantom(3, 0.0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
