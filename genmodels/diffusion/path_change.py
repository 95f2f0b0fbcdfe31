"""Sampling on another path than that of training: which paths can stand in for a denoiser's own."""

import torch

from .denoiser import Denoiser, OnSchedule
from .kinetic_schedule import KineticOptimal
from .schedules import Schedule

LEFT = 0.1  # largest α/σ at the end of a path that is started from noise alone


def moved(denoiser: Denoiser, schedule: Schedule | None) -> Denoiser:
    """The denoiser, asked along another path: x_t is rescaled to the state of the same log-SNR on its own (OnSchedule).

    All Gaussian paths have the same trajectories of the ODE up to time and scale: what changes is where steps of a
    solver fall, and what they are straight in. Samplers of denoisers (DDIM, DPM-Solver++, EDM's), whose steps depend on
    log-SNR alone, change by their grid only.

    Args:
        schedule: None for the denoiser's own.
    Raises:
        ValueError: if the path is one that training finds and no training has, or if it ends with less noise than
            sampling can start from.
    """
    if schedule is None:
        return denoiser
    if isinstance(schedule, KineticOptimal) and not schedule.fitted:
        raise ValueError(
            "schedule: 'kinetic_optimal' is found from data in training, and this one was not. Train a model on it and "
            "give the table that its run keeps: schedule={name: tabulated, file: runs/<run>/prepare/kinetic_path.csv}."
        )
    found = OnSchedule(denoiser, schedule)
    own, other = (_left(s, t) for s, t in ((denoiser.schedule, denoiser.t_max), (schedule, found.t_max)))
    if other > max(LEFT, own):
        raise ValueError(
            f"schedule: the path ends at α/σ = {other:.3g}, and samples start from noise without any of an item. At "
            f"most {LEFT:g} of it may be left: give a path that goes on to more noise."
        )
    return found


def _left(schedule: Schedule, t: float) -> float:
    """α/σ at a time."""
    alpha, sigma = schedule.scales(torch.tensor(t, dtype=torch.float64))
    return float(alpha / sigma)
