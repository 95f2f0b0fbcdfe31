"""A model of one path that is sampled on another: the same items of the same seeds, and paths that cannot be."""

import pytest
import torch

from genmodels.diffusion.grids import LogSNR, TimeGrid
from genmodels.diffusion.kinetic_schedule import KineticOptimal
from genmodels.diffusion.schedules import EDM, Cosine, Linear, Trigonometric, VarianceExploding, VariancePreserving
from genmodels.diffusion.tabulated import Tabulated
from genmodels.rng import SeedNoise
from genmodels.solvers.edm import EDMHeun
from genmodels.solvers.exponential import DPMpp
from genmodels.solvers.runge_kutta import RK4, Euler
from tests.oracles import GAUSSIAN, probability_flow
from tests.unit.test_diffusion import oracle

PATHS = (Linear(), Trigonometric(), VariancePreserving(), Cosine(), EDM())


def test_the_same_noise_becomes_the_same_item_on_every_path():
    """The exact map of Gaussian data between the two ends of each path, from the noise of the seeds."""
    z = SeedNoise(torch.arange(6)).normal(2, dtype=torch.float64)
    for own, prediction, others in (("linear", "velocity", PATHS[2:]), ("edm", "edm", PATHS[:2])):
        model = oracle(GAUSSIAN, prediction, own)
        ends = model.schedule.log_snr(torch.tensor(model.span(), dtype=torch.float64))
        for schedule in others:
            found = model.sample(6, num_steps=30, solver=RK4(), grid=LogSNR(), schedule=schedule)
            to, start = (tuple(map(float, schedule.scales(t))) for t in schedule.time(ends))
            expected = probability_flow(GAUSSIAN, start[1] * z, start, to)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3, msg=f"{own} on {schedule.registered_name}")


class Levels(TimeGrid):
    """The times of some log-SNRs."""

    def __init__(self, log_snr):
        self.log_snr = log_snr

    def nodes(self, count, schedule, span):
        return schedule.time(self.log_snr)


def test_steps_of_denoising_solvers_depend_on_the_noise_levels_alone():
    """At equal σ/α they make one item of all paths, in units of √(α² + σ²); Euler's steps in t do not."""
    model, grid = oracle(GAUSSIAN), Levels(torch.linspace(5, -5, 5, dtype=torch.float64))

    def drawn(solver, schedule):
        radius = torch.hypot(*(schedule or model.schedule).scales((schedule or model.schedule).time(grid.log_snr[0])))
        return model.sample(4, num_steps=4, solver=solver, grid=grid, schedule=schedule) / radius

    for schedule in PATHS[1:]:
        for solver in (DPMpp(), EDMHeun()):
            torch.testing.assert_close(drawn(solver, schedule), drawn(solver, None), rtol=0, atol=1e-9)
        assert (drawn(Euler(), schedule) - drawn(Euler(), None)).abs().max() > 1e-2


def test_paths_that_cannot_stand_in_are_refused():
    model = oracle(GAUSSIAN, "velocity", "linear")
    with pytest.raises(ValueError, match=r"found from data in training.*prepare/kinetic_path\.csv"):
        model.sample(2, num_steps=2, schedule=KineticOptimal())
    short = Tabulated(times=(0.0, 0.5, 1.0), alpha=(1.0, 0.7, 0.5), sigma=(0.0, 0.7, 0.86))
    with pytest.raises(ValueError, match=r"ends at α/σ = 0\.581"):
        model.sample(2, num_steps=2, schedule=short)
    model.sample(2, num_steps=2, schedule=VarianceExploding(sigma_max=11.0))
    with pytest.raises(ValueError, match=r"ends at α/σ = 0\.111"):
        model.sample(2, num_steps=2, schedule=VarianceExploding(sigma_max=9.0))
