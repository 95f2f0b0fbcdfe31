"""The SDE of every schedule, schedules and times that are refused, and times drawn for the evidence bound."""

import math

import numpy as np
import pytest
import torch

from genmodels.diffusion.checks import check_schedule
from genmodels.diffusion.schedules import Linear, Scales, Schedule, SubVariancePreserving, VariancePreserving
from genmodels.diffusion.times import Importance, TimeLaw
from genmodels.diffusion.weightings import ELBO
from genmodels.registry import ConfigError, build, names
from tests.contracts.test_denoiser import LINE, exact, number
from tests.contracts.test_schedule import Fixed
from tests.oracles import SCHEDULES
from tests.unit.test_diffusion import make

SOME = torch.tensor([0.05, 0.3, 0.7, 0.95], dtype=torch.float64)


def beta(t):
    return 0.1 + 19.9 * t


def integral(t):
    return 0.1 * t + 9.95 * t**2


def test_the_sdes_are_the_published_ones():
    """f and g² of dx = f x dt + g dw, from the papers' formulas."""
    t, zero = SOME, torch.zeros_like(SOME)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    sigma = low + t * (high - low)
    published = {
        "vp": (-beta(t) / 2, beta(t)),
        "sub_vp": (-beta(t) / 2, beta(t) * (1 - torch.exp(-2 * integral(t)))),
        "ve": (zero, (0.01 * 5000**t) ** 2 * 2 * math.log(5000)),
        "edm": (zero, 14 * (high - low) * sigma**13),  # d(σ²)/dt
        "linear": (-1 / (1 - t), 2 * t / (1 - t)),
        "trigonometric": (-math.pi / 2 * torch.tan(math.pi / 2 * t), math.pi * torch.tan(math.pi / 2 * t)),
    }
    for name, (f, g2) in published.items():
        s = build(Schedule, SCHEDULES.get(name, name))
        torch.testing.assert_close(s.drift(t), f, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(s.squared_diffusion(t), g2, rtol=1e-12, atol=1e-14)


def test_values_of_sub_vp_and_ve():
    """Published ones, at t = .3."""
    t = number(0.3)
    sub, ve = SubVariancePreserving(), build(Schedule, "ve")
    found = [sub.scales(t)[1], sub.squared_diffusion(t), ve.scales(t)[1], ve.squared_diffusion(t)]
    for value, expected in zip(found, (0.60366680, 5.11652435, 0.12873333, 0.28229845), strict=True):
        assert abs(value.item() - expected) < 1e-8
    vp = VariancePreserving()(t)
    torch.testing.assert_close(torch.stack((vp.alpha, vp.dalpha)), torch.tensor([0.62955, -1.91068425]).double())


@pytest.mark.parametrize("name", names(Schedule))
def test_the_sde_has_the_scales_as_its_moments(name):
    """From a to b: α_b/α_a = e^{∫f}, and σ_b² = (α_b/α_a)² σ_a² + ∫ (α_b/α_s)² g² ds, by Gauss's rule on panels."""
    s = build(Schedule, SCHEDULES.get(name, name))
    a, b = (s.t_min + share * (s.t_max - s.t_min) for share in (0.1, 0.8))
    (alpha_a, alpha_b), (sigma_a, sigma_b) = (c.tolist() for c in s.scales(torch.tensor([a, b], dtype=torch.float64)))
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(8))
    h = (b - a) / 2000
    t = (a + h * (torch.arange(2000, dtype=torch.float64)[:, None] + 0.5 * (1 + nodes))).flatten()
    weights = (0.5 * h * weights).repeat(2000)
    close = 1e-6 if name in ("discrete", "tabulated") else 1e-8  # cubics between knots: panels meet their joints
    growth = float(s.drift(t) @ weights)
    assert abs(math.exp(growth) * alpha_a / alpha_b - 1) < close
    added = float((s.squared_diffusion(t) * (alpha_b / s.scales(t)[0]) ** 2) @ weights)
    assert abs(((alpha_b / alpha_a * sigma_a) ** 2 + added) / sigma_b**2 - 1) < close


def test_velocity_of_the_probability_flow_is_that_of_the_sde():
    """v = f x - g²/2 score for every schedule with an exact denoiser, and its figures at t = .3, x = .4 of vp."""
    x = torch.linspace(-2, 2, 4, dtype=torch.float64)[:, None]
    for name in names(Schedule):
        d = exact(LINE, build(Schedule, SCHEDULES.get(name, name)), "edm")
        f, g2 = (c[:, None] for c in (d.schedule.drift(SOME), d.schedule.squared_diffusion(SOME)))
        torch.testing.assert_close(d.velocity(SOME, x), f * x - 0.5 * g2 * d.score(SOME, x), rtol=1e-8, atol=1e-8)
    vp, x = exact(LINE, VariancePreserving(), "v"), number(0.4).reshape(1, 1)
    f, g2 = vp.schedule.drift(number(0.3)), vp.schedule.squared_diffusion(number(0.3))
    assert abs((f * 0.4 - 0.5 * g2 * vp.score(number(0.3), x)).item() + 3.56480206) < 1e-7
    assert abs(vp.answer(number(0.3), x).item() + 1.44958985) < 1e-7
    s = vp.schedule(number(0.3))
    assert abs((s.alpha**2 * 0.25 + s.sigma**2).item() - 0.70275010) < 1e-8


# ---- refusals --------------------------------------------------------------------------------------------------------


class WrongSlope(Linear):
    def __call__(self, t):
        s = super().__call__(t)
        return s._replace(dsigma=s.dsigma * 1.001)


class Rising(Schedule):
    """α = 1 - t/2, σ = 1 + 4 t (1 - t): from where σ'/σ = α'/α, near .676, the noise falls faster than the signal."""

    def scales(self, t):
        t = t.double()
        return 1 - t / 2, 1 + 4 * t * (1 - t)


class WrongSDE(SubVariancePreserving):
    def squared_diffusion(self, t):  # that of vp, whose σ is another
        return self.beta_min + self.slope * t


class WrongDrift(VariancePreserving):
    def drift(self, t):
        return -(self.beta_min + self.slope * t)


class WrongRatio(VariancePreserving):
    def log_snr(self, t):
        return super().log_snr(t) / 2


class WrongInverse(Linear):
    def _time(self, log_snr):
        return torch.sigmoid(-log_snr)


class NotANumber(Linear):
    def scales(self, t):
        return 1 - t.double(), torch.sqrt(t.double() - 0.5)


class Signless(Linear):
    def scales(self, t):
        return 1 - t.double(), t.double() - 0.5


class Outside(Linear):
    t_max = 1000.0


class CutGraph(Linear):
    """Scales that automatic differentiation cannot see through, with the right derivatives beside them."""

    def scales(self, t):
        return tuple(c.detach() for c in super().scales(t.detach()))


class Powers(Schedule):
    """α = 1 - t², σ = t, without a closed form of anything else."""

    def scales(self, t):
        t = t.double()
        return 1 - t**2, t


class Roots(Schedule):
    """α = √(1 - t), σ = √t, whose slopes are infinite at the ends: differences must stay well away from both."""

    def scales(self, t):
        t = t.double()
        return (1 - t).sqrt(), t.sqrt()


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WrongSlope, r"WrongSlope: dsigma at t = .* must be 1, which its scales imply, but is 1.001"),
        (Rising, "Rising: log-SNR at t = 0.67.* must be one that falls"),
        (WrongSDE, r"WrongSDE: squared_diffusion at t = .* must be .*, which its scales imply"),
        (WrongDrift, r"WrongDrift: drift at t"),
        (WrongRatio, r"WrongRatio: log_snr at t"),
        (WrongInverse, r"WrongInverse: time\(log_snr\) at t"),
        (NotANumber, r"NotANumber: sigma at t = .* must be a finite number but is nan"),
        (Signless, r"Signless: sigma at t = .* must be a number > 0"),
        (Outside, r"Outside: 0 <= t_min < t_max <= 1 is needed, found 0.0 and 1000.0"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(cls, message):
    with pytest.raises(ConfigError, match=message):
        check_schedule(cls())


def test_schedules_that_fit_together_pass():
    for name in names(Schedule):
        check_schedule(build(Schedule, SCHEDULES.get(name, name)))
    check_schedule(CutGraph())
    check_schedule(Powers())
    check_schedule(Roots())


def test_a_model_looks_at_schedules_from_outside_the_package():
    from genmodels.diffusion.checks import check_settings

    check_settings(Powers(), "velocity", None, 1)
    with pytest.raises(ConfigError, match="WrongSDE"):
        check_settings(WrongSDE(), "velocity", None, 1)


@pytest.mark.parametrize("name", names(Schedule))
def test_steps_of_a_discrete_chain_are_no_times(name):
    s = build(Schedule, SCHEDULES.get(name, name))
    for ask in (s, s.scales, s.log_snr, s.drift, s.squared_diffusion):
        for t, message in (
            (torch.tensor([3, 500]), r"real numbers from 0 \(data\) to 1 \(noise\), found torch.int64.*\(k \+ 1\)/T"),
            (torch.tensor([0.5, 500.0]), "found 0.5 to 500"),
            (torch.tensor([-0.1, 0.5]), "found -0.1 to 0.5"),
            (torch.tensor(math.nan), "found nan"),
        ):
            with pytest.raises(ValueError, match=message):
                ask(t)
    assert s.scales(torch.zeros(0))[0].shape == (0,)
    s.scales(torch.tensor([s.t_min, s.t_max], dtype=torch.float32) * (1 + 6e-8))  # the rounding of float32


def test_denoisers_and_models_refuse_such_times():
    x = torch.zeros(2, 1, dtype=torch.float64)
    for prediction in ("velocity", "score", "eps", "x"):
        d = exact(LINE, Linear(), prediction)
        for t in (torch.tensor([1, 2]), torch.tensor([0.2, 1.5])):
            for ask in (d.velocity, d.score, d.predict, d):
                with pytest.raises(ValueError, match="times"):
                    ask(t, x)
    assert exact(LINE, Linear(), "velocity").network.rows == []
    model = make((1,))
    for ask in (model.velocity, model.score):
        with pytest.raises(ValueError, match=r"found torch\.int64"):
            ask(torch.tensor(1), x)


# ---- times for the evidence bound ------------------------------------------------------------------------------------


def test_importance_times_of_vp():
    """The normaliser ∫ g²/σ² dt and the median from t_min = 1e-3 and 1e-5, and B = log(1 + e^F) on the way."""
    vp, law = VariancePreserving(), Importance()
    for first, z, median in ((1e-3, 19.1653867, 0.3046314), (1e-5, 23.8644724, 0.1144214)):
        span = (first, 1.0)
        t = law.sample(Fixed(torch.tensor([0.5 - 2.0**-25], dtype=torch.float64)), vp, span)
        assert abs(t.item() - median) < 1e-7
        total = vp.squared_diffusion(t) / vp.scales(t)[1] ** 2 / law.density(t, vp, span)
        assert abs(total.item() - z) < 1e-7
        u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
        f = torch.log(torch.expm1(integral(torch.tensor(span, dtype=torch.float64))))
        b = torch.log1p(torch.exp(f[0] + (f[1] - f[0]) * u))
        expected = (-0.1 + torch.sqrt(0.01 + 2 * 19.9 * b)) / 19.9
        torch.testing.assert_close(law.sample(Fixed(u - 2.0**-25), vp, span), expected, rtol=1e-9, atol=1e-12)


def test_the_bound_weighs_importance_times_alike():
    """Half the range of the log-SNR, for every schedule: also those with no closed inverse, or infinite ends."""
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    for s in [*(build(Schedule, SCHEDULES.get(name, name)) for name in names(Schedule)), Powers()]:
        law = Importance()
        t = law.sample(Fixed(u), s)
        w = ELBO()("eps", s(t), law.density(t, s))
        ends = s.log_snr(torch.tensor([s.t_min, s.t_max], dtype=torch.float64)).clamp(-13.815511, 13.815511)
        half = (ends[0] - ends[1]) / 2
        torch.testing.assert_close(w, half.expand(64), rtol=1e-9, atol=0)
        torch.testing.assert_close(s.log_snr(t).diff(), (-2 * half / 64).expand(63), rtol=1e-7, atol=0)


def test_importance_times_need_a_range():
    with pytest.raises(ConfigError, match="min_log_snr < max_log_snr"):
        build(TimeLaw, {"name": "importance", "min_log_snr": 2.0, "max_log_snr": 1.0})
    beyond = Importance(max_log_snr=-11.0, min_log_snr=-12.0)
    with pytest.raises(ValueError, match=r"no time from 1e-05 to 1 has a log-SNR between -12 and -11"):
        beyond.sample(Fixed(torch.tensor([0.5])), VariancePreserving())
    linear = Linear()
    assert (Importance().density(torch.tensor([1e-5, 0.5, 1 - 1e-5]).double(), linear) > 0).tolist() == [
        False, True, False,
    ]  # fmt: skip


def test_scales_may_be_transformed():
    """Differentiated forwards and mapped over, where their values cannot be looked at."""
    for name in names(Schedule):
        s = build(Schedule, SCHEDULES.get(name, name))
        mapped = torch.func.vmap(lambda t, s=s: torch.stack(s.scales(t)))(SOME)
        torch.testing.assert_close(mapped.T, torch.stack(s.scales(SOME)))
    assert isinstance(Schedule.__call__(Linear(), SOME), Scales)
