"""What a run says: numbers, throughput under a fake clock, one plain line per interval."""

import math

import pytest
import torch
from torch import nn

from genmodels.training import console as console_module
from genmodels.training.console import Console, count, duration, memory
from genmodels.training.guard import PATIENCE, FiniteGuard, TrainingFailed, check_weights
from genmodels.training.watch import Interval, mean_logs


class Clock:
    now = 1000.0  # an absolute value that must not matter

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7860, "2h11m"), (3599.7, "1h00m"), (math.inf, "?")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (812, "812"),
        (999.4, "999"),
        (999.7, "1k"),
        (3210, "3.21k"),
        (999_900, "1M"),
        (41e6, "41M"),
        (2e9, "2G"),
    ],
)
def test_counts(number, text):
    assert count(number) == text


def test_memory_is_plausible():
    assert 0.01 < float(memory().removesuffix("G")) < 1000


def test_throughput_counts_steps_and_nothing_else():
    clock = Clock()
    interval = Interval(clock)
    for _ in range(4):
        clock.now += 0.5  # the step
        interval.add(torch.tensor(1.0), {}, 64)
        clock.now += 30.0  # validation, a picture, a checkpoint
        interval.resume()
    assert interval.rate == 64 / 0.5
    assert math.isnan(Interval(clock).rate)


def test_logs_are_averaged_over_micro_batches():
    many = [{"a": torch.tensor(1.0), "b": torch.tensor(5)}, {"a": torch.tensor(2.0)}]
    means = mean_logs(many)
    assert {k: v.item() for k, v in means.items()} == {"a": 1.5, "b": 5.0}
    assert all(v.dtype == torch.float64 and v.shape == () for v in means.values()) and mean_logs([]) == {}


def test_the_plain_line(tmp_path, capsys):
    clock = Clock()
    console = Console(tmp_path / "log.txt", clock=clock)
    console.begin(400_000, 10_000, 2)
    clock.now += 100.0  # 2,000 steps in 100 s; 388,000 are left
    console.report(12_000, 0.14231, 0.0021, 3210.0, {"nfe": 24.0})
    text = capsys.readouterr().err
    expected = "step 12,000/400,000  loss 0.1423±0.0021  3.21k items/s  nfe 24  eta 5h23m  mem "
    assert text.startswith(expected) and text.endswith("2 processes\n") and text.count("\n") == 1
    assert (tmp_path / "log.txt").read_text("utf-8") == text


def test_quiet_speaks_to_the_log_alone(tmp_path, capsys):
    console = Console(tmp_path / "log.txt", quiet=True)
    console.say("[bold]α")
    Console(None, quiet=True).say("nothing")
    assert capsys.readouterr().err == "" and (tmp_path / "log.txt").read_text("utf-8") == "[bold]α\n"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_live_line_fits_and_keeps_what_matters(monkeypatch, capsys, width):
    from rich.console import Console as Terminal

    clock = Clock()
    monkeypatch.setattr(console_module.sys.stderr, "isatty", lambda: True, raising=False)
    console = Console(None, clock=clock)
    console.begin(100, 0, 1)
    try:
        clock.now += 30
        console.report(25, 1.5, 0.01, 100.0, {f"log{k}": 1.0 for k in range(9)})
        clock.now += 10
        console.advance(50)
        shown = Terminal(width=width).render_lines(console._line(), pad=False)  # as the live display does
    finally:
        console.close()
        console.close()
    lines = ["".join(segment.text for segment in line) for line in shown]
    assert len(lines) == 1 and len(lines[0]) <= width
    assert lines[0].startswith("step 50/100 ━━━━━━────── eta 40s")
    assert width < 80 or "loss 1.5000±0.0100" in lines[0]


# ---- the guard ---


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0))


def test_guard_names_the_first_bad_tensor_and_brings_buffers_back():
    model = Normed()
    guard = FiniteGuard(model)
    model.mean.fill_(1.0)
    guard.passed()
    model.mean.fill_(torch.nan)
    model.count += 1
    model.first.grad, model.second.grad = torch.zeros(2), torch.tensor([0.0, torch.inf])
    assert guard.failed(torch.tensor(1.0)) == "the gradient of second is not finite"
    assert model.mean.tolist() == [1.0, 1.0] and model.count.item() == 0
    assert guard.failed(torch.tensor(torch.nan)) == "the loss (nan) and the gradient of second are not finite"
    model.second.grad = None
    assert guard.failed(torch.tensor(torch.inf)) == "the loss (inf) is not finite"
    assert guard.failed(torch.tensor(1.0)) == "the loss of another process is not finite"


def test_guard_counts_steps_in_a_row():
    guard = FiniteGuard(nn.Linear(1, 1))
    for _ in range(PATIENCE - 1):
        guard.failed(torch.tensor(torch.nan))
    assert not guard.exhausted
    guard.passed()
    for _ in range(PATIENCE):
        assert not guard.exhausted
        guard.failed(torch.tensor(torch.nan))
    assert guard.exhausted and PATIENCE == 20


def test_weights_that_are_not_finite_are_never_saved():
    model = Normed()
    check_weights(model, 3)
    with torch.no_grad():
        model.second[1] = torch.inf
    with pytest.raises(TrainingFailed, match="step 3: the parameter second is not finite"):
        check_weights(model, 3)
