"""Runs of flows with shared networks: stored and averaged once, resumed bit for bit, counted twice."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from genmodels.config import load
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import Protocol
from genmodels.flows.flow import NormalizingFlow
from genmodels.metrics.cost import inference_parameters, num_parameters
from genmodels.networks.shared import fold_embeddings
from genmodels.training.dry_run import dry_run
from genmodels.training.ema import ConstantDecay, WeightAverage
from genmodels.training.loop import train
from genmodels.training.run import Run
from genmodels.training.state import size

FILE = Path(__file__).resolve().parents[2] / "configs" / "toy2d" / "nanoflow_nsf.yaml"
SMALL = [
    "model.layers[0].count=3", "model.layers[0].layers[1].network.of.hidden=8", "train.steps=6", "train.batch_size=16",
    "train.save_every=2", "train.eval_every=2", "train.eval_items=32", "train.sample_every=0", "train.log_every=1",
    "train.ema=[{name: constant, value: 0.5}]",
]  # fmt: skip
TRUNK, STEPS = 8 * (1 + 1) + 2 * 2 * 8 * 9, 3


def config(*more):
    return load([FILE], [*SMALL, *more])


def test_a_run_stores_what_is_shared_once_and_goes_on_bit_for_bit(fakes, tmp_path, monkeypatch):
    straight = train(config(), root=tmp_path / "a", quiet=True)
    whole, calls = NormalizingFlow.loss, []

    def stop(self, batch, *, generator=None):
        calls.append(self.training)
        if sum(calls) == 5:
            raise InterruptedError
        return whole(self, batch, generator=generator)

    monkeypatch.setattr(NormalizingFlow, "loss", stop)
    with pytest.raises(InterruptedError):
        train(config(), root=tmp_path / "b", quiet=True)
    monkeypatch.undo()
    assert Run.open(tmp_path / "b" / "toy2d-nanoflow_nsf").step == 4
    resumed = train(config(), root=tmp_path / "b", quiet=True)
    assert (
        fakes.digests(resumed) == fakes.digests(straight) and len(fakes.digests(straight)) >= 4
    )  # weights, average, best, optimiser
    model = straight.load()
    for path in straight.checkpoints.glob("*/*.safetensors"):
        if path.stem == "optimizer":
            continue
        with safe_open(path, "pt") as file:
            stored = sum(
                file.get_tensor(key).numel() for key in file.keys() if file.get_tensor(key).is_floating_point()
            )
            aliases = json.loads(file.metadata()["aliases"])
        assert stored == num_parameters(model) + sum(b.numel() for b in model.buffers() if b.is_floating_point())
        assert len(aliases) == (STEPS - 1) * (10 + 2)  # ten tensors of the network, two of the map of embeddings
    steps = [layer.network for layer in model.layers.bijections[0].bijections[1::2]]
    assert all(step.estimator is steps[0].estimator for step in steps)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.log_prob(x), resumed.load().log_prob(x))


def test_averages_and_the_optimiser_meet_a_shared_weight_once():
    model = config().model(config().dataset().facts())
    average = WeightAverage(ConstantDecay(0.0), model)
    assert len(average.averaged) == len(list(model.parameters()))
    buffers = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    held = sum(average.tensors[name].numel() for name in buffers)
    assert sum(t.numel() for t in average.distinct()) == num_parameters(model) + held
    average.rule = ConstantDecay(0.75)
    before = {name: value.clone() for name, value in average.tensors.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    average.update(model, 10**6)
    for name in dict(model.named_parameters(remove_duplicate=False)):  # not 1 - 0.75³, as if met once for every step
        torch.testing.assert_close(average.tensors[name], before[name] + 0.25, rtol=0, atol=1e-6)
    optimizer = config().train.optimizer.over(model.parameters())
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == num_parameters(model)


def test_both_counts_are_told_where_they_differ(tmp_path):
    model = config().model(config().dataset().facts())
    trained, folded = num_parameters(model), inference_parameters(model)
    assert trained - folded == (16 + 1) * 16 + STEPS * (16 - 16)  # W and b of 2 · 8 biases; 16 numbers for e or biases
    assert f"model      {trained:,} parameters in training, {folded:,} at inference\n" in dry_run(config(), tmp_path)
    assert size(model)["inference_parameters"] == folded
    plain = ["model.layers[0].layers[1].network.inject=[]", "model.layers[0].layers[1].network.embedding=0"]
    other = config(*plain).model(config().dataset().facts())
    assert f"model      {num_parameters(other):,} parameters\n" in dry_run(config(*plain), tmp_path)
    assert "inference_parameters" not in size(other)


def test_a_result_records_both_and_folding_changes_no_likelihood(tmp_path):
    run = train(config(), root=tmp_path, quiet=True)
    protocol = Protocol.load("checkerboard").tree
    metrics = [m for m in protocol["metrics"] if m["name"] == "nll"]
    small = {"sample": {"num_items": 4}, "likelihood": {"num_items": 4}, "metrics": metrics}
    told = evaluate(run, Protocol({**protocol, **small}))["model"]
    model = run.load()
    assert told["parameters"] == num_parameters(model)
    assert told["x-inference_parameters"] == inference_parameters(model) < told["parameters"]
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    before = model.log_prob(x), model.sample(3)
    fold_embeddings(model)
    assert num_parameters(model) == told["x-inference_parameters"]
    assert torch.equal(model.log_prob(x), before[0]) and torch.equal(model.sample(3), before[1])
