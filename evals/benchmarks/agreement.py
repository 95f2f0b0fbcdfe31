"""How far our numbers are from those of other packages: `python -m evals.benchmarks.agreement`, from the repository.

What pytorch-fid, torch-fidelity and torchmetrics make of two fixed sets of features was recorded by
tests/parity/record_references.py, because they do not install beside a CPU build of torch; prdc, scikit-learn and scipy
run here. Written are relative differences |ours/theirs - 1|, to evals/results/benchmarks/agreement.json.
"""

import json
from pathlib import Path

import numpy as np
import torch

from genmodels.metrics.bures import frechet_distance
from genmodels.metrics.kernel import cubic, kid_of_subsets, mmd
from genmodels.metrics.neighbours import radii
from genmodels.metrics.prdc import precision_recall_density_coverage
from genmodels.metrics.sliced import sliced_wasserstein
from genmodels.metrics.statistics import gaussian
from tests.parity.seeded import feature_sets

RECORDED = Path(__file__).parents[2] / "tests" / "parity" / "distances_recorded.json"
OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "agreement.json"


def differences() -> dict[str, dict[str, float]]:
    """Relative difference from every package, by what was measured."""
    recorded = json.loads(RECORDED.read_text())
    real, drawn = feature_sets()
    distance = frechet_distance(gaussian(drawn), gaussian(real))
    all_pairs, subsets = mmd(real, drawn, cubic).value, np.array(kid_of_subsets(drawn, real, 100, 100))
    found = {
        "Fréchet distance": {
            name: _off(distance, recorded[name]["frechet"])
            for name in ("pytorch-fid", "torch-fidelity", "torchmetrics")
        },
        "KID, all pairs": {
            name: _off(all_pairs, recorded[name]["kernel, all"]) for name in ("torch-fidelity", "torchmetrics")
        },
        "KID, 100 subsets of 100": {
            "torch-fidelity": _off(subsets.mean(), recorded["torch-fidelity"]["kernel, 100 subsets of 100"]),
            "torch-fidelity, spread": _off(
                subsets.std(), recorded["torch-fidelity"]["kernel, their standard deviation"]
            ),
        },
    }
    for k in (3, 5):
        ours = precision_recall_density_coverage(real=real, fake=drawn, k=k)
        found[f"precision, recall, density, coverage, k = {k}"] = {
            name: max(_off(ours[key], value) for key, value in recorded["neighbours"][f"{name}, k = {k}"].items())
            for name in ("torch-fidelity", "prdc")
        }
    return found | _run_here(real, drawn)


def _run_here(real: torch.Tensor, drawn: torch.Tensor) -> dict[str, dict[str, float]]:
    """Against packages that are installed beside ours."""
    import scipy.linalg
    import scipy.stats
    from sklearn.neighbors import NearestNeighbors

    a, b = gaussian(real), gaussian(drawn)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    traces = a.covariance.trace() + b.covariance.trace() - 2 * np.trace(root)
    frechet = float((a.mean - b.mean).square().sum() + traces)
    theirs = NearestNeighbors(n_neighbors=6).fit(real.numpy()).kneighbors(real.numpy())[0][:, 5]
    direction = torch.eye(real.shape[1], dtype=torch.float64)[:1]
    line = np.sort(real[:, 0].numpy()), np.sort(drawn[:, 0].numpy())
    return {
        "Fréchet distance by sqrtm": {"scipy": _off(frechet_distance(b, a), frechet)},
        "distance to the fifth neighbour": {"scikit-learn": float(np.abs(radii(real, 5).numpy() / theirs - 1).max())},
        "squared Wasserstein distance in one direction": {
            "numpy": _off(
                float(sliced_wasserstein(real, drawn, direction).value), float(((line[0] - line[1]) ** 2).mean())
            )
        },
    }


def _off(ours: float, theirs: float) -> float:
    return abs(float(ours) / theirs - 1)


def main() -> None:
    found = differences()
    versions = json.loads(RECORDED.read_text())["versions"]
    what = "relative difference of our number from that of a package, on the same 500 x 64 features"
    OUT.write_text(json.dumps({"what": what, "versions": versions, "differences": found}, indent=1) + "\n")
    for measured, by_package in found.items():
        for name, difference in by_package.items():
            print(f"{measured:<48} {name:<24} {difference:.1e}")


if __name__ == "__main__":
    main()
