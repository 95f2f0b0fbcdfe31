"""Runge-Kutta methods and step control against numbers recorded from an independent implementation in float64.

Single steps with their error and stiffness, orders, and the costs of whole adaptive solves. The controllers of the
record are the elementary one, exponents (1, 0), and the smoother (0.7, 0.4), with safety 0.9 and factors in [0.2, 10].
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from genmodels.registry import build
from genmodels.solvers.base import Fixed, Solver, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.runge_kutta import Dopri5, Dopri8, Tsit5
from genmodels.solvers.solution import Record
from genmodels.solvers.step_size import PI

SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64)
START = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
ONE = torch.ones(1, 1, dtype=torch.float64)
UNIT = torch.tensor([0.0, 1.0], dtype=torch.float64)
ELEMENTARY, SMOOTH = (1.0, 0.0), (0.7, 0.4)
Pair = tuple[float, float]


def spiral(t: Tensor, x: Tensor) -> Tensor:
    return x @ SPIRAL.T


def van_der_pol(mu: float):
    return lambda t, x: torch.stack((x[:, 1], mu * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0]), 1)


def automatic(field, x: Tensor, norm) -> float:
    """Hairer's choice of a first step, of a method of order 5 from t = 0."""
    zero = torch.zeros((), dtype=torch.float64)
    slope = field(zero, x)
    d0, d1 = norm(x, x, x), norm(slope, x, x)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    d2 = norm(field(zero + h0, x + h0 * slope) - slope, x, x) / h0
    return min(100 * h0, (0.01 / max(d1, d2)) ** 0.2)


class Recorded(NamedTuple):
    """What the record says of a solve."""

    x: Tensor
    nfe: int
    steps: int
    rejected: int
    h: Tensor
    error: Tensor
    stiffness: Tensor


def recorded(name: str, field, x: Tensor, end: float, tolerance: Pair, exponents: tuple[float, float]) -> Recorded:
    """The loop of the record. Unlike ours, its elementary controller (q = 0) never shortens a step after one that was
    accepted, so that where stability limits the steps every fifth of them fails."""
    (rtol, atol), solver, (p, q) = tolerance, build(Solver, name), (e / 5 for e in exponents)
    norm = lambda v, a, b: float((v / (atol + rtol * torch.maximum(a.abs(), b.abs()))).square().mean().sqrt())  # noqa: E731
    t, calls, previous, rejected, taken = 0.0, 2, 1e-4, 0, []
    state = solver.start(field, 0 * UNIT[0], x)
    h = automatic(field, x, norm)
    while t < end:
        h = min(h, end - t)
        s = t + h if end - t - h > 1e-12 else end
        times = torch.tensor([t, s], dtype=torch.float64)
        step = solver.step(field, *times, x, state, None)
        calls, error = calls + 6, norm(step.error, x, step.x)
        if error > 1:
            h, rejected = h * max(0.2, 0.9 * error**-p), rejected + 1
            continue
        taken.append((h, error, float(solver.stiffness(*times, x, step))))
        h *= min(max(0.9 * error**-p * previous**q, 0.2 if q else 1.0), 10.0)
        t, x, state, previous = s, step.x, step.state, max(error, 1e-4)
    return Recorded(x, calls, len(taken), rejected, *torch.tensor(taken, dtype=torch.float64).T)


# field, start, h; then for Tsit5 and Dopri5 the state, the size of the error and the stiffness after one step from 0
STEPS = {
    "decay 0.5": (
        (lambda t, x: -x, ONE, 0.5),
        ([0.606532794968617], [1.5933689704e-05], 1.0),
        ([0.606536458333333], [3.0664062500e-05], 1.0),
    ),
    "decay 0.1": (
        (lambda t, x: -x, ONE, 0.1),
        ([0.904837418098878], [4.4228870e-09], 1.0),
        ([0.904837418333333], [8.4125e-09], 1.0),
    ),
    "cosine": (
        (lambda t, x: x * t.cos(), ONE, 0.5),
        ([1.615147604775615], [6.1372586856e-06], 0.8775825619),
        ([1.615150906365754], [1.5500064002e-05], 0.8775825619),
    ),
    "spiral": (
        (spiral, START, 0.1),
        ([1.94062949769938, -0.39338507896105], [4.8487796139e-08, 2.7154204196e-07], 2.002498439450),
        ([1.94062946881167, -0.39338507003293], [8.8274255318e-08, 5.1578134478e-07], 2.002498439450),
    ),
    "van der Pol": (
        (van_der_pol(2.0), START, 0.1),
        ([1.991733569885, -0.150388099879], None, 5.99078079),
        ([1.991732966435, -0.150388644499], None, 5.99021645),
    ),
}


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("method", [0, 1], ids=["tsit5", "dopri5"])
def test_single_steps(case, method):
    (field, x, h), *records = STEPS[case]
    state, error, stiffness = records[method]
    solver, (t, s) = (Tsit5(), Dopri5())[method], h * UNIT
    step = solver.step(field, t, s, x, solver.start(field, t, x), None)
    assert step.x[0].tolist() == pytest.approx(state, abs=6e-13)  # the record has 12 to 15 digits
    if error:
        assert step.error[0].abs().tolist() == pytest.approx(error, rel=1e-7)
    assert solver.stiffness(t, s, x, step).item() == pytest.approx(stiffness, rel=2e-9)


@pytest.mark.parametrize(("name", "scaled"), [("tsit5", 0.1382736569), ("dopri5", 0.2625713149)])
def test_scaled_error_of_a_step(name, scaled):
    trace = integrate(
        spiral, START, 0.1 * UNIT, solver=build(Solver, name), controller=Fixed(), record=Record(1e-6, 1e-6)
    ).trace
    assert trace.error.item() == pytest.approx(scaled, rel=1e-8)


@pytest.mark.parametrize("name", ["tsit5", "dopri5"])
@pytest.mark.parametrize(("z", "accuracy"), [(1.0, 1e-12), (0.1, 1e-12), (0.05, 8e-12), (0.01, 8e-10), (0.001, 6e-7)])
def test_stiffness_of_decay_is_its_rate(name, z, accuracy):
    """S = λ; the difference of the last two slopes cancels in short steps. Twice the recorded accuracies."""
    solver = build(Solver, name)
    for rate in (1.0, 2.0, 50.0, 1000.0):
        t, s = z / rate * UNIT
        field = lambda t, x, rate=rate: -rate * x  # noqa: E731
        step = solver.step(field, t, s, ONE, solver.start(field, t, ONE), None)
        assert solver.stiffness(t, s, ONE, step).item() == pytest.approx(rate, rel=accuracy)


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        ("tsit5", [1.906e-06, 3.103e-08, 6.341e-10, 1.529e-11, 4.12e-13, 1.2e-14]),
        ("dopri5", [5.175e-06, None, None, None, None, 7.19e-14]),
    ],
)
def test_errors_on_grids_and_their_order(name, errors):
    found = []
    for steps, error in zip((4, 8, 16, 32, 64, 128), errors, strict=True):
        out = integrate(lambda t, x: -x, ONE, 2 * UNIT, solver=build(Solver, name), controller=Fixed(steps))
        found.append(abs(out.x.item() - math.exp(-2)))
        if error:
            assert found[-1] == pytest.approx(error, rel=5e-4, abs=2e-15)
    assert 4.9 < math.log2(found[2] / found[3]) < 5.5


@pytest.mark.parametrize(("name", "error"), [("tsit5", 1.50e-09), ("dopri5", 7.35e-09)])
def test_error_on_the_spiral(name, error):
    out = integrate(spiral, START, 5 * UNIT, solver=build(Solver, name), controller=Fixed(128))
    exact = START @ torch.linalg.matrix_exp(5 * SPIRAL).T
    assert (out.x - exact).abs().max().item() == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "exponents", "counts", "error", "squared"),
    [
        ("tsit5", ELEMENTARY, (218, 35, 1), 3.39338205, 15.894200),
        ("tsit5", SMOOTH, (302, 50, 0), 0.70955499, 1.017421),
        ("dopri5", ELEMENTARY, (242, 39, 1), 3.38932668, 18.418953),
        ("dopri5", SMOOTH, (332, 55, 0), 0.72990366, 1.206471),
    ],
)
def test_adaptive_solves_of_the_spiral(name, exponents, counts, error, squared):
    out = recorded(name, spiral, START, 5.0, (1e-6, 1e-6), exponents)
    assert (out.nfe, out.steps, out.rejected) == counts
    assert out.h[0].item() == pytest.approx(0.0204022911, abs=1e-10)
    assert (out.error * out.h).sum().item() == pytest.approx(error, rel=1e-7)
    assert out.error.square().sum().item() == pytest.approx(squared, rel=1e-6)
    assert 2.00247 < out.stiffness.min() and out.stiffness.max() < 2.0024985
    control = PI(1e-6, 1e-6, exponents=exponents)
    ours = integrate(spiral, START, 5 * UNIT, solver=build(Solver, name), controller=control, record=Record())
    assert ours.nfe.item() <= out.nfe
    if exponents == SMOOTH:
        assert (ours.nfe.item(), ours.steps.item(), ours.rejected.item()) == counts
        torch.testing.assert_close(ours.trace.error[:, 0], out.error, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "exponents", "rate", "end", "counts"),
    [
        ("tsit5", ELEMENTARY, 1.0, 10.0, (122, 20)),
        ("tsit5", SMOOTH, 1.0, 10.0, (188, 31)),
        ("dopri5", ELEMENTARY, 1.0, 10.0, (134, 22)),
        ("dopri5", SMOOTH, 1.0, 10.0, (206, 34)),
        ("dopri5", (0.85, 0.2), 1.0, 10.0, (152, 25)),
        ("dopri5", ELEMENTARY, 1000.0, 1.0, (2378, 322)),
        ("dopri5", SMOOTH, 1000.0, 1.0, (2006, 332)),
        ("tsit5", ELEMENTARY, 1000.0, 1.0, (2282, None)),
        ("tsit5", SMOOTH, 1000.0, 1.0, (1880, None)),
    ],
)
def test_adaptive_solves_of_decay(name, exponents, rate, end, counts):
    field = lambda t, x: -rate * x  # noqa: E731
    out = recorded(name, field, ONE, end, (1e-6, 1e-6), exponents)
    assert out.nfe == counts[0] and counts[1] in (None, out.steps)
    control = PI(1e-6, 1e-6, exponents=exponents)
    assert integrate(field, ONE, end * UNIT, solver=build(Solver, name), controller=control).nfe.item() <= out.nfe
    if rate > 1:  # stability, not accuracy, limits the steps: h S hovers at the stability size of the method
        product = (out.h * out.stiffness)[out.steps // 2 :].mean().item()
        hovering = {"dopri5": (3.2976, 3.2925), "tsit5": (3.5031, 3.5035)}[name][exponents == SMOOTH]
        assert product == pytest.approx(hovering, abs=1e-4)


LOOSE, TIGHT, TIGHTEST = (1e-3, 1e-6), (1e-6, 1e-6), (1e-8, 1e-8)
# evaluations: of Dopri5 and Tsit5 under both controllers; of torchdiffeq's dopri5; of SciPy's RK45
VAN_DER_POL = {
    (1.0, LOOSE): ((236, 218, 242, 200), 236, 218),
    (1.0, TIGHT): ((584, 566, 548, 536), 560, 572),
    (1.0, TIGHTEST): ((1250, 1280, 1148, 1256), 1166, 1106),
    (5.0, LOOSE): ((350, 398, 314, 356), 344, 332),
    (5.0, TIGHT): ((734, 848, 650, 746), 680, 704),
    (5.0, TIGHTEST): ((1610, 1910, 1436, 1682), 1466, 1526),
    (10.0, LOOSE): ((500, 560, 530, 500), 512, 518),
    (10.0, TIGHT): ((884, 1016, 830, 902), 848, 860),
    (10.0, TIGHTEST): ((1904, 2246, 1700, 1970), 1772, 1826),
    (50.0, LOOSE): ((3116, 2546, 2990, 2402), 3104, 2786),
    (50.0, TIGHT): ((3134, 2564, 3008, 2414), 3128, 2864),
    (50.0, TIGHTEST): ((3194, 2720, 3080, 2534), 3182, 3092),
}
ENDS = {
    1.0: (-2.008340783, 0.032907066),
    5.0: (-1.158701266, 0.430469809),
    10.0: (-1.971206957, 0.068173232),
    50.0: (1.858320944, -0.015147385),
}


FAST = [(mu, tolerance) for mu, tolerance in VAN_DER_POL if mu <= 5 and tolerance != TIGHTEST]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in VAN_DER_POL if case not in FAST]


@pytest.mark.parametrize(("mu", "tolerance"), [*FAST, *SLOW])
def test_adaptive_solves_of_van_der_pol(mu, tolerance):
    counts, theirs, _ = VAN_DER_POL[mu, tolerance]
    settings = [(name, exponents) for name in ("dopri5", "tsit5") for exponents in (ELEMENTARY, SMOOTH)]
    for (name, exponents), evaluations in zip(settings, counts, strict=True):
        assert recorded(name, van_der_pol(mu), START, 10.0, tolerance, exponents).nfe == evaluations
    ours = integrate(van_der_pol(mu), START, 10 * UNIT, solver=Tsit5(), controller=PI(*tolerance))
    assert ours.nfe.item() <= theirs, "no more than torchdiffeq's dopri5 at these tolerances"
    exact = torch.tensor(ENDS[mu], dtype=torch.float64)
    assert (ours.x[0] - exact).abs().max().item() < 100 * tolerance[0]


@pytest.mark.parametrize(("mu", "tolerance"), [*FAST, *SLOW])
def test_recorded_costs_of_other_libraries(mu, tolerance):
    """That what is compared with is the libraries, not a transcript of them."""
    scipy = pytest.importorskip("scipy.integrate")
    torchdiffeq = pytest.importorskip("torchdiffeq")
    _, theirs, fortys = VAN_DER_POL[mu, tolerance]
    rtol, atol = tolerance
    calls = []

    def counted(t: Tensor, x: Tensor) -> Tensor:
        calls.append(t)
        return van_der_pol(mu)(t, x)

    torchdiffeq.odeint(counted, START, 10 * UNIT, method="dopri5", rtol=rtol, atol=atol)
    assert len(calls) == theirs
    flat = lambda t, y: [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]]  # noqa: E731
    assert scipy.solve_ivp(flat, (0, 10), [2, 0], method="RK45", rtol=rtol, atol=atol).nfev == fortys


@pytest.mark.parametrize(
    ("name", "error", "product"),
    [("tsit5", 6.2019104765e-05, 1.2653318276e-06), ("dopri5", 1.1759678918e-04, 2.3992439e-06)],
)
def test_a_fresh_step_of_the_spiral(name, error, product):
    out = integrate(spiral, START, 5 * UNIT, solver=build(Solver, name), controller=PI(1e-6, 1e-6), record=Record())
    assert out.trace.h[0].item() == pytest.approx(0.020402291074, rel=1e-10)
    assert out.trace.error[0].item() == pytest.approx(error, rel=1e-6)
    assert (out.trace.error[0] * out.trace.h[0]).item() == pytest.approx(product, rel=1e-6)


@pytest.mark.parametrize(("tolerance", "error"), [(1e-4, 0.062), (1e-6, 4.4e-4)])
def test_a_batch_does_not_hide_its_hardest_sample(tolerance, error):
    """256 oscillators x'' = -w² x, the first with w = 20, the others with 0.1."""
    w = torch.full((256, 1), 0.1, dtype=torch.float64)
    w[0] = 20.0
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(256, 2).contiguous()
    field = RowField(lambda t, x, w: torch.cat((x[:, 1:], -w.square() * x[:, :1]), 1), w)
    exact = torch.tensor([math.cos(100.0), -20 * math.sin(100.0)], dtype=torch.float64)
    settings = {"rtol": tolerance, "atol": tolerance, "exponents": ELEMENTARY}
    out = integrate(field, x, 5 * UNIT, solver=Dopri5(), controller=PI(**settings))
    hidden = integrate(field, x, 5 * UNIT, solver=Dopri5(), controller=PI(**settings, norm="batch"))
    assert (out.x[0] - exact).norm().item() == pytest.approx(error, rel=0.02)
    assert (hidden.x[0] - exact).norm() > 15 * (out.x[0] - exact).norm()
    if tolerance == 1e-4:
        assert (out.steps[0].item(), out.rejected[0].item(), out.steps[1:].max().item()) == (162, 31, 3)
    alone = integrate(field.select(torch.tensor([0])), x[:1], 5 * UNIT, solver=Dopri5(), controller=PI(**settings))
    torch.testing.assert_close(alone.x[0], out.x[0], rtol=0, atol=5e-13)


@pytest.mark.parametrize(("mu", "tolerance"), [(1.0, 1e-9), (10.0, 1e-6)])
def test_dopri8_has_their_tableau_and_costs_about_what_others_of_its_order_do(mu, tolerance):
    torchdiffeq, scipy = pytest.importorskip("torchdiffeq"), pytest.importorskip("scipy.integrate")
    from torchdiffeq._impl.dopri8 import _DOPRI8_TABLEAU as THEIRS

    for mine, row in zip(Dopri8.tableau.matrix[1:], THEIRS.beta, strict=True):
        torch.testing.assert_close(torch.tensor(mine, dtype=torch.float64), row.double(), rtol=1e-15, atol=0)
    error = torch.tensor(Dopri8.tableau.error_weights, dtype=torch.float64)
    torch.testing.assert_close(error, THEIRS.c_error.double(), rtol=1e-14, atol=1e-16)
    calls = []

    def counted(t: Tensor, x: Tensor) -> Tensor:
        calls.append(t)
        return van_der_pol(mu)(t, x)

    theirs = torchdiffeq.odeint(counted, START, 10 * UNIT, method="dopri8", rtol=tolerance, atol=tolerance)[-1]
    flat = lambda t, y: [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]]  # noqa: E731
    dop853 = scipy.solve_ivp(flat, (0, 10), [2, 0], method="DOP853", rtol=tolerance, atol=tolerance)
    exact = scipy.solve_ivp(flat, (0, 10), [2, 0], method="DOP853", rtol=1e-13, atol=1e-14).y[:, -1]
    ours = integrate(van_der_pol(mu), START, 10 * UNIT, solver=Dopri8(), controller=PI(tolerance, tolerance))
    assert ours.nfe.item() < 1.05 * len(calls) and ours.nfe.item() < 1.25 * dop853.nfev
    gaps = [abs(x[0].numpy() - exact).max() for x in (ours.x, theirs)]
    assert gaps[0] < max(tolerance, gaps[1])
