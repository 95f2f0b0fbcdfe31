"""What regularizers have in common: schedules, ways of differentiating, combinations and refusals."""

import functools
import math

import pytest
import torch

from genmodels.dynamics.regularization import Regularizer, evolve
from genmodels.dynamics.solver_heuristics import ErrorEstimate, Local, Stiffness
from genmodels.dynamics.trajectories import KineticJacobian, Steer, Taylor
from genmodels.registry import ConfigError, build, names
from genmodels.rng import BatchNoise, generator
from genmodels.solvers.base import Fixed, Gradient
from genmodels.solvers.runge_kutta import RK4, Bosh3, Tsit5
from genmodels.solvers.step_size import PI
from genmodels.solvers.stochastic import SOSRI2
from tests.linear_fields import SPIRAL, START, TIGHT, Linear, line, penalty


@pytest.mark.parametrize(
    ("coefficient", "end", "expected"),
    [
        (100.0, 10.0, (100, 100 * 10**-0.25, 10)),
        (0.1, 5.0, (0.1, 0.1 * 50**0.25, 5)),
        (3.0, None, (3, 3, 3)),
        (2.0, 0.0, (2, 1.5, 0)),
        (0.0, 2.0, (0, 0.5, 2)),
        (0.0, 0.0, (0, 0, 0)),
    ],
)
def test_coefficients_anneal_and_grow_with_the_progress_of_training(coefficient, end, expected):
    regularizer = ErrorEstimate(coefficient, end)
    assert [regularizer.weight(p) for p in (0.0, 0.25, 1.0)] == pytest.approx(expected, rel=1e-12)
    field, options = Linear(SPIRAL), {"solver": Tsit5(), "controller": PI(), "noise": BatchNoise(1)}
    whole = evolve(field, START, line(0, 1), regularizers=(regularizer,), progress=0.25, **options)
    torch.testing.assert_close(whole.penalty[0], expected[1] * whole.logs["error_estimate"], rtol=1e-12, atol=0)


EVERY = [
    ErrorEstimate(3.0),
    Stiffness(2.0, aggregation="mean"),
    Local(5.0, samples=2),
    Local(4.0, pick="step", quantity="steps"),
    KineticJacobian(0.3),
    Taylor(0.2),
]


def gradient_of(regularizers, gradient, seed, norm="row", tolerance=1e-5):
    field = Linear(SPIRAL, squashed=True)
    x = torch.randn(4, 2, generator=generator("start")).double()
    noise = BatchNoise(4, generator=generator("noise", seed))
    evolved = evolve(
        field,
        x,
        line(0, 1.5),
        solver=Tsit5(),
        controller=PI(rtol=tolerance, atol=tolerance, norm=norm),
        gradient=gradient,
        regularizers=regularizers,
        noise=noise,
    )
    evolved.penalty.sum().backward()
    return evolved.penalty.detach(), field.matrix.grad


@pytest.mark.parametrize("norm", ["row", "batch"])
@pytest.mark.parametrize("regularizer", EVERY, ids=lambda r: r.registered_name)
def test_checkpointing_gives_the_gradient_of_backpropagation(regularizer, norm):
    if "checkpoint" not in names(Gradient):
        pytest.skip("there is no gradient 'checkpoint'")
    one, two = (gradient_of((regularizer,), build(Gradient, g), 0, norm) for g in ("backprop", "checkpoint"))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gradient", names(Gradient))
@pytest.mark.parametrize("form", ["own_step", "reference"])
@pytest.mark.parametrize("pick", ["time", "step"])
def test_local_gradient_does_not_depend_on_how_the_solve_is_differentiated(gradient, form, pick):
    regularizers = (Local(form=form, pick=pick, samples=2),)
    one, two = (gradient_of(regularizers, build(Gradient, g), 1) for g in ("backprop", gradient))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


@functools.cache
def integrals_by(gradient):
    return gradient_of((KineticJacobian(1.0), Taylor(1.0)), build(Gradient, gradient), 1, tolerance=1e-8)


@pytest.mark.parametrize("gradient", [name for name in names(Gradient) if name != "backprop"])
@pytest.mark.slow_for("adjoint")
def test_integrals_can_be_differentiated_in_every_way(gradient):
    """Those of the equation and of its steps agree in the limit of small steps."""
    one, two = integrals_by("backprop"), integrals_by(gradient)
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_a_penalty_alone_is_solved_without_graph():
    """The gradient is the same where the solution is not wanted, and the solution has none."""
    field, noise = Linear(SPIRAL), BatchNoise(1, generator=generator("alone"))
    options = {"solver": Tsit5(), "controller": PI(), "noise": noise}
    local = evolve(field, START, line(0, 1), gradient=None, regularizers=(Local(),), **options)
    assert not local.solution.x.requires_grad and local.penalty.requires_grad
    one, two = (gradient_of((Local(), ErrorEstimate()), g, 2) for g in (build(Gradient, "backprop"), None))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)


def test_penalties_add_up_and_are_logged():
    regularizers = (
        ErrorEstimate(3.0),
        Stiffness(2.0),
        Local(5.0),
        Local(7.0, samples=3),
        KineticJacobian(1.0),
        Steer(),
    )
    field, x = Linear(SPIRAL).float(), START.float().expand(6, 2)
    noise = BatchNoise(6, generator=generator("sum"))
    evolved = evolve(field, x, line(0, 1), solver=Tsit5(), controller=PI(), regularizers=regularizers, noise=noise)
    assert set(evolved.logs) == {"nfe", "error_estimate", "stiffness", "local", "kinetic_jacobian"}
    assert evolved.penalty.shape == (6,) and evolved.penalty.dtype == torch.float32
    assert not any(value.requires_grad for value in evolved.logs.values())
    assert 0 < float(evolved.solution.time[0]) <= 1.5 and evolved.solution.time[0] != 1


def test_evaluation_records_nothing():
    evolved = evolve(Linear(SPIRAL), START, line(0, 1), solver=Tsit5(), controller=PI())
    assert torch.equal(evolved.penalty, torch.zeros(1, dtype=torch.float64))
    assert evolved.solution.trace is None and evolved.solution.picked is None and set(evolved.logs) == {"nfe"}


def test_rows_with_times_of_their_own_are_charged_for_their_own_steps():
    """A row that ends early has the value that it has by itself; one without any interval has 0."""
    field, x = Linear(SPIRAL, squashed=True), START.expand(3, 2)
    times = torch.tensor([[0.0, 1, 2], [0.0, 0.7, 0.7], [0.5, 0.5, 0.5]], dtype=torch.float64).T
    for regularizer in (ErrorEstimate(), Stiffness(), Taylor()):
        found = penalty(regularizer, field, x, times)
        alone = [penalty(regularizer, field, START, line(*grid)) for grid in ((0, 1, 2), (0, 0.7))]
        torch.testing.assert_close(found[:2], torch.cat(alone), rtol=1e-9, atol=0)
        assert found[2] == 0
    for regularizer in (
        Local(),
        Local(pick="step"),
        Local(mean="steps"),
        Local(pick="step", mean="time"),
        Local(form="reference"),
    ):
        found = penalty(regularizer, field, x, times)
        assert found.isfinite().all() and found[2] == 0 and (found[:2] > 0).all()


def test_a_regularizer_of_ones_own_is_one_method():
    class EndNearZero(Regularizer):
        """|x(T)|²."""

        def value(self, solve):
            return solve.solution.x.square().sum(1)

    options = {"solver": Tsit5(), "controller": TIGHT, "noise": BatchNoise(1)}
    evolved = evolve(Linear(SPIRAL), START, line(0, 1.5), regularizers=(EndNearZero(0.5),), **options)
    torch.testing.assert_close(evolved.penalty[0].detach(), line(0.5 * 4 * math.exp(-0.3))[0], rtol=1e-7, atol=0)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ErrorEstimate(-1.0), "error_estimate.coefficient: a finite number of at least 0 .* -1.0"),
        (lambda: Local(1.0, float("inf")), "local.end: a finite number"),
        (lambda: ErrorEstimate(rtol=1e-3), "given together or not at all, found rtol=0.001, atol=None"),
        (lambda: Local(rtol=1e-3, atol=0.0), "atol > 0 are given together"),
        (lambda: Local(samples=0), "local.samples: at least 1 is needed, found 0"),
        (lambda: KineticJacobian(kinetic=-1.0), "weights of at least 0"),
        (lambda: KineticJacobian(kinetic=0.0, jacobian=0.0), "not both 0"),
        (lambda: Taylor(order=0), "taylor.order: at least 1 is needed, found 0"),
        (lambda: Steer(0.6), "steer.width: a number above 0 and at most 0.5 is needed, found 0.6"),
    ],
)
def test_arguments_out_of_range_are_named(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    ("regularizers", "options", "match"),
    [
        ((ErrorEstimate(),), {"noise": None}, "'error_estimate' may draw: pass noise"),
        ((Steer(),), {"solver": SOSRI2()}, "'steer' moves the times of an ODE, and solver 'sosri2' solves for a SDE"),
        ((ErrorEstimate(),), {"solver": RK4(), "controller": Fixed(9)}, "needs an error estimate, .*'rk4'.*tsit5"),
        ((Local(),), {"solver": RK4(), "controller": Fixed(9)}, "'local' needs an error estimate"),
        ((Stiffness(),), {"solver": Bosh3()}, "'stiffness' needs a stiffness estimate.*'bosh3'"),
        ((Local(quantity="stiffness"),), {"solver": Bosh3()}, "'local' needs a stiffness estimate.*'bosh3'"),
        ((Local(form="reference"),), {"controller": Fixed(9)}, "'reference' chooses a step by tolerances.*'fixed'"),
        ((Local(), Local(pick="step")), {}, "recorded in one way.*picks by .'step', 'time'"),
        ((ErrorEstimate(rtol=1e-3, atol=1e-3), ErrorEstimate(rtol=1e-2, atol=1e-2)), {}, "recorded in one way.*rtol"),
        ((ErrorEstimate(), ErrorEstimate(rtol=1e-2, atol=1e-2)), {}, "rtol=None.*rtol=0.01.*Give both the same"),
    ],
)
def test_what_does_not_go_together_is_refused(regularizers, options, match):
    options = {"solver": Tsit5(), "controller": PI(), "noise": BatchNoise(1), **options}
    with pytest.raises(ConfigError, match=match):
        evolve(Linear(SPIRAL), START, line(0, 1), regularizers=regularizers, **options)


@pytest.mark.parametrize("gradient", [g for g in names(Gradient) if not build(Gradient, g).differentiates_trace])
@pytest.mark.parametrize("regularizer", [ErrorEstimate(), Stiffness()], ids=["error_estimate", "stiffness"])
def test_global_forms_refuse_gradients_that_keep_no_steps(regularizer, gradient):
    with pytest.raises(ConfigError, match=f"'{gradient}' does not keep. Use gradient 'backprop' or 'checkpoint'"):
        gradient_of((regularizer,), build(Gradient, gradient), 0)
