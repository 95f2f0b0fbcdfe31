"""Extractors that users bring: exported programs, and classes of their own registered through a protocol's imports."""

import pytest
import torch
from torch import nn

from genmodels.evaluation.protocol import Protocol
from genmodels.metrics.exported import Exported
from genmodels.metrics.features import FeatureExtractor
from genmodels.metrics.metric import Subject
from genmodels.registry import names
from genmodels.rng import generator
from genmodels.types import Samples
from tests.evaluation_fakes import Points
from tests.unit.fakes import restored
from tests.unit.test_inception import CPU, Images, noise


def network(size):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(2))
    g = generator("exported", size)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) * 0.1
    return net.eval()


class BatchMean(nn.Module):
    """No extractor: it mixes the items."""

    def forward(self, x):
        return x.mean(0, keepdim=True)


def export(path, size=(8, 6), dynamic=True, net=None):
    net = net or network(size[0])
    axes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(net, (torch.zeros(4, 3, *size),), dynamic_shapes=axes), path)
    return net


def started(path, data=None, **options):
    extract = Exported(str(path), **options)
    extract.start(data or Images(), CPU)
    return extract


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / "net.pt2"
    return path, export(path)


@torch.no_grad()
def test_a_program_gives_what_its_network_gives(program):
    path, net = program
    x = noise(70)  # one more than a chunk and a bit
    assert torch.allclose(started(path)(x), net(x).flatten(1), atol=1e-5)
    assert torch.allclose(started(path, range=(-1, 1))(x), net(x / 127.5 - 1).flatten(1), atol=1e-5)
    for n in (1, 65):
        assert torch.allclose(started(path)(x[:n]), net(x[:n]).flatten(1), atol=1e-5)


@torch.no_grad()
def test_images_are_resized_first(tmp_path):
    net = export(tmp_path / "square.pt2", (5, 5))
    x = noise(5)
    sized = nn.functional.interpolate(x / 255, size=(5, 5), mode="bilinear", antialias=True)
    found = started(tmp_path / "square.pt2", size=5, range=(0, 1))(x)
    assert torch.allclose(found, net(sized).flatten(1), atol=1e-5)


def test_identity_is_the_program_and_the_preparation(program, tmp_path):
    path, _ = program
    copy = tmp_path / "elsewhere.pt2"
    copy.write_bytes(path.read_bytes())
    first = Exported(str(path)).identity
    assert Exported(str(copy)).identity == first and Exported.local == ("path",)
    copy.write_bytes(path.read_bytes() + b" ")
    others = [Exported(str(copy)), Exported(str(path), size=8), Exported(str(path), range=(0, 1))]
    assert len({first, *(extract.identity for extract in others)}) == 4


def test_programs_that_do_not_fit(program, tmp_path):
    path, _ = program
    with pytest.raises(ValueError, match=r"there is no file .*nothing.pt2; torch.export.save writes one"):
        Exported(str(tmp_path / "nothing.pt2")).identity  # noqa: B018
    (tmp_path / "junk.pt2").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk.pt2 is no program of torch.export"):
        started(tmp_path / "junk.pt2")
    with pytest.raises(ValueError, match=r"fails on items \[1, 2\]: .*dynamic batch axis"):
        started(path, Points())
    with pytest.raises(ValueError, match=r"items of shape \[2\] are no images; omit `size`"):
        started(path, Points(), size=8)
    with pytest.raises(ValueError, match="no levels to map to `range`"):
        started(path, Points(), range=(0, 1))
    export(tmp_path / "mean.pt2", net=BatchMean())
    with pytest.raises(ValueError, match=r"mean.pt2 gives 1 rows for 3 items"):
        started(tmp_path / "mean.pt2")
    export(tmp_path / "static.pt2", dynamic=False)
    with pytest.raises(ValueError, match=r"static.pt2 fails on items \[1, 3, 8, 6\].*dynamic batch axis"):
        started(tmp_path / "static.pt2")


MINE = '''
from genmodels.metrics.features import FeatureExtractor
from genmodels.registry import register


@register(FeatureExtractor, "row_means")
class RowMeans(FeatureExtractor):
    """The mean of every row of an image."""

    label = "row-means"

    def __init__(self, power: int = 1) -> None:
        self.power = power
        self.identity = f"row-means-v1:{power}"

    def __call__(self, x):
        return (x.double() ** self.power).mean((1, 3))
'''


def test_a_class_of_the_users_own_is_used_by_a_protocol(tmp_path, monkeypatch):
    (tmp_path / "my_lab_features.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = {"name": "mine", "version": 1, "dataset": "digits", "imports": ["my_lab_features"]}
    tree["metrics"] = [{"name": "frechet", "features": {"name": "row_means", "power": 2}}]
    with restored():
        protocol = Protocol(tree)
        (metric,) = protocol.metrics()
        assert "row_means" in names(FeatureExtractor) and metric.fingerprint == "row-means-v1:2"
        metric.start(Subject(None, protocol.dataset, CPU, 500))
        x = protocol.dataset.all("train").x
        metric.update(Samples(torch.arange(len(x)), x, features={metric.features.identity: metric.features(x)}), None)
        found = metric.compute()["FD-row-means"]
        assert found.value == pytest.approx(0, abs=1e-6) and found.n == len(x)
        other = Protocol({**tree, "metrics": [{"name": "frechet", "features": "row_means"}]})
        assert other.hash != protocol.hash
    assert "row_means" not in names(FeatureExtractor)
