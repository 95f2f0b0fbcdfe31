"""Irregular series read observation by observation: recurrent encoders, clocks, models that predict from states."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..model import Model
from ..registry import ConfigError, kind, register
from ..types import Batch, Loss, Seeds, Shape
from .irregular import Series, Targets, observed, pick, refuse, targets

Precision = Literal["float32", "float64"]
DTYPES = {"float32": torch.float32, "float64": torch.float64}


# ---- encoders --------------------------------------------------------------------------------------------------------


class Ode(NamedTuple):
    """How an encoder's hidden state is solved for: the arguments of `evolve`."""

    solver: object
    controller: object
    gradient: object
    regularizers: tuple = ()
    progress: float = 1.0
    noise: object = None


class Reading(NamedTuple):
    """What an encoder made of a batch of series.

    Args:
        states: [B, L + 1, features]: the initial state, then the state after each observation; from the last
            observation of an item on, its state stays as it is.
        penalty: [B] regularizers, the mean over the intervals between observations.
        logs: detached scalars by name.
    """

    states: Tensor
    penalty: Tensor
    logs: dict[str, Tensor]


class Carried(NamedTuple):
    """A hidden state [N, features] at a later time, with the penalty [N] and the logs of getting there."""

    h: Tensor
    penalty: Tensor | None = None
    logs: dict[str, Tensor] | None = None


@kind
class SeriesEncoder(nn.Module, ABC):
    """Reads the observations of a series one after another into a hidden state, which may move between them.

    h_l = update(carry(h_{l-1}; t_{l-1} → t_l), x_l, mask_l). The parent supplies `channels` by keyword.

    Attributes:
        features: size of the hidden state.
        keeps_time: False if the state does not move by itself, so that who reads it later must be told the time since.
    """

    features: int
    keeps_time: ClassVar[bool] = True

    def fit(self, mean: Tensor) -> None:
        """Told of the mean [C] of each channel over the training data."""

    def settings(self, evaluation: bool) -> Ode | None:
        """How its state is solved for in training or in evaluation; None if no differential equation moves it."""
        return None

    def initial(self, like: Tensor) -> Tensor:
        """[B, features] state before the first observation."""
        return like.new_zeros(len(like), self.features)

    @abstractmethod
    def inputs(self, series: Series) -> Tensor:
        """[B, L, *] what `update` is told at each observation."""

    @abstractmethod
    def update(self, h: Tensor, inputs: Tensor) -> Tensor:
        """[B, features] state after an observation."""

    def carry(self, h: Tensor, t: Tensor, s: Tensor, ode: Ode | None) -> Carried:
        """The state [N, features] at times s [N] from that at times t [N]; it stays as it is where they agree."""
        return Carried(h)

    def read(self, series: Series, ode: Ode | None = None) -> Reading:
        """The states after each observation of a batch of series, forwards or backwards in time."""
        inputs, seen = self.inputs(series), series.seen
        h, penalty, logs = self.initial(inputs), inputs.new_zeros(len(inputs)), []
        states = [h]
        for k in range(inputs.shape[1]):
            moved = self.carry(h, series.times[:, k - 1], series.times[:, k], ode) if k else Carried(h)
            penalty = penalty if moved.penalty is None else penalty + moved.penalty
            logs += [] if moved.logs is None else [moved.logs]
            h = torch.where(seen[:, k, None], self.update(moved.h, inputs[:, k]), h)
            states.append(h)
        intervals = (series.length - 1).clamp(min=1)
        return Reading(torch.stack(states, 1), penalty / intervals, _means(logs, inputs.shape[1] - 1))


def _means(logs: list[dict[str, Tensor]], intervals: int) -> dict[str, Tensor]:
    """Of many solves: their evaluations in all, the mean of everything else."""
    total = {name: torch.stack([each[name] for each in logs]).sum(0) for name in (logs[0] if logs else ())}
    return {name: value if name == "nfe" else value / intervals for name, value in total.items()}


@register(SeriesEncoder, "gru")
class GRU(SeriesEncoder):
    """h_l = GRU(h_{l-1}; x_l, mask_l, time since the observation before), optionally with exponential decay.

    With decay the state shrinks between observations, h ← h e^{-relu(w Δ + b)}, and an unobserved channel enters as
    m + (x' - m) e^{-relu(w_c δ_c + b_c)}: its last value x', seen δ_c ago, on its way to its mean m over the training
    data.

    Args:
        hidden: size of the state.
        gap: whether the time since the observation before is an input.
        decay: whether states and last values decay.
    Source: Cho et al. 2014 (Learning phrase representations using RNN encoder-decoder), section 2.3; Che et al. 2018
        (Recurrent neural networks for multivariate time series with missing values), GRU-D, here with one time for the
        decay of the state.
    """

    keeps_time = False

    def __init__(self, hidden: int = 32, gap: bool = True, decay: bool = False, *, channels: int) -> None:
        super().__init__()
        check_positive("gru", hidden=hidden)
        self.features, self.gap = hidden, gap
        self.rnn = nn.GRU(2 * channels + gap, hidden, batch_first=True)
        self.state_decay = nn.Linear(1, hidden) if decay else None
        self.rates = nn.Parameter(torch.zeros(2, channels)) if decay and channels > 1 else None  # w_c and b_c
        if decay:
            nn.init.uniform_(self.state_decay.weight, 0.0, 1.0)  # below 0 a rate would start without gradient
            nn.init.uniform_(self.state_decay.bias, 0.0, 0.1)
        if self.rates is not None:  # one channel is observed wherever anything is
            nn.init.uniform_(self.rates, 0.0, 1.0)
        self.register_buffer("mean", torch.zeros(channels))

    def fit(self, mean: Tensor) -> None:
        self.mean.copy_(mean)

    def inputs(self, series: Series) -> Tensor:
        x = series.x if self.rates is None else self._filled(series)
        parts = [x, series.mask.to(x)]
        return torch.cat(parts + [series.gaps[..., None].to(x)] * self.gap, 2)

    def _filled(self, series: Series) -> Tensor:
        """[B, L, C] the series with decayed last values where it was not observed."""
        place = torch.arange(series.x.shape[1], device=series.x.device)[:, None]
        latest = torch.where(series.mask, place, -1).cummax(1).values  # where each channel was last seen
        index = latest.clamp(min=0)
        times = series.times[..., None].expand_as(index)
        since = (times - times.gather(1, index)).abs().to(series.x)
        fading = (-(self.rates[0] * since + self.rates[1]).relu()).exp()
        last = torch.where(latest >= 0, series.x.gather(1, index), self.mean)
        return torch.where(series.mask, series.x, self.mean + (last - self.mean) * fading)

    def update(self, h: Tensor, inputs: Tensor) -> Tensor:
        return self.rnn(inputs[:, None], h[None].contiguous())[0][:, 0]

    def carry(self, h: Tensor, t: Tensor, s: Tensor, ode: Ode | None) -> Carried:
        if self.state_decay is None:
            return Carried(h)
        gap = (s - t).abs()[:, None].to(h)
        rate = self.state_decay(gap).relu()
        return Carried(torch.where(gap > 0, h * (-rate).exp(), h))

    def read(self, series: Series, ode: Ode | None = None) -> Reading:
        if self.state_decay is not None:
            return super().read(series, ode)
        inputs = self.inputs(series)
        states = torch.cat((self.initial(inputs)[:, None], self.rnn(inputs)[0]), 1)  # one kernel for all observations
        place = torch.arange(states.shape[1], device=states.device).minimum(series.length[:, None])
        return Reading(pick(states, place), inputs.new_zeros(len(inputs)), {})


def check_positive(name: str, **sizes: float) -> None:
    """Raises ConfigError if a size is not above 0."""
    for argument, value in sizes.items():
        if value <= 0:
            raise ConfigError(f"{name}: {argument} must be above 0, found {value}.")


# ---- models ----------------------------------------------------------------------------------------------------------


class SeriesModel(Model):
    """What models of series share: a clock, targets of two kinds, and a first look at the data.

    Times inside are (t - origin) / scale. The origin is the earliest time of the training data; the scale is
    `time_scale`, or else the longest span of the training data, so that the model's times go from 0 to 1.

    Attributes:
        classes: number of classes if the target is a label, None if it is values at target_times.
        channels_out: number of channels of the values.
    """

    classes: int | None
    channels_out: int

    def __init__(
        self, name: str, time_scale: float | None, precision: Precision, shape: Shape, target_shape: Shape | None
    ) -> None:
        super().__init__()
        if len(shape) != 2 or (target_shape is not None and len(target_shape) not in (1, 2)):
            raise ConfigError(
                f"{name}: items must be series [L, C] and targets classes [K] or series [M, C], found items of shape "
                f"{list(shape)} and targets of shape {list(target_shape or ())}."
            )
        if time_scale is not None:
            check_positive(name, time_scale=time_scale)
        self.shape, self.measures, self.dtype = tuple(shape), time_scale is None, DTYPES[precision]
        labels = target_shape is not None and len(target_shape) == 1
        self.classes = target_shape[0] if labels else None
        self.channels_out = shape[-1] if labels or target_shape is None else target_shape[-1]
        self.register_buffer("origin", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(time_scale or 1.0, dtype=torch.float64))
        self.register_buffer("ends", torch.tensor([0.0, time_scale or 1.0], dtype=torch.float64))

    @torch.no_grad()
    def prepare(self, batches: Iterable[Batch], *, generator: Generator) -> dict[str, Tensor]:
        """Set the clock from the times of the training data, and tell encoders the mean of each channel."""
        low, high, total, count = torch.inf, -torch.inf, 0.0, 0.0
        for batch in batches:
            series = observed(batch, torch.float64, "prepare")
            spans = [series.times] + ([] if batch.target_times is None else [batch.target_times.double()])
            low, high = min(low, *(float(t.min()) for t in spans)), max(high, *(float(t.max()) for t in spans))
            total, count = total + series.x.sum((0, 1)), count + series.mask.sum((0, 1))
        if not high >= low:
            raise ValueError("prepare: there are no training items to take the times from.")
        self.origin.fill_(low)
        self.ends.copy_(torch.tensor([low, high], dtype=torch.float64))
        if self.measures:
            self.scale.fill_(high - low if high > low else 1.0)
        for module in self.modules():
            if isinstance(module, SeriesEncoder):
                module.fit((total / count.clamp(min=1)).to(self.origin.device))
        return {"origin": self.origin.clone(), "time_scale": self.scale.clone()}

    def clock(self, times: Tensor) -> Tensor:
        """Times of the data in the model's unit."""
        return (times - self.origin) / self.scale

    def series(self, batch: Batch, where: str) -> Series:
        """What was observed, on the model's clock."""
        self.check_items(batch.x, where)
        found = observed(batch, self.dtype, where)
        return found._replace(times=self.clock(found.times))

    def targets(self, batch: Batch, where: str, *, known: bool = False) -> Targets:
        """What is asked for, on the model's clock.

        Args:
            known: whether the values must be there.
        """
        found = targets(batch, self.channels_out, self.dtype, where)
        if known and found.values is None:
            raise ValueError(f"{where}: the batch has no target. Use a task of the data set that has one.")
        return found._replace(times=self.clock(found.times))

    def labels(self, batch: Batch, where: str) -> Tensor:
        """[B] class labels.

        Raises:
            ValueError: if there are none, or one is out of range.
        """
        if batch.target is None or batch.target.is_floating_point() or batch.target.ndim != 1:
            raise ValueError(f"{where}: the batch needs class labels [B] as its target, whole numbers.")
        refuse(
            {f"has a label outside 0 … {self.classes - 1}": (batch.target < 0) | (batch.target >= self.classes)}, where
        )
        return batch.target.long()


def masked_mean(errors: Tensor, mask: Tensor) -> Tensor:
    """[B] mean of errors [B, M, C] over the entries that count; 0 where none does."""
    return torch.where(mask, errors, 0.0).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


class Recurrent(SeriesModel):
    """A prediction read off an encoder's state: class logits after the last observation, or values at target times.

    The value at a time is read off the state after the last observation up to then, carried on to that time, so that
    what comes later does not matter (before the first observation: off the initial state). loss = cross-entropy, or
    the mean squared error over the targets that count, plus regularizers.
    """

    encoder: SeriesEncoder
    readout: nn.Module

    def build(self, encoder: SeriesEncoder, units: int) -> None:
        """Take an encoder, and make the two layers that read its states."""
        timed = self.classes is None and not encoder.keeps_time
        self.encoder = encoder
        self.readout = nn.Sequential(
            nn.Linear(encoder.features + timed, units), nn.Tanh(), nn.Linear(units, self.classes or self.channels_out)
        )
        if self.dtype == torch.float64:
            self.double()

    def answer(self, batch: Batch, ode: Ode | None, where: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits [B, K] or values [B, M, C], with the penalty [B] and the logs of the encoder."""
        series = self.series(batch, where)
        reading = self.encoder.read(series, ode)
        if self.classes is not None:
            return self.readout(reading.states[:, -1]), reading.penalty, reading.logs
        wanted = self.targets(batch, where).times
        place = torch.searchsorted(series.times, wanted.contiguous(), right=True).minimum(series.length[:, None])
        since = torch.where(place > 0, pick(series.times, (place - 1).clamp(min=0)), wanted)
        h = pick(reading.states, place).flatten(0, 1)
        ode = None if ode is None else ode._replace(regularizers=())
        h = self.encoder.carry(h, since.flatten(), wanted.flatten(), ode).h.unflatten(0, wanted.shape)
        late = [] if self.encoder.keeps_time else [(wanted - since)[..., None].to(h)]
        return self.readout(torch.cat([h, *late], 2)), reading.penalty, reading.logs

    def how(self, batch: Batch, generator: Generator | None) -> Ode | None:
        """How the encoder's state is solved for in training."""
        return self.encoder.settings(evaluation=False)

    def loss(self, batch: Batch, *, generator: Generator | None = None) -> Loss:
        out, penalty, logs = self.answer(batch, self.how(batch, generator), "loss")
        if self.classes is not None:
            label = self.labels(batch, "loss")
            value = nn.functional.cross_entropy(out, label, reduction="none")
            logs = logs | {"accuracy": (out.argmax(1) == label).to(out.dtype).mean()}
        else:
            wanted = self.targets(batch, "loss", known=True)
            value = masked_mean((out - wanted.values).square(), wanted.mask)
            logs = logs | {"squared_error": value.detach().mean()}
        return Loss(value + penalty, logs)


@register(Model, "gru")
class GRUModel(Recurrent):
    """A recurrent baseline for irregular series: a GRU that sees values, masks and times between observations.

    Args:
        hidden: size of the state.
        units: width of the layer between state and prediction.
        gap: whether the time since the observation before is an input.
        decay: whether the state, and the last value of a channel that was not observed, decay with time (GRU-D).
        time_scale: time units of the data per unit of the model's clock; null to measure.
        precision: of all arithmetic.
    Source: Che et al. 2018 (Recurrent neural networks for multivariate time series with missing values).
    """

    def __init__(
        self,
        hidden: int = 32,
        units: int = 64,
        gap: bool = True,
        decay: bool = False,
        time_scale: float | None = None,
        precision: Precision = "float32",
        *,
        shape: Shape,
        target_shape: Shape | None,
    ) -> None:
        super().__init__("gru", time_scale, precision, shape, target_shape)
        check_positive("gru", units=units)
        self.build(GRU(hidden, gap, decay, channels=shape[-1]), units)

    def predict(self, batch: Batch, *, seeds: Seeds | None = None) -> Tensor:
        """[B, K] class logits, or [B, M, C] values at target_times."""
        return self.answer(batch, None, "predict")[0]
