"""Pictures of densities: what is computed for them, what stands in them, and mistakes that are explained."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from genmodels.data.dataset import Dataset
from genmodels.distributions import StandardNormal
from genmodels.evaluation import density
from genmodels.evaluation.density import Window, main, panels
from genmodels.registry import ConfigError, build
from genmodels.types import Likelihood


class Law(StandardNormal):
    """N(0, I) as a model."""

    registered_name = "law"

    def likelihood(self, x, *, condition=None, seeds=None):
        return Likelihood(super().log_prob(x), "exact")

    def log_prob(self, x, *, condition=None, seeds=None):
        return super().log_prob(x)


def run(name="a", model=None, data=None, shape=(2,)):
    data = data or {"name": "rings", "size": 500}
    made = model or Law(shape=(2,))
    return SimpleNamespace(
        name=name,
        path=f"runs/{name}",
        facts=lambda: {"shape": list(shape)},
        config=SimpleNamespace(tree={"data": data}),
        dataset=lambda: build(Dataset, data),
        load=lambda weights: made,
    )


def test_the_grid_is_read_as_the_picture_shows_it():
    grid = Window.around(torch.tensor([[0.0, -1.0], [2.0, 0.0]]), 50)
    assert grid.side == pytest.approx(2 * (1 + 2 * density.MARGIN))
    assert grid.extent == pytest.approx((-0.12, 2.12, -1.62, 0.62))
    values = density._on(grid, lambda x: x[:, 1].exp().log() + 0 * x[:, 0])  # log p = y, so p grows upwards only
    assert (np.diff(np.log(values), axis=0) > 0).all() and np.ptp(values, axis=1).max() == 0
    assert np.log(values[0, 0]) == pytest.approx(-1.62 + grid.side / 100)


def test_densities_integrate_to_one_and_their_averages_are_written():
    picture = panels([run("a"), run("b")], window=150)
    data, model, _ = picture.panels
    cell = (picture.window.side / 150) ** 2
    assert data.density.sum() * cell == pytest.approx(1, abs=2e-3)  # the window leaves out some of the outermost ring
    expected = torch.distributions.Normal(0, 1).log_prob(picture.window.points()).sum(1).exp()
    torch.testing.assert_close(torch.tensor(model.density).flatten(), expected, rtol=1e-6, atol=1e-12)
    excess = (data.log_p - model.log_p).mean()
    assert model.caption[0].startswith(f"NLL {float(-model.log_p.mean()):.1f}")
    assert float(model.caption[1].split()[1]) == pytest.approx(float(excess), abs=0.05)
    assert excess > 0
    assert [panel.name for panel in picture.panels] == ["data", "a", "b"]


def test_means_are_written_to_the_digit_of_their_error():
    values = torch.tensor([1.0, 1.2, 0.9, 1.1])
    assert density._nats(values) == "1.050 ± 0.065"
    assert density._nats(100 * values) == "105.0 ± 6.5"
    assert density._nats(torch.full((9,), 2.5)) == "2.500 ± 0.000"
    assert density._nats(torch.tensor([1.0, math.inf])) == "inf"


@pytest.mark.parametrize(("count", "known"), [(1, True), (2, False), (16, True)])
@pytest.mark.slow_for("16-True")
def test_it_is_drawn_for_few_and_many(count, known, tmp_path, monkeypatch):
    runs = [run(f"run {k}") for k in range(count)]
    if not known:
        data = runs[0].dataset()
        monkeypatch.setattr(data, "log_prob", lambda x: None)
        runs[0].dataset = lambda: data
    picture = panels(runs, window=8, items=50)
    assert (picture.panels[0].density is None) == (not known)
    assert len(picture.panels[1].caption) == 1 + known
    text = picture.draw(tmp_path / "new" / "d.svg").read_text()
    assert text.count("<image") >= count  # the colour bar is one more
    axes = Figure().subplots()
    picture._panel(axes, picture.panels[1], ScalarMappable(Normalize(0, 1)))
    assert axes.images[0].origin == "lower" and axes.images[0].get_extent() == list(picture.window.extent)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_captions_are_inside_the_picture(count, tmp_path):
    with Image.open(
        panels([run(f"run {k}") for k in range(count)], window=8, items=50).draw(tmp_path / "d.png")
    ) as png:
        pixels = np.asarray(png.convert("L"))
    assert (pixels[[0, 1, -2, -1]] == 255).all() and (pixels[:, [0, 1, -2, -1]] == 255).all()


def test_mistakes_are_explained():
    with pytest.raises(ConfigError, match=r"runs/a: its items have shape \[1, 8, 8\]; densities are drawn of"):
        panels([run(shape=(1, 8, 8))])
    with pytest.raises(ConfigError, match=r"runs/b was trained on other data than runs/a \(pinwheel instead of rings"):
        panels([run("a"), run("b", data={"name": "pinwheel"})])
    with pytest.raises(ConfigError, match="a is given twice"):
        panels([run("a"), run("a")])
    blind = torch.nn.Identity()
    blind.registered_name = "blind"
    with pytest.raises(ConfigError, match="a model 'blind' has no log_prob"):
        panels([run(model=blind)])
    told = Law(shape=(2,))
    told.conditional = True
    with pytest.raises(ConfigError, match="depends on a condition"):
        panels([run(model=told)])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--out", "d.jpg"], "--out: a .png, .pdf or .svg is written, found 'd.jpg'"),
        (["--window", "1"], "at least 2 are needed, found 1 and 10000"),
        (["--items", "0"], "found 200 and 0"),
        ([], "nowhere is no run"),
    ],
)
def test_the_command_explains_mistakes(more, problem, capsys, tmp_path):
    assert main([str(tmp_path / "nowhere"), *more]) == 2
    assert problem in capsys.readouterr().err
