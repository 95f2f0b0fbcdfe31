"""How convex the energies of fields are, band by band, and how wide packets may be: `genmodels concavity RUN`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..commands import guarded, split_words
from ..config import Config, load
from ..data.dataset import SPLITS, Dataset
from ..data.stream import Passes
from ..evaluation.tables import short, show, table
from ..registry import ConfigError, values
from ..training import processes
from ..training.run import Run
from .bandwidth import THRESHOLD, fit, gather, report, suggest
from .bases import BSpline
from .concavity import Spectrum, spectrum
from .concavity_plot import boxes, check_suffix
from .conditional import Conditional
from .cslc import CSLC
from .kl_bound import KLBound, kl_bound
from .potential import Potential
from .terms import Quadratic

BATCH = 250
RICHER = (partial(Quadratic, reach=6), partial(Potential, basis=BSpline(18)))  # more would be fitted to noise at edges
NOTES = """\
Eigenvalues are those of the conditional Hessian in units of 1/σ² of each level's field; `worst` bounds them at
every field that could be. The divergence is what is seen of ½ E|∇ log p - ∇ log p_θ|²: the parameters' sampling error,
and the drop of the loss in a class of reach 6 and 18 splines. The bound is that over the smallest eigenvalue: an
estimate, which misses what neither class has."""
EXAMPLES = """examples:
  genmodels concavity runs/phi4                             (a trained run, on its test split)
  genmodels concavity my.yaml model.wavelet=sym4 --most 2   (fitted here, without chains)
"""


@dataclass(frozen=True)
class _Subject:
    """A fitted model, its data, and the energy's builders."""

    name: str
    model: CSLC
    dataset: Dataset
    config: Config


@guarded
def main(argv: Sequence[str]) -> None:
    """Measure how convex the conditional energies of a wavelet model (cslc) are at the data's fields, and fit narrower
    packets to see which subdivisions suffice.

    Prints a table by band, a bound of the divergence by level, and a suggestion; writes a picture.
    """
    given = _options().parse_intermixed_args(list(argv))
    check_suffix(given.out)
    if given.fields < 1 or given.train < 10 or given.samples < 0 or given.most < 0 or not 0 <= given.threshold < 1:
        raise ConfigError(
            "--fields >= 1, --train >= 10, --samples >= 0, --most >= 0 and 0 <= --threshold < 1 are needed, found "
            f"{given.fields}, {given.train}, {given.samples}, {given.most} and {given.threshold:g}."
        )
    device = processes.place(given.device)
    subject = _subject(given, device)
    model, dataset = subject.model, subject.dataset
    if not dataset.size(given.split):
        raise ConfigError(f"--split: '{given.split}' has no items.")
    x = gather(dataset.batches(given.split, BATCH), max(given.fields, given.train)).to(device)
    train = gather(dataset.batches("train", BATCH), given.train).to(device)
    with torch.no_grad():
        units = model.units(x)
        some = [u[: given.fields] for u in units]
        groups = {f"{len(some[0])} fields of {given.split}": _spectra(model, some)}
        if given.samples:
            drawn = model.sample(given.samples)
            groups[f"{given.samples} samples"] = _spectra(model, model.units(drawn))
        bound = kl_bound(
            model.chained(),
            units,
            trained_on=dataset.size("train"),
            richer=_richer(model, train),
            measured=given.fields,
        )
    print(f"## {subject.name}\n")
    for name, found in groups.items():
        print(f"Hessians at {name}:\n\n{_table(model, found)}\n")
    print(f"The divergence from the law of {given.split}:\n\n{_bounds(bound)}\n")
    print(f"{NOTES}\n\n{_verdict(bound)}\n")
    if given.most:
        print(_trials(subject, train, given.most, given.threshold))
        print()
    drawing = {n: [(c.level.label, s.quantiles().cpu()) for c, s in _pairs(model, f)] for n, f in groups.items()}
    print(boxes(given.out, drawing))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "genmodels concavity",
        description=main.__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", nargs="+", help="folder of a run; or configuration files and overrides key=value, which are fitted here"
    )
    parser.add_argument("--weights", help="of a run: model or best (default: the first average)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose fields are measured (default: test)")
    parser.add_argument("--fields", type=int, default=64, metavar="N", help="how many of them (default: 64)")
    parser.add_argument("--samples", type=int, default=0, metavar="N", help="of a run: samples that are measured too")
    parser.add_argument(
        "--train", type=int, default=1000, metavar="N", help="training fields for what is fitted here (default: 1000)"
    )
    parser.add_argument(
        "--most", type=int, default=3, metavar="M", help="subdivisions tried of each octave; 0 for none (default: 3)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        metavar="SHARE",
        help=f"share of fields with a negative direction that is accepted (default: {THRESHOLD:g})",
    )
    parser.add_argument("--out", type=Path, default=Path("concavity.png"), help=".png, .pdf or .svg of the picture")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    return parser


def _subject(given: argparse.Namespace, device: torch.device) -> _Subject:
    """The run's model, or one that is fitted under a configuration.

    Raises:
        ConfigError: if it is no model of wavelets, or if samples of a model are wanted whose chains are not tuned.
    """
    folder = Path(given.run[0])
    if len(given.run) == 1 and folder.is_dir():
        run = Run.open(folder)
        _check(run.config, run.name)
        return _Subject(run.name, run.load(given.weights, device), run.dataset(), run.config)
    if given.samples or given.weights is not None:
        raise ConfigError("--samples and --weights: are for runs; a configuration is fitted without chains.")
    config = load(*split_words(given.run))
    name = config.name or Path(given.run[0]).stem
    _check(config, name)
    dataset = config.dataset()
    model = config.model(dataset.facts()).to(device)
    model.fit(Passes(dataset, BATCH, device))
    return _Subject(name, model, dataset, config)


def _check(config: Config, name: str) -> None:
    if config.tree["model"]["name"] != CSLC.registered_name:
        raise ConfigError(
            f"{name}: model '{config.tree['model']['name']}' has no conditional energies. Take one of wavelets (cslc)."
        )


def _pairs(model: CSLC, found: Sequence[Spectrum]) -> list[tuple[Conditional, Spectrum]]:
    return list(zip(model.chained(), found, strict=True))


def _spectra(model: CSLC, units: Sequence[Tensor]) -> list[Spectrum]:
    return [spectrum(c.hessian, u, c.level.dim) for c, u in zip(model.chained(), units, strict=True)]


def _richer(model: CSLC, x: Tensor) -> list[Conditional | None]:
    """Every level with more features, None where the fields cannot tell them."""
    found: list[Conditional | None] = []
    for c, y in zip(model.chained(), model.fields(x.double())[0][model.first :], strict=True):
        richer = Conditional(c.level, RICHER).to(x.device)
        try:
            fit(richer, y, max(model.regularization, 1e-4))
        except ConfigError:
            richer = None
        found.append(richer)
    return found


def _table(model: CSLC, found: Sequence[Spectrum]) -> str:
    headers, rows = ["band", "coefficients", "smallest", "5 %", "median", "negative", "largest"], []
    for c, s in _pairs(model, found):
        ends = [s.smallest, s.quantile(0.05), s.quantile(0.5)]
        cells = [c.level.label, str(c.level.dim), *(f"{value:.3g}" for value in ends), f"{s.negative:.0%}"]
        rows.append([*cells, f"{s.largest:.3g}"])
    return table(headers, rows, left=(0,))


def _bounds(bound: KLBound) -> str:
    rows = [
        [b.label, f"{b.alpha:.3g}", f"{b.worst:.3g}", show(b.divergence, b.error), _nats(b.kl), _nats(b.proved)]
        for b in bound.levels
    ]
    return table(["band", "smallest", "worst", "divergence", "KL ≤", "at worst ≤"], rows, left=(0,))


def _nats(value: float) -> str:
    return short(value) if value < float("inf") else "none"


def _verdict(bound: KLBound) -> str:
    void = [level.label for level in bound.levels if not level.alpha > 0]
    if void:
        return f"There is no bound of the whole: the energy is not convex at some fields in {', '.join(void)}."
    return f"KL of the whole field: at most {short(bound.kl)} nats, as far as the divergence is seen."


def _trials(subject: _Subject, train: Tensor, most: int, threshold: float) -> str:
    model, node = subject.model, subject.config.tree["model"]
    y = model.transform(train)[0].squeeze(1) - model.mean.to(train)
    octaves, given = sum(model.tree.begins), node["subdivisions"]
    subdivisions = [given] * octaves if isinstance(given, int) else given
    if not octaves:
        return "The model has no octaves that packets could subdivide."
    found = suggest(
        y,
        values(CSLC, node)["energy"],
        wavelet=node["wavelet"],
        octaves=octaves,
        most=most,
        threshold=threshold,
        regularization=model.regularization,
    )
    return f"## Subdivisions, fitted to {found[0].fields} training fields\n\n{report(found, subdivisions)}"


if __name__ == "__main__":
    sys.exit(main())
