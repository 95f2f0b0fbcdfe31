"""Fields without power above some frequency are named, and steep spectra are not."""

import re
from functools import partial

import pytest
import torch

from genmodels.data.lognormal_field import LognormalField
from genmodels.data.phi4 import Phi4
from genmodels.registry import ConfigError
from genmodels.rng import generator
from genmodels.transforms import Affine, Identity
from genmodels.types import Batch
from genmodels.wavelet.band_limit import Power
from genmodels.wavelet.cslc import CSLC
from genmodels.wavelet.terms import Quadratic
from genmodels.wavelet.tree import Tree

CPU = torch.device("cpu")


def frequencies(height, width):
    """[H, W] |k| and |q| in cycles per axis."""
    k, q = (torch.fft.fftfreq(n).double().mul(n).abs() for n in (height, width))
    return k[:, None].expand(height, width), q.expand(height, width)


def fields(power, count=100, offset=0.0):
    """[B, 1, H, W] float32 of a spectrum [H, W], of standard deviation 1, filtered in float64."""
    white = torch.randn(count, 1, *power.shape, generator=generator("band limit"), dtype=torch.float64)
    x = torch.fft.ifft2(torch.fft.fft2(white) * power.sqrt()).real
    return (x / x.std() + offset).float()


def look(x, transform=None, **options):
    """What the model says of fields, from the finest level down; the streams of two halves."""
    size, transform = tuple(x.shape[2:]), transform or Identity()
    power = Power(size, transform, CPU)
    for part in x.chunk(2):
        power.update(part, transform(part.double())[0].squeeze(1))
    for level in reversed(Tree(size, **options).levels):
        power.check(level)


def white(where):
    """The spectrum 1/(½ + k²) of the frequencies of a 16 x 16 grid that are kept."""
    k, q = frequencies(16, 16)
    return where(k, q) / (0.5 + k.square() + q.square())


LIMITED = {
    "disc": (
        lambda k, q: k**2 + q**2 < 64,
        r"16x16: .* empty from 8.06 to 9.9 cycles.* \(17%.* at most 12 x 12 pixels",
    ),
    "smaller disc": (
        lambda k, q: k**2 + q**2 < 9,
        r"16x16: .* empty from 3 to 9.9 cycles.*\(100%.*at most 6 x 6 pixels",
    ),
    "square": (lambda k, q: (k < 6) & (q < 6), r"16x16: .* empty from 6 to 9.9 cycles .*at most 12 x 12 pixels"),
    "one axis": (lambda k, q: q < 6, r"16x16: .* empty from 6 to 9.9 cycles .*at most 12 x 12 pixels"),
}


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("offset", [0.0, 300.0], ids=["centred", "large mean"])
def test_empty_frequencies_are_named_with_the_grid_that_holds_the_rest(name, offset):
    keep, message = LIMITED[name]
    with pytest.raises(ConfigError, match=message):
        look(fields(white(keep), offset=offset))


def test_filters_in_float32_leave_more_than_rounding_and_are_seen():
    keep = white(LIMITED["disc"][0]).sqrt()[:, :9].float()
    x = torch.fft.irfft2(torch.fft.rfft2(torch.randn(100, 1, 16, 16, generator=generator("float32"))) * keep)
    with pytest.raises(ConfigError, match=r"empty from 8.06 to 9.9"):
        look(x)


def test_units_and_thresholds_of_log_fields_are_those_of_model_space():
    x = fields(white(LIMITED["square"][0]))
    with pytest.raises(ConfigError, match=r"empty from 6 to 9.9"):
        look(1e6 * x, Affine(loc=3.0, scale=1e4))
    look(x.exp())  # whose spectrum has no limit


OPEN = {
    "all": lambda k, q: k >= 0,
    "corners": lambda k, q: k**2 + q**2 < 85,
    "half the side": lambda k, q: (k < 8) & (q < 8),
    "a line": lambda k, q: q != 3,
    "large scales": lambda k, q: k**2 + q**2 >= 9,
    "a gap": lambda k, q: (k**2 + q**2 < 20) | (k**2 + q**2 > 42),
}


@pytest.mark.parametrize("name", OPEN)
def test_holes_that_are_no_limit_are_left_alone(name):
    look(fields(white(OPEN[name])))


@pytest.mark.parametrize("steepness", [4, 8])
def test_steep_spectra_are_left_alone(steepness):
    k, q = frequencies(64, 64)
    look(fields((1 + k.square() + q.square()) ** (-steepness / 2), 20))


def test_simulated_fields_are_left_alone():
    look(Phi4(size=8, count=60, reference=5).all("train").x)
    look(LognormalField(size=64, count=30, reference=5).all("train").x)


@pytest.mark.parametrize("rounding", [1e-20, 1e-8], ids=["the mean decides", "rounding decides"])
@pytest.mark.parametrize(("edge", "limited"), [(23, True), (24, False)])
def test_a_band_is_empty_below_a_threshold_on_a_tenth_of_it(rounding, edge, limited):
    """Of a spectrum 1 that falls in a square corner: of 32² - 16² frequencies 9² are empty, or 8²."""
    k, q = frequencies(64, 64)
    level = Tree((64, 64)).levels[-1]
    corner = (k >= edge) & (q >= edge)
    mean = 1 - (32 - edge) ** 2 / 768
    assert ((32 - edge) ** 2 / 768 >= 0.1) == limited
    for factor in (0.8, 1.25):
        least = max(100 * rounding, 1e-10 * mean)
        found = Power((64, 64), Identity(), CPU)
        found.power, found.n = torch.where(corner, factor * least, 1.0)[:, :33], 1
        found.rounding.fill_(rounding)
        if factor < 1 and limited:
            with pytest.raises(ConfigError, match=r"64x64: .* empty from 32.5 to 43.8 .*\(11%.* at most 46 x 46"):
                found.check(level)
        else:
            found.check(level)


def test_rounding_is_that_of_numbers_between_neighbours():
    """Of fields ± 1.5 and ± 3 that is 2^-46/12 and 2^-44/12; their own spectrum is one frequency."""
    x = torch.tensor([1.5, -1.5]).tile(2).expand(3, 1, 4, 4)
    found = Power((4, 4), Affine(loc=0.0, scale=0.25), CPU)
    found.update(x, x[:, 0].double())
    found.update(2 * x[:1], 2 * x[:1, 0].double())
    assert float(found.rounding) / found.n == pytest.approx(16 * (3 * 2.0**-46 + 2.0**-44) / 4 / 12, rel=1e-12, abs=0)
    assert float(found.power[0, 2]) == pytest.approx(16 * 2.25 * 7) and found.n == 4


def test_rings_and_grids_of_unlike_sides_have_their_own_bands():
    k, q = frequencies(16, 32)
    x = fields(((k < 5.5) & (q < 11)) / (1 + k**2 + q**2))
    message = r"16x32 band 3/4: .* empty from 11 to 20.5 cycles.*\(100% .* at most 11 x 22 pixels"
    with pytest.raises(ConfigError, match=message):
        look(x, subdivisions=2)
    x = fields((k**2 + q**2 / 4 > -1) / (1 + k**2 + q**2))
    look(x, subdivisions=2)


def test_a_model_refuses_them_when_it_is_fitted():
    x = fields(white(LIMITED["square"][0]), 200)
    model = CSLC((partial(Quadratic, own=True),), periodic=True, shape=(1, 16, 16), transform=Identity())
    with pytest.raises(ConfigError, match=re.escape("add the noise of the instrument")):
        model.fit([Batch(x)])
    noisy = x + 1e-3 * torch.randn(x.shape, generator=generator("instrument"))
    model.fit([Batch(noisy)])
