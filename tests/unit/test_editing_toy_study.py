"""The study of editing by a toy: pictures and what is measured of them, its editor, and the command as a whole."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from evals.studies import editing_toy as study
from genmodels.editing.method import EditMethod
from genmodels.registry import build


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_q, self.norm_k, self.to_v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)


class Block(nn.Module):
    """A single-stream block by the names of its parts."""

    def __init__(self):
        super().__init__()
        self.attn = Projections()

    def forward(self, h):
        return h + self.attn.to_v(h) * torch.sigmoid(self.attn.norm_q(h) * self.attn.norm_k(h))


class Embedding(nn.Module):
    """Of time, by the names of its parts."""

    def __init__(self):
        super().__init__()
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = nn.Linear(256, 1)


class Fake(nn.Module):
    """In place of the transformer: gives its tokens back, or what a few layers make of them under a text."""

    def __init__(self, learns=True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.told, self.proj_out = nn.Linear(study.TEXT, 4), nn.Linear(4, 4)
            self.time_text_embed = Embedding()
            self.single_transformer_blocks = nn.ModuleList(Block() for _ in range(4))
        self.learns = learns

    def forward(self, hidden_states, timestep, pooled_projections, img_ids, **more):
        self.places = img_ids
        if not self.learns:
            return (hidden_states,)
        h = hidden_states * (1 - timestep)[:, None, None] + self.told(pooled_projections)[:, None]
        for block in self.single_transformer_blocks:
            h = block(h)
        return (self.proj_out(h),)


def test_pictures_and_what_is_measured_of_them(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 2
    centres = study.drawn(400, generator)
    assert 1.5 <= float(centres.min()) < 1.6 and 5.4 < float(centres.max()) <= 5.5
    x = study.pictures(centres, labels, generator)
    assert float((study.centre(x) - centres).norm(dim=1).mean()) < 0.12  # by noise, and by blobs that are cut off
    level = study.background(x)
    assert level[labels == 0].mean() == pytest.approx(-0.7, abs=0.15) and bool((level[labels == 0] < 0).all())
    assert level[labels == 1].mean() == pytest.approx(0.7, abs=0.15) and bool((level[labels == 1] > 0).all())
    assert study.figures(x[labels == 1], centres[labels == 1] + torch.tensor([3.0, 4.0]))[1:4] == pytest.approx(
        (1.0, float(level[labels == 1].mean()), 5.0), abs=0.05
    )
    monkeypatch.setattr(study, "NOISE", 0.0)
    again = study.pictures(centres, labels, generator)
    assert float((x - again).std()) == pytest.approx(0.1, rel=0.02)
    top = study.pictures(torch.tensor([[2.0, 5.0]]), torch.tensor([1]), generator)[0, 0]
    assert float(top[2, 5]) == pytest.approx(3.2) and float(top.max()) == float(top[2, 5])
    assert float(top[3, 5]) == pytest.approx(0.7 + 2.5 * 2.718281828 ** (-1 / 2.88))
    assert study.psnr(x, x + 0.039) == pytest.approx(40.0, abs=1e-4)


def test_tokens_are_patches_at_their_places():
    """What a transformer that gives tokens back answers is the picture, and token k lies where it is told."""
    fake = Fake(learns=False)
    editor = study.ToyEditor(fake)
    x = torch.arange(64.0).reshape(1, 1, 8, 8)
    seen = []
    fake.register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True)
    found = editor.velocity(torch.tensor(0.5, dtype=torch.float64), x, study.Prompt(1))
    torch.testing.assert_close(found, x, rtol=0, atol=0)
    for token, (_, row, column) in zip(seen[0][0], fake.places.int().tolist(), strict=True):
        torch.testing.assert_close(token, x[0, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten())


def test_training_is_on_the_straight_path_and_keeps_an_average(monkeypatch):
    """Means of what the network is shown are (1 - t) times those of pictures; after a step 0.9 of it are kept."""
    fake, seen = Fake(), {}
    fake.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    first = copy.deepcopy(fake.state_dict())
    study.train(fake, 1)
    bright = (seen["pooled_projections"] == study.ToyEditor(fake).pooled[1]).all(1)
    assert 10 < int(bright.sum()) < 38
    mean = torch.where(bright, 0.7, -0.7) + 2.5 * 2 * math.pi * 1.2**2 / 64  # the blob's share, but for its cut edges
    apart = seen["hidden_states"].mean((1, 2)) - (1 - seen["timestep"]) * mean
    assert float(apart.abs().mean()) < 0.15  # 64 normal numbers have 0.1 of that
    averaged = copy.deepcopy(fake.state_dict())
    monkeypatch.setattr(study, "KEEP", 0.0)
    last = Fake()
    study.train(last, 1)
    for key, value in last.state_dict().items():
        torch.testing.assert_close(averaged[key], 0.1 * first[key] + 0.9 * value)
    assert not torch.equal(averaged["proj_out.weight"], last.proj_out.weight)


def test_smooth_networks_are_told_no_fast_sines():
    """54 of the 128 frequencies are at most 5 radians per unit of time; the editor itself keeps all."""
    editor = study.ToyEditor(Fake())
    weight = study.smooth(editor).transformer.time_text_embed.timestep_embedder.linear_1.weight
    turns = 1000 * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    kept = editor.transformer.time_text_embed.timestep_embedder.linear_1.weight * torch.cat((turns, turns)).le(5)
    torch.testing.assert_close(weight, kept, rtol=0, atol=0)
    assert int((weight != 0).sum()) == 2 * 54


def test_every_method_can_be_built():
    for node in (*study.EDITS.values(), *(solver.node for solver in study.SOLVERS.values())):
        build(EditMethod, node)
    assert set(study.SHOWN) < set(study.EDITS)


def test_the_command_trains_once_and_tells_what_it_measures(tmp_path, monkeypatch, capsys):
    kept = ("RF-Solver, nothing shared", "V of all 4 blocks, 15 steps", "FlowEdit, 30, n_max 24", "Uni-Inv, 30")
    small = {"STEPS": 60, "ITEMS": 4, "BUDGETS": (8, 13), "RESULTS": tmp_path / "results", "network": Fake}
    small |= {"EDITS": {name: study.EDITS[name] for name in kept}, "SHOWN": kept[:2]}
    small["SOLVERS"] = {name: study.SOLVERS[name] for name in ("Euler", "RF-Solver", "FireFlow")}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    (tmp_path / "results").mkdir()
    fake = Fake()
    losses = study.train(fake, 60)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
    monkeypatch.setattr(sys, "argv", ["editing_toy", "--root", str(tmp_path)])
    study.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "editing_toy.png").stat().st_size > 20_000
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr(sys, "argv", ["editing_toy", "--root", str(tmp_path), "--publish"])
    study.main()
    text = (tmp_path / "results" / "editing_toy.md").read_text()
    assert text == (tmp_path / "editing_toy.md").read_text() and text.strip() in printed
    editor = study.trained(tmp_path)
    for mean, value in zip(fake.parameters(), editor.transformer.parameters(), strict=True):
        torch.testing.assert_close(mean, value, rtol=0, atol=0)
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    for name, nfe in (*zip(kept, (60, 60, 48, 61), strict=True), ("true bright pictures", "")):
        assert rows[name].split(" | ")[1].strip() == str(nfe), name
    # 15 steps of two evaluations, 4 blocks of 16 tokens of 4 numbers in float32
    assert rows[kept[1]].endswith(f" | {15 * 2 * 4 * 16 * 4 * 4:,} |") and rows[kept[0]].endswith(" |  |")
    found = study.reconstructions(editor)
    assert rows["FireFlow"].startswith(f"| FireFlow | {found['FireFlow'][0]:.1f} | {found['FireFlow'][1]:.1f} | ")
    assert rows["FireFlow"].count("|") == 2 + 2 * 2
    assert found["RF-Solver"][1] > found["Euler"][1] + 6  # at most as many evaluations


@pytest.mark.slow
def test_the_network_has_the_size_that_is_said(monkeypatch):
    """116 thousand parameters of diffusers' transformer, of whose single-stream blocks half are the last ones."""
    network = study.network()
    assert sum(parameter.numel() for parameter in network.parameters()) == 115_716
    monkeypatch.setattr(study, "ITEMS", 2)
    editor = study.ToyEditor(network.requires_grad_(False))
    x = study.held_out()[0]
    name = "V of the last 2 blocks, 3 steps"
    _, nfe, stored = study.carried(editor, study.EDITS[name], x, 1)
    assert (nfe, stored) == (60, 2 * 3 * 2 * 2 * 20 * 32 * 4)
