"""Our Inception network under random weights against what torch-fidelity, pytorch-fid and clean-fid made of them.

Recorded by record_references.py; none of those packages is needed here.
"""

import json
from pathlib import Path

import pytest
import torch

from genmodels.data.memory import InMemory
from genmodels.metrics.features import features_of
from genmodels.metrics.inception import Inception, InceptionNetwork, load_network, prepare
from genmodels.metrics.weights import fit
from genmodels.types import Batch

from .seeded import BATCHES, KEYS, SEED, images, inception_state

RECORDED = json.loads(Path(__file__).with_name("inception_recorded.json").read_text())


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        network = InceptionNetwork()
    network.load_state_dict(fit(inception_state(), network.state_dict(), "state"), assign=True)
    return network.eval()


def test_the_state_is_that_of_the_published_file():
    with torch.device("meta"):
        state = InceptionNetwork().state_dict()
    assert [" ".join(map(str, [key, *v.shape])) for key, v in state.items()] == KEYS.read_text().splitlines()
    assert len(state) == 566 and sum(v.numel() for v in state.values()) == 23_885_486


@pytest.mark.parametrize(
    ("batch", "how"),
    [("up", "tf1"), ("down", "tf1"), ("down", "pytorch_fid")]
    + [
        pytest.param(*slow, marks=pytest.mark.slow)
        for slow in (("up", "pytorch_fid"), ("up", "clean"), ("down", "clean"))
    ],
)
def test_features_agree(network, batch, how):
    """The order of float32 sums differs between machines: about 1e-6 of a feature; the preparations differ by 6e-3 of
    one and more."""
    assert RECORDED["seed"] == SEED
    recorded = {key: torch.tensor(value) for key, value in RECORDED["features"][batch][how].items()}
    with torch.no_grad():
        z = network(prepare(images(*BATCHES[batch]).float(), how))
    assert z.shape == (2, 2048)
    scale = recorded["mean"].mean().item()
    assert torch.allclose(z[:, :32], recorded["first"], rtol=1e-4, atol=1e-4 * scale)
    assert torch.allclose(z.mean(1), recorded["mean"], rtol=1e-5) and torch.allclose(
        z.std(1), recorded["std"], rtol=1e-5
    )


class Pictures(InMemory):
    """The recorded images of one size."""

    registered_name, bin_width, levels = "pictures", 1.0, 256

    def __init__(self, batch):
        x = images(*BATCHES[batch]).float()
        self.shape = tuple(x.shape[1:])
        for split in ("train", "val", "test"):
            self.hold(split, Batch(x))


@pytest.mark.slow
def test_a_file_of_full_size_reaches_the_same_features(tmp_path, monkeypatch):
    """Written as the published files are, found through the environment, read again, and taken for a FID by no one."""
    torch.save(inception_state(), tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    monkeypatch.setenv("GENMODELS_WEIGHTS", str(tmp_path))
    found = []
    for _ in range(2):
        load_network.cache_clear()
        extract, data = Inception(), Pictures("up")
        extract.start(data, torch.device("cpu"))
        found.append(features_of(extract, data, "train", 1))
    recorded = torch.tensor(RECORDED["features"]["up"]["tf1"]["first"])
    assert torch.allclose(found[0][:, :32], recorded, rtol=1e-4, atol=1e-4 * found[0].mean().item())
    assert torch.equal(found[0], found[1]) and "unverified" in extract.identity
    assert "FID" not in (extract.frechet_name, extract.label)
    both = extract(data.all("train").x)  # alone or together
    assert torch.allclose(both, found[0], rtol=1e-5, atol=1e-5 * both.mean().item())
