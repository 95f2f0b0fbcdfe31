"""Conditional Hessians against closed forms and autograd, bounds against Gaussians, and what is told of bandwidths."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from genmodels.commands import main
from genmodels.registry import ConfigError
from genmodels.rng import generator
from genmodels.transforms import Identity
from genmodels.types import Batch
from genmodels.wavelet import concavity
from genmodels.wavelet.bandwidth import fit, gather, report, suggest
from genmodels.wavelet.bases import BSpline
from genmodels.wavelet.concavity import judge, measure, restricted, spectrum, upper_half, worst
from genmodels.wavelet.conditional import Conditional
from genmodels.wavelet.cslc import CSLC
from genmodels.wavelet.kl_bound import excess, fisher, kl_bound
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.score_matching import FitWarning
from genmodels.wavelet.terms import Quadratic
from genmodels.wavelet.tree import Tree
from genmodels.wavelet.tuning import Tuning

BETA = 0.68
GAUSSIAN = (partial(Quadratic, reach=1, own=True),)
WELL = (partial(Quadratic, reach=1), partial(Potential, basis=BSpline(10), even=True))


def neighbours(u: Tensor) -> Tensor:
    return sum(u.roll(step, axis) for step in (1, -1) for axis in (-2, -1))


def phi4_product(u: Tensor, v: Tensor) -> Tensor:
    """Of the Hessian of Σ φ⁴ - φ² - β Σ_<ij> φ_i φ_j."""
    return (12 * u.square() - 2) * v - BETA * neighbours(v)


def finest(size: int = 16, depth: int = 1):
    return Tree((size, size), "db4", 1, (depth,)).levels[-1]


@pytest.fixture(scope="module")
def phi4() -> Tensor:
    """[40, 16, 16] by checkerboard Metropolis from an ordered start: what is local is soon at equilibrium."""
    draw = generator("phi4")
    u = torch.full((40, 16, 16), 0.8, dtype=torch.float64) * torch.randn(40, 1, 1, generator=draw).sign()
    parity = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    for step in range(400):
        new = u + 3 * torch.rand(u.shape, generator=draw) - 1.5
        force = BETA * neighbours(u)
        change = new**4 - new**2 - new * force - (u**4 - u**2 - u * force)
        accept = (torch.rand(u.shape, generator=draw).log() < -change) & (parity == step % 2)
        u = torch.where(accept, new, u)
    return u


def free_field(n: int, size: int = 8, key: str = "fields") -> Tensor:
    """[n, L, L] of the precision 4.5 - (sum over neighbours)."""
    k = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
    power = 1 / (4.5 - 2 * k.cos()[:, None] - 2 * k.cos())
    white = torch.randn(n, size, size, generator=generator(key), dtype=torch.float64)
    return torch.fft.ifft2(torch.fft.fft2(white) * power.sqrt()).real


def conditional(energy=GAUSSIAN, theta=(4.5, -1.0, 0.0), level=None) -> Conditional:
    made = Conditional(level or finest(8), energy)
    made.theta.copy_(torch.tensor(theta, dtype=torch.float64))
    return made


def double_well(level=None) -> Conditional:
    """A quartic with wells, by its derivative's coefficients in the splines: v'(t) = 4 t³ - 5 t on [-2, 2]."""
    made = Conditional(level or finest(8), WELL)
    potential = made.terms[1]
    potential.interval.copy_(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    t = torch.linspace(-2, 2, 101, dtype=torch.float64)
    slopes = potential.gradients(t.view(1, 1, -1))[0, : potential.inside, 0].T
    found = torch.linalg.lstsq(slopes, (4 * t**3 - 5 * t).unsqueeze(1)).solution.squeeze(1)
    found = torch.cat([found, found.new_zeros(len(potential) - potential.inside)])
    made.theta.copy_(torch.cat([torch.tensor([-0.68, 0.0], dtype=torch.float64), found])[: len(made.theta)])
    return made


# ---- spectra -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "lowest"), [(1, 1.360000), (2, 2.3003), (3, 2.6065)])
def test_spectrum_of_a_constant_field_is_that_of_the_laplacian_and_the_curvature(depth, lowest):
    level = finest(16, depth)
    product = restricted(level, lambda u, v: BETA * (4 * v - neighbours(v)))
    free = spectrum(product, torch.zeros(1, 16, 16, dtype=torch.float64), level.dim)
    assert free.smallest == pytest.approx(lowest, abs=5e-5) and free.largest == pytest.approx(5.44, abs=1e-9)
    constant = torch.full((1, 16, 16), 0.7, dtype=torch.float64)
    found = spectrum(restricted(level, phi4_product), constant, level.dim)
    assert found.smallest == pytest.approx(free.smallest + 12 * 0.49 - 2 * (1 + 2 * BETA), abs=1e-9)


@pytest.mark.parametrize(("depth", "mean", "negative"), [(1, -1.54, (1, 1)), (2, 0.43, (0.05, 0.4)), (3, 2.3, (0, 0))])
def test_narrower_packets_make_the_phi4_energy_convex(phi4, depth, mean, negative):
    level = finest(16, depth)
    found = spectrum(restricted(level, phi4_product), phi4, level.dim)
    assert found.mean == pytest.approx(mean, abs=0.2)
    assert negative[0] <= found.negative <= negative[1]
    assert found.smallest == found.quantile(0) == found.quantiles()[0] and len(found.quantiles()) == 21


def test_lanczos_finds_the_ends_of_dense_spectra(phi4, monkeypatch):
    level, u = finest(16, 2), phi4[:2]
    dense = spectrum(restricted(level, phi4_product), u, level.dim)
    monkeypatch.setattr(concavity, "DENSE", 10)
    found = spectrum(restricted(level, phi4_product), u, level.dim)
    torch.testing.assert_close(found.lowest, dense.lowest, rtol=0, atol=3e-3)
    torch.testing.assert_close(found.highest, dense.highest, rtol=0, atol=3e-3)
    # a constant field has few eigenvalues: the space closes early, and goes on from outside of it
    level = finest(8)
    closed = spectrum(restricted(level, phi4_product), torch.zeros(2, 8, 8, dtype=torch.float64), level.dim)
    assert closed.smallest == pytest.approx(1.36 - 2 * (1 + 2 * BETA), abs=1e-9)
    # an identity has one, and a space of one dimension
    same = concavity.lanczos(lambda z: 3 * z, torch.ones(2, 30, dtype=torch.float64))
    assert torch.cat(same).sub(3).abs().max() < 1e-12


def test_lanczos_ends_when_both_ends_are_found_and_not_before():
    values, calls = torch.cat([torch.tensor([-5.0, 9.0]), torch.linspace(0, 1, 998)]).double(), []
    start = torch.randn(1, 1000, generator=generator("start"), dtype=torch.float64)
    low, high = concavity.lanczos(lambda z: calls.append(0) or z * values, start)
    assert low.item() == pytest.approx(-5, abs=1e-3) and high.item() == pytest.approx(9, abs=1e-3)
    assert len(calls) == 10
    close = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    low, high = concavity.lanczos(lambda z: z * close, start)
    assert low.item() == pytest.approx(-1, abs=1e-3) and high.item() == pytest.approx(1, abs=1e-3)


def test_spectrum_is_that_of_the_second_derivative_of_the_conditional_energy():
    model, u = double_well(), 1.5 * free_field(3)
    model.unit.fill_(0.7)
    found = spectrum(model.hessian, u, model.level.dim)
    base = u[:1] - model.level.synthesize(model.level.detail(u[:1]))
    energy = lambda z: model.potential(base * model.unit)(z.unsqueeze(0))[0].squeeze(0)  # noqa: E731
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(energy, model.level.detail(u[0])))
    assert values[0] < 0
    assert (found.lowest[0].item(), found.highest[0].item()) == pytest.approx((values[0].item(), values[-1].item()))
    with pytest.raises(ValueError, match="at least one field"):
        spectrum(model.hessian, u[:0], model.level.dim)


def test_worst_is_below_every_spectrum_and_met_by_the_constant_field_of_least_curvature():
    model = double_well()
    model.theta[-1] = 20.0  # the curvature of the tails
    bound = worst(model)
    wild = spectrum(model.hessian, 3 * free_field(20), model.level.dim)
    assert bound < wild.smallest
    met = spectrum(model.hessian, torch.zeros(1, 8, 8, dtype=torch.float64), model.level.dim)
    assert met.smallest == pytest.approx(bound, abs=1e-6) and bound < -2
    model.theta[-1] = -30.0  # a tail that curves less than all within
    far = spectrum(model.hessian, torch.full((1, 8, 8), 9.0, dtype=torch.float64), model.level.dim)
    assert worst(model) == pytest.approx(far.smallest, abs=1e-9)


@pytest.mark.parametrize("depth", [1, 2])
def test_upper_half_is_the_next_narrower_ring_within_the_band(depth):
    tree, deeper = Tree((16, 16), "db4", 1, (depth,)), Tree((16, 16), "db4", 1, (depth + 1,))
    for level in tree.levels[1:]:
        half = upper_half(level, "db4")
        assert half.ring in [other.ring for other in deeper.levels] and half.ring == 2 * level.ring + 1
        z = half.synthesize(torch.eye(half.dim, dtype=torch.float64))
        torch.testing.assert_close(level.synthesize(level.detail(z)), z, rtol=0, atol=1e-12)
    assert upper_half(tree.levels[0], "db4") is None
    assert upper_half(finest(4), "db4") is None  # tiles of one coefficient


# ---- what is kept and told -----------------------------------------------------------------------------------------


def test_bands_that_are_not_convex_are_named_with_their_values():
    deep, flat = double_well(finest(16)), conditional()
    u = [0.3 * free_field(10, 16), free_field(10)]
    with pytest.warns(FitWarning) as told:
        judge([deep, flat], u, "db4")
    assert len(told) == 1
    words = str(told[0].message)
    smallest = measure(deep, u[0]).smallest
    assert smallest < -1
    assert f"16x16: smallest eigenvalue of the Hessian {smallest:.3g} (median" in words and "100% of 10 fields" in words
    assert "8x8" not in words and "subdivisions: 2" in words and "genmodels concavity" in words
    half = upper_half(deep.level, "db4")
    narrower = spectrum(restricted(half, concavity.curvature(deep)), u[0], half.dim)
    assert narrower.smallest > smallest and f"in the upper half of its band {narrower.smallest:.3g}" in words
    assert deep.minima[0] == smallest and deep.negative == 1
    assert flat.negative == 0 and flat.minima[0] > 0 and flat.largest < 8.5 + 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge([flat], u[1:], "db4")


@pytest.mark.parametrize(("bad", "warned"), [(1, False), (2, True)])
def test_a_negative_direction_on_one_field_in_fifty_is_rare(bad, warned, monkeypatch):
    lowest = torch.ones(50, dtype=torch.float64).where(torch.arange(50) >= bad, -1e-3)
    monkeypatch.setattr(concavity, "spectrum", lambda *_: concavity.Spectrum(lowest, torch.full_like(lowest, 2.0)))
    flat = conditional()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        judge([flat], [free_field(50)], "db4")
    assert len(told) == warned and float(flat.negative) == pytest.approx(bad / 50)
    assert not warned or f"negative on {bad / 50:.0%} of 50 fields" in str(told[0].message)


def test_a_whole_field_that_is_not_convex_wants_octaves():
    whole = double_well(Tree((8, 8), "db4", 0).levels[0])
    with pytest.warns(FitWarning, match="8x8: smallest.*More octaves help"):
        judge([whole], [0.3 * free_field(8)], "db4")


# ---- bounds --------------------------------------------------------------------------------------------------------


def exact(model: Conditional) -> tuple[float, float]:
    """Divergence of Fisher and of Kullback-Leibler from the free field's conditional law, unit 1."""
    eye = torch.eye(64, dtype=torch.float64)
    fields = eye.view(64, 8, 8)
    true = (4.5 * fields - neighbours(fields)).view(64, 64)
    ours = model.terms[0].product(model.theta, fields).view(64, 64)
    rows = model.level.detail(fields).T  # Ḡ
    low = eye - rows.T @ rows
    cov = true.inverse()
    off = rows @ (ours - true)
    p, q = rows @ true @ rows.T, rows @ ours @ rows.T
    mean = (q.inverse() @ rows @ ours - p.inverse() @ rows @ true) @ low
    gap = ((q @ p.inverse()).trace() - len(p) + p.logdet() - q.logdet() + (mean @ cov @ mean.T @ q).trace()) / 2
    return float((off @ cov @ off.T).trace() / 2), float(gap)


def test_bound_is_above_the_divergence_of_gaussians_and_its_parts_are_exact():
    u, score = free_field(2000), lambda y: neighbours(y) - 4.5 * y
    for theta in ((4.0, -0.8, 0.05), (5.5, -1.0, 0.0), (4.5, -0.6, 0.0)):
        model = conditional(theta=theta)
        divergence, kl = exact(model)
        found = kl_bound([model], [u], [score]).levels[0]
        assert found.exact and abs(found.divergence - divergence) < 4 * found.error < 0.2 * divergence
        assert found.alpha == pytest.approx(found.worst) and found.alpha > 0
        assert found.kl == found.proved > kl
        assert found.kl < 40 * kl
    same = kl_bound([conditional()], [u], [score])
    assert same.kl < 1e-20


def test_bound_is_met_by_a_shifted_gaussian_in_any_unit():
    model = conditional((partial(Quadratic, reach=0, own=True),), (1.7,))
    model.unit.fill_(0.4)
    shift = model.level.synthesize(torch.linspace(-1, 1, model.level.dim, dtype=torch.float64))
    law = kl_bound([model], [free_field(50)], [lambda y: -1.7 / 0.16 * (y - shift)])
    assert law.kl == pytest.approx(0.5 * 1.7 / 0.16 * float(shift.square().sum()))


def test_nothing_is_bounded_where_an_energy_is_not_convex():
    found = kl_bound([conditional(), double_well()], [free_field(20), 0.3 * free_field(20)])
    assert found.levels[0].kl < math.inf == found.levels[1].kl == found.kl == found.proved


def test_excess_is_what_fits_lose_on_average():
    """θ of 100 fits to 100 fields each; the loss is quadratic, with the closed form of its matrix."""
    model, n = conditional(), 100
    rows = model.gradients(free_field(100 * n)).unflatten(0, (100, n))
    gram = torch.einsum("rnkd,rnld->rkl", rows, rows) / n
    laplacians = model.laplacians(free_field(1))[0]
    off = torch.linalg.solve(gram, laplacians.expand(100, 3)) - model.theta
    lost = 0.5 * torch.einsum("rk,kl,rl->r", off, gram.mean(0), off)
    error = float(lost.std()) / math.sqrt(100)
    expected = excess(model, free_field(2000, key="others"), n)
    assert abs(float(lost.mean()) - expected) < 4 * error < 0.7 * expected
    assert abs(expected / (3 / (2 * n)) - 1) > 1  # not what a well-specified likelihood would lose


def test_a_richer_class_sees_what_a_poor_one_misses():
    poor, rich, fields = conditional((partial(Quadratic, reach=0, own=True),), (4.0,)), conditional(), free_field(3000)
    fit(rich, fields[1000:], 0.0)
    assert abs(float(rich.unit) - 1) > 0.3  # units differ
    found = kl_bound([poor], [fields[:1000]], richer=[rich], trained_on=10**9).levels[0]
    score = lambda y: neighbours(y) - 4.5 * y  # noqa: E731
    divergence = float(fisher(poor, fields[:1000], score).mean())
    assert not found.exact and abs(found.divergence - divergence) < 4 * found.error < 0.5 * divergence


# ---- widths --------------------------------------------------------------------------------------------------------


def test_the_widest_packets_that_are_convex_are_suggested(phi4):
    fields = torch.cat([phi4.roll(shift, 1) for shift in range(0, 16, 4)])
    found = suggest(fields, WELL, octaves=1, most=3)[0]
    shares = [trial.negative for trial in found.trials]
    assert found.grid == (16, 16) and shares[0] == 1 and shares == sorted(shares, reverse=True)
    wanted = next((k + 1 for k, share in enumerate(shares) if share <= 0.02), None)
    assert found.subdivisions == wanted != 1
    errors = [trial.bands[-1].error for trial in found.trials]
    assert errors[0] < errors[1] < errors[2]
    assert abs(found.trials[0].bands[0].coupling + BETA) < 4 * errors[0] + 0.05
    words = report([found], [1])
    assert "100%" in words and f"{errors[0]:.2g}" in words and f"model.subdivisions=[{wanted or 1}]" in words


def test_of_a_gaussian_one_octave_suffices_at_every_scale():
    found = suggest(free_field(600), GAUSSIAN, most=2)
    assert [octave.grid for octave in found] == [(8, 8), (4, 4), (2, 2)]
    assert [octave.subdivisions for octave in found] == [1, 1, 1]
    assert [len(octave.trials) for octave in found] == [2, 1, 1]  # tiles keep two coefficients a side
    band = found[0].trials[0].bands[0]
    assert abs(band.coupling + 1) < 4 * band.error
    words = report(found, [2, 2, 2])
    assert "8x8: subdivisions 1 suffices." in words and "model.subdivisions=[1, 1, 1]" in words


def test_trials_are_fits_of_the_model_measured_at_other_fields():
    y = free_field(250)
    y = y - y[50:].mean()
    model = CSLC(WELL, octaves=2, subdivisions=(2, 1), periodic=True, shape=(1, 8, 8), transform=Identity())
    model.fit([Batch(part) for part in y[50:].unsqueeze(1).split(100)])
    found = suggest(y, WELL, octaves=2, most=2)
    bands = [*found[1].trials[0].bands, *found[0].trials[1].bands]
    units = model.units(y[:50].unsqueeze(1))
    for c, u, band in list(zip(model.conditionals, units, [None, *bands], strict=True))[1:]:
        assert band.label == c.level.label and band.condition == pytest.approx(float(c.condition), rel=1e-6)
        assert band.error == pytest.approx(float(c.errors[0] / c.unit**2), rel=1e-6)
        expected = spectrum(c.hessian, u, c.level.dim)
        torch.testing.assert_close(band.spectrum.lowest, expected.lowest, rtol=1e-6, atol=1e-8)


def test_trials_that_fail_say_why():
    failed = suggest(free_field(50), (partial(Quadratic, reach=1), partial(Quadratic, reach=1)), regularization=0.0)
    words = report(failed, [1, 2, 1])
    assert failed[0].subdivisions is None and "could not be fitted" in words and "singular" in words
    assert "model.subdivisions=[1, 2, 1]" in words
    with pytest.raises(ConfigError, match="at least 10 fields"):
        suggest(free_field(5), GAUSSIAN)
    with pytest.raises(ConfigError, match="constant"):
        fit(conditional(), torch.zeros(20, 8, 8), 0.0)


def test_gather_takes_the_first_items():
    batches = [Batch(torch.arange(4.0)), Batch(torch.arange(4.0, 8.0))]
    assert gather(batches, 6).tolist() == [0, 1, 2, 3, 4, 5] and len(gather(batches, 100)) == 8


# ---- models and the command ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*chains from data")  # of few steps
def test_preparation_keeps_logs_and_draws_the_spectra(tmp_path):
    make = lambda: CSLC(  # noqa: E731
        WELL, octaves=1, tuning=Tuning(8, 10, 20), periodic=True, shape=(1, 8, 8), transform=Identity()
    )
    model, x = make(), free_field(300).unsqueeze(1).float()
    assert model.portray(tmp_path / "early") == []
    logs = model.prepare([Batch(part) for part in x.split(100)], generator=generator("prepare"))
    level = model.conditionals[-1]
    found = spectrum(level.hessian, model.units(x[:8])[-1], level.level.dim)
    assert level.minima.tolist() == pytest.approx(found.quantiles().tolist())
    assert logs["hessian_min"] == min(c.minima[0] for c in model.conditionals)
    assert logs["hessian_min"] < min(c.minima[1] for c in model.conditionals)
    assert logs["hessian_negative"] == max(c.negative for c in model.conditionals)
    paths = model.portray(tmp_path / "prepare")
    assert [path.name for path in paths] == ["concavity.png", "potentials.png", "parameters.csv"]
    assert all(path.read_bytes()[1:4] == b"PNG" for path in paths[:2])
    rows = paths[2].read_text().splitlines()
    assert rows[0] == "level,sigma,feature,theta,stderr"
    last = rows[-1].split(",")
    assert last[0] == level.level.label and float(last[3]) == pytest.approx(float(level.theta[-1]), rel=1e-5)
    assert float(last[4]) == pytest.approx(float(level.errors[-1]), rel=1e-2) and len(rows) == 1 + sum(
        len(c.theta) for c in model.conditionals
    )
    other = make()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.conditionals[-1].minima, level.minima)


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("fields.npy", free_field(200).unsqueeze(1).float().numpy())
    model = {"name": "cslc", "octaves": 1, "energy": [{"name": "quadratic", "reach": 1, "own": True}]}
    tree = {
        "name": "free",
        "data": {"name": "array", "path": "fields.npy", "transform": "identity"},
        "model": model,
        "train": {"steps": 0, "batch_size": 100},
    }
    (tmp_path / "free.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "free.yaml"


def test_command_tells_bands_bound_and_widths(config, capsys):
    assert main(["concavity", str(config), "--most", "2", "--train", "160", "--fields", "10"]) == 0
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if line.startswith("| 8x8") and "48" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert 0 < float(cells[2]) <= float(cells[3]) <= float(cells[4]) < float(cells[6]) and cells[5] == "0%"
    assert told.startswith("## free\n\nHessians at 10 fields of test:\n\n| band") and told.count("fields of test") == 1
    assert "KL of the whole field: at most" in told
    assert 0 < float(told.split("at most ")[1].split()[0]) < 3  # each fit to 160 fields, not to a few
    assert "model.subdivisions=[1]" in told and (config.parent / "concavity.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--out", "a.txt"], "a .png, .pdf or .svg"),
        (["--samples", "4"], "--samples and --weights: are for runs"),
        (["--fields", "0"], "--fields >= 1"),
        (["--split", "test", "data.test=0"], "'test' has no items"),
        (["model.octaves=4"], "can be halved 3 times"),
    ],
)
def test_command_refuses(config, capsys, words, error):
    assert main(["concavity", str(config), *words]) == 2
    assert error in capsys.readouterr().err
    assert not (config.parent / "concavity.png").exists()


def test_command_refuses_other_models(config, capsys):
    tree = yaml.safe_load(config.read_text())
    tree["model"] = {"name": "stationary_gaussian"}
    config.write_text(yaml.safe_dump(tree))
    assert main(["concavity", str(config)]) == 2
    assert "has no conditional energies" in capsys.readouterr().err
