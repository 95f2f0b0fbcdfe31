"""Pictures of series: which curves stand where, and that runs on series draw them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels import series
from genmodels.config import Config
from genmodels.data.attractors import VanDerPol
from genmodels.data.oscillators import Oscillators
from genmodels.data.spiral_dynamics import SpiralODE, SpiralSDE
from genmodels.data.uea import UEA
from genmodels.sampling import write_picture
from genmodels.series import draw_forecasts, draw_series, observed
from genmodels.training.loop import train
from tests.data_files import write_uea


@pytest.fixture
def panels(monkeypatch):
    """The panels of what is drawn, as they are saved."""
    found = []
    save = series._save
    monkeypatch.setattr(series, "_save", lambda figure, *rest: (found.extend(figure.axes), save(figure, *rest))[1])
    return found


def test_samples_stand_beside_the_data_at_shared_times(panels, tmp_path):
    data = SpiralSDE(count=12, task="generate")
    x = data.all("test").x + 1
    path = write_picture(tmp_path / "a.b", x, data, {"seeds": [4, 5], "step": 2})
    left, right = panels[2:]  # the second channel
    for axes, drawn in ((left, data.all("train").x), (right, x)):
        assert len(axes.lines) == 8 and axes.get_ylabel() == ("channel 1" if axes is left else "")
        for line, values in zip(axes.lines, drawn, strict=False):
            np.testing.assert_allclose(line.get_ydata(), values[:, 1])
            np.testing.assert_allclose(line.get_xdata(), np.linspace(0, 1, 30))
    assert left.get_ylim() == right.get_ylim() and left.get_xlabel() == "time"
    with Image.open(path) as image:
        assert path.name == "a.b.png" and json.loads(image.text["seeds"]) == [4, 5] and image.size[0] > 600


def test_samples_of_irregular_data_stand_at_even_times(panels, tmp_path):
    data = VanDerPol(count=4, points=10)
    items = data.all("train")
    draw_series(tmp_path / "x.png", torch.full((1, 10, 2), torch.nan), data, {})
    np.testing.assert_allclose(panels[1].lines[0].get_xdata(), np.linspace(0, float(items.times.max()), 10), rtol=1e-6)
    np.testing.assert_array_equal(panels[0].lines[3].get_xdata(), items.times[3])
    assert panels[1].get_title() == "samples (1 of 1 not finite)"


def test_only_what_was_observed_is_drawn_of_the_data(panels, tmp_path):
    data = UEA(str(write_uea(tmp_path)), "Toy", missing=0.3)
    items = data.take("train", torch.arange(8))
    values, times, seen = observed(items)
    assert torch.equal(values, items.x) and torch.equal(seen, items.mask)
    draw_series(tmp_path / "x.png", torch.zeros(2, 7, 2), data, {})
    for k, line in enumerate(panels[0].lines):
        np.testing.assert_array_equal(line.get_xdata(), times[k][items.mask[k, :, 0]])


@pytest.mark.parametrize("law", [False, True])
def test_predictions_are_drawn_over_what_was_seen_and_asked_for(panels, tmp_path, law):
    data = Oscillators(task="forecast", count=20, points=12)
    batch = data.take("val", torch.arange(5))
    mean = batch.target + 1
    prediction = torch.stack((mean, torch.full_like(mean, -1.0)), -1) if law else mean
    draw_forecasts(tmp_path / "x.png", prediction, batch, data, {})
    assert len(panels) == 8 and not panels[5].axison and panels[4].get_xlabel() == "time [seconds]"
    for k, axes in enumerate(panels[:5]):
        rings, dots, line = axes.lines
        np.testing.assert_array_equal(
            rings.get_xydata(), torch.stack((batch.target_times[k], batch.target[k, :, 0]), 1)
        )
        there = batch.mask[k]
        np.testing.assert_array_equal(dots.get_xydata(), torch.stack((batch.times[k], batch.x[k, :, 0]), 1)[there])
        np.testing.assert_array_equal(line.get_ydata(), mean[k, :, 0])
        assert len(axes.collections) == law
    if law:
        corners = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert corners.max() == pytest.approx(float(mean[4].max()) + 2 * np.exp(-1), rel=1e-5)


def test_starts_and_their_futures_are_drawn(panels, tmp_path):
    data = SpiralODE(count=8)
    batch = data.take("train", torch.arange(3))
    draw_forecasts(tmp_path / "x.png", batch.target, batch, data, {})
    assert [len(axes.lines) for axes in panels] == [6, 6, 6]  # rings, dots and a line for either channel


@pytest.mark.parametrize(
    ("model", "task", "pictures"),
    [
        ({"name": "ode_rnn", "field": "mlp", "hidden": 4}, "forecast", ["00000001-predictions.png"]),
        ({"name": "gru", "hidden": 4}, "classify", []),
    ],
)
def test_a_run_on_series_draws_its_predictions(tmp_path, capsys, model, task, pictures):
    node = {
        "name": "a",
        "imports": ["tests.contracts.families"],
        "data": {"name": "fake_series", "task": task},
        "model": model,
        "train": {"steps": 1, "batch_size": 4, "sample_every": 1},
    }
    run = train(Config(node), root=tmp_path)
    folder = run.path / "samples"
    assert [p.name for p in folder.iterdir()] == pictures if pictures else not folder.exists()
    said = capsys.readouterr().err
    assert ("predictions in" in said) == bool(pictures) and "no predictions" not in said
