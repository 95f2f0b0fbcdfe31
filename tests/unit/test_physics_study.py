"""The study of physical processes: its runs resolve, and its references give errors that are known beforehand."""

import pytest
import torch

from evals.studies import physics
from genmodels.processes.physics import TrappedParticles


def test_every_method_is_a_configuration_with_a_name_of_its_own():
    found = {p: [physics.config(p, m, 100) for m in methods] for p, methods in physics.METHODS.items()}
    names = [c.tree["name"] for configs in found.values() for c in configs]
    assert len(set(names)) == len(names) == 12
    exact = [c.tree["model"]["process"]["exact"] for c in found["trapped_particles"]]
    assert exact == [False, False, True, False]
    assert (
        found["double_well"][0].tree["model"]["order"] == 0 and found["double_well"][2].tree["model"]["order"] == "ito"
    )


@pytest.mark.parametrize("process", physics.METHODS)
def test_no_score_at_all_has_the_error_one(process):
    assert physics.REFERENCES[process](lambda t, y: torch.zeros_like(y)) == pytest.approx([1.0] * 4, abs=1e-12)


def test_the_exact_score_of_trapped_particles_has_no_error():
    """By modes: about their mean the variance is s² e^{-2rt} + T (1 - e^{-2rt})/r, r = k + κ, and of their mean r = k;
    the mean follows the trap by an ODE with the solution below (k = 1, ω = 2, R = 1)."""
    mean, deviation = physics.START["trapped_particles"]
    process = TrappedParticles(shape=(4, 1))
    slow, fast = process.stiffness, process.stiffness + process.attraction

    def score(t: float, y: torch.Tensor) -> torch.Tensor:
        t = torch.tensor(t, dtype=torch.float64)
        followed = ((2 * t).cos() + 2 * (2 * t).sin()) / 5
        centre = followed + torch.exp(-t) * (mean - 0.2)
        variances = [
            deviation**2 * torch.exp(-2 * r * t) - process.temperature * torch.expm1(-2 * r * t) / r
            for r in (slow, fast)
        ]
        average = y.mean(1, keepdim=True)
        return -(average - centre) / variances[0] - (y - average) / variances[1]

    assert max(physics.trapped_errors(score)) < 1e-20


def test_the_published_table_has_the_methods_in_order():
    text = (physics.RESULTS / "physics.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    made = [f"{p.replace('_', ' ')}, {m}" for p, methods in physics.METHODS.items() for m in methods]
    assert rows == [name for name in made if name in rows] and len(rows) >= len(made) - 1
