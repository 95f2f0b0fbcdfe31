"""The benchmark of image networks compares like with like: the same images, evaluations, loss and operations."""

import argparse
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evals.benchmarks import unet_throughput as benchmark
from genmodels.rng import SeedNoise

SIDE, CHANNELS, COUNT, STEPS = 8, 8, 3, 4


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (4, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("name", ["unet", "dit", pytest.param("diffusers_unet", marks=pytest.mark.slow)])
def test_both_sides_train_and_sample_alike(name, images):
    own, other = benchmark.contenders(name, images, CHANNELS, False, False, False)
    assert all(torch.equal(a, b) for a, b in zip(own.network.parameters(), other.parameters, strict=True))
    if name != "diffusers_unet":  # ours begin with ε̂ = 0: both losses are means of 768 squares, of deviation 0.05
        for side in (own, other):
            assert float(side.train()) == pytest.approx(1.0, abs=0.25)
    before = [p.detach().clone() for p in own.network.parameters()]
    own.train(), other.train()
    for net in (own.network, other.net):
        assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    generator = torch.Generator().manual_seed(1)
    for parameter in own.network.parameters():  # answers that are not small, the same on both sides
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    other.net.load_state_dict(own.network.state_dict())
    calls = {"ours": 0, "diffusers": 0}
    for who, net in (("ours", own.network), ("diffusers", getattr(other.net, "model", other.net))):
        net.register_forward_hook(lambda *_, who=who: calls.__setitem__(who, calls[who] + 1))
    sigma = own.model.schedule(torch.ones((), dtype=torch.float64)).sigma.float()
    z = sigma * SeedNoise(COUNT).normal(3, SIDE, SIDE)
    drawn, theirs = own.sample(COUNT, STEPS), 127.5 * (other.sample(COUNT, STEPS, z) + 1)
    assert calls == {"ours": STEPS, "diffusers": STEPS} and drawn.std() > 50
    # float32, and the square roots of their chain; an index off by one moves levels by more than one
    torch.testing.assert_close(drawn, theirs, rtol=1e-3, atol=1e-3 * float(drawn.abs().max()))


def test_rates_and_shares_follow_from_seconds_and_operations(images, monkeypatch):
    def seconds(calls, repeats, device, warm_up=3):
        return {"ours": 0.5, "diffusers": 2.0}

    monkeypatch.setattr(benchmark, "medians", seconds)
    given = {"device": "cpu", "batch": 4, "side": SIDE, "channels": CHANNELS, "networks": ["unet"], "repeats": 5}
    rates, facts = benchmark.measure(argparse.Namespace(**given, steps=2, compile=False, channels_last=True))
    for task in ("training", "sampling"):
        assert rates[task]["unet"] == {"ours": 8.0, "diffusers": 2.0}
    net = benchmark.Ours(benchmark.settings("unet", CHANNELS, SIDE, False), images).network
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:  # other kernels are not counted
        net(torch.rand(4), images)
    # backward is twice forward, but for the gradient of the first layer's input
    assert 2.8 * counted.get_total_flops() < facts["unet"]["operations"] <= 3 * counted.get_total_flops()
    assert facts["unet"]["parameters"] == sum(p.numel() for p in net.parameters())


def test_contenders_take_turns_and_the_median_counts(monkeypatch):
    said = []
    lengths = {"a": iter([9, 9, 9, 1, 2, 60]), "b": iter([9, 9, 9, 4, 5, 6])}
    now = {"t": 0.0}
    monkeypatch.setattr(time, "process_time", lambda: now["t"])

    def call(name):
        said.append(name)
        now["t"] += next(lengths[name])

    calls = {name: lambda name=name: call(name) for name in lengths}
    assert benchmark.medians(calls, 3, torch.device("cpu")) == {"a": 2, "b": 5}
    assert said == ["a", "b"] * 6


def test_peaks_are_those_of_known_devices():
    assert benchmark.peak("NVIDIA H200 NVL") is None  # slower than the card whose name it shares
    found = {name: benchmark.peak(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA RTX A6000")}
    assert found == {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA RTX A6000": None}


def test_the_unet_is_that_of_the_recipe():
    """At its full size the benchmark's network is the one that the configurations state: 35,746,307 parameters."""
    node = benchmark.settings("unet", 128, 32, False).tree["model"]["network"]
    recipe = benchmark.load([benchmark.RECIPE], blank=True).tree["model"]["network"]
    assert node == {**recipe, "dropout": 0.0}
