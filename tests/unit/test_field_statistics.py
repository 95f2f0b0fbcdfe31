"""Statistics of fields against closed forms, sums over all triads, counts one by one, and other libraries."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from genmodels.metrics.fields.bispectrum import bispectrum, equilateral, squeezed
from genmodels.metrics.fields.minkowski import gaussian_minkowski, minkowski, peaks
from genmodels.metrics.fields.moments import field_moments, magnetization
from genmodels.metrics.fields.one_point import histogram, survivors
from genmodels.metrics.fields.scattering import morlet, scales, scattering
from genmodels.metrics.fields.spectrum import power, radial_spectrum, rings, spectrum_errors, wave_numbers
from genmodels.metrics.fields.summary import distance, rms, summarize, unit_noise, weighted
from genmodels.metrics.fields.wavelets import Band, band_statistics, bands
from genmodels.rng import generator
from tests.random_fields import free_spectrum, gaussian_fields, smooth_spectrum

CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def white(n, size, *key):
    return torch.randn(n, size, size, generator=generator("white", *key), dtype=torch.float64)


def within(items, expected, errors=4.0, slack=0.0):
    """The mean over items [N, K] agrees with what it must be, in standard errors."""
    found = summarize(items)
    gap = (found.value - torch.as_tensor(expected)).abs() - slack
    assert (gap < errors * found.stderr).all(), (found.value, expected, found.stderr)


# ---- summaries and distances ----


def test_delta_method_gives_the_errors_of_skewness_and_kurtosis():
    """√(6/n) and √(24/n) for n normal numbers."""
    x = white(600, 12, "moments")
    found = field_moments(x)
    flat = x.flatten().numpy()
    assert found.value[2].item() == pytest.approx(stats.skew(flat), rel=1e-9)
    assert found.value[3].item() == pytest.approx(stats.kurtosis(flat), rel=1e-9)
    expected = torch.tensor([2, 96, 6, 24]).double().div(len(flat)).sqrt()
    torch.testing.assert_close(found.stderr, expected, rtol=0.15, atol=0)  # the spread of 600 items is known to 3-10 %


def test_moments_do_not_lose_digits_to_a_large_mean():
    x = white(50, 8, "shifted").exp()
    here, there = field_moments(x), field_moments(x + 1e4)
    torch.testing.assert_close(here.value[2:], there.value[2:], rtol=1e-8, atol=0)
    assert there.value[0].item() == pytest.approx((x + 1e4).square().mean().item(), rel=1e-12)


def test_magnetization_of_a_few_fields():
    """Means 1, -1, 3 of 4 pixels: ⟨|m|⟩ = 5/3, ⟨m²⟩ = 11/3, ⟨m⁴⟩ = 83/3."""
    x = torch.tensor([1.0, -1.0, 3.0])[:, None, None] + torch.tensor([[0.5, -0.5], [-0.5, 0.5]])
    expected = torch.tensor([5 / 3, 4 * (11 / 3 - 25 / 9), 1 - (83 / 3) / (3 * (11 / 3) ** 2)], dtype=torch.float64)
    torch.testing.assert_close(magnetization(x).value, expected, **CLOSE)
    assert magnetization(torch.ones(2, 4, 4)).value.tolist() == pytest.approx([1, 0, 2 / 3])


def test_influence_is_the_derivative_of_a_distance_in_the_weight_of_an_item():
    """Taking one item of 500 twice moves the distance by influence/500, to second order."""
    x, y = white(500, 4, "x").exp(), white(300, 4, "y").exp() + 0.3
    norm = rms(torch.tensor([1.0, 2.0, 1.0, 1.0]).double())
    known = field_moments(y)
    base = distance(norm, field_moments(x), known)
    for i in (0, 100, 499):
        moved = distance(norm, field_moments(torch.cat([x, x[i : i + 1]])), known).value - base.value
        assert moved * 501 == pytest.approx(base.influence[i].item(), rel=0.1, abs=0.02)


def test_noise_is_the_mean_distance_of_two_sets_of_one_law():
    """Of correlated numbers; of one number it is √(2/π) standard errors."""
    mix = torch.randn(5, 5, generator=generator("mix"), dtype=torch.float64)
    draw = lambda n, *key: torch.randn(n, 5, generator=generator(*key), dtype=torch.float64) @ mix  # noqa: E731
    norms = {"rms": rms(2.0), "first": weighted(3.0, slice(1)), "sum": weighted(0.5)}
    noise = unit_noise(norms, summarize(draw(4000, "spread")))
    assert noise["first"] == pytest.approx(3 * math.sqrt(2 / math.pi) * mix[:, 0].norm().item(), rel=0.1)
    pairs = [(summarize(draw(50, "a", i)), summarize(draw(200, "b", i))) for i in range(300)]
    for name, norm in norms.items():
        seen = sum(distance(norm, *pair).value for pair in pairs) / 300
        assert noise[name] * math.sqrt(1 / 50 + 1 / 200) == pytest.approx(seen, rel=0.15), name


def test_equal_statistics_are_at_no_distance_and_order_does_not_matter():
    x = summarize(white(20, 3, "equal").flatten(1))
    found = distance(rms(), x, x)
    assert found.value == 0 and found.stderr == 0
    assert distance(weighted(), x._replace(value=x.value * (1 + 1e-15)), x).value == 0
    with pytest.raises(ValueError, match="at least one item"):
        summarize(torch.zeros(0, 3))


# ---- spectrum ----


def test_power_of_plane_waves_and_of_everything():
    x = white(3, 16, "power")[:, :, :12]
    torch.testing.assert_close(power(x).mean((1, 2)), x.square().mean((1, 2)), **CLOSE)
    wave = 3 * torch.cos(2 * math.pi * 3 * torch.arange(16, dtype=torch.float64) / 16).expand(1, 16, 16)
    (found,) = radial_spectrum(wave)
    count = int((rings(16, 16) == 3).sum())
    expected = torch.zeros(9, dtype=torch.float64)
    expected[3] = 2 * 9 / 4 * 256 / count
    torch.testing.assert_close(found, expected, **CLOSE)
    assert radial_spectrum(2 + 0 * wave)[0, 0].item() == pytest.approx(4 * 256)


def test_rings_are_half_open_and_count_in_cycles_per_longer_side():
    assert rings(8, 8)[1, 0] == rings(8, 8)[1, 1] == 1 and rings(8, 8)[2, 2] == 3
    assert rings(32, 32)[8, 3] == 9 and rings(32, 32)[4, 2] == 4  # 8.54 and 4.47
    assert wave_numbers(4, 16)[1, 0] == 4 and wave_numbers(4, 16)[0, 1] == 1
    x = white(2, 16, "ring")
    by_hand = power(x)[:, rings(16, 16) == 5].mean(1)
    torch.testing.assert_close(radial_spectrum(x)[:, 5], by_hand, **CLOSE)
    assert radial_spectrum(x, 11).shape == (2, 12)
    with pytest.raises(ValueError, match="rings 0 … 11"):
        radial_spectrum(x, 12)
    with pytest.raises(ValueError, match="H, W"):
        radial_spectrum(torch.zeros(2, 3, 8, 8))


def test_spectrum_of_a_free_field():
    exact = free_spectrum(16)
    assert exact[0, 0] == 2 and exact[1, 0].item() == pytest.approx(1.5331757735, abs=1e-9)
    ring = rings(16, 16)
    expected = torch.stack([exact[ring == k].mean() for k in range(9)])
    within(radial_spectrum(gaussian_fields(1000, exact, "free")), expected)


def test_spectrum_errors_have_the_errors_of_their_means():
    """The power of a mode pair is exponential: a ring of n modes has the relative error √(2/n) per field."""
    x, y = gaussian_fields(400, free_spectrum(16), "x"), gaussian_fields(900, free_spectrum(16), "y")
    found = spectrum_errors(1.1 * x, y)
    modes = torch.tensor([(rings(16, 16) == k).sum().item() for k in range(1, 8)]).double()  # 8 has real modes
    torch.testing.assert_close(found.stderr[:7] / (1 + found.error[:7]), (2 / modes / 400).sqrt(), rtol=0.15, atol=0)
    torch.testing.assert_close(found.noise[:7] / (1 + found.error[:7]), (2 / modes / 900).sqrt(), rtol=0.15, atol=0)
    torch.testing.assert_close(spectrum_errors(1.1 * x, x).error, torch.full((8,), 0.21, dtype=torch.float64), **CLOSE)
    assert spectrum_errors(1.1 * x, x).rms == pytest.approx(0.21)


# ---- one point ----


def test_histogram_counts_what_lies_outside_too():
    x = torch.tensor([[-5.0, 0.0, 0.5, 1.0, 1.5, 2.0, 9.0, 9.0]])
    assert (8 * histogram(x, torch.tensor([0.0, 1.0, 2.0]))).tolist() == [[1, 2, 2, 3]]


def test_areas_give_the_wasserstein_distance():
    x, y = white(1, 20, "w")[0].flatten(), white(1, 30, "v")[0].flatten() * 1.4 + 0.2
    found = (survivors(x[None], -1, 2, 3000) - survivors(y[None], -1, 2, 3000)).abs().sum().item()
    assert found == pytest.approx(stats.wasserstein_distance(x, y), rel=1e-3)  # crossings inside cells of 0.001
    areas = survivors(x[None], -9, 9, 40)[0]
    assert areas[1:-1].sum().item() == pytest.approx(x.mean().item() + 9, rel=1e-12)  # E (x - low)
    moved = survivors(x[None] + 0.37, -1, 2, 7) - survivors(x[None], -1, 2, 7)
    moved[:, 0] *= -1  # what lies below counts the other side
    assert moved.sum().item() == pytest.approx(0.37, rel=1e-12) and (moved >= 0).all()


# ---- bispectrum ----


def test_bispectrum_is_the_mean_over_all_triads():
    x = white(2, 8, "triads").exp()
    triangles = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 3)]
    modes, ring = torch.fft.fft2(x).numpy(), rings(8, 8).numpy()
    found = {t: [0.0, 0] for t in triangles}
    places = list(itertools.product(range(8), repeat=2))
    for k, q in itertools.product(places, places):
        r = (-k[0] - q[0]) % 8, (-k[1] - q[1]) % 8
        triangle = int(ring[k]), int(ring[q]), int(ring[r])
        if triangle in found:
            found[triangle][0] = found[triangle][0] + modes[(..., *k)] * modes[(..., *q)] * modes[(..., *r)] / 64
            found[triangle][1] += 1
    expected = torch.tensor(np.stack([(total / count).real for total, count in found.values()], 1))
    torch.testing.assert_close(bispectrum(x, triangles), expected, rtol=1e-9, atol=1e-9)


def test_bispectrum_of_independent_pixels_is_their_third_cumulant():
    x = torch.empty(1500, 12, 12, dtype=torch.float64).exponential_(generator=generator("exponential"))
    within(bispectrum(x, equilateral(12, 12) + squeezed(12, 12)), 2.0)


def test_bispectrum_of_a_field_with_quadratic_terms():
    """2f (P₁P₂ + P₂P₃ + P₃P₁) averaged over triads; what is odd in f has none of the noise of g itself."""
    size, f = 16, 0.02
    exact, triangles = free_spectrum(size), [(2, 2, 2), (1, 4, 4)]
    g = gaussian_fields(1500, exact, "tree")
    square = g.square() - exact.mean()
    odd = (bispectrum(g + f * square, triangles) - bispectrum(g - f * square, triangles)) / 2
    ring = rings(size, size)
    ones = {b: torch.fft.ifft2((ring == b).double()).real for b in (1, 2, 4)}
    powers = {b: torch.fft.ifft2((ring == b) * exact).real for b in (1, 2, 4)}
    expected = []
    for a, b, c in triangles:
        pairs = ((a, b, c), (b, c, a), (c, a, b))
        total = sum((powers[i] * powers[j] * ones[k]).mean() for i, j, k in pairs)
        expected.append(2 * f * (total / (ones[a] * ones[b] * ones[c]).mean()).item())
    within(odd, torch.tensor(expected, dtype=torch.float64), slack=1e-3 * max(expected))  # f² of the leading term
    assert (torch.tensor(expected) > 10 * summarize(odd).stderr).all()


def test_triangles_close_without_wrapping_round():
    assert equilateral(32, 32, 4) == [(1, 1, 1), (2, 2, 2), (5, 5, 5), (10, 10, 10)]
    assert squeezed(32, 32, 3) == [(1, 2, 2), (1, 5, 5), (1, 14, 14)]
    assert equilateral(8, 8) == [(1, 1, 1), (2, 2, 2)] and squeezed(8, 8) == [(1, 2, 2)]
    with pytest.raises(ValueError, match="no three modes"):
        bispectrum(white(1, 8, "none"), [(1, 1, 4)])


# ---- shapes ----


def counted(inside):
    """Area, crossings and Euler characteristics (of pixels that touch by sides, and by corners too), one by one."""
    h, w = inside.shape
    at = lambda i, j: bool(inside[i % h, j % w])  # noqa: E731
    cells = [(i, j) for i in range(h) for j in range(w)]
    crossings = sum((at(i, j) != at(i, j + 1)) + (at(i, j) != at(i + 1, j)) for i, j in cells)
    squares = [[at(i, j), at(i, j + 1), at(i + 1, j), at(i + 1, j + 1)] for i, j in cells]
    area = sum(at(*c) for c in cells)
    pairs = [[at(i, j), at(i, j + 1)] for i, j in cells] + [[at(i, j), at(i + 1, j)] for i, j in cells]
    sides = area - sum(map(all, pairs)) + sum(map(all, squares))
    corners = area - sum(map(any, pairs)) + sum(map(any, squares))
    return area, crossings, (sides + corners) / 2


def test_functionals_are_counted_right():
    x = white(4, 7, "shapes")[:, :5]
    thresholds = torch.tensor([-1.0, 0.0, x[1, 2, 3].item(), 1.3], dtype=torch.float64)
    thresholds = thresholds.sort().values  # one of them is a pixel's value: it is in the set
    found = minkowski(x, thresholds)
    for (n, field), (t, threshold) in itertools.product(enumerate(x), enumerate(thresholds)):
        area, crossings, euler = counted(field >= threshold)
        assert found.area[n, t].item() == pytest.approx(area / 35, abs=1e-14)
        assert found.length[n, t].item() == pytest.approx(math.pi / 16 * crossings / 35, abs=1e-14)
        assert found.euler[n, t].item() == pytest.approx(euler / 35, abs=1e-14)


def test_euler_characteristic_of_a_disc_a_ring_and_a_band():
    disc = torch.zeros(3, 9, 9)
    disc[0, 2:5, 2:6] = 1
    disc[1, 2:6, 2:6], disc[1, 3:5, 3:5] = 1, 0
    disc[2, 4] = 1
    found = minkowski(disc, torch.tensor([0.5]))
    torch.testing.assert_close(81 * found.euler[:, 0], torch.tensor([1.0, 0, 0]).double(), **CLOSE)
    torch.testing.assert_close(81 * found.area[:, 0], torch.tensor([12.0, 12, 9]).double(), **CLOSE)
    turned = minkowski(-disc, torch.tensor([-0.5]))
    torch.testing.assert_close(turned.euler, -found.euler, **CLOSE)
    torch.testing.assert_close(turned.length, found.length, **CLOSE)


def test_shapes_of_independent_pixels():
    """With share p: crossings 2 · 2p(1 - p), χ = p(1-p)³ - p³(1-p); one pixel of nine is a peak, with density 9φΦ⁸."""
    x, t = white(400, 16, "independent"), torch.tensor([-0.7, 0.3, 1.0]).double()
    p, found = torch.tensor(stats.norm.sf(t.numpy())), minkowski(x, t)
    within(found.area, p)
    within(found.length, math.pi / 16 * 4 * p * (1 - p))
    within(found.euler, p * (1 - p) ** 3 - p**3 * (1 - p))
    heights = torch.cat([torch.zeros(1).double(), (1 - p) ** 9, torch.ones(1).double()]).diff() / 9
    within(peaks(x, t)[:, 1:], heights[1:])
    assert heights[0] < 1e-6 and peaks(x, t)[:, 0].sum() == 0


def test_functionals_of_smooth_normal_fields():
    """At a correlation length of 6 pixels the lattice is fine to 2 % of the largest value."""
    spectrum = smooth_spectrum(64, 4.0)
    spectrum = spectrum / spectrum.mean()
    k2 = (2 * math.pi / 64 * wave_numbers(64, 64)).square()
    slope = ((k2 * spectrum).mean() / 2).sqrt().item()
    heights = torch.linspace(-2, 2, 5, dtype=torch.float64)
    found = minkowski(gaussian_fields(300, spectrum, "smooth"), heights)
    for items, expected in zip(found, gaussian_minkowski(heights, slope), strict=True):
        within(items, expected, slack=0.02 * expected.abs().max().item())
        assert summarize(items).stderr.max() < 0.05 * expected.abs().max()


# ---- wavelets and scattering ----


def test_bands_have_the_energies_of_another_implementation():
    """Of sin(2πi/8) + cos(4πj/8)/2, i along axis 0; computed with filters of PyWavelets."""
    i, j = torch.meshgrid(torch.arange(8.0).double(), torch.arange(8.0).double(), indexing="ij")
    field = torch.sin(2 * math.pi * i / 8) + torch.cos(4 * math.pi * j / 8) / 2
    found = {band: c.square().sum().item() for band, c in bands(field[None]).items()}
    expected = {"low-high": 4.9206244657, "high-low": 0.3552624662, "high-high": 0.0}
    assert found == {Band(1, name): pytest.approx(value, abs=1e-9) for name, value in expected.items()}


def test_bands_are_octaves_down_to_four():
    found = bands(white(2, 32, "octaves"))
    assert [(b.octave, tuple(c.shape[1:])) for b, c in found.items()][::3] == [(1, (16, 16)), (2, (8, 8)), (3, (4, 4))]
    assert len(bands(white(1, 12, "odd"))) == 6 and not bands(white(1, 4, "small"))
    for summary in band_statistics(white(300, 16, "law")).values():  # an orthogonal transform of white noise is that
        expected = torch.tensor([math.sqrt(2 / math.pi), 1, 3, 0, 0]).double()
        assert ((summary.value - expected).abs() < 4 * summary.stderr).all()


def test_scattering_is_that_of_direct_convolutions():
    """Scales from 2 on live on coarser grids, and are close."""
    x = white(2, 32, "scattering")
    filters = [morlet(32, 32, j) for j in range(4)]
    first = [[torch.fft.ifft2(torch.fft.fft2(x) * f).abs() for f in bank] for bank in filters]
    found = scattering(x)
    expected = torch.stack([u.mean((1, 2)) for bank in first for u in bank], 1)
    torch.testing.assert_close(found.first[:, :8], expected[:, :8], **CLOSE)
    torch.testing.assert_close(found.first[:, 8:], expected[:, 8:], rtol=0.02, atol=0)
    second = [
        torch.fft.ifft2(torch.fft.fft2(u) * f).abs().mean((1, 2))
        for j, k in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
        for u in first[j]
        for f in filters[k]
    ]
    torch.testing.assert_close(found.second, torch.stack(second, 1), rtol=0.05, atol=0)
    assert scales(32, 32) == 4 and found.first.shape == (2, 16) and found.second.shape == (2, 96)


def test_wavelets_have_mean_0_and_their_frequency_and_direction():
    for scale in range(3):
        filters = morlet(32, 32, scale)
        assert filters[:, 0, 0].abs().max() < 1e-12
        k = 2 * math.pi * torch.fft.fftfreq(32, dtype=torch.float64)
        for turn in (0, 2):  # along columns, along rows
            place = int(filters[turn].argmax())
            along = k[place % 32 if turn == 0 else place // 32]
            across = k[place // 32 if turn == 0 else place % 32]
            assert across == 0 and along.item() == pytest.approx(3 * math.pi / 4 / 2**scale, abs=0.2)
    x = white(1, 16, "turned")
    order = torch.tensor([2, 1, 0, 3])  # transposing takes an angle θ to π/2 - θ
    plain, turned = scattering(x).first.reshape(3, 4), scattering(x.mT).first.reshape(3, 4)
    torch.testing.assert_close(turned, plain[:, order], rtol=1e-5, atol=0)


def test_second_order_tells_an_envelope_from_a_plane_wave():
    """A carrier at the frequency of scale 1 under an envelope at that of scale 3; sidebands lie off the peak."""
    k = torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64
    wave = torch.cos(12 * k).expand(1, 64, 64)
    plain, modulated = scattering(wave), scattering(wave * (1 + 0.5 * torch.cos(3 * k)))
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    place = pairs.index((1, 3)) * 16  # both along the wave
    assert plain.second[0, place] < 1e-3
    amplitude = morlet(64, 64, 1)[0, 0, 12].item() / 2
    assert plain.first[0, 4].item() == pytest.approx(amplitude, rel=1e-3)
    low, middle, high = morlet(64, 64, 1)[0, 0, [9, 12, 15]].tolist()
    depth = 0.25 * (low + high) / middle
    expected = amplitude * depth * morlet(64, 64, 3)[0, 0, 3].item() / 2
    assert modulated.second[0, place].item() == pytest.approx(expected, rel=0.02)
