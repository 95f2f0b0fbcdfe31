"""Cubics through knots and the paths made of them, against scipy, scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicHermiteSpline, PchipInterpolator
from sklearn.isotonic import isotonic_regression

from genmodels.diffusion.denoiser import Denoiser
from genmodels.diffusion.interpolation import cubic, isotonic, limit_slopes, pchip_slopes
from genmodels.diffusion.parametrization import domain
from genmodels.diffusion.schedules import Linear, Schedule, Trigonometric, VariancePreserving
from genmodels.diffusion.tabulated import Table, Tabulated, knots_of
from genmodels.networks.mlp import MLP
from genmodels.registry import ConfigError, build


def rising(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(2, n, generator=g, dtype=torch.float64) + 0.02).cumsum(1).unbind()


@pytest.mark.parametrize("n", [2, 3, 20])
@pytest.mark.parametrize("kind", ["rising", "any", "flat"])
def test_slopes_and_values_are_those_of_scipy(n, kind):
    x, y = rising(n, 1)
    y = {"rising": y, "any": torch.sin(7 * y), "flat": y.round()}[kind]
    at = torch.linspace(float(x[0]), float(x[-1]), 301, dtype=torch.float64)
    theirs = PchipInterpolator(x.numpy(), y.numpy())
    value, slope = cubic(x, y, pchip_slopes(x, y), at)
    np.testing.assert_allclose(value, theirs(at.numpy()), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(slope, theirs.derivative()(at.numpy()), rtol=1e-11, atol=1e-11)
    assert torch.equal(cubic(x, y, pchip_slopes(x, y), x)[0], y)


def test_given_slopes_are_kept_and_steep_ones_limited():
    x, y = rising(12, 2)
    at = torch.linspace(float(x[0]), float(x[-1]), 4001, dtype=torch.float64)
    gentle = 0.9 * pchip_slopes(x, y)
    value, slope = cubic(x, y, limit_slopes(x, y, gentle), at)
    theirs = CubicHermiteSpline(x.numpy(), y.numpy(), gentle.numpy())
    np.testing.assert_allclose(value, theirs(at.numpy()), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(slope, theirs.derivative()(at.numpy()), rtol=1e-10, atol=1e-10)
    steep = 40 * pchip_slopes(x, y)
    assert (cubic(x, y, steep, at)[0].diff() < 0).any(), "these slopes overshoot"
    assert (cubic(x, y, limit_slopes(x, y, steep), at)[0].diff() > 0).all()


def test_pooling_is_that_of_scikit_learn():
    g = torch.Generator().manual_seed(3)
    y, w = torch.randn(40, generator=g, dtype=torch.float64), torch.rand(40, generator=g, dtype=torch.float64) + 0.1
    y = y + torch.linspace(0, 2, 40)
    np.testing.assert_allclose(isotonic(y, w), isotonic_regression(y.numpy(), sample_weight=w.numpy()), rtol=1e-12)


SIZES = {"in_shape": (1,), "out_shape": (1,), "timed": True, "num_classes": None, "condition_shape": None}
TIMES = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
ALPHA = torch.tensor([1.0, 0.98, 0.85, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
SIGMA = torch.tensor([0.0, 0.1, 0.35, 0.7, 0.9, 1.0, 1.0], dtype=torch.float64)


def tabulated(**node) -> Schedule:
    return build(Schedule, {"name": "tabulated", **node})


def test_knots_are_met_and_angle_and_radius_are_scipys_between():
    path = tabulated(times=tuple(TIMES.tolist()), alpha=tuple(ALPHA.tolist()), sigma=tuple(SIGMA.tolist()))
    alpha, sigma = path.scales(TIMES)
    torch.testing.assert_close(alpha, ALPHA, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(sigma, SIGMA, rtol=1e-14, atol=1e-15)
    assert sigma[0] == 0 and alpha[-1] == 0, "ends are exact"
    t = np.linspace(0, 1, 777)
    angle = PchipInterpolator(TIMES.numpy(), np.arctan2(SIGMA.numpy(), ALPHA.numpy()))(t)
    radius = PchipInterpolator(TIMES.numpy(), np.hypot(SIGMA.numpy(), ALPHA.numpy()))(t)
    alpha, sigma = path.scales(torch.from_numpy(t))
    np.testing.assert_allclose(alpha, radius * np.cos(angle), atol=1e-14)
    np.testing.assert_allclose(sigma, radius * np.sin(angle), atol=1e-14)


@pytest.mark.parametrize("form", ["variance_preserving", "straight"])
def test_log_snr_leaves_the_radius_to_the_form(form):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    log_snr = 12 - 24 * t**1.5
    path = tabulated(times=tuple(t.tolist()), log_snr=tuple(log_snr.tolist()), form=form)
    torch.testing.assert_close(path.log_snr(t), log_snr, rtol=1e-10, atol=1e-12)
    alpha, sigma = path.scales(t)
    one = alpha**2 + sigma**2 if form == "variance_preserving" else alpha + sigma
    torch.testing.assert_close(one, torch.ones_like(one), rtol=1e-14, atol=0)


def test_given_derivatives_make_the_table_of_fourth_order():
    """A path with σ'' finite everywhere: halving the spacing divides the error by 16, and that of α' by 8."""
    fine = torch.linspace(0, 1, 4097, dtype=torch.float64)
    for schedule in (Trigonometric(), Linear()):
        errors = []
        for n in (16, 32, 64):
            t = torch.linspace(0, 1, n + 1, dtype=torch.float64)
            found, exact = Table(knots_of(t, *schedule(t)))(fine), schedule(fine)
            errors.append([(a - b).abs().max().item() + 1e-16 for a, b in zip(found, exact, strict=True)])
        orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
        if isinstance(schedule, Linear):
            assert (orders[-1] > [3.8, 3.8, 2.8, 2.8]).all(), orders
        else:
            assert max(errors[-1]) < 1e-13, "angle and radius of the trigonometric path are linear in time"


def test_vp_is_reproduced_between_its_first_time_and_the_last():
    vp = VariancePreserving()
    t = vp.t_min + (1 - vp.t_min) * torch.linspace(0, 1, 301, dtype=torch.float64) ** 3
    path = Table(knots_of(t, *vp(t)))
    assert (path.t_min, path.t_max) == (1e-5, 1.0)
    at = torch.linspace(2e-5, 1, 1000, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(path.scales(at)), torch.stack(vp.scales(at)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_a_file_is_the_same_as_its_numbers(kind, tmp_path):
    log_snr = torch.tensor([math.inf, 5.0, 2.0, 0.0, -2.5, -5.0, -math.inf], dtype=torch.float64)
    file = tmp_path / f"path.{kind}"
    if kind == "npz":
        np.savez(file, t=TIMES.numpy(), log_snr=log_snr.numpy())
    else:
        rows = [f"{t!r},{v!r}" for t, v in zip(TIMES.tolist(), log_snr.tolist(), strict=True)]
        file.write_text("\n".join(["t,log_snr", *rows]) + "\n")
    path = tabulated(file=str(file))
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    torch.testing.assert_close(torch.stack(path.scales(TIMES)), torch.stack((alpha, sigma)), rtol=1e-14, atol=1e-15)
    assert path.log_snr(TIMES)[0] == math.inf and path.log_snr(TIMES)[-1] == -math.inf


def test_a_checkpoint_brings_the_path_where_the_file_is_gone(tmp_path):
    file = tmp_path / "path.csv"
    file.write_text("t,alpha,sigma\n0,1,0\n0.4,0.9,0.2\n1,0.01,1\n")

    def denoiser() -> Denoiser:
        return Denoiser(MLP((4,), **SIZES), tabulated(file=str(file)), "eps")

    first = denoiser()
    limit = domain("eps", first.schedule)
    file.unlink()
    second = denoiser()
    with pytest.raises(ConfigError, match=r"no file .*path\.csv"):
        second.schedule(torch.tensor(0.5))
    with pytest.raises(ConfigError, match="no file"):
        second.fit_path([], generator=torch.Generator())
    second.load_state_dict(first.state_dict())
    t = torch.linspace(0, 1, 50)
    assert torch.equal(torch.stack(second.schedule(t)), torch.stack(first.schedule(t)))
    assert (second.t_min, second.t_max) == (first.t_min, first.t_max) == limit


BAD = {
    "either times": {},
    "as many values": {"times": (0.0, 1.0), "log_snr": (1.0, 0.0, -1.0)},
    "at least 2": {"times": (0.5,), "log_snr": (1.0,)},
    "0.5 then 0.5": {"times": (0.0, 0.5, 0.5, 1.0), "log_snr": (3.0, 2.0, 1.0, 0.0)},
    "0 to 2": {"times": (0.0, 2.0), "log_snr": (1.0, 0.0)},
    "t = 0.5 to t = 1": {"times": (0.0, 0.5, 1.0), "log_snr": (3.0, -1.0, -1.0)},
    "runs the other way": {"times": (0.0, 1.0), "alpha": (0.0, 1.0), "sigma": (1.0, 0.0)},
    "not both 0": {"times": (0.0, 1.0), "alpha": (0.0, 0.0), "sigma": (0.0, 1.0)},
    ">= 0": {"times": (0.0, 1.0), "alpha": (1.0, -0.1), "sigma": (0.0, 1.0)},
    "t with log_snr": {"times": (0.0, 1.0), "alpha": (1.0, 0.0)},
    "found t, log_snr, alpha": {"times": (0.0, 1.0), "alpha": (1.0, 0.0), "log_snr": (1.0, 0.0), "sigma": (0.0, 1.0)},
    "either": {"file": "x.csv", "times": (0.0, 1.0)},
}


@pytest.mark.parametrize("message", BAD)
def test_impossible_tables_are_refused(message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        tabulated(**BAD[message])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "t,log_snr\n", "neither"),
        ("a.csv", "t,log_snr\n0,much\n", "cannot be read"),
        ("a.csv", "time,log_snr\n0,1\n", "has the columns time"),
        ("a.csv", "t,log_snr\n0,1\n1\n", "cannot be read"),
        ("a.csv", "", "has the columns"),
        ("a.npz", "no archive", "cannot be read"),
    ],
)
def test_files_that_are_no_tables_are_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        Tabulated(file=str(tmp_path / name))
