"""Every configuration file in the repository resolves, trains, samples and is scored."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from genmodels import registry
from genmodels.config import Config, load, read
from genmodels.data.dataset import Dataset
from genmodels.evaluation import answers
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import FOLDER, Protocol, tree_of
from genmodels.hashing import digest
from genmodels.model import Model
from genmodels.networks.network import networks
from genmodels.rng import generator
from genmodels.sampling import default_seeds
from genmodels.training import watch
from genmodels.training.loop import train
from genmodels.types import SupportsLogProb, SupportsPredict, SupportsSample
from tests.data_files import (
    cifar_files,
    write_cifar_archive,
    write_fits,
    write_imagenet,
    write_mnist,
    write_physionet,
    write_pictures,
    write_sounds,
    write_table,
    write_uci,
    write_uea,
)

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "_base")
TINY = ["train.steps=2", "train.batch_size=4", "train.eval_every=0", "train.sample_every=2", "train.eval_items=4"]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def is_trained(path: Path) -> bool:
    return path.stem in TRAINED.get(path.parent.name, ())


def pictures(folder: Path) -> list[str]:
    made = write_pictures(folder / "pictures", 40, 33, 40)
    return [f"data.path={made}", f"data.cache={folder / 'cache'}", "sample.num_steps=2"]


def larger_pictures(folder: Path) -> list[str]:
    made = write_pictures(folder / "pictures", 40, 64, 70)
    return [f"data.path={made}", f"data.cache={folder / 'cache'}"]


def archive(folder: Path) -> list[str]:
    made = write_cifar_archive(folder / "cifar-10-python.tar.gz", cifar_files())
    return [f"data.path={made}", "data.checksum=ignore", "data.val=10"]


def downsampled(folder: Path) -> list[str]:
    made = write_imagenet(folder / "imagenet32")
    return [f"data.path={made}", f"data.cache={folder / 'cache'}", "data.checksum=ignore", "data.val=10"]


def sounds(folder: Path) -> list[str]:
    made = write_sounds(folder / "sounds", rate=22_050)
    return [f"data.path={made}", "data.segment=1024", "data.val=2", "data.test=4"]


UCI = ("power", "gas", "hepmass", "miniboone", "bsds300")


def uci(table: str) -> Callable[[Path], list[str]]:
    return lambda folder: [f"data.path={write_uci(folder / 'uci', table)}"]


# configurations of the user's own files: what makes such files in a folder, and the overrides that name them
OWN_DATA = {
    "fields": lambda folder: [f"data.path={write_fits(folder / 'maps', 140, 8, 16)}"],
    "images": pictures,
    "images/nsf_64": larger_pictures,
    "mnist": lambda folder: [f"data.path={write_mnist(folder / 'mnist', (28, 28))}", "data.val=10"],
    "tables": lambda folder: [f"data.path={write_table(folder / 'rows.csv')}"],
    "cifar10": archive,
    "imagenet32": downsampled,
    "audio/waveflow_ljspeech": sounds,
    "audio/nanoflow_ljspeech": sounds,
    **{f"tables/{table}{kind}": uci(table) for table in UCI for kind in ("", "_ar")},
    "tables/miniboone_ffjord": uci("miniboone"),
}
# transforms are fitted in a pass over all items, by batches; those of the plane cost nothing but the calls
LIGHT = ("toy2d", "annulus", "tables")
SOLVED = ("diffusion", "local_dsm", "multivariate_diffusion")  # likelihoods by an ODE, of which two steps are taken
PAINTED = ("series/latent_ode", "spiral/ode", "audio/waveflow", "toy2d/maf", "physionet/latent_ode")
SCALES = "model.layers[0].levels[{}][{}].{}"
# likewise by the name of the data set, wherever such a configuration lies
OWN_SERIES = {
    "physionet": lambda folder, node: [f"data.path={write_physionet(folder / 'records')}"],
    "uea": lambda folder, node: [f"data.path={write_uea(folder / 'archive', node['problem'])}"],
}
# one at least of every kind of model and of data, the cheapest that goes by each path through the commands; the others
# differ from these in numbers or in components that have tests of their own: they are built here, and trained as slow
TRAINED = {
    "annulus": ("neural_ode",),
    "audio": ("waveflow", "waveflow_ljspeech"),
    "cifar10": ("mdeq",),
    "digits": (
        *("cld", "deq", "flow_matching", "gaussian", "glow", "made", "memorise", "nade", "nanoflow", "neural_ode"),
        *("neural_sde", "nsf", "vae"),
    ),
    "fields": ("cslc",),
    "images": ("flow_matching",),
    "imagenet32": ("flow_matching",),
    "lognormal_64": ("gaussian",),
    "mnist": ("deq", "neural_ode", "neural_sde", "vae"),
    "moving_digits": ("flow_matching",),
    "patches": ("nsf",),
    "phi4_32": ("cslc", "gaussian"),
    "physionet": ("ode_rnn",),
    "series": ("cde_log", "gru", "latent_ode", "latent_sde"),
    "spiral": ("ode", "sde"),
    "tables": ("maf", "miniboone", "miniboone_ar", "miniboone_ffjord", "nsf"),
    "toy2d": ("ffjord", "flow_matching", "local_dsm", "maf", "nanoflow_nsf", "nanoflow_nsf_ar", "realnvp"),
    "uea": ("character_trajectories",),
}
STEP = "model.layers[1].layers[{}].network"
BRIEF = ["model.solver.max_steps=10", "model.gradient.max_iterations=5"]
# fields of few pixels, and chains of few steps
FEW = ["data.size=8", "data.count=200", "data.reference=20", "data.cache=null", "data.normalizer=false"]
CHAINS = [
    *(f"model.tuning.{change}" for change in ("starts=8", "adapt=10", "record=20", "least=2", "most=4")),
    *("train.batch_size=100", "model.energy[0].reach=1", "model.energy[1].basis.count=6"),
]
POLISHED = [
    f"model.polish.{change}" for change in ("fields=20", "burn=10", "iterations=1", "transitions=2", "records=1")
]
MAPS = ["data.size=16", "data.side=0.875", "data.count=200", "data.reference=20"]
# networks of millions of parameters are cut down; what they are is tested by their count
SMALL = {
    **{f"phi4_{size}/cslc": [*FEW, *CHAINS, *POLISHED] for size in (8, 32, 64, 128)},
    "phi4_32/cslc_haar": [*FEW, *CHAINS, *POLISHED],
    **{f"phi4_{size}/{name}": [*FEW, *CHAINS] for size in (32, 64) for name in ("cslc_plain", "direct")},
    **{f"phi4_{size}/gaussian": [*FEW, "train.batch_size=100"] for size in (8, 32, 64, 128)},
    **{f"phi4_{size}/flow_matching": [*FEW, "sample.num_steps=2"] for size in (32, 64)},
    **{"phi4_32/glow": FEW, "phi4_64/glow": [*FEW, "data.size=16", "data.beta=0.3"]},  # its four levels halve fields
    **{f"lognormal_64/{name}": [*MAPS, *CHAINS] for name in ("cslc", "cslc_quarter", "cslc_half", "cslc_octave")},
    "lognormal_64/cslc_polished": [*MAPS, *CHAINS, *POLISHED],
    "lognormal_64/gaussian": [*MAPS, "train.batch_size=100"],
    "fields/cslc": ["data.val=2", "data.test=2", *CHAINS],
    "cifar10/flow_matching": ["model.network.channels=8", "model.network.head_channels=8", "sample.num_steps=2"],
    **{
        name: ["model.network.channels=8", "model.network.head_channels=8", "sample.num_steps=2"]
        for name in (
            *(f"cifar10/{name}" for name in ("trigonometric", "vp", "etsdm", "cld")),
            *(f"imagenet32/{name}" for name in ("vp", "edm")),
        )
    },
    "imagenet32/flow_matching": ["model.network.channels=8", "model.network.head_channels=8", "sample.num_steps=2"],
    "imagenet32/kinetic_optimal": [
        *("model.network.channels=8", "model.network.head_channels=8", "sample.num_steps=2"),
        "model.schedule.queries=20",
    ],
    "cifar10/local_dsm": [
        "model.network.channels=8",
        "model.network.head_channels=8",
        "model.simulation_steps=2",
        "sample.num_steps=2",
    ],
    "cifar10/kinetic_optimal": [
        *("model.network.channels=8", "model.network.head_channels=8", "sample.num_steps=2"),
        "model.schedule.queries=20",
    ],
    **{f"{name}/kinetic_optimal": ["model.schedule.queries=20"] for name in ("toy2d", "digits")},
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
    "cifar10/neural_ode": ["model.network.hidden=[4,4]"],
    "cifar10/mdeq": ["model.cell.channels=[8,8]", "model.cell.head=[8,8]", "model.cell.expansion=2", *BRIEF],
    **{f"audio/{name}": ["data.size=60"] for name in ("waveflow", "waveflow_mel", "nanoflow")},
    # all 94,500 patches are seen once before training, which takes a batch of 4 as many calls
    "patches/nsf": ["train.batch_size=512"],
    **{f"spiral/{name}": ["data.count=50"] for name in ("ode", "ode_both", "sde", "sde_ernode", "sde_srnode")},
    **{f"annulus/neural_ode{kind}": ["data.count=200"] for kind in ("", "_ernode", "_local", "_steps")},
    "mnist/ffjord": [
        SCALES.format(k, j, change)
        for k, j in ((0, 0), (0, 2), (1, 0), (1, 2), (2, 0))
        for change in ("count=1", "layers[0].network.hidden=[2]")
    ],
    "tables/miniboone_ffjord": ["model.layers[0].network.hidden=[16]"],
    "cifar10/nsf": ["model.layers[0].layers[1].count=1", "model.layers[0].layers[1].layers[2].network.width=8"],
    "images/nsf_64": [
        f"model.layers[0].levels[{k}][1].{change}"
        for k in range(4)
        for change in ("count=1", "layers[2].network.width=8")
    ],
    **{f"tables/{table}": ["model.layers[0].count=1"] for table in UCI},
    **{
        f"tables/{table}_ar": ["model.layers[0].count=1", "model.layers[0].layers[2].network.hidden=64"]
        for table in UCI
    },
}


def protocol(config: Config, data: Dataset) -> Protocol:
    """The configuration's own, or one such as users write for data that only they have."""
    if config.protocols:
        own = ("uci", "mnist", *OWN_SERIES)
        places = {"path": config.tree["data"]["path"]} if config.tree["data"]["name"] in own else {}
        return Protocol.load(config.protocols[0], places)
    if data.target_shape is not None:
        return Protocol(
            {"name": "own", "version": 1, "dataset": config.tree["data"], "metrics": [{"name": "accuracy"}]}
        )
    if data.periodic is not None:
        return Protocol(
            {"name": "own", "version": 1, "dataset": config.tree["data"], "metrics": [{"name": "spectrum"}]}
        )
    metrics = [{"name": "nll" if data.bin_width is None else "bits_per_dim"}]
    return Protocol({"name": "own", "version": 1, "dataset": config.tree["data"], "metrics": metrics})


def written(data: Dataset, model: Model, sound: bool) -> list[str]:
    """The kinds of files that a run leaves of samples and of predictions of series."""
    kinds = []
    if isinstance(model, SupportsSample):
        drawn = len(data.shape) in (3, 4) or data.shape == (2,) or data.unit_of_time is not None
        # WAV files are in a folder
        kinds += ["", ".png"] if sound else [".png"] if drawn else [".npz"]
        kinds += [".gif"] if data.frame_rate is not None else []
    if isinstance(model, SupportsPredict) and data.take("train", torch.tensor([0])).target_times is not None:
        kinds.append(".png")
    return sorted(kinds)


def scored(data: Dataset, model: Model) -> tuple[str, ...]:
    """Metrics of which a protocol for the model has one at least."""
    if data.target_shape is not None:
        return ("accuracy", "squared_error")
    if data.periodic is not None:
        return ("spectrum",)
    return ("bits_per_dim", "nll") if isinstance(model, SupportsLogProb) else ("authenticity",)


BUILT: dict[str, Dataset] = {}  # data sets of no files, by their nodes


@pytest.fixture
def built_once(monkeypatch):
    """A run, its test and its protocol stand on the same items, as do configurations that differ in the model."""
    build = registry.build

    def build_once(base, node, **context):
        if base is not Dataset or "path" in node:
            return build(base, node, **context)
        key = digest(node)
        if key not in BUILT:
            BUILT[key] = build(base, node, **context)
        return BUILT[key]

    monkeypatch.setattr(registry, "build", build_once)


def configured(path: Path, folder: Path) -> Config:
    """Of a file, with what makes its run a short one."""
    name = name_of(path)
    node = yaml.safe_load(path.read_text()).get("data", {})
    series = OWN_SERIES.get(node.get("name"), lambda folder, node: [])
    make = OWN_DATA.get(name) or OWN_DATA.get(path.parent.name, lambda folder: series(folder, node))
    light = ["train.batch_size=64"] if path.parent.name in LIGHT else []
    config = load([path], [*TINY, *light, *make(folder), *SMALL.get(name, [])])
    assert Config(config.tree).hash == config.hash
    assert set(config.protocols) <= {p.stem for p in FOLDER.glob("*.yaml")}
    assert all(tree_of(p)["dataset"]["name"] == config.tree["data"]["name"] for p in config.protocols)
    return config


@pytest.mark.usefixtures("built_once")
@pytest.mark.filterwarnings("ignore::genmodels.data.uci.OtherRows")
@pytest.mark.parametrize("path", [p for p in FILES if not is_trained(p)], ids=name_of)
def test_configuration_is_built(path, tmp_path):
    """What it changes acts in the loss. Energies are fitted, without their chains: score matching then has a loss below
    0, which that of no energy is."""
    config = configured(path, tmp_path)
    data = config.dataset()
    model = config.model(data.facts())
    kind = config.tree["model"]["name"]
    # spectra and energies are of many fields
    many = kind in ("stationary_gaussian", "cslc")
    batch = data.take("train", torch.arange(data.size("train") if many else 3))
    if kind == "cslc":
        model.fit([batch])
    else:
        model.prepare([batch], generator=generator("prepare"))
    loss = model.loss(batch, generator=generator("loss")).value.mean()
    assert loss.isfinite() and (kind != "cslc" or loss < 0)
    if list(model.parameters()):  # models that are fitted in closed form have buffers alone
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.usefixtures("built_once")
@pytest.mark.filterwarnings("ignore::genmodels.data.uci.OtherRows")
@pytest.mark.parametrize(
    "path", [p if is_trained(p) else pytest.param(p, marks=pytest.mark.slow) for p in FILES], ids=name_of
)
def test_configuration_travels_the_whole_way(path, tmp_path, monkeypatch):
    """Pictures are of every eighth of their samples, which is one of each class; one of each kind is painted. Answers
    are not timed, which is no part of a configuration."""
    monkeypatch.setattr(watch, "default_seeds", lambda *given: default_seeds(*given)[::8])
    monkeypatch.setattr(answers.Interview, "price", lambda self, question: None)
    if name_of(path) not in PAINTED:
        monkeypatch.setattr(Figure, "draw", lambda self, renderer: None)
    config = configured(path, tmp_path)
    run = train(config, root=tmp_path, quiet=True)
    found = [p.suffix for p in run.path.glob("samples/*")]
    data, model = config.dataset(), run.load()
    full = protocol(config, data)
    assert sorted(found) == written(data, model, path.parent.name == "audio")
    metrics = [m for m in full.tree["metrics"] if m["name"] in scored(data, model)]
    questions = {"sample": {"num_items": 4}, "likelihood": {"num_items": 2}, "predict": {"num_items": 4}}
    small = {**questions, "metrics": metrics}
    if data.periodic is not None:
        small["dataset"] = {k: v for k, v in config.tree["data"].items() if k not in ("cache", "transform")}
    elif (count := config.tree["data"].get("count")) is not None:  # as few items as it was trained on
        small["dataset"] = {**full.tree["dataset"], "count": count}
    brief = {"likelihood": {"solver": "euler", "controller": "fixed", "num_steps": 2}}
    options = brief if config.tree["model"]["name"] in SOLVED else {}
    result = evaluate(run, Protocol({**full.tree, **small}), overrides=options)
    values = {row["name"]: row["value"] for row in result["metrics"]}
    assert values and all(row["nfe"] >= 1 or not networks(model) for row in result["cost"].values())
    assert all(math.isfinite(v) for v in values.values())
    assert result["not_applicable"] == {}


def test_every_kind_of_model_and_of_data_is_trained():
    trained = {path for path in FILES if is_trained(path)}
    assert len(trained) == sum(len(names) for names in TRAINED.values())
    for part in ("model", "data"):
        kinds = {path: read(path)[part]["name"] for path in FILES}
        assert {kinds[path] for path in trained} == set(kinds.values())
