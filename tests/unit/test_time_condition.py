"""Labels in place of times: what they are to the last bit, and that nothing but the network's input depends on them."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from genmodels.diffusion.denoiser import Denoiser, Guided, OnSchedule, Preconditioned, denoiser_of
from genmodels.diffusion.discrete import Discrete as DiscretePath
from genmodels.diffusion.model import DiffusionModel
from genmodels.diffusion.schedules import Linear, Schedule, VariancePreserving
from genmodels.diffusion.time_condition import Discrete, Identity, LogSNR, Remap, Shared, TimeCondition
from genmodels.distributions import GaussianMixture
from genmodels.model import Model
from genmodels.networks.network import Network
from genmodels.registry import ConfigError, build, names, resolve
from genmodels.rng import BatchNoise
from genmodels.solvers.runge_kutta import Dopri5, Heun
from genmodels.solvers.step_size import PI
from genmodels.transforms import Identity as Untransformed
from genmodels.types import Batch
from tests.contracts.test_denoiser import PREDICTIONS, randn
from tests.oracles import SCHEDULES

VP = VariancePreserving()
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Seen(Network):
    """Keeps the labels that it is told, and answers a function of the state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[Tensor] = []
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: Tensor | None, x: Tensor, condition: Tensor | None = None) -> Tensor:
        self.labels.append(t)
        return self.weight * torch.tanh(x)


def make(time_condition=None, network: Network | None = None, shape=(2,), **node) -> DiffusionModel:
    given = {"name": "diffusion", "network": "mlp", "prediction": "eps", "schedule": "vp", "sigma_data": 0.5, **node}
    given |= {} if time_condition is None else {"time_condition": time_condition}
    facts = {"num_classes": None, "condition_shape": None, "transform": Untransformed(), "bin_width": None}
    model = build(Model, resolve(Model, given, "test"), shape=shape, **facts).double().eval()
    model.denoiser.network = network or Seen()
    return model


# ---- shared times ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_step_of_a_thousand_goes_to_the_edge_on_its_left(dtype):
    """{0 … 19} -> 0, {20 … 39} -> 20, …, {80 … 99} -> 80, and from 100 on every step to itself, in the dtype of t.

    float32 times .02, .04, .06, .08 lie a rounding below or above the float64 numbers of that name.
    """
    k = torch.arange(1000)
    t, wanted = k.double() / 1000, torch.where(k < 100, k // 20 * 20, k).double() / 1000
    t, wanted = t.to(dtype), wanted.to(dtype)
    if dtype == torch.bfloat16:  # 8 bits do not tell 1000 steps apart: .0999 rounds up to .1
        rounded_up = (k < 100) & torch.isin(t, torch.tensor((0.02, 0.04, 0.06, 0.08, 0.1)).to(dtype))
        t, wanted = t[~rounded_up], wanted[~rounded_up]
    found = Shared()(t, VP)
    assert found.dtype == dtype and torch.equal(found, wanted)
    assert torch.equal(Shared()(t.reshape(-1, 1), VP), wanted.reshape(-1, 1))  # in any shape
    assert torch.equal(Shared()(t[7], VP), wanted[7]) and Shared()(t[7], VP).shape == ()


def test_edges_are_rounded_once():
    """i t̃/n in floating point is 0.06000000000000001 for i = 3, n = 5: t = 0.06 would fall one interval low."""
    assert Shared().edges == (0.0, 0.02, 0.04, 0.06, 0.08, 0.1) and 3 * 0.1 / 5 != 0.06
    for n, until in itertools.product((1, 2, 3, 7, 10, 100), (0.05, 0.1, 0.3, 1.0)):
        edges = Shared(n, until).edges
        assert len(edges) == n + 1 and edges[0] == 0 and edges[-1] == until
        torch.testing.assert_close(torch.tensor(edges).diff(), torch.full((n,), until / n), rtol=1e-5, atol=1e-7)
    t = torch.tensor([0.0, 1e-5, 0.0099, 0.01, 0.2, 0.7], dtype=torch.float64)
    assert torch.equal(
        Shared(edges=(0.0, 0.01, 0.5))(t, VP), torch.tensor([0, 0, 0, 0.01, 0.01, 0.7], dtype=torch.float64)
    )


def test_the_first_interval_may_be_told_a_step_of_a_chain():
    """Only it: 0 and what follows see 1/T, later intervals their left edges."""
    t = torch.tensor([0.0, 0.001, 0.019, 0.02, 0.5], dtype=torch.float64)
    expected = torch.tensor([0.001, 0.001, 0.001, 0.02, 0.5], dtype=torch.float64)
    assert torch.equal(Shared(5, 0.1, first=0.001)(t, VP), expected)


def test_shared_labels_are_a_projection():
    """f(t) <= t, f is monotone and f(f(t)) = f(t); its derivative is 0 below t̃ and 1 from there on."""
    shared, t = Shared(7, 0.3), torch.linspace(0, 1, 4001, dtype=torch.float64, requires_grad=True)
    label = shared(t, VP)
    assert (label <= t).all() and (label.diff() >= 0).all() and torch.equal(shared(label, VP), label)
    assert len(label[t < 0.3].unique()) == 7 and torch.equal(label[t >= 0.3], t[t >= 0.3])
    (slope,) = torch.autograd.grad(label.sum(), t)
    assert torch.equal(slope, (t >= 0.3).double())
    _, forward = torch.func.jvp(lambda u: shared(u, VP), (t.detach(),), (torch.ones_like(t),))
    assert torch.equal(forward, slope)


# ---- the other labels ------------------------------------------------------------------------------------------------


def test_log_snr_is_the_label_of_edm():
    for name in names(Schedule):
        schedule = build(Schedule, SCHEDULES.get(name, name))
        t = torch.linspace(*LogSNR().domain(schedule), 9, dtype=torch.float64)
        alpha, sigma = schedule.scales(t)
        torch.testing.assert_close(LogSNR()(t, schedule), (sigma / alpha).log() / 4, rtol=1e-12, atol=1e-12)
        assert torch.equal(LogSNR()(t, schedule), -schedule.log_snr(t) / 8)  # the bits that earlier weights were given
        assert (LogSNR()(t, schedule).abs() <= math.log(1e3) / 4 + 1e-9).all()
    assert torch.equal(LogSNR(2.0)(t, schedule), -schedule.log_snr(t))


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_steps_are_counted(dtype):
    traps = 0
    for steps in (1000, 100):
        k, count = torch.arange(steps + 1), Discrete(steps, whole=True)
        t = (k.double() / steps).to(dtype)
        traps += int(((t * steps).floor() != k).sum())  # where the product falls one low
        assert torch.equal(count(t, VP), k.to(dtype))
        later, earlier = (torch.nextafter(t, torch.full_like(t, end)) for end in (2.0, -1.0))
        assert torch.equal(count(later, VP), k.to(dtype))
        assert torch.equal(count(earlier, VP)[1:], k[:-1].to(dtype))
        torch.testing.assert_close(Discrete(steps)(t, VP), k.to(dtype))
    assert traps


@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_steps_counted_from_0_are_places_in_the_table_of_a_chain(dtype):
    chain = DiscretePath(steps=100, betas="linear", beta_start=1e-3, beta_end=0.2)
    table, t = chain.alphas_cumprod, chain.at(torch.arange(100)).to(dtype)
    for whole in (False, True):
        place, count = (Discrete(100, whole, first)(t, chain) for first in (0, 1))
        torch.testing.assert_close(place, torch.arange(100).to(dtype), rtol=0, atol=1e-4)
        torch.testing.assert_close(count, place + 1, rtol=0, atol=1e-4)
        torch.testing.assert_close(chain.scales(t.double())[0].square(), table[place.round().long()], rtol=1e-4, atol=0)
    # what models of diffusers are asked after import: T t + their offset of -1
    early = torch.tensor([0.0, 0.003, 0.5], dtype=dtype)
    assert torch.equal(Discrete(100, first=0)(early, chain), 100 * early - 1)
    assert Discrete(100, whole=True, first=0)(early, chain).tolist() == [-1, -1, 49]


def test_another_clock():
    t = torch.tensor([0.0, 0.04, 0.25, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Remap()(t, VP), t.sqrt())
    bent = Remap(1.0, ((0.0, -1.0), (0.25, 2.0), (0.5, 2.5)))
    torch.testing.assert_close(bent(t, VP), torch.tensor([-1.0, -0.52, 2.0, 3.5], dtype=torch.float64))
    # under the clock √t the noise level of vp has a finite slope at the data: σ = √(β_min) √t + …
    small = torch.tensor([1e-8, 4e-8], dtype=torch.float64)
    slope = VP.scales(small)[1].diff() / Remap()(small, VP).diff()
    torch.testing.assert_close(slope, torch.tensor([math.sqrt(0.1)], dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"name": "shared", "intervals": 0}, "at least 1 is needed, found 0"),
        ({"name": "shared", "until": 0.0}, "must be positive"),
        ({"name": "shared", "until": -0.1}, "must be positive"),
        ({"name": "shared", "until": 1.5}, r"t̃ = 1.5 is no time of this path.*from 1e-05 to 1\b"),
        ({"name": "shared", "until": 5e-6}, "is no time of this path"),
        ({"name": "shared", "edges": [0.0, 0.2, 0.1]}, r"found \[0.0, 0.2, 0.1\]"),
        ({"name": "shared", "edges": [0.0, 0.1, 0.1]}, "let them increase"),
        ({"name": "shared", "edges": [0.1, 0.2]}, "Begin at 0"),
        ({"name": "shared", "edges": [0.0]}, "are needed"),
        ({"name": "shared", "first": 0.02}, r"shared.first: a time from 0 to before 0.02 is needed, found 0.02"),
        ({"name": "shared", "first": -0.001}, "shared.first"),
        ({"name": "log_snr", "factor": -1.0}, "factor"),
        ({"name": "discrete", "steps": 0}, "at least 1"),
        ({"name": "discrete", "first": 2}, "first"),
        ({"name": "remap", "power": 0.0}, "power"),
        ({"name": "remap", "points": [[0.0, 0.0], [0.0, 1.0]]}, "increase in both"),
        ({"name": "remap", "points": [[0.0, 1.0], [1.0, 0.0]]}, "increase in both"),
        ({"name": "sharing"}, "Did you mean 'shared'"),
    ],
)
def test_labels_that_cannot_be_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        make(node)


# ---- denoisers and models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [c for c in names(TimeCondition) if c != "identity"])
@pytest.mark.slow_for("discrete", "remap")
def test_nothing_but_the_label_changes(label):
    """With a network that ignores its label, item, noise, velocity and score are the same numbers at the true time."""
    condition, x = build(TimeCondition, label), randn(39, 3)
    for name, prediction in itertools.product(names(Schedule), PREDICTIONS):
        schedule = build(Schedule, SCHEDULES.get(name, name))
        plain, other = (denoiser_of(Seen(), schedule, prediction, 0.5, c) for c in (Identity(), condition))
        t = torch.linspace(other.t_min, other.t_max, 41, dtype=torch.float64)[1:-1]
        for one, two in zip(
            (*plain.predict(t, x), plain(t, x), plain.score(t, x)),
            (*other.predict(t, x), other(t, x), other.score(t, x)),
            strict=True,
        ):
            assert torch.equal(one, two)
        assert all(torch.equal(seen, t) for seen in plain.network.labels)
        assert all(torch.equal(seen, condition(t, schedule)) for seen in other.network.labels)
        assert len(other.network.labels) >= 3 and not torch.equal(other.network.labels[0], t)


def test_defaults_are_what_they_were():
    """A network sees the very tensor of times, and EDM's its own label; only with edm is there another default."""
    t, x = torch.tensor([1e-5, 0.3, 1.0], dtype=torch.float64), randn(3, 2)
    model = make()
    model.velocity(t, x)
    assert model.denoiser.network.labels[0] is t and isinstance(model.denoiser.time_condition, Identity)
    edm = make(prediction="edm")
    assert isinstance(edm.denoiser, Preconditioned) and isinstance(edm.denoiser.time_condition, LogSNR)
    edm.velocity(t, x)
    assert torch.equal(edm.denoiser.network.labels[0], -VP.log_snr(t) / 8)
    other = make({"name": "identity"}, prediction="edm")
    other.velocity(t, x)
    assert other.denoiser.network.labels[0] is t
    linear = make("log_snr", prediction="velocity", schedule="linear")
    torch.testing.assert_close(torch.tensor(linear.span()), torch.tensor([1 / 1001, 1000 / 1001]))
    assert make(prediction="velocity", schedule="linear").span() == (0.0, 1.0)


def test_guidance_shares_both_of_its_answers():
    denoiser = Denoiser(Seen(), VP, "eps", time_condition=Shared())
    t = torch.tensor([0.01, 0.05, 0.5], dtype=torch.float64)
    guided = Guided(denoiser, 2.0, torch.tensor(3))
    guided(t, randn(3, 2), torch.tensor([0, 1, 2]))
    wanted = torch.tensor([0.0, 0.04, 0.5], dtype=torch.float64)
    (seen,) = denoiser.network.labels
    assert torch.equal(seen, torch.cat((wanted, wanted)))
    assert torch.equal(guided.label(t), wanted) and guided.time_condition is denoiser.time_condition


def test_on_another_path_the_label_is_that_of_the_path_of_training():
    own = Denoiser(Seen(), VP, "eps", time_condition=Shared())
    moved = OnSchedule(own, Linear())
    at = torch.tensor([0.013, 0.047, 0.5], dtype=torch.float64)  # on the path of training
    t = Linear().time(VP.log_snr(at))
    moved(t, randn(3, 2))
    seen = own.network.labels[0]
    torch.testing.assert_close(seen, torch.tensor([0.0, 0.04, 0.5], dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(moved.label(t), seen, rtol=0, atol=0)
    # and with guidance around it
    guided = Guided(moved, 3.0, torch.tensor(3))
    guided(t, randn(3, 2), torch.tensor([0, 1, 2]))
    assert torch.equal(own.network.labels[-1], torch.cat((seen, seen)))


def test_samplers_and_likelihoods_keep_the_true_time():
    """With a network that ignores its label, samples, latents and likelihoods are the same bit for bit."""
    plain, shared = make(), make("shared")
    for options in ({"solver": Heun(), "num_steps": 5}, {"solver": Dopri5(), "controller": PI(1e-3, 1e-3)}):
        assert torch.equal(plain.sample(3, **options), shared.sample(3, **options))
    seen = torch.stack([label for label in shared.denoiser.network.labels if label.ndim == 0])
    assert torch.equal(Shared()(seen, VP), seen) and (seen < 0.1).any()
    x = 0.5 * randn(3, 2)
    options = {"controller": PI(1e-3, 1e-3)}
    assert torch.equal(plain.encode(x, **options), shared.encode(x, **options))
    assert torch.equal(plain.log_prob(x, **options), shared.log_prob(x, **options))


class Shared1D(Network):
    """ε̂ = a(label) x with one learnable coefficient for each label."""

    def __init__(self, labels: Tensor, a: Tensor) -> None:
        super().__init__()
        self.labels, self.a = labels, nn.Parameter(a)

    def forward(self, t: Tensor | None, x: Tensor, condition: Tensor | None = None) -> Tensor:
        row = torch.searchsorted(self.labels, t)
        assert torch.equal(self.labels[row], t), "a label that is no edge"
        return self.a[row][:, None] * x


def test_training_stops_at_the_regression_averaged_over_an_interval(monkeypatch):
    """Data N(0, .5²): the best shared coefficient is Σ c V/Σ V with c = σ/V the exact one at each time, V = E x_t².

    The gradient of the expected loss is 0 there; the expectation over data and noise is exact by 3 x 3 Gauss-Hermite
    nodes (√3, 0, -√3 with weights 1/6, 2/3, 1/6).
    """
    times = torch.linspace(0.001, 0.099, 99, dtype=torch.float64)
    alpha, sigma = VP.scales(times)
    v = 0.25 * alpha**2 + sigma**2
    edges = torch.tensor(Shared().edges[:-1], dtype=torch.float64)
    group = torch.bucketize(times, edges, right=True) - 1
    best = torch.zeros(5).double().index_add(0, group, sigma) / torch.zeros(5).double().index_add(0, group, v)
    network = Shared1D(edges, best.clone())
    model = make("shared", network, shape=(1,))
    z, w = torch.tensor([3**0.5, 0, -(3**0.5)]).double(), torch.tensor([1 / 6, 2 / 3, 1 / 6]).double()
    x, eps, weight = 0.5 * z.repeat_interleave(3), z.repeat(3), torch.outer(w, w).flatten()
    monkeypatch.setattr(BatchNoise, "normal", lambda *a, **k: eps.repeat_interleave(99)[:, None])
    monkeypatch.setattr(type(model.times), "sample", lambda *a: times.repeat(9))
    monkeypatch.setattr(type(model.times), "density", lambda self, t, *a: torch.ones_like(t))

    def gradient() -> Tensor:
        loss = model.loss(Batch(x.repeat_interleave(99)[:, None])).value
        return torch.autograd.grad((loss.reshape(9, 99) * weight[:, None]).sum(), network.parameters())[0]

    assert gradient().abs().max() < 1e-12
    with torch.no_grad():
        network.a.copy_(sigma[::20][:5] / v[::20][:5])  # exact at one time of each interval
    assert gradient().abs().min() > 1e-3


def test_bias_of_the_best_shared_coefficient():
    """RMS over the first 100 of DDPM's 1000 steps, data N(0, .5²): from 0.144 to 0.0073 as n goes from 1 to 20."""
    alpha, sigma = ddpm()
    v = 0.25 * alpha**2 + sigma**2
    exact, k = sigma / v, torch.arange(100, dtype=torch.float64)
    expected = {1: 0.144, 2: 0.0726, 5: 0.0293, 10: 0.0147, 20: 0.0073}
    for n, value in expected.items():
        label = Shared(n, 0.1)(k / 1000, VP)
        error = torch.zeros(100, dtype=torch.float64)
        for edge in label.unique():
            rows = label == edge
            best = sigma[:100][rows].sum() / v[:100][rows].sum()
            error[rows] = (best - exact[:100][rows]) ** 2 * v[:100][rows]
        found = error.mean().sqrt()
        assert abs(found - value) < 0.6 * 10 ** -(3 if n == 1 else 4), n


def ddpm() -> tuple[Tensor, Tensor]:
    """(α, σ) of DDPM's linear schedule at the steps 0 … 999."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = (1 - beta).cumprod(0)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def test_the_bias_is_below_the_bound():
    """|ε̂(x, t) - ε̂(x, f(t))| <= σ(t̃) K Δt + B max Δσ, data a mixture, DDPM's steps; and max Δσ as it is known.

    K is the Lipschitz constant of the score in t (here per step) and B its largest norm, at each x, for t < t̃.
    """
    law = GaussianMixture(((-1.0,), (1.0,)), ((0.09,), (0.25,)), (0.3, 0.7), shape=(1,))
    alpha, sigma = (c[:100] for c in ddpm())
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    rows = x.repeat_interleave(100)[:, None]
    score = law.score(rows, alpha.repeat(41), sigma.repeat(41)).reshape(41, 100)
    eps = -sigma * score
    k, b = score.diff(dim=1).abs().max(1).values, score.abs().max(1).values
    gaps = {1: 0.3109, 5: 0.0660, 10: 0.0335, 20: 0.0164}
    largest = []
    for n, value in gaps.items():
        left = (1000 * Shared(n, 0.1)(torch.arange(100, dtype=torch.float64) / 1000, VP)).round().long()
        gap = (sigma - sigma[left]).max()
        assert abs(gap - value) < 6e-5
        bias = (eps - eps[:, left]).abs().max(1).values
        assert (bias <= sigma[-1] * k * (100 // n) + b * gap).all()
        assert (bias > 0.2 * b * gap).any()  # and of the right size
        largest.append(bias.max())
    assert all(a > b for a, b in itertools.pairwise(largest))


@pytest.mark.parametrize("law", [Shared(), Remap(points=((0.0, 0.0), (0.5, 0.2), (0.7, 0.8), (1.0, 1.0)))])
def test_no_warning_of_numbers_that_do_not_lie_side_by_side(law, recwarn):
    """Neither of the points, nor of one time for all rows."""
    torch.set_warn_always(True)
    try:
        law(torch.full((), 0.05, dtype=torch.float64).expand(5), VP)
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list
