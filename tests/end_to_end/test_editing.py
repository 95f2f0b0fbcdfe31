"""`sample.py RUN --edit` and `--invert`: what they write is what the model makes, and mistakes write nothing."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genmodels import commands
from genmodels.config import Config
from genmodels.editing.pictures import Panel, Scale, read_picture, write_picture, write_strip
from genmodels.training.loop import train
from genmodels.training.run import Run
from tests.unit.fakes import restored

DIT = {"name": "dit", "patch": 2, "width": 16, "depth": 3, "heads": 2}
MODEL = {"name": "diffusion", "network": DIT}
MLP = {"name": "residual_mlp", "hidden": 4, "blocks": 1}
TRAIN = {"steps": 40, "batch_size": 16, "optimizer": {"name": "adam", "lr": 0.02}}
LEVELS = Scale(0.0, 4.0, 5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs on integer pictures 1x4x4 of three classes with the levels 0 … 4; `rf` alone can do what is asked of it."""
    from tests import training_fakes

    runs = {
        "rf": {"data": "t_squares", "model": MODEL, "train": TRAIN},
        "vp": {"data": "t_squares", "model": {**MODEL, "network": MLP, "schedule": "vp"}},
        "free": {"data": "t_squares", "model": {**MODEL, "network": MLP, "conditional": False}},
        "points": {"data": "eight_gaussians", "model": {"name": "diffusion", "network": MLP}},
        "classy": {"data": "t_squares", "model": "t_classy"},
    }
    with restored():
        training_fakes.register_all()
        folder = tmp_path_factory.mktemp("runs")
        for name, tree in runs.items():
            steps = {"steps": 1, "batch_size": 8}
            train(Config({"name": name, "train": steps, **tree}), root=folder, quiet=True)
        yield folder


@pytest.fixture
def ask(root, tmp_path, monkeypatch, capsys):
    """Run sample.py in a folder with rf, vp, … and item.png (test:4, of class 1); status, output and complaint."""
    monkeypatch.chdir(tmp_path)
    for run in root.iterdir():
        Path(run.name).symlink_to(run)
    write_picture(Path("item.png"), Run.open("rf").dataset().take("test", torch.tensor([4])).x[0], LEVELS)

    def ask(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = commands.sample(words)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    yield ask
    for run in root.iterdir():
        shutil.rmtree(run / "edits", ignore_errors=True)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_what_is_written_is_what_the_model_makes(ask):
    options = ["edit.guidance=2", "edit.method.share.blocks=[1,2]", "--num-steps", "6", "--inject-steps", "3"]
    status, out, err = ask("rf", "--edit", "item.png", "--from", "1", "--to", "2", "--npz", *options)
    assert (status, err) == (0, "")
    (folder,) = Path("rf/edits").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["arrays.npz", "edit.json", "edit.png", "reconstruction.png", "source.png", "strip.png"]
    )
    run = Run.open("rf")
    model, x = run.load(), run.dataset().take("test", torch.tensor([4])).x
    given = run.config.options(
        "edit", {"guidance": 2, "method": {"num_steps": 6, "share": {"blocks": [1, 2], "steps": 3}}}
    )
    made = model.edit(x, source=torch.tensor([1]), target=torch.tensor([2]), **given)
    held = np.load(folder / "arrays.npz")
    for name, expected in (("edit", made.x), ("reconstruction", made.reconstruction), ("noise", made.noise)):
        np.testing.assert_allclose(held[name], expected.numpy(), rtol=0, atol=1e-5)
    assert np.abs(held["edit"] - held["source"]).max() > 0.3, "a network that has learnt nothing edits nothing"
    facts = json.loads((folder / "edit.json").read_text())
    apart = float((made.reconstruction - x).double().square().mean())
    assert facts["reconstruction"]["mse"] == pytest.approx([apart], rel=1e-3)
    assert facts["reconstruction"]["psnr"] == pytest.approx([10 * math.log10(16 / apart)], abs=1e-2)
    assert facts["edit_from_source"]["mse"] == pytest.approx([float((made.x - x).square().mean())], rel=1e-4)
    assert (facts["nfe"], facts["from"], facts["to"], facts["items"]) == (24, ["1"], ["2"], ["item.png"])
    tokens, width, floats = 4, 16, 4
    assert facts["stored_bytes"] == 3 * 2 * 2 * tokens * width * floats  # steps, evaluations, layers
    assert facts["options"]["method"]["share"]["blocks"] == [1, 2] and facts["options"]["guidance"] == 2
    assert (facts["run"], facts["weights"], facts["step"], facts["seeds"]) == ("rf", "model", 40, [0])
    psnr = facts["reconstruction"]["psnr"][0]
    assert out.startswith(f"{folder}  (item.png from 1 to 2 by rf_edit, reconstruction {psnr:.1f} dB, edit ")
    assert ", 24 evaluations, " in out
    levels = made.x.round().clamp(0, 4)
    np.testing.assert_array_equal(pixels(folder / "edit.png"), (levels[0, 0] * 255 / 4).round().numpy())
    assert torch.equal(read_picture(folder / "edit.png", (1, 4, 4), LEVELS), levels), "edits can be edited"
    np.testing.assert_array_equal(pixels(folder / "source.png"), pixels(Path("item.png")))
    assert ask("rf", "--edit", "item.png", "--from", "1", "--to", "2", "--npz", *options)[0] == 0
    assert [folder] == list(Path("rf/edits").iterdir()), "the same edit takes the place of the old one"
    for change in (["edit.guidance=3"], ["--seeds", "7"]):
        assert ask("rf", "--edit", "item.png", "--from", "1", "--to", "2", *options, *change)[0] == 0
    assert len(list(Path("rf/edits").iterdir())) == 3, "other options and seeds have folders of their own"


def test_items_of_a_split_know_their_class_and_have_a_row_each(ask):
    words = ("--method", "flowedit", "edit.guidance=3", "--seeds", "5,9", "--out", "made/here")
    status, out, err = ask("rf", "--edit", "test:0", "item.png", *words, "--from", "1", "--to", "2")
    assert (status, err) == (0, "") and "2 items from 1 to 2 by flowedit, reconstruction exact, edit" in out
    facts = json.loads(Path("made/here/edit.json").read_text())
    assert facts["nfe"] == 2 * 24 and facts["reconstruction"] == {"mse": [0, 0], "psnr": [None, None], "ssim": [1, 1]}
    run, both = Run.open("rf"), torch.tensor([0, 4])
    given = run.config.options("edit", {"method": "flowedit", "guidance": 3})
    x = run.dataset().take("test", both).x
    made = run.load().edit(x, source=torch.tensor([1, 1]), target=torch.tensor([2, 2]), seeds=[5, 9], **given)
    for i in range(2):
        expected = (made.x[i, 0].round().clamp(0, 4) * 255 / 4).round().numpy()
        np.testing.assert_array_equal(pixels(Path(f"made/here/edit-{i}.png")), expected)
    assert ask("rf", "--edit", "test:0-4", *words[:3], "--to", "0", "--out", "made/labels")[0] == 0
    facts = json.loads(Path("made/labels/edit.json").read_text())
    assert facts["from"] == ["0", "1", "2", "0", "1"] and facts["items"][4] == "test:4"
    assert ask("rf", "--edit", "test:1", *words[:3], "--seeds", "0-2", "--to", "0", "--out", "made/draws")[0] == 0
    facts = json.loads(Path("made/draws/edit.json").read_text())
    assert facts["items"] == [f"test:1, seed {k}" for k in range(3)]
    assert len(set(facts["edit_from_source"]["mse"])) == 3, "each draw of the method is another edit"


def test_the_noise_of_a_picture(ask):
    status, out, err = ask("rf", "--invert", "item.png", "--from", "1", "--num-steps", "5", "--out", "noise")
    assert (status, err) == (0, "") and "noise of mean square " in out and "10 evaluations" in out
    assert sorted(p.name for p in Path("noise").iterdir()) == sorted(
        ["invert.json", "noise.npz", "reconstruction.png", "source.png", "strip.png"]
    )
    run = Run.open("rf")
    given = run.config.options("edit", {"method": {"num_steps": 5}})
    given = {key: given[key] for key in ("method", "grid", "source_guidance", "interval")}
    x = run.dataset().take("test", torch.tensor([4])).x
    found = run.load().invert(x, source=torch.tensor([1]), **given)
    np.testing.assert_allclose(np.load("noise/noise.npz")["arr_0"], found.noise.numpy(), rtol=0, atol=1e-5)
    facts = json.loads(Path("noise/invert.json").read_text())
    assert facts["noise"]["mean_square"] == pytest.approx([float(found.noise.square().mean())], rel=1e-4)
    assert facts["noise"]["standard_normal"] == {"mean": 1, "standard_deviation": pytest.approx(math.sqrt(2 / 16))}
    assert "amid their cells" in facts["noise"]["remark"] and "to" not in facts
    assert "edit_from_source" not in facts and facts["nfe"] == 10
    status, out, _ = ask("free", "--invert", "test:0", "edit.method.share=null", "--out", "free_noise")
    assert status == 0 and "test:0 by rf_edit" in out
    status, out, _ = ask("points", "--invert", "test:0-3", "--method", "vanilla", "--out", "points_noise")
    assert status == 0 and "reconstruction MSE " in out
    assert sorted(p.name for p in Path("points_noise").iterdir()) == ["arrays.npz", "invert.json", "noise.npz"]


EDIT = ("rf", "--edit", "item.png", "--from", "1", "--to", "2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rf", "--edit", "wide.png", "--from", "1", "--to", "2"), "wide.png is 6 x 4 pixels, grey (1 channel), and "
         "the items of the model are 4 x 4 pixels, grey (1 channel). Give a picture like those, or add --resize"),
        (("rf", "--edit", "red.png", "--from", "1", "--to", "2"), "red.png is 4 x 4 pixels, of colour (3 channels)"),
        (("rf", "--edit", "text.png", "--from", "1", "--to", "2"), "text.png is no image that Pillow can read"),
        (("rf", "--edit", "none.png", "--from", "1", "--to", "2"), "none.png: there is no such picture. Give a file"),
        (("rf", "--edit", "test:30", "--to", "2"), "test:30: the split 'test' has items 0 … 29"),
        (("rf", "--invert", "test:4", "edit.guidance=3"), "edit.guidance: is that of an edit; an inversion is guided"),
        (("rf", "--edit", "test:a", "--to", "2"), "test:a: 'a' is no item and no range"),
        (("vp", "--edit", "item.png", "--from", "1", "--to", "2"), "not a rectified flow: model.schedule is 'vp'"),
        (("vp", "--invert", "item.png"), "not a rectified flow"),
        (("free", "--edit", "item.png", "--from", "1", "--to", "2"), "--from: the model was not trained on classes"),
        (("free", "--edit", "item.png"), "--edit: the model was not trained on classes"),
        (("points", "--edit", "item.png"), "items of shape [2] are no pictures and come from no file"),
        (("classy", "--edit", "item.png"), "model 't_classy' does not edit. Take a rectified flow"),
        ((*EDIT[:4], "3", *EDIT[5:]), "--from 3: there is no such class; there are 0 … 2"),
        ((*EDIT[:6], "cat"), "--to cat: there is no such class"),
        ((*EDIT, "--method", "rf_edti"), "no EditMethod is called 'rf_edti'. Did you mean 'rf_edit'?"),
        ((*EDIT, "--method", "none"), "Known: ab2, "),
        ((*EDIT, "--num-steps", "0", "--inject-steps", "0"), "num_steps: at least 1 is needed, found 0"),
        ((*EDIT, "--inject-steps", "16"), "'rf_edit' can share from 0 to its 15 steps, found 16"),
        ((*EDIT, "--method", "flowedit", "--inject-steps", "2"), "'flowedit' shares no features. Methods that do: ab2"),
        ((*EDIT, "edit.method.share.blocks=[blocks.7]"), "blocks.7"),
        ((*EDIT, "--invert", "item.png"), "--edit and --invert: choose one"),
        (("rf", "--edit", "item.png", "--to", "2"), "--from: say which class the pictures show"),
        (EDIT[:5], "--to: say which class the edits shall show"),
        (("rf", "--invert", "item.png", "--to", "2"), "--to: is for --edit; an inversion has no target"),
        (("rf", "--invert", "item.png", "--inject-steps", "2"), "--inject-steps: is for --edit; an inversion shares"),
        (("rf", "--invert", "item.png", "--method", "flowedit"), "'flowedit' does not invert"),
        (("rf", "--edit", "edit.guidance=2", "--from", "1", "--to", "2"), "--edit: no picture was given"),
        ((*EDIT, "edit.guidanc=2"), "edit: Key 'guidanc' not in"),
        ((*EDIT, "sample.num_steps=2"), "only overrides of edit.* apply to edits, found sample.*"),
        ((*EDIT, "--batch-size", "0"), "batch_size must be at least 1, found 0"),
        ((*EDIT, "--condition", "2"), "--condition: is for samples. Say --from and --to"),
        ((*EDIT, "--seeds", "0-1", "--out", "full"), "--out: full exists, and holds no edit that could be replaced"),
        (("rf", "--edit", "test:0", "test:1", "--to", "2", "--seeds", "0-2"), "2 seeds are needed, one per item"),
        (("rf", "--to", "2"), "--to: is for --edit and --invert"),
        (("rf", "--inject-steps", "2"), "--inject-steps: is for --edit and --invert"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message_and_write_nothing(ask, words, message):
    Image.new("L", (6, 4)).save("wide.png")
    Image.new("RGB", (4, 4)).save("red.png")
    Path("text.png").write_text("no picture")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("kept")
    before = sorted(map(str, Path().rglob("*")))
    status, out, err = ask(*words)
    assert (status, out) == (2, "") and err.startswith("error: ") and message in err
    assert sorted(map(str, Path().rglob("*"))) == before and not Path("rf/edits").exists()


def test_a_failure_on_the_way_leaves_no_folder(ask, monkeypatch):
    monkeypatch.setattr("genmodels.editing.command.write_strip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(*EDIT, "--out", "half")
    assert not Path("half").exists() and not list(Path().glob(".writing*"))


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_levels_are_read_as_they_are_written(tmp_path):
    """Every level of every number of levels, and a straight line between black and white for what is none."""
    for levels in (2, 5, 17, 256):
        scale = Scale(0.0, 3.0 * (levels - 1), levels)
        x = 3.0 * torch.arange(levels, dtype=torch.float32)
        assert torch.equal(scale.values(scale.pixels(x)), x)
    assert Scale(0.0, 16.0, 17).values(torch.tensor([100], dtype=torch.uint8)).item() == pytest.approx(1600 / 255)
    assert LEVELS.pixels(torch.tensor([2.4, -3.0, 9.0, math.nan])).tolist() == [128, 0, 255, 0]
    line = Scale(-1.0, 1.0)
    assert line.values(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([-1, -0.6, 1])
    colours = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)).float()
    scale = Scale(0.0, 255.0, 256)
    back = read_picture(write_picture(tmp_path / "c.png", colours, scale), (3, 5, 7), scale)
    assert torch.equal(back, colours[None])


def test_other_sizes_are_cropped_averaged_and_converted_if_asked(tmp_path):
    """A grey picture 4x8 of squares 2x2 amid margins, as colours: the squares are the pixels of the item."""
    inner = np.array([[0, 80], [160, 240]], dtype=np.uint8)
    whole = np.full((4, 8), 9, dtype=np.uint8)
    whole[:, 2:6] = (
        inner.repeat(2, 0).repeat(2, 1) + np.array([[0, 4], [8, 12]]).astype(np.uint8)[[0, 1] * 2][:, [0, 1] * 2]
    )
    Image.fromarray(whole).convert("RGB").save(tmp_path / "p.png")
    found = read_picture(tmp_path / "p.png", (1, 2, 2), Scale(0.0, 255.0), resize=True)
    np.testing.assert_allclose(found[0, 0].numpy(), inner + 6, atol=1e-4)
    Image.fromarray(inner).save(tmp_path / "q.png")
    assert read_picture(tmp_path / "q.png", (3, 6, 6), Scale(), resize=True).shape == (1, 3, 6, 6)


def test_a_strip_shows_every_stage_of_every_item(tmp_path):
    """Enlarged pixels are found where the layout puts them: a column for each stage, a row for each item or video."""
    x = torch.tensor([[[[0.0, 4.0], [2.0, 1.0]]], [[[4.0, 4.0], [0.0, 3.0]]]])
    panels = [Panel("source", x), Panel("edit", 4 - x)]
    sheet = pixels(write_strip(tmp_path / "s.png", panels, ["a", "b"], LEVELS))
    cells = _cells(sheet, 112)
    assert len(cells) == 4
    expected = [x[0, 0], 4 - x[0, 0], x[1, 0], 4 - x[1, 0]]
    for cell, item in zip(cells, expected, strict=True):
        np.testing.assert_array_equal(cell[28::56, 28::56, 0], (item * 255 / 4).round().numpy())
    video = torch.stack((x, 4 - x), 2)  # two videos of two frames
    sheet = pixels(write_strip(tmp_path / "v.png", [Panel("source", video), Panel("edit", video)], ["a", "b"], LEVELS))
    row = sheet[8 : 8 + 112]
    left = np.flatnonzero((row == 96).all((0, 2)))[0]  # the margin between the frames
    np.testing.assert_array_equal(row[28::56, left - 112 + 28 : left : 56, 0], (x[0, 0] * 255 / 4).round().numpy())
    np.testing.assert_array_equal(
        row[28::56, left + 56 + 28 :: 56, 0][:, :2], ((4 - x[0, 0]) * 255 / 4).round().numpy()
    )
    assert sheet.shape[0] == 8 + 4 * 120


def _cells(sheet: np.ndarray, side: int) -> list[np.ndarray]:
    """Squares of a strip of images, from the gaps of 8 pixels at its right and its bottom."""
    height, width = sheet.shape[:2]
    rights, bottoms = [width - 8 - 120, width - 8], [height - 8 - 120, height - 8]
    return [sheet[b - side : b, r - side : r] for b in bottoms for r in rights]
