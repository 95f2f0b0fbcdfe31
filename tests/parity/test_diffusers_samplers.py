"""Samplers of diffusers and ours in float64, given the same exact noise of N(1.5, .5²), indices and normals."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from genmodels.diffusion.grids import Discrete
from genmodels.diffusion.reverse import DenoiserRows
from genmodels.diffusion.schedules import Schedule
from genmodels.solvers.base import Solver, integrate
from genmodels.solvers.edm import EDMEuler, EDMHeun
from genmodels.solvers.exponential import DDIM, DDPM, DPMpp, DPMpp2S
from tests.contracts.test_denoiser import exact
from tests.oracles import gaussian
from tests.parity.test_diffusers_schedulers import Levels
from tests.unit.test_samplers import Given

LAW = gaussian(torch.tensor([1.5]), torch.tensor([0.25]))
START = torch.tensor([[-0.7]], dtype=torch.float64)


class Table(Schedule):
    """A chain's ᾱ, index i at the time (i + 1)/N and the item itself at 0; log-SNRs are linear in between."""

    def __init__(self, bars: Tensor) -> None:
        self.levels = torch.logit(bars.double())
        self.count = len(bars)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        place = (t.double() * self.count - 1).clamp(0, self.count - 1)
        low = place.floor().long().clamp(max=self.count - 2)
        level = torch.lerp(self.levels[low], self.levels[low + 1], place - low)
        level = torch.where(t > 0.5 / self.count, level, torch.inf)
        return torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()


def table(scheduler) -> Table:
    return Table(scheduler.alphas_cumprod.double())


def falling(spacing: str, steps: int) -> Tensor:
    """The times of diffusers' indices, then 0."""
    times = Discrete(spacing).times(steps, Levels(), (1e-9, 1.0), denoised=True)
    return torch.cat((times.flip(0), times.new_zeros(1)))


def eps(bar: Tensor, x: Tensor) -> Tensor:
    return LAW.eps(x, bar.sqrt(), (1 - bar).sqrt())


def ours(solver: Solver, path: Schedule, times: Tensor, noise=None, x: Tensor = START) -> Tensor:
    return integrate(DenoiserRows(exact(LAW, path, "eps")), x, times, solver=solver, noise=noise).x


def normals(steps: int) -> tuple[torch.Generator, Given]:
    """A generator for diffusers, and what it will draw, for ours."""
    made = torch.Generator().manual_seed(7)
    drawn = torch.stack([torch.randn(1, 1, generator=made, dtype=torch.float64) for _ in range(steps)])
    return torch.Generator().manual_seed(7), Given(torch.cat((drawn, torch.zeros_like(drawn[:1]))))


@pytest.mark.parametrize(
    ("spacing", "steps", "published"),
    [("leading", 10, 1.228884299), ("leading", 50, 1.163847532), ("trailing", 10, 1.237506287)],
)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(spacing, steps, published, eta):
    """With and without noise: the values of diffusers' table in float64."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    scheduler.set_timesteps(steps)
    x, (made, given) = START.clone(), normals(steps)
    for index in scheduler.timesteps:
        x = scheduler.step(eps(scheduler.alphas_cumprod[index], x), index, x, eta=eta, generator=made).prev_sample
    found = ours(DDIM(eta), table(scheduler), falling(spacing, steps), given)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    assert eta > 0 or abs(found.item() - published) < 1e-8


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral(variance):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(clip_sample=False, variance_type=f"fixed_{variance}", timestep_spacing="trailing")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.one = scheduler.one.double()
    scheduler.set_timesteps(20)
    x, (made, given) = START.clone(), normals(20)
    for index in scheduler.timesteps:
        x = scheduler.step(eps(scheduler.alphas_cumprod[index], x), index, x, generator=made).prev_sample
    # a chain of 20 indices has its last step from index 49, with noise, to index -1 without: no σ there
    found = ours(DDPM(variance), table(scheduler), falling("trailing", 20), given)
    last = (
        given.w[19] * table(scheduler).scales(torch.tensor(0.05, dtype=torch.float64))[1]
        if variance == "large"
        else 0.0
    )
    # σ is 0 at the end: their "small" variance is clamped at 1e-20 there, and their "large" one still adds noise
    torch.testing.assert_close(found + last, x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("order", "algorithm", "kind", "solver"),
    [
        (1, "dpmsolver++", "midpoint", DPMpp(1)),
        (2, "dpmsolver++", "midpoint", DPMpp(2)),
        (2, "dpmsolver++", "heun", DPMpp(2, coefficients="exact")),
        (3, "dpmsolver++", "midpoint", DPMpp(3)),
        (2, "sde-dpmsolver++", "midpoint", DPMpp(2, eta=1.0)),
        (2, "sde-dpmsolver++", "heun", DPMpp(2, eta=1.0, coefficients="exact")),
    ],
)
def test_dpm_solver_multistep(order, algorithm, kind, solver):
    """Their update functions, which keep float64 (their `step` rounds the state to float32), in their order of use."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        solver_order=order, algorithm_type=algorithm, solver_type=kind, timestep_spacing="trailing"
    )
    steps = 16
    scheduler.set_timesteps(steps)
    path, times = table(scheduler), falling("trailing", steps)
    alpha, sigma = path.scales(times)
    scheduler.sigmas = sigma / alpha
    assert torch.equal(scheduler.timesteps, (times[:-1] * 1000).round().long() - 1)
    x, history, (_, given) = START.clone(), [], normals(steps)
    for i in range(steps):
        scheduler._step_index = i
        model = LAW.denoiser(x, alpha[i], sigma[i])
        history = [*history, model][-3:]
        used = 1 if i == steps - 1 else min(order, len(history))  # the last step goes to σ = 0
        noise = given.w[i] if "sde" in algorithm else None
        if used == 1:
            x = scheduler.dpm_solver_first_order_update(model, sample=x, noise=noise)
        elif used == 2:
            x = scheduler.multistep_dpm_solver_second_order_update(history, sample=x, noise=noise)
        else:
            x = scheduler.multistep_dpm_solver_third_order_update(history, sample=x, noise=noise)
    torch.testing.assert_close(ours(solver, path, times, given), x, rtol=0, atol=1e-12)


def test_dpm_solver_singlestep():
    """2S on levels even in λ, where their node inside a step lies in its middle as ours does."""
    from diffusers import DPMSolverSinglestepScheduler

    scheduler = DPMSolverSinglestepScheduler(solver_order=2, lower_order_final=False, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(20)
    levels = torch.linspace(math.log(50.0), math.log(0.05), 21, dtype=torch.float64).exp()
    scheduler.sigmas, x = levels, START.clone()
    for index, level in zip(scheduler.timesteps, levels, strict=False):
        bar = 1 / (1 + level**2)
        x = scheduler.step(eps(bar, x), index, x).prev_sample
    # in y = x/α, on the path α = 1, σ = r
    alphas = 1 / (1 + levels[[0, -1]] ** 2).sqrt()
    found = ours(DPMpp2S(), Levels(), levels[::2], x=START / alphas[0]) * alphas[1]
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "solver"), [("Euler", EDMEuler()), ("Heun", EDMHeun())])
def test_edm_steps_to_zero_noise(name, solver):
    """Their σ are float32, and so is Euler's state; the last step, to σ = 0, is within the grid."""
    import diffusers

    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")(use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    x = torch.full((1, 1), 3.0, dtype=torch.float64)
    start = x.clone()
    for index, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x = scheduler.step(LAW.eps(x, 1.0, sigma.double()), index, x, return_dict=False)[0].double()
    levels = scheduler.sigmas.double().unique().flip(0)
    assert levels[-1] == 0
    torch.testing.assert_close(ours(solver, Levels(), levels, x=start), x, rtol=0, atol=1e-5)


def test_table_has_the_chains_levels():
    """So that parity is not between two wrong tables: √ᾱ at every index, 1 and 0 at the item."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler()
    path, bars = table(scheduler), scheduler.alphas_cumprod.double()
    alpha, sigma = path.scales((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    torch.testing.assert_close(alpha, bars.sqrt(), rtol=0, atol=1e-13)
    torch.testing.assert_close(sigma, (1 - bars).sqrt(), rtol=0, atol=1e-11)
    assert [c.item() for c in path.scales(torch.tensor(0.0))] == [1.0, 0.0]
    assert all(a > b for a, b in pairwise(path.levels.tolist()))
