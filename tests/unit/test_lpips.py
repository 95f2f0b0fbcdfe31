"""LPIPS with small random weights in the published formats, against a direct computation layer by layer."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from genmodels.metrics import lpips
from genmodels.metrics.lpips import Files, files, load
from genmodels.metrics.weights import VARIABLE
from genmodels.rng import generator

# the number of each convolution in torchvision's `features`, its channels, kernel, stride and padding; M for a pool
ALEX = ["0 3 64 11 4 2", "T", "M 3", "3 64 192 5 1 2", "T", "M 3", "6 192 384 3 1 1", "T", "8 384 256 3 1 1", "T"]
ALEX += ["10 256 256 3 1 1", "T"]
VGG = ["0 3 64", "2 64 64", "T", "M 2", "5 64 128", "7 128 128", "T", "M 2", "10 128 256", "12 256 256"]
VGG += [
    "14 256 256",
    "T",
    "M 2",
    "17 256 512",
    "19 512 512",
    "21 512 512",
    "T",
    "M 2",
    "24 512 512",
    "26 512 512",
    "28 512 512",
    "T",
]
PLANS = {"alex": ALEX, "vgg": VGG}
NAMES = {"alex": ("alexnet-owt-7be5be79.pth", "alex.pth"), "vgg": ("vgg16.safetensors", "lpips-vgg.safetensors")}


def spec(line):
    number, inputs, outputs, kernel, stride, padding = (*map(int, line.split()), 3, 1, 1)[:6]
    return number, inputs, outputs, kernel, stride, padding


def states(network):
    """A state of torchvision's classifier, and one of the published linear layers."""
    g = generator("lpips", network)
    state, channels, outputs = {}, [], 3
    for line in PLANS[network]:
        if line == "T":
            channels.append(outputs)
        elif line[0] != "M":
            number, inputs, outputs, kernel, *_ = spec(line)
            scale = (2 / (inputs * kernel * kernel)) ** 0.5
            state[f"features.{number}.weight"] = scale * torch.randn(outputs, inputs, kernel, kernel, generator=g)
            state[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=g)
    linear = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=g) for k, c in enumerate(channels)}
    return state | {"classifier.6.bias": torch.zeros(10)}, linear


def save(path, state):
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of both networks under published names, and what they hold."""
    place = tmp_path_factory.mktemp("weights")
    held = {network: states(network) for network in PLANS}
    for network, pair in held.items():
        for name, state in zip(NAMES[network], pair, strict=True):
            save(place / name, state)
    return place, held


def directly(network, held, x, y):
    """The distance of two pictures [1, 3, H, W] in [-1, 1], in float64 and with the formula's sums written out."""
    state, linear = held[network]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = (((v[0] - shift[:, None, None]) / scale[:, None, None])[None].double() for v in (x, y))
    total, layer = 0.0, 0
    for line in PLANS[network]:
        if line == "T":
            weight = linear[f"lin{layer}.model.1.weight"].double().flatten()
            p, q = (v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-10) for v in (a, b))
            total, layer = total + torch.einsum("bchw,c->", (p - q) ** 2, weight) / (p.shape[2] * p.shape[3]), layer + 1
        elif line[0] == "M":
            a, b = (F.max_pool2d(v, int(line[2:]), 2) for v in (a, b))
        else:
            number, _, _, _, stride, padding = spec(line)
            w, bias = (state[f"features.{number}.{part}"].double() for part in ("weight", "bias"))
            a, b = (F.conv2d(v, w, bias, stride, padding).relu() for v in (a, b))
    return total.item()


@pytest.mark.parametrize("network", PLANS)
def test_the_distance_is_that_of_its_formula(folder, network, monkeypatch):
    place, held = folder
    monkeypatch.setenv(VARIABLE, str(place))
    distance = load(network, files(network))
    side = 31 if network == "alex" else 16  # the smallest that reaches the last layer
    x = torch.rand(2, 3, side, side + 3, generator=generator("x"))
    y = torch.rand(2, 3, side, side + 3, generator=generator("y"))
    wanted = torch.tensor([directly(network, held, 2 * x[i : i + 1] - 1, 2 * y[i : i + 1] - 1) for i in range(2)])
    found = distance(255 * x, 255 * y, 255)
    assert found.dtype == torch.float64 and torch.allclose(found, wanted.double(), rtol=1e-4, atol=0)
    assert torch.equal(distance(x, x, 1.0), torch.zeros(2, dtype=torch.float64))
    video = distance(x[None], y[None], 1.0)  # frames of one video
    assert video.shape == (1,) and torch.allclose(video, found.mean(), rtol=1e-4)
    grey, white = x[:, :1], y[:, :1]
    assert torch.equal(distance(grey, white, 1.0), distance(grey.expand_as(x), white.expand_as(y), 1.0))


def test_missing_weights_are_asked_for_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr("genmodels.metrics.weights.CACHE", tmp_path / "none")
    with pytest.raises(ValueError, match=r"'alex': no weights in .*alexnet-owt-7be5be79.pth \(torchvision's") as e:
        files("alex")
    assert "`lpips_backbone: <path>`" in str(e.value) and "leave LPIPS out" in str(e.value)
    place, _ = folder
    with pytest.raises(ValueError, match=r"vgg.pth \(the file vgg.pth in lpips/weights/v0.1.*`lpips_linear: <path>"):
        files("vgg", backbone=str(place / "vgg16.safetensors"))


def test_weights_of_another_network_are_refused(folder, tmp_path):
    place, held = folder
    alex, lines = place / "alexnet-owt-7be5be79.pth", place / "alex.pth"
    with pytest.raises(ValueError, match=re.escape("vgg16.safetensors lacks 'features.3.weight'")):
        load("alex", Files(place / "vgg16.safetensors", lines))
    with pytest.raises(ValueError, match=r"'lin1.model.1.weight' has the shape .1, 128, 1, 1., .1, 192, 1, 1. is"):
        load("alex", Files(alex, place / "lpips-vgg.safetensors"))
    few = {key: value for key, value in held["alex"][1].items() if key != "lin4.model.1.weight"}
    with pytest.raises(ValueError, match=r"lacks 'lin4.model.1.weight'"):
        load("alex", Files(alex, save(tmp_path / "few.pth", few)))
    (tmp_path / "cut.pth").write_bytes(alex.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load("alex", Files(tmp_path / "cut.pth", lines))


def test_pictures_that_have_no_such_distance(folder):
    place, _ = folder
    distance = load("alex", Files(*(place / name for name in NAMES["alex"])))
    for shape in ((2, 3, 30, 40), (2, 2, 40, 40), (3, 40, 40)):
        with pytest.raises(ValueError, match=r"1 or 3, H, W. of equal shape, with sides of 31 pixels or more"):
            distance(torch.zeros(shape), torch.zeros(shape), 1.0)


def test_identity_changes_with_either_file(folder, tmp_path):
    place, held = folder
    first = Files(*(place / name for name in NAMES["alex"]))
    other = Files(first.backbone, save(tmp_path / "alex.pth", {k: 2 * v for k, v in held["alex"][1].items()}))
    assert first.identity != other.identity and first.identity.split("+")[0] == other.identity.split("+")[0]
    assert set(lpips.LAYOUTS) == set(PLANS)
