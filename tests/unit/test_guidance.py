"""A diffusion model with its samplers: seeds, ends, grids and costs; guidance by interval and by a weaker model."""

import pytest
import torch
from torch import Tensor

from genmodels.commands import sample, train
from genmodels.diffusion.denoiser import Guided
from genmodels.diffusion.grids import Discrete, Even, Karras, LogSNR
from genmodels.diffusion.guidance import Autoguided, WithinInterval, check_guide
from genmodels.diffusion.reverse import OfPath, Proportional
from genmodels.diffusion.samplers import Guidance, Sampler
from genmodels.networks.network import networks
from genmodels.registry import ConfigError
from genmodels.rng import SeedNoise
from genmodels.solvers.base import Fixed
from genmodels.solvers.edm import EDMEuler, EDMHeun, PredictorCorrector
from genmodels.solvers.exponential import DDIM, DPMpp, DPMpp2S
from genmodels.solvers.stochastic import SRIW1, EulerMaruyama
from genmodels.training.run import Run
from genmodels.transforms import Affine
from tests.contracts.test_denoiser import LINE, exact, number, randn
from tests.oracles import GAUSSIAN, gaussian, probability_flow
from tests.unit.test_diffusion import make, oracle

OFF = Guidance()


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "steps", "end"),
    [
        (EDMHeun(), 10, 0.60979800),
        (EDMHeun(), 18, 0.52762464),
        (EDMHeun(), 36, 0.50609709),
        (EDMHeun(), 72, 0.50142563),
        (EDMEuler(), 18, 0.42303144),
    ],
)
def test_edm_down_to_zero_noise(solver, steps, end):
    """N levels between 80 and .002 and then 0, from x = 80 on N(0, .5²); Heun costs 2n - 1 evaluations."""
    model = oracle(gaussian(torch.zeros(1), torch.tensor([0.25])), "edm", "edm")
    network = networks(model)[0]
    sampler = Sampler(model, steps, solver, Fixed(), Karras(), OFF, denoise=True)
    found = sampler.solve(torch.tensor([[80.0]]).double(), None, True).item()
    assert found == pytest.approx(end, abs=1e-8) and sampler.scale == pytest.approx(80)
    assert len(network.rows) == solver.stages * (steps - 1) + 1


@pytest.mark.parametrize(
    "options",
    [
        {"solver": DDIM(1.0), "num_steps": 5},
        {"solver": DPMpp(eta=1.0), "num_steps": 5, "grid": LogSNR()},
        {"solver": PredictorCorrector(), "num_steps": 4},
        {"solver": EulerMaruyama(), "num_steps": 5, "diffusivity": Proportional()},
        {"solver": EDMHeun(s_churn=3.0), "num_steps": 4, "grid": Karras(), "guidance": 2.0, "interval": (0.2, 5.0)},
    ],
    ids=["ddim", "dpmpp", "corrected", "sde", "churned"],
)
def test_noisy_samples_depend_on_their_seed_alone(options):
    model, seeds, labels = (
        make((3, 2), num_classes=3, moved=0.1),
        torch.tensor([4, 0, 9, 7]),
        torch.tensor([0, 1, 2, 0]),
    )
    whole = model.sample(seeds, condition=labels, **options)
    parts = model.sample(seeds, condition=labels, batch_size=3, **options)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)
    alone = model.sample([9], condition=labels[2:3], **options)
    torch.testing.assert_close(alone[0], whole[2], rtol=0, atol=1e-10)
    assert (model.sample(seeds + 1, condition=labels, **options) - whole).abs().amin((1, 2)).min() > 1e-6
    assert model.sample(0, condition=labels[:0], **options).shape == (0, 3, 2)


def test_the_path_is_fine_enough_for_the_shortest_step():
    """Short steps near the data, where EDM's levels crowd, have normals of variance 1: 400 seeds of 8 components."""
    model = make((8,), schedule="vp", prediction="eps")
    sampler = Sampler(model, 40, DDIM(1.0), Fixed(), Karras(), OFF)
    t, s = sampler.times[1], sampler.times[0]
    assert (t - s) / (sampler.times[-1] - s) < 1e-4
    path = sampler.path(SeedNoise(400), (8,), torch.float64)
    drawn = path.increment(t, s).w / (t - s).sqrt()
    assert abs(drawn.var() - 1) < 4 * (2 / 3200) ** 0.5 and path.tolerance < 1e-6


def test_sdes_start_and_end_where_they_are_regular():
    """On the linear path between σ/α = 1e-3 and α/σ = 1e-3; samples of a Gaussian then have its moments."""
    model = oracle(LINE)
    sampler = Sampler(model, 60, EulerMaruyama(), Fixed(), LogSNR(), OFF, diffusivity=OfPath())
    torch.testing.assert_close(
        sampler.times[[0, -1]], torch.tensor([1e-3, 1e3]).double() / (1 + torch.tensor([1e-3, 1e3]))
    )
    assert sampler.scale == pytest.approx(1e3 / 1001)
    x = model.sample(4000, solver=SRIW1(), num_steps=40, grid=LogSNR(), diffusivity=Proportional(), batch_size=4000)
    # standard errors .008 and .0056, and the bias of 40 steps
    assert abs(x.mean() - 1.5) < 0.04 and abs(x.std() - 0.5) < 0.03


def test_grids_that_start_late_draw_noise_of_their_own_size():
    model = oracle(GAUSSIAN, "eps", "vp")
    sampler = Sampler(model, 10, DDIM(), Fixed(), Discrete("leading"), OFF)
    assert sampler.times[-1] == 0.901 and sampler.scale == model.schedule.scales(number(0.901))[1].item() < 1


def test_denoising_is_the_last_step_and_moot_without_noise():
    model = oracle(GAUSSIAN, "eps", "vp")
    plain, clean = (Sampler(model, 6, DDIM(), Fixed(), Even(), OFF, denoise=d) for d in (False, True))
    assert len(plain.times) == 7 and len(clean.times) == 6
    x = randn(3, 2)
    end = Sampler(model, 5, DDIM(), Fixed(), Even(), OFF).solve(x, None, True)
    torch.testing.assert_close(clean.solve(x, None, True), model.denoiser.predict(clean.times[0], end).x)
    linear = oracle(GAUSSIAN)
    both = [linear.sample(3, num_steps=6, solver=DDIM(), denoise=d) for d in (False, True)]
    assert torch.equal(*both)


def test_denoiser_solvers_invert_through_the_model():
    """encode and decode by DPM-Solver++ on a grid of its own, against the exact flow, in data units."""
    model, x = oracle(GAUSSIAN, "eps", "vp"), 1 + 2 * randn(4, 2)
    model.transform = Affine(1.0, 2.0)
    options = {"solver": DPMpp2S(), "controller": Fixed(), "num_steps": 200, "grid": LogSNR()}
    ends = [
        tuple(c.item() for c in model.schedule.scales(number(t))) for t in (model.denoiser.t_min, model.denoiser.t_max)
    ]
    z = model.encode(x, **options)
    torch.testing.assert_close(z, probability_flow(GAUSSIAN, (x - 1) / 2, *ends), rtol=0, atol=2e-3)
    torch.testing.assert_close(model.decode(z, **options), x, rtol=0, atol=2e-4)
    for solver, message in ((DDIM(1.0), "encode and decode are deterministic"), (EulerMaruyama(), "needs an SDE")):
        with pytest.raises(ValueError, match=message):
            model.encode(x, solver=solver, controller=Fixed())
    with pytest.raises(ValueError, match=r"'dpmpp' of order 3 needs at least that many steps, found 2"):
        model.sample(2, solver=DPMpp(3), num_steps=2)


# ---- guidance --------------------------------------------------------------------------------------------------------


def test_guidance_in_an_interval_is_guidance_there_and_nothing_elsewhere():
    """Row by row: levels σ/α from .2 to 5, ends included, are guided."""
    model, labels = make((3,), num_classes=3), torch.tensor([0, 1, 2, 1, 0])
    guided, plain = Guided(model.denoiser, 2.5, model.conditions.null), model.denoiser
    within = Guidance(2.5, (0.2, 5.0)).of(model)
    levels = torch.tensor([0.1, 0.2, 1.0, 4.0, 9.0]).double()
    t, x, inside = levels / (1 + levels), randn(5, 3), torch.tensor([False, True, True, True, False])
    inside[1] = bool(0.2 * (1 - t[1]) <= t[1])
    for ask in ("velocity", "score", "predict"):
        found, on, off = (getattr(d, ask)(t, x, labels) for d in (within, guided, plain))
        for a, b, c in zip(*(v if ask == "predict" else (v,) for v in (found, on, off)), strict=True):
            torch.testing.assert_close(a, torch.where(inside[:, None], b, c), rtol=1e-12, atol=1e-12)
    rows = []
    networks(model)[0].register_forward_hook(lambda module, args, out: rows.append(len(out)))
    within.predict(t, x, labels)
    assert sorted(rows) == [5 - int(inside.sum()), 2 * int(inside.sum())]
    rows.clear()
    model.sample(2, condition=labels[:2], solver=DDIM(), num_steps=10, guidance=2.5, interval=(0.2, 5.0))
    expected = [4 if 0.2 <= k / (10 - k) <= 5 else 2 for k in range(9, 0, -1)]
    assert rows == [2, *expected]  # pure noise, at infinite σ/α, is not guided


def test_autoguidance_by_formula():
    """x̂ + (w - 1)(x̂ - x̂_weak), at any time, also by a guide of another path; for Gaussians in closed form."""
    weak_law = gaussian(number(1.0)[None], number(0.49)[None])
    main, t, x = exact(LINE, oracle(LINE).schedule, "velocity"), torch.tensor([0.3, 0.8]).double(), randn(2, 1)
    s = main.schedule(t)
    law = [(m, v, v * s.alpha**2 + s.sigma**2) for m, v in ((1.5, 0.25), (1.0, 0.49))]
    a, b = (m + v * s.alpha / total * (x[:, 0] - s.alpha * m) for m, v, total in law)
    for path in ("linear", "vp"):
        guide = exact(weak_law, oracle(LINE, schedule=path).schedule, "velocity" if path == "linear" else "eps")
        found = Autoguided(main, guide, 1.8)
        clean = b + 1.8 * (a - b)
        torch.testing.assert_close(found.predict(t, x).x[:, 0], clean, rtol=1e-9, atol=1e-9)
        eps = (x[:, 0] - s.alpha * clean) / s.sigma
        torch.testing.assert_close(found.velocity(t, x)[:, 0], eps - clean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.score(t, x)[:, 0], -eps / s.sigma, rtol=1e-9, atol=1e-9)


def test_guides_must_know_the_same_data_and_conditions():
    model = make((2,), num_classes=3)
    check_guide("weak", make((2,), num_classes=3, schedule="vp", prediction="eps"), model)
    check_guide("weak", make((2,)), model)  # one without conditions is a guide as well
    for other, message in (
        (make((3,), num_classes=3), r"items of the shape \(3,\), and the model has \(2,\)"),
        (make((2,), num_classes=4), "the number of classes 4"),
        (make((2,), condition_shape=(5,)), r"the number of classes None|conditions of the shape \[5\]"),
        (make((2,), num_classes=3, transform=Affine(0.0, 2.0)), "the transform"),
        (make((2,), num_classes=3, bin_width=1.0), "cells of the width"),
        (torch.nn.Linear(2, 2), "holds a Linear; a diffusion model is needed"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_guide("weak", other, model)
    with pytest.raises(ConfigError, match="conditions True, and the model has False"):
        check_guide("weak", make((2,), num_classes=3), make((2,)))


def test_guidance_that_cannot_act_is_refused():
    model, labels = make((2,), num_classes=3), torch.tensor([0, 1])
    for options, message in (
        ({"interval": (0.1, 1.0)}, r"interval was given, and guidance = 1 is off"),
        ({"guide": "runs/none"}, r"guide was given, and guidance = 1 is off"),
        ({"guidance": 2.0, "interval": (1.0, 0.5)}, "0 <= low < high"),
        ({"guidance": 2.0, "guide": "runs/none"}, "is no run"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(2, condition=labels, **options)
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a conditional model.*weaker model as guide"):
        make().sample(2, guidance=2.0)


def test_the_command_takes_all_of_it(tmp_path, monkeypatch, capsys):
    """Two short runs, one guided by the other; options are checked by name, and the samples are the formula's."""
    monkeypatch.chdir(tmp_path)
    sizes = {"main": 8, "weak": 4}
    for name, hidden in sizes.items():
        network = f"{{name: residual_mlp, hidden: {hidden}, blocks: 1}}"
        text = f"data: moons\nmodel: {{name: diffusion, network: {network}}}\ntrain: {{steps: 2, batch_size: 8}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
        assert train([f"{name}.yaml", f"name={name}"]) == 0
    words = [
        "sample.solver={name: dpmpp,order: 2,eta: 1}",
        "sample.grid=karras",
        "sample.num_steps=6",
        "sample.denoise=true",
    ]
    guided = ["sample.guidance=2", "sample.guide=runs/weak:model", "sample.interval=[0.1,10]"]
    assert sample(["runs/main", "--seeds", "0-3", "--npz", "--out", "found", *words, *guided]) == 0, capsys.readouterr()
    import numpy as np

    found = torch.from_numpy(np.load("found.npz")["arr_0"])
    main, weak = (Run.open(f"runs/{name}").load("model" if name == "weak" else None) for name in sizes)
    denoiser = WithinInterval(Autoguided(main.denoiser, weak.denoiser, 2.0), main.denoiser, (0.1, 10.0))
    monkeypatch.setattr(Guidance, "of", lambda self, model: denoiser)
    expected = main.sample(4, solver=DPMpp(2, 1.0), grid=Karras(), num_steps=6, denoise=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert sample(["runs/main", "sample.grid=karas"]) != 0 and "Did you mean 'karras'" in capsys.readouterr().err


def test_guides_are_read_once_a_call(monkeypatch):
    model, calls = make((2,)), []

    def load(place: str, asking: object) -> object:
        calls.append(place)
        return make((2,), moved=0.1)

    monkeypatch.setattr("genmodels.diffusion.samplers.load_guide", load)
    first: Tensor = model.sample(5, num_steps=3, guidance=1.5, guide="weak", batch_size=2)
    assert calls == ["weak"] and (first - model.sample(5, num_steps=3)).abs().max() > 1e-3


def test_a_guide_is_told_no_condition_in_its_own_words(monkeypatch):
    """Models of vectors learn what stands for none, each its own; the conditions themselves are the same for both."""
    model, guide = (make((2,), condition_shape=(3,), prediction="eps", schedule="vp", moved=m) for m in (0.2, 0.1))
    assert not torch.equal(model.conditions.null, guide.conditions.null)
    monkeypatch.setattr("genmodels.diffusion.samplers.load_guide", lambda place, asking: guide)
    told: list[Tensor] = []
    guide.denoiser.network.register_forward_pre_hook(lambda _, given: told.append(given[2]))
    denoiser, condition = Guidance(1.5, None, "weak").of(model), torch.stack((model.conditions.null.detach(), randn(3)))
    t, x = number(0.4), randn(2, 2)
    found = denoiser.predict(t, x, condition)
    assert torch.equal(told[0], torch.stack((guide.conditions.null.detach(), condition[1])))
    strong, weak = model.denoiser.predict(t, x, condition), guide.denoiser.predict(t, x, told[0])
    torch.testing.assert_close(found.x, weak.x + 1.5 * (strong.x - weak.x))
    told.clear()
    model.sample(2, num_steps=1, guidance=1.5, guide="weak")
    assert all(torch.equal(rows, guide.conditions.null.expand(2, 3)) for rows in told)


def weaker(monkeypatch: pytest.MonkeyPatch, guide: object) -> None:
    monkeypatch.setattr("genmodels.diffusion.samplers.load_guide", lambda place, asking: guide)


def test_both_guidances_at_once_by_formula(monkeypatch):
    """x̂_guide + w_ag (x̂_null + w (x̂ - x̂_null) - x̂_guide), the guide under the condition; w = 1 is autoguidance."""
    model, guide = (make((3,), num_classes=3, moved=m) for m in (0.2, 0.1))
    weaker(monkeypatch, guide)
    t, x, labels = torch.tensor([0.2, 0.6]).double(), randn(2, 3), torch.tensor([2, 0])
    strong, weak = (m.denoiser.predict(t, x, labels) for m in (model, guide))
    free = model.denoiser.predict(t, x, model.conditions.null.expand(2))
    found = Guidance(2.5, None, "weak", 1.8).of(model)
    for a, b, c, d in zip(found.predict(t, x, labels), strong, free, weak, strict=True):
        torch.testing.assert_close(a, d + 1.8 * (c + 2.5 * (b - c) - d), rtol=1e-12, atol=1e-12)
    alone, before = (Guidance(*given).of(model) for given in ((1.0, None, "weak", 1.8), (1.8, None, "weak")))
    torch.testing.assert_close(alone.velocity(t, x, labels), before.velocity(t, x, labels), rtol=1e-12, atol=1e-12)
    drawn = [model.sample(2, condition=labels, num_steps=3, **given) for given in (
        {"guidance": 2.5, "guide": "weak", "guide_scale": 1.8}, {"guidance": 1.8, "guide": "weak"}, {"guidance": 2.5},
    )]  # fmt: skip
    assert min((drawn[0] - other).abs().max() for other in drawn[1:]) > 1e-3
    with pytest.raises(ValueError, match=r"guidance 2\.5 needs a conditional model"):
        Guidance(2.5, None, "weak", 1.8).of(make((3,)))


def test_a_guide_without_a_null_is_not_asked_for_it(monkeypatch):
    """Neither of labels nor of vectors; with conditions it guides, also away from no condition."""
    for kind in ({"num_classes": 3}, {"condition_shape": (4,)}):
        model, guide = make((2,), **kind), make((2,), condition_dropout=0.0, moved=0.1, **kind)
        weaker(monkeypatch, guide)
        condition = torch.tensor([0, 1]) if "num_classes" in kind else randn(2, 4)
        options = {"num_steps": 2, "guidance": 1.5, "guide": "weak"}
        with pytest.raises(ValueError, match=r"condition_dropout=0, and has learnt no answer without .* 2 of 2 items"):
            model.sample(2, **options)
        both = model.sample(2, condition=condition, **options | {"guide_scale": 1.2})
        assert (both - model.sample(2, condition=condition, **options)).abs().max() > 1e-4
    model, mixed = make((2,), num_classes=3), torch.tensor([0, 3])
    weaker(monkeypatch, make((2,), num_classes=3, condition_dropout=0.0))
    with pytest.raises(ValueError, match="which 1 of 2 items lack"):
        model.sample(2, condition=mixed, num_steps=2, guidance=1.5, guide="weak")


def test_guidance_that_is_no_number_is_refused():
    for given, message in (
        ((float("nan"),), "guidance: a finite number is needed, found nan"),
        ((2.0, None, "weak", float("inf")), "guide_scale: a finite number is needed, found inf"),
        ((2.0, (1.0,)), r"two noise levels σ/α.* found \(1\.0,\)"),
        ((2.0, (0.1, 1.0, 2.0)), "two noise levels"),
        ((2.0, (0.1, float("nan"))), "two noise levels"),
        ((2.0, ("low", 1.0)), "two noise levels"),
        ((2.0, 0.3), "two noise levels"),
        ((2.0, None, None, 1.5), "guide_scale was given without a guide"),
        ((2.0, None, "weak", 1.0), "guide_scale = 1 leaves the guide without effect"),
    ):
        with pytest.raises(ValueError, match=message):
            Guidance(*given)
    Guidance(1.0, (0.0, float("inf")), "weak", 2.0)


def test_combined_denoisers_tell_their_networks_labels():
    model = make((2,), num_classes=3, schedule="vp", prediction="eps", time_condition="shared")
    guide, t = make((2,), num_classes=3), torch.tensor([0.013, 0.059, 0.5], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.04, 0.5], dtype=torch.float64)
    pushed = Autoguided(Guided(model.denoiser, 2.0, model.conditions.null), guide.denoiser, 1.5)
    for combined in (pushed, WithinInterval(pushed, model.denoiser, (0.1, 1.0))):
        assert torch.equal(combined.label(t), expected)


def test_churn_ends_where_the_denoiser_does():
    """For eps on the linear path at α/σ = 1e-3, t = 1/1.001: steps near it churn no further, and are finite."""
    model = oracle(LINE, "eps")
    last, asked = model.denoiser.t_max, []
    model.denoiser.network.register_forward_pre_hook(lambda _, given: asked.append(given[0].max().item()))
    x = model.sample(3, solver=EDMHeun(s_churn=1e3), num_steps=4, grid=Karras(rho=3.0))
    assert last == pytest.approx(1000 / 1001) and x.isfinite().all()
    assert max(asked) <= last + 1e-15 and len({round(t, 6) for t in asked}) > 5
