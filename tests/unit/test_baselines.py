"""The control models: what they give back, and that checkpoints hold it."""

import math

import pytest
import torch

from genmodels import registry
from genmodels.baselines import Replay, blur_matrix
from genmodels.config import Config
from genmodels.data.digits import Digits
from genmodels.data.memory import InMemory
from genmodels.metrics.neighbours import distances, nearest
from genmodels.model import Model
from genmodels.rng import generator
from genmodels.training.loop import train
from genmodels.training.run import Run
from genmodels.types import Batch


def fitted(name, dataset, **options):
    facts = {"name": name, "data": dataset.registered_name, "model": {"name": name, **options}}
    model = Config(facts).model(dataset.facts())
    model.prepare(list(dataset.batches("train", 100)), generator=generator("baselines"))
    return model.eval()


def test_replay_draws_training_items_of_the_class_asked_for():
    data = Digits()
    model, items = fitted("replay", data), data.all("train")
    asked = torch.arange(10).repeat_interleave(300)
    drawn = model.sample(3000, condition=asked)
    distance, index = nearest(drawn.flatten(1), items.x.flatten(1))
    assert distance.max() == 0
    assert torch.equal(items.condition[index], asked)
    # 300 draws of about 120 items of a class find all but a share e^(-2.5) = 0.08 of them
    assert 0.88 < len(index.unique()) / len(items.x) < 0.96


def test_replay_without_a_class_draws_evenly_from_all():
    data = Digits()
    model, items = fitted("replay", data), data.all("train")
    drawn = model.sample(5000, condition=torch.full((5000,), 10))
    classes = items.condition[nearest(drawn.flatten(1), items.x.flatten(1))[1]].bincount(minlength=10)
    expected = 5000 * items.condition.bincount(minlength=10) / len(items.x)
    assert ((classes - expected).square() / expected).sum() < 27.9  # χ² of 9 degrees of freedom, one in a thousand


def test_replay_draws_each_of_a_few_items_equally_often():
    model = fitted("replay", Plane(3))
    _, index = nearest(model.sample(3000), model.items)
    assert ((index.bincount(minlength=3) - 1000).abs() < 4 * (3000 * 2 / 9) ** 0.5).all()


def test_replay_keeps_its_share_of_every_class():
    data = Digits()
    model, items = fitted("replay", data, share=0.5), data.all("train")
    counts = items.condition.bincount(minlength=10)
    assert torch.equal(model.counts, (counts + 1) // 2)
    _, index = nearest(model.items.flatten(1), items.x.flatten(1))
    assert len(index.unique()) == len(model.items)
    assert torch.equal(items.condition[index].bincount(minlength=10), model.counts)


def test_replay_adds_noise_of_the_scale_asked_for():
    data = Digits()
    model = fitted("replay", data, noise=1.6)
    gap = model.sample(2000, condition=torch.full((2000,), 10)) - fitted("replay", data).sample(
        2000, condition=torch.full((2000,), 10)
    )
    assert abs(gap.mean()) < 4 * 1.6 / 128_000**0.5
    assert gap.std().item() == pytest.approx(1.6, rel=4 / 256_000**0.5)


@pytest.mark.parametrize(("shape", "std"), [((8, 8), 0.8), ((12, 5), 1.3), ((3, 4), 2.0)])
def test_blur_is_that_of_scipy(shape, std):
    from scipy.ndimage import gaussian_filter

    x = torch.rand(shape, generator=generator("blur"), dtype=torch.float64)
    rows, columns = (blur_matrix(n, std) for n in shape)
    torch.testing.assert_close(rows @ x @ columns.T, torch.tensor(gaussian_filter(x.numpy(), std)))
    torch.testing.assert_close(rows.sum(1), torch.ones(shape[0], dtype=torch.float64))


def test_replay_blurs_rows_and_columns():
    from scipy.ndimage import gaussian_filter

    data = Digits()
    plain, blurred = fitted("replay", data), fitted("replay", data, blur=0.8)
    expected = gaussian_filter(plain.items[:5, 0].numpy(), 0.8, axes=(1, 2))
    torch.testing.assert_close(blurred.items[:5, 0], torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_loss_of_replay_is_the_squared_distance_to_its_nearest_item():
    data = Digits()
    model, test = fitted("replay", data), data.all("test")
    assert model.loss(data.all("train")).value.max() == 0
    d = distances(test.x.flatten(1), data.all("train").x.flatten(1)).min(1).values
    torch.testing.assert_close(model.loss(test).value.double(), d.square() / 64, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["replay", "gaussian"])
def test_a_run_of_no_steps_holds_the_fit(name, tmp_path):
    settings = {"steps": 0, "batch_size": 100, "eval_every": 1, "ema": [{"name": "constant", "value": 0.9}]}
    config = Config({"name": name, "data": "digits", "model": {"name": name}, "train": settings})
    run = train(config, root=tmp_path, quiet=True)
    direct = fitted(name, Digits())
    condition = torch.arange(7) if direct.conditional else None
    for weights in ("model", "ema-0.9"):
        loaded = Run.open(tmp_path / name).load(weights)
        assert loaded.sample(7, condition=condition).shape == (7, 1, 8, 8)
        assert loaded.state_dict().keys() == direct.state_dict().keys()
    if name == "replay":
        assert len(loaded.items) == 1197 and loaded.loss(Digits().all("train")).value.max() == 0
    assert run.meta["parameters"] == {"replay": 0, "gaussian": 64 + 64 * 65 // 2}[name]  # a mean and a covariance
    assert run.step == 0 and train(config, root=tmp_path, quiet=True).step == 0


def test_replay_refuses_what_it_cannot_do():
    data = Digits()
    model = fitted("replay", data)
    with pytest.raises(ValueError, match="one class per seed"):
        model.sample(3)
    with pytest.raises(ValueError, match="2 were given for 3"):
        model.sample(3, condition=torch.zeros(2).long())
    with pytest.raises(ValueError, match="only 10 classes"):
        model.sample(1, condition=torch.tensor([11]))
    model.counts[3:] = 0
    with pytest.raises(ValueError, match="no item of the class 4"):
        model.sample(2, condition=torch.tensor([1, 4]))
    fresh = Replay(shape=(2,), num_classes=None)
    with pytest.raises(ValueError, match="no items yet"):
        fresh.sample(2)
    with pytest.raises(ValueError, match="Its data have none"):
        fitted("replay", Plane()).sample(2, condition=torch.zeros(2).long())
    with pytest.raises(ValueError, match="can be blurred"):
        Replay(blur=1.0, shape=(2,), num_classes=None)
    with pytest.raises(ValueError, match="share <= 1"):
        Replay(share=0.0, shape=(2,), num_classes=None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(model.state_dict())


class Plane(InMemory):
    """Correlated normal points."""

    shape, registered_name = (2,), "eight_gaussians"

    def __init__(self, n=400):
        z = torch.randn(n, 2, generator=generator("plane"))
        for split in ("train", "val", "test"):
            self.hold(split, Batch(1 + z @ torch.tensor([[2.0, 0.3], [0.0, 0.5]])))


def test_gaussian_is_the_sample_mean_and_covariance():
    data = Plane()
    model, x = fitted("gaussian", data), data.all("train").x.double()
    law = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov())
    found = model.likelihood(data.all("test").x[:50])
    torch.testing.assert_close(found.value, law.log_prob(x[:50]), rtol=1e-4, atol=1e-4)
    assert found.kind == "exact"
    drawn = model.sample(20_000).double()
    torch.testing.assert_close(drawn.mean(0), x.mean(0), rtol=0, atol=4 * 2.1 / 20_000**0.5)
    torch.testing.assert_close(drawn.T.cov(), x.T.cov(), rtol=0.05, atol=0.03)
    half = fitted("gaussian", data, shrink=0.5)
    shrunk = x.T.cov() * torch.tensor([[1, 0.5], [0.5, 1]])
    law = torch.distributions.MultivariateNormal(x.mean(0), shrunk)
    torch.testing.assert_close(half.log_prob(x[:50].float()), law.log_prob(x[:50]), rtol=1e-4, atol=1e-4)


def test_gaussian_of_digits_has_their_moments_and_a_code_that_beats_uniform_levels():
    """Dequantisation gives the three constant pixels a variance of 1/12, so that the covariance is regular."""
    data = Digits()
    model = fitted("gaussian", data)
    x = data.all("train").x.flatten(1).double()
    root = 8.5 * model.layers.bijections[0].root.double()  # model units are 17/2 levels
    noise = torch.eye(64).double() / 12
    # one draw of the noise for 1197 items: its covariance with a pixel of sd s up to 6.5 is known to s √(1/12/1197),
    # and enters a variance twice
    covariance = root @ root.T
    torch.testing.assert_close(covariance, x.T.cov() + noise, rtol=0, atol=4 * 2 * 6.5 / (12 * 1197) ** 0.5)
    assert covariance[0, 0].item() == pytest.approx(1 / 12, rel=0.15)  # that of 1197 uniform numbers is known to 3 %
    bits = -model.log_prob(data.all("test").x).mean().item() / (64 * math.log(2))
    assert 1.0 < bits < data.baselines()["uniform"]


def test_gaussian_of_too_few_items_says_so():
    data = Plane(2)
    with pytest.raises(ValueError, match="2 items in 2 dimensions is singular"):
        fitted("gaussian", data)
    assert fitted("gaussian", data, shrink=0.1).log_prob(data.all("train").x).isfinite().all()
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        fitted("gaussian", data, shrink=2.0)


def test_they_are_listed():
    assert {"replay", "gaussian"} <= set(registry.names(Model))
