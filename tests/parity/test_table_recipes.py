"""The recipes of the UCI tables beside the flows that the paper's code builds."""

from pathlib import Path

import pytest
import torch

from genmodels.config import load
from genmodels.flows.nflows_state import load_nflows
from tests.parity.test_nflows_state import items, their

T = pytest.importorskip("nflows.transforms")
from nflows.nn.nets import ResidualNet
from nflows.utils import torchutils

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["", "_ar"])
def test_the_recipe_of_a_table_is_the_flow_of_the_paper(kind):
    """MINIBOONE as the paper's code builds it, with nflows: every tensor and mask has its place."""
    dims, bins, hidden = 43, 4, 64 if kind else 32

    def layer(i):
        if kind:
            return T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                dims, hidden, num_blocks=1, num_bins=bins, tails="linear", tail_bound=3.0
            )
        return T.PiecewiseRationalQuadraticCouplingTransform(
            mask=torchutils.create_alternating_binary_mask(dims, even=(i % 2 == 0)),
            transform_net_create_fn=lambda a, b: ResidualNet(a, b, hidden_features=hidden, num_blocks=1),
            num_bins=bins,
            tails="linear",
            tail_bound=3.0,
            apply_unconditional_transform=True,
        )

    def linear_of_paper():
        return T.CompositeTransform([T.RandomPermutation(dims), T.LULinear(dims, identity_init=True)])

    parts = [T.CompositeTransform([linear_of_paper(), layer(i)]) for i in range(10)]
    theirs = their(T.CompositeTransform([*parts, linear_of_paper()]), (dims,))
    config = load([ROOT / "configs" / "tables" / f"miniboone{kind}.yaml"], blank=True)
    facts = {"num_classes": None, "condition_shape": None, "target_shape": None, "bin_width": None}
    flow = config.model({"shape": [dims], "transform": {"name": "identity"}, **facts}).double().eval()
    load_nflows(flow, theirs.state_dict())
    x = items(16, (dims,))
    # log p is of the order of -1e3 here
    torch.testing.assert_close(flow.log_prob(x), theirs.log_prob(x), rtol=1e-11, atol=0)
