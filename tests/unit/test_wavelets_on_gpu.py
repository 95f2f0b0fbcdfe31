"""Wavelet models on a GPU: the same fits, fields and likelihoods as on a CPU."""

from functools import partial

import pytest
import torch

from genmodels.rng import generator
from genmodels.transforms import StandardizeChannels
from genmodels.types import Batch
from genmodels.wavelet.bands import Bands
from genmodels.wavelet.bases import BSpline, Sigmoid
from genmodels.wavelet.chains import HMC, MALA
from genmodels.wavelet.cslc import CSLC
from genmodels.wavelet.filtered import FilteredPotential
from genmodels.wavelet.polish import Polish
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.terms import Quadratic
from genmodels.wavelet.tuning import Tuning

pytestmark = pytest.mark.gpu
SPLINES = (partial(Quadratic, reach=2), partial(Potential, basis=BSpline(8)))
OPTIONS = {
    "splines": {"energy": SPLINES, "polish": Polish(fields=200, burn=20, iterations=2, transitions=8)},
    "warped": {"energy": (partial(Quadratic, reach=2), partial(Potential, basis=BSpline(8), warp=True))},
    "sigmoids": {"energy": (partial(Quadratic, reach=1), partial(Potential, basis=Sigmoid(8)))},
    "bands": {"energy": (partial(Potential, basis=BSpline(8)), Bands), "kernel": HMC(3)},
    "filtered": {"energy": (*SPLINES, partial(FilteredPotential, basis=BSpline(8)))},
    "rings": {"energy": SPLINES, "subdivisions": (2, 1, 1, 1)},
    "free energies": {"energy": SPLINES, "free_energy": SPLINES},
}


def fields(n):
    """Fields [n, 1, 16, 16] of skewed pixels."""
    k = 2 * torch.pi * torch.arange(16.0) / 16
    power = 1 / (4.5 - 2 * k.cos()[:, None] - 2 * k.cos())
    y = torch.fft.ifft2(torch.fft.fft2(torch.randn(n, 1, 16, 16, generator=generator("gpu", n))) * power.sqrt()).real
    return y + 0.2 * y.square()


def model(options):
    transform = StandardizeChannels(shape=(1, 16, 16))
    short = Tuning(starts=16, adapt=30, record=40, least=20, most=60)
    return CSLC(**{"kernel": MALA(), "tuning": short, **options}, periodic=True, shape=(1, 16, 16), transform=transform)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fits_fields_and_likelihoods_are_those_of_the_cpu(options):
    """Sums in float64 agree to rounding. Chains from the same state with the same noise differ by rounding in float32
    and by the rare proposals that it decides, so that most pixels of most fields agree."""
    x = fields(400)
    here, there = model(options), model(options).cuda()
    fits = {}
    for m in (here, there):
        batches = [Batch(part.to(m.device)) for part in x.split(200)]
        m.fit(batches)
        fits[m] = torch.cat([c.theta.cpu() for c in m.chained()])
        m.prepare(batches, generator=generator("prepare"))
    torch.testing.assert_close(fits[there], fits[here], rtol=1e-6, atol=1e-8)
    there.load_state_dict(here.state_dict())
    a, b = here.sample(32), there.sample(32).cpu()
    assert (a - b).abs().median() < 1e-3 * a.std()
    coarse = here.coarsen(x[:8])
    a, b = here.upsample(coarse), there.upsample(coarse).cpu()
    assert (a - b).abs().median() < 1e-3 * a.std()
    losses = [m.loss(Batch(x[:50].to(m.device))).value.cpu() for m in (here, there)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=1e-9)
    scores = [m.likelihood(x[:8].to(m.device), method="annealing", batch_size=8).value.cpu() for m in (here, there)]
    assert (scores[0] - scores[1]).abs().median() < 0.1  # of some 300 nats
