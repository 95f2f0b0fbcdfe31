"""The picture of fields: what it shows of known fields, and what it cannot draw."""

import pytest

from genmodels.evaluation import field_drawing
from genmodels.evaluation.field_drawing import draw_fields
from genmodels.registry import ConfigError
from tests.random_fields import free_spectrum, gaussian_fields


def fields(n, *key, size=16):
    return gaussian_fields(n, free_spectrum(size), *key)


def drawn(monkeypatch, tmp_path, found, reference, **options):
    """The figure that is written."""
    kept, make = [], field_drawing._figure
    with monkeypatch.context() as patch:
        patch.setattr(field_drawing, "_figure", lambda *given: kept.append(make(*given)) or kept[0])
        path = draw_fields(tmp_path / "deeper" / "fields.svg", found, reference, **options)
    assert path.stat().st_size > 10_000
    return kept[0]


def test_lines_are_ratios_of_spectra_and_densities(monkeypatch, tmp_path):
    x = fields(60, "a")
    figure = drawn(monkeypatch, tmp_path, {"wider": 1.1 * x, "same": x[:, None].float()}, x, limits=(-1.0, 1.0))
    spectra, values = figure.subfigs[0].axes
    one, wider, same = spectra.lines
    assert wider.get_ydata().tolist() == pytest.approx([1.21] * 8) and wider.get_label() == "wider (21.0% rms)"
    assert same.get_ydata().tolist() == pytest.approx([1.0] * 8, rel=1e-5) and list(wider.get_xdata()) == [*range(1, 9)]
    known, shown = values.lines[0].get_ydata(), values.lines[1].get_ydata()
    assert known.sum() * 2 / 60 == pytest.approx(((x >= -1) & (x < 1)).double().mean().item(), rel=1e-6)
    assert shown.sum() * 2 / 60 == pytest.approx(((1.1 * x >= -1) & (1.1 * x < 1)).double().mean().item(), rel=1e-6)
    assert values.get_yscale() == "log" and values.get_xlim() == (-1, 1)
    assert set(one.get_ydata()) == {1}


def test_samples_are_the_first_ones_on_one_scale(monkeypatch, tmp_path):
    x = fields(9, "b")
    figure = drawn(monkeypatch, tmp_path, {"model": 2 * x, "few": x[:1]}, x, name="truth")
    rows = [axis for axis in figure.subfigs[1].axes if axis.images]
    assert [axis.get_title(loc="left") for axis in rows] == ["truth", "model", "few"]
    images = [axis.images[0] for axis in rows]
    assert len({(i.norm.vmin, i.norm.vmax) for i in images}) == 1 and images[0].norm.vmin == -images[0].norm.vmax
    assert (images[1].get_array()[:, :16] == 2 * x[0].numpy()).all()
    assert (images[2].get_array()[:, :16] == x[0].numpy()).all() and images[2].get_array()[:, 17:].mask.all()
    positive = drawn(monkeypatch, tmp_path, {"model": x.exp()}, x.exp())
    assert positive.subfigs[1].axes[0].images[0].cmap.name == "magma"


@pytest.mark.parametrize(
    ("path", "found", "message"),
    [
        ("f.jpg", {"a": fields(2)}, r"\.png, \.pdf or \.svg"),
        ("f.png", {}, "there are none"),
        ("f.png", {"a": fields(2), "b": fields(2, size=8)}, r"'b' has \[8, 8\]"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, path, found, message):
    with pytest.raises(ConfigError, match=message):
        draw_fields(tmp_path / path, found, fields(2))
