"""The Inception extractor: where its weights are found, how they are named, and how images reach the network.

The network has a sixteenth of its width here; the full one is compared with independent packages in tests/parity.
"""

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genmodels.data.digits import Digits
from genmodels.data.memory import InMemory
from genmodels.evaluation.evaluate import evaluate
from genmodels.metrics import inception
from genmodels.metrics.frechet import Frechet
from genmodels.metrics.image_features import exact
from genmodels.metrics.inception import Inception, InceptionNetwork, prepare, resize_pillow, resize_tf1
from genmodels.metrics.metric import Subject
from genmodels.metrics.weights import VARIABLE
from genmodels.registry import build, resolve
from genmodels.rng import SeedNoise, generator
from genmodels.types import Batch, Samples
from tests.evaluation_fakes import FakeProtocol, FakeRun, Levels, Points, _Base

CPU = torch.device("cpu")
PUBLISHED, TWIN, CONVERTED = inception.FILES


class Images(InMemory):
    """Noise with 256 levels."""

    registered_name, bin_width, levels = "images", 1.0, 256

    def __init__(self, channels=3, sizes=(12, 0, 0)):
        self.shape = (channels, 8, 6)
        for split, size in zip(("train", "val", "test"), sizes, strict=True):
            self.hold(split, Batch(noise(size, channels)))


def noise(n, channels=3):
    return torch.randint(0, 256, (n, channels, 8, 6), generator=generator("test images", channels)).float()


def state(network, seed=0):
    """A random state that a published file could hold: no layer dies and none explodes."""
    g = generator("inception state", seed)
    drawn = {}
    for key, value in network.state_dict().items():
        if value.ndim > 1:
            drawn[key] = torch.randn(value.shape, generator=g) * (2 / value[0].numel()) ** 0.5
        elif key.endswith("num_batches_tracked"):
            drawn[key] = torch.tensor(0)
        else:
            drawn[key] = torch.rand(value.shape, generator=g) + (0.5 if key.endswith(("bn.weight", "var")) else -0.5)
    return drawn


@pytest.fixture(autouse=True)
def narrow(monkeypatch, tmp_path):
    """A narrow network, and neither a home nor a folder of weights."""
    monkeypatch.setattr(inception, "InceptionNetwork", partial(InceptionNetwork, width=1 / 16))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(VARIABLE, raising=False)
    inception.load_network.cache_clear()
    yield
    inception.load_network.cache_clear()


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / PUBLISHED
    torch.save(state(inception.InceptionNetwork()), path)
    return path


@pytest.fixture
def official(weights, monkeypatch):
    """Weights whose checksum is the published one."""
    monkeypatch.setattr(inception, "SHA256", inception.checksum(weights))
    return str(weights)


def started(weights, data=None, **options):
    extract = Inception(str(weights), **options)
    extract.start(data or Images(), CPU)
    return extract


# ---- weights ---


def test_weights_are_found_where_they_are_named_first(weights, tmp_path, monkeypatch):
    cache, folder = tmp_path / "home/.cache/genmodels/weights", tmp_path / "folder"
    for place in (cache, folder):
        place.mkdir(parents=True)
    found = []
    for place, name in ((cache, TWIN), (cache, PUBLISHED), (folder, CONVERTED), (folder, TWIN)):
        (place / name).write_bytes(b"")
        found.append(Inception().path)
        monkeypatch.setenv(VARIABLE, str(folder))
    assert found == [cache / TWIN, cache / PUBLISHED, folder / CONVERTED, folder / TWIN]
    assert Inception(str(weights)).path == weights
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    assert Inception().path == cache / PUBLISHED
    with pytest.raises(ValueError, match="there is no file"):  # a wrong path is never replaced by another file
        Inception(str(tmp_path / "gone.pth")).path  # noqa: B018


def test_missing_weights_are_described(tmp_path, monkeypatch):
    extract = Inception()  # configurations are read and listed without any weights
    for ask in (lambda: extract.identity, lambda: extract.label, lambda: extract.start(Images(), CPU)):
        with pytest.raises(ValueError) as caught:
            ask()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "folder"))
    text = str(caught.value)
    for part in (
        PUBLISHED,
        TWIN,
        "6726825d",
        "pytorch-fid",
        "torch-fidelity",
        VARIABLE,
        "weights:",
        "features: digits",
    ):
        assert part in text
    assert ".cache/genmodels/weights" in text and "://" not in text
    with pytest.raises(ValueError, match=r"folder or .*weights\. Needed"):
        Inception().identity  # noqa: B018
    with pytest.raises(ValueError, match=r"there is no file gone\.pth"):
        Inception("gone.pth").identity  # noqa: B018


def test_only_the_published_weights_give_a_fid(official):
    short = inception.SHA256[:8]
    extract = Inception(official)
    assert (extract.label, extract.frechet_name, extract.kernel_name) == ("inception", "FID", "KID")
    assert extract.identity == f"inception-tf2015:{short}:tf1"
    extract = Inception(official, "clean")
    assert (extract.label, extract.frechet_name, extract.kernel_name) == ("inception-clean", "FID-clean", "KID-clean")
    assert extract.identity == f"inception-tf2015:{short}:clean"


def test_other_weights_never_give_a_fid(weights):
    found = inception.checksum(weights)
    extract = Inception(str(weights))
    assert extract.label == "inception-unverified" and extract.kernel_name == "KID-inception-unverified"
    assert extract.frechet_name == "FD-inception-unverified"
    assert extract.identity == f"inception-tf2015:unverified:{found[:12]}:tf1"
    metric = Frechet(extract, allow_few=True)
    metric.start(Subject(None, Images(), CPU, 16))
    metric.update(Samples(torch.arange(8), noise(8), features={extract.identity: extract(noise(8))}), None)
    assert list(metric.compute()) == ["FD-inception-unverified"]


def test_the_published_checksum_is_that_of_the_file_names():
    assert len(inception.SHA256) == 64 and all(inception.SHA256[:8] in name for name in (PUBLISHED, TWIN))


def test_another_file_in_the_same_place_is_noticed(weights):
    extract = Inception(str(weights))
    before = extract.identity, started(weights)(noise(2))
    torch.save(state(inception.InceptionNetwork(), seed=1), weights)
    assert extract.identity != before[0]
    assert not torch.allclose(started(weights)(noise(2)), before[1], rtol=0.1)


def test_safetensors_hold_the_same_network(weights, tmp_path):
    path = tmp_path / CONVERTED
    save_file(state(inception.InceptionNetwork()), path)
    assert torch.equal(started(path)(noise(3)), started(weights)(noise(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Mixed_6a.branch3x3.bn.bias"), r"lacks 'Mixed_6a.branch3x3.bn.bias' \(1 keys missing, 0"),
        (lambda s: s.update(AuxLogits=torch.zeros(1)), "has the unexpected 'AuxLogits'"),
        (lambda s: s.update({"fc.bias": torch.zeros(1000)}), r"'fc.bias' has the shape \[1000\], \[1008\] is needed"),
        (lambda s: s.update(optimizer={}), "holds a dict; a flat dictionary of tensors"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, change, message):
    drawn = state(inception.InceptionNetwork())
    change(drawn)
    torch.save(drawn, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        started(tmp_path / "other.pth")


class Payload:
    """Something that only an unrestricted unpickler would build."""


def test_damaged_files_and_pickled_code_are_refused(weights, tmp_path):
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ValueError, match=rf"{name} cannot be read .*damaged, perhaps a copy that was cut off"):
            started(tmp_path / name)
    torch.save(Payload(), tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"cannot be read \(UnpicklingError"):
        started(tmp_path / "code.pth")


# ---- images ---


def test_features_belong_to_their_item(weights):
    extract, x = started(weights), noise(40)  # 40 > chunk
    z = extract(x)
    assert z.shape == (40, 128) and z.isfinite().all() and z.dtype == torch.float32 and not z.requires_grad
    assert z.std(0).median() > 1e-3 * z.mean()  # it sees the images
    # convolutions of another batch size may add in another order: 1e-5 of a feature of order 1
    assert torch.allclose(extract(x[31:33]), z[31:33], atol=1e-5 * z.max().item(), rtol=1e-5)


def test_grey_images_become_three_equal_channels(weights):
    grey = noise(3, channels=1)
    extract = started(weights, Images(channels=1))
    assert torch.equal(extract(grey), started(weights)(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"items have shape \[3, 8, 6\], but it was started for \[1, 8, 6\]"):
        extract(noise(2))
    with pytest.raises(ValueError, match="never started"):
        Inception(str(weights))(grey)


def test_levels_are_spread_over_the_range_of_bytes_and_rounded(weights):
    digits = Digits()
    x = digits.all("test").x[:3]
    extract = started(weights, digits)
    seen = []
    extract.embed = lambda images: seen.append(images) or images.flatten(1)
    extract(x)
    expected = np.floor(x.double().numpy() / 16 * 255 + 0.5)
    assert np.array_equal(seen[0].numpy(), np.broadcast_to(expected, (3, 3, 8, 8)))
    assert seen[0].dtype == torch.float32 and seen[0].max() == 255


@pytest.mark.parametrize(
    ("data", "message"),
    [(Points(), r"shape \[2\]; images \[1, H, W\]"), (Levels(), r"shape \[3\]"), (Images(2), r"shape \[2, 8, 6\]")],
)
def test_items_that_are_no_images_are_refused(weights, data, message):
    with pytest.raises(ValueError, match=message):
        started(weights, data)


def test_continuous_images_are_refused(weights):
    data = Images()
    data.levels = None
    with pytest.raises(ValueError, match="no levels"):
        started(weights, data)


def test_arithmetic_is_float32_whatever_surrounds_it(weights):
    extract, x = started(weights), noise(2)
    z = extract(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract(x), z)
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings:
            s.fp32_precision = "tf32"
        with exact(CPU):
            assert [s.fp32_precision for s in settings] == ["ieee", "ieee"]
        assert [s.fp32_precision for s in settings] == ["tf32", "tf32"]
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


@pytest.mark.gpu
def test_a_gpu_gives_the_same_features(weights):
    extract, x = started(weights), noise(4)
    z = extract(x)
    extract.start(Images(), torch.device("cuda"))
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # the default
    assert torch.allclose(extract(x).cpu(), z, rtol=1e-4, atol=1e-4 * z.max().item())


# ---- preparation ---


def test_tensorflow_1_resizing_has_no_half_pixel_offset():
    """Output i lies at i · size / side of the source; nothing is averaged when the image shrinks."""
    line = torch.tensor([0.0, 3.0, 9.0]).reshape(1, 1, 1, 3)
    assert torch.allclose(resize_tf1(line, 6)[0, 0, 0], torch.tensor([0.0, 1.5, 3.0, 6.0, 9.0, 9.0]))
    assert torch.equal(resize_tf1(line.mT, 6), resize_tf1(line, 6).mT)
    assert resize_tf1(torch.arange(36.0).reshape(1, 1, 6, 6), 3).flatten().tolist() == [0, 2, 4, 12, 14, 16, 24, 26, 28]
    rows, columns = torch.arange(10.0)[:, None], torch.arange(7.0)
    plane = resize_tf1((5 * rows + 2 * columns).reshape(1, 1, 10, 7), 20)[0, 0]
    exact = 5 * (torch.arange(20) / 2).clamp(max=9)[:, None] + 2 * (torch.arange(20) * 7 / 20).clamp(max=6)
    assert torch.allclose(plane, exact, atol=1e-5)


def test_value_range_of_each_preparation():
    x = torch.tensor([0.0, 128.0, 255.0]).reshape(3, 1, 1, 1).expand(3, 3, 5, 4)
    for how, expected in (
        ("tf1", [-1, 0, 127 / 128]),
        ("clean", [-1, 0, 127 / 128]),
        ("pytorch_fid", [-1, 1 / 255, 1]),
    ):
        out = prepare(x, how)
        assert out.shape == (3, 3, 299, 299)
        assert torch.allclose(out, torch.tensor(expected).reshape(3, 1, 1, 1).expand_as(out), atol=1e-6), how


def test_clean_resizing_is_bicubic_clipped_and_not_rounded():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 255
    out = resize_pillow(edge, 299)
    assert out.min() == 0 and out.max() == 255  # bicubic overshoots at an edge
    assert (out != out.round()).float().mean() > 0.1
    smooth = resize_pillow(edge / 2 + 60, 299)
    assert smooth.min() < 60 - 1  # inside the range the overshoot stays


def test_the_configuration_reaches_the_extractor(weights):
    node = {"name": "frechet", "features": {"name": "inception", "weights": str(weights), "preprocess": "pytorch_fid"}}
    metric = build(inception.FeatureExtractor, resolve(inception.FeatureExtractor, node["features"], "features"))
    assert metric.identity.endswith(":pytorch_fid") and metric.local == ("weights",) and metric.costly


class Noise(_Base):
    """Draws noise with 256 levels."""

    def sample(self, seeds, *, condition=None):
        return (256 * SeedNoise(seeds).uniform(*self.shape)).floor()


def test_an_evaluation_shares_the_features_of_its_metrics(weights, tmp_path, monkeypatch):
    """Every metric has an extractor of its own, and one of them reads the data and the drawn items, once."""
    features = {"name": "inception", "weights": str(weights)}
    metrics = [{"name": "authenticity", "features": features}]
    metrics += [{"name": "frechet", "features": features, "allow_few": True}]
    seen = []

    def embed(self, images):
        seen.append(images)
        return images.mean((2, 3))

    monkeypatch.setattr(Inception, "embed", embed)
    run = FakeRun(tmp_path / "runs" / "noise", Noise((3, 8, 6)))
    data = Images(sizes=(30, 0, 20))
    result = evaluate(run, FakeProtocol(data, metrics, sample={"num_items": 16, "batch_size": 16}), device="cpu")
    assert "FD-inception-unverified" in {m["name"] for m in result["metrics"]}
    for split in ("train", "test"):
        x = data.all(split).x
        assert sum(images.shape == x.shape and torch.equal(images, x) for images in seen) == 1
    assert sum(len(images) == 16 for images in seen) == 1
