"""Every configuration file in the repository resolves, trains, samples and is scored."""

import math
from pathlib import Path

import pytest

from genmodels.config import Config, load
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import FOLDER, Protocol
from genmodels.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
DOWNLOADED = {"cifar10"}  # configurations of data that the user has to fetch
FILES = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name not in {"_base", *DOWNLOADED})
TINY = ["train.steps=2", "train.batch_size=16", "train.eval_every=0", "train.sample_every=2", "train.eval_items=8"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_configuration_travels_the_whole_way(path, tmp_path):
    config = load([path], TINY)
    assert Config(config.tree).hash == config.hash == load([path], TINY).hash
    assert set(config.protocols) <= {p.stem for p in FOLDER.glob("*.yaml")}
    run = train(config, root=tmp_path, quiet=True)
    assert [p.suffix for p in (run.path / "samples").iterdir()] == [".png"]
    full = Protocol.load(config.protocols[0])
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
