"""What a dry run and a profile say of a step is what the step costs."""

import json
import re
from pathlib import Path

import pytest
import torch

from genmodels.config import load
from genmodels.registry import ConfigError
from genmodels.training import measure
from genmodels.training.dry_run import dry_run
from genmodels.training.measure import TimedStep, flops_of, memory_of, timed_step
from genmodels.training.profile import profile

ROOT = Path(__file__).resolve().parents[2]


def test_memory_is_counted_by_what_it_is_for(fakes):
    """8 parameters (2x2 product, bias, goal) and two buffers; Adam keeps two moments and a count of each tensor."""
    step = timed_step(fakes.config())
    step.run(0, 1)
    m = memory_of(step)
    assert (m.weights, m.gradients) == (8 * 4 + 2 * 4 + 8, 8 * 4)
    assert m.optimizer == 2 * 8 * 4 + 3 * 4
    assert m.averages == m.weights
    # x [8, 2] for the gradient of the product, and the difference [8, 2] for that of the square
    assert m.saved == 2 * 8 * 2 * 4
    assert m.peak == sum(m[:5])


def test_less_is_kept_under_checkpointing_and_accumulation(fakes):
    big = timed_step(fakes.config())
    small = timed_step(fakes.config(train={"accumulate": 4}))
    assert memory_of(small).saved == memory_of(big).saved / 4


def test_what_is_kept_is_that_of_the_whole_batch(fakes):
    """Few items tell it: the bytes kept of batches of 3 and of 8 items are as measured on them whole."""
    for size in (1, 3, 8):
        step = timed_step(fakes.config(train={"batch_size": size}))
        assert memory_of(step).saved == measure._saved(step, measure.first_batch(step)) == 2 * size * 2 * 4


def test_of_a_slow_step_a_part_is_timed(fakes, monkeypatch):
    step = timed_step(fakes.config(train={"batch_size": 48, "accumulate": 2}))
    monkeypatch.setattr(TimedStep, "run", lambda self, start, stop, items=48: 0.25 * items * (stop - start))
    assert measure.affordable(step, 100.0) == 48
    assert measure.affordable(step, 5.0) == 20
    assert measure.affordable(step, 4.9) == 18  # a multiple of the micro-batches
    assert measure.affordable(step, 0.1) == 4  # and never less than few


def test_weights_that_the_backward_pass_needs_are_not_counted_twice():
    """They are held anyway: of two points a wide network keeps far less than its weights are."""
    step = timed_step(
        load([ROOT / "configs/toy2d/flow_matching.yaml"], ["train.batch_size=2", "model.network.hidden=256"])
    )
    m = memory_of(step)
    assert 0 < m.saved < 0.1 * m.weights


def test_operations_of_an_item(fakes):
    """x W with W of 2x2: 2·2·2 operations; its gradient adds the product for W (and none for x, which has none)."""
    assert flops_of(timed_step(fakes.config())) == (8, 16)


def test_measuring_leaves_the_step_as_training_has_it(fakes, tmp_path):
    """The weights after two measured steps are those of training, bit for bit."""
    from genmodels.training.loop import train

    run = train(fakes.config(**fakes.RICH).replace({"train": {"steps": 10, "save_every": 2, "keep": 9}}), root=tmp_path)
    step = timed_step(run.config)
    step.run(0, 2)
    from genmodels.training.checkpoint import read_tensors

    then = read_tensors(run.checkpoints / "00000002" / "model.safetensors")[0]
    assert all(torch.equal(step.model.state_dict()[name], value) for name, value in then.items())


def test_parts_add_up_on_a_fake_clock(fakes, monkeypatch):
    """Every look at the clock takes one second: each part is looked at twice, a step of two micro-batches has six."""
    now = iter(range(10**6))
    monkeypatch.setattr(TimedStep, "_now", lambda self: float(next(now)))
    step = timed_step(fakes.config(train={"accumulate": 2}))
    total = step.run(0, 3)
    assert step.seconds == {"data": 3.0, "forward": 6.0, "backward": 6.0, "update": 3.0}
    assert total == 3 * 6 * 2 + 1


def test_a_dry_run_tells_the_hours(fakes, tmp_path, monkeypatch):
    monkeypatch.setattr(TimedStep, "run", lambda self, start, stop, items=8: 0.5 * (stop - start) * items / 8)
    text = dry_run(fakes.config(train={"steps": 14400}), tmp_path)
    assert "speed      2 steps/s = 16 items/s on cpu" in text and "14,400 steps in about 2h00m (2.00 hours)" in text
    assert "operations 8FLOP an item for the loss, 16FLOP with its gradient" in text
    assert f"{16 * 8 * 2}FLOP/s here, 1.84MFLOP in all" in text
    assert re.search(r"memory     \d+B in tensors\n +weights 48B, gradients 32B, optimiser ", text)
    assert list(tmp_path.iterdir()) == []


def test_a_profile_says_where_the_time_goes(fakes, tmp_path):
    text = profile(fakes.config(), tmp_path)
    folder = tmp_path / ".profile" / "r"
    assert sorted(p.name for p in folder.iterdir()) == ["profile.txt", "trace.json"]
    assert (folder / "profile.txt").read_text().strip() == text[: text.index("\n\ntrace")].strip()
    shares = [
        float(found) for found in re.findall(r"^  (?:data|forward|backward|update|rest) .*? (-?[\d.]+)%", text, re.M)
    ]
    total, each = (float(found) for found in re.search(r"([\d.]+) steps/s, ([\d.]+) ms a step", text).groups())
    assert total * each == pytest.approx(1000, rel=0.05)
    assert len(shares) == 5 and sum(shares) == pytest.approx(100, abs=0.5) and min(shares) >= 0
    names = {event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]}
    assert {"data", "forward", "backward", "update", "aten::mm"} <= names
    assert re.search(r"^  aten::\S+ +[\d.]+ ms +[\d.]+% +\d+ calls$", text, re.M)


def test_a_profile_is_of_the_timed_steps_alone(fakes, tmp_path, monkeypatch):
    """On a clock of one second a look, 20 steps of 8 looks: a part is 20 of 161 seconds, whatever warmed up before."""
    now = iter(range(10**6))
    monkeypatch.setattr(TimedStep, "_now", lambda self: float(next(now)))
    text = profile(fakes.config(), tmp_path)
    shares = dict(re.findall(r"^  (data|forward|backward|update|rest) .*? (-?[\d.]+)%", text, re.M))
    assert shares == {**dict.fromkeys(("data", "forward", "backward", "update"), "12.4"), "rest": "50.3"}


def test_what_cannot_be_trained_is_refused_here_too(fakes, tmp_path):
    with pytest.raises(ConfigError, match="a batch of 49 items"):
        profile(fakes.config(train={"batch_size": 49}), tmp_path)
    with pytest.raises(ConfigError, match=r"train\.compile"):
        dry_run(fakes.config(model={"name": "t_twice"}, train={"compile": True}), tmp_path)
    assert list(tmp_path.iterdir()) == [] and measure.PARTS == ("data", "forward", "backward", "update")
