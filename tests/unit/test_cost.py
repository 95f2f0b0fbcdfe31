"""What is counted is what was done: evaluations, parameters, operations, memory, time."""

import itertools

import pytest
import torch
from torch import nn

from genmodels.evaluation import answers as module
from genmodels.evaluation.answers import Bill, Failures, Interview
from genmodels.metrics.cost import (
    count_evaluations,
    inference_parameters,
    num_parameters,
    peak_memory,
    reset_peak_memory,
)
from genmodels.networks.network import Network
from genmodels.operations import count_operations
from genmodels.training.state import size
from genmodels.types import Likelihood, Samples
from tests.evaluation_fakes import FakeProtocol, Levels, Points, Tap, UniformLevels


class Outer(Network):
    """A network made of another one, called twice."""

    def __init__(self):
        super().__init__()
        self.inner = Tap()

    def forward(self, t, x, condition=None):
        return self.inner(t, self.inner(t, x))


def test_only_outermost_networks_are_counted():
    model = nn.Sequential(Outer())
    with count_evaluations(model) as counted:
        for _ in range(5):
            model[0](None, torch.zeros(8, 2))
        model[0](None, torch.zeros(4, 2))  # half of the items take one more step
    assert counted.per_item(8) == 5.5
    model[0](None, torch.zeros(8, 2))
    assert counted.rows == [44]  # the hooks are gone


def test_a_stack_of_networks_costs_its_most_used_one():
    model = nn.Sequential(Tap(), Tap())
    with count_evaluations(model) as counted:
        model[0](None, torch.zeros(6, 2))
        model[1](None, torch.zeros(6, 2))
        model[1](None, torch.zeros(12, 2))  # guidance: conditional and unconditional rows in one call
    assert counted.rows == [6, 18] and counted.per_item(6) == 3


def test_no_network_no_evaluations():
    with count_evaluations(nn.Linear(2, 2)) as counted:
        pass
    assert counted.per_item(4) == 0


def test_numbers_that_are_fitted_in_closed_form_count_unless_an_optimiser_is_meant():
    class Mean(nn.Module):
        def fitted_numbers(self):
            return 5

    model = nn.ModuleList([nn.Linear(3, 4), Mean(), nn.Sequential(Mean())])
    assert num_parameters(model) == inference_parameters(model) == 16 + 10
    assert num_parameters(model, trainable=True) == 16
    assert size(model) == {"parameters": 26, "trainable": 16}


def test_tied_parameters_count_once():
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    b.weight = a.weight
    b.bias.requires_grad_(False)
    model = nn.ModuleList([a, b])
    assert num_parameters(model) == 12 + 4 + 4
    assert num_parameters(model, trainable=True) == 12 + 4
    assert num_parameters(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to("meta")) == 24  # where nothing has a place


# ---- operations: two for a multiply-add, counted by hand ---------------------------------------------------------


def operations(f):
    with count_operations() as counted:
        f()
    return counted.total


def test_linear_and_convolution():
    assert operations(lambda: nn.Linear(10, 20)(torch.zeros(3, 10))) == 2 * 3 * 10 * 20 == 1200
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    assert operations(lambda: convolution(torch.zeros(2, 3, 16, 16))) == 2 * 2 * 16 * 16 * 8 * 3 * 9 == 221_184


def test_inference_mode_hides_nothing():
    linear, q = nn.Linear(10, 20), torch.zeros(1, 4, 32, 16)
    with torch.inference_mode():
        assert operations(lambda: linear(torch.zeros(3, 10))) == 1200
        assert operations(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == 262_144


def test_attention_is_counted_though_its_kernels_are_not_in_the_table():
    q = torch.zeros(1, 4, 32, 16)
    attend = nn.functional.scaled_dot_product_attention
    assert operations(lambda: attend(q, q, q)) == 2 * 2 * 4 * 32 * 32 * 16 == 262_144
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    by_hand = 20 * (8 * 64 * 64 + 4 * 64 * 128) + 2 * 2 * 10 * 10 * 64 * 2  # projections, feed-forward; two products
    with torch.no_grad():
        assert operations(lambda: layer(torch.zeros(2, 10, 64))) == by_hand == 1_361_920
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_block_may_differentiate_with_respect_to_leaves():
    linear, x = nn.Linear(4, 4), torch.randn(5, 4).requires_grad_()
    forward = 2 * 5 * 4 * 4
    total = operations(lambda: torch.autograd.grad(linear(x).square().sum(), x))
    assert total == 2 * forward  # forward, and the product with the transpose on the way back


# ---- bills ---


class Multiplies(UniformLevels):
    """Draws by a matrix product of 3 x 3 for each pass; scores by one."""

    def sample(self, seeds, *, condition=None, passes: int = 4):
        x = super().sample(seeds)
        for _ in range(passes):
            self.network(None, x @ torch.eye(3))
        return x

    def likelihood(self, x, *, condition=None, seeds=None):
        self.network(None, x @ torch.eye(3))
        return Likelihood(torch.zeros(len(x)), "exact")


def interview(model, data=None, **sections):
    return Interview(model, FakeProtocol(data or Levels(), ["frechet"], **sections), {"sample": {}, "likelihood": {}})


def test_a_bill_is_complete(monkeypatch):
    asked = interview(Multiplies(), sample={"num_items": 40, "batch_size": 20}, likelihood={"draws": 3})
    for question in ("sample", "likelihood"):
        list(asked.ask(question))
        asked.price(question)
    drawn, scored = asked.bills["sample"], asked.bills["likelihood"]
    assert (drawn.items, drawn.nfe) == (40, 3 + 4) and (scored.items, scored.nfe) == (200, 3)
    assert drawn.flops_per_item == 4 * 2 * 9 and scored.flops_per_item == 3 * 2 * 9
    assert len(drawn.timings) == module.TIMED and drawn.items == 40  # timed again, not counted again
    assert drawn.peak_memory > 1e8  # torch alone is larger


def test_batches_that_are_timed_again_count_by_item(monkeypatch):
    """A clock that moves on by a second whenever it is read: every batch takes one."""
    ticks = itertools.count()
    monkeypatch.setattr(Interview, "_now", lambda self: float(next(ticks)))
    asked = interview(Multiplies(), sample={"num_items": 40, "batch_size": 20})
    list(asked.ask("sample"))
    asked.price("sample")
    assert asked.bills["sample"].timings == [1 / 20] * 5 and asked.bills["sample"].seconds == 2


def test_timing_again_has_an_end(monkeypatch):
    """Nothing is timed again that would take longer than patience lasts."""
    monkeypatch.setattr(module, "PATIENCE", 1e-7)
    asked = interview(Multiplies(), sample={"num_items": 40, "batch_size": 20})
    list(asked.ask("sample"))
    asked.price("sample")
    assert len(asked.bills["sample"].timings) == 2


def test_time_per_item_is_the_median_batch():
    bill = Bill()
    for seconds, nfe, n in ((50.0, 10.0, 10), (1.0, 12.0, 10), (2.4, 14.0, 20)):  # the first batch warms up
        bill.add(Samples(torch.arange(n), seconds=seconds, nfe=nfe))
    assert bill.seconds_per_item == pytest.approx(0.12) and bill.seconds == pytest.approx(53.4)
    assert bill.nfe == pytest.approx((100 + 120 + 280) / 40) and bill.items == 40


def test_peak_memory_sees_what_was_allocated_and_freed():
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    x = torch.ones(before // 4 + 50_000_000)  # more than earlier tests may have left to be used again
    del x
    assert peak_memory(device) - before > 150e6


# ---- answers that are not finite ---


class SometimesBroken(UniformLevels):
    """NaN for seeds that are multiples of 7, infinite likelihood for items 3 and 4."""

    def sample(self, seeds, *, condition=None):
        x = super().sample(seeds)
        return torch.where((seeds % 7 == 0)[:, None], torch.nan, x)

    def likelihood(self, x, *, condition=None, seeds=None):
        return Likelihood(torch.where((seeds == 3) | (seeds == 4), -torch.inf, 0.0), "exact")


def test_broken_answers_are_counted_and_named():
    asked = interview(SometimesBroken(), sample={"num_items": 100, "batch_size": 33})
    seeds = torch.cat([samples.seeds for samples, _ in asked.ask("sample")])
    assert len(seeds) == 85 and not (seeds % 7 == 0).any()  # left out
    assert vars(asked.failures["sample"]) == {"items": 15, "of": 100, "first": list(range(0, 99, 7)), "reason": ""}
    assert sum(len(samples.seeds) for samples, _ in asked.ask("likelihood")) == 200  # kept: they have an item each
    assert vars(asked.failures["likelihood"]) == {"items": 2, "of": 200, "first": [3, 4], "reason": ""}


def test_only_the_first_failures_are_named():
    failures = Failures()
    for k in range(3):
        failures.add(Samples(torch.arange(10) + 10 * k), torch.ones(10, dtype=torch.bool))
    assert (failures.items, failures.of, failures.first) == (30, 30, list(range(20)))


def test_points_that_are_not_finite_do_not_reach_an_extractor():
    data = Points()

    class Nan(UniformLevels):
        def sample(self, seeds, *, condition=None):
            x = torch.randn(len(seeds), 2, generator=torch.Generator().manual_seed(0))
            x[1, 0] = torch.inf
            return x

    asked = interview(Nan((2,)), data, sample={"num_items": 5, "batch_size": 5})
    seen = []
    asked.extractors["x"] = lambda x: (seen.append(x), x)[1]
    ((samples, _),) = asked.ask("sample")
    assert seen[0].isfinite().all() and torch.equal(samples.features["x"], samples.x) and len(samples.x) == 4
