"""Control paths against numbers worked out by hand, SciPy's splines, and what must not change them."""

import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from genmodels.registry import build, names
from genmodels.rng import generator
from genmodels.solvers.fields import narrow
from genmodels.solvers.paths import Control, Hermite, Linear, NaturalCubic, Path, Rectilinear

CONTROLS = names(Control)
every = pytest.mark.parametrize("name", CONTROLS)
splines = pytest.mark.parametrize("name", ["linear", "hermite", "natural_cubic"])
KNOTS = torch.tensor([[[0.0, 0.0], [1.0, 0.5], [2.0, 0.2]]], dtype=torch.float64)
TIMES = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def series(rows: int = 4, length: int = 9, channels: int = 3, gaps: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """Random walks at irregular times with gaps in each channel, rows of several lengths, padded as data sets do."""
    g = generator("paths", rows, length, channels)
    times = torch.rand(rows, length, generator=g, dtype=torch.float64).cumsum(1) + 0.1 * torch.arange(length)
    values = torch.randn(rows, length, channels, generator=g, dtype=torch.float64).cumsum(1)
    mask = torch.rand(rows, length, channels, generator=g) >= gaps
    mask[:, 0, 0] = mask[:, 3, 1] = True
    ends = length - 1 - torch.arange(rows) % 3
    late = torch.arange(length) > ends[:, None]
    times = torch.where(late, times.gather(1, ends[:, None]), times)
    mask = mask & ~late[:, :, None]
    return times, values * mask, mask


def grid(path: Path, n: int = 40) -> list[Tensor]:
    """Parameters [B] from the first knot of each row to its last."""
    start, end = path.knots[:, 0], path.knots[:, -1]
    return [start + share * (end - start) for share in torch.linspace(0, 1, n, dtype=torch.float64)]


def samples(path: Path) -> Tensor:
    """[40, B, C] values and derivatives along each row."""
    return torch.stack([torch.cat((path.value(s), path.derivative(s)), 1) for s in grid(path)])


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_hermite_takes_its_slopes_from_behind():
    path = Hermite(time=False).path(TIMES, KNOTS)
    torch.testing.assert_close(path.derivative(at(1.5)), torch.tensor([[1, -0.5]]).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(path.derivative(at(1.0)), torch.tensor([[1, 0.5]]).double(), rtol=0, atol=1e-14)


def test_the_natural_spline_of_three_points():
    path = NaturalCubic(time=False).path(TIMES, KNOTS)
    torch.testing.assert_close(
        path.value(at(0.5)), torch.tensor([[0.5, 0.325]], dtype=torch.float64), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(
        path.derivative(at(0.5)), torch.tensor([[1, 0.55]], dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_gaps_are_filled_on_a_line_and_ends_by_the_nearest_value():
    values = torch.tensor([[torch.nan, 1, torch.nan, 2, torch.nan]]).T[None]
    other = torch.zeros(1, 5, 1)
    mask = torch.cat((values.isfinite(), other == 0), 2)
    path = Linear(time=False).path(torch.arange(5.0)[None], torch.cat((values, other), 2), mask)
    found = [float(path.value(at(t))[0, 0]) for t in range(5)]
    assert found == [1, 1, 1.5, 2, 2]


def test_rectilinear_moves_in_time_and_then_in_value():
    values = torch.tensor([[[1.0, 0.0], [torch.nan, 0.0], [3.0, 0.0]]])
    path = Rectilinear().path(TIMES, values, values.isfinite())
    found = [tuple(path.value(at(k))[0, :2].tolist()) for k in range(5)]
    assert found == [(0, 1), (1, 1), (1, 1), (2, 1), (2, 3)]
    # by the time 0.5 time has moved by half; by the time 1 the value has moved, too
    expected = torch.tensor([[0, 0.5, 2, 2.5, 4]], dtype=torch.float64)
    assert torch.equal(path.parameter(torch.tensor([[0, 0.5, 1, 1.5, 2]]).double()), expected)


@pytest.mark.parametrize("k", range(3))
def test_natural_splines_of_gappy_channels_are_scipy_s(k):
    """Each over its own knots, a channel beginning and ending with its row."""
    times, values, mask = series(gaps=0.3)
    path = NaturalCubic(time=False).path(times, values, mask)
    for b in range(len(times)):
        rows = mask[b].any(1).nonzero()[:, 0]
        own = mask[b, :, k].nonzero()[:, 0]
        t, x = times[b, own].tolist(), values[b, own, k].tolist()
        first, last = float(times[b, rows[0]]), float(times[b, rows[-1]])
        t, x = ([first, *t], [x[0], *x]) if t[0] > first else (t, x)
        t, x = ([*t, last], [*x, x[-1]]) if t[-1] < last else (t, x)
        spline = CubicSpline(t, x, bc_type="natural")
        for s in torch.linspace(first, last, 17, dtype=torch.float64):
            assert abs(float(path.value(s)[b, k]) - spline(float(s))) < 1e-10
            assert abs(float(path.derivative(s)[b, k]) - spline(float(s), 1)) < 1e-10


# ---- every control ---------------------------------------------------------------------------------------------------


@every
def test_a_path_has_the_channels_that_were_told(name):
    times, values, mask = series()
    for options in ({}, {"time": False}, {"intensity": True}, {"time": False, "intensity": True}):
        control = build(Control, {"name": name, **options})
        assert control.path(times, values, mask).channels == control.channels(3)


@every
def test_derivatives_are_those_of_values(name):
    path = build(Control, {"name": name, "intensity": True}).path(*series())
    for s in grid(path, 23)[1:-1]:
        s = s.requires_grad_()
        v = path.value(s)
        slopes = [torch.autograd.grad(v[:, c].sum(), s, retain_graph=True)[0] for c in range(v.shape[1])]
        torch.testing.assert_close(path.derivative(s.detach()), torch.stack(slopes, 1), rtol=1e-9, atol=1e-9)


@splines
def test_paths_go_through_what_was_observed(name):
    times, values, mask = series()
    path = build(Control, {"name": name, "time": False}).path(times, values, mask)
    for k in range(times.shape[1]):
        error = (path.value(times[:, k]) - values[:, k]) * mask[:, k]
        assert error.abs().max() < 1e-12


@every
def test_paths_are_continuous_and_rest_beyond_their_ends(name):
    path = build(Control, name).path(*series())
    near = 1e-9
    for k in range(path.knots.shape[1]):
        s = path.knots[:, k]
        assert (path.value(s + near) - path.value(s - near)).abs().max() < 1e-6
    end = path.knots[:, -1]
    assert torch.equal(path.value(end + 3), path.value(end)) and not path.derivative(end + 3).any()
    assert torch.equal(path.value(path.knots[:, 0] - 3), path.value(path.knots[:, 0]))


@pytest.mark.parametrize("name", ["hermite", "natural_cubic"])
def test_smooth_controls_have_continuous_derivatives(name):
    times, values, mask = series()
    path = build(Control, name).path(times, values, mask)
    for k in range(1, path.knots.shape[1] - 1):
        s, inside = path.knots[:, k], (path.knots[:, k] < path.knots[:, -1])
        gap = path.derivative(s + 1e-9) - path.derivative(s - 1e-9)
        assert (gap[inside].abs() < 1e-5).all()


@every
def test_hidden_values_padding_and_companions_change_nothing(name):
    times, values, mask = series()
    control = build(Control, {"name": name, "intensity": True})
    path = control.path(times, values, mask)
    hidden = torch.where(mask, values, torch.nan)
    wild = torch.where(mask.any(2), times, torch.nan)
    for other in (control.path(times, hidden, mask), control.path(wild, values, mask)):
        assert all(torch.equal(a, b) for a, b in zip(path, other, strict=True))
    pad = [torch.cat((each, each[:, -1:].expand_as(each[:, :4])), 1) for each in (times, values)]
    padded = control.path(*pad, torch.cat((mask, torch.zeros_like(mask[:, :4])), 1))
    torch.testing.assert_close(samples(padded), samples(path), rtol=0, atol=1e-12)
    for b in range(len(times)):
        alone = control.path(times[b : b + 1], values[b : b + 1], mask[b : b + 1])
        t = times[b].unique()[None]
        for s, both in zip(alone.parameter(t)[0], path.parameter(t.expand(len(times), -1))[b], strict=True):
            torch.testing.assert_close(alone.value(s)[0], path.value(both)[b], rtol=0, atol=1e-11)
            torch.testing.assert_close(alone.derivative(s)[0], path.derivative(both)[b], rtol=0, atol=1e-11)


@every
def test_times_at_which_nothing_was_observed_change_nothing(name):
    times, values, mask = series()
    control = build(Control, {"name": name, "intensity": True})
    before = times[:, :1] - 1
    between = times[:, 4:5] * 0.5 + times[:, 3:4] * 0.5
    wider = torch.cat((before, times[:, :4], between, times[:, 4:]), 1)
    nothing = torch.zeros_like(values[:, :1])
    more = torch.cat((nothing, values[:, :4], nothing + 7, values[:, 4:]), 1)
    seen = torch.cat((nothing.bool(), mask[:, :4], nothing.bool(), mask[:, 4:]), 1)
    for a, b in zip(control.path(times, values, mask), control.path(wider, more, seen), strict=True):
        assert torch.equal(a, b)


@every
def test_rows_can_be_taken_out(name):
    path = build(Control, name).path(*series())
    few = narrow(path, torch.tensor([2, 0]))
    assert isinstance(few, Path)
    assert torch.equal(few.value(at(1.3)), path.value(at(1.3))[[2, 0]])


@every
def test_gradients_reach_observed_values_alone(name):
    times, values, mask = series(rows=2, length=5, channels=2)
    control = build(Control, name)

    def along(x: Tensor) -> Tensor:
        path = control.path(times, x, mask)
        return torch.cat([path.value(s) + path.derivative(s) for s in grid(path, 4)])

    assert torch.autograd.gradcheck(along, (values.requires_grad_(),))
    (gradient,) = torch.autograd.grad(along(values).square().sum(), values)
    assert not gradient[~mask].any() and (gradient[mask] != 0).all()


@pytest.mark.parametrize("name", ["rectilinear", "hermite", "linear"])
def test_what_comes_later_does_not_change_the_past(name):
    """Rectilinear paths up to an observation, Hermite and linear ones (with nothing missing) up to the one before."""
    times, values, _ = series(gaps=0.0, rows=3)
    times = times[:, :7]
    changed = values.clone()
    changed[:, 5:] += 1
    paths = [build(Control, name).path(times, x[:, :7]) for x in (values, changed)]
    end = paths[0].parameter(times[:, 5:6])[:, 0] - 1 if name == "rectilinear" else times[:, 4]
    for share in torch.linspace(0, 1, 30, dtype=torch.float64):
        s = paths[0].knots[:, 0] + share * (end - paths[0].knots[:, 0])
        assert torch.equal(paths[0].value(s), paths[1].value(s))
        assert torch.equal(paths[0].derivative(s), paths[1].derivative(s))
    late = [p.value(p.knots[:, -1]) for p in paths]
    assert (late[0] - late[1]).abs().max() > 0.5


def test_natural_splines_look_ahead():
    first, second = (NaturalCubic().path(TIMES, KNOTS + torch.tensor([0, 0, x]).double()[:, None]) for x in (0.0, 1.0))
    assert (first.derivative(at(0.5)) - second.derivative(at(0.5))).abs().max() > 0.05


@pytest.mark.parametrize("name", ["linear", "hermite", "natural_cubic"])
def test_the_time_channel_is_time_and_intensity_counts(name):
    times, values, mask = series()
    path = build(Control, {"name": name, "intensity": True}).path(times, values, mask)
    for s in grid(path):
        torch.testing.assert_close(path.value(s)[:, 0], s, rtol=0, atol=1e-12)
    ends = path.value(path.knots[:, -1])
    torch.testing.assert_close(ends[:, 4:], mask.sum(1).double(), rtol=0, atol=1e-11)


def test_a_channel_without_observations_is_zero_and_one_observation_is_a_constant():
    times, values, mask = series()
    mask = mask.clone()
    mask[1, :, 2] = False
    for name in CONTROLS:
        path = build(Control, {"name": name, "time": False}).path(times, values, mask)
        assert not samples(path)[:, 1, 2].any(), name
        one = build(Control, name).path(times[:, :1], values[:, :1], torch.ones_like(mask[:, :1]))
        assert torch.equal(one.value(at(0.0))[:, 1:4], values[:, 0]) and not one.derivative(times[:, 0]).any()


def test_single_precision_agrees():
    times, values, mask = series()
    for name in CONTROLS:
        wide, single = (build(Control, name).path(times, x, mask) for x in (values, values.float()))
        assert single.value(at(1.0)).dtype == torch.float32 and single.knots.dtype == torch.float64
        torch.testing.assert_close(samples(single).double(), samples(wide), rtol=1e-4, atol=1e-4)


@every
def test_an_empty_batch_has_an_empty_path(name):
    path = build(Control, name).path(torch.zeros(0, 3).double(), torch.zeros(0, 3, 2))
    assert path.value(at(0.0)).shape[0] == 0


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": [[0.0, 1, 2], [0, 2, 2]]}, "item 1 goes from 2.0 to 2.0 at position 2"),
        ({"times": [[0.0, 1, 2], [0, 2, 1]]}, "item 1 goes from 2.0 to 1.0 at position 2"),
        ({"mask": [[True] * 3, [False] * 3]}, "nothing was observed of item 1"),
        ({"values": torch.zeros(2, 3)}, r"values \[B, L, C\].* found times \[2, 3\]"),
        ({"values": torch.zeros(2, 4, 1)}, r"found times \[2, 3\], torch.float32 \[2, 4, 1\]"),
        ({"mask": torch.ones(2, 3)}, "a Boolean mask .*float32"),
        (
            {"values": torch.tensor([[0.0, 1, 2], [0, torch.nan, 3]])[:, :, None]},
            "item 1, position 1, channel 0 is not",
        ),
    ],
)
def test_series_that_make_no_path_are_refused(change, message):
    given = {"times": [[0.0, 1, 2], [0, 1, 2]], "values": torch.zeros(2, 3, 1), "mask": None, **change}
    as_tensors = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        Linear().path(**as_tensors)


def test_positions_are_those_of_the_series_as_given():
    times, mask = torch.tensor([[0.0, 5, 1, 1]]), torch.tensor([[True, False, True, True]])
    with pytest.raises(ValueError, match=r"item 0 goes from 1\.0 to 1\.0 at position 3"):
        Linear().path(times, torch.zeros(1, 4, 1), mask)
