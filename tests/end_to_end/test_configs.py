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
from genmodels.data.dataset import Dataset, centred
from genmodels.data.uci import TABLES as PUBLISHED
from genmodels.evaluation import answers
from genmodels.evaluation.evaluate import evaluate
from genmodels.evaluation.protocol import FOLDER, Protocol, tree_of
from genmodels.hashing import digest
from genmodels.model import Model
from genmodels.networks.network import networks
from genmodels.registry import resolve
from genmodels.rng import generator
from genmodels.sampling import default_seeds
from genmodels.training import watch
from genmodels.training.loop import train
from genmodels.transforms import Transform
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
FLOW_MATCHING = ROOT / "configs" / "cifar10" / "flow_matching.yaml"
TINY = ["train.steps=2", "train.batch_size=4", "train.eval_every=0", "train.sample_every=2", "train.eval_items=4"]


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
# what is like another configuration that travels, with the same components in other sizes or on other data: built, not
# trained; the parts that tell it from that one travel with a third
ALIKE = {
    **{f"tables/{table}{kind}": f"tables/miniboone{kind}" for table in UCI[:3] + UCI[4:] for kind in ("", "_ar")},
    "tables/nanoflow": "toy2d/nanoflow_nsf",
    "tables/realnvp": "tables/nsf",
    "tables/ffjord": "tables/miniboone_ffjord",
    "toy2d/nanoflow_realnvp": "toy2d/nanoflow_nsf",
    "toy2d/nanoflow_maf": "toy2d/nanoflow_nsf_ar",
    "toy2d/cld": "digits/cld",
    "toy2d/local_dsm": "digits/local_dsm",
    "toy2d/nsf_ar": "toy2d/nanoflow_nsf_ar",
    "digits/realnvp": "digits/nsf",
    "digits/maf": "toy2d/maf",
    "digits/nanoflow_affine": "digits/nanoflow",
    "digits/ffjord": "mnist/ffjord",
    "patches/nsf_ar": "patches/nsf",
    "patches/nanoflow": "patches/nsf",
    "cifar10/glow": "cifar10/nanoflow_glow",
    "cifar10/nsf": "images/nsf_64",
    "cifar10/neural_ode": "mnist/neural_ode",
    "imagenet32/flow_matching": "cifar10/flow_matching",
    "images/flow_matching": "cifar10/flow_matching",
    **{f"phi4_{size}/cslc": "phi4_32/cslc" for size in (8, 64, 128)},
    **{f"phi4_64/{name}": f"phi4_32/{name}" for name in ("flow_matching", "glow")},
    "digits/glow": "cifar10/nanoflow_glow",
    "digits/nsf_image": "images/nsf_64",
    "digits/nsf_ar": "toy2d/nanoflow_nsf_ar",
    "toy2d/nsf": "tables/nsf",
    "toy2d/made_mog": "digits/made",
    "series/ode_rnn": "physionet/ode_rnn",
    "series/cde": "series/cde_log",
    **{f"series/latent_ode_{name}": "series/latent_ode" for name in ("digits", "oscillators")},
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
    "lognormal_64/gaussian": [*MAPS, "train.batch_size=100"],
    "fields/cslc": ["data.val=2", "data.test=2", *CHAINS],
    "cifar10/flow_matching": ["model.network.channels=8", "model.network.head_channels=8", "sample.num_steps=2"],
    **{
        name: ["model.network.channels=8", "model.network.head_channels=8"]
        for name in (
            *(f"cifar10/{name}" for name in ("trigonometric", "vp", "etsdm", "cld")),
            *(f"imagenet32/{name}" for name in ("vp", "edm")),
        )
    },
    "imagenet32/flow_matching": ["model.network.channels=8", "model.network.head_channels=8", "sample.num_steps=2"],
    "imagenet32/kinetic_optimal": [
        *("model.network.channels=8", "model.network.head_channels=8"),
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


@pytest.mark.usefixtures("built_once")
@pytest.mark.filterwarnings("ignore::genmodels.data.uci.OtherRows")
@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_configuration_travels_the_whole_way(path, tmp_path, monkeypatch):
    """Pictures are of every eighth of their samples, which is one of each class; one of each kind is painted. Answers
    are not timed, which is no part of a configuration."""
    name = f"{path.parent.name}/{path.stem}"
    monkeypatch.setattr(watch, "default_seeds", lambda *given: default_seeds(*given)[::8])
    monkeypatch.setattr(answers.Interview, "price", lambda self, question: None)
    if name not in PAINTED:
        monkeypatch.setattr(Figure, "draw", lambda self, renderer: None)
    node = yaml.safe_load(path.read_text()).get("data", {})
    series = OWN_SERIES.get(node.get("name"), lambda folder, node: [])
    make = OWN_DATA.get(name) or OWN_DATA.get(path.parent.name, lambda folder: series(folder, node))
    light = ["train.batch_size=64"] if path.parent.name in LIGHT else []
    overrides = [*TINY, *light, *make(tmp_path), *SMALL.get(name, [])]
    config = load([path], overrides)
    assert Config(config.tree).hash == config.hash
    assert set(config.protocols) <= {p.stem for p in FOLDER.glob("*.yaml")}
    assert all(tree_of(p)["dataset"]["name"] == config.tree["data"]["name"] for p in config.protocols)
    if name in ALIKE or any("/" not in base for base in yaml.safe_load(path.read_text()).get("base", [])):
        # a variant of its neighbour or of another one, which travels; what it changes acts in the loss
        data = config.dataset()
        model = config.model(data.facts())
        batch = data.take("train", torch.arange(3 if data.periodic is None else data.size("train")))
        model.prepare([batch], generator=generator("prepare"))
        loss = model.loss(batch, generator=generator("loss")).value.mean()
        assert loss.isfinite()
        if list(model.parameters()):  # models that are fitted in closed form have buffers alone
            loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        return
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


def test_what_is_like_another_has_one_that_travels():
    names = {f"{path.parent.name}/{path.stem}" for path in FILES}
    assert ALIKE.keys() <= names and set(ALIKE.values()) <= names - ALIKE.keys()
    for name, other in ALIKE.items():
        own, its = (read(ROOT / "configs" / f"{n}.yaml")["model"]["name"] for n in (name, other))
        assert own == its, name
        bases = yaml.safe_load((ROOT / "configs" / f"{other}.yaml").read_text()).get("base", [])
        assert all("/" in base for base in bases), f"{other} is built only"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cifar10/flow_matching", 35_746_307),
        ("cifar10/cld", 35_749_763),
        ("cifar10/edm", 56_524_291),
        ("cifar10/nsf", 11_835_054),
    ],
)
def test_recipes_have_the_parameters_that_they_state(name, parameters):
    """What the comments of the files say; flow matching and NSF are derived in the tests of their parts."""
    path = ROOT / "configs" / f"{name}.yaml"
    config = load([path], blank=True)
    shape = {"shape": [3, 32, 32], "num_classes": None, "condition_shape": None, "target_shape": None}
    node = resolve(Transform, config.tree["data"]["transform"] or centred(256), "data.transform")
    model = config.model({**shape, "bin_width": 1.0, "transform": node})
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert f"{parameters:,}" in path.read_text()


@pytest.mark.parametrize("name", ["cifar10/trigonometric", "cifar10/vp", "cifar10/etsdm", "imagenet32/flow_matching"])
def test_recipes_that_share_a_network_state_its_parameters(name):
    """Dropout has none."""
    path = ROOT / "configs" / f"{name}.yaml"
    own, first = (load([p], blank=True).tree["model"]["network"] for p in (path, FLOW_MATCHING))
    assert {**own, "dropout": 0} == {**first, "dropout": 0} and "35,746,307 parameters" in path.read_text()


# of the published settings, counted by the code of the paper
TABLES = {
    "power": 2_820_402,
    "gas": 2_882_632,
    "hepmass": 1_327_522,
    "miniboone": 129_542,
    "bsds300": 2_712_052,
    "power_ar": 3_004_722,
    "gas_ar": 3_128_392,
    "hepmass_ar": 3_934_392,
    "miniboone_ar": 439_622,
    "bsds300_ar": 18_311_642,
}


@pytest.mark.parametrize("name", TABLES)
def test_recipes_of_tables_have_the_parameters_of_the_paper(name):
    path = ROOT / "configs" / "tables" / f"{name}.yaml"
    config = load([path], blank=True)
    shape = [PUBLISHED[config.tree["data"]["table"]].dims]
    facts = {"num_classes": None, "condition_shape": None, "target_shape": None, "bin_width": None}
    model = config.model({"shape": shape, "transform": {"name": "identity"}, **facts})
    assert sum(p.numel() for p in model.parameters()) == TABLES[name]
    assert f"{TABLES[name]:,}" in path.read_text()
    assert config.train.eval_items == PUBLISHED[config.tree["data"]["table"]].sizes[1]
