"""Gaussian and lognormal fields against closed forms and published spectra, and what all fields tell of themselves."""

import math

import pytest
import torch
from torch import Tensor

from genmodels.data.dataset import Dataset, context
from genmodels.data.external import External, from_tensors
from genmodels.data.gaussian_field import GaussianField, free_spectrum
from genmodels.data.lognormal_field import (
    LognormalField,
    angular_spectrum,
    convergence_spectrum,
    logarithm_spectrum,
    shift,
)
from genmodels.data.phi4 import Phi4
from genmodels.data.simulated_fields import frequencies, stationary
from genmodels.registry import ConfigError
from genmodels.rng import generator
from genmodels.transforms import StandardizeChannels
from genmodels.types import Batch


def precision(height: int, width: int, mass_squared: float, stiffness: float) -> Tensor:
    """[N, N] of the free field, from the definition of its energy."""
    n = height * width
    site = torch.arange(n).reshape(height, width)
    out = mass_squared * torch.eye(n, dtype=torch.float64)
    for other in (site.roll(-1, 0), site.roll(-1, 1)):
        for i, j in zip(site.flatten().tolist(), other.flatten().tolist(), strict=True):
            bump = torch.zeros(n, dtype=torch.float64)
            bump[i] += 1
            bump[j] -= 1
            out += stiffness * torch.outer(bump, bump)
    return out


def test_the_free_spectrum_has_its_known_values():
    spectrum = free_spectrum((16, 16), 0.5, 1.0)
    found = [spectrum[0, 0], spectrum[1, 0], spectrum[8, 8], spectrum.mean(), torch.fft.ifft2(spectrum).real[0, 1]]
    expected = [2.0, 1.5331757735, 0.1176470588, 0.3162386142, 0.1057684409]
    assert [float(value) for value in found] == pytest.approx(expected, abs=1e-9)
    assert float(-spectrum.log().mean()) == pytest.approx(1.3671484294, abs=1e-9)
    assert GaussianField(16).entropy() / 256 == pytest.approx(0.7353643185, abs=1e-9)


def test_score_matching_of_the_population_returns_the_energy():
    """H_ab = Σ_k P λ_a λ_b, g_a = Σ_k λ_a with the features ½Σφ², neighbours and diagonal neighbours."""
    spectrum, (i, j) = free_spectrum((16, 16), 0.5, 1.0), [(k * math.pi / 8).cos() for k in frequencies((16, 16))]
    features = torch.stack([(1 + 0 * i * j), 2 * i + 2 * j, 4 * i * j]).flatten(1)
    h = features * spectrum.flatten() @ features.T
    assert h.diagonal().tolist() == pytest.approx([80.957, 487.381, 422.958], abs=1e-3)
    theta = torch.linalg.solve(h, features.sum(1))
    torch.testing.assert_close(theta, torch.tensor([4.5, -1, 0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (2, 4)])
def test_the_free_field_is_the_gaussian_of_its_energy(height, width):
    data = GaussianField((height, width), mass_squared=0.7, stiffness=1.3, count=4000, reference=4000)
    law = torch.distributions.MultivariateNormal(
        torch.zeros(height * width, dtype=torch.float64), precision_matrix=precision(height, width, 0.7, 1.3)
    )
    x = data.all("test").x
    torch.testing.assert_close(data.log_prob(x), law.log_prob(x.double().flatten(1)), rtol=1e-9, atol=1e-6)
    assert data.entropy() == pytest.approx(float(law.entropy()), abs=1e-9)
    flat = torch.cat((x, data.all("train").x)).double().flatten(1)
    found, exact, n = torch.cov(flat.T, correction=0), law.covariance_matrix, len(flat)
    error = ((exact**2 + torch.outer(exact.diagonal(), exact.diagonal())) / n).sqrt()
    assert ((found - exact).abs() < 5 * error).all()
    assert (flat.mean(0).abs() < 4.5 * (exact.diagonal() / n).sqrt()).all()
    assert "variance of a site" in data.checks()[0] and "nats/site" in data.checks()[1]


def test_filtered_noise_has_the_spectrum_in_each_mode():
    spectrum = free_spectrum((6, 8), 0.3, 2.0)
    x = stationary(spectrum, 6000, generator("modes"))
    power = torch.fft.fft2(x).abs().square().mean(0) / 48
    # |x̂|² is exponential, or the square of a normal where k = -k: the relative spread is 1 or √2
    assert ((power / spectrum - 1).abs() < 4.5 * (2 / 6000) ** 0.5).all()


def test_the_spectrum_of_convergence_is_the_published_one():
    multipole = torch.tensor([100.0, 200, 500, 1000, 2000, 5000, 10_000], dtype=torch.float64)
    power = multipole * (multipole + 1) * angular_spectrum(multipole) / (2 * math.pi)
    published = torch.tensor([1.01e-5, 1.56e-5, 2.90e-5, 5.03e-5, 8.16e-5, 1.17e-4, 1.22e-4], dtype=torch.float64)
    torch.testing.assert_close(power, published, rtol=0.015, atol=0)
    other = angular_spectrum(multipole, "omega_m_0.3")
    assert float(other[3].log()) == pytest.approx(-21.6629, abs=1e-12)
    assert float(angular_spectrum(multipole)[3].log()) == pytest.approx(-21.8817, abs=1e-12)


def test_the_spectrum_of_a_map_counts_waves_and_averages_over_pixels():
    """P(k) at one mode, from the formula; a map of twice the pixels has the same power in the same wave."""
    size, side = 32, 3.5
    spectrum, theta = convergence_spectrum(size, side), math.radians(3.5)
    multipole = torch.tensor(2 * math.pi * 5 / theta, dtype=torch.float64)
    window = math.prod((math.sin(math.pi * k / size) / (math.pi * k / size)) ** 2 for k in (3, 4))
    assert float(spectrum[3, -4]) == pytest.approx(float(angular_spectrum(multipole)) * (size / theta) ** 2 * window)
    assert spectrum[0, 0] == 0
    finer = convergence_spectrum(2 * size, side)
    assert float(finer[1, 1] / spectrum[1, 1]) == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(("size", "side", "sigma"), [(64, 3.5, 0.01123), (32, 3.5, 0.00859), (32, 0.875, 0.01347)])
def test_maps_have_the_known_size(size, side, sigma):
    assert float(convergence_spectrum(size, side).mean().sqrt()) == pytest.approx(sigma, rel=0.004)


def test_lognormal_maps_have_the_target_spectrum_and_the_known_skewness():
    data = LognormalField(32, 0.875, count=2000, reference=2000)
    x = torch.cat((data.all("train").x, data.all("test").x)).double().squeeze(1)
    power = torch.fft.fft2(x).abs().square().mean(0) / 32**2
    rows, columns = frequencies((32, 32))
    band = (rows.square() + columns.square()).sqrt().round()
    ratio = torch.stack([power[band == k].mean() / data.spectrum[band == k].mean() for k in range(3, 17)])
    assert ((ratio - 1).abs() < 0.02).all()
    assert shift(1.0) == pytest.approx(0.02975) and float(x.min()) > -shift(1.0)
    centred = x - x.mean()
    sigma = centred.square().mean().sqrt()
    assert float((centred / sigma).pow(3).mean()) == pytest.approx(1.46, abs=0.05)
    assert "skewness" in data.checks()[0] and data.periodic is True
    # ⟨κ⟩ = 0: only the cut-off negative power of the mode k = 0 is missing
    assert abs(float(x.mean())) < 4 * float(x.mean((1, 2)).std()) / 4000**0.5


def test_the_logarithm_has_the_covariance_of_its_exponential():
    """⟨exp(g + g')⟩ = exp(Var + ξ_g): λ² (exp ξ_g - 1) is the covariance again, but for power that was cut off."""
    spectrum = convergence_spectrum(32, 0.875)
    logarithm = logarithm_spectrum(spectrum, 0.02975)
    covariance = 0.02975**2 * torch.fft.ifft2(logarithm).real.expm1()
    exact = torch.fft.ifft2(spectrum).real
    assert (logarithm >= 0).all()
    torch.testing.assert_close(covariance, exact, rtol=0, atol=1e-3 * float(exact[0, 0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianField(mass_squared=0.0), "mass_squared must be > 0"),
        (lambda: GaussianField(stiffness=-1.0), "stiffness at least 0"),
        (lambda: GaussianField((1, 4)), "size must be at least 2"),
        (lambda: GaussianField(count=2), "count must be at least 5"),
        (lambda: LognormalField(64, 10.0), "waves of ℓ = 36 … 1,629.*between 0.815 and 7.2 degrees"),
        (lambda: LognormalField(64, 0.5), "between 0.815 and 7.2"),
        (lambda: LognormalField(64, -1.0), "side must be > 0"),
        (lambda: LognormalField(redshift=0.0), r"redshift must be in \(0, 3\]"),
    ],
)
def test_impossible_fields_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- what models may ask for ----


class Torus(Dataset):
    """Nothing but facts."""

    shape, periodic = (1, 4, 4), True
    size = take = None


def test_models_may_ask_whether_fields_are_periodic():
    facts = Torus().facts()
    assert context(facts)["periodic"] is True
    old = {key: value for key, value in facts.items() if key != "periodic"}  # of a checkpoint made before
    assert context(old)["periodic"] is None and External.known_by(old).periodic is None
    assert External.known_by(facts).periodic is True


def test_fields_given_from_python_say_whether_they_are_periodic():
    x = torch.randn(20, 1, 4, 4, generator=generator("x"))
    assert [from_tensors(x, periodic=value).facts()["periodic"] for value in (None, True, False)] == [None, True, False]
    with pytest.raises(ConfigError, match=r"periodic=True is for fields.*found \[20, 16\]"):
        from_tensors(x.flatten(1), periodic=True)


def test_one_mean_and_deviation_for_each_channel():
    x = torch.randn(200, 2, 3, 4, generator=generator("channels"), dtype=torch.float64)
    x = x * torch.tensor([2.0, 5.0]).reshape(2, 1, 1) + torch.tensor([7.0, -1.0]).reshape(2, 1, 1)
    transform = StandardizeChannels(shape=(2, 3, 4))
    transform.fit([Batch(x[:70]), Batch(x[70:])])
    for channel in range(2):
        assert float(transform.mean[channel]) == pytest.approx(float(x[:, channel].mean()), rel=1e-12)
        assert float(transform.std[channel]) == pytest.approx(float(x[:, channel].std(correction=0)), rel=1e-12)
    _, log_det = transform(x)
    assert float(log_det[0]) == pytest.approx(-12 * float(transform.std.log().sum()), rel=1e-12)


@pytest.mark.parametrize(("redshift", "expected"), [(0.5, 0.010303125), (1.0, 0.02975), (2.0, 0.0792)])
def test_the_shift_is_the_polynomial_of_redshift(redshift, expected):
    """0.008 z + 0.029 z² - 0.0079 z³ + 0.00065 z⁴, by hand."""
    assert shift(redshift) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("cosmology", "slope"), [("omega_m_0.26", -1.234), ("omega_m_0.3", -1.2251)])
def test_spectra_have_their_slope_at_a_thousand(cosmology, slope):
    """d ln C/d ln ℓ at ℓ = 1000 is the linear coefficient."""
    steps = 1000 * torch.tensor([-1e-4, 1e-4], dtype=torch.float64).exp()
    low, high = angular_spectrum(steps, cosmology).log().tolist()
    assert (high - low) / 2e-4 == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (Phi4, [{"beta": 0.5}, {"size": 8}]),
        (GaussianField, [{"mass_squared": 0.4}, {"stiffness": 2.0}, {"size": [16, 32]}]),
        (LognormalField, [{"side": 1.0}, {"redshift": 1.5}, {"cosmology": "omega_m_0.3"}, {"size": 32}]),
    ],
    ids=["phi4", "gaussian_field", "lognormal_field"],
)
def test_simulated_fields_are_known_by_what_decides_them_and_none_is_drawn_for_it(make, changes, monkeypatch):
    """Two processors round differently, and the same law and seed must have one board on both."""
    monkeypatch.setattr(make, "draw", lambda *_: pytest.fail("simulated"))
    changes = [{}, *changes, {"seed": 1}, {"count": 50}, {"reference": 7}]
    found = [make(**{"size": 16, **change}).fingerprint() for change in changes]
    assert len(set(found)) == len(changes)
    assert make(size=16, transform=None).fingerprint() == found[0]
    monkeypatch.setattr(make, "version", 2)
    assert make(size=16).fingerprint() != found[0]
