"""One optimiser step: forward and backward over the micro-batches, then clip, update and average."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Config
from ..model import Model
from ..networks.network import set_autocast, set_compile, set_gradient_checkpointing
from ..rng import fold, generator
from ..types import Batch, Loss
from . import processes
from .ema import WeightAverage
from .guard import FiniteGuard
from .watch import mean_logs


class Outcome(NamedTuple):
    """What a step came to on this process.

    Args:
        loss: [] float64 mean over its micro-batches.
        logs: the model's scalars, and the norm of the gradient before clipping.
        problem: what was not finite; the step changed nothing then. None if all was well.
    """

    loss: Tensor
    logs: dict[str, Tensor]
    problem: str | None


class Step:
    """A model on its device, its optimiser, and how one step of a run changes them.

    Args:
        accelerator: of `processes.join`.
    Raises:
        ConfigError: if networks are to be compiled that the loss differentiates twice.
    Attributes:
        averages: of the weights, to be set before the first step.
        guard: counts steps in a row that were not finite.
    """

    def __init__(self, config: Config, model: Model, accelerator: Any) -> None:
        self.settings, self.seed, self.accelerator = config.train, config.seed, accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.model = model.to(accelerator.device)
        set_autocast(model, torch.bfloat16 if self.settings.precision == "bf16" else None)
        set_gradient_checkpointing(model, self.settings.gradient_checkpointing)
        if self.settings.compile:
            set_compile(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = self.settings.optimizer.over(self.parameters) if self.parameters else None
        self.averages: dict[str, WeightAverage] = {}

    def start(self, averages: dict[str, WeightAverage]) -> None:
        """From the weights that the model has now: replicas are wrapped after these are loaded."""
        # A model without parameters has nothing to synchronise.
        self.wrapped = processes.replicate(self.accelerator, self.model) if self.parameters else self.model
        self.guard, self.averages = FiniteGuard(self.model), averages
        self.wrapped.train()  # every part, as it is after a validation too

    def __call__(self, step: int, batches: list[Batch]) -> Outcome:
        """Step number `step`, counted from 0, over the micro-batches of this process."""
        _seed(fold(self.seed, "step", step, self.rank), self.model.device)
        if not (self.wrapped.training and self.model.training):
            self.wrapped.train()
        self.model.progress = step / self.settings.steps
        mean, logs = torch.zeros((), dtype=torch.float64, device=self.model.device), []
        for part, batch in enumerate(batches):
            last = part == len(batches) - 1  # replicas exchange gradients once a step
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self.forward(step, part, batch)
                value = loss.value.mean() / len(batches)
                if self.parameters:
                    self.backward(value)
            mean = mean + value.detach().double()
            logs.append(loss.logs)
        self.model.progress = 1.0
        norm, problem = self.update(step, mean)
        return Outcome(mean, mean_logs(logs) | ({"grad_norm": norm} if self.parameters else {}), problem)

    def forward(self, step: int, part: int, batch: Batch) -> Loss:
        g = generator(self.seed, "loss", step, self.rank, part, device=self.model.device)
        return self.wrapped(batch.to(self.model.device), generator=g)

    def backward(self, value: Tensor) -> None:
        value.backward()

    def update(self, step: int, loss: Tensor) -> tuple[Tensor, str | None]:
        """Clip, step and average, unless loss or gradient is not finite on any process: replicas never part.

        Returns:
            [] the norm of the gradient, and what was not finite.
        Raises:
            ConfigError: if replicas wait for gradients that the loss does not give.
        """
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros_like(loss)
        whole = torch.tensor(self.model.unused_parameters or len(grads) == len(self.parameters), device=loss.device)
        votes = torch.stack((loss.isfinite() & norm.isfinite(), whole)).long()
        good, complete = (votes if self.world == 1 else self.accelerator.reduce(votes, "sum")).tolist()
        if complete < self.world > 1:
            processes.require_gradients(self.model)
        problem = None
        if good < self.world:
            problem = self.guard.failed(loss)
        else:
            if self.optimizer is not None:
                self._descend(step, norm)
            if self.world > 1:  # running statistics are those of each one's share
                processes.copy_from_main(self.model.buffers())
            for average in self.averages.values():
                average.update(self.model, step + 1)
            self.guard.passed()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        return norm.detach(), problem

    def _descend(self, step: int, norm: Tensor) -> None:
        s = self.settings
        if s.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, s.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = s.optimizer.lr * s.learning_rate.factor(step, s.steps)
        self.optimizer.step()
        torch.autograd.graph.increment_version(self.parameters)  # fused kernels leave it to us, and caches go by it


def _seed(value: int, device: torch.device) -> None:
    """Seed what dropout draws from; losses draw from their own generator.

    For a model on the CPU that is one generator, a tenth of the time that seeding every kind of device takes.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(value)
    else:
        torch.manual_seed(value)
