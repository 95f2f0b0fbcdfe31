"""Our control paths and their equations against torchcde, in double precision, with values missing."""

import pytest
import torch
from torch import Tensor

from genmodels.registry import build
from genmodels.rng import generator
from genmodels.solvers.base import Fixed, integrate
from genmodels.solvers.fields import RowField
from genmodels.solvers.landing import Landing
from genmodels.solvers.paths import Control, Rectilinear
from genmodels.solvers.runge_kutta import RK4

torchcde = pytest.importorskip("torchcde")


def series(gaps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Three walks of two channels at shared irregular times, whose first and last are observed somewhere."""
    g = generator("torchcde", int(100 * gaps))
    times = torch.rand(8, generator=g, dtype=torch.float64).cumsum(0)
    x = torch.randn(3, 8, 2, generator=g, dtype=torch.float64).cumsum(1)
    mask = torch.rand(3, 8, 2, generator=g) >= gaps
    mask[:, 0, 0] = mask[:, -1, 1] = True
    return times, x, mask


def theirs(name: str, times: Tensor, x: Tensor) -> object:
    if name == "linear":
        return torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x, times), times)
    if name == "hermite":
        coefficients = torchcde.hermite_cubic_coefficients_with_backward_differences(x, times)
    else:
        # natural_cubic_coeffs also bends at the times of other channels before the first value and after the last
        coefficients = torchcde.natural_cubic_spline_coeffs(x, times)
    return torchcde.CubicSpline(coefficients, times)


def compare(ours: object, other: object, times: Tensor, rows: slice, channels: slice) -> None:
    inner = torch.linspace(float(times[0]), float(times[-1]), 41, dtype=torch.float64)
    for t in torch.cat((inner, times)):
        for f in ("value", "derivative"):
            mine = getattr(ours, f)(t)[rows, channels]
            yours = (other.evaluate if f == "value" else other.derivative)(t)
            torch.testing.assert_close(mine, yours, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gaps", [0.0, 0.5])
@pytest.mark.parametrize("name", ["linear", "natural_cubic"])
def test_paths_with_gaps_are_torchcde_s(name, gaps):
    times, x, mask = series(gaps)
    mask = mask | (mask.any(2, keepdim=True) == 0) & torch.tensor([True, False])  # theirs have a knot at every time
    ours = build(Control, {"name": name, "time": False}).path(times.expand(3, -1), x, mask)
    compare(ours, theirs(name, times, torch.where(mask, x, torch.nan)), times, slice(None), slice(None))


@pytest.mark.parametrize("gaps", [0.0, 0.5])
def test_hermite_paths_are_torchcde_s_over_the_knots_of_each_channel(gaps):
    """Theirs fill gaps on a line first and then bend it at times at which other channels alone were observed."""
    times, x, mask = series(gaps)
    ours = build(Control, {"name": "hermite", "time": False}).path(times.expand(3, -1), x, mask)
    for b in range(3):
        for c in range(2):
            seen = mask[b, :, c].clone()
            own = torch.where(seen, x[b, :, c], torch.nan)
            seen[0] = seen[-1] = True  # a channel begins and ends with its row: their fill of the ends
            filled = torchcde.linear_interpolation_coeffs(own[:, None], times)[seen]
            compare(ours, theirs("hermite", times[seen], filled), times, b, slice(c, c + 1))


def test_rectilinear_knots_are_torchcde_s():
    times, x, mask = series(0.5)
    mask[:, 0] = True
    path = Rectilinear().path(times.expand(3, -1), x, mask | ~mask.any(2, keepdim=True))
    raw = torch.where(mask | ~mask.any(2, keepdim=True), x, torch.nan)
    raw = torch.cat((times[None, :, None].expand(3, -1, 1), raw), 2)
    knots = torchcde.linear_interpolation_coeffs(raw, rectilinear=0)
    ours = torch.stack([path.value(s) for s in path.knots[0]], 1)
    torch.testing.assert_close(ours, knots, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hermite", "natural_cubic"])
def test_solutions_are_cdeint_s(name):
    times, x, _ = series(0.0)
    weight = torch.randn(4, 2, 4, generator=generator("field"), dtype=torch.float64)
    z0 = torch.randn(3, 4, generator=generator("z0"), dtype=torch.float64)
    path = build(Control, {"name": name, "time": False}).path(times.expand(3, -1), x)

    def columns(z: Tensor) -> Tensor:
        return torch.einsum("hcj,bj->bhc", weight, z).tanh()

    class Field(torch.nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return columns(z)

    ends = times[[0, -1]]
    reference = torchcde.cdeint(theirs(name, times, x), Field(), z0, ends, adjoint=False, rtol=1e-9, atol=1e-11)[:, -1]
    field = RowField(lambda t, z, p: torch.einsum("bhc,bc->bh", columns(z), p.derivative(t)), path)
    found = integrate(field, z0, times, solver=RK4(), controller=Fixed(64)).x
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-6)


def test_linear_controls_land_where_torchcde_jumps():
    times, x, _ = series(0.0)
    weight = torch.randn(4, 2, 4, generator=generator("field"), dtype=torch.float64)
    z0 = torch.randn(3, 4, generator=generator("z0"), dtype=torch.float64)

    class Field(torch.nn.Module):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return torch.einsum("hcj,bj->bhc", weight, z).tanh()

    control, ends = theirs("linear", times, x), times[[0, -1]]
    options = {"jump_t": control.grid_points}
    reference = torchcde.cdeint(control, Field(), z0, ends, adjoint=False, rtol=1e-9, atol=1e-11, options=options)
    steps = x.diff(dim=1)

    def field(t: Tensor, z: Tensor) -> Tensor:
        k = t.floor().clamp(0, 6).long()
        return torch.einsum("bhc,bc->bh", Field()(t, z), steps[:, k])

    clock = torch.arange(8, dtype=torch.float64)
    found = integrate(field, z0, clock, solver=Landing(RK4()), controller=Fixed(64)).x
    torch.testing.assert_close(found, reference[:, -1], rtol=0, atol=1e-6)
