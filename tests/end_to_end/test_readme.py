"""The README does what it says: its files exist, its commands parse, its example model trains."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genmodels import commands, registry
from genmodels.config import load
from genmodels.editing.sharing import Sharing, estimate
from genmodels.model import Model
from genmodels.schema import MEMBERS
from genmodels.training.grid import grid
from genmodels.training.loop import train
from genmodels.training.run import Run

from .. import tiny_pipelines

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_links_and_pictures_exist():
    local = [t for t in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in t]
    assert [t for t in local if not (ROOT / t.split("#")[0]).exists()] == []
    assert any(t.endswith(".png") for t in local)


def test_board_is_that_of_the_repository():
    board = (ROOT / "evals" / "LEADERBOARD.md").read_text().splitlines()
    shown = [line for line in TEXT.splitlines() if re.match(r"\| *\d.* ± |\| (rank|to read|floor|uniform)", line)]
    assert len(shown) >= 6
    assert [line for line in shown if line not in board] == []


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_figures_of_penalties_are_those_of_the_results():
    """Two lines an experiment, of quality and of evaluations; columns are methods, empty where one was not run."""
    methods = {
        "no penalty": "vanilla",
        "ERNODE": "error_estimate",
        "SRNODE": "stiffness",
        "RNODE": "kinetic_jacobian",
        "predicted steps": "steps",
        "of one step a row": "local-steps",
    }
    told, expected = {}, []
    for line in (ROOT / "evals" / "results" / "regularization.md").read_text().splitlines():
        first, *rest = cells(line) or [""]
        if first.endswith(": method"):
            told[first.removesuffix("method") + rest[0]] = found = {}
        elif " ± " in line:
            found[first] = rest
    for name, found in told.items():
        for k, label in enumerate((name, "NFE")):
            expected.append([label, *(found[m][k] if m in found else "" for m in methods.values())])
    section = TEXT.split("### What penalties on steps do here")[1].split("\n## ")[0]
    head, _, *shown = [cells(line) for line in section.splitlines() if line.startswith("|")]
    assert head[1:] == list(methods) and len(told) >= 5
    assert shown == expected


def test_training_commands_resolve(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    found = [shlex.split(line)[2:] for line in lines if line.startswith("python train.py")]
    assert found
    for words in found:
        given = commands._train_options().parse_intermixed_args(words)
        if given.describe:
            assert registry.describe_name(given.describe)
            continue
        files, overrides = commands.split_words(given.config)
        assert all(plan.name for plan in grid(files, overrides, given.sweep or ()))


def test_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["train.steps=1", "train.batch_size=8", "train.sample_every=0", "train.eval_every=0", "name=try"]
    train(load([ROOT / "configs/digits/flow_matching.yaml"], tiny), quiet=True)
    told: dict = {}
    exec(next(b for b in blocks("python") if "run.load()" in b), told)
    assert told["log_p"].shape == (8,)
    assert not told["log_p"].requires_grad
    assert told["x"].unique().frac().abs().max() == 0  # grey levels


def test_equilibrium_example_runs(capsys):
    torch.manual_seed(0)
    told: dict = {}
    exec(next(b for b in blocks("python") if "RowMap" in b), told)
    found, f = told["found"], told["f"]
    torch.testing.assert_close(f(found.z), found.z, rtol=1e-8, atol=1e-9)
    j = (1 - found.z.square())[:, :, None] * told["weight"]
    lam = torch.linalg.solve(torch.eye(8) - j.mT, 2 * found.z)
    torch.testing.assert_close(told["weight"].grad, ((1 - found.z.square()) * lam).T @ found.z, rtol=1e-5, atol=1e-6)


def test_drift_example_runs(capsys):
    torch.manual_seed(0)
    told: dict = {}
    exec(next(b for b in blocks("python") if "GivenProcess" in b), told)
    assert capsys.readouterr().out.startswith("{'increment': tensor(0.")
    told["loss"].backward()
    assert all(p.grad.isfinite().all() for p in told["model"].network.parameters())
    y, u = told["batch"].x[:4].double(), torch.tensor(0.5, dtype=torch.float64)
    jacobian = (1 - y.square().sum(1))[:, None, None] * torch.eye(2).double() - 2 * y[:, :, None] * y[:, None]
    torch.testing.assert_close(told["model"].process.jacobian(u, y), jacobian)
    torch.testing.assert_close(told["model"].process.ito(u, y), 0.5**2 * -4 * y)  # ½ Q ΔF


@pytest.mark.slow
def test_editing_example_runs(tmp_path, monkeypatch):
    """With a tiny pipeline in place of the downloaded one: it makes what the methods make of the same words."""
    from diffusers import FluxPipeline
    from PIL import Image

    pipe = tiny_pipelines.build("flux")
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda place, **options: pipe)
    monkeypatch.setattr(FluxPipeline, "enable_model_cpu_offload", lambda self: None)
    monkeypatch.chdir(tmp_path)
    photo = torch.rand(19, 21, 3, generator=torch.Generator().manual_seed(0))
    Image.fromarray((255 * photo).byte().numpy()).save("photo.jpg")
    told: dict = {}
    exec(next(b for b in blocks("python") if "of_pipeline" in b), told)
    made, editor = told["made"], told["editor"]
    assert made.nfe == 60 and made.stored > 0
    told["cat"], told["dog"] = editor.prompt("a cat on a sofa"), editor.prompt("a dog on a sofa", guidance=2)
    again = told["edit"](editor, Image.open("photo.jpg"), told["cat"], told["dog"], method=told["RFEdit"](15))
    assert Image.open("edit.png").tobytes() == again.items[0].tobytes() != made.reconstruction[0].tobytes()


def test_rows_of_edits_are_those_of_the_study():
    table = (ROOT / "evals" / "results" / "editing.md").read_text().splitlines()
    shown = ("| setting | success" + TEXT.partition("| setting | success")[2]).partition("\n\n")[0].splitlines()
    assert len(shown) > 10
    assert [line for line in shown if line not in table] == []


@pytest.mark.slow
def test_the_transformer_of_flux_is_of_the_size_that_is_told():
    """The default configuration of diffusers is FLUX.1's; parameters without memory are counted."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        network = FluxTransformer2DModel(guidance_embeds=True)
    assert len(network.single_transformer_blocks) == 38
    assert f"of {2 * sum(p.numel() for p in network.parameters()) / 2**30:.1f} GiB" in TEXT


def test_memory_of_shared_features_is_what_the_estimate_says():
    """FLUX.1-dev: 38 single-stream blocks of width 3,072, a token for 16 x 16 pixels beside 512 of text."""
    rows = re.findall(r"\| (\d+) x \1 \| ([\d,]+) \| (.+) \|", TEXT)
    kinds = [{}, {"steps": 5}, {"steps": 5, "evaluations": "mid"}, {"steps": 1, "blocks": "all"}]
    assert len(rows) == 3
    for side, tokens, cells in rows:
        count = (int(side) // 16) ** 2 + 512
        assert tokens == f"{count:,}"
        for kind, cell in zip(kinds, cells.split(" | "), strict=True):
            layers, evaluations = (38, 1) if kind.get("blocks") else (18, 2)
            size = estimate(Sharing(**kind), layers, count, 3072, 2, evaluations=evaluations) / 2**30
            assert cell == f"{size:.2f} GiB"


def test_solver_example_runs(capsys):
    told: dict = {}
    exec(next(b for b in blocks("python") if "solution.dense" in b), told)
    rates, found = told["rates"], told["solution"].dense(torch.tensor([0.1, 1.0]))
    exact = torch.stack([(-rates * t).exp() for t in (0.1, 1.0)])
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    assert capsys.readouterr().out.startswith("tensor([")


@pytest.mark.slow
def test_data_from_python_are_trained_on_and_sampled(tmp_path, monkeypatch, capsys):
    """The example as it stands; afterwards its run is sampled without the data, which the commands cannot have."""
    code = next(b for b in blocks("python") if "from_tensors" in b)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    told: dict = {}
    exec(code, told)
    assert told["run"].step == 200 and told["run"].meta["data"]["items"] == {"train": 810, "val": 90, "test": 100}
    # near the law N(0, diag(1, 0.09)) that they came from: the mean of log p is -entropy
    found = told["run"].load().log_prob(told["x"]).mean().item()
    law = torch.distributions.Normal(torch.zeros(2), torch.tensor([1.0, 0.3]))
    assert found == pytest.approx(law.log_prob(told["x"]).sum(1).mean().item(), abs=0.3)
    capsys.readouterr()
    assert commands.sample(["runs/mine", "--seeds", "0-7"]) == 0
    with np.load(capsys.readouterr().out.split()[0]) as file:
        assert np.abs(file["arr_0"] - told["run"].load().sample(8).numpy()).max() < 1e-5
    assert commands.train(["runs/mine", "train.steps=300"]) == 2
    assert "data were given from Python: pass them again" in capsys.readouterr().err


def test_example_model_trains_and_samples(tmp_path, monkeypatch, capsys):
    code = next(b for b in blocks("python") if "@register" in b)
    file = next(b for b in blocks("yaml") if "my_gaussian" in b)
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "models.py").write_text(code)
    (tmp_path / "my_gaussian.yaml").write_text(file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = dict(MEMBERS[Model])
    try:
        assert commands.train(["my_gaussian.yaml", "name=mine", "train.optimizer.lr=0.03"]) == 0
        model, data = Run.open("runs/mine").load("model"), load(["my_gaussian.yaml"]).dataset().all("train").x
        # the best isotropic Gaussian: the mean of the data, and their spread about it
        torch.testing.assert_close(model.mean, data.mean(0), rtol=0, atol=0.15)
        assert model.log_scale.exp().square().mean().item() == pytest.approx(data.var(0).mean().item(), rel=0.15)
        assert commands.sample(["runs/mine", "--seeds", "0-7", "sample.temperature=0.5"]) == 0
        assert registry.member(Model, "my_gaussian", "model").__module__ == "my_lab.models"
    finally:
        MEMBERS[Model].clear()
        MEMBERS[Model].update(kept)
        sys.modules.pop("my_lab.models", None)
        sys.modules.pop("my_lab", None)
