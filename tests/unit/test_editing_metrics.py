"""Editing in evaluations: which items go to which class, what the metrics say of known edits, and how it is told."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from genmodels.data.digits import Digits
from genmodels.diffusion.model import DiffusionModel
from genmodels.diffusion.schedules import VariancePreserving
from genmodels.editing.by_inversion import Vanilla
from genmodels.evaluation.answers import Interview, target_classes
from genmodels.evaluation.assemble import leaderboard
from genmodels.evaluation.drawing import distinct, scatter
from genmodels.evaluation.evaluate import PUBLISHED, evaluate
from genmodels.evaluation.measure import measure
from genmodels.evaluation.protocol import FOLDER, Protocol
from genmodels.evaluation.results import identify
from genmodels.metrics.editing import EditDistance, EditSuccess, Reconstruction, peak
from genmodels.metrics.features import DigitsFeatures, Pixels
from genmodels.metrics.metric import Subject
from genmodels.networks.mlp import MLP
from genmodels.rng import generator
from genmodels.transforms import Affine
from genmodels.types import Edited, NotApplicable, Samples
from tests.board_results import example, metric
from tests.evaluation_fakes import FakeProtocol, FakeRun, Glyphs, Levels, _Base

METRICS = ["edit_success", {"name": "edit_distance", "features": "pixels"}, "reconstruction", "edit_memory"]


class Replacer(_Base):
    """Edits to the training item of the target class with the number of the seed; it records what it was asked."""

    conditional = True

    def __init__(self, dataset, lost=0.5):
        super().__init__(dataset.shape)
        self.dataset, self.lost, self.asked = dataset, lost, []

    def edit(self, x, *, source, target, seeds=None, reconstruct: bool = True, strength: float = 1.0):
        self.asked.append((source, target, seeds, reconstruct))
        train = self.dataset.all("train")
        for _ in range(2 if reconstruct else 1):
            x = self.network(None, x)
        same = (train.condition[None] == target[:, None]).double()
        made = x + strength * (train.x[same.argmax(1)] - x) + 0.2  # off the levels
        return Edited(made, x + self.lost if reconstruct else None, None, 1, 40 * len(x))


def run_of(tmp_path, model, **edit):
    return FakeRun(tmp_path / "runs" / "fake", model, edit={"reconstruct": True, "strength": 1.0} | edit)


def found_by(result):
    return {m["name"]: m for m in result["metrics"]}


# ---- which edits ---


def test_every_item_goes_to_another_class_and_all_pairs_occur():
    labels, items = torch.arange(3600) // 90 % 10, torch.arange(3600)
    target = target_classes(labels, items, 10)
    counts = torch.zeros(10, 10).index_put((labels, target), torch.ones(3600), accumulate=True)
    assert torch.equal(counts, 40 * (1 - torch.eye(10)))
    assert target_classes(torch.tensor([3, 9]), torch.tensor([8, 0]), 10).tolist() == [2, 0]
    with pytest.raises(NotApplicable, match="the data have only one"):
        target_classes(labels, items, 1)


def test_the_question_is_asked_of_the_split_and_priced_without_reconstruction(tmp_path):
    data, model = Glyphs(), Replacer(Glyphs())
    protocol = FakeProtocol(data, METRICS, edit={"split": "test", "num_items": 150, "batch_size": 100})
    result = evaluate(run_of(tmp_path, model), protocol, device="cpu")
    items = data.all("test")[:150]
    (source, target, seeds, first), (_, own, _, second) = model.asked[:2]
    assert torch.equal(source, items.condition[:100]) and torch.equal(seeds, torch.arange(100))
    assert torch.equal(target, (source + 1 + torch.arange(100) % 9) % 10) and torch.equal(own, source)
    assert (first, second) == (False, True) and len(model.asked[2][0]) == 50
    assert not any(asked[3] for asked in model.asked[4:])  # what is timed again is the edit alone
    assert result["cost"]["edit"]["nfe"] == 1 and result["cost"]["edit"]["items"] == 150
    found = found_by(result)
    assert {m["question"] for m in found.values()} == {"edit"} and all(m["n"] == 150 for m in found.values())
    whole = items.x.double()
    train = data.all("train")
    wanted = torch.stack(
        [train.x[train.condition == t][0] for t in target_classes(items.condition, torch.arange(150), 10)]
    )
    off = (wanted.double() - whole).square().flatten(1)  # + 0.2 is rounded away
    assert found["edit_distance"]["value"] == pytest.approx(off.mean(1).sqrt().mean().item(), rel=1e-12)
    assert found["edit_feature_distance"]["value"] == pytest.approx(off.sum(1).sqrt().mean().item(), rel=1e-12)
    assert found["reconstruction_mse"]["value"] == pytest.approx(0.25, rel=1e-6)  # and this is not
    assert found["edit_memory"]["value"] == 40 and found["edit_memory"]["stderr"] is None


def test_options_of_edits_are_part_of_a_results_identity(tmp_path):
    data = Glyphs()
    protocol = FakeProtocol(data, METRICS, edit={"num_items": 20})
    run = run_of(tmp_path, Replacer(data))
    own, other = (evaluate(run, protocol, overrides=o, device="cpu") for o in (None, {"edit": {"strength": 0.5}}))
    assert own["answers"] == {"edit": {"reconstruct": True, "strength": 1.0}} and not own["overridden"]
    assert other["answers"]["edit"]["strength"] == 0.5 and other["overridden"]
    names = sorted(path.name for path in (run.path / "eval" / "fake").glob("*.json"))
    assert len(names) == 2 and names[0].startswith("00000012-ema-0.999-")
    (board,) = leaderboard([own, other])
    assert sorted(row.label for row in board.rows) == ["fake", "fake edit.strength=0.5"]
    # how a run would edit is no part of a row that was asked something else
    asked = [example(config={"edit": edit}, seed=0) for edit in ({}, {"strength": 0.5})]
    assert len(leaderboard(asked)[0].rows) == 1


def test_what_cannot_be_edited_is_said(tmp_path):
    data = Glyphs()
    protocol = FakeProtocol(data, METRICS, edit={"num_items": 20})
    result = evaluate(run_of(tmp_path, Replacer(data), reconstruct=False), protocol, device="cpu")
    assert result["not_applicable"] == {
        "reconstruction": "reconstructions were not asked for: edit.reconstruct is false"
    }
    assert set(found_by(result)) == {"edit_success", "edit_distance", "edit_feature_distance", "edit_memory"}
    free = Replacer(data)
    free.conditional = False
    result = evaluate(run_of(tmp_path, free), protocol, device="cpu")
    assert set(result["not_applicable"].values()) == {
        "edits go from class to class; the model or the protocol's data have none"
    }
    assert list(Interview(free, protocol, {}).bills) == []
    result = evaluate(FakeRun(tmp_path / "unable", _Base(data.shape)), protocol, device="cpu")
    assert set(result["not_applicable"].values()) == {"needs edit"}


def test_a_rectified_flow_is_asked():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = partial(MLP, hidden=(8,))
        facts = {"shape": (1, 8, 8), "transform": Affine(loc=8.0, scale=8.0), "num_classes": 10, "bin_width": 1.0}
        model = DiffusionModel(network, condition_shape=None, **facts, conditional=True).eval()
    protocol = FakeProtocol(Glyphs(), METRICS, edit={"num_items": 12})
    interview = Interview(model, protocol, {"edit": {"reconstruct": True, "method": Vanilla(num_steps=10)}})
    found = measure(interview, protocol.metrics(), torch.device("cpu"))
    assert found.refused == {} and interview.bills["edit"].nfe == 20  # of Euler's method up and down
    made = model.edit(
        Glyphs().all("test").x[:12],
        source=torch.arange(12) % 10,
        target=target_classes(torch.arange(12) % 10, torch.arange(12), 10),
        method=Vanilla(num_steps=10),
    )
    errors = (made.reconstruction - Glyphs().all("test").x[:12]).double().square().flatten(1).mean(1)
    assert found.estimates[2, "reconstruction_mse"].value == pytest.approx(errors.mean().item(), rel=1e-5) != 0
    assert torch.equal(found.shown, made.x.round().clamp(0, 16))
    rounded = (made.x.round().clamp(0, 16) - Glyphs().all("test").x[:12]).double().square().flatten(1).mean(1).sqrt()
    assert found.estimates[1, "edit_distance"].value == pytest.approx(rounded.mean().item(), rel=1e-6)
    model.denoiser.schedule = VariancePreserving()
    refused = measure(interview, protocol.metrics(), torch.device("cpu")).refused
    assert len(refused) == 4 and all("not a rectified flow" in reason for reason in refused.values())


def test_protocols_without_edits_keep_their_hash():
    path = next((PUBLISHED / "digits_classify").rglob("*.json"))
    protocol = Protocol.load("digits_classify")
    assert json.loads(path.read_text())["protocol"]["hash"] == protocol.hash
    assert "edit" not in protocol.portable
    protocol = Protocol.load("digits_edit")
    assert protocol.portable["edit"] == {"split": "test", "num_items": None, "batch_size": 120}
    assert protocol.dataset.size("test") >= 200 and Path(FOLDER / "digits_edit.yaml").is_file()


# ---- what metrics say ---


def subject(data):
    return Subject(_Base(data.shape), data, torch.device("cpu"), 64)


def test_success_is_what_the_classifier_says():
    """Real digits as edits: of the class that was asked for, of the next one, and left as they were."""
    data = Digits()
    items = data.all("test")
    target = target_classes(items.condition, torch.arange(len(items)), 10)
    order = torch.stack([(items.condition == t).nonzero()[0, 0] for t in range(10)])
    good = [k for k in range(10) if DigitsFeatures().classify(items.x[order[k : k + 1]]).item() == k]
    assert len(good) >= 8
    sure = torch.isin(target, torch.tensor(good)) & torch.isin((target + 1) % 10, torch.tensor(good))
    for shift, share in ((0, 1.0), (1, 0.0)):
        success = EditSuccess()
        success.start(subject(data))
        batch, wanted = items[sure], target[sure]
        success.update(
            Samples(torch.arange(len(batch)), x=items.x[order[(wanted + shift) % 10]], condition=wanted), batch
        )
        found = success.compute()["edit_success"]
        assert found.value == share and found.references["real items"] > 0.97
    success.restart()
    success.update(Samples(torch.arange(len(items)), x=items.x, condition=target), items)
    left = success.compute()["edit_success"]
    assert left.value == left.references["unedited items"] < 0.01
    p, n = left.value, len(items)
    assert left.stderr == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)), rel=1e-9)


def test_distances_and_their_references():
    data = Glyphs()
    items, train = data.all("test")[:30], data.all("train")
    target = (items.condition + 3) % 10
    distance = EditDistance()
    distance.start(subject(data))
    distance.update(Samples(torch.arange(30), x=items.x + 2, condition=target), items)
    found = distance.compute()["edit_distance"]
    assert found.value == 2 and found.stderr == 0 and set(distance.compute()) == {"edit_distance"}
    near, mean = [], []
    for x, t in zip(items.x, target, strict=True):
        others = (train.x[train.condition == t] - x).double().square().flatten(1).mean(1).sqrt()
        near.append(others.min())
        mean.append(others.mean())
    assert found.references["nearest of the class"] == pytest.approx(sum(near).item() / 30, rel=1e-6)
    assert found.references["of the class"] == pytest.approx(sum(mean).item() / 30, rel=1e-6)


def test_reconstructions_of_known_noise():
    data = Glyphs()
    items = data.all("test")[:40]
    sign = torch.where(torch.rand(items.x.shape, generator=generator("sign")) < 0.5, -1.0, 1.0)
    assert peak(data) == 16.0
    metric = Reconstruction()
    metric.start(subject(data))
    metric.update(Samples(torch.arange(40), x=items.x, reconstruction=items.x + 0.5 * sign), items)
    found = metric.compute()
    assert found["reconstruction_mse"].value == 0.25
    assert found["reconstruction_psnr"].value == pytest.approx(20 * math.log10(32), rel=1e-12)
    assert 0.9 < found["reconstruction_ssim"].value < 1 and "reconstruction_lpips" not in found
    metric.restart()
    metric.update(Samples(torch.arange(40), x=items.x, reconstruction=items.x), items)
    assert metric.compute()["reconstruction_psnr"].value == pytest.approx(144.494, abs=1e-3)
    metric.start(subject(Levels()))  # no pictures
    vectors = Levels().all("test")[:5]
    metric.update(Samples(torch.arange(5), x=vectors.x, reconstruction=vectors.x + 1), vectors)
    assert set(metric.compute()) == {"reconstruction_mse", "reconstruction_psnr"}


def test_what_metrics_refuse(monkeypatch, tmp_path):
    for features, data, message in (
        (Pixels(), Glyphs(), "'pixels' tell no classes apart, the data have 10"),
        (DigitsFeatures(), Levels(), "'digits' tell 10 classes apart, the data have 2"),
    ):
        with pytest.raises(NotApplicable, match=message):
            EditSuccess(features).start(subject(data))
    with pytest.raises(NotApplicable, match="those of no classifier"):
        Pixels().classify(torch.zeros(1, 2))
    monkeypatch.setenv("GENMODELS_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("genmodels.metrics.weights.CACHE", tmp_path / "none")
    for ask in (lambda m: m.fingerprint, lambda m: m.start(subject(Glyphs()))):
        with pytest.raises(ValueError, match=r"LPIPS 'alex': no weights in .*alexnet"):
            ask(Reconstruction(lpips="alex"))


# ---- the board ---


def edited(name, success, distance, nfe):
    metrics = [
        metric("edit_success", success, 0.01, 0, "higher", "edit"),
        metric("edit_distance", distance, 0.05, 1, "lower", "edit"),
    ]
    bill = {"items": 100, "nfe": nfe, "seconds": 2.5, "seconds_per_item": 0.025, "batch_size": 50}
    return example(
        name, metrics, cost={"edit": bill | {"flops_per_item": 1, "peak_memory": 1}}, config={"model": {"name": name}}
    )


def test_success_is_drawn_against_what_is_kept():
    rows = [edited("strong", 0.99, 6.0, 10.0), edited("weak", 0.6, 2.0, 30.0), edited("poor", 0.5, 5.0, 60.0)]
    (board,) = leaderboard([*rows, edited("worse", 0.9, 7.0, 5.0)])
    trade = board.frontiers[0]
    assert (trade.metric, trade.cost) == ("edit_success", "edit_distance") and trade.comparable
    standing = dict(zip([row.name for row in board.rows], trade.standing, strict=True))
    assert standing == {"strong": "front", "weak": "front", "poor": "dominated", "worse": "dominated"}
    drawn = scatter(board, trade, "p0")
    assert ">edit success against edit distance ↓<" in drawn and "weak: 0.600 ± 0.010 at 2" in drawn
    # the axis is linear: distances 2, 5, 6, 7 keep their ratios
    places = {}
    for part in drawn.split('<g class="point ')[1:]:
        places[part.split("<title>")[1].split(":")[0]] = float(part.split('cx="')[1].split('"')[0])
    steps = [places[b] - places[a] for a, b in (("weak", "poor"), ("poor", "strong"), ("strong", "worse"))]
    assert steps == pytest.approx([3 * steps[2], steps[2], steps[2]], abs=0.4)  # drawn to a tenth
    (plain,) = leaderboard([example("a"), example("b", seed=1, metrics=[metric(value=2.0)])])
    assert {f.cost for f in plain.frontiers} == {"nfe", "parameters", "training"}


def test_drawings_of_one_run_name_options_and_spread_shares_evenly():
    labels = ["run", "run e.m.name=a e.m.n=28 e.m.k=0", "run e.m.name=b e.m.n=28 e.s=2", "run e.m.name=b e.m.n=8 e.s=2"]
    assert distinct(labels) == ["run", "a", "b n=28", "b n=8"]
    twins = [labels[1], labels[1].replace("run", "other")]
    assert distinct(twins) == twins  # what would be the same stays as it is
    rows = []
    for k, success in enumerate((0.02, 0.5, 0.98)):
        answers = {"answers": {"edit": {"n": k}}, "config": {"edit": {"n": 0}}}
        share = metric("edit_success", success, 0.001, 0, "higher", "edit", unit="share")
        made = example("run", [share, metric("edit_distance", 1.0 + k, 0.1, 1, "lower", "edit")], **answers)
        made["overridden"] = k > 0
        rows.append(made | {"id": identify(made)})
    (board,) = leaderboard(rows)
    assert [f.cost for f in board.frontiers] == ["edit_distance", "nfe"]  # the sizes of one model are one
    drawn = scatter(board, board.frontiers[0], "p0")
    heights = sorted(float(part.split('cy="')[1].split('"')[0]) for part in drawn.split('<g class="point ')[1:])
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=0.2)
    assert ">n=2</text>" in drawn and ">run</text>" in drawn
