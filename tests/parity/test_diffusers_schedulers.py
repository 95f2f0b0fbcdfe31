"""Samplers of diffusers and ours, given the same exact denoiser of N(1.5, .5²)."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from genmodels.diffusion.denoiser import Denoiser, OnSchedule
from genmodels.diffusion.schedules import Linear, Schedule, VariancePreserving
from genmodels.solvers.base import integrate
from genmodels.solvers.runge_kutta import Euler, Heun
from tests.contracts.test_denoiser import Oracle
from tests.oracles import gaussian, probability_flow

LAW = gaussian(torch.tensor([1.5]), torch.tensor([0.25]))
START = torch.tensor([[-0.7]], dtype=torch.float64)


class Levels(Schedule):
    """α = 1 and σ = t: in y = x_t/α the ODE is dy/dσ = ε̂, whose steps by Euler's method are DDIM."""

    t_min, t_max = 0.0, 200.0

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t.double()), t.double()


@pytest.mark.parametrize(
    ("spacing", "steps", "published"),
    [("leading", 10, 1.228884299), ("leading", 50, 1.163847532), ("trailing", 10, 1.237506287)],
)
def test_ddim_is_euler_in_noise_level(spacing, steps, published):
    """On the indices that diffusers chooses, with its table of ᾱ in float64: equal to rounding, and to known values."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    x = START.clone()
    for index in scheduler.timesteps:
        bar = scheduler.alphas_cumprod[index]
        x = scheduler.step(LAW.eps(x, bar.sqrt(), (1 - bar).sqrt()), index, x, eta=0.0).prev_sample
    assert abs(x.item() - published) < 1e-8

    stride = scheduler.config.num_train_timesteps // steps
    ends = scheduler.timesteps - stride
    bars = scheduler.alphas_cumprod[scheduler.timesteps]
    last = scheduler.alphas_cumprod[ends[-1]] if ends[-1] >= 0 else scheduler.final_alpha_cumprod
    bars = torch.cat((bars, last[None]))
    denoiser = Denoiser(Oracle(LAW, Levels(), "eps"), Levels(), "eps")
    y = integrate(denoiser, START / bars[0].sqrt(), ((1 - bars) / bars).sqrt(), solver=Euler()).x
    torch.testing.assert_close(y * bars[-1].sqrt(), x, rtol=0, atol=1e-13)


def test_flow_match_euler_is_euler_on_the_linear_path():
    from diffusers import FlowMatchEulerDiscreteScheduler

    denoiser = Denoiser(Oracle(LAW, Linear(), "velocity"), Linear(), "velocity")
    exact = probability_flow(LAW, START, (0.0, 1.0), (1.0, 0.0))
    errors = []
    for steps in (8, 16, 32):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
        x = START.clone()
        for index, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            # its σ are float32 numbers; steps are σ_next - σ, so that x keeps float64 only up to them
            x = scheduler.step(denoiser(sigma.double(), x), index, x.double(), return_dict=False)[0].double()
        ours = integrate(denoiser, START, scheduler.sigmas.double(), solver=Euler()).x
        torch.testing.assert_close(x, ours, rtol=0, atol=2e-6)
        errors.append((ours - exact).abs().item())
    assert all(math.log2(a / b) > 0.85 for a, b in pairwise(errors))


def test_euler_and_heun_in_noise_level_are_ours():
    """The two samplers of EDM down to σ = 0, on the sigmas that diffusers chooses; the last step is Euler's."""
    from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

    def eps(sigma: Tensor, x: Tensor) -> Tensor:
        return LAW.eps(x, torch.ones_like(sigma.double()), sigma.double())

    for scheduler, solver in ((EulerDiscreteScheduler(), Euler()), (HeunDiscreteScheduler(), Heun())):
        scheduler.set_timesteps(12)
        x = torch.full((1, 1), 3.0, dtype=torch.float64)
        start = x.clone()
        for index, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            x = scheduler.step(eps(sigma, x), index, x, return_dict=False)[0].double()
        grid = scheduler.sigmas.double().unique().flip(0)
        y = integrate(eps, start, grid[:-1], solver=solver).x
        y = y - grid[-2] * eps(grid[-2], y)
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


def test_a_flow_model_carried_to_vp_reaches_the_known_item():
    """`OnSchedule` from the linear path: where vp takes -.7 at t = 1 by t = 1e-3."""
    linear = Denoiser(Oracle(LAW, Linear(), "velocity"), Linear(), "velocity")
    moved = OnSchedule(linear, VariancePreserving())
    grid = torch.linspace(moved.t_max, 1e-3, 401, dtype=torch.float64)
    scales = [tuple(float(c) for c in moved.schedule.scales(t)) for t in (grid[0], grid[-1])]
    expected = probability_flow(LAW, START, *scales)
    torch.testing.assert_close(integrate(moved, START, grid, solver=Heun()).x, expected, rtol=0, atol=1e-3)
    assert abs(expected.item() - 1.14492457) < 1e-7
