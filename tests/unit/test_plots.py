"""Training curves: what is smoothed and how, what stands in the figure, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from genmodels import commands
from genmodels.registry import ConfigError
from genmodels.training import plots
from genmodels.training.plots import curve, curves, labels, smooth
from genmodels.training.run import Run
from tests.unit.fakes import restored


def lines_of(values, every=10, stderr=None):
    out = []
    for k, value in enumerate(values, 1):
        extra = {} if stderr is None else {"train/loss_stderr": stderr}
        out.append({"step": k * every, "samples": k * every * 8, "seconds": k * 0.5, "train/loss": value, **extra})
    return out


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Make a run that logged some lines."""
    monkeypatch.chdir(tmp_path)
    with restored():
        from tests import training_fakes

        training_fakes.register_all()

        def make(name, lines=(), root="runs"):
            made = Run.create(training_fakes.config(name=name), root)
            (made.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return made

        yield make


# ---- numbers ---


def test_a_curve_is_the_lines_that_have_the_quantity():
    lines = [*lines_of([1.0, None], stderr=0.1), {"step": 20, "samples": 160, "seconds": 1.0, "val/loss": 7.0}]
    found = curve(lines, "train/loss")
    np.testing.assert_equal(found["value"], [1.0, np.nan])
    np.testing.assert_equal(found["stderr"], [0.1, 0.1])
    assert found["step"].tolist() == [10, 20] and found["samples"].tolist() == [80, 160]
    assert curve(lines, "val/loss")["value"].tolist() == [7.0] and np.isnan(curve(lines, "val/loss")["stderr"]).all()


def test_means_over_a_window_leave_a_straight_line_as_it_is():
    """Windows are centred, at the ends, too: a lag or a one-sided window would bend the line."""
    line = curve(lines_of(list(np.linspace(3, 1, 21))), "train/loss")
    for window in (0, 15, 20, 60, 1e6):
        np.testing.assert_allclose(smooth(line, window)["value"], line["value"], rtol=1e-12)


def test_means_over_a_window_are_means_with_their_standard_error():
    values = [4.0, 8.0, 0.0, 2.0, 6.0]
    found = smooth(curve(lines_of(values, stderr=0.3), "train/loss"), 20)  # steps 10 to either side: three values
    np.testing.assert_allclose(found["value"], [4, 4, 10 / 3, 8 / 3, 6])
    np.testing.assert_allclose(found["stderr"], [0.3, *[0.3 / np.sqrt(3)] * 3, 0.3])
    assert found["step"].tolist() == [10, 20, 30, 40, 50]
    narrow = smooth(curve(lines_of(values), "train/loss"), 19)  # narrower than the distance of values
    np.testing.assert_allclose(narrow["value"], values)


def test_means_leave_out_what_is_not_finite():
    found = smooth(curve(lines_of([1.0, None, 5.0, 1.0, None]), "train/loss"), 20)["value"]
    np.testing.assert_allclose(found, [1, 3, 3, 3, np.nan])


# ---- figures ---


def figure_of(panels, names=None, x="step", window=0, log=False):
    figure = plots._draw(panels, names or list(next(iter(panels.values()))), x, window, log)
    FigureCanvasAgg(figure).draw()
    return figure


def test_a_panel_a_quantity_and_a_line_a_run():
    a, b = (curve(lines_of(v, stderr=0.5), "train/loss") for v in ([3.0, 2.0, 1.0], [5.0, 4.0, 2.0]))
    none = curve([], "val/loss")
    figure = figure_of({"train/loss": {"a": a, "b": b}, "val/loss": {"a": none, "b": b}}, x="seconds")
    first, second = figure.axes
    assert [axes.get_title("left") for axes in figure.axes] == ["train/loss", "val/loss"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"training time [s]"}
    assert first.get_xlim() == second.get_xlim()
    for line, one in zip(first.lines, (a, b), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([one["seconds"], one["value"]], 1))
    band = first.collections[0].get_paths()[0].vertices  # one standard error to either side
    assert (band[:, 1].min(), band[:, 1].max()) == (0.5, 3.5) and len(first.collections) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["a", "b"]
    assert legend.get_title().get_text() == "bands: ±1 standard error"
    assert [h.get_color() for h in legend.legend_handles] == [line.get_color() for line in first.lines]


def test_smoothed_lines_stand_before_faint_values_and_the_window_is_stated():
    one = curve(lines_of([4.0, 8.0, 0.0, 2.0, 6.0]), "train/loss")
    (axes,) = (figure := figure_of({"train/loss": {"a": one}}, window=20)).axes
    raw, mean = axes.lines
    assert raw.get_ydata().tolist() == one["value"].tolist() and raw.get_alpha() < 0.5
    np.testing.assert_allclose(mean.get_ydata(), smooth(one, 20)["value"])
    assert mean.get_alpha() is None and mean.get_linewidth() > 2 * raw.get_linewidth()
    assert figure.legends[0].get_title().get_text() == "means over 20 steps" and not axes.collections


@pytest.mark.parametrize(("count", "panels"), [(1, 1), (2, 2), (12, 2), (12, 4), (28, 5)])
@pytest.mark.slow_for("28-5")
def test_the_legend_stands_beside_the_panels_and_inside_the_figure(count, panels):
    names = [f"digits-flow_matching-seed{k}-lr1e-3" for k in range(count)]
    one = curve(lines_of([3.0, 2.0, 1.0]), "train/loss")
    figure = figure_of({f"train/{k}": dict.fromkeys(names, one) for k in range(panels)})
    box, page = figure.legends[0].get_window_extent(), figure.bbox
    assert len(figure.axes) == panels
    for axes in figure.axes:
        assert axes.get_tightbbox().x1 < box.x0 and axes.get_window_extent().width > 2.4 * figure.dpi
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    looks = {(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == count


@pytest.mark.parametrize("values", [[1.6, 1.4, 1.2], [3000.0, 2.0, 1e-3]])
def test_logarithmic_marks_are_plain_numbers(values):
    (axes,) = figure_of({"a": {"r": curve(lines_of(values), "train/loss")}}, log=True).axes
    marks = [text.get_text() for text in axes.get_yticklabels()]
    assert axes.get_yscale() == "log" and len(marks) >= 3
    assert all(re.fullmatch(r"[0-9.]+(e-?\d+)?", mark) for mark in marks)


# ---- runs ---


def test_names_of_runs(run, tmp_path):
    a, b, other = run("a"), run("b"), run("a", root="else")
    assert labels([a, b]) == ["a", "b"] and labels([a, b, other]) == ["runs/a", "b", "else/a"]
    with pytest.raises(ConfigError, match="runs/a is given twice"):
        labels([a, a])


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_command_draws_runs(run, capsys, suffix):
    run("a", [*lines_of([3.0, 2.0, 1.5]), {"step": 30, "samples": 240, "seconds": 2.0, "val/loss": 1.7}])
    run("b", lines_of([3.0, None, 1.0]))
    out = f"new/curves.{suffix}"
    words = ["runs/a", "runs/b/config.yaml", "--smooth", "20", "--log", "--x", "samples"]
    assert commands.main(["plots", *words, "--out", out]) == 0
    assert capsys.readouterr().out == out + "\n" and Path(out).stat().st_size > 5000
    if suffix == "png":
        with Image.open(out) as image:
            assert image.width > 1500 and image.height > 400
    assert sorted(p.name for p in Path("runs/a").iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_the_losses_are_drawn_unless_others_are_asked_for(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_draw", lambda panels, *rest: drawn.append(list(panels)) or 1 / 0)
    full = run("a", [{**line, "train/nll": 1.0, "val/loss": 2.0} for line in lines_of([1.0], stderr=0.1)])
    only = run("b", [{"step": 1, "seconds": 0.1, "samples": 8, "prepare/norm": 1.0}])
    for runs, keys in (([full], None), ([full, only], ["prepare/norm", "train/nll", "train/nll"]), ([only], None)):
        with pytest.raises(ZeroDivisionError):
            curves(runs, Path("x.png"), keys)
    assert drawn == [["train/loss", "val/loss"], ["prepare/norm", "train/nll"], ["prepare/norm"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/nothing"], "runs/nothing is no run (it has no config.yaml). Runs beside it: empty, good, negative."),
        (
            ["runs/good", "runs/empty"],
            "runs/empty has no metrics yet. Train it: python train.py runs/",
        ),
        (
            ["runs/good", "--keys", "train/los"],
            "no run has logged 'train/los'. Did you mean 'train/loss'? Logged: ",
        ),
        (["runs/good", "--keys", "step"], "no run has logged 'step'"),
        (["runs/negative", "--log"], "train/loss of negative has values that are not above 0 (down to -1)"),
        (["runs/good", "--out", "x.bmp"], "--out: a .png, .pdf or .svg is written, found 'x.bmp'"),
        (["runs/good", "--smooth", "-1"], "--smooth: a number of steps of at least 0 is needed, found -1"),
    ],
)
def test_mistakes(run, capsys, words, message):
    run("good", lines_of([1.0, 2.0]))
    run("empty")
    run("negative", lines_of([2.0, -1.0, None]))
    status = commands.plots(words)
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.startswith("error: ") and message in err and not list(Path().glob("*.*"))
