"""A network as an estimate of clean item, noise, velocity and score at every time of a path, and its wrappers."""

from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn

from ..conditions import guide
from ..networks.network import Network
from ..rng import Noise
from ..types import Condition, expand_like
from .parametrization import Prediction, Target, domain, to_clean_and_noise
from .schedules import Schedule, as_times
from .time_condition import Identity, LogSNR, TimeCondition


class Denoiser(nn.Module):
    """What a network's answer p says of x_t = α x + σ ε; called, it is the field of the probability-flow ODE.

    velocity = α' x̂ + σ' ε̂ and score = -ε̂/σ. All states are in model space, [B, *shape]; t is [] or [B].

    Args:
        network: gives p from (t, x_t, condition).
        prediction: what p estimates.
        sigma_data: root mean square of the data in model space, which the prediction "edm" refers to.
        time_condition: what the network sees in place of t; the time itself if None. Nothing else depends on it.
    Attributes:
        t_min, t_max: first and last time at which it can be asked.
    Source: Song et al. 2021 (Score-based generative modeling through SDEs), equation 13.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        prediction: Target = "velocity",
        sigma_data: float = 1.0,
        time_condition: TimeCondition | None = None,
    ) -> None:
        super().__init__()
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.time_condition = time_condition or Identity()
        self.place()
        self.register_load_state_dict_post_hook(_place)
        self.register_buffer("sigma_data", torch.tensor(sigma_data, dtype=torch.float64))

    def place(self) -> None:
        """Set t_min and t_max for the schedule as it is now: one with state may have learnt of its path."""
        s = self.schedule
        low, high = domain(self.prediction, s) if s.ready else (s.t_min, s.t_max)
        first, last = self.time_condition.domain(s) if s.ready else (low, high)
        self.t_min, self.t_max = max(low, first), min(high, last)

    def label(self, t: Tensor) -> Tensor:
        """What the network is told of the time, in the shape of t."""
        return self.time_condition(t, self.schedule)

    def fit_path(self, batches: Iterable[Tensor], *, generator: Generator) -> dict[str, Tensor]:
        """Find the path if the schedule depends on the data (see `Schedule.fit`); scalars to log."""
        logs = self.schedule.fit(batches, generator=generator)
        self.place()
        return logs

    def answer(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, *shape] the network's own p."""
        return self.network(self.label(t), x, condition)

    def predict(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Prediction:
        """x̂ = E[x | x_t] and ε̂ = E[ε | x_t].

        Raises:
            ValueError: where p does not determine both, outside t_min to t_max; for times that are integers or not in
                [0, 1].
        """
        as_times(t, self.schedule.t_max)  # before a network is asked
        p = self.answer(t, x, condition)
        return to_clean_and_noise(self.prediction, p, x, self.schedule(t), self.sigma_data)

    def velocity(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, *shape] dx_t/dt per unit time.

        Raises:
            ValueError: as `predict`, unless the network predicts the velocity itself.
        """
        if self.prediction == "velocity":
            as_times(t, self.schedule.t_max)
            return self.answer(t, x, condition)
        clean, eps = self.predict(t, x, condition)
        scales = self.schedule(t)
        dalpha, dsigma = (expand_like(c, x).to(x.dtype) for c in (scales.dalpha, scales.dsigma))
        return dalpha * clean + dsigma * eps

    def score(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, *shape] ∇ log p_t(x_t).

        Raises:
            ValueError: as `predict`, unless the network predicts the score itself; and at σ = 0, where it is not known.
        """
        if self.prediction == "score":
            as_times(t, self.schedule.t_max)
            return self.answer(t, x, condition)
        sigma = self.schedule(t).sigma
        if not (sigma > 0).all():
            raise ValueError(
                "score: at σ = 0 a denoiser knows the item, not the score of the data. Ask at a later time."
            )
        return -self.predict(t, x, condition).eps / expand_like(sigma, x).to(x.dtype)

    def forward(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        return self.velocity(t, x, condition)


def _place(denoiser: Denoiser, keys: object) -> None:
    denoiser.place()


class Preconditioned(Denoiser):
    """EDM's preconditioning: x̂ = c_skip x_t/α + c_out p, where the network sees unit variance and an even time.

    With the noise level r = σ/α and s the root mean square of the data, c_skip = s²/(r² + s²), c_out = r s/√(r² + s²),
    c_in = 1/√(r² + s²) on x_t/α and c_noise = log(r)/4 in place of t. The squared error of p then has the weight
    1/c_out² on that of x̂ and an expected start of 1 at every time.

    Args:
        sigma_data: s, in units of model space.
        time_condition: what the network sees in place of t; c_noise, which is "log_snr", if None.
    Source: Karras et al. 2022 (EDM), equation 7 and table 1.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        sigma_data: float = 1.0,
        time_condition: TimeCondition | None = None,
    ) -> None:
        super().__init__(network, schedule, "edm", sigma_data, time_condition or LogSNR())

    def answer(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        alpha, sigma = self.schedule.scales(t)
        scale = (sigma.square() + (alpha * self.sigma_data).square()).rsqrt()
        return super().answer(t, expand_like(scale, x).to(x.dtype) * x, condition)


def denoiser_of(
    network: Network,
    schedule: Schedule,
    prediction: Target,
    sigma_data: float,
    time_condition: TimeCondition | None = None,
) -> Denoiser:
    """The denoiser of a network that predicts this."""
    if prediction == "edm":
        return Preconditioned(network, schedule, sigma_data, time_condition)
    return Denoiser(network, schedule, prediction, sigma_data, time_condition)


class Denoising:
    """The capability `SupportsDenoise` of a model that owns a denoiser; nothing but methods."""

    def span(self) -> tuple[float, float]:
        """First and last time at which the denoiser can be asked."""
        return self.denoiser.t_min, self.denoiser.t_max

    def label(self, t: Tensor) -> Tensor:
        """What the network is told of times, in their shape."""
        return self.denoiser.label(t)

    def noised(self, t: Tensor, x: Tensor, noise: Noise) -> Tensor:
        """[B, *model_shape] α(t) T(x) + σ(t) ε of items x [B, *shape] in data units, for t of shape [] or [B]."""
        y, _ = self._to_model_space(x, noise)
        alpha, sigma = (expand_like(c, y).to(y.dtype) for c in self.schedule.scales(t))
        return alpha * y + sigma * noise.normal(*self.model_shape, dtype=y.dtype)

    def answer(self, t: Tensor, x: Tensor, *, condition: Condition | None = None) -> Tensor:
        """[B, *model_shape] what the network predicts at states x in model space, in its own units."""
        return self.denoiser.answer(t, x, self.conditions.checked(condition, len(x), "answer"))


class Guided(Denoiser):
    """Classifier-free guidance: p = p_null + w (p_condition - p_null); w = 1 is off and asks the network once.

    At fixed x_t every prediction is an affine function of every other, so that guiding p guides them all. Both answers
    come from one call on 2B rows.

    Args:
        denoiser: trained with its conditions dropped at times.
        scale: w; 0 ignores the condition, above 1 exaggerates it.
        null: [*] the label or embedding that stands for "no condition", without the batch axis.
    Raises:
        ValueError: if it is asked without a condition.
    Source: Ho & Salimans 2022 (Classifier-free diffusion guidance), equation 6, whose w is w - 1 here.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null: Tensor) -> None:
        super().__init__(
            denoiser.network, denoiser.schedule, denoiser.prediction, time_condition=denoiser.time_condition
        )
        self.t_min, self.t_max, self.sigma_data = denoiser.t_min, denoiser.t_max, denoiser.sigma_data
        self.denoiser, self.scale, self.null = denoiser, scale, null

    def answer(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        return guide(self.denoiser.answer, t, x, condition, self.null, self.scale)


class OnSchedule(Denoiser):
    """A denoiser trained on one path, used on another: x_t of this schedule is rescaled to the same log-SNR on its own.

    With t* the time of equal log-SNR on the denoiser's schedule, x_t* = x_t √((α*² + σ*²)/(α² + σ²)) has the same clean
    item and the same noise. The ODE of any path takes the same noise to the same item.

    Args:
        denoiser: of the other path.
        schedule: the path to be used; it must not reach a log-SNR that the denoiser's does not.
    Source: Karras et al. 2022 (EDM), section 2 and appendix B.2 (the scaling s(t)).
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__(denoiser.network, schedule)
        ends = torch.tensor((denoiser.t_min, denoiser.t_max), dtype=torch.float64)
        self.t_min, self.t_max = schedule.time(denoiser.schedule.log_snr(ends)).tolist()
        self.denoiser, self.sigma_data = denoiser, denoiser.sigma_data

    def label(self, t: Tensor) -> Tensor:
        return self.denoiser.label(self._twin(t))

    def answer(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Tensor:
        clean, eps = self.predict(t, x, condition)
        scales = self.schedule(t)
        dalpha, dsigma = (expand_like(c, x).to(x.dtype) for c in (scales.dalpha, scales.dsigma))
        return dalpha * clean + dsigma * eps

    def predict(self, t: Tensor, x: Tensor, condition: Condition | None = None) -> Prediction:
        twin = self._twin(t)
        ratio = torch.hypot(*self.denoiser.schedule.scales(twin)) / torch.hypot(*self.schedule.scales(t))
        return self.denoiser.predict(twin, expand_like(ratio, x).to(x.dtype) * x, condition)

    def _twin(self, t: Tensor) -> Tensor:
        """The time of equal log-SNR on the denoiser's own path."""
        return self.denoiser.schedule.time(self.schedule.log_snr(t))
