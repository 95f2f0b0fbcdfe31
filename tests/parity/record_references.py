"""Record what independent packages compute; `python tests/parity/record_references.py` writes three files beside it.

Run it in an environment of its own, because the CPU wheel of torch and torchvision's default wheel do not fit together
(the two operators that the import asks for are declared in `main`; nothing here calls them):

    python -m venv references && . references/bin/activate
    pip install torch==2.13.0 numpy scipy scikit-learn pillow tqdm requests lightning-utilities
    pip install --no-deps torchvision==0.28.0 torch-fidelity==0.4.0 pytorch-fid==0.3.0 torchmetrics==1.9.0 \
        clean-fid==0.1.35 prdc==0.2

genmodels is not needed. The tests recreate the same weights, images and features from seeds (seeded.py). The packages
are imported inside the functions, so that this file can be imported, and its docstring read, without them.
"""

import importlib.metadata
import json
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).parent
KEPT = 32


def versions(*packages):
    return {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "numpy", "scipy", *packages)}


def write(name, tree):
    (HERE / name).write_text(json.dumps(tree, indent=1) + "\n")


# ---- the network ---


def keys():
    """The published file's names and shapes, from torch-fidelity's network."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), mock.patch("torch.load"):
        network = FeatureExtractorInceptionV3("any", ["2048"], "nothing is read")
    return "".join(f"{' '.join(map(str, [key, *v.shape]))}\n" for key, v in network.state_dict().items())


def networks(state):
    import pytorch_fid.inception
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        fidelity = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file.name)
        with mock.patch("pytorch_fid.inception.load_state_dict_from_url", lambda *a, **k: torch.load(file.name)):
            fid = pytorch_fid.inception.InceptionV3([3]).eval()
            unsized = pytorch_fid.inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    return fidelity, fid, unsized


def clean(x):
    """clean-fid's resizing, and the range that its network expects."""
    import cleanfid.resize
    import numpy as np

    resize = cleanfid.resize.build_resizer("clean")
    sized = np.stack([resize(image) for image in x.permute(0, 2, 3, 1).numpy()])
    return (torch.from_numpy(sized).permute(0, 3, 1, 2) - 128) / 128


def summary(features):
    features = features.double()
    return {
        "first": [[float(f"{v:.8g}") for v in row[:KEPT].tolist()] for row in features],
        "mean": features.mean(1).tolist(),
        "std": features.std(1).tolist(),
    }


def record_inception():
    from seeded import BATCHES, SEED, images, inception_state

    fidelity, fid, unsized = networks(inception_state())
    rows = {}
    for name, (height, width) in BATCHES.items():
        x = images(height, width)
        with torch.no_grad():
            found = {
                "tf1": fidelity(x)[0],
                "pytorch_fid": fid(x.float() / 255)[0].flatten(1),
                "clean": unsized(clean(x))[0].flatten(1),
            }
        rows[name] = {how: summary(features) for how, features in found.items()}
    about = {"seed": SEED, "versions": versions("torch-fidelity", "pytorch-fid", "clean-fid", "torchvision", "pillow")}
    write("inception_recorded.json", about | {"features": rows})


# ---- distances ---


class Given(torch.nn.Module):
    """Features that were computed elsewhere, in the place of torchmetrics' network."""

    num_features = 64

    def forward(self, x):
        return x


def torchmetrics_values(real, drawn):
    import torchmetrics.image.fid
    import torchmetrics.image.kid

    fid = torchmetrics.image.fid.FrechetInceptionDistance(Given(), input_img_size=(64,)).set_dtype(torch.float64)
    kid = torchmetrics.image.kid.KernelInceptionDistance(Given(), subsets=1, subset_size=len(real))
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(drawn, real=False)
    return {"frechet": fid.compute().item(), "kernel, all": kid.compute()[0].item()}


def frechet_values(real, drawn):
    import numpy as np
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    (mean, covariance), (other, spread) = ((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (drawn, real))
    statistics = [fid_features_to_statistics(x) for x in (drawn, real)]
    return {
        "pytorch-fid": float(calculate_frechet_distance(mean, covariance, other, spread)),
        "torch-fidelity": fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
    }


def kernel_values(real, drawn):
    from torch_fidelity.metric_kid import kid_features_to_metric

    options = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "verbose": False}
    options |= {"kid_kernel_poly_coef0": 1.0, "rng_seed": 2020}
    every = kid_features_to_metric(drawn, real, kid_subsets=1, kid_subset_size=len(real), **options)
    subsets = kid_features_to_metric(drawn, real, kid_subsets=100, kid_subset_size=100, **options)
    return {
        "kernel, all": every["kernel_inception_distance_mean"],
        "kernel, 100 subsets of 100": subsets["kernel_inception_distance_mean"],
        "kernel, their standard deviation": subsets["kernel_inception_distance_std"],
    }


def neighbour_values(real, drawn):
    """Balls are closed in torch-fidelity and open in prdc; without ties that is no difference."""
    from prdc import compute_prdc
    from torch_fidelity.metric_prc import prc_features_to_metric

    found = {}
    for k in (3, 5):
        options = {"prc_neighborhood": k, "prc_batch_size": 10_000, "save_cpu_ram": False, "verbose": False}
        values = prc_features_to_metric(drawn, real, **options)
        found[f"torch-fidelity, k = {k}"] = {key: values[key] for key in ("precision", "recall")}
        values = compute_prdc(real.numpy(), drawn.numpy(), nearest_k=k)
        found[f"prdc, k = {k}"] = {key: float(value) for key, value in values.items()}
    return found


def record_distances():
    from seeded import SEED, feature_sets

    real, drawn = feature_sets()
    frechet = frechet_values(real, drawn)
    tree = {
        "seed": SEED,
        "versions": versions("torch-fidelity", "pytorch-fid", "torchmetrics", "prdc", "scikit-learn"),
        "items": len(real),
        "dims": real.shape[1],
        "checks": {"sum of real": real.sum().item(), "sum of drawn": drawn.sum().item()},
        "pytorch-fid": {"frechet": frechet["pytorch-fid"]},
        "torch-fidelity": {"frechet": frechet["torch-fidelity"]} | kernel_values(real, drawn),
        "torchmetrics": torchmetrics_values(real, drawn),
        "neighbours": neighbour_values(real, drawn),
    }
    write("distances_recorded.json", tree)


def main():
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(HERE))
    declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    (HERE / "inception_keys.txt").write_text(keys())
    record_inception()
    record_distances()


if __name__ == "__main__":
    main()
