"""Training means what it says: steps, averages, numbers that are not finite, models of every kind, what is recorded."""

import json
import math
import shutil
import time

import numpy as np
import pytest
import torch

from genmodels.data.stream import indices
from genmodels.registry import ConfigError
from genmodels.rng import fold, generator
from genmodels.training import checkpoint
from genmodels.training.dry_run import dry_run
from genmodels.training.guard import TrainingFailed
from genmodels.training.loop import train
from genmodels.training.run import Run, RunConflict

# ---- configuration ---


def test_another_configuration_touches_nothing(fakes, tmp_path):
    train(fakes.config(), root=tmp_path, quiet=True)
    before = fakes.contents(tmp_path)
    with pytest.raises(RunConflict, match=r"(?s)train\.clip: 1\.0 -> 2\.0.*name=r-2.*--fresh"):
        train(fakes.config(train={"steps": 12, "clip": 2}), root=tmp_path, quiet=True)
    assert fakes.contents(tmp_path) == before
    fresh = train(fakes.config(train={"steps": 12, "clip": 2}), root=tmp_path, quiet=True, fresh=True)
    assert fresh.step == 12 and Run.open(tmp_path / "r.old-1").step == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 49}, "a batch of 49 items was asked of a training split of 48"),
        ({"batch_size": 8, "accumulate": 3}, "8 items cannot be divided equally"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_anything_is_made(fakes, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(fakes.config(train=changes), root=tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing_and_says_what_would_happen(fakes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = dry_run(fakes.config(), tmp_path)
    assert "8 parameters" in text and "48 / 16 / 16 items" in text and "new; nothing is written" in text
    assert list(tmp_path.iterdir()) == []
    train(fakes.config(), root=tmp_path, quiet=True)
    before, state = fakes.contents(tmp_path), torch.random.get_rng_state()
    assert "would continue at step 10" in dry_run(fakes.config(), tmp_path)
    assert "would refuse" in dry_run(fakes.config(seed=3), tmp_path)
    assert fakes.contents(tmp_path) == before and torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ConfigError, match="cannot be divided"):
        dry_run(fakes.config(train={"accumulate": 3}), tmp_path)
    fitted = fakes.config(model={"name": "t_fitted"}, train={"steps": 0, "batch_size": 1000})
    assert "0 parameters" in dry_run(fitted, tmp_path / "other")


# ---- what a step does ---


def test_steps_data_and_noise_are_what_the_seed_says(fakes, tmp_path):
    """One step against the formula written out: stream, noise, loss, gradient, SGD."""
    config = fakes.config(
        seed=5,
        model={"noise": 0.3},
        train={"steps": 1, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.0}, "clip": None},
    )
    data = config.dataset()
    with torch.random.fork_rng():
        torch.manual_seed(fold(5, "init"))
        model = config.model(data.facts())
    x = data.take("train", indices(5, 0, 8, 48)).x
    x = x + 0.3 * torch.randn(x.shape, generator=generator(5, "loss", 0, 0, 0))
    model.network.weight.grad = None
    loss = (x @ model.network.weight + model.network.bias - model.goal - 3).square().sum(1).mean()
    loss.backward()
    trained = train(config, root=tmp_path, quiet=True).load("model")
    before, after = dict(model.named_parameters()), dict(trained.named_parameters())
    for name, p in before.items():
        torch.testing.assert_close(after[name], p - 0.1 * p.grad, rtol=1e-6, atol=1e-6)


def test_accumulation_is_one_big_batch(fakes, tmp_path):
    runs = {}
    for parts in (1, 2, 4):
        config = fakes.config(name=f"a{parts}", train={"accumulate": parts, "optimizer": {"name": "sgd", "lr": 0.01}})
        runs[parts] = train(config, root=tmp_path, quiet=True)
    for parts in (2, 4):
        expected, found = runs[1].load("model"), runs[parts].load("model")
        for name, p in expected.named_parameters():
            torch.testing.assert_close(dict(found.named_parameters())[name], p, rtol=1e-5, atol=1e-6)
        for one, other in zip(fakes.said(runs[1]), fakes.said(runs[parts]), strict=True):
            assert one.keys() == other.keys()  # losses and logs are means over all micro-batches
            assert all(other[k] == pytest.approx(one[k], rel=1e-4, abs=1e-6) for k in one)


def test_gradients_are_clipped(fakes, tmp_path):
    moved = {}
    for clip in (None, 0.01):
        sgd = {"name": "sgd", "lr": 1.0, "momentum": 0.0}
        config = fakes.config(name=f"c{clip}", train={"steps": 1, "clip": clip, "optimizer": sgd})
        run = train(config, root=tmp_path, quiet=True)
        now = run.load("model")
        old = checkpoint.read_tensors(run.checkpoints / "00000000" / "model.safetensors")[0]
        moved[clip] = torch.cat([(p - old[n]).flatten() for n, p in now.named_parameters()]).double().norm().item()
    norm = next(line["train/grad_norm"] for line in run.metrics() if "train/grad_norm" in line)
    assert moved[0.01] == pytest.approx(0.01, rel=1e-3) and moved[None] == pytest.approx(norm, rel=1e-4)
    assert norm > 1


def test_bf16_reaches_the_network_and_nothing_else(fakes, tmp_path):
    run = train(fakes.config(train={"precision": "bf16"}), root=tmp_path, quiet=True)
    assert set(fakes.Recorder.seen) == {torch.bfloat16} and set(fakes.Regression.losses) == {torch.float32}
    sets, _ = run.restore()
    floats = {v.dtype for tensors in sets.values() for v in tensors.values() if v.is_floating_point()}
    assert floats == {torch.float32}
    fakes.Recorder.seen.clear()
    run.load().network(None, torch.zeros(1, 2))
    assert set(fakes.Recorder.seen) == {torch.bfloat16}  # sampling and evaluation alike
    fakes.Recorder.seen.clear()
    train(fakes.config(name="wide"), root=tmp_path, quiet=True)
    assert set(fakes.Recorder.seen) == {torch.float32}


def test_the_learning_rate_follows_its_rule(fakes, tmp_path, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def spy(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    sgd, rule = {"name": "sgd", "lr": 0.2}, {"name": "cosine", "warmup": 2}
    train(fakes.config(train={"optimizer": sgd, "learning_rate": rule}), root=tmp_path, quiet=True)
    cosine = [0.2 * 0.5 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]
    assert rates == pytest.approx([cosine[0] / 2, *cosine[1:]])


def test_the_average_of_the_run_is_the_recursion_over_its_weights(fakes, tmp_path):
    config = fakes.config(train={"save_every": 1, "keep": 20})
    run = train(config, root=tmp_path, quiet=True)
    raw = [checkpoint.read_tensors(run.checkpoints / f"{k:08d}" / "model.safetensors")[0] for k in range(11)]
    average = {name: value.double() for name, value in raw[0].items()}
    for k in range(1, 11):
        beta = min(0.9, k / (k + 9))
        average = {name: beta * value + (1 - beta) * raw[k][name] for name, value in average.items()}
    found, own = run.load("ema-0.9"), run.load("model")
    for name in ("goal", "network.weight", "network.bias"):
        torch.testing.assert_close(found.get_parameter(name), average[name].float(), rtol=1e-5, atol=1e-6)
        assert not torch.equal(found.get_parameter(name), own.get_parameter(name))
    assert torch.equal(found.mean, own.mean) and found.count.item() == 10  # buffers are copied


# ---- numbers that are not finite ---


def test_nan_reaches_neither_weights_nor_buffers_nor_averages(fakes, tmp_path, capsys):
    """A run that skips a NaN batch equals a run in which that step was simply left out."""
    rows = indices(0, 5, 8, 48)
    config = fakes.config(data={"name": "t_line", "nan_at": int(rows[3])}, train={"steps": 6, "log_every": 6})
    run = train(config, root=tmp_path)
    text = capsys.readouterr().err
    assert "step 6/6  the loss (nan) and the gradient of goal are not finite; the step is skipped" in text
    sets, _ = run.restore()
    assert all(v.isfinite().all() for tensors in sets.values() for v in tensors.values())
    assert sets["model"]["count"].item() == 5
    line = next(line for line in run.metrics() if "train/loss" in line)
    assert math.isfinite(line["train/loss"]) and line["train/skipped"] == 1 and "skipped 1" in text
    clean = train(fakes.config(name="clean", train={"steps": 5}), root=tmp_path, quiet=True)
    expected, _ = clean.restore()
    for name in sets:
        assert all(torch.equal(v, expected[name][k]) for k, v in sets[name].items())


def test_gives_up_after_20_bad_steps_and_names_the_last_good_checkpoint(fakes, tmp_path):
    seen = iter(range(1, 100))

    def poison(batch):
        if next(seen) > 9:
            batch.x.fill_(torch.inf)

    fakes.Regression.fault = poison
    config = fakes.config(data={"name": "t_line", "items": 800}, train={"steps": 60, "batch_size": 4})
    with pytest.raises(TrainingFailed) as caught:
        train(config, root=tmp_path, quiet=True)
    text = str(caught.value)
    assert "20 steps in a row were not finite, last at step 29" in text and "the loss (" in text
    assert "Step 28 is saved in" in text and str(tmp_path / "r" / "checkpoints" / "00000028") in text
    run = Run.open(tmp_path / "r")
    assert run.step == 28 and all(v.isfinite().all() for v in run.load("model").state_dict().values())
    assert text in (run.path / "log.txt").read_text()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train/loss"] is None


def test_weights_that_overflow_are_not_saved(fakes, tmp_path):
    sgd = {"name": "sgd", "lr": 1e38, "momentum": 0.0}
    config = fakes.config(train={"optimizer": sgd, "clip": None, "steps": 4, "save_every": 1})
    with pytest.raises(TrainingFailed, match="is not finite"):
        train(config, root=tmp_path, quiet=True)
    run = Run.open(tmp_path / "r")
    assert all(v.isfinite().all() for v in run.load("model").state_dict().values())


# ---- models of every kind ---


def test_a_model_fitted_in_prepare_is_a_run_like_any_other(fakes, tmp_path):
    changes = {"steps": 0, "eval_every": 1, "sample_every": 1, "batch_size": 7}
    config = fakes.config(model={"name": "t_fitted"}, train=changes)
    run = train(config, root=tmp_path, quiet=True)
    data = config.dataset()
    assert fakes.Fitted.fits == 1 and run.step == 0 == run.samples_seen
    torch.testing.assert_close(run.load().mean, data.all("train").x.mean(0))
    lines = run.metrics()
    assert lines[0]["prepare/norm"] == pytest.approx(data.all("train").x.mean(0).norm().item())
    expected = (data.all("val").x - run.load().mean).square().sum(1).mean().item()
    assert lines[1]["val/loss"] == pytest.approx(expected, rel=1e-6) and len(lines) == 2
    assert (run.path / "samples" / "00000000.png").exists()
    train(config, root=tmp_path, quiet=True)
    assert fakes.Fitted.fits == 1 and run.metrics() == lines  # once is enough


def test_the_time_of_prepare_is_told_and_numbers_that_it_fits(fakes, tmp_path, monkeypatch, capsys):
    fit = fakes.Fitted.prepare
    monkeypatch.setattr(fakes.Fitted, "prepare", lambda *a, **o: [time.sleep(1.0), fit(*a, **o)][1])
    monkeypatch.setattr(fakes.Fitted, "fitted_numbers", lambda model: len(model.mean), raising=False)
    run = train(fakes.config(model={"name": "t_fitted"}, train={"steps": 0}), root=tmp_path)
    told = capsys.readouterr().err
    assert f"t_fitted with {len(run.load('model').mean)} parameters" in told and "at step 0 after 1s" in told
    assert 1 <= run.metrics()[0]["seconds"] <= run.meta["seconds"] + 0.05 < 2
    assert run.meta["parameters"] == len(run.load("model").mean) and run.meta["trainable"] == 0


def test_prepare_runs_once_and_is_checkpoint_0(fakes, tmp_path):
    config = fakes.config(model={"name": "t_fitted"}, train={"steps": 3, "keep": 10})
    run = train(config, root=tmp_path, quiet=True)
    zero = checkpoint.read_tensors(run.checkpoints / "00000000" / "model.safetensors")[0]
    assert fakes.Fitted.fits == 1 and torch.equal(zero["mean"], run.load("model").mean)
    assert set(fakes.digests(run)) == {"model.safetensors", "ema-0.9.safetensors"}  # no parameters: no optimiser
    assert [line["step"] for line in run.metrics()] == [0, 2, 3, 3]


def test_a_loss_that_differentiates_the_network_is_validated(fakes, tmp_path):
    run = train(fakes.config(model={"name": "t_twice"}), root=tmp_path, quiet=True)
    x, w = config_val(fakes), run.load().weight.detach()
    expected = (2 * w * x - 1).square().sum(1).mean().item()
    assert run.metrics()[-1]["val/loss"] == pytest.approx(expected, rel=1e-5)


def config_val(fakes):
    return fakes.config().dataset().all("val").x


def test_a_model_that_cannot_sample_goes_on(fakes, tmp_path, capsys):
    run = train(fakes.config(model={"name": "t_refuses"}, train={"sample_every": 5}), root=tmp_path)
    assert run.step == 10 and "no samples: its decoder is missing" in capsys.readouterr().err
    train(fakes.config(name="t", model={"name": "t_twice"}, train={"sample_every": 5}), root=tmp_path, quiet=True)
    assert not (tmp_path / "t" / "samples").exists()


def test_without_validation_items(fakes, tmp_path, capsys):
    run = train(fakes.config(data={"name": "t_line", "val": 0}), root=tmp_path)
    assert "no validation: this data set has no validation items" in capsys.readouterr().err
    assert run.step == 10 and not any("val/loss" in line for line in run.metrics())


def test_validation_uses_the_average_and_fixed_noise(fakes, tmp_path):
    config = fakes.config(model={"noise": 0.3}, train={"eval_items": 11, "batch_size": 4, "eval_every": 10})
    run = train(config, root=tmp_path, quiet=True)
    model, total = run.load("ema-0.9"), 0.0
    for k, rows in enumerate(torch.arange(11).split(4)):
        batch = config.dataset().take("val", rows)
        total += model.loss(batch, generator=generator(0, "validate", k)).value.double().sum().item()
    line = run.metrics()[-1]
    assert line["val/loss"] == pytest.approx(total / 11, rel=1e-6) and "val/first" in line


# ---- what is recorded ---


def test_metrics_and_meta_say_what_happened(fakes, tmp_path, capsys):
    run = train(fakes.config(train={"sample_every": 10}), root=tmp_path)
    text = capsys.readouterr().err
    lines = [line for line in run.metrics() if "train/loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10] and [line["samples"] for line in lines][-1] == 80
    assert {"seconds", "items_per_second", "train/loss_stderr", "train/first", "train/grad_norm"} <= lines[0].keys()
    assert [line["step"] for line in run.metrics() if "val/loss" in line] == [5, 10]
    meta = run.meta
    assert meta["config_hash"] == run.config.hash and meta["world_size"] == 1 and meta["parameters"] == 8
    assert {"commit", "versions", "hardware", "argv", "started", "finished", "seconds", "steps"} <= meta.keys()
    assert text.count("\n") == 1 + 5 + 2 + 1 + 1 and (run.path / "log.txt").read_text() == text
    assert "new run, t_regression with 8 parameters on t_line (48 items)" in text and "eta 0s" in text


def test_the_mean_loss_of_an_interval(fakes, tmp_path):
    """Weights that do not move: the logged loss is the mean over the items of the interval, ± over its steps."""
    config = fakes.config(train={"steps": 6, "log_every": 3, "optimizer": {"name": "sgd", "lr": 1e-30}})
    run = train(config, root=tmp_path, quiet=True)
    model, data = run.load("model"), config.dataset()
    steps = [model.loss(data.take("train", indices(0, k, 8, 48))).value.mean().item() for k in range(6)]
    for line, part in zip([x for x in run.metrics() if "train/loss" in x], (steps[:3], steps[3:]), strict=True):
        assert line["train/loss"] == pytest.approx(np.mean(part), rel=1e-5)
        assert line["train/loss_stderr"] == pytest.approx(np.std(part, ddof=1) / math.sqrt(3), rel=1e-3)


def test_interrupting_says_what_is_saved(fakes, tmp_path, capsys):
    fakes.stop_at(7, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train(fakes.config(), root=tmp_path)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("interrupted. Step 4 is saved in") and "The same command goes on from there." in last
    fakes.Regression.fault = None
    assert train(fakes.config(), root=tmp_path, quiet=True).step == 10


def test_a_moved_run_loads_without_its_data(fakes, tmp_path, monkeypatch):
    run = train(fakes.config(), root=tmp_path / "a", quiet=True)
    expected = run.load().state_dict()
    shutil.move(run.path, tmp_path / "elsewhere")
    monkeypatch.setattr(type(run.config), "dataset", lambda self: pytest.fail("the data set was asked for"))
    found = Run.open(tmp_path / "elsewhere").load().state_dict()
    assert all(torch.equal(v, found[k]) for k, v in expected.items())
