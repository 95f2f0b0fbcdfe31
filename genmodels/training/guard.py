"""Steps whose numbers are not finite: kept away from the weights, named, and not endured for ever."""

import torch
from torch import Tensor, nn

PATIENCE = 20


class TrainingFailed(RuntimeError):
    """Training stopped because its numbers were not finite."""


class FiniteGuard:
    """Counts steps in a row that were not finite, and undoes what they did.

    A skipped step never reaches the optimiser, but its forward pass may have written running statistics; they come back
    from a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.bad = model, 0
        self.buffers = list(model.buffers())
        self.copies = [b.detach().clone() for b in self.buffers]

    @torch.no_grad()
    def passed(self) -> None:
        """The step was good."""
        self.bad = 0
        if self.buffers:
            torch._foreach_copy_(self.copies, self.buffers)

    @torch.no_grad()
    def failed(self, loss: Tensor) -> str:
        """The step was not finite: buffers come back; says which tensor it was."""
        self.bad += 1
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.copies)
        named = self.model.named_parameters()
        bad = next((name for name, p in named if p.grad is not None and not p.grad.isfinite().all()), None)
        what = [] if loss.isfinite() else [f"the loss ({loss.item()})"]
        what += [f"the gradient of {bad}"] if bad else []
        if not what:
            return "the loss of another process is not finite"
        return f"{' and '.join(what)} {'is' if len(what) == 1 else 'are'} not finite"

    @property
    def exhausted(self) -> bool:
        return self.bad >= PATIENCE


def check_weights(model: nn.Module, step: int) -> None:
    """Raises TrainingFailed naming the first parameter that is not finite, so that no checkpoint ever holds one."""
    bad = next((name for name, p in model.named_parameters() if not p.isfinite().all()), None)
    if bad is not None:
        raise TrainingFailed(
            f"step {step}: the parameter {bad} is not finite, and no checkpoint of it is written. Lower "
            "train.optimizer.lr or train.clip, or look at what `prepare` makes of the data."
        )
