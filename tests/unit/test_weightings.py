"""Conversions of predictions at given scales, weightings by their formulas, and the learnt uncertainty."""

import itertools

import pytest
import torch

from genmodels.diffusion.parametrization import determinant, target, to_clean_and_noise
from genmodels.diffusion.schedules import Scales, Schedule, VariancePreserving
from genmodels.diffusion.weightings import Uncertainty, Weighting
from genmodels.registry import ConfigError, build, names
from genmodels.types import Batch
from tests.contracts.test_denoiser import PREDICTIONS, number, randn, weight
from tests.oracles import SCHEDULES
from tests.unit.test_diffusion import make, seeded


def test_round_trips_at_given_scales():
    """Α = .8, σ = .6, α' = -.9, σ' = 1.3, x = .5, ε = -.25, so x_t = .25: every pair of predictions."""
    s = Scales(*map(number, (0.8, 0.6, -0.9, 1.3)))
    x, eps, x_t = number(0.5).reshape(1, 1), number(-0.25).reshape(1, 1), number(0.25).reshape(1, 1)
    for first, second in itertools.product(PREDICTIONS, PREDICTIONS):
        found = to_clean_and_noise(first, target(first, x, eps, s, 0.7), x_t, s, 0.7)
        again = to_clean_and_noise(second, target(second, *found, s, 0.7), x_t, s, 0.7)
        for pair in (found, again):
            assert (pair.x - x).abs() < 1e-14 and (pair.eps - eps).abs() < 1e-14, (first, second)
    for name, value in {"x": -0.6, "eps": 0.8, "v": 1.0, "velocity": 1.58, "score": -0.8 / 0.6}.items():
        assert abs(determinant(name, s).item() - value) < 1e-15


def test_the_weight_of_one_on_each_prediction():
    """error_of, as a weight on the item and on its own prediction, for every schedule."""
    for name in names(Schedule):
        s = build(Schedule, SCHEDULES.get(name, name))(torch.tensor([0.1, 0.5, 0.9]))
        snr, rate = (s.alpha / s.sigma) ** 2, 2 * (s.dalpha / s.alpha - s.dsigma / s.sigma)
        expected = {
            "x": torch.ones(3).double(),
            "eps": snr,
            "v": (s.alpha**2 + s.sigma**2) ** 2 / s.sigma**2,
            "velocity": (s.alpha * rate / 2) ** 2,
            "score": snr / s.sigma**2,
            "edm": snr + 0.7**-2,
        }
        for prediction, on_clean in expected.items():
            node = {"name": "error_of", "prediction": prediction}
            torch.testing.assert_close(weight(node, "x", s), on_clean, rtol=1e-10, atol=0)
            torch.testing.assert_close(weight(node, prediction, s), torch.ones(3).double(), rtol=1e-10, atol=0)


def test_perception_prioritized_weights():
    s = VariancePreserving()(torch.tensor([0.1, 0.5, 0.9]))
    snr = (s.alpha / s.sigma) ** 2
    # 1/(k + S)^γ on the error of ε̂
    for gamma, k in ((0.5, 1.0), (1.0, 2.0)):
        found = weight({"name": "p2", "gamma": gamma, "k": k}, "eps", s)
        torch.testing.assert_close(found, (k + snr) ** -gamma, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight({"name": "p2", "gamma": 0.0}, "x", s), weight("snr", "x", s), rtol=1e-12, atol=0)
    for node in ({"name": "p2", "gamma": -1.0}, {"name": "p2", "k": 0.0}):
        with pytest.raises(ConfigError, match="gamma >= 0 and k > 0"):
            build(Weighting, node)


def test_the_learnt_uncertainty_is_the_logarithm_of_the_error():
    """Errors given at eight noise levels: the minimum of w e/e^u + u is at u = log(w e), and its value 1 + u."""
    learnt, s = build(Weighting, "uncertainty"), VariancePreserving()(torch.linspace(0.02, 0.98, 8))
    learnt.double()
    error = torch.tensor([0.9, 0.5, 0.31, 0.2, 0.18, 0.3, 0.6, 2.0], dtype=torch.float64)
    one = torch.ones(8, dtype=torch.float64)
    given = ("x", s, one, 0.5)
    plain = build(Weighting, "edm").loss(error, *given)
    torch.testing.assert_close(learnt.loss(error, *given).detach(), plain)  # where u = 0
    optimizer = torch.optim.LBFGS(
        learnt.parameters(), max_iter=400, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = learnt.loss(error, *given).mean()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(learnt.log_error(s).detach(), plain.log(), rtol=0, atol=1e-5)
    torch.testing.assert_close(learnt.loss(error, *given).detach(), 1 + plain.log(), rtol=0, atol=1e-5)
    # the network sees its errors divided by what they were
    torch.testing.assert_close((learnt(*given) * error).detach(), one, rtol=0, atol=1e-5)


def test_the_learnt_uncertainty_is_a_sum_of_cosines_of_unit_variance():
    """In log(σ/α)/4, at which frequencies 2π N(0, 1) are meant to be seen."""
    learnt, s = Uncertainty(features=64).double(), Scales(*map(number, (0.8, 0.6, -0.9, 1.3)))
    with torch.no_grad():
        learnt.factors.copy_(torch.linspace(-1, 1, 64))
        found = learnt.log_error(s)
    angles = learnt.frequencies * torch.tensor(0.6 / 0.8).double().log() / 4 + learnt.phases
    expected = (learnt.factors * angles.cos() * 2**0.5).sum() / 8
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
    even = torch.linspace(0, 2 * torch.pi, 64 + 1)[:-1]
    assert learnt.phases.sort().values == pytest.approx(even, abs=0.2)


def test_a_learnt_weighting_is_part_of_its_model():
    model = make((2,), weighting={"name": "uncertainty", "weighting": "snr", "features": 4}, moved=0.0)
    assert [n for n in model.state_dict() if n.startswith("weighting.")] == ["weighting.factors"]
    batch, plain = Batch(randn(16, 2)), make((2,), weighting="snr", moved=0.0)
    (first, second) = (m.loss(batch, generator=seeded(3)).value for m in (model, plain))
    torch.testing.assert_close(first.detach(), second.detach())
    first.mean().backward()
    assert model.weighting.factors.grad.abs().min() > 0
    with torch.no_grad():
        model.weighting.factors.copy_(torch.tensor([0.3, -0.2, 0.1, 0.4]))
    t = model.times.sample(_noise(), model.schedule, (0.0, 1.0))
    u = model.weighting.log_error(model.schedule(t))
    torch.testing.assert_close(model.loss(batch, generator=seeded(3)).value, second.detach() / u.exp() + u)
    with pytest.raises(ConfigError, match="not learnt itself"):
        Uncertainty(Uncertainty())
    with pytest.raises(ConfigError, match="features"):
        build(Weighting, {"name": "uncertainty", "features": 0})


def _noise():
    from genmodels.rng import BatchNoise

    return BatchNoise(16, generator=seeded(3))
