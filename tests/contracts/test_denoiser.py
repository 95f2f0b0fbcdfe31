"""Predictions, weightings and denoisers against closed forms: Gaussian and mixture data have exact answers."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from genmodels.diffusion.denoiser import Denoiser, Guided, OnSchedule, Preconditioned
from genmodels.diffusion.parametrization import (
    Target,
    coefficients,
    determinant,
    domain,
    target,
    to_clean_and_noise,
)
from genmodels.diffusion.schedules import EDM, Linear, Scales, Schedule, Trigonometric, VariancePreserving
from genmodels.diffusion.times import TimeLaw
from genmodels.diffusion.weightings import CleanWeighting, Weighting
from genmodels.distributions import GaussianMixture
from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build, names
from genmodels.solvers.base import integrate
from genmodels.solvers.runge_kutta import RK4, Euler, Heun
from genmodels.types import expand_like
from tests.oracles import MIXTURE, MIXTURE_3D, gaussian
from tests.oracles import SCHEDULES as PATHS

PREDICTIONS: tuple[Target, ...] = ("x", "eps", "velocity", "v", "score", "edm")
SCHEDULES = names(Schedule)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
LINE = gaussian(torch.tensor([1.5]), torch.tensor([0.25]))
# .3 N(-1, .3²) + .7 N(1, .5²)
TWO = GaussianMixture(((-1.0,), (1.0,)), ((0.09,), (0.25,)), (0.3, 0.7), shape=(1,))


def path(name: str) -> Schedule:
    return build(Schedule, PATHS.get(name, name))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Oracle(Network):
    """The exact conditional expectation of a prediction under a mixture, in place of a trained network.

    Label k shifts the clean item by `shift * k`, the label 3 ("none") by nothing, so that conditions matter. Under
    preconditioning it undoes the input scale and takes its time from the label.
    """

    def __init__(
        self, law: GaussianMixture, schedule: Schedule, prediction: Target, sigma_data: float = 1.0, shift: float = 0.0
    ) -> None:
        super().__init__()
        self.law, self.schedule, self.prediction = law, schedule, prediction
        self.sigma_data, self.shift, self.rows = sigma_data, shift, []

    def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        if self.prediction == "edm":
            t = self.schedule.time(-8 * t)
            alpha, sigma = self.schedule.scales(t)
            x = x.double() * expand_like(torch.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2), x)
        s = self.schedule(t)
        shift = 0.0
        if condition is not None and self.shift:
            shift = expand_like(self.shift * torch.where(condition == 3, 0, condition).double(), x)
        moved = x.double() - expand_like(s.alpha, x) * shift
        clean, eps = self.law.denoiser(moved, s.alpha, s.sigma) + shift, self.law.eps(moved, s.alpha, s.sigma)
        return target(self.prediction, clean, eps, s, self.sigma_data)


def exact(
    law: GaussianMixture, schedule: Schedule, prediction: Target, sigma_data: float = 0.7, shift: float = 0.0
) -> Denoiser:
    network = Oracle(law, schedule, prediction, sigma_data, shift)
    if prediction == "edm":
        return Preconditioned(network, schedule, sigma_data)
    return Denoiser(network, schedule, prediction, sigma_data)


def times(denoiser: Denoiser, n: int) -> Tensor:
    return torch.linspace(denoiser.t_min, denoiser.t_max, n + 2, dtype=torch.float64)[1:-1]


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_conversions_by_hand():
    """Α = .8, σ = .6, α' = -.9, σ' = 1.3, x = .5, ε = -.25."""
    s = Scales(*map(number, (0.8, 0.6, -0.9, 1.3)))
    x, eps = number(0.5), number(-0.25)
    expected = {"x": 0.5, "eps": -0.25, "velocity": -0.775, "v": -0.5, "score": 0.25 / 0.6}
    for name, value in expected.items():
        assert abs(target(name, x, eps, s) - value) < 1e-15
    assert abs(determinant("velocity", s) - 1.58) < 1e-15


@every_schedule
@pytest.mark.parametrize(("first", "second"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_all_predictions_say_the_same(name, first, second):
    """Any prediction -> x̂, ε̂ -> any other -> x̂, ε̂, on items of shape (3, 2, 4) with a time for each."""
    schedule = path(name)
    t = torch.tensor([0.02, 0.3, 0.6, 0.98], dtype=torch.float64)
    s, x, eps = schedule(t), randn(4, 3, 2, 4, seed=1), randn(4, 3, 2, 4, seed=2)
    x_t = expand_like(s.alpha, x) * x + expand_like(s.sigma, x) * eps
    p = target(first, x, eps, s, 0.7)
    found = to_clean_and_noise(first, p, x_t, s, 0.7)
    again = to_clean_and_noise(second, target(second, *found, s, 0.7), x_t, s, 0.7)
    # a conversion divides by the smaller of two scales, whose ratio the times keep above 1e-5
    for estimate in (found, again):
        torch.testing.assert_close(estimate.x, x, rtol=0, atol=1e-9)
        torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=1e-9)


@every_prediction
def test_what_was_predicted_comes_back_bit_for_bit(prediction):
    s = VariancePreserving()(torch.tensor([1e-5, 0.5, 1.0]))
    p, x_t = randn(3, 5).float(), randn(3, 5, seed=1).float()
    found = to_clean_and_noise(prediction, p, x_t, s)
    if prediction == "x":
        assert torch.equal(found.x, p)
    if prediction == "eps":
        assert torch.equal(found.eps, p)
    if prediction == "score":  # one factor, no difference
        torch.testing.assert_close(found.eps, -expand_like(s.sigma, p).float() * p, rtol=2e-7, atol=0)
    assert found.x.dtype == torch.float32


@every_schedule
def test_edm_row_is_the_published_one(name):
    """x̂ = c_skip x_t/α + c_out F with r = σ/α and s the scale of the data, wherever that is not 0/0."""
    s, scale = path(name)(torch.tensor([0.05, 0.4, 0.9])), 0.5
    r = s.sigma / s.alpha
    skip, out = scale**2 / (r**2 + scale**2), r * scale / (r**2 + scale**2).sqrt()
    x, eps = randn(3, seed=1), randn(3, seed=2)
    x_t = s.alpha * x + s.sigma * eps
    f = (x - skip * x_t / s.alpha) / out
    torch.testing.assert_close(target("edm", x, eps, s, scale), f, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_clean_and_noise("edm", f, x_t, s, scale).x, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["vp", "trigonometric", "cosine"])
def test_edm_is_minus_v_at_unit_variance(name):
    s = path(name)(torch.linspace(1e-5, 1, 9, dtype=torch.float64))
    for f, v in zip(coefficients("edm", s, 1.0), coefficients("v", s), strict=True):
        torch.testing.assert_close(f, -v, rtol=0, atol=1e-15)


def test_predictions_know_where_they_end():
    linear = Linear()
    start, end = linear(torch.tensor(0.0)), linear(torch.tensor(1.0))
    p, x_t = randn(2, 3), randn(2, 3, seed=1)
    for prediction, scales in (("x", start), ("eps", end), ("score", start), ("score", end)):
        with pytest.raises(ValueError, match=f"'{prediction}' does not determine"):
            to_clean_and_noise(prediction, p, x_t, scales)
    for prediction, scales in itertools.product(("velocity", "v", "edm"), (start, end)):
        found = to_clean_and_noise(prediction, p, x_t, scales)
        # the state is the item at the start and the noise at the end
        torch.testing.assert_close(found.x if scales is start else found.eps, x_t, rtol=0, atol=1e-15)
        assert found.x.isfinite().all() and found.eps.isfinite().all()
    with pytest.raises(ValueError, match=r"no prediction 'epsilon'.*eps"):
        coefficients("epsilon", start)


@every_schedule
@every_prediction
def test_domains_keep_a_digit_of_every_scale(name, prediction):
    schedule = path(name)
    first, last = domain(prediction, schedule)
    assert schedule.t_min <= first < 0.01 and 0.99 < last <= schedule.t_max
    s = schedule(torch.tensor([first, last], dtype=torch.float64))
    assert (determinant(prediction, s).isfinite() & (determinant(prediction, s) != 0)).all()
    if prediction in ("x", "score", "edm"):
        assert s.sigma[0] / s.alpha[0] > 0.999e-3
    if prediction in ("eps", "score", "edm"):
        assert s.alpha[1] / s.sigma[1] > 0.999e-3
    if prediction in ("velocity", "v"):
        assert (first, last) == (schedule.t_min, schedule.t_max)


# ---- weightings ------------------------------------------------------------------------------------------------------


def weight(node: str | dict, prediction: Target, s: Scales, sigma_data: float = 0.7) -> Tensor:
    return build(Weighting, node)(prediction, s, torch.ones_like(s.alpha), sigma_data)


@every_schedule
@pytest.mark.parametrize("weighting", names(Weighting))
def test_a_weighted_loss_does_not_depend_on_what_is_predicted(name, weighting):
    """w |p̂ - p|² is the same number for every prediction of one and the same denoiser."""
    s = path(name)(torch.tensor([0.1, 0.5, 0.9]))
    x, eps, wrong = randn(3, 4, seed=1), randn(3, 4, seed=2), randn(3, 4, seed=3)
    x_t = expand_like(s.alpha, x) * x + expand_like(s.sigma, x) * eps
    # another denoiser: x̂ = wrong, ε̂ what is left of x_t
    other = (x_t - expand_like(s.alpha, x) * wrong) / expand_like(s.sigma, x)
    losses = []
    for prediction in PREDICTIONS:
        error = target(prediction, wrong, other, s, 0.7) - target(prediction, x, eps, s, 0.7)
        losses.append(weight(weighting, prediction, s) * error.square().sum(1))
    if weighting == "uniform":
        assert (losses[0] - losses[1]).abs().max() > 1
        losses = losses[:1]
    for loss in losses:
        torch.testing.assert_close(loss, losses[0], rtol=1e-8, atol=1e-12)


@every_schedule
def test_known_weights(name):
    s = path(name)(torch.tensor([0.1, 0.5, 0.9]))
    snr, one, scale = (s.alpha / s.sigma) ** 2, torch.ones(3, dtype=torch.float64), 0.7
    close = {"rtol": 1e-10, "atol": 0.0}
    torch.testing.assert_close(weight("snr", "x", s), snr, **close)
    torch.testing.assert_close(weight("snr", "eps", s), one, **close)
    torch.testing.assert_close(weight("edm", "edm", s), one, **close)
    torch.testing.assert_close(weight("edm", "x", s), snr + scale**-2, **close)
    # 1/c_out² with EDM's own σ = σ/α
    r = s.sigma / s.alpha
    torch.testing.assert_close(weight("edm", "x", s), (r**2 + scale**2) / (r * scale) ** 2, **close)
    torch.testing.assert_close(weight("min_snr", "x", s), snr.clamp(max=5.0), **close)
    torch.testing.assert_close(weight("min_snr", "eps", s), snr.clamp(max=5.0) / snr, **close)
    torch.testing.assert_close(weight("uniform", "velocity", s), one, **close)
    if name in ("vp", "trigonometric", "cosine"):
        torch.testing.assert_close(weight("min_snr", "v", s), snr.clamp(max=5.0) / (snr + 1), **close)
    with pytest.raises(ConfigError, match="gamma"):
        build(Weighting, {"name": "min_snr", "gamma": -1.0})


def test_uniform_weight_on_each_answer_as_a_weight_on_the_item():
    """W = (Δ/σ)²: x 1, eps S, v (α² + σ²)²/σ², velocity (α λ'/2)², score α²/σ⁴."""
    s = VariancePreserving()(torch.tensor([0.1, 0.5, 0.9]))
    rate = 2 * (s.dalpha / s.alpha - s.dsigma / s.sigma)  # λ'
    expected = {
        "x": torch.ones(3).double(), "eps": (s.alpha / s.sigma) ** 2, "v": 1 / s.sigma**2,
        "velocity": (s.alpha * rate / 2) ** 2, "score": s.alpha**2 / s.sigma**4,
    }  # fmt: skip
    for prediction, value in expected.items():
        torch.testing.assert_close((determinant(prediction, s) / s.sigma) ** 2, value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("weighting", ["elbo", "sigmoid"])
def test_integral_weightings_do_not_depend_on_path_or_times(weighting):
    """E_t[w |ε̂ - ε|²] between two log-SNRs is ½ ∫ w(λ) e(λ) dλ; here e is a function of λ alone."""
    ends = torch.tensor([3.0, -4.0], dtype=torch.float64)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    lam = ends[1] + (ends[0] - ends[1]) * u
    factor = torch.sigmoid(2 - lam) if weighting == "sigmoid" else torch.ones_like(lam)
    expected = float((factor * torch.cos(lam) ** 2).mean()) * 7 / 2
    for name, law_name in itertools.product(("linear", "vp", "trigonometric", "cosine"), names(TimeLaw)):
        schedule, law = path(name), build(TimeLaw, law_name)
        span = tuple(schedule.time(ends).tolist())
        low, high = law.cdf(torch.tensor(span).double(), schedule)
        t = law.quantile(low + (high - low) * u, schedule)  # the midpoint rule in place of luck
        w = build(Weighting, weighting)("eps", schedule(t), law.density(t, schedule, span))
        found = (w * torch.cos(schedule.log_snr(t)) ** 2).mean()
        assert abs(float(found) / expected - 1) < 1e-3, (name, law_name)


def test_the_elbo_weighting_gives_the_relative_entropy():
    """For Gaussian data and a denoiser for another Gaussian, ½ ∫ (E|ε̂-ε|² - E|ε̂*-ε|²) dλ = KL(data ‖ other)."""
    v, w, m = 0.25, 0.6, 0.4  # data N(0, v), the denoiser believes N(m, w)
    lam = torch.linspace(-60, 60, 120_001, dtype=torch.float64)
    snr = lam.exp()
    # at α² = S/(1+S), σ² = 1/(1+S): ε̂ = σ (x_t - α m)/(α² w + σ²)
    a2, s2 = torch.sigmoid(lam), torch.sigmoid(-lam)
    gain = s2.sqrt() / (a2 * w + s2)
    error = (gain * s2.sqrt() - 1) ** 2 + gain**2 * a2 * (v + m**2)
    best = a2 * v / (a2 * v + s2)
    kl = 0.5 * (v / w + m**2 / w - 1 - math.log(v / w))
    assert snr.isfinite().all()
    assert abs(0.5 * float(torch.trapezoid(error - best, lam)) - kl) < 1e-6


def test_weightings_on_the_item_are_positive():
    """They are those of a network that predicts the item itself: σ/Δ is -1 there."""
    for name in names(Weighting):
        weighting = build(Weighting, name)
        if isinstance(weighting, CleanWeighting):
            s = Linear()(torch.tensor([1e-3, 0.5, 1 - 1e-3]))
            found = weighting.on_clean(s, torch.ones(3).double(), 0.7)
            assert (found > 0).all() and found.isfinite().all() and found.dtype == torch.float64
            assert torch.equal(found, weighting("x", s, torch.ones(3).double(), 0.7))


# ---- denoisers -------------------------------------------------------------------------------------------------------


@every_schedule
@every_prediction
def test_exact_networks_give_exact_denoisers(name, prediction):
    """Mixture data: item, noise, velocity and score whatever the network predicts, with a time for each row."""
    denoiser = exact(MIXTURE_3D, path(name), prediction)
    t, x = times(denoiser, 7), randn(7, 3)
    s = denoiser.schedule(t)
    x = x * expand_like(torch.hypot(s.alpha, s.sigma), x)
    found = denoiser.predict(t, x)
    close = {"rtol": 1e-7, "atol": 1e-7}
    torch.testing.assert_close(found.x, MIXTURE_3D.denoiser(x, s.alpha, s.sigma), **close)
    torch.testing.assert_close(found.eps, MIXTURE_3D.eps(x, s.alpha, s.sigma), **close)
    torch.testing.assert_close(denoiser.score(t, x), MIXTURE_3D.score(x, s.alpha, s.sigma), **close)
    torch.testing.assert_close(denoiser(t, x), MIXTURE_3D.velocity(x, *s), **close)
    torch.testing.assert_close(denoiser.velocity(t[2], x), denoiser(t[2].expand(7), x), rtol=0, atol=0)


@every_prediction
def test_single_precision_agrees(prediction):
    denoiser = exact(MIXTURE, Linear(), prediction)
    t, x = torch.linspace(0.05, 0.95, 16), randn(16, 2)
    wide, narrow = denoiser(t, x), Denoiser.velocity(denoiser, t.float(), x.float())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4)


def test_gaussian_on_two_paths_by_hand():
    """N(1.5, .5²) at x = .4, t = .3 of vp; and of flow matching, where .3 is the noisy side."""
    x = torch.full((1, 1), 0.4, dtype=torch.float64)
    vp = exact(LINE, VariancePreserving(), "eps")
    t = number(0.3)
    clean, eps = vp.predict(t, x)
    found = [clean, eps, vp.score(t, x), vp.velocity(t, x)]
    for value, expected in zip(found, (1.37809329, -0.60180530, 0.77456410, -3.56480206), strict=True):
        assert abs(value.item() - expected) < 1e-7
    s = vp.schedule(t)
    v = target("v", clean, eps, s)
    assert abs(v.item() + 1.44958985) < 1e-7
    # f x - g²/2 score is the same velocity, with f = α'/α and g² = β for vp
    beta = 0.1 + 19.9 * 0.3
    assert abs(-0.5 * beta * 0.4 - 0.5 * beta * vp.score(t, x).item() - vp.velocity(t, x).item()) < 1e-12
    linear = exact(LINE, Linear(), "velocity")
    t = number(0.7)
    clean, eps = linear.predict(t, x)
    assert abs(clean.item() - 1.49268293) < 1e-8 and abs(eps.item() + 0.06829268) < 1e-8
    assert abs(linear.score(t, x).item() - 0.09756098) < 1e-8
    assert abs(-linear.velocity(t, x).item() - 1.56097561) < 1e-8  # u of the papers


def test_score_is_the_gradient_of_the_log_density():
    x = randn(5, 2).requires_grad_()
    t = number(0.4)
    s = Linear()(t)
    (gradient,) = torch.autograd.grad(MIXTURE.noised_log_prob(x, s.alpha, s.sigma).sum(), x)
    torch.testing.assert_close(exact(MIXTURE, Linear(), "velocity").score(t, x.detach()), gradient)
    with pytest.raises(ValueError, match="σ = 0"):
        exact(MIXTURE, Linear(), "velocity").score(number(0.0), x.detach())


def test_edm_sampler_reproduces_its_numbers():
    """Heun on σ from 80 with the last step to 0 by Euler, data N(0, .5²), x = 80."""
    law = gaussian(torch.tensor([0.0]), torch.tensor([0.25]))
    denoiser = exact(law, EDM(), "edm", sigma_data=0.5)

    def slope(sigma: Tensor, x: Tensor) -> Tensor:  # dx/dσ = ε̂
        return denoiser.predict(denoiser.schedule.time(-2 * sigma.log()), x).eps

    start, found = torch.full((1, 1), 80.0, dtype=torch.float64), {}
    for n, solver in ((10, Heun()), (18, Heun()), (36, Heun()), (72, Heun()), (-18, Euler())):
        sigma = denoiser.schedule.scales(torch.linspace(1, 0, abs(n), dtype=torch.float64))[1]
        x = integrate(slope, start, sigma, solver=solver).x
        found[n] = (x - sigma[-1] * slope(sigma[-1], x)).item()
    expected = {10: 0.60979800, 18: 0.52762464, 36: 0.50609709, 72: 0.50142563, -18: 0.42303144}
    for n, value in expected.items():
        assert abs(found[n] - value) < 1e-7, n
    assert 4 < (found[36] - 0.49999023) / (found[72] - 0.49999023) < 4.5


def test_preconditioning_gives_the_network_unit_variance_and_an_even_time():
    scale, seen = 0.5, []

    class Spy(Network):
        def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
            seen.append((t, x))
            return torch.zeros_like(x)

    denoiser = Preconditioned(Spy(), EDM(), scale)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    _, sigma = denoiser.schedule.scales(t)
    x, eps = scale * randn(4000, 1, 3).sign(), randn(4000, 1, 3, seed=1)
    x_t = x + sigma * (eps - eps.mean(0)) / eps.std(0)
    found = denoiser.predict(t, x_t[0].T)
    label, inputs = seen[0]
    torch.testing.assert_close(label, sigma.log() / 4)
    torch.testing.assert_close(inputs, x_t[0].T / (sigma**2 + scale**2).sqrt()[:, None])
    # a network that says nothing answers c_skip x_t
    torch.testing.assert_close(found.x, (scale**2 / (sigma**2 + scale**2))[:, None] * x_t[0].T)
    spread = (x_t / (sigma**2 + scale**2).sqrt()).std(0)
    assert (spread - 1).abs().max() < 0.05


# ---- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x", "eps", "velocity", "v", "edm"])
def test_guidance_is_linear_and_acts_on_every_prediction_alike(prediction):
    denoiser = exact(MIXTURE, VariancePreserving(), prediction, shift=0.4)
    none, labels = torch.tensor(3), torch.tensor([0, 1, 2, 1])
    t, x = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64), randn(4, 2)
    rows = denoiser.network.rows
    plain, free = denoiser.predict(t, x, labels), denoiser.predict(t, x, none.expand(4))
    for w in (-0.5, 0.0, 1.0, 2.5):
        rows.clear()
        guided = Guided(denoiser, w, none)
        found = guided.predict(t, x, labels)
        assert rows == [4 if w in (0, 1) else 8]
        for k in (0, 1):
            torch.testing.assert_close(found[k], free[k] + w * (plain[k] - free[k]), rtol=1e-9, atol=1e-9)
        whole = guided(t, x, labels)
        expected = denoiser.velocity(t, x, none.expand(4))
        expected = expected + w * (denoiser.velocity(t, x, labels) - expected)
        torch.testing.assert_close(whole, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(Guided(denoiser, 1.0, none)(t, x, labels), denoiser(t, x, labels))
    assert torch.equal(Guided(denoiser, 0.0, none)(t, x, labels), denoiser(t, x, none.expand(4)))
    torch.testing.assert_close(
        Guided(denoiser, 2.0, none)(t[1], x, labels), Guided(denoiser, 2.0, none)(t[1:2].expand(4), x, labels)
    )
    with pytest.raises(ValueError, match="guidance needs"):
        Guided(denoiser, 2.0, none)(t, x, None)


# ---- another path after training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "vp", "trigonometric", "cosine"])
@pytest.mark.parametrize("own", ["linear", "vp", "edm"])
def test_a_denoiser_of_one_path_serves_another(own, name):
    inner = exact(MIXTURE, path(own), "edm" if own == "edm" else "velocity")
    denoiser = OnSchedule(inner, path(name))
    t, x = times(denoiser, 8), randn(8, 2)
    s = denoiser.schedule(t)
    found = denoiser.predict(t, x)
    torch.testing.assert_close(found.x, MIXTURE.denoiser(x, s.alpha, s.sigma), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.eps, MIXTURE.eps(x, s.alpha, s.sigma), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(denoiser(t, x), MIXTURE.velocity(x, *s), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(denoiser.score(t, x), MIXTURE.score(x, s.alpha, s.sigma), rtol=1e-7, atol=1e-7)
    assert denoiser.schedule.t_min <= denoiser.t_min < 0.03 and 0.9 < denoiser.t_max <= denoiser.schedule.t_max


def test_the_flow_takes_the_same_noise_to_the_same_item_on_any_path():
    """The exact linear predictor along the trigonometric path, from Φ⁻¹(F(.3)) to .3."""
    latents = torch.tensor([[-0.36775635], [-1.43424240]], dtype=torch.float64)
    items = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    linear = exact(TWO, Linear(), "velocity")
    for denoiser in (linear, OnSchedule(linear, Trigonometric())):
        grid = torch.linspace(1, 0, 101, dtype=torch.float64)
        found = integrate(denoiser, latents, grid, solver=RK4()).x
        torch.testing.assert_close(found, items, rtol=0, atol=1e-6)
