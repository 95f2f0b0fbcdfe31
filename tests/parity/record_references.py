"""Record what independent packages compute: `python tests/parity/record_references.py` writes three files beside itself.

Run it in an environment of its own, because the CPU wheel of torch and torchvision's default wheel do not fit together
(the two operators that the import asks for are declared below; nothing here calls them):

    python -m venv references && . references/bin/activate
    pip install torch==2.13.0 numpy scipy scikit-learn pillow tqdm requests lightning-utilities
    pip install --no-deps torchvision==0.28.0 torch-fidelity==0.4.0 pytorch-fid==0.3.0 torchmetrics==1.9.0 \
        clean-fid==0.1.35 prdc==0.2

genmodels is not needed. The tests recreate the same weights, images and features from seeds (seeded.py).
"""

import importlib.metadata
import json
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch

declared = torch.library.Library("torchvision", "DEF")
declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import cleanfid.resize  # noqa: E402
import numpy as np  # noqa: E402
import prdc  # noqa: E402
import pytorch_fid.fid_score  # noqa: E402
import pytorch_fid.inception  # noqa: E402
import torch_fidelity.metric_fid  # noqa: E402
import torch_fidelity.metric_kid  # noqa: E402
import torch_fidelity.metric_prc  # noqa: E402
import torchmetrics.image.fid  # noqa: E402
import torchmetrics.image.kid  # noqa: E402
from seeded import BATCHES, KEYS, SEED, feature_sets, images, inception_state  # noqa: E402
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # noqa: E402

HERE = Path(__file__).parent
KEPT = 32


def versions(*packages):
    return {name: importlib.metadata.version(name).partition("+")[0] for name in ("torch", "numpy", "scipy", *packages)}


def write(name, tree):
    (HERE / name).write_text(json.dumps(tree, indent=1) + "\n")


# ---- the network ---


def keys():
    """The published file's names and shapes, from torch-fidelity's network."""
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"), mock.patch("torch.load"):
        network = FeatureExtractorInceptionV3("any", ["2048"], "nothing is read")
    return "".join(f"{' '.join(map(str, [key, *v.shape]))}\n" for key, v in network.state_dict().items())


def networks(state):
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(state, file.name)
        fidelity = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], file.name)
        with mock.patch("pytorch_fid.inception.load_state_dict_from_url", lambda *a, **k: torch.load(file.name)):
            fid = pytorch_fid.inception.InceptionV3([3]).eval()
            unsized = pytorch_fid.inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    return fidelity, fid, unsized


def clean(x):
    """clean-fid's resizing, and the range that its network expects."""
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
    fid = torchmetrics.image.fid.FrechetInceptionDistance(Given(), input_img_size=(64,)).set_dtype(torch.float64)
    kid = torchmetrics.image.kid.KernelInceptionDistance(Given(), subsets=1, subset_size=len(real))
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(drawn, real=False)
    return {"frechet": fid.compute().item(), "kernel, all": kid.compute()[0].item()}


def record_distances():
    real, drawn = feature_sets()
    mean, covariance = zip(*((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (real, drawn)), strict=True)
    statistics = [torch_fidelity.metric_fid.fid_features_to_statistics(x) for x in (drawn, real)]
    kernel = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "verbose": False}
    kernel |= {"kid_kernel_poly_coef0": 1.0, "rng_seed": 2020}
    every = torch_fidelity.metric_kid.kid_features_to_metric(
        drawn, real, kid_subsets=1, kid_subset_size=len(real), **kernel
    )
    subsets = torch_fidelity.metric_kid.kid_features_to_metric(
        drawn, real, kid_subsets=100, kid_subset_size=100, **kernel
    )
    neighbours = {}
    for k in (3, 5):
        found = torch_fidelity.metric_prc.prc_features_to_metric(
            drawn, real, prc_neighborhood=k, prc_batch_size=10_000, save_cpu_ram=False, verbose=False
        )
        neighbours[f"torch-fidelity, k = {k}"] = {key: found[key] for key in ("precision", "recall")}
        found = prdc.compute_prdc(real.numpy(), drawn.numpy(), nearest_k=k)
        neighbours[f"prdc, k = {k}"] = {key: float(value) for key, value in found.items()}
    tree = {
        "seed": SEED,
        "versions": versions("torch-fidelity", "pytorch-fid", "torchmetrics", "prdc", "scikit-learn"),
        "items": len(real),
        "dims": real.shape[1],
        "checks": {"sum of real": real.sum().item(), "sum of drawn": drawn.sum().item()},
        "pytorch-fid": {
            "frechet": float(pytorch_fid.fid_score.calculate_frechet_distance(mean[1], covariance[1], mean[0], covariance[0]))
        },
        "torch-fidelity": {
            "frechet": torch_fidelity.metric_fid.fid_statistics_to_metric(*statistics, False)[
                "frechet_inception_distance"
            ],
            "kernel, all": every["kernel_inception_distance_mean"],
            "kernel, 100 subsets of 100": subsets["kernel_inception_distance_mean"],
            "kernel, their standard deviation": subsets["kernel_inception_distance_std"],
        },
        "torchmetrics": torchmetrics_values(real, drawn),
        "neighbours": neighbours,
    }
    write("distances_recorded.json", tree)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    KEYS.write_text(keys())
    record_inception()
    record_distances()
