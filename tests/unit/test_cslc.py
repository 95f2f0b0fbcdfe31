"""The model of fields from coarse to fine: samples and upsampling of laws that are known, and the command for it."""

import copy
import json
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from genmodels.commands import sample, train
from genmodels.data.phi4 import Phi4
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
from genmodels.wavelet.tuning import ChainWarning, Tuning, check_moves

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
@pytest.mark.slow_for("kernel", "octaves")
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
    plain = fitted(1 + 2 * x, transform=Affine(loc=1.0, scale=2.0))
    drawn = plain.sample(500)
    assert drawn.mean().item() == pytest.approx(1, abs=0.25) and float(drawn.std()) / 2 == pytest.approx(
        float(x.std()), rel=0.05
    )
    logged = fitted((0.3 * x).exp() - 1, transform=LogShift(1.0))
    assert (logged.sample(300) > -1).all()


@pytest.mark.slow
def test_a_transform_that_does_not_fit_the_data_changes_no_units():
    x = free_field(1500)
    scaled = fitted(x, transform=Affine(loc=1.0, scale=0.5))
    assert float(scaled.sample(500).std()) == pytest.approx(float(x.std()), rel=0.05)


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


# ---- chains of samples that do not do what they did when they were tuned -------------------------------------------


@pytest.fixture
def broken(model):
    """A copy of the model, for a test to spoil."""
    return copy.deepcopy(model)


def told(draw):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = draw()
    return x, [str(w.message) for w in caught if issubclass(w.category, ChainWarning)]


def test_chains_of_a_good_model_are_not_told_of(model):
    for draw in (lambda: model.sample(300), lambda: model.sample(1), lambda: model.sample([9], num_steps=2)):
        assert told(draw)[1] == []


def test_chains_that_hardly_move_are_told_of_once_a_level(broken):
    """By steps that are seven times too long; draws are the same in any batch, and with or without a warning."""
    c = broken.conditionals[-1]
    c.step_size *= 7
    expected = f"8x8: chains of samples accept 0 of their proposals where {float(c.acceptance):.2g} are expected"
    x, messages = told(lambda: broken.sample(40, batch_size=13))
    (message,) = messages
    assert message.startswith(expected)
    assert "40 of 40 never moved" in message and "The coarser fields" in message
    one, single = told(lambda: broken.sample([17]))
    torch.testing.assert_close(one[0], x[17], rtol=0, atol=1e-5)  # products of matrices round by their batch
    assert "1 of 1 never moved" in single[0]
    with pytest.warns(ChainWarning) as caught:
        broken.sample(2)
    assert caught[0].filename == __file__  # not that of a wrapper


@pytest.mark.parametrize(("share", "warned"), [(0.40, True), (0.60, False)])
def test_acceptance_may_fall_to_half_of_what_was_found(model, share, warned):
    """Two in five, and three in five of it, of 10,000 chains: between them lie half and its standard error of 0.01."""
    c = model.conditionals[-1]
    accepted = torch.full((10_000,), round(1000 * share * float(c.acceptance)))
    assert bool(told(lambda: check_moves(c, accepted, 1000))[1]) == warned


def test_few_chains_may_differ(model):
    """Those of one item or nine with a third of the acceptance are no news, those of a hundred are."""
    c = model.conditionals[-1]
    for count, warned in ((1, False), (9, False), (100, True)):
        accepted = torch.full((count,), round(1000 * float(c.acceptance) / 3))
        assert bool(told(lambda a=accepted: check_moves(c, a, 1000))[1]) == warned


def test_chains_that_never_moved_are_told_of_among_others(model):
    c = model.conditionals[-1]
    accepted = torch.full((300,), 30)
    for stuck, steps, warned in ((3, 60, False), (4, 60, True), (4, 22, False)):
        a = accepted.where(torch.arange(300) >= stuck, 0)
        assert bool(told(lambda a=a, n=steps: check_moves(c, a, n))[1]) == warned


def test_moves_are_shorter_where_what_is_given_makes_the_law_narrow():
    """Far outside a double well's data its tails are a parabola as steep as at the last knot: one scale for all coarse
    fields makes chains that never move there, of which samples tell."""
    x = Phi4(size=8, beta=0.76, count=600, reference=5).all("train").x
    terms = (partial(Quadratic, reach=2), partial(Potential, basis=BSpline(6)))
    model = CSLC(terms, tuning=SHORT, octaves=1, periodic=True, shape=(1, 8, 8), transform=Identity())
    model.prepare([Batch(x)], generator=generator("wells"))
    coarse, c = model.coarsen(x[:40]), model.conditionals[-1]
    assert told(lambda: model.upsample(coarse))[1] == told(lambda: model.upsample(30 * coarse))[1] == []
    known = model.tree.given(1, model.fields(x[: SHORT.starts].double())[0][1])
    far = model.tree.given(1, 30 * x[:40, 0].double())
    eye = torch.eye(c.level.dim, dtype=torch.float64)

    def curvature(y):
        return torch.stack([c.hessian(u.expand(len(eye), -1, -1), eye).diagonal().mean() for u in y / c.unit])

    torch.testing.assert_close(c.stiffness, curvature(known).clamp(min=0).mean(), rtol=1e-5, atol=0)
    ratio = c.scale_given(far)[:, 0] / c.scale[0]
    torch.testing.assert_close(ratio, (c.stiffness / curvature(far)).sqrt().clamp(max=1))
    assert ratio.max() < 0.7
    torch.testing.assert_close(c.scale_given(far[7:8])[0], c.scale_given(far)[7])  # whatever else is drawn with it
    coarsest = model.conditionals[0]
    coarsest.stiffness.fill_(1e-3)  # where nothing is given there is one law, and one scale
    assert torch.equal(coarsest.scale_given(torch.full((2, 4, 4), 9.0).double()), coarsest.scale.expand(2, -1))
    c.stiffness.fill_(math.inf)
    (message,) = told(lambda: model.upsample(30 * coarse))[1]
    assert message.startswith("8x8: chains of samples accept 0.0") and "their units" in message


def test_shorter_moves_leave_the_law_as_it_is(broken):
    """Half the scale at every level that is given anything; powers as in the first test of this file."""
    for c in broken.conditionals:
        c.stiffness /= 4
    ratio = broken.conditionals[-1].scale_given(torch.zeros(1, 8, 8)) / broken.conditionals[-1].scale
    torch.testing.assert_close(ratio, torch.full((1, 48), 0.5), check_dtype=False)
    error = (spectrum(broken.sample(500, num_steps=400)) / POWER - 1).abs()
    assert error.max() < 4.5 * math.sqrt(2 / 500 + 2 / 3000)
    assert error.square().mean().sqrt() < 2 * math.sqrt(1.2 / 500 + 1.2 / 3000)


def test_moves_have_one_scale_where_energies_are_not_convex_or_runs_are_old(model):
    c = copy.deepcopy(model.conditionals[-1])
    kept = c.state_dict()
    del kept["stiffness"]
    c.load_state_dict(kept)
    assert c.stiffness == math.inf
    c.theta.zero_()[0] = -1.0
    c.set_scale(torch.ones(3, 8, 8, dtype=torch.float64))
    assert c.stiffness == math.inf and (c.scale == 1).all()
    assert torch.equal(c.scale_given(torch.ones(3, 8, 8)), torch.ones(3, 48))


def test_chains_that_leave_what_is_finite_are_refused(broken):
    c = broken.conditionals[-1]
    c.step_size.fill_(1e25)  # squares of fields overflow in float32
    all_of_them = f"{3 * int(c.num_steps)} of {3 * int(c.num_steps)}"
    with pytest.raises(ValueError, match=rf"8x8: chains of 3 of 3 items meet energies .* in {all_of_them} proposals"):
        broken.sample(3)


def test_levels_that_are_not_finite_are_refused(broken):
    broken.conditionals[0].unit.fill_(1e300)
    with pytest.raises(ValueError, match="1x1: fields drawn there are not finite"):
        broken.sample(3)


# ---- mistakes ------------------------------------------------------------------------------------------------------


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


def test_numbers_that_are_fitted_are_the_parameters_of_all_levels(model):
    """Of reach 2: 1, 3, 5 and 6 orbits of a grid's shifts, less one where the sum of all is no detail."""
    sizes = [len(c.theta) for c in model.conditionals]
    assert model.fitted_numbers() == sum(sizes) and sizes == [1, 2, 5, 6]


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
