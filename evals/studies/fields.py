"""Models of physical fields beside each other: wavelet-conditional energies, a Gaussian, one energy, diffusion, a flow.

    python -m evals.studies.fields phi4_8 phi4_32 phi4_64 phi4_128 lognormal_64 [--jobs 2] [--publish]

Trains and evaluates the runs of each study that are not there yet, then draws 250 fields of each and compares radial
spectra ring by ring: below the models stands the error that 250 fields of the law itself would have. With `--publish`
it copies the results to evals/results and writes evals/results/fields_<study>.md and .png. Most of the time goes to
sampling, and to the baselines that are trained; a GPU is used if there is one.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from genmodels.evaluation.field_drawing import draw_fields
from genmodels.files import write_text
from genmodels.metrics.fields.spectrum import spectrum_errors
from genmodels.training.run import Run

from .plans import ROOT, Plan, carry_out_all, parser

RESULTS = ROOT / "evals" / "results"
DRAWN = 250
NAMES: dict[str, dict[str, str]] = {  # configurations and what their rows are called
    "phi4_8": {"cslc": "wavelet energies", "gaussian": "Gaussian"},
    "phi4_32": {
        "cslc": "wavelet energies",
        "cslc_plain": "score matching alone",
        "cslc_haar": "Haar",
        "direct": "one energy, MALA",
        "gaussian": "Gaussian",
        "flow_matching": "flow matching",
        "glow": "flow",
    },
    "phi4_64": {
        "cslc": "wavelet energies, Haar",
        "cslc_plain": "score matching alone",
        "direct": "one energy, MALA",
        "gaussian": "Gaussian",
    },
    "phi4_128": {"cslc": "wavelet energies, Haar", "gaussian": "Gaussian"},
    "lognormal_64": {
        "cslc": "wavelet energies of the logarithm",
        "cslc_polished": "quarter octaves, polished",
        "cslc_quarter": "quarter octaves",
        "cslc_half": "half octaves",
        "cslc_octave": "octaves",
        "gaussian": "Gaussian",
    },
}
SHOWN = 16  # rings of the table, of equal width in log k beyond 8


def plans(study: str) -> Iterator[Plan]:
    for name in NAMES[study]:
        yield Plan(f"{study}-{name}", f"{study}/{name}", study)


def drawn(study: str, root: Path) -> tuple[dict[str, Tensor], Tensor]:
    """[N, 1, H, W] fields of every run by the name of its row, and those of the test split."""
    found, device = {}, "cuda" if torch.cuda.is_available() else "cpu"
    for name, label in NAMES[study].items():
        run = Run.open(root / f"{study}-{name}")
        model = run.load(device=device)
        options = run.config.options("sample", None)
        with torch.no_grad():
            parts = [model.sample(seeds, **options).cpu() for seeds in torch.arange(DRAWN).split(125)]
        found[label] = torch.cat(parts)
        print(f"{study}: drew {label}", flush=True)
    data = Run.open(root / f"{study}-{next(iter(NAMES[study]))}").dataset()
    return found, data.take("test", torch.arange(data.size("test"))).x


def table(found: Mapping[str, Tensor], reference: Tensor) -> str:
    """Relative errors of the spectrum by rings, and their rms, in Markdown."""
    errors = {label: spectrum_errors(x, reference) for label, x in found.items()}
    first = next(iter(errors.values()))
    rings = [k for k in range(len(first.k)) if k < 8 or (k + 1) & k == 0 or (k + 1) % (len(first.k) // 8) == 0]
    lines = [
        f"| relative error of the power at k = | {' | '.join(str(k + 1) for k in rings)} | rms, all k |",
        "|:---|" + "---:|" * (len(rings) + 1),
    ]
    for label, e in errors.items():
        cells = [f"{100 * float(e.error[k]):+.1f}" for k in rings]
        cells.append(f"{100 * e.rms:.1f} %")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    noise = (first.stderr.square() + first.noise.square()).sqrt()
    cells = [f"±{100 * float(noise[k]):.1f}" for k in rings] + [f"{100 * float(noise.square().mean().sqrt()):.1f} %"]
    lines.append(f"| noise of {len(next(iter(found.values())))} fields of the first model and of the reference | "
                 f"{' | '.join(cells)} |")  # fmt: skip
    return "\n".join(lines)


def report(study: str, root: Path, published: bool) -> None:
    """Print the table of a study; write it and the picture."""
    found, reference = drawn(study, root)
    text = table(found, reference) + "\n\nIn percent; k counts cycles per side.\n"
    print(text)
    if published:
        write_text(RESULTS / f"fields_{study}.md", text)
        draw_fields(RESULTS / f"fields_{study}.png", found, reference)


def main() -> None:
    given = parser(__doc__, dict.fromkeys(NAMES, plans), "runs/fields").parse_args()
    for study in given.studies:
        carry_out_all(list(plans(study)), given.root, given.jobs, given.publish)
        report(study, given.root, given.publish)


if __name__ == "__main__":
    main()
