"""Averages of the weights against their recursion; learning rates against exact values and torch's own schedulers."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from genmodels.registry import ConfigError, build, names
from genmodels.training.ema import (
    WIDEST,
    Average,
    ConstantDecay,
    PowerProfile,
    WeightAverage,
    best,
    exponent_of,
    std_of,
)
from genmodels.training.optim import (
    SGD,
    Adam,
    Adamax,
    Constant,
    Cosine,
    InverseDecay,
    LearningRate,
    OneCycle,
    StepDecay,
)


class Small(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((2,), 0.3, dtype=dtype), requires_grad=False)
        self.register_buffer("mean", torch.zeros(2, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))


def walk(model, k):
    with torch.no_grad():
        model.weight.copy_(torch.sin(torch.arange(3) + 1.7 * k))
        model.mean.fill_(k)
        model.count += 1


def test_constant_decay_is_its_recursion():
    model = Small()
    average = WeightAverage(ConstantDecay(0.8), model)
    expected = model.weight.detach().clone()
    for k in range(1, 101):
        walk(model, k)
        average.update(model, k)
        beta = min(0.8, k / (k + 9))
        expected = beta * expected + (1 - beta) * model.weight.detach()
    torch.testing.assert_close(average.tensors["weight"], expected, rtol=1e-13, atol=0)
    assert torch.equal(average.tensors["frozen"], model.frozen)  # an average of equal values, without drift
    assert average.tensors["mean"].tolist() == [100, 100] and average.tensors["count"].item() == 100  # copied


def test_decay_starts_low_and_reaches_its_value():
    rule = ConstantDecay(0.9)
    assert [rule.decay(k) for k in (1, 9, 81, 10_000)] == [0.1, 0.5, 0.9, 0.9]
    assert ConstantDecay(0.0).decay(5) == 0.0
    for bad in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            ConstantDecay(bad)


# ---- power-function averages ---


@pytest.mark.parametrize(
    ("std", "exponent"),
    [(0.05, 16.97), (0.10, 6.94)],
)
def test_published_exponents(std, exponent):
    assert round(exponent_of(std), 2) == exponent


@pytest.mark.parametrize("std", [1e-5, 0.01, 0.03, 0.0777, 0.15, 0.25, 0.288, WIDEST])
def test_width_and_exponent_are_inverses(std):
    exponent = exponent_of(std)
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    assert exponent == pytest.approx(max(roots.real), rel=1e-9, abs=1e-9)
    assert std_of(exponent) == pytest.approx(std, rel=1e-13)
    assert exponent_of(std_of(12.5)) == pytest.approx(12.5, rel=1e-13)


def test_widths_that_no_profile_has_are_refused():
    assert exponent_of(WIDEST) == 0  # the plain mean
    for bad in (0.0, -0.1, 0.2887, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"above 0 and at most √\(1/12\) = 0.2887"):
            PowerProfile(bad)


def effective_weights(rule, steps):
    """[steps] the weight of θ_i in the average after `steps` updates: (1 - β_i) Π_{j>i} β_j."""
    beta = torch.tensor([rule.decay(k) for k in range(1, steps + 1)], dtype=torch.float64)
    after = torch.cat((beta[1:].flip(0).cumprod(0).flip(0), torch.ones(1)))
    return (1 - beta) * after


@pytest.mark.parametrize("std", [0.02, 0.05, 0.10, 0.25, WIDEST])
@pytest.mark.parametrize("steps", [10, 1000, 100_000])
def test_weights_of_past_steps_are_the_integrals_of_the_profile(std, steps):
    """Each over its own step, at any length; so mean and width are those of the profile up to one step in length."""
    rule = PowerProfile(std)
    weights = effective_weights(rule, steps)
    edges = torch.arange(steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(weights, (edges ** (rule.exponent + 1)).diff(), rtol=1e-8, atol=1e-15)
    middle = (edges[1:] + edges[:-1]) / 2
    mean = (weights * middle).sum()
    assert weights.sum().item() == pytest.approx(1, abs=1e-10)
    if steps >= 1000:
        assert mean.item() == pytest.approx((rule.exponent + 1) / (rule.exponent + 2), abs=1 / steps)
        width = ((weights * (middle - mean) ** 2).sum()).sqrt().item()
        assert width == pytest.approx(std, abs=1 / steps)


def test_the_first_update_takes_the_weights_whole():
    model = Small()
    average = WeightAverage(PowerProfile(0.1), model)
    start = model.weight.detach().clone()
    walk(model, 1)
    average.update(model, 1)
    assert torch.equal(average.tensors["weight"], model.weight) and not torch.equal(start, model.weight)


def test_the_widest_profile_is_the_mean_of_all_weights():
    model, seen = Small(), []
    average = WeightAverage(PowerProfile(WIDEST), model)
    for k in range(1, 51):
        walk(model, k)
        average.update(model, k)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(average.tensors["weight"], torch.stack(seen).mean(0), rtol=1e-12, atol=1e-14)


def test_a_label_says_which_profile_it_means():
    for std in (0.05, 0.07, 1e-05, WIDEST):
        assert PowerProfile.of_label(PowerProfile(std).label).std == std
    assert PowerProfile.of_label("ema-0.070").label == "ema-0.07"
    for other in ("model", "ema-0.999", "ema-", "ema-x", "ema-nan", "0.07", "my-ema-0.07"):
        assert PowerProfile.of_label(other) is None


# ---- what all averages share ---


@pytest.mark.parametrize("name", names(Average))
def test_labels_are_file_names_of_their_own(name):
    assert build(Average, name).label.startswith("ema-")
    labels = {ConstantDecay(v).label for v in (0.999, 0.9999, 0.99999991, 0.99999992)}
    assert len(labels) == 4 and "ema-0.999" in labels
    assert {PowerProfile(v).label for v in (0.05, 0.050000001, 0.1)} == {"ema-0.05", "ema-0.050000001", "ema-0.1"}


def test_weights_and_average_never_mix():
    model = Small()
    average = WeightAverage(ConstantDecay(0.9), model)
    walk(model, 1)
    average.update(model, 1)
    model.train()
    raw, smooth = copy.deepcopy(model.state_dict()), copy.deepcopy(average.tensors)
    assert not torch.equal(raw["weight"], smooth["weight"])
    with pytest.raises(RuntimeError, match="in the middle"), average.applied(model):
        assert torch.equal(model.weight, smooth["weight"]) and not model.training
        with torch.no_grad():
            model.weight.zero_()  # whatever happens inside stays inside
            model.count += 5
        raise RuntimeError("in the middle")
    assert model.training
    assert all(torch.equal(raw[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(smooth[k], v) for k, v in average.tensors.items())
    shared = {t.data_ptr() for t in average.tensors.values()} & {t.data_ptr() for t in model.state_dict().values()}
    assert not shared


def test_best_is_the_first_average_or_the_weights():
    model = Small()
    averages = {rule.label: WeightAverage(rule, model) for rule in (ConstantDecay(0.5), ConstantDecay(0.9))}
    walk(model, 1)
    own = model.weight.detach().clone()
    for step, average in enumerate(averages.values(), 1):
        average.update(model, step)
    with best(averages, model):
        assert torch.equal(model.weight, averages["ema-0.5"].tensors["weight"]) and not model.training
    model.train()
    with best({}, model):
        assert torch.equal(model.weight, own) and not model.training
    assert model.training and torch.equal(model.weight, own)


def test_a_tied_weight_is_averaged_under_both_its_names():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(0.0)
    average = WeightAverage(ConstantDecay(0.0), model)
    average.rule = ConstantDecay(0.5)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    average.update(model, 1000)
    with average.applied(model):
        assert model[0].weight.unique().tolist() == [0.5]
    assert model[0].weight.unique().tolist() == [1.0]


def test_narrow_weights_are_averaged_wide():
    model = Small(torch.bfloat16)
    average = WeightAverage(ConstantDecay(0.999), model)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(100):
        average.update(model, 10**6)
    expected = 2 - 0.999**100  # one step is below the resolution of bfloat16: a narrow average would never move
    torch.testing.assert_close(average.tensors["weight"], torch.full((3,), expected), rtol=1e-5, atol=0)


def test_average_continues_from_its_tensors():
    model = Small()
    straight, first = (WeightAverage(ConstantDecay(0.9), model) for _ in range(2))
    for k in (1, 2, 3):
        walk(model, k)
        straight.update(model, k)
        first.update(model, k)
    second = WeightAverage(ConstantDecay(0.9), model)
    second.load(copy.deepcopy(first.tensors))
    walk(model, 4)
    straight.update(model, 4)
    second.update(model, 4)
    assert all(torch.equal(straight.tensors[k], v) for k, v in second.tensors.items())


class Counter(nn.Module):
    """A weight, and a buffer that is another tensor after every call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self):
        self.calls = self.calls + 1


def test_an_average_reads_what_stands_there_now():
    """Buffers that were put in place of others, and a model other than the one that it was made for."""
    models = [Counter(), Counter()]
    average = WeightAverage(ConstantDecay(0.0), models[0])
    for value, model in ((1.0, models[0]), (5.0, models[1])):
        model.weight.data = torch.full((3,), value)
        for _ in range(int(value)):
            model()
        average.update(model, 1)
        assert average.tensors["calls"] == value and torch.equal(average.tensors["weight"], torch.full((3,), value))


# ---- learning rates ---


def factors(rule, steps):
    return [rule.factor(k, steps) for k in range(steps)]


def reference(scheduler, steps, **arguments):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler(optimizer, **arguments)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(out) < steps:
            schedule.step()
    return out


@pytest.mark.parametrize(("steps", "rise"), [(10, 0.3), (100, 0.1), (77, 0.5), (5, 0.1), (2, 0.9)])
def test_one_cycle_is_torchs(steps, rise):
    expected = reference(
        torch.optim.lr_scheduler.OneCycleLR,
        steps,
        max_lr=1.0,
        total_steps=steps,
        pct_start=rise,
        div_factor=25.0,
        final_div_factor=1e4,
        cycle_momentum=False,
    )
    assert factors(OneCycle(rise, start=0.04, final=4e-6), steps) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_at_its_corners():
    rule = OneCycle(0.25, start=0.1, final=0.01)
    values = factors(rule, 40)
    assert values[0] == pytest.approx(0.1) and values[9] == 1.0 and values[39] == pytest.approx(0.01)
    assert max(values) == values[9]
    assert all(0 < v <= 1 for steps in (1, 2, 3) for v in factors(rule, steps))
    with pytest.raises(ValueError, match=r"rise must be in \(0, 1\)"):
        OneCycle(rise=1.0)


@pytest.mark.parametrize("final", [0.0, 0.2])
def test_cosine_is_torchs(final):
    expected = reference(torch.optim.lr_scheduler.CosineAnnealingLR, 30, T_max=30, eta_min=final)
    assert factors(Cosine(final=final), 30) == pytest.approx(expected, rel=1e-9)


def test_cosine_at_its_corners():
    values = factors(Cosine(final=0.2), 4)
    assert values == pytest.approx([1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5))])


@pytest.mark.parametrize(("every", "ratio"), [(1, 0.9), (7, 0.5), (100, 0.1)])
def test_step_decay_is_torchs(every, ratio):
    expected = reference(torch.optim.lr_scheduler.StepLR, 30, step_size=every, gamma=ratio)
    assert factors(StepDecay(every, ratio), 30) == pytest.approx(expected, rel=1e-12)


def test_inverse_decay_is_its_formula():
    assert factors(InverseDecay(0.5), 4) == pytest.approx([1, 1 / 1.5, 1 / 2, 1 / 2.5], rel=1e-12)
    assert InverseDecay(1e-5).factor(100_000, 200_000) == pytest.approx(0.5, rel=1e-12)
    assert factors(InverseDecay(1.0, warmup=2), 3) == pytest.approx([0.5, 0.5, 1 / 3], rel=1e-12)
    for bad in ({"rate": -1e-5}, {"warmup": -1}):
        with pytest.raises(ValueError, match="inverse_decay"):
            InverseDecay(**bad)


def test_step_decay_at_its_corners():
    rule = StepDecay(200_000)
    assert [rule.factor(k, 10**6) for k in (0, 199_999, 200_000, 399_999, 400_000)] == [1, 1, 0.5, 0.5, 0.25]
    assert factors(StepDecay(2, 0.5, warmup=4), 5) == [0.25, 0.5, 0.375, 0.5, 0.25]
    for bad in ({"every": 0}, {"ratio": 0.0}, {"ratio": 1.5}):
        with pytest.raises(ConfigError, match="every >= 1 and 0 < ratio <= 1"):
            StepDecay(**bad)


def test_warm_up_is_linear_and_reaches_one():
    assert factors(Constant(warmup=4), 7) == [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert factors(Constant(), 3) == [1, 1, 1]
    plain, warm = factors(Cosine(), 10), factors(Cosine(warmup=2), 10)
    assert warm == [0.5 * plain[0], *plain[1:]]


@pytest.mark.parametrize("name", names(LearningRate))
def test_every_rule_stays_between_zero_and_one(name):
    rule = build(LearningRate, name)
    for steps in (1, 2, 10, 1000):
        assert all(0 <= value <= 1 for value in factors(rule, steps))


def test_adamax_is_its_recursion():
    """Kingma & Ba, algorithm 2, with a penalty on the weights in the gradient."""
    theta = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = Adamax(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.01).over([theta])
    expected, m, u = theta.detach().clone(), 0.0, torch.zeros(2, dtype=torch.float64)
    for k in range(1, 6):
        optimizer.zero_grad()
        (theta**3).sum().backward()
        g = 3 * expected**2 + 0.01 * expected
        m, u = 0.8 * m + 0.2 * g, torch.maximum(0.9 * u, g.abs() + 1e-3)
        expected = expected - 0.1 / (1 - 0.8**k) * m / u
        optimizer.step()
        torch.testing.assert_close(theta.detach(), expected, rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match=r"adamax: 0 <= betas < 1.*found betas=\[0.9, 1.0\]"):
        Adamax(betas=(0.9, 1.0))


def test_adam_in_one_kernel_is_its_recursion():
    """m and v are debiased; weights decay by lr · weight_decay of themselves. A few roundings of float32 apart."""
    lr, betas, eps, decay = 0.1, (0.8, 0.95), 1e-6, 0.02
    p = nn.Parameter(torch.linspace(-1, 1, 37))
    optimizer = Adam(lr, betas, eps, decay).over([p])
    wanted, m, v = p.detach().double(), 0.0, 0.0
    for k in range(1, 6):
        g = torch.cos(k * torch.arange(37.0, dtype=torch.float64))
        p.grad = g.float()
        optimizer.step()
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        rate = lr * (m / (1 - betas[0] ** k)) / ((v / (1 - betas[1] ** k)).sqrt() + eps)
        wanted = wanted * (1 - lr * decay) - rate
    torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-5, atol=1e-6)


def test_rates_must_be_positive():
    for optimizer in (Adam, SGD):
        with pytest.raises(ValueError, match="lr must be above 0, found 0"):
            optimizer(lr=0.0)
    for rule in (Constant, Cosine):
        with pytest.raises(ValueError, match="warmup must be at least 0, found -1"):
            rule(warmup=-1)
