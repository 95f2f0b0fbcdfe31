"""Potentials of filtered fields: derivatives against automatic differentiation, and what they leave to other terms."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from genmodels.wavelet.bases import BSpline
from genmodels.wavelet.conditional import Conditional
from genmodels.wavelet.filtered import STENCILS, FilteredPotential
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.score_matching import Gram
from genmodels.wavelet.terms import Quadratic
from genmodels.wavelet.tree import Level, Tree

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
LEVELS = {
    "8x8": Tree((8, 8), "db4", 1).levels[-1],
    "4x8 haar": Tree((4, 8), "haar", 1).levels[-1],
    "2x2": Tree((2, 2), "db2").levels[-1],
    "half octave": Tree((8, 8), "db2", 1, (2,)).levels[-1],
    "whole field": Tree((4, 4), "db2", 0).levels[0],
}


def fields(level: Level, count: int = 2) -> Tensor:
    return torch.randn(count, *level.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(level: Level, stencil: str, **options) -> tuple[FilteredPotential, Tensor, Tensor]:
    """A term whose range some filtered pixels exceed, parameters, and fields."""
    term = FilteredPotential(stencil, BSpline(8), level=level, **options)
    u = fields(level)
    term.fit(0.8 * u)
    theta = torch.randn(len(term), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return term, theta, u


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("stencil", STENCILS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.slow_for("8x8-*", "half octave-*-True")
def test_derivatives_are_those_of_automatic_differentiation(level, stencil, even):
    level = LEVELS[level]
    term, theta, u = built(level, stencil, even=even)
    if not len(term):
        assert stencil == "block" and level.size == (2, 2)  # the mean of all pixels has no detail
        return
    assert (term.filtered(u).abs() > term.interval[1].abs()).any()
    leaf = u.clone().requires_grad_()
    energy, slope = term.energy(theta, u)
    torch.testing.assert_close(term.features(u) @ theta, energy, **CLOSE)
    torch.testing.assert_close(
        torch.autograd.grad(term.features(leaf).sum(), leaf)[0], term.gradients(u).sum(1), **CLOSE
    )
    torch.testing.assert_close(torch.autograd.grad(term.energy(theta, leaf)[0].sum(), leaf)[0], slope, **CLOSE)
    torch.testing.assert_close(torch.einsum("bmhw,m->bhw", term.gradients(u), theta), slope, **CLOSE)
    rows = level.synthesize(torch.eye(level.dim, dtype=torch.float64)).flatten(1)
    full = [hessian(lambda y: term.energy(theta, y[None])[0].sum(), y).reshape(y.numel(), -1) for y in u]
    own = torch.stack([rows @ h @ rows.T for h in full])
    traces = own.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(term.laplacian(theta, u), traces, **CLOSE)
    torch.testing.assert_close(term.laplacians(u) @ theta, traces, **CLOSE)
    torch.testing.assert_close(term.diagonal(theta, u), own.mean(0).diagonal(), **CLOSE)
    v = fields(level).flip(0)
    products = torch.stack([(h @ y.flatten()).reshape(level.size) for h, y in zip(full, v, strict=True)])
    torch.testing.assert_close(term.hessian(theta, u, v), products, **CLOSE)


@pytest.mark.parametrize("stencil", STENCILS)
def test_filters_are_the_local_means_and_differences_that_they_say(stencil):
    u = fields(LEVELS["8x8"], 1)
    down, right = u.roll(-1, 1), u.roll(-1, 2)
    around = (down + right + u.roll(1, 1) + u.roll(1, 2)) / 4
    expected = {
        "pair_mean": [(u + right) / 2, (u + down) / 2],
        "pair_difference": [right - u, down - u],
        "block": [(u + right + down + down.roll(-1, 2)) / 4],
        "cross": [(4 * around + u) / 5],
        "laplacian": [around - u],
    }[stencil]
    found = FilteredPotential(stencil, level=LEVELS["8x8"]).filtered(u)
    torch.testing.assert_close(found, torch.stack(expected, 1), **CLOSE)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("stencil", STENCILS)
def test_squares_are_left_to_the_quadratic_term_so_that_a_fit_can_tell_all_features_apart(stencil, even):
    """With them in, the Gram matrix would be singular: Σ (h * u)² is a sum of shifts."""
    terms = (
        partial(Quadratic, reach=2),
        partial(Potential, basis=BSpline(8), even=even),
        partial(FilteredPotential, stencil, BSpline(8), even),
    )
    conditional = Conditional(LEVELS["8x8"], terms)
    u = fields(conditional.level, 60)
    for term in conditional.terms:
        term.fit(u)
    gram = Gram(conditional)
    gram.update(u)
    gram.solve(0.0)
    assert conditional.condition < 1e5


def test_terms_without_features_add_nothing():
    """On a single pixel, on grids beyond `largest`, and where no filter sees a detail."""
    pixel = Tree((1, 1)).levels[0]
    for level, options in ((pixel, {}), (LEVELS["8x8"], {"largest": 4}), (LEVELS["2x2"], {"stencil": "block"})):
        term = FilteredPotential(**options, level=level)
        u = fields(level)
        term.fit(u)
        none = torch.zeros(0, dtype=torch.float64)
        assert len(term) == 0 and term.names == []
        assert term.features(u).shape == term.laplacians(u).shape == (2, 0)
        assert term.gradients(u).shape == (2, 0, *level.size)
        energy, slope = term.energy(none, u)
        assert energy.dtype == torch.float64 and energy.shape == (2,)
        for zero in (energy, slope, term.hessian(none, u, u), term.laplacian(none, u), term.at_infinity(none, u)):
            assert not zero.any()
        assert not term.diagonal(none, u).any() and term.diagonal(none, u).shape == (level.dim,)
    assert len(FilteredPotential(largest=8, level=LEVELS["8x8"])) > 0


def test_the_guard_of_tails_is_that_of_the_pixels():
    """Differences do not see a constant: a guard of theirs would leave it free."""
    order = (partial(FilteredPotential, "pair_difference"), partial(Potential, basis=BSpline(8)))
    conditional = Conditional(LEVELS["8x8"], order)
    assert conditional.guard(0.5) == pytest.approx(0.5)
    differences, pixels = conditional.theta.split(conditional.sizes)
    assert not differences.any() and pixels[-2:].tolist() == pytest.approx([0.5, 0.5]) and not pixels[:-2].any()
    assert conditional.held.sum() == 2 and conditional.held[-2:].all()
