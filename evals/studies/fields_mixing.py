"""How many steps of a Markov chain a field of the critical φ⁴ model takes: all at once, and scale by scale.

    python -m evals.studies.fields_mixing [--sizes 8 16 32 64] [--direct 4 8 16] [--publish]

Three chains by MALA, at β = 0.68 from fields in equilibrium, each with its step size adapted to 0.6 acceptance:
the whole field under the exact energy (the magnetisation m is what moves slowest); the finest details given the coarser
field, under the same exact energy; and every level of a model fitted to 5000 fields. Autocorrelation times are lags at
which the correlation has fallen to 1/e. Beside them stands what an independent field takes, so that equally many have
equal sampling errors: two autocorrelation times of the whole field's chain, or the model's whole way from coarse to
fine, in pixels times evaluations of the gradient and in CPU seconds, one thread. With `--publish` it writes
evals/results/fields_mixing.md and fields_mixing.png. Whole fields take longest by far: the chain at 32² is left to
`--direct`.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from genmodels.data.phi4 import Phi4
from genmodels.data.phi4_lattice import energy, force
from genmodels.files import write_text
from genmodels.rng import BatchNoise, generator
from genmodels.transforms import Identity
from genmodels.wavelet.bases import BSpline
from genmodels.wavelet.chains import MALA, adapt, advance, begin, restart, walk
from genmodels.wavelet.cslc import CSLC
from genmodels.wavelet.mixing import decay_time
from genmodels.wavelet.potential import Potential
from genmodels.wavelet.terms import Quadratic
from genmodels.wavelet.tree import Tree

from .plans import ROOT

RESULTS = ROOT / "evals" / "results"
BETA, TARGET = 0.68, 0.6
CHAINS = 32
EXPECTED = {4: 2_500, 8: 18_000, 16: 85_000, 32: 400_000}  # of m, by which runs are planned
LASTING = 3.0  # expected autocorrelation times of the whole field's chains
LOOKS = 400  # states of those that are kept
DETAILS = 600  # transitions of the chains of details
SAMPLES = 64  # of a model, whose time is taken


class Chain(NamedTuple):
    """Of a chain: autocorrelation time in steps, step size, acceptance, and CPU seconds of a step of one field."""

    tau: float
    step_size: float
    acceptance: float
    seconds: float


class Fitted(NamedTuple):
    """Of a fitted model, by level: autocorrelation time, transitions of a sample, pixels of the grid; and CPU seconds
    of a sample."""

    tau: dict[str, float]
    transitions: dict[str, int]
    pixels: dict[str, int]
    seconds: float

    @property
    def work(self) -> int:
        """Pixels times evaluations of the gradient that a sample takes."""
        return sum(count * self.pixels[level] for level, count in self.transitions.items())


def equilibrium(size: int, count: int = CHAINS, cache: str | None = None) -> Tensor:
    """[n, L, L] float32 fields."""
    return Phi4(size=size, beta=BETA, count=max(count, 5), reference=1, cache=cache).all("train").x[:count, 0]


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """Energy and gradient of fields [B, L, L]."""
    return energy(x.double(), BETA), -force(x, BETA)


def whole(size: int) -> Chain:
    """The chain of all sites at once, watched by its magnetisation."""
    x = equilibrium(size)
    kernel, noise = MALA(TARGET), BatchNoise(len(x), generator=generator("whole", size))
    found = adapt(kernel, exact, begin(exact, x), scale=1.0, noise=noise, steps=400, measured=100)
    stride = max(1, round(LASTING * EXPECTED[size] / LOOKS))
    state, seen, began = restart(found.state), [], time.process_time()
    for _ in range(LOOKS):
        state = advance(kernel, exact, state, stride, step_size=found.step_size, scale=1.0, noise=noise)
        seen.append(state.z.double().mean((1, 2)))
    seconds = (time.process_time() - began) / (LOOKS * stride * len(x))
    trace = torch.stack(seen)
    trace = torch.cat((trace, -trace), 1)  # the law is even: its mean is 0 exactly
    return Chain(float(decay_time(trace)) * stride, float(found.step_size), found.acceptance, seconds)


def details(size: int, wavelet: str = "db4") -> Chain:
    """The chain of the finest details given the coarser field, watched by its details."""
    x = equilibrium(size)
    tree = Tree((size, size), wavelet, 1)
    level, base = tree.levels[1], tree.given(1, x)

    def potential(z: Tensor) -> tuple[Tensor, Tensor]:
        e, gradient = exact(base + level.synthesize(z))
        return e, level.detail(gradient)

    kernel, noise = MALA(TARGET), BatchNoise(len(x), generator=generator("details", size))
    found = adapt(kernel, potential, begin(potential, level.detail(x)), scale=1.0, noise=noise, steps=200)
    began = time.process_time()
    chains = walk(kernel, potential, restart(found.state), DETAILS, step_size=found.step_size, scale=1.0, noise=noise)
    kept = torch.linspace(0, level.dim - 1, min(24, level.dim)).long()
    trace = torch.stack([state.z[:, kept] for state in chains])
    seconds = (time.process_time() - began) / (DETAILS * len(x))
    # every coarse field has its own law of details: autocovariances are about each chain's own mean
    return Chain(float(decay_time(trace, one_law=False).mean()), float(found.step_size), found.acceptance, seconds)


def fitted(size: int, cache: str | None) -> Fitted:
    """A model of the default terms, fitted to 5000 fields."""
    data = Phi4(size=size, beta=BETA, cache=cache)
    terms = (partial(Quadratic, reach=3), partial(Potential, basis=BSpline(16), even=True))
    model = CSLC(terms, periodic=True, shape=(1, size, size), transform=Identity())
    model.prepare(list(data.batches("train", 500)), generator=generator("fitted", size))
    chained = [c for c in model.conditionals if c.level.dim > 1]
    began = time.process_time()
    model.sample(SAMPLES)
    seconds = (time.process_time() - began) / SAMPLES
    return Fitted(
        {c.level.label: float(c.autocorrelation) for c in chained},
        {c.level.label: int(c.num_steps) for c in chained},
        {c.level.label: math.prod(c.level.size) for c in chained},
        seconds,
    )


class Study(NamedTuple):
    whole: dict[int, Chain]
    details: dict[int, Chain]
    fitted: dict[int, Fitted]


def growth(tau: dict[int, float]) -> float:
    """z of τ ∝ L^z by least squares in logarithms."""
    x = torch.tensor([math.log(size) for size in tau], dtype=torch.float64)
    y = torch.tensor([math.log(t) for t in tau.values()], dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def table(study: Study) -> str:
    """In Markdown."""
    lines = [
        "| L | whole field: τ of m, steps | details given the rest: τ, steps | fitted model: largest τ of a level | "
        "its transitions, all levels | pixels x gradients per independent field: whole (2τ) | model | ratio | "
        "CPU seconds per independent field: whole (2τ) | model | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in sorted({*study.whole, *study.details}):
        chain = study.details.get(size)
        if chain is None:
            lines.append(f"| {size} | {study.whole[size].tau:,.0f} | | | | | | | | | |")
            continue
        direct, model = study.whole.get(size), study.fitted[size]
        cells = [f"{size}", f"{direct.tau:,.0f}" if direct else "", f"{chain.tau:.1f}"]
        cells += [f"{max(model.tau.values()):.1f}", f"{sum(model.transitions.values()):,}"]
        work = 2 * direct.tau * size**2 if direct else math.nan
        seconds = 2 * direct.tau * direct.seconds if direct else math.nan
        for alone, ours in ((work, model.work), (seconds, model.seconds)):
            cells += [f"{alone:.2g}" if direct else "", f"{ours:.2g}", f"{alone / ours:,.0f}" if direct else ""]
        lines.append(f"| {' | '.join(cells)} |")
    laws = [
        f"τ of the whole field grows as L^{growth({s: c.tau for s, c in study.whole.items()}):.2f}, that of the "
        f"details as L^{growth({s: c.tau for s, c in study.details.items()}):.2f}, the largest of a model's levels as "
        f"L^{growth({s: max(m.tau.values()) for s, m in study.fitted.items()}):.2f}.",
        f"MALA, acceptance {TARGET}, {CHAINS} chains; of whole fields and details τ is the lag of correlation 1/e, of "
        "the model's levels the integrated autocorrelation time of the slowest of energy, power, sum and one "
        "coefficient. Series of whole fields last "
        + ", ".join(f"{LASTING * EXPECTED[s] / c.tau:.1f} τ at L = {s}" for s, c in study.whole.items())
        + ".",
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(laws) + "\n"


def picture(study: Study, path: Path) -> None:
    """τ against L, in logarithms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axis = figure.subplots()
    lines = {
        "whole field (m)": {s: c.tau for s, c in study.whole.items()},
        "finest details, exact energy": {s: c.tau for s, c in study.details.items()},
        "fitted model, slowest level": {s: max(m.tau.values()) for s, m in study.fitted.items()},
    }
    for label, tau in lines.items():
        axis.plot(list(tau), list(tau.values()), "o-", label=f"{label}: L^{growth(tau):.1f}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    sizes = sorted(study.details)
    axis.set_xticks(sizes, [str(s) for s in sizes])
    axis.set(xlabel="side L", ylabel="autocorrelation time, MALA steps", title="φ⁴ at β = 0.68")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="of details and models")
    parser.add_argument("--direct", type=int, nargs="+", default=[4, 8, 16], choices=EXPECTED, help="of whole fields")
    parser.add_argument("--cache", default="runs/field-cache", help="folder of simulated fields")
    parser.add_argument("--publish", action="store_true", help="write evals/results/fields_mixing.md and .png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(
        _each(given.direct, whole, "whole"),
        _each(given.sizes, details, "details"),
        _each(given.sizes, partial(fitted, cache=given.cache), "model"),
    )
    text = table(study)
    print(text)
    if given.publish:
        picture(study, RESULTS / "fields_mixing.png")
        write_text(RESULTS / "fields_mixing.md", text)


def _each(sizes: list[int], measure: Callable, what: str) -> dict:
    found = {}
    for size in sizes:
        found[size] = measure(size)
        print(what, size, found[size], flush=True)
    return found


if __name__ == "__main__":
    main()
