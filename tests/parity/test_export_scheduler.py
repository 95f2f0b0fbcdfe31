"""Our solvers behind the interface of diffusers' schedulers: the same numbers, known numbers, and what it refuses."""

import json

import pytest
import torch
from torch import Tensor

from genmodels.diffusion.denoiser import Denoiser
from genmodels.diffusion.schedules import Schedule
from genmodels.registry import ConfigError, build, member, names
from genmodels.solvers.base import Solver, integrate
from genmodels.solvers.brownian import BrownianTree
from genmodels.solvers.fields import SDE
from tests.contracts.test_denoiser import Oracle
from tests.oracles import gaussian

LAW = gaussian(torch.tensor([1.5]), torch.tensor([0.25]))
SOLVERS = [
    n
    for n in names(Solver)
    if not (m := member(Solver, n, "solver")).whole and not m.implicit and m.needs is not SDE
    if "cde" not in n and n != "inverse"
]
STARTS = torch.tensor([[-0.7], [0.4], [1.9]], dtype=torch.float64)


@pytest.fixture(scope="module")
def scheduler():
    from genmodels.export.diffusers import GenScheduler

    return GenScheduler


def oracle(path: str | dict, prediction: str) -> Denoiser:
    schedule = build(Schedule, path)
    return Denoiser(Oracle(LAW, schedule, prediction), schedule, prediction)


def run(s, denoiser: Denoiser, x: Tensor) -> Tensor:
    """The loop of a pipeline."""
    for label in s.timesteps:
        x = s.step(denoiser.answer(s.labels.times(label), x), label, x).prev_sample
    return x


def test_every_solver_takes_its_own_steps(scheduler):
    """Equal to `integrate` on the same grid, noise included, with x̂ at the end where the path has noise there."""
    assert {"euler", "heun", "dopri5", "ddim", "ddpm", "dpmpp", "dpmpp_2s", "edm_heun"} <= set(SOLVERS)
    churned = {"name": "edm_heun", "s_churn": 3.0}
    for k, name in enumerate([*SOLVERS, churned]):
        path, prediction = (("linear", "velocity"), ("vp", "eps"), ("edm", "x"), ("cosine", "v"))[
            k % 4 if name != churned else 2
        ]
        denoiser, s = oracle(path, prediction), scheduler(path, prediction, name)
        s.set_timesteps(6)
        s.set_seeds([3, 1, 4])
        start = s.init_noise_sigma * STARTS
        noise = s.plan.path([3, 1, 4], (1,))
        expected = integrate(denoiser, start, s.plan.nodes, solver=build(Solver, name), noise=noise).x
        if path != "linear":
            expected = denoiser.predict(s.plan.nodes[-1], expected).x
        torch.testing.assert_close(run(s, denoiser, start), expected, rtol=1e-12, atol=1e-12)
        assert isinstance(noise, BrownianTree) and s.num_inference_steps == 6 and s.order == build(Solver, name).stages


@pytest.mark.parametrize(
    ("spacing", "steps", "published"),
    [("leading", 10, 1.228884299), ("leading", 50, 1.163847532), ("trailing", 10, 1.237506287)],
)
def test_ddim_on_the_table_of_diffusers(scheduler, spacing, steps, published):
    from diffusers import DDIMScheduler

    table = DDIMScheduler(clip_sample=False).alphas_cumprod.double().tolist()
    path = {"name": "discrete", "alphas_cumprod": table, "start": "trained"}
    s = scheduler(path, "eps", "ddim", grid={"name": "discrete", "spacing": spacing}, time_offset=-1.0)
    s.set_timesteps(steps)
    theirs = DDIMScheduler(timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    torch.testing.assert_close(s.timesteps, theirs.timesteps.double(), rtol=0, atol=1e-9)
    x = run(s, oracle(path, "eps"), STARTS[:1])
    assert abs(x.item() - published) < 1e-8


def test_known_numbers_of_edm(scheduler):
    """N(0, .5²) from x = 80 on the grid of 18 noise levels and 0: 2n - 1 entries for Heun's method, n for Euler's."""
    from diffusers import HeunDiscreteScheduler

    law = gaussian(torch.tensor([0.0]), torch.tensor([0.25]))
    schedule = build(Schedule, "edm")
    denoiser = Denoiser(Oracle(law, schedule, "edm", 0.5), schedule, "edm", 0.5)
    levels = {0: 80.0, 1: 57.58598472, 9: 1.92333984, 16: 0.00752802, 17: 0.002}
    for solver, n, published in (
        ("edm_heun", 10, 0.60979800),
        ("edm_heun", 18, 0.52762464),
        ("edm_heun", 36, 0.50609709),
        ("edm_euler", 18, 0.42303144),
    ):
        s = scheduler("edm", "edm", solver, sigma_data=0.5)
        s.set_timesteps(n)
        assert len(s.timesteps) == n * s.order - (s.order == 2) and s.order == (2 if solver == "edm_heun" else 1)
        torch.testing.assert_close(s.timesteps, s.sigmas[:-1].log() / 4, rtol=1e-12, atol=1e-12)
        if solver == "edm_euler":
            assert all(abs(float(s.sigmas[k]) - level) < 1e-7 for k, level in levels.items()) and s.sigmas[-1] == 0
        x = torch.full((1, 1), 80.0, dtype=torch.float64)
        for label in s.timesteps:
            t = s.labels.times(label)
            scale = (s.path.scales(t)[1].square() + 0.25).rsqrt()
            torch.testing.assert_close(s.scale_model_input(x, label), scale * x)
            x = s.step(denoiser.answer(t, x), label, x).prev_sample
        assert abs(x.item() - published) < 1e-7
    theirs = HeunDiscreteScheduler()
    theirs.set_timesteps(18)
    assert len(theirs.timesteps) == 35 and theirs.order == 2


def test_the_shift_acts_once_and_never_on_what_is_given(scheduler):
    s = scheduler(grid={"name": "shifted", "shift": 3.0})
    found = []
    for _ in range(2):
        s.set_timesteps(10)
        found.append(s.timesteps)
    t = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    torch.testing.assert_close(found[0], 1000 * 3 * t / (1 + 2 * t), rtol=1e-12, atol=0)
    assert torch.equal(*found)
    sigmas = [1.0, 0.7, 0.2]
    for options in (
        {"sigmas": sigmas},
        {"timesteps": [1000, 700, 200]},
        {"sigmas": torch.tensor(sigmas, dtype=torch.float64)},
    ):
        s.set_timesteps(**options)
        torch.testing.assert_close(s.timesteps, torch.tensor([1000.0, 700.0, 200.0]).double(), rtol=1e-12, atol=0)
        torch.testing.assert_close(s.sigmas, torch.tensor([*sigmas, 0.0], dtype=torch.float64), rtol=1e-12, atol=0)


def test_every_item_may_have_a_timestep_of_its_own(scheduler):
    """Row by row equal to the steps of one item, the last ones included; whole numbers and float32 labels as well."""
    for path, prediction, solver in (("linear", "velocity", "euler"), ("vp", "eps", "ddim"), ("edm", "x", "ddim")):
        denoiser, s = oracle(path, prediction), scheduler(path, prediction, solver)
        s.set_timesteps(4)
        entries = torch.tensor([0, 2, 3])
        labels = s.timesteps[entries]
        t = s.labels.times(labels)
        together = s.step(denoiser.answer(t, STARTS), labels.float(), STARTS).prev_sample
        for row, entry in enumerate(entries):
            s.set_timesteps(4)
            x = STARTS[row : row + 1]
            alone = s.step(denoiser.answer(t[row], x), s.timesteps[entry], x).prev_sample
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)
        noisy = s.add_noise(STARTS, torch.ones_like(STARTS), labels)
        scales = s.path(t)
        torch.testing.assert_close(noisy, scales.alpha[:, None] * STARTS + scales.sigma[:, None])
        v = s.get_velocity(STARTS, torch.ones_like(STARTS), labels)
        torch.testing.assert_close(v, scales.alpha[:, None] - scales.sigma[:, None] * STARTS)
    whole = scheduler()
    whole.set_timesteps(4)
    x = whole.step(STARTS, 1000, STARTS).prev_sample
    torch.testing.assert_close(x, STARTS - 0.25 * STARTS)
    assert torch.equal(whole.add_noise(STARTS, STARTS, torch.tensor([1000, 500, 250])), STARTS)


def test_steps_from_the_middle_edits_and_the_end(scheduler):
    """A start where a step begins, by label or by index; what a pipeline edits is what is stepped from."""
    denoiser, s = oracle("vp", "eps"), scheduler("vp", "eps", "heun")
    s.set_timesteps(6)
    label = s.timesteps[4]
    answer = denoiser.answer(s.labels.times(label), STARTS)
    by_label = s.step(answer, float(label) * (1 + 3e-3), STARTS).prev_sample  # as bfloat16 may round it
    s.set_timesteps(6)
    s.set_begin_index(4)
    assert torch.equal(s.step(answer, label, STARTS).prev_sample, by_label) and s.step_index == 5
    with pytest.raises(ValueError, match=r"the timestep .* was given, but entry 5 is"):
        s.step(answer, s.timesteps[0], STARTS)
    s.set_timesteps(6)
    s.set_begin_index(3)
    with pytest.raises(ValueError, match="entry 3 does not begin a step of the solver"):
        s.step(answer, s.timesteps[3], STARTS)
    s = scheduler()
    s.set_timesteps(2)
    s.step(STARTS, 1000, STARTS)
    edited = s.step(STARTS, 500, 10 * STARTS).prev_sample
    torch.testing.assert_close(edited, 10 * STARTS - 0.5 * STARTS)
    with pytest.raises(ValueError, match="the last entry was answered"):
        s.step(STARTS, 0, STARTS)


def test_few_steps_are_finite_on_every_path(scheduler):
    """One step of n = 1 is x̂ of pure noise where the path has noise at its start; nothing is NaN, α = 0 included."""
    zero = {"name": "discrete", "zero_terminal_snr": True}
    for path, prediction in (("linear", "velocity"), ("vp", "eps"), ("edm", "edm"), (zero, "v"), ("cosine", "x")):
        denoiser = oracle(path, prediction)
        for solver in ("euler", "ddim", "dpmpp", "edm_heun", "dpmpp_2s"):
            s = scheduler(path, prediction, solver)
            for n in (1, 2, 3) if solver != "dpmpp" else (2, 3):
                s.set_timesteps(n)
                start = s.init_noise_sigma * STARTS
                x = run(s, denoiser, start)
                # other methods are far off from σ/α = 150 to 0.003 in one step, but give a number
                close = solver not in ("ddim", "dpmpp") or (x - 1.5).abs().max() < 3
                assert x.isfinite().all() and close, (path, solver, n)
                if n == 1 and path != "linear":
                    clean = denoiser.predict(torch.tensor(denoiser.t_max, dtype=torch.float64), start).x
                    torch.testing.assert_close(x, clean)


def test_configurations_are_json_and_come_back(scheduler, tmp_path):
    s = scheduler(
        {"name": "discrete", "alphas_cumprod": [0.9, 0.5, 0.01]}, "v", {"name": "dpmpp", "order": 3}, 3,
        grid={"name": "karras", "rho": 5.0}, denoise=False, time_offset=-1.0,
    )  # fmt: skip
    s.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert kept["schedule"]["alphas_cumprod"] == [0.9, 0.5, 0.01] and kept["solver"] == {"name": "dpmpp", "order": 3}
    again = scheduler.from_pretrained(tmp_path)
    plain = [{k: v for k, v in dict(each.config).items() if not k.startswith("_")} for each in (s, again)]
    assert plain[0] == plain[1]
    for each in (s, again):
        each.set_timesteps(4)
    assert torch.equal(s.timesteps, again.timesteps) and torch.equal(s.sigmas, again.sigmas)
    denoiser = oracle(dict(kept["schedule"]), "v")
    assert torch.equal(run(s, denoiser, STARTS), run(again, denoiser, STARTS))


def test_refusals(scheduler):
    for name in ("kvaerno3", "inverse", "torchdiffeq", "euler_maruyama"):
        with pytest.raises(ConfigError, match=f"solver '{name}'"):
            scheduler(solver=name)
    churned = scheduler("edm", "x", {"name": "edm_heun", "s_churn": 10.0})
    with pytest.raises(ConfigError, match="adds noise before it asks the network"):
        churned.set_timesteps(sigmas=[10.0, 1.0, 0.1])
    s = scheduler()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        s.step(STARTS, 1000, STARTS)
    for options, message in (
        ({"num_inference_steps": 0}, "at least 1 step is needed, found 0"),
        ({"sigmas": [0.5], "timesteps": [500]}, "Give one"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "3 steps, but 2 sigmas"),
        ({"sigmas": [0.5, 0.7]}, "sigmas must fall strictly"),
        ({"timesteps": [1500, 200]}, "timesteps must fall strictly"),
        ({"sigmas": [1.5, 0.2]}, "between 0 and 1 on this path"),
        ({"sigmas": []}, r"sigmas must be a list of finite numbers, found \[\]"),
        ({"sigmas": [1.0, float("nan")]}, "sigmas must be a list of finite numbers"),
        ({"timesteps": [[1000.0], [500.0]]}, "timesteps must be a list of finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            s.set_timesteps(**options)
    s.set_timesteps(4)
    with pytest.raises(ValueError, match="no timestep 600 among the 4 entries where steps begin; the closest is 500"):
        s.step(STARTS, 600, STARTS)
    s = scheduler(solver="heun")
    s.set_timesteps(4)
    with pytest.raises(ValueError, match="one timestep for each item"):
        s.step(STARTS, torch.tensor([1000.0, 750.0, 500.0]), STARTS)
