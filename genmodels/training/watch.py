"""What is looked at while a model trains: log lines, the loss on validation items, a grid of samples."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..model import Model
from ..rng import generator
from ..sampling import Written, default_seeds, draw, request, write_forecasts, write_samples
from ..types import Loss, NotApplicable, SupportsPredict, SupportsSample
from . import processes
from .console import Console, count
from .ema import WeightAverage, best
from .run import Run
from .state import size
from .tracking import TensorBoard

VALIDATION_BATCH = 128  # items that share one stream of noise; at most this many, whatever the number of processes


class Interval:
    """Sums since the last log line; they stay on the device, so that no step waits for the console.

    The clock runs from `resume` (or the start) to `add`: validation, samples and checkpoints between steps are not
    counted.

    Args:
        clock: seconds; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.loss: list[Tensor] = []
        self.logs: dict[str, list[Tensor]] = {}
        self.items, self.seconds, self.mark = 0, 0.0, clock()

    def add(self, loss: Tensor, logs: Mapping[str, Tensor], items: int) -> None:
        """One step: its mean loss [], its logs, and how many items all processes saw in it."""
        self.loss.append(loss)
        for name, value in logs.items():
            self.logs.setdefault(name, []).append(value)
        self.items += items
        now = self.clock()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def resume(self) -> None:
        self.mark = self.clock()

    @property
    def rate(self) -> float:
        """Items per second over all processes."""
        return self.items / self.seconds if self.seconds > 0 else math.nan


def mean_logs(many: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each logged scalar over those of the mappings that have it, as float64 []."""
    names = dict.fromkeys(name for logs in many for name in logs)
    of = {name: [logs[name].detach().double().mean() for logs in many if name in logs] for name in names}
    return {name: torch.stack(values).mean() for name, values in of.items()}


class Watch:
    """What a run says of itself on the way; every method is called by all processes together."""

    def __init__(
        self,
        accelerator: Any,
        run: Run,
        dataset: Dataset,
        model: Model,
        averages: Mapping[str, WeightAverage],
        console: Console,
    ) -> None:
        self.accelerator, self.run, self.dataset, self.model = accelerator, run, dataset, model
        self.averages, self.console = averages, console
        self.settings, self.main = run.config.train, accelerator.is_main_process
        self.board: TensorBoard | None = None

    def greet(self, start: int) -> None:
        """What is trained, on what, from where."""
        if self.settings.tensorboard and self.main:
            self.board = TensorBoard(self.run.folder("tensorboard"), start)
        tree, world = self.run.config.tree, self.accelerator.num_processes
        self.console.say(
            f"{self.run.path}: {f'continuing at step {start:,}' if start else 'new run'}, {tree['model']['name']} with "
            f"{count(size(self.model)['parameters'])} parameters on {tree['data']['name']} "
            f"({self.dataset.size('train'):,} items), {self.model.device}, {world} process{'es' if world > 1 else ''}"
        )
        if self.settings.eval_every and self.dataset.size("val") == 0:
            self.console.say("no validation: this data set has no validation items")

    def report(self, done: int, interval: Interval, seconds: float) -> None:
        """Mean loss over the finite steps of the interval with its standard error, means of the logs, items/s."""
        losses = self.accelerator.reduce(torch.stack(interval.loss), "mean")
        extra = self._everywhere({name: torch.stack(v)[torch.stack(v).isfinite()] for name, v in interval.logs.items()})
        skipped = int((~losses.isfinite()).sum())
        losses = losses[losses.isfinite()]
        loss = losses.mean().item() if len(losses) else math.nan
        spread = losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
        self.console.report(done, loss, spread, interval.rate, extra | ({"skipped": skipped} if skipped else {}))
        if self.main:
            values = {"train/loss": loss, "train/loss_stderr": spread, "items_per_second": round(interval.rate, 1)}
            values |= {f"train/{name}": value for name, value in extra.items()}
            self._log(done, seconds, **values, **({"train/skipped": skipped} if skipped else {}))

    def _everywhere(self, logs: Mapping[str, Tensor]) -> dict[str, float]:
        """Means over processes (which need not have logged the same names)."""
        from accelerate.utils import gather_object

        mine = {name: value.mean().item() for name, value in logs.items() if value.numel()}
        of_all = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        names = dict.fromkeys(name for each in of_all for name in each)
        return {n: math.fsum(e[n] for e in of_all if n in e) / sum(n in e for e in of_all) for n in names}

    def _log(self, done: int, seconds: float, **values: float) -> None:
        self.run.log(done, samples=done * self.settings.batch_size, seconds=round(seconds, 3), **values)
        if self.board is not None:
            self.board.scalars(done, values)

    def validate(self, done: int, seconds: float) -> float | None:
        """The loss on fixed validation items with fixed noise, under the first average of the weights; logs it.

        The result does not depend on the number of processes; None without validation items.
        """
        items = min(self.settings.eval_items, self.dataset.size("val"))
        if items == 0:
            return None
        size = min(VALIDATION_BATCH, max(1, self.settings.batch_size // self.settings.accumulate))
        parts = list(enumerate(torch.arange(items).split(size)))
        mine = parts[self.accelerator.process_index :: self.accelerator.num_processes]
        sums: dict[str, Tensor] = {}
        # A loss that differentiates the network needs gradients even where its value alone is asked for.
        with best(self.averages, self.model), torch.set_grad_enabled(self.model.differentiates_twice):
            for k, rows in mine:
                out = self._loss(k, rows)
                for name, value in {"loss": out.value.detach().double().mean(), **mean_logs([out.logs])}.items():
                    sums[name] = sums.get(name, 0.0) + value * len(rows)
        values = self._total({name: value.item() for name, value in sums.items()}, items)
        self.console.at(done, f"val loss {values['loss']:.4f}")
        if self.main:
            self._log(done, seconds, **{f"val/{name}": value for name, value in values.items()})
        return values["loss"]

    def _loss(self, k: int, rows: Tensor) -> Loss:
        device = self.model.device
        g = generator(self.run.config.seed, "validate", k, device=device)
        return self.model.loss(self.dataset.take("val", rows).to(device), generator=g)

    def _total(self, sums: dict[str, float], items: int) -> dict[str, float]:
        """Sums over processes divided by the number of items."""
        from accelerate.utils import gather_object

        of_all = gather_object([sums]) if self.accelerator.num_processes > 1 else [sums]
        names = dict.fromkeys(name for each in of_all for name in each)
        return {name: math.fsum(each.get(name, 0.0) for each in of_all) / items for name in names}

    def grid(self, done: int) -> None:
        """Samples of fixed seeds, and predictions of series, under the first average of the weights; a model that
        cannot do so (yet) goes on."""
        if isinstance(self.model, SupportsSample):
            processes.by_main(lambda: self._picture(done, "samples", self._draw))
        if isinstance(self.model, SupportsPredict) and self._asks_for_series():
            processes.by_main(lambda: self._picture(done, "predictions", self._predict))

    def _asks_for_series(self) -> bool:
        return self.dataset.take("train", torch.zeros(1, dtype=torch.int64)).target_times is not None

    def _picture(self, done: int, what: str, draw: Callable[[int], Written]) -> None:
        try:
            with best(self.averages, self.model):
                path, remark = draw(done)
            self.console.at(done, f"{what} in {path}{f' ({remark})' if remark else ''}")
        except (NotApplicable, RuntimeError, ValueError, ArithmeticError) as error:
            # Early weights can be too wild for a solver; a picture is not worth the run.
            self.console.at(done, f"no {what}: {error}")
            return
        if self.board is not None:
            self.board.picture(done, path, what)

    def _draw(self, done: int) -> Written:
        seeds = default_seeds(self.model, self.dataset)
        x, condition = draw(self.model, self.dataset, seeds, self.run.config.options("sample"))
        notes = request(seeds, condition, self.run.config.answer("sample"), self._weights(), done)
        return write_samples(self.run.folder("samples") / f"{done:08d}", x, self.dataset, notes)

    def _predict(self, done: int) -> Written:
        notes = {"predict": self.run.config.answer("predict"), "weights": self._weights(), "step": done}
        stem = self.run.folder("samples") / f"{done:08d}-predictions"
        return write_forecasts(stem, self.model, self.dataset, self.run.config.options("predict"), notes)

    def _weights(self) -> str:
        return next(iter(self.averages), "model")

    def close(self) -> None:
        """Nothing more will be said."""
        if self.board is not None:
            self.board.close()
