"""What makes training faster or smaller changes nothing else: kernels, compilation, recomputation, precision."""

import copy

import pytest
import torch
from torch import nn

from genmodels.config import load
from genmodels.data.stream import stream
from genmodels.registry import ConfigError, build
from genmodels.training import checkpoint, optim, processes
from genmodels.training.loop import train
from genmodels.training.measure import memory_of, timed_step
from genmodels.training.run import Run
from genmodels.training.step import Step


def small(name: str, **more) -> object:
    """Flow matching with a transformer on digits: a network of blocks, with dropout."""
    words = ["train.steps=4", "train.batch_size=16", "train.sample_every=0", "train.eval_every=2", "train.save_every=2"]
    words += ["model.network.width=16", "model.network.depth=2", "model.network.heads=2", "model.network.dropout=0.2"]
    words += [f"train.{key}={value}" for key, value in more.items()]
    return load(["configs/digits/flow_matching.yaml"], [f"name={name}", *words])


def test_kernels_are_fused_where_there_are_any_and_grouped_elsewhere():
    here, elsewhere = (nn.Parameter(torch.zeros(2, device=device)) for device in ("cpu", "meta"))
    assert optim.kernel([here, here]) == {"fused": True}
    assert optim.kernel([elsewhere]) == optim.kernel([here, elsewhere]) == {"foreach": True}
    assert optim.kernel([here, nn.Parameter(torch.zeros(2, dtype=torch.complex64))]) == {"foreach": True}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_fused_optimiser_trains_alike_and_continues_bit_for_bit(fakes, tmp_path, monkeypatch, optimizer):
    """The same update as by one kernel an operation, up to rounding, and its own state comes back whole."""
    config = fakes.config(**fakes.RICH).replace({"train": {"optimizer": {"name": optimizer, "lr": 0.01}}})
    with monkeypatch.context() as patched:
        patched.setattr(optim, "kernel", lambda parameters: {"foreach": True})
        grouped = train(config, root=tmp_path / "grouped", quiet=True)
    straight = train(config, root=tmp_path / "a", quiet=True)
    for name, value in grouped.load("model").state_dict().items():
        torch.testing.assert_close(straight.load("model").state_dict()[name], value, rtol=1e-5, atol=1e-6)
    fakes.stop_at(6)
    with pytest.raises(fakes.Stop):
        train(config, root=tmp_path / "b", quiet=True)
    fakes.Regression.fault = None
    assert fakes.digests(train(config, root=tmp_path / "b", quiet=True)) == fakes.digests(straight)


def test_the_count_of_a_fused_adam_lives_with_its_parameter():
    """On the meta device, which stands for any that is not the CPU."""
    model = nn.Linear(2, 2, device="meta")
    tensors = {f"{key}.{name}": torch.ones(()) for name, _ in model.named_parameters() for key in ("step", "exp_avg")}
    for fused, home in ((True, "meta"), (False, "cpu")):
        optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
        optimizer.param_groups[0]["fused"] = fused
        checkpoint.load_optimizer(model, optimizer, tensors)
        for parameter in model.parameters():
            assert optimizer.state[parameter]["step"].device.type == home
            assert optimizer.state[parameter]["exp_avg"].device.type == "meta"


def test_a_step_trains_every_part_and_tells_caches_of_new_weights():
    """Fused kernels do not count the versions of weights, by which networks know that what they kept is stale."""
    config = small("parts")
    model = config.model(config.dataset().facts())
    model.network.eval()
    step = Step(config, model, processes.join("cpu"))
    step.start({})
    assert step.optimizer.defaults["fused"] and all(part.training for part in model.modules())
    before = [p._version for p in step.parameters]
    step(*next(stream(config.dataset(), 0, 16, 0, 4)))
    assert all(p._version > old for p, old in zip(step.parameters, before, strict=True))


@pytest.mark.parametrize("name", ["adam", "adamax", "sgd"])
def test_moments_come_back_in_the_memory_order_of_their_parameters(name):
    """Fused kernels go through memory: after a restart a transposed weight takes the step that it would have taken."""
    model, w = nn.Module(), torch.arange(12.0).reshape(3, 4)
    model.w = nn.Parameter(w.clone().t())
    model.kernel = nn.Parameter(w.reshape(1, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = build(optim.Optimizer, {"name": name, "lr": 0.1}).over(model.parameters())

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        sum(p.sin().sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer)
    again = copy.deepcopy(model)  # keeps the order
    fresh = build(optim.Optimizer, {"name": name, "lr": 0.1}).over(again.parameters())
    saved = checkpoint.optimizer_tensors(model, optimizer)
    checkpoint.load_optimizer(again, fresh, {key: value.contiguous() for key, value in saved.items()})
    step(model, optimizer)
    step(again, fresh)
    assert not again.w.is_contiguous() and torch.equal(again.w, model.w) and torch.equal(again.kernel, model.kernel)


def test_recomputation_changes_no_bit_and_may_be_switched_on_resume(fakes, tmp_path, monkeypatch):
    monkeypatch.chdir(fakes.ROOT)
    plain, again = (timed_step(small("c", gradient_checkpointing=on)) for on in ("false", "true"))
    assert memory_of(again).saved < 0.4 * memory_of(plain).saved  # blocks keep what enters them alone
    straight = train(small("a"), root=tmp_path, quiet=True)
    with_it = train(small("b", gradient_checkpointing="true"), root=tmp_path, quiet=True)
    assert fakes.digests(with_it) == fakes.digests(straight)
    assert with_it.config.hash == straight.config.hash  # a way to compute, not another run


def test_a_loss_that_differentiates_twice_is_not_compiled(fakes, tmp_path):
    config = fakes.config(model="t_twice", train={"compile": True})
    with pytest.raises(ConfigError, match=r"train\.compile: the loss of Twice .* Set train\.compile=false"):
        train(config, root=tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_compiled_run_is_the_same_up_to_rounding(fakes, tmp_path, monkeypatch):
    """Losses, validation and weights; interrupted and resumed as well."""
    monkeypatch.chdir(fakes.ROOT)
    eager = train(small("a", log_every=1), root=tmp_path, quiet=True)
    compiled = train(small("b", log_every=1, compile="true"), root=tmp_path, quiet=True)
    assert Run.open(compiled.path).load().state_dict().keys() == eager.load().state_dict().keys()
    for one, two in zip(fakes.said(eager), fakes.said(compiled), strict=True):
        for key in one.keys() & {"train/loss", "val/loss"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4)
    # Adam divides by the root of a mean square: rounding in a gradient near 0 can move a weight by a whole rate
    rate = eager.config.train.optimizer.lr
    for name, value in eager.load("model").state_dict().items():
        assert (compiled.load("model").state_dict()[name] - value).abs().max() < 4 * rate, name
    assert compiled.config.hash == eager.config.hash
