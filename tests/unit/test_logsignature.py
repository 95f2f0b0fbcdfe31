"""Signatures and their logarithms against iterated integrals, Chen's identity and Baker, Campbell and Hausdorff."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from genmodels.registry import ConfigError
from genmodels.rng import generator
from genmodels.solvers.logsignature import (
    LogODE,
    chen,
    dimension,
    logarithm,
    logsignature,
    lyndon_words,
    outer,
    signature,
)
from genmodels.solvers.paths import Linear


def increments(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator("signature", *shape))


def integral(steps: list[list[float]], word: tuple[int, ...]) -> float:
    """∫…∫ dX^word of a piecewise linear path: the sum over ways to share the letters among its pieces, in order.

    A straight piece Δ that takes r letters gives Π Δ / r!.
    """
    if not word:
        return 1.0
    if not steps:
        return 0.0
    *before, last = steps
    total = 0.0
    for taken in range(len(word) + 1):
        kept, letters = word[: len(word) - taken], word[len(word) - taken :]
        total += integral(before, kept) * math.prod(last[i] for i in letters) / math.factorial(taken)
    return total


def test_the_area_of_two_sides_of_a_square():
    found = logsignature(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 2)
    assert found.tolist() == [1, 1, 0.5]


def test_signatures_are_iterated_integrals():
    steps = increments(2, 5, 3)
    levels = signature(steps, 3)
    for length, level in enumerate(levels, 1):
        for b, word in itertools.product(range(2), itertools.product(range(3), repeat=length)):
            assert abs(float(level[(b, *word)]) - integral(steps[b].tolist(), word)) < 1e-12, word


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_chen_s_identity(depth):
    steps = increments(2, 7, 3)
    whole, parts = signature(steps, depth), (signature(steps[:, :3], depth), signature(steps[:, 3:], depth))
    for a, b in zip(whole, chen(*parts), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_logarithm_of_two_pieces_is_baker_campbell_hausdorff_s():
    """log(e^a e^b) = a + b + [a, b]/2 + ([a, [a, b]] + [b, [b, a]])/12 to the third order."""
    steps = increments(2, 3)
    a, b = steps

    def bracket(x: Tensor, y: Tensor) -> Tensor:
        return outer(x, y, x.ndim, y.ndim) - outer(y, x, y.ndim, x.ndim)

    found = logarithm(signature(steps, 3))
    torch.testing.assert_close(found[0], a + b)
    torch.testing.assert_close(found[1], bracket(a, b) / 2, rtol=0, atol=1e-13)
    third = (bracket(a, bracket(a, b)) + bracket(b, bracket(b, a))) / 12
    torch.testing.assert_close(found[2], third, rtol=0, atol=1e-13)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_lyndon_words_are_as_many_as_the_free_lie_algebra_has_dimensions(channels):
    """Witt's formula; and each is smaller than its rotations."""
    witt = [channels, (channels**2 - channels) // 2, (channels**3 - channels) // 3]
    words = lyndon_words(channels, 3)
    assert [sum(len(w) == n for w in words) for n in (1, 2, 3)] == witt
    assert [dimension(channels, depth) for depth in (1, 2, 3)] == list(itertools.accumulate(witt))
    assert all(w < w[i:] + w[:i] for w in words for i in range(1, len(w)))
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("channels", [2, 3])
def test_coefficients_at_lyndon_words_determine_the_logarithm(channels):
    """Of as many independent paths as there are words, they span the space that the whole logarithms span."""
    steps = increments(60, 5, channels)
    full = torch.cat([level.flatten(1) for level in logarithm(signature(steps, 3))], 1)
    short = logsignature(steps, 3)
    assert short.shape[1] == dimension(channels, 3)
    assert torch.linalg.matrix_rank(short) == torch.linalg.matrix_rank(full, rtol=1e-10) == dimension(channels, 3)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_log_ode_of_a_linear_equation_is_right_to_its_order(depth):
    """dz = Σ A_i z dX^i over a window: exp(Σ c_w A_w) A_w the bracket of a word, products reversed."""
    a, b = increments(2, 3, 3)
    bracket = b @ a - a @ b
    fields = torch.stack((a, b, bracket, bracket @ a - a @ bracket, b @ bracket - bracket @ b))
    steps, errors = increments(6, 2), []
    for scale in (0.02, 0.01):
        exact = torch.eye(3, dtype=torch.float64)
        for dx in scale * steps:
            exact = torch.matrix_exp(dx[0] * a + dx[1] * b) @ exact
        c = logsignature(scale * steps, depth)
        errors.append((torch.matrix_exp(torch.einsum("w,wij->ij", c, fields[: len(c)])) - exact).abs().max())
    assert abs(float(torch.log2(errors[0] / errors[1])) - (depth + 1)) < 0.2


def test_a_line_has_no_areas_and_speed_does_not_matter():
    steps = increments(1, 3).expand(6, 3)
    found = logsignature(steps, 3)
    torch.testing.assert_close(found[:3], steps.sum(0))
    assert found[3:].abs().max() < 1e-12
    path = increments(4, 2)
    halved = (path / 2).repeat_interleave(2, 0)
    torch.testing.assert_close(logsignature(halved, 3), logsignature(path, 3), rtol=0, atol=1e-12)


def test_gradients_are_right():
    assert torch.autograd.gradcheck(lambda x: logsignature(x, 3), (increments(2, 4, 2).requires_grad_(),))


def test_other_depths_are_refused():
    for depth in (0, 4):
        with pytest.raises(ConfigError, match="depth must be 1, 2 or 3"):
            logsignature(increments(3, 2), depth)
        with pytest.raises(ConfigError, match="depth must be"):
            LogODE(depth=depth)
    with pytest.raises(ConfigError, match="at least 1"):
        LogODE(window=0)


# ---- the control -----------------------------------------------------------------------------------------------------


def test_a_window_moves_at_the_rate_of_its_log_signature():
    times = torch.tensor([[0.0, 0.5, 2.0, 3.0, 3.5, 4.5, 6.0]], dtype=torch.float64)
    x = increments(1, 7, 2)
    path = LogODE(depth=2, window=3, time=False).path(times, x)
    assert path.knots.tolist() == [[0, 3.0, 6.0]]
    for (i, j), s in (((0, 3), 1.0), ((3, 6), 5.0)):
        rate = logsignature(x[0, i : j + 1].diff(dim=0), 2) / (times[0, j] - times[0, i])
        found = path.derivative(torch.tensor(s, dtype=torch.float64))[0]
        torch.testing.assert_close(found, rate, rtol=0, atol=1e-12)
    start = path.value(torch.tensor(0.0, dtype=torch.float64))[0]
    torch.testing.assert_close(start[:2], x[0, 0], rtol=0, atol=0)
    assert start[2:].tolist() == [0]


def test_windows_of_one_observation_at_depth_1_are_linear_interpolation():
    times, x = torch.rand(3, 6, generator=generator("t")).double().cumsum(1), increments(3, 6, 2)
    one, line = LogODE(depth=1, window=1).path(times, x), Linear().path(times, x)
    assert torch.equal(one.knots, line.knots)
    torch.testing.assert_close(one.pieces, line.pieces, rtol=0, atol=1e-12)


def test_the_last_window_may_be_short():
    times, x = torch.arange(6.0).double()[None], increments(1, 6, 2)
    path = LogODE(depth=2, window=4, time=False).path(times, x)
    assert path.knots.tolist() == [[0, 4, 5]]
    found = path.derivative(torch.tensor(4.5, dtype=torch.float64))[0]
    torch.testing.assert_close(found, logsignature(x[0, 4:].diff(dim=0), 2), rtol=0, atol=1e-12)
