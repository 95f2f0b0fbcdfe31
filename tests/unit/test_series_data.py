"""The simulated series: their laws against closed forms, moments and independent solutions; what is seen of them."""

import math

import numpy as np
import pytest
import torch

from genmodels.data import attractors, spiral_dynamics
from genmodels.data.annulus import Annulus
from genmodels.data.attractors import Lorenz, VanDerPol, integrated, lorenz, van_der_pol
from genmodels.data.dataset import SPLITS, Dataset
from genmodels.data.digit_series import DigitSeries
from genmodels.data.digits import Digits
from genmodels.data.oscillators import Oscillators, motion
from genmodels.data.spiral_dynamics import SpiralODE, SpiralSDE, drift, paths
from genmodels.data.spiral_series import SpiralSeries
from genmodels.data.trajectories import chosen, irregular_times
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import SeedNoise, generator

SEEN = (Oscillators, SpiralSeries, Lorenz, VanDerPol)  # curves seen with noise
FIELDS = ("x", "target", "times", "mask", "target_times", "target_mask")


def same(a, b) -> bool:
    pairs = [(getattr(a, f), getattr(b, f)) for f in FIELDS]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


# ---- what is seen of a curve ----


def test_irregular_times_are_ordered_uniforms():
    """The k-th of L ordered uniforms is Beta(k, L + 1 - k); the means of 4,000 draws to 4.5 standard errors."""
    t = irregular_times(SeedNoise(4000), 9)
    k = torch.arange(1, 10, dtype=torch.float64)
    mean, variance = k / 10, k * (10 - k) / (100 * 11)
    assert ((t.mean(0) - mean).abs() < 4.5 * (variance / 4000).sqrt()).all()
    torch.testing.assert_close(t.var(0), variance, rtol=0.12, atol=0)  # 4.5 standard errors of a variance: 0.10
    assert (t.diff(dim=1) > 0).all() and 0 < t.min() and t.max() < 1


@pytest.mark.parametrize(("share", "count"), [(1.0, 8), (0.7, 6), (0.5, 4), (0.01, 1)])
def test_a_share_of_the_places_is_chosen_evenly(share, count):
    mask = chosen(SeedNoise(4000), 8, share)
    assert (mask.sum(1) == count).all()
    p = count / 8
    assert ((mask.double().mean(0) - p).abs() <= 4.5 * math.sqrt(p * (1 - p) / 4000)).all()


@pytest.mark.parametrize("cls", SEEN)
@pytest.mark.slow_for("Lorenz")
def test_what_is_seen_is_the_curve_with_noise(cls):
    """Clean and noisy items differ by the noise alone, of the stated size, in what is given and what is asked for."""
    clean, noisy = (cls(count=60, points=20, noise=s).all("train") for s in (0.0, 0.3))
    assert torch.equal(clean.times, noisy.times) and torch.equal(clean.mask, noisy.mask)
    difference = (noisy.target - clean.target).double() / 0.3
    assert abs(difference.std() - 1) < 4.5 / math.sqrt(2 * difference.numel()) and abs(difference.mean()) < 0.1
    assert torch.equal(noisy.x, torch.where(noisy.mask[..., None], noisy.target, 0.0))
    assert torch.equal(noisy.times, noisy.target_times)


@pytest.mark.parametrize("cls", SEEN)
@pytest.mark.slow_for("Lorenz")
def test_a_forecast_is_asked_for_the_times_after_those_given(cls):
    task = "extrapolate" if cls is SpiralSeries else "forecast"
    whole, ahead = cls(count=8, points=20, observed=1.0), cls(count=8, points=20, observed=1.0, task=task)
    assert ahead.shape[0] == 10 and ahead.target_shape[0] == 10
    a, b = whole.all("test"), ahead.all("test")
    assert (b.times[:, -1] < b.target_times[:, 0]).all()
    assert torch.equal(a.times, torch.cat((b.times, b.target_times), 1))
    assert torch.equal(cls(count=8, points=20, task=task).all("test").target, b.target)  # how much is seen: no matter
    cut = cls(count=8, points=21, task=task, observed=0.5)
    assert (cut.shape[0], cut.target_shape[0]) == (10, 11) and (cut.all("val").mask.sum(1) == 5).all()


@pytest.mark.parametrize("cls", [*SEEN, Annulus, SpiralODE, SpiralSDE])
@pytest.mark.slow_for("Lorenz", "SpiralODE")
def test_an_item_is_the_same_however_many_there_are(cls):
    short = {"points": 10} if cls in SEEN else {}
    few, many, other = cls(count=8, **short), cls(count=12, **short), cls(count=8, seed=1, **short)
    for split, n in zip(SPLITS, (8, 2, 8), strict=True):
        rows = torch.arange(n)
        assert few.size(split) == n
        if cls is Lorenz:  # all items take the same steps, to rtol 1e-10, and errors grow a thousandfold
            torch.testing.assert_close(few.take(split, rows).target, many.take(split, rows).target, rtol=0, atol=1e-5)
        else:
            assert same(few.take(split, rows), many.take(split, rows))
        assert not same(few.take(split, rows), other.take(split, rows))
    assert few.fingerprint() != many.fingerprint() != other.fingerprint()


def test_fingerprints_know_the_times():
    data = Oscillators(count=8)
    before = data.fingerprint()
    for split in SPLITS:
        items = data.all(split)
        data.hold(split, items.replace(times=items.times + 1))
    assert data.fingerprint() != before


# ---- laws ----


def test_the_annulus_is_uniform_by_area():
    data = Annulus(count=4000)
    items = data.all("train")
    assert items.target.bincount().tolist() == [2000, 2000] and data.target_shape == (2,)
    square = items.x.double().square().sum(1)
    for label, (low, high) in enumerate(((0.0, 0.25), (1.0, 2.25))):
        share = (square[items.target == label] - low) / (high - low)  # uniform on [0, 1) if the points are by area
        assert share.min() > -1e-6 and share.max() < 1 + 1e-6
        place = (share.sort().values - torch.linspace(0, 1, 2000)).abs().max()
        assert place < 1.95 / math.sqrt(2000)  # Kolmogorov's distance is beyond this once in a thousand
    angle = torch.atan2(items.x[:, 1], items.x[:, 0]).double()
    assert torch.stack((angle.cos().mean(), angle.sin().mean())).abs().max() < 4.5 / math.sqrt(2 * 4000)


def test_oscillators_solve_their_equation():
    g = generator("motion")
    t = (10 * torch.rand(200, generator=g, dtype=torch.float64)).requires_grad_()
    start, speed = torch.randn(2, 200, generator=g, dtype=torch.float64)
    u = torch.rand(4, 200, generator=g, dtype=torch.float64)
    rate, damping, force, drive = 1 + 2 * u[0], 0.3 * u[1], u[2], 0.5 + 1.5 * u[3]
    law = (rate, damping, force, drive)
    y = motion(t, start, speed, *law)
    (dy,) = torch.autograd.grad(y.sum(), t, create_graph=True)
    (ddy,) = torch.autograd.grad(dy.sum(), t)
    pull = force * (drive * t).cos() - rate**2 * y - 2 * damping * rate * dy
    torch.testing.assert_close(ddy, pull, rtol=1e-9, atol=1e-9)
    zero = torch.zeros(200, dtype=torch.float64, requires_grad=True)
    first = motion(zero, start, speed, *law)
    torch.testing.assert_close(first, start, rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), zero)[0], speed, rtol=1e-9, atol=1e-9)
    free = motion(t, start, speed, rate, 0 * damping, 0 * force, drive)
    torch.testing.assert_close(free, start * (rate * t).cos() + speed / rate * (rate * t).sin(), rtol=1e-9, atol=1e-9)


def test_the_two_spirals_turn_opposite_ways():
    data = SpiralSeries(task="classify", count=50, observed=1.0, noise=0.0)
    items = data.all("train")
    assert items.target.bincount().tolist() == [25, 25] and data.target_shape == (2,)
    a, b = items.x[:, :-1], items.x[:, 1:]
    turn = torch.atan2(a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0], (a * b).sum(-1)).double()
    near = items.times.diff(dim=1) < 0.3  # less than half a turn, of which the sign is known
    assert (near.double().mean() > 0.99) and torch.equal(turn > 0, (items.target == 0)[:, None] == near)
    rate = turn.abs() / items.times.diff(dim=1)
    torch.testing.assert_close(rate[near], torch.full_like(rate[near], 3 * math.pi), rtol=1e-2, atol=0)
    growth = items.x.norm(dim=-1).double().diff(dim=1) / items.times.diff(dim=1)
    torch.testing.assert_close(growth[near], torch.full_like(growth[near], 0.3 * math.pi), rtol=1e-2, atol=1e-3)


# ---- solutions ----


def test_intervals_of_each_item_are_integrated_exactly():
    """y' = A y, whose solution is a matrix exponential, at times of each item's own."""
    a = np.array([[-0.1, 2.0], [-2.0, -0.1]])
    start = np.random.default_rng(0).normal(size=(5, 2))
    times = np.sort(np.random.default_rng(1).uniform(0, 4, (5, 7)), 1)
    found = integrated(lambda y: y @ a.T, start, times)
    flows = torch.matrix_exp(torch.from_numpy(times)[..., None, None] * torch.from_numpy(a))
    exact = torch.einsum("nlij,nj->nli", flows, torch.from_numpy(start))
    np.testing.assert_allclose(found, exact.numpy(), atol=1e-8)


def test_lorenz_agrees_with_another_solver():
    from scipy.integrate import solve_ivp

    start, times = np.array([[1.0, 1.0, 25.0], [-5.0, 3.0, 20.0]]), np.array([[0.5, 2.0], [1.0, 3.0]])
    found = integrated(lorenz, start, times)
    for k in range(2):
        path = solve_ivp(
            lambda t, y: lorenz(y[None])[0], (0, 3), start[k], "Radau", times[k], rtol=1e-9, atol=1e-10
        ).y.T
        np.testing.assert_allclose(found[k], path, atol=2e-5)  # a thousandth of what it would be after time 5
    rest = np.array([[math.sqrt(72), math.sqrt(72), 27.0]])
    np.testing.assert_allclose(lorenz(rest), 0, atol=1e-12)


def test_lorenz_is_standardised():
    """Moments over 300 independent items; those of one item are correlated, so that the tolerance is 4.5/√300."""
    x = Lorenz(count=300, points=10, noise=0.0, observed=1.0).all("train").x.double()
    assert (x.mean((0, 1)).abs() < 0.26).all() and ((x.std((0, 1)) - 1).abs() < 0.13).all()
    assert (x[..., 2].min() * 8.62 + 23.55) > 0  # on the attractor z > 0


def test_lorenz_starts_on_the_attractor():
    """There x and y are correlated by 0.88, at the first of 30 times as ever; where all starts they are independent."""
    first = Lorenz(count=300, points=30, horizon=0.3, noise=0.0, observed=1.0).all("train").x[:, 0]
    assert torch.corrcoef(first[:, :2].T)[0, 1] > 0.8


@pytest.mark.parametrize(
    ("mu", "end"),
    [
        (1.0, (-2.008340783, 0.032907066)),
        (5.0, (-1.158701266, 0.430469809)),
        (10.0, (-1.971206957, 0.068173232)),
        (50.0, (1.858320944, -0.015147385)),
    ],
)
def test_van_der_pol_ends_where_it_is_known_to(mu, end):
    """Reference end states at time 10 from (2, 0), to nine digits."""
    np.testing.assert_allclose(van_der_pol(mu, (2.0, 0.0), (3.0, 10.0))[-1], end, rtol=0, atol=5e-8)


def test_van_der_pol_without_its_damping_is_a_circle():
    data = VanDerPol(mu=0.0, count=4, noise=0.0, observed=1.0)
    x = data.all("train").x.double()
    torch.testing.assert_close(x.norm(dim=-1), x[:, :1].norm(dim=-1).expand(4, 50), rtol=1e-5, atol=0)
    stiff = VanDerPol(mu=8.0, count=4, noise=0.0, observed=1.0).all("train").x
    assert 1.5 < stiff[..., 0].abs().max() < 2.2 and stiff[..., 1].abs().max() < 4 / 3 * 8 / 9 + 0.1


def test_solutions_are_kept():
    attractors._lorenz.cache_clear()
    Lorenz(count=4, points=4)
    Lorenz(count=4, points=4, noise=0.2)
    assert attractors._lorenz.cache_info().hits == 3 == attractors._lorenz.cache_info().misses


# ---- the cubic spirals ----


def test_the_spiral_ode_agrees_with_another_solver():
    from scipy.integrate import solve_ivp

    data = SpiralODE(count=4)
    items = data.all("test")
    assert data.shape == (1, 2) and torch.equal(items.x, items.target[:, :1]) and (items.times == 0).all()
    for x, path, t in zip(items.x, items.target, items.target_times, strict=True):
        field = lambda _, u: drift(torch.from_numpy(u)).numpy()  # noqa: E731
        exact = solve_ivp(field, (0, 1), x[0].double().numpy(), "DOP853", t.numpy(), rtol=1e-11, atol=1e-12).y.T
        np.testing.assert_allclose(path.numpy(), exact, atol=5e-7)  # the rounding of float32
    assert (items.x - torch.tensor([2.0, 0.0])).abs().max() <= 0.25
    one = SpiralODE(count=4, spread=0.0).all("train")
    assert (one.x == torch.tensor([2.0, 0.0])).all()


def normals(n: int, steps: int) -> torch.Tensor:
    """Of the increments of Brownian motions over 1/steps, over the root of that."""
    return torch.randn(n, steps, 1, 2, generator=generator("normals"), dtype=torch.float64)


START = torch.tensor([2.0, 0.0], dtype=torch.float64)


def test_the_moments_of_the_spiral_sde_obey_itos_formula():
    """V = u₁⁴ + u₂⁴ is kept by the turning part: M = V(t) - V(0) - ∫ (-0.4 (u₁⁶ + u₂⁶) + 6 s² V) dt has E M = 0, and
    its squared steps add up to ∫ 16 s² (u₁⁸ + u₂⁸) dt. The mean over 4,000 paths to 4.5 standard errors; the ratio of
    the sums to 2 %: its own error is 0.1 %, that of the step of the order of 0.5 %. Integrals by trapezia."""
    n, steps, s = 4000, 464, 0.2
    u = paths(START.expand(n, 2), normals(n, steps), s)
    power = lambda k: (u**k).sum(-1)  # noqa: E731
    pieces = lambda y: (y[:, 1:] + y[:, :-1]) / (2 * steps)  # noqa: E731
    v = power(4)
    m = v.diff(dim=1) - pieces(-0.4 * power(6) + 6 * s**2 * v)
    total = m.sum(1)
    assert total.std() > 1 and abs(total.mean()) < 4.5 * total.std() / math.sqrt(n)
    assert m.square().sum() / pieces(16 * s**2 * power(8)).sum() == pytest.approx(1, abs=0.02)


def test_half_the_step_gives_the_same_paths_and_moments():
    """On the same Brownian motions, at the steps of the data set and at twice as many."""
    fine = normals(2000, 29 * 32).reshape(2000, 29, 32, 2)
    coarse = fine.reshape(2000, 29, 16, 2, 2).sum(3) / math.sqrt(2)
    assert spiral_dynamics.SUBSTEPS == 16
    a, b = (paths(START.expand(2000, 2), w, 0.2) for w in (coarse, fine))
    assert (a - b).square().mean().sqrt() < 0.01
    for moment in (torch.mean, torch.var):
        # the error of the moments themselves from 2,000 paths is 0.01; that of the step must not be seen beside it
        assert (moment(a, 0) - moment(b, 0)).abs().max() < 5e-4


def milstein(z: torch.Tensor, s: float) -> torch.Tensor:
    """The end of u + f h + s u dW + s² u (dW² - h)/2."""
    u, h = START.expand(len(z), 2), 1 / z.shape[1]
    for dw in (math.sqrt(h) * z[:, :, 0]).unbind(1):
        u = u + drift(u) * h + s * u * dw + s**2 * u * (dw**2 - h) / 2
    return u


def test_an_independent_scheme_converges_to_the_same_paths():
    """Milstein's scheme on the same Brownian motions, of strong order 1 with large errors: half at half the step."""
    fine = normals(300, 1856)
    coarse = fine.unflatten(1, (928, 2)).sum(2) / math.sqrt(2)
    end = paths(START.expand(300, 2), fine, 0.2)[:, -1]
    first, second = ((milstein(w, 0.2) - end).square().mean().sqrt() for w in (coarse, fine))
    assert second < 0.07 and 1.8 < first / second < 2.2


def test_the_spiral_sde_gives_starts_or_paths():
    ahead, whole = SpiralSDE(count=8), SpiralSDE(count=8, task="generate")
    assert (ahead.shape, ahead.target_shape) == ((1, 2), (30, 2))
    assert (whole.shape, whole.target_shape) == ((30, 2), None)
    a, b = ahead.all("train"), whole.all("train")
    assert torch.equal(a.target, b.x) and torch.equal(a.target_times, b.times) and b.target is None
    assert (a.x == START.float()).all() and len(a.target.unique(dim=0)) == 8
    assert torch.equal(SpiralSDE(count=8, noise=0.0).all("train").target, SpiralODE(8, 0.0).all("train").target)


# ---- digits ----


@pytest.mark.parametrize("layout", ["rows", "pixels"])
def test_digits_in_series_are_the_digits(layout):
    data = DigitSeries(layout)
    images = Digits(task="classify")
    for split in SPLITS:
        items, whole = data.all(split), images.all(split)
        assert torch.equal(16 * items.x.reshape(whole.x.shape), whole.x) and torch.equal(items.target, whole.target)
        assert items.mask.all() and items.times[0].tolist() == [k / (data.shape[0] - 1) for k in range(data.shape[0])]


@pytest.mark.parametrize(("dropped", "left"), [(0.3, 6), (0.6, 3), (0.99, 1)])
def test_whole_rows_of_digits_are_lost(dropped, left):
    whole, data = DigitSeries(), DigitSeries(dropped=dropped)
    for split in SPLITS:
        a, b = whole.all(split), data.all(split)
        assert (b.mask.sum(1) == left).all() and b.mask.double().mean(0).std() < 0.2
        assert torch.equal(b.x, torch.where(b.mask[..., None], a.x, 0.0)) and torch.equal(a.target, b.target)
    assert not torch.equal(data.all("train").mask, DigitSeries(dropped=dropped, seed=1).all("train").mask)


def test_lost_rows_of_digits_are_asked_for():
    whole, data = DigitSeries("pixels").all("test"), DigitSeries("pixels", 0.5, "interpolate")
    items = data.all("test")
    assert torch.equal(items.target, whole.x) and items.target_mask.all() and data.target_shape == (64, 1)
    assert torch.equal(items.target_times, whole.times) and (items.mask.sum(1) == 32).all()


# ---- errors ----


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "annulus", "inner": 1.2}, r"0 < inner <= low < high is needed, found inner=1.2"),
        ({"name": "annulus", "count": 3}, r"'annulus': count must be at least 4, found 3"),
        ({"name": "digit_series", "dropped": 1.0}, r"dropped must be a share in \[0, 1\), found 1"),
        ({"name": "digit_series", "layout": "columns"}, "layout"),
        ({"name": "spiral_ode", "spread": -1.0}, "spread must be at least 0, found -1"),
        ({"name": "spiral_sde", "noise": -0.2}, "noise must be at least 0, found -0.2"),
        ({"name": "spiral_series", "task": "forecast"}, "task"),
        ({"name": "spiral_series", "observed": 0.0}, r"observed must be a share in \(0, 1\], found 0"),
        ({"name": "oscillators", "points": 1}, "points must be at least 2, found 1"),
        ({"name": "oscillators", "noise": -1.0}, "noise must be at least 0, found -1"),
        ({"name": "oscillators", "force": -1.0}, "force must be at least 0, found -1"),
        ({"name": "lorenz", "horizon": 0.0}, "horizon must be > 0, found 0"),
        ({"name": "van_der_pol", "mu": -1.0}, "mu must be at least 0, found -1"),
    ],
)
def test_impossible_arguments_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        build(Dataset, resolve(Dataset, node, "data"))
