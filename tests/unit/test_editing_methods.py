"""Editing beside plain inversion: Uni-Edit, RF-Inversion, FlowEdit and DNAEdit, on fields that are known exactly."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from genmodels.distributions import GaussianMixture
from genmodels.editing.apply import edit, invert
from genmodels.editing.dna_edit import DNAEdit
from genmodels.editing.editor import Editor, Prompt, Walk
from genmodels.editing.exact import MixtureEditor
from genmodels.editing.flow_edit import FlowEdit
from genmodels.editing.method import EditMethod
from genmodels.editing.rf_inversion import RFInversion
from genmodels.editing.uni_edit import UniEdit
from genmodels.registry import ConfigError, build
from genmodels.rng import BatchNoise, Noise, SeedNoise
from genmodels.solvers.runge_kutta import RK4

METHODS = {"uni_edit": UniEdit, "rf_inversion": RFInversion, "flowedit": FlowEdit, "dnaedit": DNAEdit}


def ring(radius: float, turn: float) -> GaussianMixture:
    angles = torch.arange(8).double() * math.pi / 4 + turn
    means = radius * torch.stack((angles.cos(), angles.sin()), -1)
    return GaussianMixture.from_tensors(torch.ones(8), means, torch.full((8, 2), 0.3**2))


SOURCE, TARGET = Prompt(ring(2.0, 0.0)), Prompt(ring(2.5, math.pi / 8))
RINGS = MixtureEditor()


@pytest.fixture(scope="module")
def points() -> tuple[Tensor, Tensor]:
    """256 items of the source ring, and their exact edits: images of the same normal quantiles."""
    quantiles = torch.special.ndtri((torch.arange(16).double() + 0.5) / 16)
    z = torch.cartesian_prod(quantiles, quantiles)
    times = RINGS.times(64, z)  # RK4 errs by 8e-8 here
    return tuple(Walk(RINGS, p, times).solve(RK4(), z, True) for p in (SOURCE, TARGET))


def made(method: EditMethod, x: Tensor, *prompts: Prompt, editor: Editor = RINGS, first: int = 0, **given: Any) -> Any:
    noise = given.get("noise") or SeedNoise(range(first, first + len(x)))
    return method.edit(editor, x, *prompts, editor.times(method.num_steps, x), noise)


@pytest.mark.parametrize(
    ("method", "nfe", "movement", "log_prob", "rms"),
    [
        (FlowEdit(), 48, (0.500, 0.03), (-3.28, 0.2), (0.32, 0.04)),
        (FlowEdit(50, 50, 0, 8), 800, (0.481, 0.005), (-3.33, 0.04), (0.22, 0.016)),
        (DNAEdit(), 48, (0.596, 0.012), (-2.63, 0.16), (0.19, 0.04)),
        (RFInversion(), 56, (2.01, 0.3), (-2.49, 0.28), (2.55, 0.4)),
    ],
    ids=["flowedit", "flowedit 800", "dnaedit", "rf_inversion"],
)
def test_edits_of_a_ring_are_as_published(points, method, nfe, movement, log_prob, rms):
    """To four of their standard deviations over seeds."""
    x, exact = points
    found = made(method, x, SOURCE, TARGET)
    assert found.nfe == nfe
    assert (found.x - x).norm(dim=1).mean() == pytest.approx(movement[0], abs=movement[1])
    assert TARGET.condition.log_prob(found.x).mean() == pytest.approx(log_prob[0], abs=log_prob[1])
    assert (found.x - exact).square().sum(1).mean().sqrt() == pytest.approx(rms[0], abs=rms[1])


def test_equal_prompts_return_the_item(points):
    x = points[0]
    for first in (0, 1000):
        assert torch.equal(made(FlowEdit(12, 9, 0, 2), x, SOURCE, SOURCE, first=first).x, x)
        for given in ({}, {"stochastic": False, "gamma": 1.0}, {"gamma": 0.0}):
            whole = RFInversion(eta=1.0, stop=28, **given)
            assert (made(whole, x, SOURCE, TARGET, first=first).x - x).abs().max() < 2e-15
        for skip in (0, 4):
            assert (made(DNAEdit(mvg=1.0, skip=skip), x, SOURCE, SOURCE, first=first).x - x).abs().max() < 1e-14
    assert (made(DNAEdit(mvg=0.9, skip=0), x, SOURCE, SOURCE).x - x).abs().max() > 1e-3


def test_uni_edit_with_equal_prompts_is_the_round_trip_of_uni_inv_and_euler(points):
    """Of half the steps; the mask, 0/0 there, is 0. With prompts of its own and α = ω = 1 it denoises by Euler."""
    x = points[0]
    for method, target in ((UniEdit(12, 0.5), SOURCE), (UniEdit(12, 1.0, 1.0), TARGET)):
        times = RINGS.times(12, x)[: method.inverted + 1]
        y, v = x, RINGS.velocity(times[0], x, SOURCE)
        for t, s in pairwise(times):
            v = RINGS.velocity(s, y + (s - t) * v, SOURCE)
            y = y + (s - t) * v
        for t, s in pairwise(times.flip(0)):
            y = y + (s - t) * RINGS.velocity(t, y, target)
        torch.testing.assert_close(made(method, x, SOURCE, target).x, y, rtol=0, atol=1e-14)
    assert 1e-4 < (made(UniEdit(12, 0.5), x, SOURCE, SOURCE).x - x).square().sum(1).mean().sqrt() < 0.03


# ---- one number at a time ----

TIMES = (0.0, 0.2, 0.3, 0.6, 1.0)
RISE, FALL = 0.7, -1.3  # λ of the source and of the target


class Linear(Editor):
    """v = λ x + t, λ the condition."""

    def __init__(self, times: tuple[float, ...] = TIMES) -> None:
        self.given, self.asked = torch.tensor(times, dtype=torch.float64), []

    def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        self.asked.append((float(t), prompt.condition))
        return prompt.condition * x + t

    def times(self, num_steps: int, x: Tensor) -> Tensor:
        return self.given

    def encode(self, items: Tensor) -> Tensor:
        return items

    def decode(self, x: Tensor) -> Tensor:
        return x

    def attention(self) -> tuple:
        return ()


class Given(Noise):
    """Numbers in the order in which they are asked for."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(1, "cpu")
        self.numbers = list(numbers)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((1, *shape), self.numbers.pop(0), dtype=dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        raise AssertionError("none is drawn")


DRAWN = (0.3, -1.1, 0.8, 1.7, -0.4, 0.2, 0.9)


def one(method: EditMethod, x: float) -> float:
    noise = Given(*DRAWN)
    return float(
        made(
            method, torch.tensor([[x]], dtype=torch.float64), Prompt(RISE), Prompt(FALL), editor=Linear(), noise=noise
        ).x
    )


def source(t: float, x: float) -> float:
    return RISE * x + t


def target(t: float, x: float) -> float:
    return FALL * x + t


def test_flowedit_number_by_number():
    x0, y, drawn = 0.9, 0.9, iter(DRAWN)
    for t, s in ((0.6, 0.3), (0.3, 0.2)):
        rise = 0.0
        for _ in range(2):
            noised = (1 - t) * x0 + t * next(drawn)
            rise += (target(t, y + noised - x0) - source(t, noised)) / 2
        y += (s - t) * rise
    assert one(FlowEdit(4, 3, 1, 2), x0) == pytest.approx(last_of(y, x0, next(drawn)), abs=1e-14)
    # one step from noise: y = x_0 - (v_t - v_s)(ε) = x_0 - (λ_t - λ_s) ε
    line = Linear((0.0, 1.0))
    x = torch.tensor([[x0]], dtype=torch.float64)
    found = made(FlowEdit(1, 1), x, Prompt(RISE), Prompt(FALL), editor=line, noise=Given(0.3)).x
    assert float(found) == pytest.approx(x0 - (FALL - RISE) * 0.3, abs=1e-14)


def last_of(y: float, x0: float, eps: float) -> float:
    """FlowEdit's step of mere sampling, from t = 0.2 to 0."""
    z = y + (0.8 * x0 + 0.2 * eps) - x0
    return z - 0.2 * target(0.2, z)


def test_dnaedit_number_by_number():
    x0, eps, mvg = 0.9, DRAWN[0], 0.85
    x, kept = x0, []
    for t, s in ((0.0, 0.2), (0.2, 0.3), (0.3, 0.6)):
        aimed = ((1 - s) * x + (s - t) * eps) / (1 - t)  # on the line to ε
        v = source(s, aimed)
        kept.append((t, s, aimed - x - (s - t) * v, v))
        x += (s - t) * v
    o = x0
    for t, s, missed, was in kept[::-1]:
        v = target(s, x + missed)
        o += (t - s) * (v - was)
        x += (t - s) * (mvg * v + (1 - mvg) * (x - o) / s)
    assert one(DNAEdit(4, mvg, 1), x0) == pytest.approx(x, abs=1e-14)


@pytest.mark.parametrize("stochastic", [False, True])
def test_rf_inversion_number_by_number(stochastic):
    x0, gamma, eta = 0.9, 0.4, 0.8
    x, drawn = x0, iter(DRAWN)
    goal = next(drawn)
    for t, s in pairwise(TIMES):
        v = source(t, x)
        x += (s - t) * (v + gamma * ((goal - x) / (1 - t) - v))
    for number, (t, s) in enumerate(pairwise(TIMES[::-1])):
        u = -target(t, x)
        u += (eta if number < 2 else 0.0) * ((x0 - x) / t - u)
        if stochastic and number:
            x += (t - s) * (2 * u - x / (1 - t)) + math.sqrt(2 * t * (t - s) / (1 - t)) * next(drawn)
        else:
            x += (t - s) * u
    assert one(RFInversion(4, gamma, eta, 2, stochastic), x0) == pytest.approx(x, abs=1e-14)


def test_without_control_rf_inversion_is_eulers_method_both_ways():
    h = [s - t for t, s in pairwise(TIMES)]
    x = 0.9
    for t, step in zip(TIMES, h, strict=False):
        x = x * (1 + step * RISE) + step * t
    for t, step in zip(TIMES[:0:-1], h[::-1], strict=True):
        x = x * (1 - step * FALL) - step * t
    assert one(RFInversion(4, 0.0, 0.0, 0), 0.9) == pytest.approx(x, abs=1e-14)


def test_the_stochastic_way_down_has_the_marginals_of_the_flow():
    """From the goal of γ = 1, without η: mean and variance are the data's, and the start is forgotten.

    Of 10 000 draws the variance scatters by 1.4 %, and 100 steps are off by about as much; with half the noise it would
    be half as large. The ODE, of the same law, keeps the order of its starts.
    """
    law = Prompt(GaussianMixture(((1.5,),), ((0.25,),), shape=(1,)))
    x, found = torch.zeros(10_000, 1).double(), {}
    for stochastic in (False, True):
        noise = BatchNoise(len(x), generator=torch.Generator().manual_seed(0))
        found[stochastic] = made(RFInversion(100, 1.0, 0.0, 0, stochastic), x, law, law, noise=noise)
        assert found[stochastic].x.mean() == pytest.approx(1.5, abs=0.02)
        assert found[stochastic].x.var() == pytest.approx(0.25, rel=0.06)
    follow = [float(torch.corrcoef(torch.cat((o.x, o.noise), 1).T)[0, 1]) for o in (found[False], found[True])]
    assert follow[0] > 1 - 1e-9 and abs(follow[1]) < 0.04


# ---- pictures, tokens, seeds ----


class Pictures(Linear):
    """v = x · pattern of the prompt, with channels on the axis 1."""

    def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        return (prompt.condition.to(x.dtype) * x + t).to(x.dtype)


class Tokens(Pictures):
    """The same on tokens [B, N, C]."""

    channel_axis = -1


G = torch.Generator().manual_seed(3)
FIELDS = [torch.randn(3, 2, 4, generator=G, dtype=torch.float64) for _ in range(2)]
IMAGES = torch.randn(5, 3, 2, 4, generator=G, dtype=torch.float64)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(-2).transpose(-1, -2)


def test_the_mask_of_uni_edit_is_over_the_positions_of_each_item():
    method, prompts = UniEdit(4, 0.25, 2.0), [Prompt(f) for f in FIELDS]
    found = made(method, IMAGES, *prompts, editor=Pictures()).x
    expected = IMAGES.clone()
    for item, was in zip(expected, IMAGES, strict=True):
        x = was + 0.2 * (FIELDS[0] * (was + 0.2 * FIELDS[0] * was) + 0.2)  # Uni-Inv from 0 to 0.2
        v_s, v_t = (f * x + 0.2 for f in FIELDS)
        size = [[sum(abs(v_t - v_s)[c, i, j] for c in range(3)) / 3 for j in range(4)] for i in range(2)]
        low, high = min(map(min, size)), max(map(max, size))
        m = torch.tensor([[(v - low) / (high - low) for v in row] for row in size]).double()
        item.copy_(x - 0.2 * (m * v_t + (1 - m) * v_s + 2.0 * (1 + m) * (v_t - v_s)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    flat = made(method, tokens(IMAGES), *(Prompt(tokens(f)) for f in FIELDS), editor=Tokens()).x
    torch.testing.assert_close(flat, tokens(found), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "method",
    [
        UniEdit(4),
        RFInversion(4, stop=1),
        RFInversion(4, stop=1, stochastic=True),
        FlowEdit(4, 3, 1, 2),
        DNAEdit(4, skip=1),
    ],
    ids=lambda m: m.registered_name,
)
def test_an_item_depends_on_its_own_seed_alone_in_either_precision(method):
    prompts, editor = [Prompt(f) for f in FIELDS], Pictures()
    times = editor.times(4, IMAGES)
    whole = method.edit(editor, IMAGES, *prompts, times, SeedNoise((7, 8, 9, 10, 11)))
    rows = torch.tensor([3, 1])
    some = method.edit(editor, IMAGES[rows], *prompts, times, SeedNoise((10, 8)))
    torch.testing.assert_close(some.x, whole.x[rows], rtol=0, atol=1e-13)
    single = method.edit(editor, IMAGES.float(), *prompts, times, SeedNoise((7, 8, 9, 10, 11))).x
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), whole.x, rtol=1e-4, atol=1e-4)
    other = method.edit(editor, IMAGES, *prompts, times, SeedNoise((17, 18, 19, 20, 21))).x
    assert torch.equal(other, whole.x) == isinstance(method, UniEdit)  # which draws nothing


# ---- where they are, and what they refuse ----


@pytest.mark.parametrize(
    ("method", "nfe", "intervals"),
    [
        (UniEdit(15), 28, [14, 14, *range(13, 5, -1), *(i for i in range(6, 15) for _ in range(2))]),
        (UniEdit(11, 0.7), 25, [10, 10, *range(9, 2, -1), *(i for i in range(3, 11) for _ in range(2))]),
        (RFInversion(), 56, [*range(27, -1, -1), *range(28)]),
        (FlowEdit(28, 24, 3, 1), 45, [*(i for i in range(4, 25) for _ in range(2)), 25, 26, 27]),
        (FlowEdit(5, 4, 0, 3), 24, [i for i in range(1, 5) for _ in range(6)]),
        (DNAEdit(), 48, [*range(27, 3, -1), *range(4, 28)]),
    ],
    ids=["uni_edit", "uni_edit 11", "rf_inversion", "flowedit", "flowedit 3", "dnaedit"],
)
def test_walks_know_where_they_are_and_count(points, method, nfe, intervals, monkeypatch):
    """Intervals count from noise, and the time that is asked for is one of their ends."""
    places, call = [], Walk.__call__

    def noted(walk: Walk, t: Tensor, x: Tensor) -> Tensor:
        found = call(walk, t, x)
        places.append(walk.place)
        return found

    monkeypatch.setattr(Walk, "__call__", noted)
    x = points[0][:3]
    assert made(method, x, SOURCE, TARGET).nfe == nfe == len(places)
    assert [p.interval for p in places] == intervals
    n, times = method.num_steps, RINGS.times(method.num_steps, x).tolist()
    assert all(p.time in (times[n - 1 - p.interval], times[n - p.interval]) for p in places)


def test_what_inverts_and_what_does_not(points):
    x = points[0][:8]
    for method, message in (
        (FlowEdit(), "'flowedit' does not invert"),
        (DNAEdit(), "'dnaedit' does not invert"),
        (UniEdit(), "'uni_edit' inverts 9 of 15 steps, and does not come to noise. Take alpha=1, or uni_inv."),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            invert(RINGS, x, SOURCE, method=method, noise=SeedNoise(8))
        assert made(method, x, SOURCE, TARGET).noise is None
    for method in (RFInversion(), UniEdit(alpha=1.0)):
        found = invert(RINGS, x, SOURCE, method=method, noise=SeedNoise(8))
        assert torch.equal(found.noise, made(method, x, SOURCE, TARGET).noise)
    assert found.nfe == 16
    goal = SeedNoise(8).normal(2, dtype=torch.float64)
    torch.testing.assert_close(invert(RINGS, x, SOURCE, method=RFInversion(gamma=1.0), noise=SeedNoise(8)).noise, goal)


def test_an_edit_and_its_reconstruction_draw_the_same(points):
    x = points[0][:8]
    for method in (RFInversion(), DNAEdit()):
        found = edit(RINGS, x, SOURCE, SOURCE, method=method, noise=SeedNoise(8))
        assert torch.equal(found.items, found.reconstruction) and not torch.equal(found.items, x)
    found = invert(RINGS, x, SOURCE, method=RFInversion(), noise=SeedNoise(8))
    assert torch.equal(
        found.reconstruction, edit(RINGS, x, SOURCE, SOURCE, method=RFInversion(), noise=SeedNoise(8)).items
    )


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("uni_edit", {"alpha": 1.2}, "alpha: 1.2 is not within 0 and 1"),
        ("uni_edit", {"alpha": 0.03}, "alpha: 0.03 of 15 steps is none"),
        ("uni_edit", {"omega": -1.0}, "omega: -1.0 is not within 0 and inf"),
        ("rf_inversion", {"gamma": -0.1}, "gamma: -0.1 is not within 0 and 1"),
        ("rf_inversion", {"eta": 1.5}, "eta: 1.5 is not within 0 and 1"),
        ("rf_inversion", {"stop": 29}, "stop: 29 is not within 0 and 28, the number of steps."),
        ("flowedit", {"n_max": 29}, "n_max: 29 is not within 0 and 28"),
        ("flowedit", {"n_min": 25}, "n_min: 25 is not within 0 and 24"),
        ("flowedit", {"n_avg": 0}, "n_avg: 0 is not within 1 and inf"),
        ("dnaedit", {"mvg": 1.01}, "mvg: 1.01 is not within 0 and 1"),
        ("dnaedit", {"skip": 28}, "skip: 28 is not within 0 and 27"),
        *((name, {"num_steps": 0}, "num_steps: at least 1 is needed, found 0") for name in METHODS),
    ],
)
def test_settings_out_of_range(name, given, message):
    with pytest.raises(ConfigError, match=re.escape(f"edit.method.{message}")):
        build(EditMethod, {"name": name, **given})
    assert type(build(EditMethod, name)) is METHODS[name]


def test_an_edit_that_is_not_finite_is_an_error():
    x = torch.full((1, 1), torch.inf)
    for method in (UniEdit(4), RFInversion(4, stop=1), FlowEdit(4, 3), DNAEdit(4, skip=1)):
        message = f"{method.registered_name} ended in numbers that are not finite"
        with pytest.raises(ValueError, match=message):
            made(method, x, Prompt(RISE), Prompt(FALL), editor=Linear())
