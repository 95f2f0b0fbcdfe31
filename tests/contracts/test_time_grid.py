"""The contract of every TimeGrid: ends, order, numbers of steps; and the formula of each."""

import functools
import math

import pytest
import torch

from genmodels.diffusion.grids import Discrete, Even, Karras, LogSNR, Quadratic, Shifted, TimeGrid
from genmodels.diffusion.parametrization import domain
from genmodels.diffusion.schedules import EDM, Linear, Schedule, VariancePreserving
from genmodels.registry import ConfigError, build, names
from tests.oracles import SCHEDULES


@functools.cache
def path(name: str) -> Schedule:
    return build(Schedule, SCHEDULES.get(name, name))


@pytest.mark.parametrize("name", names(TimeGrid))
def test_grids_rise_from_end_to_end(name):
    """On every path and the times of every prediction; with the last step to σ = 0 left to the caller, one fewer."""
    grid = build(TimeGrid, name)
    for each in names(Schedule):
        schedule = path(each)
        for span in dict.fromkeys(domain(prediction, schedule) for prediction in ("velocity", "x", "eps", "score")):
            for n in (1, 2, 30):
                times = grid.times(n, schedule, span)
                assert times.dtype == torch.float64 and (times.diff() > 0).all()
                assert times[0] == span[0]
                if name != "discrete":
                    assert len(times) == n + 1 and times[-1] == span[1]
                    assert n == 1 or torch.equal(
                        grid.times(n, schedule, span, denoised=True), grid.times(n - 1, schedule, span)
                    )
        with pytest.raises(ValueError, match="num_steps must be at least 2, the last of which goes to σ = 0"):
            grid.times(1, schedule, (0.1, 1.0), denoised=True)
        with pytest.raises(ValueError, match=r"at least 1 found 0|0 steps were asked for"):
            grid.times(0, schedule, (0.1, 1.0))


def test_times_that_a_schedule_misses_stay_within_the_span():
    class Off(Linear):
        def time(self, log_snr):
            return super().time(log_snr) + 0.2

    for grid in (LogSNR(), Karras()):
        times = grid.times(9, Off(), (0.2, 0.8))
        assert times.min() == 0.2 and times.max() == 0.8


def test_karras_levels_are_the_published_ones():
    """N = 18 levels between 80 and .002 with ρ = 7, on EDM's path (where they are even times) and on vp."""
    wanted = {0: 80.0, 1: 57.58598472, 9: 1.92333984, 16: 0.00752802, 17: 0.002}
    for schedule in (EDM(), VariancePreserving()):
        span = schedule.time(-2 * torch.tensor([0.002, 80.0], dtype=torch.float64).log()).tolist()
        alpha, sigma = schedule.scales(Karras().times(18, schedule, tuple(span), denoised=True).flip(0))
        for i, level in wanted.items():
            assert (sigma / alpha)[i].item() == pytest.approx(level, abs=1e-7)
    torch.testing.assert_close(Karras().times(9, EDM(), (0.0, 1.0)), Even().times(9, EDM(), (0.0, 1.0)))


def test_spacings_are_even_in_what_they_say():
    vp, span = VariancePreserving(), (1e-3, 1.0)
    for found in (
        Even().times(9, vp, span),
        vp.log_snr(LogSNR().times(9, vp, span)),
        Quadratic().times(9, vp, span).sqrt(),
        torch.exp(-vp.log_snr(Karras(3.0).times(9, vp, span)) / 6),
    ):
        assert found.diff().std() < 1e-9 * found.diff().abs().mean()
    # infinite levels at both ends of the linear path: as if they were .002 and 80
    inner = Linear().log_snr(LogSNR().times(9, Linear(), (0.0, 1.0))[1:-1])
    wanted = torch.linspace(-2 * math.log(0.002), -2 * math.log(80), 10, dtype=torch.float64)[1:-1]
    torch.testing.assert_close(inner, wanted)


def test_shifts_follow_the_published_formula():
    """t' = s t/(1 + (s - 1) t) on the linear path; on paths from data to pure noise the log-SNR falls by 2 log s."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(Shifted(3.0).times(10, Linear(), (0.0, 1.0)), 3 * t / (1 + 2 * t))
    torch.testing.assert_close(Shifted(1.0).times(10, Linear(), (0.0, 1.0)), t)
    arc = build(Schedule, "trigonometric")
    plain, moved = (arc.log_snr(Shifted(s).times(10, arc, (0.0, 1.0))[1:-1]) for s in (1.0, 2.5))
    torch.testing.assert_close(plain - moved, torch.full_like(plain, 2 * math.log(2.5)))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_indices_are_those_of_diffusers(spacing):
    from diffusers import DPMSolverMultistepScheduler, HeunDiscreteScheduler

    for n in (7, 18, 300):
        grid = Discrete(spacing)
        scheduler = HeunDiscreteScheduler(timestep_spacing=spacing)
        scheduler.set_timesteps(n)
        theirs = scheduler.timesteps.unique().double()
        if spacing == "linspace":  # this one keeps fractions, which others round
            assert (grid.indices(n) - theirs).abs().max() <= 0.5
            scheduler = DPMSolverMultistepScheduler(timestep_spacing=spacing)
            scheduler.set_timesteps(n)
            # theirs has n + 1 nodes and drops the first
            assert torch.equal(grid.indices(n + 1)[1:], scheduler.timesteps.flip(0))
        else:
            assert torch.equal(grid.indices(n).double(), theirs)
    times = Discrete(spacing).times(10, VariancePreserving(), (1e-5, 1.0))
    assert len(times) == 11 and torch.equal(times[1:], (Discrete(spacing).indices(10).double() + 1) / 1000)
    assert torch.equal(Discrete(spacing).times(10, VariancePreserving(), (1e-5, 1.0), denoised=True), times[1:])


def test_settings_are_checked():
    for make in (lambda: Karras(0.0), lambda: Shifted(-1.0), lambda: Discrete(count=1), lambda: Discrete(offset=1000)):
        with pytest.raises(ConfigError, match="needed, found"):
            make()
    vp = VariancePreserving()
    with pytest.raises(ValueError, match="11 steps were asked for, and there are 10 indices"):
        Discrete(count=10).times(11, vp, (1e-5, 1.0))
    with pytest.raises(ValueError, match="with the offset 500 the last of 10 indices is 1400"):
        Discrete("leading", offset=500).times(10, vp, (1e-5, 1.0))
    assert Discrete("leading", offset=1).indices(10)[0] == 1
