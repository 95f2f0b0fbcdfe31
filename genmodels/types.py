"""What passes between the parts: batches, losses, likelihoods, estimates, and the capabilities of a model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Shape = tuple[int, ...]
Condition = Tensor | Mapping[str, Tensor]


class NotApplicable(Exception):
    """A model has the method but cannot answer for its configuration; the evaluator records the reason."""


def _each(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Mapping):
        return {key: f(item) for key, item in value.items()}
    return None if value is None else f(value)


@dataclass(frozen=True, slots=True, eq=False)  # tensors have no single truth value: batches compare by identity
class Batch:
    """What a dataset gives and a model takes; every tensor has the batch axis first.

    Args:
        x: [B, *shape] items in the dataset's own units (integer levels as floats, volts, z-scores).
        condition: [B] int64 class labels, [B, *] embeddings (mel spectrograms), or named tensors (prompts).
        target: [B] or [B, *] what a predictive model must output.
        times: [B, L] float64, increasing, in the dataset's stated unit of time.
        mask: [B, L] or [B, L, C] bool, True where x was observed.
        target_times: [B, M] float64, where the target is asked for.
        target_mask: [B, M] or [B, M, C] bool, True where the target counts.
    """

    x: Tensor
    condition: Condition | None = None
    target: Tensor | None = None
    times: Tensor | None = None
    mask: Tensor | None = None
    target_times: Tensor | None = None
    target_mask: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "Batch":
        """The chosen rows of every tensor.

        Raises:
            TypeError: if `rows` is one integer, which would drop the batch axis (and would make a batch iterable).
        """
        if isinstance(rows, int):
            raise TypeError(f"a batch is indexed by a slice or a tensor of rows: batch[{rows}:{rows + 1}] is one item.")
        return Batch(*(_each(getattr(self, f.name), lambda v: v[rows]) for f in fields(self)))

    def to(self, device: torch.device | str) -> "Batch":
        """On a device; from pinned memory without waiting for the copy."""
        move: Callable[[Tensor], Tensor] = lambda v: v.to(device, non_blocking=v.is_pinned())  # noqa: E731
        return Batch(*(_each(getattr(self, f.name), move) for f in fields(self)))

    def pin_memory(self) -> "Batch":
        """In pinned memory (what a loader calls); needs a GPU."""
        return Batch(*(_each(getattr(self, f.name), lambda v: v.pin_memory()) for f in fields(self)))

    def replace(self, **changes: Any) -> "Batch":
        return replace(self, **changes)


class Loss(NamedTuple):
    """A training objective: the trainer minimises `value.mean()`.

    Args:
        value: [B] per item, or [] where the objective is no sum over items.
        logs: detached scalars by name: "nll", "nfe", "residual", ...
    """

    value: Tensor
    logs: dict[str, Tensor]


LikelihoodKind = Literal["pmf", "exact", "bound", "numerical", "stochastic"]


class Likelihood(NamedTuple):
    """log p(x) in nats, in the dataset's units, and how far to trust it.

    Args:
        value: [B] float64.
        kind: pmf (probability mass), exact (density of the dequantised point), bound (lower bound), numerical (up to a
            solver's tolerance), stochastic (unbiased estimate up to the solver's tolerance; no certified bound).
        stderr: [B] standard error of the value over its probes or draws, where there are at least two.
    """

    value: Tensor
    kind: LikelihoodKind
    stderr: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its uncertainty.

    Args:
        value: the estimate.
        stderr: its standard error, None where it cannot be had.
        n: how many items it rests on.
        unit: "bits/dim", "seconds", ...; "1" for pure numbers.
        better: the direction in which a model improves; "none" for numbers that only describe.
        kind: how it was made: "exact", "bound", "numerical", "stochastic", "plug-in", "count", ...
        references: values to read it against, by name (the floor of a perfect sampler, a baseline).
        items: [n] per-item values where a paired comparison is meant to be possible.
        flags: what is wrong with the model it was measured on ("overlap_suspected"); a flagged model is not ranked.
        detail: how the number was made, in a few words ("5 draws", "k = 5"), beyond what the protocol says.
        blocks: the values of independent blocks of seeds, where the estimate is their mean.
    """

    value: float
    stderr: float | None
    n: int
    unit: str
    better: Literal["lower", "higher", "none"]
    kind: str
    references: Mapping[str, float] | None = None
    items: Tensor | None = None
    flags: tuple[str, ...] = ()
    detail: str = ""
    blocks: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Samples:
    """What a model answered to the evaluator: drawn items, likelihoods, predictions or edits, with their cost.

    Args:
        seeds: [n] int64; item i was made from seed i alone.
        x: [n, *shape] drawn items or edits in data units, rounded to the levels of discrete data (None for other
            questions).
        condition: what they were drawn given, or edited to.
        likelihood: log p of the items of the batch.
        prediction: [n, *] the model's prediction for the batch.
        features: [n, D] features of drawn items by the identity of their extractor.
        reconstruction: [n, *shape] of edits x, what the same method makes of the items under their own condition, not
            rounded; None if it was not asked for.
        stored: bytes of shared features of an edit, per item.
        seconds: wall-clock time of the whole answer.
        nfe: evaluations of the model's network on the path of one item (mean over items).
        failure: why there is no answer (a solver gave up); x or the likelihood is NaN then.
        options: the setting of a metric under which it was answered (see `Metric.settings`); None for the run's own.
    """

    seeds: Tensor
    x: Tensor | None = None
    condition: Condition | None = None
    likelihood: Likelihood | None = None
    prediction: Tensor | None = None
    features: Mapping[str, Tensor] | None = None
    reconstruction: Tensor | None = None
    stored: float = 0.0
    seconds: float = 0.0
    nfe: float = 0.0
    failure: str = ""
    options: Mapping[str, Any] | None = None


Seeds = int | Iterable[int] | Tensor


# Capabilities, discovered by isinstance. `**options` stands for the explicit keyword-only arguments of an
# implementation: its signature is what the `sample:`, `likelihood:`, `predict:`, `edit:` sections are checked against.
@runtime_checkable
class SupportsSample(Protocol):
    def sample(self, seeds: Seeds, *, condition: Condition | None = None, **options: Any) -> Tensor:
        """[n, *shape] items in data units; an int n means the seeds 0 … n-1; item i depends on seed i alone."""


@runtime_checkable
class SupportsLogProb(Protocol):
    def likelihood(
        self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None, **options: Any
    ) -> Likelihood:
        """log p(x) with its kind; what is random in item i (dequantisation, probes) depends on seed i alone."""

    def log_prob(
        self, x: Tensor, *, condition: Condition | None = None, seeds: Seeds | None = None, **options: Any
    ) -> Tensor:
        """[B] nats: likelihood(...).value."""


@runtime_checkable
class SupportsEncode(Protocol):
    def encode(self, x: Tensor, *, condition: Condition | None = None, **options: Any) -> Tensor:
        """[B, *] latent of x, deterministic."""

    def decode(self, z: Tensor, *, condition: Condition | None = None, **options: Any) -> Tensor:
        """[B, *shape] item of z: decode(encode(x)) = x to the solver's tolerance."""


@runtime_checkable
class SupportsPredict(Protocol):
    def predict(self, batch: Batch, *, seeds: Seeds | None = None, **options: Any) -> Tensor:
        """Class logits, or values at target_times; options are the compute dial.

        A forecast that is a law has one more trailing axis of size 2 than the target: mean and log standard deviation.
        """


@runtime_checkable
class SupportsVelocity(Protocol):
    def velocity(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *] dx/dt of the model's ODE at (t, x), in model space."""


@runtime_checkable
class SupportsScore(Protocol):
    def score(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *] gradient of log p_t at x, in model space."""


@runtime_checkable
class SupportsDenoise(Protocol):
    def span(self) -> tuple[float, float]:
        """First and last time at which its denoiser can be asked."""

    def label(self, t: Tensor) -> Tensor:
        """What its network is told of times t, in their shape."""

    def noised(self, t: Tensor, x: Tensor, noise: Any) -> Tensor:
        """[B, *] states at time t of items x in data units, in model space; `noise` is a `genmodels.rng.Noise`."""

    def answer(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *] what its network predicts at states x in model space."""


class Edited(NamedTuple):
    """What a model made of items that were to be edited.

    Args:
        x: [B, *shape] the edit in data units, continuous: not rounded to the levels of discrete data.
        reconstruction: [B, *shape] what the same method makes of the items under their own condition; None if it was
            not asked for.
        noise: [B, *] where the items were taken at the noisy end, in model space; None for methods that do not invert.
        nfe: evaluations of the velocity on the path of one item to its edit; a guided one counts once.
        stored: bytes of shared features.
    """

    x: Tensor
    reconstruction: Tensor | None
    noise: Tensor | None
    nfe: int
    stored: int


@runtime_checkable
class SupportsEdit(Protocol):
    def edit(
        self,
        x: Tensor,
        *,
        source: Condition | None,
        target: Condition | None,
        seeds: Seeds | None = None,
        **options: Any,
    ) -> Edited:
        """Items x [B, *shape] of the condition `source` turned into such of `target`; what a method draws for item i
        depends on seed i alone."""


def expand_like(t: Tensor, x: Tensor) -> Tensor:
    """t of shape [] or [B] with trailing unit axes, so that it broadcasts against x of shape [B, *]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t


def sum_items(x: Tensor) -> Tensor:
    """[B] float64 sum over every axis of x but the first; log-determinants and log-probabilities are added here."""
    return x.flatten(1).sum(1, dtype=torch.float64) if x.ndim > 1 else x.double()
