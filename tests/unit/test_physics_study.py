"""The study of physical processes: its runs resolve, and its references are the scores of laws that are known."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor

from evals.studies import physics, physics_references
from genmodels.processes.local_kernels import local_kernel
from genmodels.processes.physics import Kuramoto, Swimmer, TrappedParticles


def test_every_method_is_a_configuration_with_a_name_of_its_own():
    found = {p: [physics.config(p, m, 100) for m in methods] for p, methods in physics.METHODS.items()}
    names = [c.tree["name"] for configs in found.values() for c in configs]
    assert len(set(names)) == len(names) == 20
    exact = [c.tree["model"]["process"]["exact"] for c in found["trapped_particles"]]
    assert exact == [False, False, True, False]
    orders = {p: [c.tree["model"].get("order") for c in configs] for p, configs in found.items()}
    assert orders["double_well"][:3] == orders["kuramoto"][:3] == [0, 1, "ito"]
    assert orders["swimmer"][:2] == [1, 1] and found["swimmer"][-1].tree["model"]["objective"] == "ism"


@pytest.mark.parametrize("process", ["double_well", "trapped_particles"])
def test_no_score_at_all_has_the_error_one(process):
    found = [r.error(lambda t, y: torch.zeros_like(y)) for r in physics.REFERENCES[process]()]
    assert found == pytest.approx([1.0] * 4, abs=1e-12)


def test_the_exact_score_of_trapped_particles_has_no_error():
    """By modes: about their mean the variance is s² e^{-2rt} + T (1 - e^{-2rt})/r, r = k + κ, and of their mean r = k;
    the mean follows the trap by an ODE with the solution below (k = 1, ω = 2, R = 1)."""
    mean, deviation = physics.START["trapped_particles"]
    process = TrappedParticles(shape=(4, 1))
    slow, fast = process.stiffness, process.stiffness + process.attraction

    def score(t: float, y: Tensor) -> Tensor:
        t = torch.tensor(t, dtype=torch.float64)
        followed = ((2 * t).cos() + 2 * (2 * t).sin()) / 5
        centre = followed + torch.exp(-t) * (mean - 0.2)
        variances = [
            deviation**2 * torch.exp(-2 * r * t) - process.temperature * torch.expm1(-2 * r * t) / r
            for r in (slow, fast)
        ]
        average = y.mean(1, keepdim=True)
        return -(average - centre) / variances[0] - (y - average) / variances[1]

    assert max(r.error(score) for r in physics_references.trapped_particles()) < 1e-20


class LinearRotors(Kuramoto):
    """The rotors with d in place of sin d."""

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        apart = torch.stack([v - y for v in self.neighbours(y)])
        return super().force(u, y) + self.coupling * (apart - apart.sin()).sum(0)


class LinearSwimmer(Swimmer):
    """The swimmer with 1.5 x in place of x³."""

    def force(self, u: Tensor, y: Tensor) -> Tensor:
        x = y[:, 0]
        return super().force(u, y) + torch.stack((x**3 - 1.5 * x, torch.zeros_like(x)), -1)


def gaussian_score(matrix: list, shift: list, noise: list, start: tuple[float, float]):
    """∇ log p of dy = (M y + b) dt + √q dW, by the exponential of the equations of its moments.

    m(t) = e^{Mt} (m₀ + M⁻¹ b) - M⁻¹ b by the augmented matrix, and P' = M P + P Mᵀ + diag q as a linear system for P.
    """
    m, b, n = np.array(matrix), np.array(shift), len(shift)
    grown = np.zeros((n + 1, n + 1))
    grown[:n, :n], grown[:n, n] = m, b
    lifted = np.zeros((n * n + 1, n * n + 1))
    lifted[:-1, :-1], lifted[:-1, -1] = np.kron(m, np.eye(n)) + np.kron(np.eye(n), m), np.diag(noise).flatten()

    def score(t: float, y: Tensor) -> Tensor:
        mean = (expm(grown * t) @ np.array([start[0]] * n + [1.0]))[:n]
        covariance = (expm(lifted * t) @ np.append(start[1] ** 2 * np.eye(n), 1.0))[:-1].reshape(n, n)
        return (torch.from_numpy(mean) - y) @ torch.from_numpy(np.linalg.inv(covariance))

    return score


def test_the_reference_of_rotors_is_the_gaussian_score_where_their_pull_is_linear():
    """On the line, K = ½, ω = 1, q = 2T = 1: the error of the grid is of order 2, and its square of order 4."""
    process, k = LinearRotors(coupling=0.5, frequency=1.0, shape=(3,)), 0.5
    pull = [[-2 * k, k, k], [k, -2 * k, k], [k, k, -2 * k]]
    exact = gaussian_score(pull, [1, 1, 1], [1, 1, 1], physics.START["kuramoto"])
    rough, fine = ([r.error(exact) for r in physics_references.kuramoto(process, n)] for n in (40, 80))
    assert max(fine) < 3e-4 and all(a > 10 * b for a, b in zip(rough, fine, strict=True)), (rough, fine)


def test_the_reference_of_the_swimmer_is_the_gaussian_score_where_its_trap_is_linear():
    """γ = D = 1, on cells 0.06 by 0.2 wide: the score's error is 3 %, its square 1e-3."""
    process = LinearSwimmer(friction=1.0, shape=(2,))
    exact = gaussian_score([[-1.5, 1], [0, -1]], [0, 0], [0, 2], physics.START["swimmer"])
    assert max(r.error(exact) for r in physics_references.swimmer(process, (80, 60))) < 1e-3


def test_processes_of_the_study_pull_as_their_docstrings_say():
    """The linear cases keep all of the forces but what they replace, which is compared here."""
    y, u = torch.tensor([[0.3, -1.1, 2.0]], dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    a, b, c = y[0].tolist()
    pulls = [[1 + math.sin(v - w) + math.sin(z - w) for v, w, z in ((b, a, c), (a, b, c), (a, c, b))]]
    torch.testing.assert_close(physics_references.made("kuramoto").force(u, y), torch.tensor(pulls).double())
    swum = physics_references.made("swimmer").force(u, y[:, 1:])
    torch.testing.assert_close(swum, torch.tensor([[c + 1.1**3, -c]], dtype=torch.float64))


def test_order_one_of_the_swimmer_has_all_of_itos_term():
    """Which is why the study has no row of its own for it: the force bends along x, where no noise is."""
    process, zero = physics_references.made("swimmer"), torch.zeros(2, dtype=torch.float64)
    y = torch.tensor([[0.5, 1.0], [-1.3, 0.2]], dtype=torch.float64)
    first, ito = (local_kernel(process, zero, zero + 0.2, y, order) for order in (1, "ito"))
    assert torch.equal(first.mean, ito.mean) and torch.equal(first.covariance, ito.covariance)
    assert float(process.jacobian(zero[0], y)[0, 0, 0]) == -0.75  # -3x², so that the force does bend


def shared(rough: physics_references.Reference, fine: physics_references.Reference) -> float:
    """The error of a score on cells a third as wide, at the centres that both have."""
    places = [(1e6 * r.points).round().long().flatten(1).tolist() for r in (rough, fine)]
    rows = {tuple(v): k for k, v in enumerate(places[1])}
    known = [(k, rows[tuple(v)]) for k, v in enumerate(places[0]) if tuple(v) in rows]
    here, there = torch.tensor(known).unbind(1)
    assert rough.weights[here].sum() > 0.999
    score = rough.score.index_copy(0, here, fine.score[there])
    return rough.error(lambda t, y: score)


@pytest.mark.slow
def test_references_agree_with_those_of_other_cells():
    """Cells a third as wide change squares of scores by less than 1e-4, where networks of the study miss some 1e-2.

    Along x it is cells three times as wide that differ by 2e-3: a ninth of it, or less, is left of order 1 or higher.
    """
    rotors = [physics_references.kuramoto(cells=n) for n in (120, 360)]
    swimmers = [physics_references.swimmer(cells=n) for n in ((210, 90), (210, 270), (70, 90))]
    found = {
        "rotors": [shared(*pair) for pair in zip(*rotors, strict=True)],
        "along v": [shared(*pair) for pair in zip(*swimmers[:2], strict=True)],
        "along x": [shared(*pair) for pair in zip(swimmers[2], swimmers[0], strict=True)],
    }
    assert max(found["rotors"] + found["along v"]) < 1e-4, found
    assert max(found["along x"]) < 2e-3, found


def test_the_published_table_has_the_methods_in_order():
    text = (physics.RESULTS / "physics.md").read_text()
    rows = [line.split("|")[1].strip() for line in text.splitlines()[2:]]
    assert rows == [f"{p.replace('_', ' ')}, {m}" for p, methods in physics.METHODS.items() for m in methods]
