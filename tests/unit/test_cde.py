"""Neural CDEs against closed forms: exponentials of matrices and of paths; and what must not change their answers."""

import pytest
import torch
from torch import Tensor

from genmodels.dynamics.cde import NeuralCDE
from genmodels.model import Model
from genmodels.registry import ConfigError, build, names
from genmodels.rng import generator
from genmodels.solvers.base import Fixed, Gradient, Solver, integrate
from genmodels.solvers.implicit import Kvaerno3
from genmodels.solvers.landing import Landing
from genmodels.solvers.runge_kutta import RK4, Bosh3, Dopri5, Heun, Tsit5
from genmodels.solvers.step_size import PI
from genmodels.types import Batch

A = torch.tensor([[[0, -1], [1, 0]], [[0.3, 0], [0.2, -0.1]]], dtype=torch.float64)
Z0 = torch.tensor([[1, -0.5]], dtype=torch.float64)
KNOTS = Batch(
    torch.tensor([[[0, 0], [1, 0.5], [2, 0.2]]], dtype=torch.float64),
    times=torch.tensor([[0, 1, 2]], dtype=torch.float64),
)
# dz = A_1 z dX¹ + A_2 z dX² from Z0 along KNOTS: linear in closed form, the others by a solve at a tolerance of 1e-13
EXACT = {
    "linear": (-0.082164807315, 1.257839269588),
    "hermite": (-0.084346206761, 1.293115943492),
    "natural_cubic": (-0.101864693667, 1.279353501844),
}


def model(
    control: str | dict = "hermite", target: tuple[int, ...] = (2,), channels: int = 2, **arguments: object
) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        node = {"name": "neural_cde", "field": {"name": "mlp", "hidden": [12]}, "hidden": 5, "precision": "float64"}
        built = build(Model, {**node, "control": control, **arguments}, shape=(9, channels), target_shape=target)
    return built.eval()


def linear_equation(control: str, **arguments: object) -> Model:
    """dz = Σ A_i z dX^i from Z0, of which the answer is the state."""
    m = model({"name": control, "time": False}, **arguments)
    m.columns = lambda z: torch.einsum("kij,bj->bik", A, z)
    m._initial = lambda x: Z0.expand(len(x), 2)
    m.readout = torch.nn.Identity()
    return m


def exponential(control: str | dict, target: tuple[int, ...], **arguments: object) -> Model:
    """dz = z dX of one channel from 1."""
    m = model(control, target, channels=1, **arguments)
    m.columns = lambda z: z[:, :, None]
    m._initial = lambda x: torch.ones_like(x[:, :1])
    m.readout = torch.nn.Identity()
    return m


def series(rows: int = 4, length: int = 9, channels: int = 2) -> Batch:
    """Walks at irregular times with gaps, of lengths 9, 8, 7, 9, padded as data sets do, with arbitrary labels."""
    g = generator("cde", rows, length, channels)
    times = torch.rand(rows, length, generator=g, dtype=torch.float64).cumsum(1)
    x = torch.randn(rows, length, channels, generator=g, dtype=torch.float64).cumsum(1) / 2
    mask = torch.rand(rows, length, channels, generator=g) > 0.3
    mask[:, 0] = True
    ends = length - 1 - torch.arange(rows) % 3
    mask[torch.arange(rows), ends, 0] = True
    late = torch.arange(length) > ends[:, None]
    mask = mask & ~late[:, :, None]
    times = torch.where(late, times.gather(1, ends[:, None]), times)
    return Batch(x * mask, times=times, mask=mask, target=torch.arange(rows) % 2)


# ---- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("land", ["always", "never"])
@pytest.mark.parametrize("control", EXACT)
def test_end_values_of_a_linear_equation(control, land):
    """Without landing X' or X'' jumps within steps, which are shortened until the estimate does not see it."""
    m = linear_equation(control, land=land)
    found = m.predict(KNOTS, controller=PI(rtol=1e-11, atol=1e-11))
    tolerance = 5e-7 if land == "never" and control != "natural_cubic" else 1e-10
    torch.testing.assert_close(found, torch.tensor([EXACT[control]], dtype=torch.float64), rtol=0, atol=tolerance)


def test_the_closed_form_is_a_product_of_exponentials():
    exact = torch.matrix_exp(A[0] - 0.3 * A[1]) @ torch.matrix_exp(A[0] + 0.5 * A[1]) @ Z0[0]
    torch.testing.assert_close(exact, torch.tensor(EXACT["linear"], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("solver", "most"), [(Dopri5(), 94), (Tsit5(), 76)])
def test_landing_on_kinks_saves_evaluations_and_digits(solver, most):
    """torchcde needs 89 with jumps told to torchdiffeq, and 207 without, with errors of 3e-7 and 7e-5."""
    found = {}
    for land in ("always", "never"):
        m, control = linear_equation("linear", land=land), PI(rtol=1e-6, atol=1e-8)
        answer, evolved = m._answer(KNOTS, solver, control, gradient=m.gradient)
        error = (answer - torch.tensor([EXACT["linear"]], dtype=torch.float64)).abs().max()
        found[land] = (int(evolved.solution.nfe), float(error))
    assert found["always"][0] <= most < 0.5 * found["never"][0]
    assert found["always"][1] < 3e-7 < found["never"][1]


@pytest.mark.parametrize("control", ["linear", "hermite", "natural_cubic", "rectilinear"])
def test_an_equation_of_one_channel_sees_the_ends_of_its_path_alone(control):
    """dz = z dX: z = exp(X(T) - X(0)), for X from 0 to 0.7 by way of values that do not matter."""
    batch = Batch(
        torch.tensor([[[0.0], [1.3], [-0.4], [0.7]]]).double(), times=torch.tensor([[0, 0.2, 1.5, 2]]).double()
    )
    m = exponential({"name": control, "time": False}, (1,))
    found = m.predict(batch, controller=PI(rtol=1e-9, atol=1e-9))
    # some hundred steps err by up to 1e-9 of the state, which on its way comes to e^1.3 and more
    assert abs(float(found) - 2.0137527075) < 1e-6


@pytest.mark.parametrize("land", ["always", "never"])
@pytest.mark.parametrize("control", ["hermite", "linear", "natural_cubic"])
def test_values_at_target_times_are_those_of_the_path(control, land):
    """At any times, in any order: between observations, on them, twice, and beyond the ends."""
    batch = series(channels=1)
    asked = torch.tensor([1.7, 0.9, 0.9, 40.0, -3.0, 2.2], dtype=torch.float64).repeat(4, 1)
    asked = torch.cat((asked, batch.times[:, 3:5]), 1)
    m = exponential({"name": control, "time": False}, (8, 1), land=land)
    found = m.predict(batch.replace(target_times=asked), controller=PI(rtol=1e-9, atol=1e-9))
    path = m.control.path(batch.times, batch.x, batch.mask)
    start = path.value(path.knots[:, 0])
    exact = torch.stack([(path.value(t) - start).exp() for t in asked.unbind(1)], 1)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_rectilinear_values_are_what_was_known_by_then():
    batch = series(rows=1, channels=1).replace(target=None)
    t = batch.times[:, batch.mask[0, :, 0]]
    asked = torch.cat((t, t + 1e-3), 1)  # no two observations are that near
    m = exponential({"name": "rectilinear", "time": False}, (asked.shape[1], 1))
    found = m.predict(batch.replace(target_times=asked), controller=PI(rtol=1e-9, atol=1e-9))[0, :, 0]
    x = batch.x[0, batch.mask[0, :, 0], 0]
    torch.testing.assert_close(found, (x - x[0]).exp().repeat(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", [Heun(), Bosh3(), RK4(), Dopri5()], ids=lambda s: s.registered_name)
def test_solvers_keep_their_order_across_kinks(solver):
    exact = torch.tensor([EXACT["linear"]], dtype=torch.float64)
    m = linear_equation("linear")
    errors = [(m.predict(KNOTS, solver=solver, controller=Fixed(k)) - exact).abs().max() for k in (8, 16)]
    assert float(torch.log2(errors[0] / errors[1])) > solver.order - 0.25
    backwards = _back(m, solver)
    torch.testing.assert_close(backwards, Z0, rtol=0, atol=20 * float(errors[0]))


def _back(m: Model, solver: Solver) -> Tensor:
    """From the exact end to the start."""
    from genmodels.solvers.fields import RowField

    path = m.control.path(KNOTS.times, KNOTS.x)
    clock, end = m._clock(path, None, Fixed()), torch.tensor([EXACT["linear"]], dtype=torch.float64)
    times = torch.arange(2, -1, -1, dtype=torch.float64)
    return integrate(RowField(m._slope, clock, path), end, times, solver=Landing(solver), controller=Fixed(8)).x


# ---- invariances -----------------------------------------------------------------------------------------------------

CONTROLS = ["linear", "hermite", "natural_cubic", "rectilinear", "log_ode"]
# a row takes the same steps in any batch, so that its answers are the same to rounding at any tolerance; where inputs
# are rounded differently, steps of one length keep that small, which a chosen step, accepted or not, does not
COARSELY, EVENLY = {"controller": PI(rtol=1e-3, atol=1e-3)}, {"solver": RK4(), "controller": Fixed(2)}


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.slow_for("hermite", "natural_cubic")
def test_padding_hidden_values_and_companions_change_nothing(control):
    m, batch = model({"name": control, "intensity": True}), series()
    with torch.no_grad():
        found = m.predict(batch, **COARSELY)
        hidden = batch.replace(x=torch.where(batch.mask, batch.x, 9.0))
        assert torch.equal(m.predict(hidden, **COARSELY), found)
        wide = {k: torch.cat((v, v[:, -1:], v[:, -1:]), 1) for k, v in (("x", batch.x), ("times", batch.times))}
        padded = batch.replace(mask=torch.nn.functional.pad(batch.mask, (0, 0, 0, 2)), **wide)
        torch.testing.assert_close(m.predict(padded, **COARSELY), found, rtol=0, atol=1e-9)
        for i in range(4):
            torch.testing.assert_close(m.predict(batch[i : i + 1], **COARSELY), found[i : i + 1], rtol=0, atol=1e-6)


def test_answers_do_not_depend_on_the_batch_though_training_has_one_clock():
    m, batch = model(controller={"name": "pi", "norm": "batch", "rtol": 1e-3, "atol": 1e-3}), series()
    with torch.no_grad():
        torch.testing.assert_close(m.predict(batch)[1:2], m.predict(batch[1:2]), rtol=0, atol=1e-10)
    assert m.controller.norm == "batch"


def test_without_time_a_linear_control_does_not_mind_how_fast_it_is_walked():
    """Nor does a model that is given no time: where all channels are observed together, values say it all."""
    batch = series()
    batch = batch.replace(mask=batch.mask.any(2))
    warped = batch.replace(times=batch.times.square() + batch.times.exp())
    with torch.no_grad():
        still = model({"name": "linear", "time": False})
        torch.testing.assert_close(still.predict(warped, **EVENLY), still.predict(batch, **EVENLY), rtol=0, atol=1e-12)
        timed = model("linear")
        assert (timed.predict(warped, **EVENLY) - timed.predict(batch, **EVENLY)).abs().max() > 1e-2


def test_units_do_not_matter_after_preparation():
    batch, answers = series(), []
    seconds = batch.replace(times=86_400 * batch.times + 1e6, x=(batch.x * 50 + 7) * batch.mask)
    for units in (batch, seconds):
        m = model({"name": "hermite", "intensity": True})
        m.prepare([units[:2], units[2:]], generator=generator("prepare"))
        with torch.no_grad():
            answers.append(m.predict(units, **EVENLY))
    torch.testing.assert_close(*answers, rtol=0, atol=1e-9)


def test_preparation_measures_what_was_observed():
    batch = series()
    x = batch.x.clone()
    x[:, :, 1] = 3.0
    m = model()
    m.prepare([batch.replace(x=x)[:3], batch.replace(x=x)[3:]], generator=generator("prepare"))
    seen = batch.x[:, :, 0][batch.mask[:, :, 0]]
    torch.testing.assert_close(m.loc, torch.stack((seen.mean(), torch.tensor(3.0).double())))
    torch.testing.assert_close(m.scale[0], seen.std(correction=0))
    assert m.scale[1] == 1 and m.origin == batch.times.min() and m.span == batch.times.max() - batch.times.min()
    torch.testing.assert_close(m.per_count.double(), 4 / batch.mask.double().sum((0, 1)))  # one an item on the whole
    bare = model(standardize=False)
    assert bare.prepare([batch], generator=generator("prepare")) == {} and bare.span == 1


@pytest.mark.parametrize("control", ["rectilinear", "linear"])
def test_answers_at_a_time_know_nothing_of_later_values(control):
    """Rectilinear at any time; linear at observations, with nothing missing."""
    batch = series(channels=1)
    batch = batch.replace(mask=batch.times < torch.inf, times=torch.linspace(0, 2, 9).double().expand(4, -1))
    asked = batch.times[:, 1:5] + (0.1 if control == "rectilinear" else 0.0)
    later = torch.where((torch.arange(9) > 4)[:, None], batch.x + 1, batch.x)
    m = model(control, (4, 3), channels=1)
    with torch.no_grad():
        a, b = (m.predict(batch.replace(x=x, target_times=asked), **COARSELY) for x in (batch.x, later))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- gradients, precision, the dial ------------------------------------------------------------------------------


@pytest.mark.parametrize("control", ["linear", "natural_cubic"])
@pytest.mark.slow_for("natural_cubic")
def test_gradients_reach_values(control):
    m, batch = model(control), series(rows=2, length=5)

    def loss(x: Tensor) -> Tensor:
        return m.predict(batch.replace(x=x), solver=RK4(), controller=Fixed())

    assert torch.autograd.gradcheck(loss, (batch.x.requires_grad_(),))


@pytest.mark.parametrize("control", ["linear", "hermite"])
@pytest.mark.slow_for("hermite")
def test_every_way_of_taking_gradients_agrees(control):
    """Of parameters, and of what the path is made of, with gradients up to 0.5.

    The same steps backwards twice are the same numbers, and steps that are made again from checkpoints differ by the
    rounding of float64. Continuous adjoints solve another equation to the tolerance of 1e-7; where a smooth path is not
    landed on, its second derivative jumps within steps, which costs them nearly three digits.
    """
    adjoint = 1e-7 if control == "linear" else 1e-4
    tolerance = {"backprop": 0.0, "checkpoint": 1e-14, "adjoint": adjoint, "interpolated": adjoint}
    found = {}
    for way in ("backprop", *names(Gradient)):
        m = model(control, gradient=way, controller={"name": "pi", "rtol": 1e-7, "atol": 1e-7})
        batch = series(rows=2, length=5)
        value = m.loss(batch.replace(x=batch.x.requires_grad_())).value.sum()
        parameters = [p for _, p in m.named_parameters()]
        gradients = torch.autograd.grad(value, [batch.x, *parameters])
        reference = found.setdefault("backprop", gradients)
        found[way] = gradients
        for a, b in zip(reference, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance[way])
    assert len(found) > 2


def test_single_precision_is_enough():
    wide, single = model(), model(precision="float32")
    single.load_state_dict(wide.state_dict())
    batch = series()
    narrow = single.predict(batch.replace(x=batch.x.float()), **EVENLY)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide.predict(batch, **EVENLY), rtol=1e-4, atol=1e-4)


def test_steps_trade_accuracy():
    m, batch = model("linear"), series()
    with torch.no_grad():
        exact = m.predict(batch, controller=PI(rtol=1e-10, atol=1e-10))
        errors = [(m.predict(batch, solver=RK4(), controller=Fixed(k)) - exact).abs().max() for k in (1, 4)]
    assert errors[1] < errors[0] / 50  # order 4, short of its limit


def test_losses_are_those_of_their_targets():
    batch, evenly = series(), {"solver": "rk4", "controller": "fixed"}
    m = model(**evenly)
    value = m.loss(batch).value
    log_p = m.predict(batch).log_softmax(1)
    torch.testing.assert_close(value, -log_p[torch.arange(4), batch.target], rtol=0, atol=1e-12)
    asked = {"target_times": batch.times[:, :3], "target": torch.full((4, 3, 2), torch.nan).double()}
    asked["target"][:, 1] = 2.0
    mask = torch.tensor([False, True, False]).expand(4, 3)
    m = model(target=(3, 2), **evenly)
    value = m.loss(batch.replace(target_mask=mask, **asked)).value
    predicted = m.predict(batch.replace(**asked))[:, 1]
    torch.testing.assert_close(value, (predicted - 2).square().mean(1), rtol=0, atol=1e-12)
    value.sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_the_head_starts_smaller():
    full, small = model(), model(head_scale=0.01)
    torch.testing.assert_close(small.field.head.weight, 0.01 * full.field.head.weight)
    moved = [(m.predict(series(), **EVENLY) - m.readout(m._initial(_first(m)))).abs().max() for m in (full, small)]
    assert moved[1] < 0.05 * moved[0]


def _first(m: NeuralCDE) -> Tensor:
    batch = series()
    path = m.control.path(batch.times, batch.x, batch.mask)
    return path.value(path.knots[:, 0])


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "facts", "message"),
    [
        ({}, {"shape": (8,), "target_shape": (2,)}, r"items of shape \[8\]"),
        ({}, {"shape": (8, 2), "target_shape": None}, "targets of shape None"),
        ({"head_scale": 0.0}, {"shape": (8, 2), "target_shape": (2,)}, "found 0.0"),
        ({"field": "dit", "head_scale": 0.5}, {"shape": (8, 2), "target_shape": (2,)}, "dit"),
    ],
)
def test_models_that_cannot_be_are_refused(arguments, facts, message):
    node = {"name": "neural_cde", "field": {"name": "mlp", "hidden": [8]}, "hidden": 4, **arguments}
    with pytest.raises(ConfigError, match=message):
        build(Model, node, **facts)


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ((2,), {"times": None}, "no times"),
        ((2,), {"x": torch.zeros(4, 9, 3)}, r"built for series x \[B, L, 2\]"),
        ((2,), {"target": None}, "without targets"),
        ((2,), {"mask": torch.ones(4, 3, dtype=torch.bool)}, r"mask has shape \[4, 3\]"),
        ((3, 2), {}, "no target_times"),
        (
            (3, 2),
            {"target": torch.zeros(4, 3), "target_times": torch.linspace(0, 1, 3).expand(4, 3)},
            r"target has shape \[4, 3\], but target_times ask for \[4, 3, 2\]",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(target, change, message):
    with pytest.raises(ValueError, match=message):
        model(target=target).loss(series().replace(**change))


def test_solvers_with_loops_of_their_own_cannot_land():
    class Whole(RK4):
        """A back-end."""

        def solve(self, problem, controller):
            return controller.solve(problem)

    with pytest.raises(ConfigError, match="loop of its own"):
        model("linear").predict(series(), solver=Whole(), controller=Fixed())
    smooth = model("hermite", land="never").predict(series(), solver=Whole(), controller=Fixed(40))
    assert smooth.isfinite().all()


def test_step_control_tells_an_implicit_solver_its_tolerances_through_the_landings():
    """Stages are solved to a share of the tolerance, not to rounding, which takes about twice the evaluations."""
    x = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    times = torch.tensor([0.2, 0.8], dtype=torch.float64)  # nowhere to land
    found = [
        integrate(lambda t, x: -x - x**3, x, times, solver=solver, controller=PI(1e-4, 1e-4))
        for solver in (Kvaerno3(), Landing(Kvaerno3()))
    ]
    torch.testing.assert_close(found[1].x, found[0].x, rtol=0, atol=0)
