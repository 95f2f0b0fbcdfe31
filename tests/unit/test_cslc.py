"""The model of fields from coarse to fine: samples and upsampling of laws that are known, and the command for it."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from genmodels.commands import sample, train
from genmodels.registry import ConfigError
from genmodels.rng import generator
from genmodels.transforms import Affine, Identity, LogShift
from genmodels.types import Batch, NotApplicable
from genmodels.wavelet.bases import BSpline
from genmodels.wavelet.chains import HMC
from genmodels.wavelet.concavity import spectrum as spectrum_of
from genmodels.wavelet.cslc import CSLC
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.score_matching import FitWarning
from genmodels.wavelet.terms import Quadratic
from genmodels.wavelet.tuning import Tuning

POWER = 1 / (
    4.5 - 2 * (2 * math.pi * torch.arange(8.0) / 8).cos()[:, None] - 2 * (2 * math.pi * torch.arange(8.0) / 8).cos()
)
OWN = (partial(Quadratic, reach=2, own=True),)
SHORT = Tuning(starts=32, adapt=60, record=100, least=20, most=150)  # R̂ is no part of what is tested


def free_field(n, *, mean=0.0):
    """Fields [n, 1, 8, 8] of the spectrum POWER."""
    white = torch.randn(n, 1, 8, 8, generator=generator("free field", n))
    return mean + torch.fft.ifft2(torch.fft.fft2(white) * POWER.sqrt()).real


def fitted(x, transform=None, **options):
    model = CSLC(OWN, **{"tuning": SHORT, **options}, periodic=True, shape=(1, 8, 8), transform=transform or Identity())
    model.prepare([Batch(part) for part in x.split(500)], generator=generator("prepare"))
    return model


@pytest.fixture(scope="module")
def model():
    return fitted(free_field(3000))


def spectrum(x):
    return torch.fft.fft2(x[:, 0].double(), norm="ortho").abs().square().mean(0)


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel": HMC(3)}, {"subdivisions": (2, 1, 1)}, {"octaves": 0}],
    ids=lambda o: "".join(o) or "plain",
)
def test_samples_have_the_spectrum_of_the_data(options):
    """Powers of 64 modes, each known to √(2/n) where k = -k and √(1/n) elsewhere, of data and samples alike."""
    x = fitted(free_field(2000), **options).sample(500)
    error = (spectrum(x) / POWER - 1).abs()
    assert error.max() < 4.5 * math.sqrt(2 / 500 + 2 / 2000)
    assert error.square().mean().sqrt() < 2 * math.sqrt(1.2 / 500 + 1.2 / 2000)


def test_a_sample_depends_on_its_seed_alone(model):
    x = model.sample(6)
    assert torch.equal(model.sample([4, 1], batch_size=1), x[[4, 1]])
    assert not torch.equal(model.sample([4], num_steps=3), x[4:5])


@pytest.mark.parametrize("octaves", [1, 2])
def test_what_is_upsampled_keeps_its_coarse_field(model, octaves):
    x = free_field(40)
    coarse = model.coarsen(x, octaves)
    assert coarse.shape == (40, 1, 8 >> octaves, 8 >> octaves)
    drawn = model.upsample(coarse)
    torch.testing.assert_close(model.coarsen(drawn, octaves), coarse, rtol=0, atol=2e-6)
    assert (drawn - x).abs().mean() > 0.1
    assert torch.equal(model.upsample(coarse[3:5], seeds=[3, 4], batch_size=1), drawn[3:5])


def test_details_given_a_coarse_field_have_the_conditional_law(model):
    """A Gaussian: mean and covariance of all 64 pixels given the 4 x 4 coarse field, by linear algebra."""
    covariance = torch.fft.ifft2(torch.fft.fft2(torch.eye(64).view(64, 8, 8)) * POWER).real.reshape(64, 64).double()
    low = model.coarsen(torch.eye(64).view(64, 1, 8, 8) + model.mean.float()).flatten(1).double().T - float(model.mean)
    gain = covariance @ low.T @ torch.linalg.inv(low @ covariance @ low.T)
    coarse = model.coarsen(free_field(1))
    drawn = model.upsample(coarse.expand(2000, -1, -1, -1)).flatten(1).double()
    mean = gain @ (coarse.flatten().double() - float(model.mean)) + float(model.mean)
    variance = (covariance - gain @ low @ covariance).diagonal()
    error = (drawn.mean(0) - mean) / (variance / 2000).sqrt()
    assert error.square().mean() < 3  # 1 of exact parameters; those of 3000 fields shift all means a little
    assert ((drawn.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / 2000 + 2 / 3000)).all()


def test_fields_whose_mean_never_varies_are_drawn_with_it():
    x = free_field(1500, mean=0.4)
    x = x - x.mean((1, 2, 3), keepdim=True) + 0.4
    model = fitted(x)
    drawn = model.sample(200)
    assert model.first == 1 and (drawn.mean((1, 2, 3)) - 0.4).abs().max() < 1e-5
    error = (spectrum(drawn - 0.4) / POWER - 1).flatten()[1:]
    assert error.abs().max() < 4.5 * math.sqrt(2 / 200 + 2 / 1500)
    with pytest.raises(NotApplicable, match="mean of the training fields never varies"):
        model.likelihood(x[:2])


def test_items_are_drawn_in_units_of_the_data():
    x = free_field(1500)
    scaled = fitted(x, transform=Affine(loc=1.0, scale=0.5))
    plain = fitted(1 + 2 * x, transform=Affine(loc=1.0, scale=2.0))
    drawn = plain.sample(500)
    assert drawn.mean().item() == pytest.approx(1, abs=0.25) and float(drawn.std()) / 2 == pytest.approx(
        float(x.std()), rel=0.05
    )
    assert float(scaled.sample(500).std()) == pytest.approx(float(x.std()), rel=0.05)
    logged = fitted((0.3 * x).exp() - 1, transform=LogShift(1.0))
    assert (logged.sample(300) > -1).all()


def test_even_potentials_leave_the_mean_at_zero():
    x = free_field(400, mean=0.2)
    even = CSLC(
        (*OWN, partial(Potential, basis=BSpline(6), even=True)), periodic=True, shape=(1, 8, 8), transform=Identity()
    )
    even.fit([Batch(x)])
    plain = CSLC(OWN, periodic=True, shape=(1, 8, 8), transform=Identity())
    plain.fit([Batch(x)])
    assert even.mean == 0 and float(plain.mean) == pytest.approx(float(x.mean()), rel=1e-5)


def test_fields_that_are_not_periodic_are_fitted_with_a_warning():
    model = CSLC(OWN, tuning=SHORT, shape=(1, 8, 8), transform=Identity(), periodic=False)
    with pytest.warns(FitWarning, match=r"not periodic.*a seam at the borders.*data.apodize"):
        model.prepare([Batch(free_field(300))], generator=generator("seam"))


def test_chains_that_are_cut_short_are_told_of():
    with pytest.warns(
        FitWarning, match=r"8x8: 10 autocorrelation times are \d+ transitions, and samples take at most 3"
    ):
        fitted(free_field(300), tuning=Tuning(starts=8, adapt=20, record=50, least=2, most=3))


def test_items_that_are_not_finite_are_refused(model):
    x = free_field(2)
    x[1, 0, 3, 3] = math.nan
    for ask in (model.likelihood, lambda v: model.loss(Batch(v))):
        with pytest.raises(ValueError, match="NaN or infinity"):
            ask(x)
    with pytest.raises(ValueError, match="coarse fields hold NaN"):
        model.upsample(x[:, :, :4, :4])
    assert model.likelihood(x[:0]).value.shape == (0,)
    with pytest.raises(ConfigError, match="energy needs one term"):
        CSLC((), periodic=True, shape=(1, 8, 8), transform=Identity())


def test_nothing_is_drawn_for_no_seeds(model):
    assert model.sample(0).shape == model.upsample(torch.zeros(0, 1, 4, 4)).shape == (0, 1, 8, 8)


def test_fields_that_cannot_be_halved_are_fitted_whole_with_a_warning():
    terms = (partial(Quadratic, reach=1, own=True),)
    model = CSLC(terms, tuning=SHORT, periodic=True, shape=(1, 9, 9), transform=Identity())
    with pytest.warns(FitWarning, match=r"9 x 9 can be halved 0 times at most, so that 9x9 pixels are drawn at once"):
        model.prepare([Batch(torch.randn(300, 1, 9, 9, generator=generator("odd")))], generator=generator("p"))


def test_sparse_fields_and_levels_without_features_are_refused():
    sparse = (torch.rand(100, 1, 8, 8, generator=generator("sparse")) < 5e-4).float()
    potential = (partial(Potential, basis=BSpline(6)),)
    with pytest.raises(ConfigError, match=r"potential of 8x8: all but .* no interval. Sparse fields"):
        CSLC(potential, octaves=0, periodic=True, shape=(1, 8, 8), transform=Identity()).fit([Batch(sparse)])
    with pytest.raises(ConfigError, match=r"1x1: no term has a feature there"):
        CSLC((Quadratic,), periodic=True, shape=(1, 8, 8), transform=Identity()).fit([Batch(free_field(50))])


def test_convexity_is_told_of_the_energy_that_is_sampled():
    """The guard of tails moves parameters after the fit."""
    x = (0.6 * free_field(200)).exp()
    terms = (partial(Quadratic, reach=1), partial(Potential, basis=BSpline(8)))
    model = CSLC(terms, tuning=SHORT, periodic=True, shape=(1, 8, 8), transform=Identity())
    with pytest.warns(FitWarning, match="not convex"):
        logs = model.prepare([Batch(x)], generator=generator("told"))
    told = {c.level.label: float(c.minima[0]) for c in model.conditionals}
    assert any(c.held.any() for c in model.conditionals)
    units = model.units(x[:32])
    for c, u in zip(model.conditionals[1:], units[1:], strict=True):
        found = spectrum_of(c.hessian, u, c.level.dim).smallest
        assert told[c.level.label] == pytest.approx(found, rel=1e-6)
    assert float(logs["hessian_min"]) == min(told[c.level.label] for c in model.conditionals[1:])


def test_mistakes(model):
    with pytest.raises(ValueError, match=r"not fitted yet"):
        CSLC(OWN, periodic=True, shape=(1, 8, 8), transform=Identity()).sample(2)
    with pytest.raises(ValueError, match=r"grid of one of the model's octaves \(1 x 1, 2 x 2, 4 x 4, 8 x 8\)"):
        model.upsample(torch.zeros(2, 1, 3, 3))
    with pytest.raises(ValueError, match=r"one seed per field is needed, found 3 for 2"):
        model.upsample(torch.zeros(2, 1, 4, 4), seeds=3)
    with pytest.raises(ValueError, match=r"grid 8 x 8 have all their details already"):
        model.upsample(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"num_steps >= 1"):
        model.sample(2, num_steps=0)
    with pytest.raises(ConfigError, match=r"starts >= 4"):
        Tuning(starts=2)


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upsampling")
    node = {
        "name": "free",
        "data": {"name": "gaussian_field", "size": 8, "count": 200, "reference": 20},
        "model": {
            "name": "cslc",
            "energy": [{"name": "quadratic", "reach": 1, "own": True}],
            "tuning": {"starts": 16, "adapt": 40, "record": 40, "least": 10},
        },
        "train": {"steps": 0, "ema": [], "sample_every": 0},
    }
    (folder / "free.yaml").write_text(json.dumps(node))
    assert train([str(folder / "free.yaml"), "--root", str(folder)]) == 0
    return folder / "free"


def test_command_upsamples_items_and_files(run, tmp_path, capsys):
    assert sample([str(run), "--upsample", "test:0-2", "--octaves", "2", "--out", str(tmp_path / "items")]) == 0
    drawn = np.load(tmp_path / "items.npz")
    assert drawn["arr_0"].shape == (3, 1, 8, 8) and json.loads(str(drawn["notes"]))["fields"] == "test:0-2"
    assert (tmp_path / "items.png").exists() and "3 fields in" in capsys.readouterr().out
    np.save(tmp_path / "coarse.npy", np.zeros((1, 4, 4), np.float32))
    assert sample([str(run), "--upsample", str(tmp_path / "coarse.npy"), "--seeds", "5,6", "--device", "cpu"]) == 0
    found = next((run / "upsampled").glob("*.npz"))
    assert found.name.startswith("coarse-from4x4")
    two = np.load(found)["arr_0"]
    assert two.shape == (2, 1, 8, 8) and not np.array_equal(two[0], two[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--upsample", "test:30"], "items 0 … 19"),
        (["--upsample", "nothing.npy"], "there is no file 'nothing.npy'"),
        (["--octaves", "1"], "--octaves: is for --upsample"),
        (["--upsample", "test:0", "--condition", "3"], "--condition: is for samples"),
        (["--upsample", "test:0", "--octaves", "9"], "octaves"),
        (["--upsample", "test:0", "--invert", "test:1"], "choose one"),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(v),
)
def test_command_says_what_is_wrong(run, words, message, capsys):
    assert sample([str(run), *words]) == 2
    assert message in capsys.readouterr().err
