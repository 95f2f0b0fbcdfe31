"""Every configuration file in the repository resolves, trains, samples and is scored."""

import math
from pathlib import Path

import pytest

from genmodels.config import Config, load
from genmodels.data.dataset import centred
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import FOLDER, Protocol
from genmodels.networks.network import networks
from genmodels.registry import resolve
from genmodels.training.loop import train
from genmodels.transforms import Transform
from genmodels.types import SupportsLogProb
from tests.data_files import cifar_files, write_cifar_archive, write_pictures, write_sounds, write_table

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "_base")
TINY = ["train.steps=2", "train.batch_size=16", "train.eval_every=0", "train.sample_every=2", "train.eval_items=8"]


def pictures(folder: Path) -> list[str]:
    made = write_pictures(folder / "pictures", 40, 33, 40)
    return [f"data.path={made}", f"data.cache={folder / 'cache'}", "sample.num_steps=2"]


def archive(folder: Path) -> list[str]:
    made = write_cifar_archive(folder / "cifar-10-python.tar.gz", cifar_files())
    return [f"data.path={made}", "data.checksum=ignore", "data.val=10"]


def sounds(folder: Path) -> list[str]:
    made = write_sounds(folder / "sounds", rate=22_050)
    return [f"data.path={made}", "data.segment=1024", "data.val=2", "data.test=4"]


# configurations of the user's own files: what makes such files in a folder, and the overrides that name them
OWN_DATA = {
    "images": pictures,
    "tables": lambda folder: [f"data.path={write_table(folder / 'rows.csv')}"],
    "cifar10": archive,
    "audio": sounds,
}
STEP = "model.layers[1].layers[{}].network"
# networks of millions of parameters are cut down; what they are is tested by their count
SMALL = {
    "cifar10/flow_matching": ["model.network.channels=8", "model.network.head_channels=8", "sample.num_steps=2"],
    "cifar10/edm": ["model.network.channels=8", "model.network.blocks=1", "sample.num_steps=2"],
    "cifar10/glow": [
        f"model.layers[0].levels[{k}][1].{change}"
        for k in range(3)
        for change in ("count=1", "layers[2].network.width=8")
    ],
    "cifar10/nanoflow_glow": [
        f"model.layers[0].levels[{k}][1].{change}"
        for k in range(3)
        for change in ("count=2", "layers[2].network.of.width=8")
    ],
    "audio/waveflow_ljspeech": ["model.layers[1].count=1", *(f"{STEP.format(k)}.channels=4" for k in (0, 1))],
    "audio/nanoflow_ljspeech": ["model.layers[1].count=1", *(f"{STEP.format(k)}.of.channels=4" for k in (0, 1))],
    "cifar10/nsf": ["model.layers[0].layers[1].count=1", "model.layers[0].layers[1].layers[2].network.width=8"],
}


def protocol(config: Config) -> Protocol:
    """The configuration's own, or one such as users write for data that only they have."""
    if config.protocols:
        return Protocol.load(config.protocols[0])
    metrics = [{"name": "nll" if config.dataset().bin_width is None else "bits_per_dim"}]
    return Protocol({"name": "own", "version": 1, "dataset": config.tree["data"], "metrics": metrics})


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_configuration_travels_the_whole_way(path, tmp_path):
    made_up = path.parent.name == "audio" and not path.stem.endswith("_ljspeech")
    make = (lambda folder: []) if made_up else OWN_DATA.get(path.parent.name, lambda folder: [])
    overrides = [*TINY, *make(tmp_path), *SMALL.get(f"{path.parent.name}/{path.stem}", [])]
    config = load([path], overrides)
    assert Config(config.tree).hash == config.hash == load([path], overrides).hash
    assert set(config.protocols) <= {p.stem for p in FOLDER.glob("*.yaml")}
    run = train(config, root=tmp_path, quiet=True)
    drawn = len(config.dataset().shape) == 3 or config.dataset().shape == (2,)
    kinds = ["", ".png"] if path.parent.name == "audio" else [".png"] if drawn else [".npz"]  # WAV files in a folder
    assert sorted(p.suffix for p in (run.path / "samples").iterdir()) == kinds
    full = protocol(config)
    model = run.load()
    names = ("bits_per_dim", "nll") if isinstance(model, SupportsLogProb) else ("authenticity",)
    metrics = [m for m in full.tree["metrics"] if m["name"] in names]
    small = {"sample": {"num_items": 4}, "likelihood": {"num_items": 2}, "metrics": metrics}
    options = (
        {"likelihood": {"controller": "fixed", "num_steps": 2}} if config.tree["model"]["name"] == "diffusion" else {}
    )
    result = evaluate(run, Protocol({**full.tree, **small}), overrides=options)
    values = {row["name"]: row["value"] for row in result["metrics"]}
    assert values and all(row["nfe"] >= 1 or not networks(model) for row in result["cost"].values())
    assert all(math.isfinite(v) for v in values.values())
    assert result["not_applicable"] == {}


def test_frozen_protocols_load_under_their_file_name():
    """Those over data that come with the package; the others are tested where small files of their kinds are made."""
    names = sorted(p.stem for p in FOLDER.glob("*.yaml") if "???" not in p.read_text())
    assert [Protocol.load(n).name for n in names] == names
    assert len({Protocol.load(n).hash for n in names}) == len(names)


@pytest.mark.parametrize(
    ("name", "parameters"), [("flow_matching", 35_746_307), ("edm", 56_524_291), ("nsf", 11_835_054)]
)
def test_recipes_have_the_parameters_that_they_state(name, parameters):
    """What the comments of the files say; flow matching and NSF are derived in the tests of their parts."""
    path = ROOT / "configs" / "cifar10" / f"{name}.yaml"
    config = load([path], blank=True)
    shape = {"shape": [3, 32, 32], "num_classes": None, "condition_shape": None, "target_shape": None}
    node = resolve(Transform, config.tree["data"]["transform"] or centred(256), "data.transform")
    model = config.model({**shape, "bin_width": 1.0, "transform": node})
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{parameters:,}" in path.read_text()
