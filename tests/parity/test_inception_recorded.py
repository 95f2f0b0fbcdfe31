"""Our Inception network under random weights against what torch-fidelity, pytorch-fid and clean-fid made of them.

Recorded by record_references.py; none of those packages is needed here.
"""

import json
from pathlib import Path

import pytest
import torch

from genmodels.metrics.inception import InceptionNetwork, prepare
from genmodels.metrics.weights import fit

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
