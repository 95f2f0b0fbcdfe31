"""Conditions of score models: hidden in training, and guided towards, against closed forms for Gaussian classes."""

import math

import pytest
import torch
from torch import Tensor, nn

from genmodels.conditions import Conditions, GuidedNetwork
from genmodels.diffusion.schedules import VariancePreserving
from genmodels.model import Model
from genmodels.processes.joint_score import JointScore, apply
from genmodels.processes.local_score import LocalScore
from genmodels.processes.process import Langevin
from genmodels.registry import ConfigError, build, resolve
from genmodels.rng import BatchNoise
from genmodels.solvers.base import Fixed
from genmodels.solvers.runge_kutta import Euler
from genmodels.solvers.step_size import PI
from genmodels.transforms import Identity
from genmodels.types import Batch

KINDS = ("diffusion", "local_dsm", "multivariate_diffusion")
MEANS = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64)  # of two classes, and of all items
WIDTH, SCALE = 0.6, 2.5
CLOSE = PI(1e-4, 1e-4)


def made(name: str, num_classes: int | None = 2, condition_shape=None, **node) -> Model:
    facts = {"shape": (2,), "num_classes": num_classes, "condition_shape": condition_shape, "bin_width": None}
    node = {"name": name, "network": {"name": "mlp", "hidden": [4]}, **node}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return build(Model, resolve(Model, node, "test"), transform=Identity(), **facts).double().eval()


class ClassMeans(nn.Module):
    """F of the joint score of data N(m_c, WIDTH²): n̂ = skip (u - mean m_c), of which "mixed" knows skip u."""

    def __init__(self, joint: JointScore) -> None:
        super().__init__()
        self.joint, self.rows, self.scale = [joint], 0, 1.0
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))  # of which the model knows its dtype

    def forward(self, t: Tensor, x: Tensor, condition: Tensor) -> Tensor:
        self.rows += len(x)
        c = self.joint[0].coefficients(t)
        shift = -torch.linalg.solve(c.out, c.skip @ c.mean)  # [..., r, 1]
        means = self.scale * MEANS[condition][:, None, None].expand(-1, 1, 2)
        return apply(shift, means).flatten(1)


def gaussian_classes(**node) -> Model:
    model = made("multivariate_diffusion", sigma_data=WIDTH, **node)
    model.joint.network = ClassMeans(model.joint)
    return model


def mean_of(model: Model, t: float, means: Tensor) -> Tensor:
    """[B, n, 2] of u_t."""
    return apply(model.joint.coefficients(torch.tensor(t)).mean, means[:, None, None].expand(-1, 1, 2))


@pytest.mark.parametrize("diffusion", ["cld", "linear_sde"])
@pytest.mark.slow_for("cld")
def test_guided_joint_scores_are_those_of_a_shifted_gaussian(diffusion):
    """Scores of N(m, Σ) are affine in m: guidance by w makes m_w = m_null + w (m_c - m_null) of the means.

    The guided ODE takes z to where that of N(0, WIDTH²) takes z less the mean of m_w at t = 1, plus its mean at t_min.
    """
    model, still = gaussian_classes(diffusion=diffusion), gaussian_classes(diffusion=diffusion)
    still.joint.network.scale = 0.0
    labels, n = torch.tensor([0, 1, 0, 2]), model.diffusion.size
    z = torch.randn(4, n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cases = ((0.0, {}), (SCALE, {"interval": (0.0, math.inf)} if n == 1 else {}))
    means = [MEANS[2] + w * (MEANS[labels] - MEANS[2]) for w, _ in cases]
    with torch.no_grad():
        centred = torch.cat([z - mean_of(model, 1.0, m) for m in means])
        rest = still.decode(centred, condition=labels.repeat(2), controller=CLOSE).chunk(2)
        for (w, options), m, x in zip(cases, means, rest, strict=True):
            found = model.decode(z, condition=labels, guidance=w, controller=CLOSE, **options)
            torch.testing.assert_close(found, x + mean_of(model, model.t_min, m)[:, 0], rtol=0, atol=2e-3)
        if n == 1:  # else encoding begins at auxiliary variables 0, and not where decoding ended
            back = model.encode(found, condition=labels, guidance=SCALE, controller=CLOSE)
            torch.testing.assert_close(back, z, rtol=0, atol=2e-3)
        for method in ("ode", "euler_maruyama") + (("splitting",) if diffusion == "cld" else ()):
            options = {"method": method, "num_steps": 25, "guidance": SCALE}
            drawn = model.sample(200, condition=torch.zeros(200).long(), **options)
            # 5 standard errors of 400 components of standard deviation 0.6, and as much again for 25 steps
            assert abs(drawn.mean() - (MEANS[2] + SCALE * (MEANS[0] - MEANS[2]))) < 10 * WIDTH / 400**0.5
            torch.testing.assert_close(drawn[7:8], model.sample([7], condition=torch.tensor([0]), **options))


def test_an_interval_guides_rows_by_their_own_noise_level():
    model = gaussian_classes(diffusion={"name": "linear_sde", "clock": "linear"})
    t = torch.tensor([0.05, 0.3, 0.6, 0.9], dtype=torch.float64)
    path = VariancePreserving()  # of the same SDE
    alpha, sigma = path.scales(t)
    torch.testing.assert_close(model.joint.noise_level(t), sigma / alpha)
    u, labels = torch.ones(4, 1, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    null = model.conditions.null
    level = (sigma / alpha).tolist()
    within = model.joint.guided(SCALE, null, (0.9 * level[1], 1.1 * level[2]))
    plain, guided = model.joint(t, u, labels), model.joint.guided(SCALE, null)(t, u, labels)
    found = within(t, u, labels)
    torch.testing.assert_close(found[1:3], guided[1:3])
    torch.testing.assert_close(found[[0, 3]], plain[[0, 3]])
    assert float((guided - plain).abs().min()) > 1e-3
    # no row within it, every row within it, one time for all rows: the null is not asked for nothing
    for time, wanted, rows in ((t[0], plain, 4), (t[1], guided, 8)):
        model.joint.network.rows = 0
        found = within(time, u, labels)
        assert model.joint.network.rows == rows
        torch.testing.assert_close(
            found[[time == v for v in t].index(True)], wanted[[time == v for v in t].index(True)]
        )
    damped = gaussian_classes(diffusion="cld").joint
    c = damped.coefficients(t)
    torch.testing.assert_close(damped.noise_level(t), c.covariance[:, 0, 0].sqrt() / c.mean[:, 0, 0])


def test_guided_local_scores_follow_the_formula():
    class Labelled(nn.Module):
        def forward(self, t: Tensor, x: Tensor, condition: Tensor) -> Tensor:
            return torch.sin(x) * (1 + condition.to(x)[:, None])

    u, y = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64), torch.linspace(-1, 2, 6).double().reshape(3, 2)
    labels, null = torch.tensor([0, 1, 0]), torch.tensor(2)
    for residual in (False, True):
        score = LocalScore(Labelled(), Langevin(shape=(2,)), residual)
        free, given = score(u, y, null.expand(3)), score(u, y, labels)
        for w in (0.0, 1.0, SCALE):
            torch.testing.assert_close(score.guided(w, null)(u, y, labels), free + w * (given - free))


@pytest.mark.parametrize("name", KINDS)
def test_every_score_model_hides_checks_and_guides_alike(name):
    x, labels, t = torch.randn(600, 2, generator=torch.Generator().manual_seed(3)).double(), torch.arange(600) % 2, 0.4
    generator = torch.Generator().manual_seed(0)
    model, seen = made(name, condition_dropout=0.25), []
    hook = model.network.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    model.loss(Batch(x, condition=labels), generator=generator)
    hook.remove()
    hidden = seen[0] == 2
    assert torch.equal(seen[0][~hidden], labels[~hidden])
    assert abs(float(hidden.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 600) ** 0.5

    first = {"num_steps": 2}
    free = model.sample(3, **first)
    torch.testing.assert_close(free, model.sample(3, condition=torch.full((3,), 2), **first), rtol=0, atol=0)
    torch.testing.assert_close(free, model.sample(3, condition=labels[:3], guidance=0.0, **first))
    assert not torch.equal(free, model.sample(3, condition=labels[:3], guidance=2.0, **first))

    plain, sure, blind = made(name, None), made(name, condition_dropout=0.0), made(name, conditional=False)
    assert model.conditional and sure.conditional and not plain.conditional and not blind.conditional
    with pytest.raises(ValueError, match="unconditional model"):
        plain.sample(2, condition=labels[:2])
    with pytest.raises(ValueError, match=r"2 conditions is needed.*found \[3\]"):
        model.sample(2, condition=labels[:3])
    with pytest.raises(ValueError, match="class 7, but there are only 2"):
        model.sample(1, condition=torch.tensor([7]))
    with pytest.raises(ValueError, match=r"2 conditions is needed.*NoneType.*condition_dropout=0"):
        sure.sample(2)
    with pytest.raises(ValueError, match="600 conditions is needed"):
        model.loss(Batch(x), generator=generator)
    z = model.encode(x[:2], num_steps=1, controller=Fixed())
    for other, condition in ((plain, None), (sure, labels[:2])):
        for ask, given in ((other.sample, 2), (other.encode, x[:2]), (other.decode, z)):
            with pytest.raises(ValueError, match=r"guidance 2\.0 needs a conditional model trained with"):
                ask(given, condition=condition, guidance=2.0)
    blind.loss(Batch(x, condition=labels), generator=generator)  # labels that it does not look at
    with pytest.raises(ConfigError, match="0 <= condition_dropout < 1"):
        made(name, condition_dropout=1.0)
    if name != "local_dsm":
        with pytest.raises(ValueError, match="guidance = 1 is off"):
            model.sample(1, interval=(0.1, 1.0))
        with pytest.raises(ValueError, match="0 <= low < high"):
            model.sample(1, guidance=2.0, interval=(1.0, 0.5))
    vectors = made(name, None, (3,), condition_dropout=0.5)
    assert "conditions.null" in vectors.state_dict() and vectors.conditions.null.requires_grad
    vectors.loss(Batch(x, condition=torch.ones(600, 3).double()), generator=generator).value.mean().backward()
    assert float(vectors.conditions.null.grad.abs().min()) > 0
    assert t and not made(name, None, (3,), condition_dropout=0.0).conditions.null.requires_grad


def test_guidance_needs_a_condition_and_asks_once_where_it_can():
    asked = []

    class Counting(nn.Module):
        def forward(self, t: Tensor, x: Tensor, condition: Tensor) -> Tensor:
            asked.append((tuple(t.shape), len(x)))
            return x + condition[:, None]

    x, t, null = torch.zeros(3, 2), torch.tensor([0.1, 0.2, 0.3]), torch.tensor(7.0)
    for scale, expected in ((0.0, 7.0), (1.0, 2.0), (3.0, 7.0 + 3 * (2.0 - 7.0))):
        found = GuidedNetwork(Counting(), scale, null)(t, x, torch.full((3,), 2.0))
        torch.testing.assert_close(found, torch.full((3, 2), expected))
    assert asked == [((3,), 3), ((3,), 3), ((6,), 6)]
    with pytest.raises(ValueError, match="needs a tensor of conditions"):
        GuidedNetwork(Counting(), 3.0, null)(t, x, None)
    told = Conditions(0.1, None, None)
    assert told.drop(torch.zeros(3), BatchNoise(3, generator=None, device=torch.device("cpu"))) is None


@pytest.mark.parametrize("name", KINDS)
def test_no_items_have_no_losses_and_no_likelihoods(name):
    model, none = made(name), torch.zeros(0, 2, dtype=torch.float64)
    labels = torch.zeros(0, dtype=torch.long)
    assert model.loss(Batch(none, condition=labels), generator=torch.Generator()).value.shape == (0,)
    options = {"solver": Euler(), "num_steps": 1, "controller": Fixed()}
    for more in ({}, {"divergence": "hutchinson", "probes": 2}):
        assert model.likelihood(none, condition=labels, **more, **options).value.shape == (0,)
