"""Every configuration file in the repository resolves, trains, samples and is scored."""

import math
from pathlib import Path

import pytest

from genmodels.config import Config, load
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import FOLDER, Protocol
from genmodels.training.loop import train
from tests.data_files import write_pictures

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "_base")
TINY = ["train.steps=2", "train.batch_size=16", "train.eval_every=0", "train.sample_every=2", "train.eval_items=8"]


def given(config: str, folder: Path) -> list[str]:
    """What a user must say of data that are not in the package."""
    if config != "images":
        return []
    pictures = write_pictures(folder / "pictures", 40, 33, 40)
    return [f"data.path={pictures}", f"data.cache={folder / 'cache'}", "sample.num_steps=2"]


def of_own_data(config: Config) -> Protocol:
    """A protocol such as users write for data that only they have."""
    metrics = [{"name": "bits_per_dim"}, {"name": "cost"}]
    return Protocol({"name": "own", "version": 1, "dataset": config.tree["data"], "metrics": metrics})


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_configuration_travels_the_whole_way(path, tmp_path):
    overrides = [*TINY, *given(path.parent.name, tmp_path)]
    config = load([path], overrides)
    assert Config(config.tree).hash == config.hash == load([path], overrides).hash
    assert set(config.protocols) <= {p.stem for p in FOLDER.glob("*.yaml")}
    run = train(config, root=tmp_path, quiet=True)
    drawn = len(config.dataset().shape) == 3 or config.dataset().shape == (2,)
    assert [p.suffix for p in (run.path / "samples").iterdir()] == [".png" if drawn else ".npz"]
    full = Protocol.load(config.protocols[0]) if config.protocols else of_own_data(config)
    metrics = [m for m in full.tree["metrics"] if m["name"] in ("bits_per_dim", "nll", "cost")]
    small = {"sample": {"num_items": 4}, "likelihood": {"num_items": 2}, "metrics": metrics}
    options = (
        {"likelihood": {"controller": "fixed", "num_steps": 2}} if config.tree["model"]["name"] == "diffusion" else {}
    )
    result = evaluate(run, Protocol({**full.tree, **small}), overrides=options)
    values = {row["name"]: row["value"] for row in result["metrics"]}
    assert {"nfe", "parameters"} < set(values)
    assert all(math.isfinite(v) for v in values.values())
    assert result["not_applicable"] == {}


def test_frozen_protocols_load_under_their_file_name():
    names = sorted(p.stem for p in FOLDER.glob("*.yaml"))
    assert [Protocol.load(n).name for n in names] == names
    assert len({Protocol.load(n).hash for n in names}) == len(names)
