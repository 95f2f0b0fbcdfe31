"""The evaluator asks each question once, pairs answers with metrics, and says what does not apply."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels.data.digits import Digits
from genmodels.evaluation import evaluate as module
from genmodels.evaluation.answers import Interview, conditions
from genmodels.evaluation.evaluate import evaluate, publish, result_path
from genmodels.evaluation.measure import mean_over_blocks, measure
from genmodels.evaluation.protocol import Protocol
from genmodels.evaluation.results import check, read
from genmodels.metrics.features import FeatureExtractor
from genmodels.metrics.metric import Metric
from genmodels.registry import ConfigError, register
from genmodels.rng import generator
from genmodels.solvers.base import integrate
from genmodels.solvers.runge_kutta import Euler
from genmodels.types import Batch, Estimate, Likelihood, NotApplicable, SupportsLogProb, SupportsSample
from tests.evaluation_fakes import (
    LEVELS,
    Broken,
    Classes,
    FakeProtocol,
    FakeRun,
    Levels,
    Points,
    Replay,
    Tap,
    Threshold,
    UniformLevels,
)

ALL = ["frechet", "authenticity", "bits_per_dim", "nll", "accuracy"]


def by_name(result):
    return {m["name"]: m for m in result["metrics"]}


@pytest.fixture
def run(tmp_path):
    options = {"sample": {"passes": 3}, "likelihood": {"as_density": False}}
    return FakeRun(tmp_path / "runs" / "uniform", UniformLevels(), **options)


def protocol(metrics=("frechet", "bits_per_dim"), data=None, **sections):
    sample = {"num_items": 400, "batch_size": 150, **sections.pop("sample", {})}
    return FakeProtocol(data or Levels(), list(metrics), sample=sample, **sections)


def test_uniform_model_costs_the_logarithm_of_the_levels(run):
    result = evaluate(run, protocol(), device="cpu")
    found = by_name(result)
    assert found["bits_per_dim"]["value"] == pytest.approx(math.log2(LEVELS), rel=1e-14)
    assert found["bits_per_dim"]["stderr"] == 0 and found["bits_per_dim"]["kind"] == "pmf"
    assert found["bits_per_dim"]["n"] == 200 and found["FD-pixels"]["n"] == 400
    assert result["cost"]["sample"]["nfe"] == 3 and result["cost"]["likelihood"]["nfe"] == 0
    assert result["model"]["parameters"] == 7 and result["model"]["steps"] == 12
    assert (found["FD-pixels"]["question"], found["bits_per_dim"]["question"]) == ("sample", "likelihood")
    assert found["FD-pixels"]["references"]["floor"] < found["FD-pixels"]["value"]


def test_result_is_valid_and_lies_beside_its_items(run):
    result = evaluate(run, protocol(), device="cpu")
    path = run.path / "eval" / "fake" / "00000012-ema-0.999.json"
    assert path == result_path(run.path, result) and not result["overridden"]
    back, (items, grid) = read(path)
    assert back == check(json.loads(json.dumps(result)))
    assert "bits_per_dim" in items and grid is None  # three numbers are no picture
    assert np.array_equal(items["bits_per_dim"].ids, np.arange(200))
    assert items["bits_per_dim"].values.mean() == pytest.approx(by_name(result)["bits_per_dim"]["value"], rel=1e-14)
    assert result["training"]["commit"] == "abc" and result["environment"]["versions"]["torch"]


def test_batch_size_does_not_change_a_number(run):
    values = []
    for size in (400, 33):
        p = protocol(sample={"batch_size": size}, likelihood={"batch_size": size})
        found = by_name(evaluate(run, p, device="cpu"))
        values.append([found[name][key] for name in ("FD-pixels", "bits_per_dim") for key in ("value", "stderr")])
    assert values[0] == pytest.approx(values[1], rel=1e-10)


def test_each_question_is_asked_once(run, monkeypatch):
    asked = []
    ask = Interview.ask
    monkeypatch.setattr(Interview, "ask", lambda self, q, block=0: (asked.append(q), ask(self, q, block))[1])
    evaluate(run, protocol(ALL), device="cpu")
    assert asked == ["sample", "likelihood"]


def test_what_does_not_apply_is_listed_with_its_reason(run):
    result = evaluate(run, protocol(ALL), device="cpu")
    assert result["not_applicable"] == {"accuracy": "needs predict"}
    assert {"FD-pixels", "authenticity", "bits_per_dim"} <= set(by_name(result))


def test_a_model_that_declines_is_listed_with_its_own_reason(tmp_path):
    data = Levels()
    model = Replay(data)
    result = evaluate(FakeRun(tmp_path / "replay", model), protocol(ALL, data), device="cpu")
    assert result["not_applicable"]["bits_per_dim"] == "it has no density"
    assert "likelihood" not in result["cost"] and "likelihood" not in result["answers"]
    assert by_name(result)["memorised"]["references"] == {"fresh data": 0.0}


class OnlyScores(UniformLevels):
    """Its sampler cannot answer, its likelihood can."""

    def sample(self, seeds, *, condition=None):
        raise NotApplicable("no sampler for this configuration")


@register(Metric, "t_either")
class Either(Metric):
    """Takes samples, or else likelihoods, and declines what it is not told to like."""

    requires = (SupportsSample, SupportsLogProb)

    def __init__(self, likes: bool = True) -> None:
        self.likes = likes

    def start(self, subject):
        self.restart()

    def restart(self):
        self.n = 0

    def update(self, samples, batch):
        if not self.likes:
            raise NotApplicable("it does not like them")
        self.n += len(samples.seeds)

    def compute(self):
        if not self.n:
            raise ValueError("either: no answers were taken in.")
        return {"either": Estimate(float(self.n), None, self.n, "1", "none", "count")}


def test_a_metric_moves_on_to_the_next_capability(tmp_path):
    p = protocol(["t_either", "frechet", "bits_per_dim"])
    result = evaluate(FakeRun(tmp_path / "scores", OnlyScores()), p, device="cpu")
    assert result["not_applicable"] == {"frechet": "no sampler for this configuration"}
    assert by_name(result)["either"]["n"] == 200 and by_name(result)["either"]["question"] == "likelihood"
    assert set(result["cost"]) == {"likelihood"}


def test_a_metric_that_declines_an_answer_is_left_out_and_the_others_go_on(run):
    result = evaluate(run, protocol([{"name": "t_either", "likes": False}, "frechet"]), device="cpu")
    assert result["not_applicable"] == {"t_either": "it does not like them"} and "FD-pixels" in by_name(result)


@register(FeatureExtractor, "t_counting")
class Counting(FeatureExtractor):
    """Pixels, counted by item."""

    label, identity, seen = "counting", "counting-v1", []

    def start(self, dataset, device):
        self.seen.append(("start", tuple(dataset.shape), str(device)))

    def __call__(self, x):
        self.seen.append(len(x))
        return x.flatten(1).double()


def test_features_are_found_once_for_all_metrics(run):
    Counting.seen.clear()
    features = {"features": "t_counting"}
    metrics = [{"name": "frechet", **features}, {"name": "authenticity", **features}]
    found = by_name(evaluate(run, protocol([*metrics, "bits_per_dim"]), device="cpu"))
    starts, counts = (
        [v for v in Counting.seen if isinstance(v, tuple)],
        [v for v in Counting.seen if isinstance(v, int)],
    )
    assert set(starts) == {("start", (3,), "cpu")}
    noise = Levels().size("train")  # the reference "uniform noise" of the distance
    assert sum(counts) == 400 + 300 + 200 + noise  # drawn, training and test items
    plain = by_name(evaluate(run, protocol(["frechet"]), device="cpu"))
    assert found["FD-counting"]["value"] == plain["FD-pixels"]["value"]


def test_classifier(tmp_path):
    p = protocol(["accuracy", "frechet"], Classes())
    result = evaluate(FakeRun(tmp_path / "threshold", Threshold()), p, device="cpu")
    assert by_name(result)["accuracy"]["value"] == 1 and result["cost"]["predict"]["nfe"] == 1
    assert result["not_applicable"] == {"frechet": "needs sample"}
    off = evaluate(FakeRun(tmp_path / "off", Threshold(at=0.0)), p, device="cpu")
    x = Classes().all("test").x[:, 0]
    assert by_name(off)["accuracy"]["value"] == pytest.approx(((x > 0) == (x > 0.5)).double().mean().item())


# ---- conditions, draws, blocks -----------------------------------------------------------------------------------


def test_labels_follow_the_training_marginal(tmp_path):
    data = Levels()
    model = Replay(data)
    evaluate(FakeRun(tmp_path / "replay", model), protocol(["frechet"], data, sample={"num_items": 600}), device="cpu")
    labels = torch.cat(model.conditions)[:600]  # then some are drawn again for their price
    assert labels.bincount().tolist() == (2 * data.all("train").condition.bincount()).tolist()  # 600 = 2 passes of 300
    assert torch.equal(labels[:300], labels[300:]) and not torch.equal(labels[:300], data.all("train").condition)
    assert torch.equal(conditions(model, data, torch.tensor([7, 307]), "train-marginal"), labels[[7, 307]])


def test_other_policies_and_missing_conditions():
    data = Levels()
    model = Replay(data)
    assert torch.equal(
        conditions(model, data, torch.tensor([3, 203]), "test-items"), data.all("test").condition[[3, 3]]
    )
    assert conditions(UniformLevels(), data, torch.arange(3), "train-marginal") is None
    with pytest.raises(NotApplicable, match="needs a condition"):
        conditions(model, Points(), torch.arange(3), "train-marginal")


class Noisy(UniformLevels):
    """log p = -seed of the item."""

    def likelihood(self, x, *, condition=None, seeds=None):
        return Likelihood(-seeds.double(), "stochastic", torch.ones(len(x)))


def test_draws_use_fresh_seeds_and_are_averaged_per_item(tmp_path):
    p = protocol(["bits_per_dim"], likelihood={"draws": 3, "num_items": 10, "batch_size": 4})
    evaluate(FakeRun(tmp_path / "noisy", Noisy()), p, device="cpu")
    _, (items, _) = read(tmp_path / "noisy" / "eval" / "fake" / "00000012-ema-0.999.json")
    expected = (np.arange(10) + 200) / (3 * math.log(2))  # the seeds of item i are i, i + 200, i + 400
    assert np.allclose(items["bits_per_dim"].values, expected, rtol=1e-12)


class TwoLevels(UniformLevels):
    """log p = 0 or -2, by the draw."""

    def likelihood(self, x, *, condition=None, seeds=None):
        return Likelihood(torch.where(seeds < 200, 0.0, -2.0).double(), "exact")


def test_importance_averages_densities_and_not_their_logarithms(tmp_path):
    values = []
    for combine in ("mean", "importance"):
        p = protocol(["bits_per_dim"], likelihood={"draws": 2, "combine": combine})
        result = evaluate(FakeRun(tmp_path / combine, TwoLevels()), p, device="cpu")
        values.append(by_name(result)["bits_per_dim"])
    mean, weighted = (row["value"] * 3 * math.log(2) for row in values)
    assert mean == pytest.approx(1.0) and weighted == pytest.approx(-math.log((1 + math.exp(-2)) / 2))
    assert values[0]["detail"].startswith("2 draws") and values[1]["detail"].startswith("iw-2")
    assert values[1]["kind"] == "bound"


def test_blocks_are_independent_sets_of_seeds(run):
    whole = by_name(evaluate(run, protocol(sample={"num_items": 300, "blocks": 2}), device="cpu"))["FD-pixels"]
    single = by_name(evaluate(run, protocol(sample={"num_items": 300}), device="cpu"))["FD-pixels"]
    assert whole["n"] == 600 and whole["value"] != single["value"]
    assert whole["references"] == single["references"]  # the floor is that of one block
    assert abs(whole["value"] - single["value"]) < 4 * single["stderr"]


def test_mean_over_blocks():
    one = Estimate(1.0, 0.1, 10, "1", "lower", "x", {"floor": 0.5}, torch.zeros(10), ("a",))
    two = Estimate(3.0, 0.1, 10, "1", "lower", "x", {"floor": 0.5}, torch.zeros(10), ("b",))
    mean = mean_over_blocks([one, two])
    assert (mean.value, mean.stderr, mean.n) == (2.0, pytest.approx(1.0), 20)
    assert mean.flags == ("a", "b") and mean.items is None


# ---- options -----------------------------------------------------------------------------------------------------


def test_overrides_change_the_answer_and_the_identity(run):
    plain = evaluate(run, protocol(), device="cpu")
    other = evaluate(run, protocol(), overrides={"sample": {"passes": 5}}, device="cpu")
    assert other["cost"]["sample"]["nfe"] == 5 and other["answers"]["sample"] == {"passes": 5} and other["overridden"]
    assert result_path(run.path, other).name.startswith("00000012-ema-0.999-")
    assert len(list((run.path / "eval" / "fake").glob("*.json"))) == 2
    same = evaluate(run, protocol(), overrides={"sample": {"passes": 3}}, device="cpu")
    assert result_path(run.path, same) == result_path(run.path, plain)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train": {"steps": 1}}, "only sample.*apply to an evaluation"),
        ({"predict": {"k": 1}}, "has no method `predict`"),
        ({"sample": {"steps": 1}}, "unknown"),
    ],
)
def test_overrides_that_make_no_sense(run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(run, protocol(), overrides=overrides, device="cpu")


def test_weights_name_the_file(run):
    evaluate(run, protocol(["t_either"]), weights="model", device="cpu")
    assert (run.path / "eval" / "fake" / "00000012-model.json").is_file()
    best = evaluate(run, protocol(["t_either"]), weights="best", device="cpu")["model"]  # of an earlier step
    assert (run.path / "eval" / "fake" / "00000006-best.json").is_file()
    assert (best["step"], best["samples_seen"]) == (6, 1700)


def test_other_shapes_are_refused(run):
    with pytest.raises(ConfigError, match=r"shape \[2\].*trained on \[3\]"):
        evaluate(run, protocol(["t_either"], Points()), device="cpu")


def test_other_levels_are_refused(run, monkeypatch):
    monkeypatch.setattr(run, "facts", lambda: {"shape": [3], "levels": 32}, raising=False)
    with pytest.raises(ConfigError, match=r"its data have 5 levels, .* was trained on 32 levels"):
        evaluate(run, protocol(["t_either"]), device="cpu")


class Short(UniformLevels):
    def sample(self, seeds, *, condition=None):
        return torch.zeros(len(seeds) - 1, 3)


def test_answers_of_a_wrong_shape_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"150 seeds with shape \[149, 3\]"):
        evaluate(FakeRun(tmp_path / "short", Short()), protocol(), device="cpu")


class SomeBroken(UniformLevels):
    """Infinity in one component of every hundredth sample."""

    def sample(self, seeds, *, condition=None):
        x = super().sample(seeds)
        x[seeds % 100 == 42, 1] = math.inf
        return x


@pytest.mark.parametrize(("model", "broken"), [(Broken(), 400), (SomeBroken(), 4)])
def test_samples_that_are_not_finite_fail_in_the_open(tmp_path, model, broken):
    p = protocol(["frechet", "authenticity", "bits_per_dim"])
    result = evaluate(FakeRun(tmp_path / "broken", model), p, device="cpu")
    drawn = [m for m in result["metrics"] if m["question"] == "sample"]
    assert all(m["value"] is None and m["flags"] == ["failed"] and not m["per_item"] for m in drawn)
    if broken == 400:  # nothing is left that a metric could name its estimates for
        assert not drawn and result["not_applicable"]["frechet"] == "the answers are not finite"
    else:
        assert len(drawn) >= 4
    failed = result["failures"]["sample"]
    assert (failed["items"], failed["of"]) == (broken, 400)
    assert failed["first"] == (list(range(20)) if broken == 400 else [42, 142, 242, 342])
    if hasattr(model, "likelihood") and broken == 4:
        assert by_name(result)["bits_per_dim"]["value"] == pytest.approx(math.log2(LEVELS), rel=1e-14)
    assert "likelihood" not in result["failures"]


class BrokenLater(UniformLevels):
    """Finite in the first block, NaN in the second."""

    def sample(self, seeds, *, condition=None):
        return torch.where((seeds >= 400)[:, None], torch.nan, super().sample(seeds))


def test_a_block_that_fails_fails_the_estimate(tmp_path):
    two = ["frechet", {"name": "frechet", "reference": "test"}]
    p = protocol(two, sample={"blocks": 2})
    result = evaluate(FakeRun(tmp_path / "later", BrokenLater()), p, device="cpu")
    assert {n: (m["value"], m["flags"]) for n, m in by_name(result).items()} == {
        "FD-pixels": (None, ["failed"]),
        "FD-pixels-test": (None, ["failed"]),
    }
    assert result["failures"]["sample"]["items"] == 400 and result["failures"]["sample"]["of"] == 800
    all_bad = evaluate(FakeRun(tmp_path / "all", Broken()), p, device="cpu")
    assert set(all_bad["not_applicable"]) == {"frechet (metrics[0])", "frechet (metrics[1])"}


class GivesUp(UniformLevels):
    """Its solver does not reach the end, for samples of the second batch and for all likelihoods."""

    def sample(self, seeds, *, condition=None):
        if seeds[0] >= 150:
            integrate(lambda t, x: x * torch.inf, torch.ones(1, 1), torch.tensor([1.0, 0.0]), solver=Euler())
        return super().sample(seeds)

    def likelihood(self, x, *, condition=None, seeds=None):
        integrate(lambda t, x: x * torch.inf, torch.ones(1, 1), torch.tensor([1.0, 0.0]), solver=Euler())


def test_a_solver_that_gives_up_is_a_failure_and_no_end(tmp_path):
    result = evaluate(FakeRun(tmp_path / "gives-up", GivesUp()), protocol(["frechet", "bits_per_dim"]), device="cpu")
    assert all(m["value"] is None for m in result["metrics"]) and len(result["metrics"]) == 2
    failed = result["failures"]
    assert failed["sample"]["items"] == 250 and failed["sample"]["first"][0] == 150
    assert failed["likelihood"]["items"] == 200 and "integrate" in failed["sample"]["reason"]


@register(FeatureExtractor, "t_overflows")
class Overflows(FeatureExtractor):
    """Infinite where the first component is 4, as it is for no training item of this seed's choosing."""

    label, identity = "overflows", "overflows-v1"

    def __init__(self, at: float = 4.0) -> None:
        self.at = at

    def __call__(self, x):
        return torch.where((x.flatten(1) == self.at).all(1)[:, None], torch.inf, x.flatten(1)).double()


@register(FeatureExtractor, "t_costly")
class Costly(Counting):
    """Worth keeping on disk."""

    label, identity, costly = "costly", "costly-v1", True


def test_costly_features_of_the_data_are_found_once_for_all_evaluations(run, monkeypatch, tmp_path):
    monkeypatch.setenv("GENMODELS_CACHE", str(tmp_path / "cache"))
    p = protocol([{"name": "prdc", "features": "t_costly"}])
    values, counts = [], []
    for data in (Levels(), Levels(), Levels((299, 20, 200))):  # the last has other training items
        p.dataset = data
        Costly.seen.clear()
        values.append([m["value"] for m in evaluate(run, p, device="cpu")["metrics"]])
        counts.append(sum(v for v in Costly.seen if isinstance(v, int)))
    drawn = 400
    assert counts == [drawn + 300 + 200, drawn, drawn + 299 + 200]
    assert values[0] == values[1] and len(list((tmp_path / "cache" / "features").glob("*.npz"))) == 4


def test_features_that_are_not_finite_are_failures_or_errors(run):
    features = {"name": "t_overflows", "at": 0.0}  # all components 0
    dark = Levels()
    for split in ("train", "test"):
        dark.hold(split, dark.all(split).replace(x=dark.all(split).x.clamp(max=3)))
    p = protocol([{"name": "prdc", "features": {"name": "t_overflows", "at": 4.0}}], dark)
    result = evaluate(run, p, device="cpu")
    assert result["failures"]["sample"]["items"] > 0 and all(m["value"] is None for m in result["metrics"])
    data = Levels()
    data.hold("train", data.all("train").replace(x=torch.zeros(300, 3)))
    with pytest.raises(ValueError, match="300 of 300 items of the split 'train' give NaN or infinity"):
        evaluate(run, protocol([{"name": "frechet", "features": features}], data), device="cpu")


class OffLevel(UniformLevels):
    """Levels and a quarter, and the class that was asked for in the first component; class 1 gives NaN."""

    conditional = True

    def sample(self, seeds, *, condition=None):
        x = super().sample(seeds) + 0.25
        x[:, 0] = condition + 0.25
        return torch.where((condition == 1)[:, None], torch.nan, x)


def test_metrics_see_levels_and_the_conditions_of_what_is_left():
    asked = Interview(OffLevel(), protocol(["frechet"], sample={"num_items": 40}), {"sample": {}})
    kept = [samples for samples, _ in asked.ask("sample")]
    x, condition = torch.cat([s.x for s in kept]), torch.cat([s.condition for s in kept])
    assert torch.equal(x, x.round()) and 0 < len(x) < 40
    assert torch.equal(x[:, 0], condition.float()) and (condition == 0).all()


def test_the_picture_shows_the_first_samples_in_order(tmp_path):
    class Ordered(UniformLevels):
        def sample(self, seeds, *, condition=None):
            return seeds[:, None].float().expand(-1, 3)

    asked = Interview(
        Ordered(), protocol(["t_either"], Points3(), sample={"num_items": 200, "batch_size": 30}), {"sample": {}}
    )
    found = measure(asked, asked.protocol.metrics(), torch.device("cpu"))
    assert torch.equal(found.shown[:, 0], torch.arange(64.0))


class Points3(Points):
    """Continuous items of three components."""

    shape = (3,)

    def __init__(self):
        super().__init__()
        for split in ("train", "val", "test"):
            self.hold(split, Batch(torch.randn(50, 3, generator=generator("points3", split))))


def test_predictions_get_the_numbers_of_their_items_as_seeds(tmp_path):
    class Remembers(Threshold):
        seeds = []  # noqa: RUF012

        def predict(self, batch, *, seeds=None):
            self.seeds.append(seeds)
            return super().predict(batch)

    p = protocol(["accuracy"], Classes(), predict={"batch_size": 70})
    evaluate(FakeRun(tmp_path / "remembers", Remembers()), p, device="cpu")
    assert torch.equal(torch.cat(Remembers.seeds)[:200], torch.arange(200))


def test_too_few_samples_are_told_before_they_are_drawn(run, monkeypatch):
    monkeypatch.setattr(UniformLevels, "sample", lambda *_, **__: pytest.fail("it was drawn"))
    with pytest.raises(ValueError, match="the sample has 5 items for 3 features; at least 6"):
        evaluate(run, protocol(["frechet"], sample={"num_items": 5}), device="cpu")


def test_an_empty_reference_split_does_not_apply(run):
    p = protocol(
        [{"name": "prdc", "reference": "test"}, "bits_per_dim"], Levels((300, 20, 0)), likelihood={"split": "val"}
    )
    assert (
        evaluate(run, p, device="cpu")["not_applicable"]["prdc"] == "the split 'test' of the protocol's data is empty"
    )


def test_what_cannot_be_priced_is_kept(tmp_path):
    class Dear(UniformLevels):
        def sample(self, seeds, *, condition=None):
            if len(seeds) < 3:
                raise RuntimeError("not for so few")
            return super().sample(seeds)

    with pytest.warns(UserWarning, match="operations of `sample` could not be counted: RuntimeError: not for so few"):
        result = evaluate(FakeRun(tmp_path / "dear", Dear()), protocol(["frechet"]), device="cpu")
    assert result["cost"]["sample"]["flops_per_item"] is None and by_name(result)["FD-pixels"]["value"] > 0


def test_half_precision_and_wrong_shapes(tmp_path):
    class Half(UniformLevels):
        def sample(self, seeds, *, condition=None):
            return super().sample(seeds).bfloat16()

        def likelihood(self, x, *, condition=None, seeds=None):
            return Likelihood(torch.zeros(len(x), 3), "exact")

    result = evaluate(FakeRun(tmp_path / "half", Half()), protocol(["frechet"]), device="cpu")
    assert by_name(result)["FD-pixels"]["value"] > 0
    with pytest.raises(
        ValueError, match=r"likelihood: the model answered with a tensor of shape \[\d+, 3\], not \[B\]"
    ):
        evaluate(FakeRun(tmp_path / "half", Half()), protocol(["bits_per_dim"]), device="cpu")


def test_two_metrics_of_one_name_are_refused(run):
    with pytest.raises(ConfigError, match="both report 'FD-pixels'"):
        evaluate(run, protocol(["frechet", {"name": "frechet", "features": "pixels"}]), device="cpu")
    names = by_name(evaluate(run, protocol(["frechet", {"name": "frechet", "reference": "test"}]), device="cpu"))
    assert list(names) == ["FD-pixels", "FD-pixels-test"]


class Grows(UniformLevels):
    """Differentiates inside likelihood, whatever the caller's grad mode."""

    def likelihood(self, x, *, condition=None, seeds=None):
        with torch.enable_grad():
            y = x.double().requires_grad_()
            slope = torch.autograd.grad((y**2).sum(), y)[0]
        return Likelihood(-slope.sum(1), "exact")


def test_gradients_inside_a_likelihood_work_and_nothing_is_kept(tmp_path):
    model = Grows()
    result = evaluate(FakeRun(tmp_path / "grows", model), protocol(["bits_per_dim"]), device="cpu")
    assert by_name(result)["bits_per_dim"]["value"] == pytest.approx(
        2 * Levels().all("test").x.double().sum(1).mean().item() / (3 * math.log(2))
    )
    assert not model.network._forward_hooks and isinstance(model.network, Tap)


def test_publishing_copies_both_files(run, tmp_path):
    result = evaluate(run, protocol(), device="cpu")
    target = publish(result_path(run.path, result), result, tmp_path / "results")
    assert target == tmp_path / "results" / "fake" / "uniform" / "00000012-ema-0.999.json"
    assert read(target)[0]["id"] == result["id"] and "bits_per_dim" in read(target)[1].items
    assert publish(result_path(run.path, result), result, tmp_path / "results") == target  # again, of the same run


def test_publishing_spares_another_run_of_the_same_name(run, tmp_path):
    result = evaluate(run, protocol(), device="cpu")
    target = publish(result_path(run.path, result), result, tmp_path / "results")
    before = target.read_bytes()
    other = FakeRun(tmp_path / "elsewhere" / "uniform", UniformLevels(), sample={"passes": 5}, likelihood={})
    again = evaluate(other, protocol(), device="cpu")
    with pytest.raises(ConfigError, match=r"another configuration.*called 'uniform' too"):
        publish(result_path(other.path, again), again, tmp_path / "results")
    assert target.read_bytes() == before


def test_what_an_interrupted_evaluation_leaves(run, monkeypatch):
    """Nothing, or the result of the one before."""
    with monkeypatch.context() as patch:
        patch.setattr(Interview, "price", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, protocol(), device="cpu")
        assert not (run.path / "eval").exists()
    first = evaluate(run, protocol(), device="cpu")
    path = result_path(run.path, first)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, protocol(), device="cpu")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_pictures_of_drawn_items_lie_beside_the_result(tmp_path):
    class Plane(UniformLevels):
        def __init__(self):
            super().__init__((2,))

    path = tmp_path / "plane"
    result = evaluate(FakeRun(path, Plane()), protocol(["frechet"], Points()), device="cpu")
    _, (_, grid) = read(result_path(path, result))
    assert Image.open(io.BytesIO(grid)).size == (960, 480)  # a scatter plot beside the data


# ---- command -----------------------------------------------------------------------------------------------------


def test_command(run, monkeypatch, capsys, tmp_path):
    protocols = {"fake": protocol(["t_either"])}
    monkeypatch.setattr(module.Run, "open", classmethod(lambda cls, path: run))
    monkeypatch.setattr(module.Protocol, "load", classmethod(lambda cls, name, places: protocols[name]))
    monkeypatch.setattr(module, "tree_of", lambda name: protocols[name].tree)
    assert module.main(["runs/x", "--protocol", "fake", "sample.passes=4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "protocol fake (version 1" in out and "4 evaluations and " in out
    assert module.main(["runs/x"]) == 2 and "names no protocol" in capsys.readouterr().err
    assert module.main(["sample.passes=4"]) == 2 and "no run was given" in capsys.readouterr().err
    assert module.main(["runs/x", "--protocol", "fake", "train.steps=4"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_unfinished_training_is_said(run, monkeypatch, capsys):
    monkeypatch.setattr(module.Run, "open", classmethod(lambda cls, path: run))
    monkeypatch.setattr(module, "tree_of", lambda name: {"dataset": "digits"})
    monkeypatch.setattr(module.Protocol, "load", classmethod(lambda cls, name, places: protocol(["t_either"])))
    module.main(["runs/x", "--protocol", "fake"])
    assert "warning" not in capsys.readouterr().err
    run.config.tree["train"]["steps"] = 5000
    module.main(["runs/x", "--protocol", "fake"])
    assert "at step 12 of 5,000; the leaderboard will not rank it" in capsys.readouterr().err


@pytest.mark.slow
def test_real_data_against_themselves_on_the_shipped_protocol(tmp_path):
    """A model that replays the training digits: found out by every sign of copying, and below the floor by distance."""
    data = Digits()
    result = evaluate(FakeRun(tmp_path / "replay", Replay(data)), Protocol.load("digits_demo"), device="cpu")
    found = by_name(result)
    assert found["memorised"]["flags"] == found["copies"]["flags"] == ["overlap_suspected"]
    assert found["FD-digits"]["value"] < found["FD-digits"]["references"]["floor"]
