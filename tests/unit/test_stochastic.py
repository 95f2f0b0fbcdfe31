"""Solvers of SDEs: every registered one against exact paths, its order, both directions, gradients and refusals."""

import functools
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from genmodels.registry import ConfigError, build, names
from genmodels.rng import generator
from genmodels.solvers.base import Fixed, Gradient, Solver, integrate
from genmodels.solvers.brownian import Brownian, BrownianTree, Increment
from genmodels.solvers.fields import SDE
from genmodels.solvers.runge_kutta import Tsit5
from genmodels.solvers.step_size import PI
from genmodels.solvers.stochastic import (
    SOSRI,
    SOSRI2,
    SRIW1,
    EulerMaruyama,
    Milstein,
    ReversibleHeun,
    RowSDE,
    StochasticHeun,
)
from tests.oracles import GeometricBrownianMotion, OrnsteinUhlenbeck

SOLVERS = [name for name in names(Solver) if build(Solver, name).needs is SDE]
ADAPTIVE = [name for name in SOLVERS if build(Solver, name).adaptive]
GBM = GeometricBrownianMotion(0.5, 0.8)
PLANE = torch.randn(6, 2, generator=generator("stochastic"), dtype=torch.float64)


def time(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def grid(steps: int, start: float = 0.0, end: float = 1.0) -> Tensor:
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def tree(rows: int, *shape: int, start: float = 0.0, end: float = 1.0, dtype: torch.dtype = torch.float64) -> Brownian:
    return BrownianTree(rows, shape, start=start, end=end, dtype=dtype)


def calculus(name: str) -> str:
    return build(Solver, name).calculi[0]


def gbm(calculus: str) -> RowSDE:
    """Geometric Brownian motion in either calculus: the Itô drift less ½ g g'."""
    drift = GBM.drift - (GBM.volatility**2 / 2 if calculus == "stratonovich" else 0.0)
    return RowSDE(lambda t, x: drift * x, lambda t, x: GBM.volatility * x, calculus=calculus)


def curved(calculus: str, noise_type: str = "diagonal") -> RowSDE:
    """Neither linear nor autonomous."""
    spread = (lambda t, x: 0.3 + 0.2 * torch.sin(x + t_like(t, x))) if noise_type == "diagonal" else spread_in_time
    return RowSDE(lambda t, x: torch.cos(t_like(t, x)) - x.tanh(), spread, calculus=calculus, noise_type=noise_type)


def spread_in_time(t: Tensor, x: Tensor) -> Tensor:
    return (0.5 + 0.3 * torch.cos(3 * t_like(t, x))).expand_as(x)


def t_like(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(t.shape + (1,) * (x.ndim - 1)) if t.ndim else t


class Given(Brownian):
    """One increment."""

    def __init__(self, w: Tensor, h: Tensor) -> None:
        self.w, self.h = w, h

    def increment(self, t: Tensor, s: Tensor) -> Increment:
        return Increment(self.w, self.h)

    def select(self, rows: Tensor) -> Brownian:
        return Given(self.w[rows], self.h[rows])

    def another(self, noise: object) -> Brownian:
        return self


class Reflected(Given):
    """A path met from its end: B(t) = W(-t)."""

    def __init__(self, path: Brownian) -> None:
        self.path = path

    def increment(self, t: Tensor, s: Tensor) -> Increment:
        return self.path.increment(-t, -s)


# ---- numbers computed independently ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "value", "drift", "noise", "error"),
    [
        (SOSRI(), 1.005210706807, -0.190800019851, 0.000919751995, 0.9469342409),
        (SOSRI2(), 1.005338091766, -0.196776072921, 0.000728627161, 0.9776278951),
    ],
)
def test_a_single_step_with_its_error_and_stiffness(solver, value, drift, noise, error):
    """dx = -x/2 dt + 0.3 x dW from 1 with h = 0.1, ΔW = 0.2 and I = ΔW/2 + dZ/(2√3), dZ = -0.1."""
    one, t, s = torch.ones(1, 1, dtype=torch.float64), time(0.0), time(0.1)
    sde = RowSDE(lambda t, x: -0.5 * x, lambda t, x: 0.3 * x)
    step = solver.step(sde, t, s, one, (), Given(0.2 * one, -0.1 * one / (2 * math.sqrt(3))))
    assert step.x.item() == pytest.approx(value, abs=1e-12)
    assert step.error.item() == pytest.approx(drift + noise, abs=1e-12)
    scaled = step.error.abs() / (0.1 + 0.1 * torch.maximum(one, step.x))
    assert scaled.item() == pytest.approx(error, abs=1e-10)
    found = solver.stiffness(t, s, one, step)
    assert found is None if isinstance(solver, SOSRI) else found.item() == pytest.approx(0.5, rel=1e-12)


# mean absolute error at the end of geometric Brownian motion in 8, 16, 32 steps; Euler and Milstein to 3-10 %
TABLE = {
    "euler_maruyama": (0.206, 0.148, 0.108),
    "milstein": (0.0728, 0.0390, 0.0202),
    "sosri": (0.0187, 0.0073, 0.0028),
    "sosri2": (0.0107, 0.0041, 0.0015),
}
DECLARED = {"stochastic_heun": 1.0, "reversible_heun": 1.0}  # commutative noise is kinder than its declared order


@pytest.mark.parametrize("name", SOLVERS)
def test_strong_errors_and_orders_on_geometric_brownian_motion(name):
    solver, paths = build(Solver, name), 3000
    x, noise = torch.ones(paths, 1, dtype=torch.float64), tree(paths, 1)
    exact = GBM.pathwise(1.0, x, noise.increment(time(0.0), time(1.0)).w)
    for kind in solver.calculi:
        ends = [integrate(gbm(kind), x, grid(n), solver=solver, noise=noise).x for n in (8, 16, 32)]
        errors = [float((end - exact).abs().mean()) for end in ends]
        # 3000 paths with heavy tails: the mean errors themselves are known to 5 %, on top of the table's own error
        assert errors == pytest.approx(TABLE.get(name, errors), rel=0.15)
        # orders come up to the declared ones from below: SRK methods show 1.35 to 1.46 here
        assert math.log2(errors[1] / errors[2]) == pytest.approx(DECLARED.get(name, solver.order), abs=0.17)


@pytest.mark.parametrize("name", SOLVERS)
def test_strong_orders_where_the_diffusion_is_curved(name):
    """dx = √(1 + x²) ∘ dW: x = sinh(W + arsinh x₀). The Itô drift is x/2. Linear diffusions hide a bias here."""
    solver, paths = build(Solver, name), 2000
    x, noise = torch.full((paths, 1), 0.3, dtype=torch.float64), tree(paths, 1)
    exact = torch.sinh(noise.increment(time(0.0), time(1.0)).w + math.asinh(0.3))
    for kind in solver.calculi:
        drift = 0.5 if kind == "ito" else 0.0
        sde = RowSDE(lambda t, x, a=drift: a * x, lambda t, x: (1 + x.square()).sqrt(), calculus=kind)
        ends = [integrate(sde, x, grid(n), solver=solver, noise=noise).x for n in (16, 64)]
        errors = [float((end - exact).abs().mean()) for end in ends]
        assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(DECLARED.get(name, solver.order), abs=0.2)


@pytest.mark.parametrize("name", SOLVERS)
def test_moments_of_an_ornstein_uhlenbeck_process(name):
    """dx = -1.5 x dt + 0.7 dW from 1 to T = 2: mean 0.0497870684 and variance 0.1629284705."""
    process, paths = OrnsteinUhlenbeck(1.5, 0.0, 0.7), 4_000
    assert process.moments(2.0, time(1.0))[0].item() == pytest.approx(0.0497870684, abs=1e-10)
    assert process.moments(2.0, time(1.0))[1] == pytest.approx(0.1629284705, abs=1e-10)
    sde = RowSDE(process.drift, lambda t, x: torch.full_like(x, 0.7), noise_type="additive")
    steps = 64 if build(Solver, name).stages == 1 else 16
    x = torch.ones(paths, 1, dtype=torch.float64)
    end = integrate(sde, x, grid(steps, 0.0, 2.0), solver=build(Solver, name), noise=tree(paths, 1, end=2.0)).x
    # four standard errors, and a bias of the first-order methods of h λ/2 = 2.4 % of the variance
    assert end.mean().item() == pytest.approx(0.0497870684, abs=4 * math.sqrt(0.163 / paths) + 2e-3)
    assert end.var().item() == pytest.approx(0.1629284705, rel=4 * math.sqrt(2 / paths) + 0.025)


@functools.cache
def weighted_path() -> torch.Tensor:
    """1 + ∫ cos(3t) dW on the paths of tree(200, 1), by the midpoints of 512 intervals; the same for every solver."""
    noise, x = tree(200, 1), torch.zeros(200, 1, dtype=torch.float64)
    return 1 + sum(spread_in_time((t + s) / 2, x) * noise.increment(t, s).w for t, s in pairwise(grid(512)))


@pytest.mark.parametrize("name", SOLVERS)
def test_additive_noise_that_changes_in_time(name):
    """dx = cos(3t) dW + dt: x(1) = 1 + ∫ cos(3t) dW, of variance 1/2 + sin(6)/12, on each path by parts."""
    sde = RowSDE(lambda t, x: torch.ones_like(x), spread_in_time, noise_type="additive")
    noise, x, exact = tree(200, 1), torch.zeros(200, 1, dtype=torch.float64), weighted_path()
    solver = build(Solver, name)
    rough, close = ((integrate(sde, x, grid(n), solver=solver, noise=noise).x - exact).abs().mean() for n in (8, 32))
    assert close < 0.02 and math.log2(rough / close) / 2 > 0.85  # order 1 at least


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_a_general_diffusion_that_is_diagonal_is_the_diagonal_one(name):
    solver = build(Solver, name)
    if "general" not in solver.noise_types:
        pytest.skip("diagonal noise only")
    base, noise = curved(calculus(name)), tree(6, 2)
    wide = RowSDE(base.f, lambda t, x: torch.diag_embed(base.g(t, x)), noise_type="general", calculus=base.calculus)
    one, two = (integrate(sde, PLANE, grid(7), solver=solver, noise=noise).x for sde in (base, wide))
    torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("solver", [EulerMaruyama(), StochasticHeun(), ReversibleHeun()])
def test_general_noise_of_fewer_sources_than_components(solver):
    """x' = σ(x) ∘ dW with σ = (1, x₁): x₁ = W, x₂ = ∫W ∘ dW = W²/2, or (W² - t)/2 in Itô's sense."""
    kind = solver.calculi[0]
    sigma = lambda t, x: torch.stack((torch.ones_like(x[:, 0]), x[:, 0]), 1)[..., None]  # noqa: E731
    sde = RowSDE(lambda t, x: torch.zeros_like(x), sigma, noise_type="general", calculus=kind)
    noise, x = tree(400, 1), torch.zeros(400, 2, dtype=torch.float64)
    end = integrate(sde, x, grid(64), solver=solver, noise=noise).x
    w = noise.increment(time(0.0), time(1.0)).w[:, 0]
    torch.testing.assert_close(end[:, 0], w, rtol=0, atol=1e-10)
    exact = (w.square() - float(kind == "ito")) / 2
    trapezoidal = isinstance(solver, StochasticHeun)  # exact for W dW; the others are off by √(h/2) = 0.09
    assert (end[:, 1] - exact).square().mean().sqrt() < (1e-10 if trapezoidal else 0.12)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("noise_type", ["diagonal", "additive"])
def test_backwards_in_time_is_forwards_on_the_reflected_path(name, noise_type):
    solver, sde = build(Solver, name), curved(calculus(name), noise_type)
    mirror = RowSDE(lambda t, x: -sde.f(-t, x), lambda t, x: sde.g(-t, x), noise_type=noise_type, calculus=sde.calculus)
    path = tree(6, 2, end=1.5)
    back = integrate(sde, PLANE, grid(9, 1.5, 0.2), solver=solver, noise=path).x
    ahead = integrate(mirror, PLANE, grid(9, -1.5, -0.2), solver=solver, noise=Reflected(path)).x
    torch.testing.assert_close(back, ahead, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [n for n in SOLVERS if calculus(n) == "stratonovich"] + ["milstein"])
def test_stratonovich_equations_retrace_their_path(name):
    sde, noise = curved("stratonovich"), tree(6, 2)

    def gap(steps: int) -> float:
        end = integrate(sde, PLANE, grid(steps), solver=build(Solver, name), noise=noise).x
        assert (end - PLANE).abs().mean() > 0.2
        return float(
            (integrate(sde, end, grid(steps).flip(0), solver=build(Solver, name), noise=noise).x - PLANE).abs().mean()
        )

    assert gap(64) < 0.05 and gap(16) / gap(64) > 2.8  # order 1: 4


def test_a_step_of_reversible_heun_is_undone_exactly():
    solver, sde, noise = ReversibleHeun(), curved("stratonovich"), tree(6, 2)
    t, s = time(0.2), time(0.7)
    state = (PLANE + 0.1, sde.drift(t, PLANE + 0.1), sde.diffusion(t, PLANE + 0.1))
    there = solver.step(sde, t, s, PLANE, state, noise)
    back = solver.step(sde, s, t, there.x, there.state, noise)
    torch.testing.assert_close(back.x, PLANE, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(back.state[0], state[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_of_the_drift_are_counted(name):
    seen, sde = [], curved(calculus(name))
    counted = RowSDE(lambda t, x: seen.append(0) or sde.f(t, x), sde.g, calculus=sde.calculus)
    solver = build(Solver, name)
    out = integrate(counted, PLANE, grid(5), solver=solver, noise=tree(6, 2))
    assert out.nfe.tolist() == [len(seen)] * 6
    assert len(seen) - 5 * solver.stages in (0, 1), "one more at the start"


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_do_not_see_each_other_and_intervals_of_length_0_do_nothing(name):
    solver, sde = build(Solver, name), curved(calculus(name))
    times = torch.stack([grid(4), torch.tensor([0.0, 0.3, 0.3, 0.9, 0.9]).double()], 1).repeat(1, 3)
    whole = integrate(sde, PLANE, times, solver=solver, noise=tree(6, 2))
    assert whole.x.isfinite().all()
    short = torch.tensor([0.0, 0.3, 0.9]).double()
    for i in range(6):
        path = BrownianTree(torch.tensor([i]), (2,), start=0.0, end=1.0, dtype=torch.float64)
        alone = integrate(sde, PLANE[i : i + 1], short if i % 2 else grid(4), solver=solver, noise=path)
        torch.testing.assert_close(alone.x[0], whole.x[i], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_follows_float64(name):
    solver, sde = build(Solver, name), curved(calculus(name))
    wide = integrate(sde, PLANE, grid(16), solver=solver, noise=tree(6, 2)).x
    narrow = integrate(sde, PLANE.float(), grid(16), solver=solver, noise=tree(6, 2, dtype=torch.float32)).x
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


class Learned(torch.nn.Module):
    """An SDE with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[-0.3, 2.0], [-1.0, 0.1]], dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.tensor([0.3, 0.6], dtype=torch.float64))

    def f(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix.T)

    def g(self, t: Tensor, x: Tensor) -> Tensor:
        return self.scale * torch.cos(x)


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_are_those_of_the_steps(name):
    solver, module, noise = build(Solver, name), Learned(), tree(2, 2)

    def end(x: Tensor, matrix: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        f = lambda t, x: torch.tanh(x @ matrix.T)  # noqa: E731
        sde = RowSDE(f, lambda t, x: scale * torch.cos(x), calculus=calculus(name))
        step = solver.step(sde, time(0.0), time(0.4), x, solver.start(sde, time(0.0), x), noise)
        extra = [step.error] if solver.adaptive else []
        stiffness = solver.stiffness(time(0.0), time(0.4), x, step)
        return (step.x, *extra, *([] if stiffness is None else [stiffness]))

    inputs = (PLANE[:2].clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in module.parameters()))
    assert torch.autograd.gradcheck(end, inputs, atol=1e-6)


@pytest.mark.parametrize("gradient", [g for g in names(Gradient) if g in ("backprop", "checkpoint")])
@pytest.mark.parametrize("controller", [Fixed(), PI(rtol=0.1, atol=0.1)])
def test_every_way_of_backpropagation_meets_the_same_noise(gradient, controller):
    module = Learned()
    sde, found = RowSDE(module.f, module.g), {}
    assert {id(p) for p in sde.tensors()} == {id(p) for p in module.parameters()}
    for name in ("backprop", gradient):
        out = integrate(
            sde,
            PLANE,
            grid(6),
            solver=SOSRI2(),
            controller=controller,
            gradient=build(Gradient, name),
            noise=tree(6, 2),
        )
        found[name] = torch.autograd.grad(out.x.square().sum(), list(module.parameters()))
    for one, two in zip(found["backprop"], found[gradient], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


# ---- step control ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.slow_for("sosri2")
def test_errors_fall_with_the_tolerance_on_one_path(name):
    paths, solver = 300, build(Solver, name)
    noise, x = tree(paths, 1), torch.ones(paths, 1, dtype=torch.float64)
    exact = GBM.pathwise(1.0, x, noise.increment(time(0.0), time(1.0)).w)
    errors, steps = [], []
    for tolerance in (0.2, 0.02):
        control = PI(rtol=tolerance, atol=tolerance, exponents=(0.4, 0.1))
        out = integrate(gbm(calculus(name)), x, grid(1), solver=solver, controller=control, noise=noise)
        errors.append(float((out.x - exact).abs().mean()))
        steps.append(float(out.steps.double().mean()))
    # E goes with h: a tenth of the tolerance is ten times the steps, less those in which the first ones grow
    assert errors[1] < errors[0] / 4 and 2 < steps[1] / steps[0] < 25
    assert solver.error_order == 1.0


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.slow_for("sosri2")
def test_a_row_under_step_control_is_the_row_alone(name):
    solver, sde, control = build(Solver, name), curved(calculus(name)), PI(rtol=0.03, atol=0.03)
    whole = integrate(sde, PLANE, grid(2), solver=solver, controller=control, noise=tree(6, 2))
    assert len(set(whole.steps.tolist())) > 1, "rows end at different times, and the path is narrowed"
    for i in (0, 4):
        path = BrownianTree(torch.tensor([i]), (2,), start=0.0, end=1.0, dtype=torch.float64)
        alone = integrate(sde, PLANE[i : i + 1], grid(2), solver=solver, controller=control, noise=path)
        torch.testing.assert_close(alone.x[0], whole.x[i], rtol=1e-9, atol=1e-11)
    batch = integrate(
        sde, PLANE, grid(2), solver=solver, controller=PI(rtol=0.03, atol=0.03, norm="batch"), noise=tree(6, 2)
    )
    assert batch.steps.unique().numel() == 1 and (batch.x - whole.x).abs().max() < 0.05


def test_the_error_estimate_goes_with_h():
    means = {}
    for solver in (SOSRI(), SOSRI2(), SRIW1(), StochasticHeun()):
        sde, noise, x, sizes = gbm(solver.calculi[0]), tree(2000, 1), torch.ones(2000, 1, dtype=torch.float64), []
        for h in (0.125, 0.0078125):
            error = solver.step(sde, time(0.0), time(h), x, (), noise).error
            sizes.append(error.abs().mean().item())
        means[type(solver).__name__] = math.log2(sizes[0] / sizes[1]) / 4
    assert means == pytest.approx(dict.fromkeys(means, 1.0), abs=0.15)


def test_stiffness_sees_the_drift_alone_and_is_0_at_rest():
    assert SOSRI2.stability == 10.6
    rate = torch.tensor([[1.0], [50.0], [0.0]], dtype=torch.float64)
    sde = RowSDE(lambda t, x: -rate * x, lambda t, x: 0.3 * x)
    x = torch.ones_like(rate)
    step = SOSRI2().step(sde, time(0.0), time(0.05), x, (), tree(3, 1))
    torch.testing.assert_close(SOSRI2().stiffness(time(0.0), time(0.05), x, step), rate[:, 0], rtol=1e-10, atol=0)
    assert (
        SOSRI2()
        .stiffness(time(0.0), time(0.05), 0 * x, SOSRI2().step(sde, time(0.0), time(0.05), 0 * x, (), tree(3, 1)))
        .eq(0)
        .all()
    )


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "noise_type", "kind", "found"),
    [
        (SOSRI(), "general", "ito", r"additive or diagonal noise.*general noise.*Use one of: euler_maruyama\."),
        (Milstein(), "general", "ito", r"Use one of: euler_maruyama\."),
        (
            SOSRI2(),
            "diagonal",
            "stratonovich",
            r"ito calculus.*Use one of: milstein, reversible_heun, stochastic_heun\.",
        ),
        (StochasticHeun(), "diagonal", "ito", r"stratonovich calculus, which RowSDE with diagonal noise and ito"),
        (Tsit5(), "additive", "ito", r"needs a VectorField.*Use one of: euler_maruyama, milstein.*sosri"),
    ],
)
def test_an_equation_that_a_solver_does_not_solve_names_those_that_do(solver, noise_type, kind, found):
    sde = RowSDE(lambda t, x: -x, lambda t, x: x, noise_type=noise_type, calculus=kind)
    with pytest.raises(ConfigError, match=found):
        integrate(sde, PLANE, grid(2), solver=solver, noise=tree(6, 2))


def test_both_calculi_are_one_where_noise_is_additive():
    for name in SOLVERS:
        one, two = (
            integrate(curved(kind, "additive"), PLANE, grid(4), solver=build(Solver, name), noise=tree(6, 2)).x
            for kind in ("ito", "stratonovich")
        )
        assert torch.equal(one, two)


def test_an_ode_is_no_sde():
    with pytest.raises(ConfigError, match=r"needs an SDE with additive or diagonal.*function is not.*tsit5"):
        integrate(lambda t, x: -x, PLANE, grid(2), solver=SOSRI(), noise=tree(6, 2))


@pytest.mark.parametrize("name", SOLVERS)
def test_noise_of_another_shape_is_refused_with_both_shapes(name):
    solver, kind = build(Solver, name), calculus(name)
    with pytest.raises(ValueError, match=r"SDE noise shape mismatch.*\[6, 2\].*\[6, 3\].*noise_type"):
        integrate(curved(kind), PLANE, grid(2), solver=solver, noise=tree(6, 3))
    wide = RowSDE(lambda t, x: -x, lambda t, x: torch.ones(6, 2, 3).double(), calculus=kind)
    with pytest.raises(ValueError, match=r"SDE noise shape mismatch.*\[6, 2, 3\].*\[6, 2\]"):
        integrate(wide, PLANE, grid(2), solver=solver, noise=tree(6, 2))
    with pytest.raises(ValueError, match=r"needs noise, a Brownian path.*NoneType"):
        integrate(curved(kind), PLANE, grid(2), solver=solver)
    if "general" in solver.noise_types:
        wide = RowSDE(wide.f, wide.g, noise_type="general", calculus=kind)
        with pytest.raises(ValueError, match=r"mismatch.*\[6, 2, 3\].*\[6, 2\].*general.*\[6, 2, M\]"):
            integrate(wide, PLANE, grid(2), solver=solver, noise=tree(6, 2))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_drift_of_another_shape_is_refused_rather_than_broadcast(name):
    sde = RowSDE(lambda t, x: -x[:, :1], lambda t, x: 0.1 * x, calculus=calculus(name))
    with pytest.raises(ValueError, match=r"drift.*\[6, 2\] into torch.float64 of shape \[6, 1\] at t = 0"):
        integrate(sde, PLANE, grid(2), solver=build(Solver, name), noise=tree(6, 2))


@pytest.mark.parametrize("name", SOLVERS)
def test_the_state_keeps_its_dtype_whatever_the_path_and_the_equation_have(name):
    base, solver = curved(calculus(name)), build(Solver, name)
    wide = RowSDE(lambda t, x: base.f(t, x).double(), lambda t, x: base.g(t, x).double(), calculus=base.calculus)
    found = integrate(wide, PLANE.float(), grid(4), solver=solver, noise=tree(6, 2)).x
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), integrate(base, PLANE, grid(4), solver=solver, noise=tree(6, 2)).x, rtol=1e-5, atol=1e-5
    )
